"""A tiny model, its data and a run of it, which the tests of the command line share."""

import signal

import pytest
from tiny_run import adazeta, train_command, write_data, write_model


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Return a folder with a tiny base model ``base``, labelled texts ``data.jsonl`` and a run ``run``, and the ended
    process that made the run."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "base")
    write_data(folder / "data.jsonl")
    done = adazeta(*train_command(folder, "run"))
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(autouse=True)
def gives_ctrl_c_back():
    """Fail the test after which another handler of Ctrl-C is there than before it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after == before, f"SIGINT is left with {after}, where {before} was"


@pytest.fixture
def ctrl_c():
    """Ctrl-C as Python has it, also where the suite was started with that signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
