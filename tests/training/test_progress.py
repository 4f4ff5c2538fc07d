"""What long work shows: a bar on a terminal, whole lines in a file or a pipe."""

import io
import sys

import pytest

from adazeta.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(monkeypatch, stream) -> str:
    """What two bars, one inside the other, and a line between them write to `stream`."""
    monkeypatch.setattr(sys, "stderr", stream)
    outer, inner = progress_bar(3, "train", "steps"), progress_bar(2, "dev", "batches", leave=False)
    for _ in range(3):
        outer.update(1)
        outer.refresh()
    inner.update(2)
    inner.close()
    outer.write("step 3: dev loss 0.5", file=sys.stderr)
    outer.close()
    return stream.getvalue()


def test_in_a_file_every_state_is_a_line(monkeypatch):
    text = drawn(monkeypatch, io.StringIO())
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert lines[0].startswith("train   0%|") and lines[-1].startswith("train 100%|")
    assert lines[-2] == "step 3: dev loss 0.5" and all(lines)
    assert not any(line.startswith("dev ") for line in lines)  # shorter than ten seconds


def test_on_a_terminal_a_bar_is_drawn_over_itself(monkeypatch):
    text = drawn(monkeypatch, Terminal())
    assert text.count("\rtrain") > 1 and "\rdev" in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_is_left_open(monkeypatch, stream):
    drawn(monkeypatch, stream())
    from tqdm import tqdm

    assert not list(tqdm._instances)
