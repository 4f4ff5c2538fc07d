import json

import pytest

from adazeta.errors import UserError
from adazeta.plots import draw_curves, smooth
from adazeta.progress import MetricsFile, read_metrics

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
