"""Processes that die at random instants, or find the disk full: no committed step lost, no bit different."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("soak", Path(__file__).resolve().parents[2] / "scripts" / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_nothing_is_lost_in_twenty_deaths(tmp_path, one_thread):
    seed = random.SystemRandom().randrange(2**32)
    counts = soak.soak(soak.Loop(steps=16), tmp_path, kills=20, seed=seed)
    assert counts["deaths"] >= 20 and counts["runs"] >= 1
    assert (counts["lost steps"], counts["differing"], counts["crashes"]) == (0, 0, 0), (seed, counts)


def test_a_loss_and_a_difference_would_be_seen(tmp_path, one_thread, monkeypatch):
    append = soak.Journal.append

    def forgetting(self, step):  # a record every other step: the update is made all the same
        if step.index % 2:
            self.next_step += 1
        else:
            append(self, step)

    run = soak.Loop(steps=8)
    live = run.live

    def broken(folder, told):
        if folder.name != "undisturbed":
            monkeypatch.setattr(soak.Journal, "append", forgetting)
        live(folder, told)

    run.live = broken
    with pytest.raises(Exception, match="damaged at byte"):  # the order of steps is wrong
        soak.soak(run, tmp_path, kills=3, seed=1)
