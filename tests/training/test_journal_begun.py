"""Journals that are begun: two at once, where another was, on a full disk, and with initial numbers of their own."""

import errno
import os
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from test_journal import initial_file, train

from adazeta import UserError, journal
from adazeta.journal import INITIAL_NAME, NAME, Journal, read
from adazeta.replay import replay


def test_of_two_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    train(tmp_path / "first", steps_to_do=2, noise=0.2)
    whole = (tmp_path / "first" / NAME).read_bytes()
    header, values = read(tmp_path / "first" / NAME).header, load_file(initial_file(tmp_path / "first"))
    path, held = tmp_path / "both" / NAME, journal._held

    @contextmanager
    def slowly(there):  # another begins, and records, when this one has found no journal
        with held(there) as earlier:
            shutil.copytree(tmp_path / "first", tmp_path / "both")
            yield earlier

    monkeypatch.setattr(journal, "_held", slowly)
    with pytest.raises(UserError, match="another process has just begun .*choose another folder"):
        Journal.create(path, header, values)
    assert path.read_bytes() == whole and replay(tmp_path / "both").step == 2
    assert not list(tmp_path.glob("*/.*"))


def test_a_journal_begins_where_files_have_one_name_only(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    train(tmp_path, steps_to_do=2)
    assert len(read(tmp_path / NAME).steps) == 2


@pytest.mark.parametrize("stale", [False, True])
def test_a_journal_that_cannot_be_begun_leaves_the_earlier_run_whole(tmp_path, monkeypatch, stale):
    train(tmp_path, noise=0.2)
    path, before = tmp_path / NAME, {p: p.read_bytes() for p in tmp_path.iterdir()}
    if stale:  # killed, with the id of this process, between two names of one file
        os.link(path, tmp_path / f".{NAME}.{os.getpid()}.tmp")
    rename = os.replace

    def full(source, target, **keywords):
        if os.path.basename(target) == NAME:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target, **keywords)

    with monkeypatch.context() as during:
        during.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device; the earlier file is unchanged"):
            train(tmp_path, noise=0.3)
    assert replay(tmp_path).step == 4 and all(p.read_bytes() == content for p, content in before.items())
    earlier = initial_file(tmp_path)
    model, _ = train(tmp_path, steps_to_do=2, noise=0.3)
    assert torch.equal(replay(tmp_path).trainable.tensors[0], model.base_model.theta())
    assert not earlier.exists() and initial_file(tmp_path).exists()
    train(tmp_path, steps_to_do=1)
    assert not list(tmp_path.glob("journal-initial*"))


def test_initial_numbers_under_their_old_name_are_read_and_go_with_their_journal(tmp_path):
    model, _ = train(tmp_path, noise=0.2)
    os.rename(initial_file(tmp_path), tmp_path / INITIAL_NAME)
    assert torch.equal(replay(tmp_path).trainable.tensors[0], model.base_model.theta())
    train(tmp_path, noise=0.3)
    assert not (tmp_path / INITIAL_NAME).exists() and replay(tmp_path).step == 4
