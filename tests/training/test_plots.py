import json
import re
from xml.etree import ElementTree

import pytest

from adazeta.compare import Record
from adazeta.errors import UserError
from adazeta.page import write_page
from adazeta.plots import draw_curves, draw_runs, figure_of, smooth
from adazeta.progress import MetricsFile
from adazeta.runs import read_metrics

LINES = [
    {"kind": "dev", "step": 0, "rows": 0, "seconds": 0.0, "loss": 0.7, "accuracy": 0.5},
    {"kind": "train", "step": 1, "rows": 32, "seconds": 1.0, "loss": 0.6},
    {"kind": "train", "step": 2, "rows": 64, "seconds": 2.0, "loss": 0.5},
    {"kind": "dev", "step": 2, "rows": 64, "seconds": 2.0, "loss": 0.4, "accuracy": 0.8},
]


def size_of(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_smoothing_is_an_average_and_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0], weight=0.5) == pytest.approx([1.0, (1.0 + 2 * 3.0) / 3])
    assert smooth([]) == []


def test_curves_with_and_without_points(tmp_path):
    levels = {"before": {"loss": 0.7, "accuracy": 0.5}, "after": {"loss": 0.4, "accuracy": 0.8}}
    for name, lines in (("all", LINES), ("dev", LINES[:1]), ("none", [])):
        draw_curves(lines, tmp_path / f"{name}.png", title=name, **levels)
        assert size_of(tmp_path / f"{name}.png") == (1300, 546)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "dev.png", "none.png"]  # nothing aside


def test_curves_show_what_they_are_given(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, levels = [], []
    plot, axhline = Axes.plot, Axes.axhline
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **k: drawn.append((k["label"], list(x), list(y))) or plot(self, x, y, **k)
    )
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: levels.append((k["label"], y)) or axhline(self, y, **k))
    draw_curves(LINES, tmp_path / "x.png", before={"loss": 0.7, "accuracy": 0.5})
    assert ("dev", [0, 64], [0.7, 0.4]) in drawn
    assert ("dev", [0, 64], [0.5, 0.8]) in drawn
    assert drawn[0][:2] == ("train, smoothed", [32, 64])
    assert levels == [("test before: 0.700", 0.7), ("test before: 50.0%", 0.5)]


def test_a_failed_drawing_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"earlier")
    with pytest.raises(KeyError):
        draw_curves([{"kind": "train", "loss": 1.0}], path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write"):
        draw_curves(LINES, path / "below" / "curves.png")


OLD = [{**line, "queries": 8, "spread": 0.5} if line["kind"] == "train" else line for line in LINES]
NEW = [
    {**line, "zo/queries": 4, "zo/projected_grad_std": 0.25, "zo/snr": 0.1, "peak_mib": 300.0}
    if line["kind"] == "train"
    else line
    for line in LINES
]


def record(name, lines):
    return Record(name, {"settings": {"lr": len(name)}}, {}, lines)


def test_panels_of_runs_old_and_new():
    figure = figure_of([record("old", OLD), record("newer", NEW)])
    drawn = {}
    for axes in figure.axes:
        drawn[axes.get_ylabel(), axes.get_xlabel()] = [(*map(list, line.get_data()),) for line in axes.get_lines()]
    rows, seconds = "forward rows", "seconds of training, without evaluations"
    assert drawn["accuracy", rows] == [([0, 64], [0.5, 0.8])] * 2
    assert drawn["accuracy", seconds] == [([0.0, 2.0], [0.5, 0.8])] * 2
    assert [len(drawn["loss (nats per example)", against]) for against in (rows, seconds)] == [4, 4]
    assert drawn["queries per step", "step"] == [([1, 2], [8, 8]), ([1, 2], [4, 4])]
    assert drawn["spread of the projected gradients", "step"] == [([1, 2], [0.5, 0.5]), ([1, 2], [0.25, 0.25])]
    assert drawn["peak memory, MiB", "step"] == [([1, 2], [300.0, 300.0])]  # the old run has none
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["old", "newer"]
    with pytest.raises(UserError, match="empty: no step and no evaluation"):
        draw_runs([record("empty", [])], "nowhere/plot.png")


def test_a_page_needs_nothing_else(tmp_path):
    write_page([record("a<b", OLD), record("new", NEW)], tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text()
    assert "a&lt;b" in page and "a<b" not in page
    assert "<script" not in page and "src=" not in page and "<link" not in page
    assert set(re.findall(r"https?://[^\"]+", page)) == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    words = " ".join(svg.itertext())
    assert "queries per step" in words and "forward rows" in words  # text is text, not outlines
    assert "50.0% -&gt; 80.0%" in page
    write_page([record("a<b", OLD), record("new", NEW)], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_names_are_no_formulas(tmp_path):
    draw_runs([record("lr$x^$", OLD), record("new", NEW)], tmp_path / "plot.png")
    draw_curves(OLD, tmp_path / "curves.png", title="runs/lr$x^$")
    write_page([record("lr$x^$", OLD)], tmp_path / "plot.html")
    assert "lr$x^$" in (tmp_path / "plot.html").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000 < (tmp_path / "curves.png").stat().st_size


def test_a_cut_last_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"kind": "tra')
    assert read_metrics(path) == LINES
    assert read_metrics(tmp_path / "none") == []


class State:
    global_step = 1


def test_metrics_on_a_full_disk():
    metrics = MetricsFile.__new__(MetricsFile)
    metrics.__init__("/dev/full")
    metrics._stream = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write /dev/full: the disk is full"):
        metrics.on_log(None, State, None, logs={"loss": 1.0, "rows": 2})


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    metrics = MetricsFile(path)
    metrics.on_train_begin(None, State, None)
    metrics.on_log(None, State, None, logs={"loss": 0.1, "rows": 64})
    metrics.on_train_end(None, State, None)
    lines = read_metrics(path)
    assert lines[:2] == LINES[:2]
    assert (lines[2]["step"], lines[2]["rows"], lines[2]["loss"]) == (1, 64, 0.1)
    assert lines[2]["seconds"] >= 1.0
