"""The journal: replay to the last bit, damage found, torn tails cut, other runs named, a full disk, one writer."""

import errno
import os
import re
import signal
import struct
import zlib

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import lm_batch, tiny_adapted

from adazeta import UserError, ZerothOrder
from adazeta.errors import JournalError
from adazeta.journal import NAME, Journal, initial_path, read, steps
from adazeta.journal_format import header_bytes
from adazeta.losses import lm_loss
from adazeta.replay import replay
from adazeta.update import Step
from adazeta_kernels import TTAdapterLayout


def train(folder, steps_to_do=4, noise=0.0, model_settings=None, **settings):
    model = tiny_adapted(noise=noise, **(model_settings or {}))
    opt = ZerothOrder(model, **{"lr": 0.1, "queries": 2, "run_seed": 11, **settings})
    opt.write_journal(folder / NAME)
    for k in range(steps_to_do):
        opt.param_groups[0]["lr"] = 0.1 / (k + 1)
        opt.estimate(lm_loss, lm_batch(4, seed=k))
        opt.step()
    opt.journal.close()
    model.save_pretrained(folder)
    return model, opt


def initial_file(folder):
    return initial_path(folder / NAME, read(folder / NAME).header)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.3},
        {"momentum": 0.5, "weight_decay": 0.3, "distribution": "rademacher", "directions": "example"},
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_replay_rebuilds_the_adapter_bit_for_bit(tmp_path, settings, noise):
    model, _ = train(tmp_path, noise=noise, **settings)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rebuilt = replay(tmp_path).tensors
    assert rebuilt.keys() == saved.keys()
    assert all(torch.equal(rebuilt[name], saved[name]) for name in saved)
    # An untouched start needs only the seed; one that was moved has its values beside the journal.
    assert initial_file(tmp_path).exists() == (noise > 0)


def test_replay_with_a_trained_head(tmp_path):
    model, _ = train(tmp_path, model_settings={"modules_to_save": ["lm_head"]}, weight_decay=0.1, momentum=0.5)
    saved = get_peft_model_state_dict(model)
    rebuilt = replay(tmp_path).tensors
    assert rebuilt.keys() == saved.keys() and all(torch.equal(rebuilt[n], saved[n]) for n in saved)


def test_a_step_costs_a_few_bytes(tmp_path):
    train(tmp_path, steps_to_do=1)
    one = (tmp_path / NAME).stat().st_size
    train(tmp_path, steps_to_do=5)
    assert (tmp_path / NAME).stat().st_size - one == 4 * (80 + 2 * 4)


def test_steps_are_what_was_done(tmp_path):
    train(tmp_path, momentum=0.9)
    recorded = list(steps(tmp_path / NAME))
    assert [s.index for s in recorded] == [0, 1, 2, 3]
    assert [s.lr for s in recorded] == [0.1 / (k + 1) for k in range(4)]
    assert all(len(s.coefficients) == 2 and s.momentum == 0.9 for s in recorded)


def test_every_truncation_and_every_flipped_bit_is_found(tmp_path):
    train(tmp_path, steps_to_do=3)
    path = tmp_path / NAME
    whole = path.read_bytes()
    ends = read(path).ends
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size in ends:
            continue  # a run that was stopped between two steps is whole
        with pytest.raises(UserError):
            read(path)
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            read(path)


def test_resume_keeps_every_whole_step_and_heals_a_torn_record(tmp_path):
    train(tmp_path, steps_to_do=4)
    path = tmp_path / NAME
    whole = path.read_bytes()
    header = read(path).header
    for torn, done in ((whole[:-5], 3), (whole[:-100], 2), (whole + bytes(4096), 4)):  # the last was never filled
        path.write_bytes(torn)
        journal, kept = Journal.resume(path, header)
        assert [step.index for step in kept] == list(range(done)) and journal.next_step == done
        journal.append(Step(done, 0.5, 0.0, 0.0, (1.0,)))
        journal.close()
        assert [s.lr for s in steps(path)] == [0.1 / (k + 1) for k in range(done)] + [0.5]


def test_a_record_that_ends_in_zeros_to_the_end_of_the_file_is_torn_wherever_they_begin(tmp_path):
    train(tmp_path, steps_to_do=4)
    path = tmp_path / NAME
    whole, ends, header = path.read_bytes(), read(path).ends, read(path).header
    for begin in range(ends[2], ends[3]):
        for size in (ends[3], ends[4], ends[4] + 4096):
            path.write_bytes(whole[:begin] + bytes(size - begin))
            if whole[begin : ends[3]].strip(b"\0"):  # else all of the record is there
                with pytest.raises(JournalError, match=f"cut off at byte {ends[2]}, inside the record after step 1"):
                    read(path)
                assert len(read(path, repair=True).steps) == 2
    journal, kept = Journal.resume(path, header)
    journal.close()
    assert len(kept) in (2, 3) and path.stat().st_size == ends[len(kept)]


def test_zeros_that_hide_no_end_are_damage(tmp_path):
    train(tmp_path, steps_to_do=4)
    path = tmp_path / NAME
    whole, ends = path.read_bytes(), read(path).ends
    for at, zeros, behind in (
        (ends[1] + 40, ends[2] - ends[1] - 40, 0),  # whole records follow
        (ends[1] + 40, 10, 0),
        (ends[3] + 40, 10, 0),  # in the last record: its checksum is there
        (ends[3] + 81, 4, 4096),
        (ends[3] + 40, ends[4] - ends[3] - 41, 0),  # the last byte is there
    ):
        path.write_bytes(whole[:at] + bytes(zeros) + whole[at + zeros :] + bytes(behind))
        record = 1 if at < ends[2] else 3
        with pytest.raises(JournalError, match=f"damaged at byte {ends[record]} "):
            read(path, repair=True)


def test_damage_in_the_middle_is_refused_with_its_place_and_nothing_is_cut(tmp_path):
    train(tmp_path, steps_to_do=4)
    path = tmp_path / NAME
    whole, ends, header = path.read_bytes(), read(path).ends, read(path).header
    for record, byte in ((0, 3), (1, 70), (2, 78), (3, 85)):  # of the index, the number of words, a coefficient, a CRC
        damaged = bytearray(whole)
        damaged[ends[record] + byte] ^= 0x40
        path.write_bytes(damaged)
        for attempt in (read, lambda path: Journal.resume(path, header)):
            with pytest.raises(JournalError, match=f"damaged at byte {ends[record]} ") as caught:
                attempt(path)
            assert caught.value.offset == ends[record] and isinstance(caught.value, ValueError)
        assert path.read_bytes() == damaged


def test_a_record_of_another_journal_or_place_is_found(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        train(tmp_path / name, steps_to_do=3, run_seed=seed)
    path = tmp_path / "a" / NAME
    a, b, ends = path.read_bytes(), (tmp_path / "b" / NAME).read_bytes(), read(path).ends
    assert len(a) == len(b)
    for content in (
        a[: ends[1]] + b[ends[1] :],  # the rest of another run
        a[: ends[1]] + a[ends[2] :],  # a step taken out
        a[: ends[2]] + a[ends[1] :],  # a step twice
    ):
        path.write_bytes(content)
        with pytest.raises(JournalError, match="damaged at byte"):
            read(path)


def test_two_writers(tmp_path):
    train(tmp_path, steps_to_do=2)
    path = tmp_path / NAME
    header = read(path).header
    first, _ = Journal.resume(path, header)
    before = path.read_bytes()
    for second in (lambda: Journal.resume(path, header), lambda: Journal.create(path, header)):
        with pytest.raises(UserError, match="another process writes to"):
            second()
    assert path.read_bytes() == before
    first.append(Step(2, 0.5, 0.0, 0.0, (1.0,)))
    first.close()
    Journal.create(path, header).close()
    with pytest.raises(ValueError, match="is closed"):
        first.append(Step(3, 0.5, 0.0, 0.0, (1.0,)))


@pytest.mark.parametrize(
    ("settings", "model", "key"),
    [
        ({"run_seed": 12}, {}, "run_seed"),
        ({"eps": 0.5}, {}, "config.eps"),
        ({"queries": 3}, {}, "config.queries"),
        ({"distribution": "rademacher"}, {}, "distribution"),
        ({}, {"seed": 1}, "base_sha256"),
        ({}, {"rank": 2}, "adapter.rank"),
        ({}, {"init_seed": 5}, "adapter.init_seed"),
    ],
)
def test_a_journal_of_another_run_is_named_before_anything_is_written(tmp_path, settings, model, key):
    train(tmp_path, steps_to_do=2)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-5])  # torn: left as it is
    before, header = path.read_bytes(), read(path, repair=True).header
    opt = ZerothOrder(tiny_adapted(**model), **{"lr": 0.1, "queries": 2, "run_seed": 11, **settings})
    with pytest.raises(JournalError, match=f"another {re.escape(key)} ") as caught:
        opt.write_journal(path, resume=True)
    assert caught.value.key == key and opt.journal is None and path.read_bytes() == before
    Journal.resume(path, header)[0].close()  # nobody holds it


def test_another_version_and_hostile_headers_are_named(tmp_path):
    train(tmp_path, steps_to_do=1)
    path = tmp_path / NAME
    whole, header = path.read_bytes(), read(path).header
    path.write_bytes(b"AZJ1" + whole[4:])
    with pytest.raises(JournalError, match="format 1, this program reads 2"):
        read(path)
    path.write_bytes(b"AZJ2" + framed(b"[" * 100_000))
    with pytest.raises(JournalError, match="not JSON at byte 12"):
        read(path)
    for key, value in (
        ("version", 3),
        ("run_seed", 2**64),
        ("run_seed", True),
        ("initial_sha256", "../../elsewhere"),
        ("distribution", "cauchy"),
        ("sites", [{"name": "x", "layout": [1, 2, 3]}]),
        ("params", [{"name": "w", "shape": [-1], "decayed": True}]),
        ("init", {"init": "identity", "gain": float("inf"), "seed": 0}),
        ("init", {"init": "identity", "gain": 10**400, "seed": 0}),
        ("config", {"perturb": "in-place"}),
        ("config", {"perturb": "in-place", "difference": "central", "eps": 10**400}),
        ("config", {"perturb": "in-place", "difference": "both", "eps": 0.1}),
    ):
        path.write_bytes(header_bytes({**header, key: value})[0])
        with pytest.raises(JournalError, match=f": {key} cannot be ") as caught:
            read(path)
        assert caught.value.key == key
    in_place = {"perturb": "in-place", "difference": "central", "eps": 0.1}
    path.write_bytes(header_bytes({**header, "config": in_place})[0])
    with pytest.raises(JournalError, match="params are missing"):
        read(path)


def test_a_step_that_no_run_makes_is_named(tmp_path):
    train(tmp_path, steps_to_do=1)
    journal, _ = Journal.resume(tmp_path / NAME, read(tmp_path / NAME).header)
    journal.append(Step(1, 1e300, 0.0, 0.0, (1.0,)))
    journal.close()
    with pytest.raises(JournalError, match="the update of step 1 is beyond float32"):
        replay(tmp_path)


def test_a_header_alone_makes_a_gib_and_no_more(tmp_path, monkeypatch):
    train(tmp_path, steps_to_do=1)
    path = tmp_path / NAME
    header, layout = read(path).header, TTAdapterLayout.auto(2**20, 2**10, 2**10)
    assert 2**28 < layout.numel < 2**29
    monkeypatch.setattr("adazeta.replay.initial_theta", lambda *a, **k: pytest.fail("numbers were made"))
    path.write_bytes(header_bytes({**header, "sites": [{"name": "x", "layout": layout.encode()}]})[0])
    with pytest.raises(JournalError, match="numbers, more than 268,435,456"):
        replay(tmp_path)


def test_more_numbers_than_a_header_makes_are_kept_in_a_file(tmp_path, monkeypatch):
    for module in ("replay", "recording"):
        monkeypatch.setattr(f"adazeta.{module}.MOST_NUMBERS", 100)
    model, _ = train(tmp_path)
    assert initial_file(tmp_path).exists() and torch.equal(
        replay(tmp_path).trainable.tensors[0], model.base_model.theta()
    )


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.double(), lambda t: t[None]])
def test_initial_values_of_another_shape_or_kind_are_named(tmp_path, change):
    train(tmp_path, noise=0.2)
    values = load_file(initial_file(tmp_path))
    save_file({name: change(value).contiguous() for name, value in values.items()}, initial_file(tmp_path))
    with pytest.raises(JournalError, match="as 'theta', expected numbers of shape") as caught:
        replay(tmp_path)
    assert caught.value.key == "theta"


def framed(body):
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


def test_full_disk_keeps_whole_records_and_theta(tmp_path, monkeypatch):
    model = tiny_adapted()
    opt = ZerothOrder(model, lr=0.1)
    opt.write_journal(tmp_path / NAME)
    opt.estimate(lm_loss, lm_batch(4))
    opt.step()
    before, size = model.base_model.theta().clone(), (tmp_path / NAME).stat().st_size

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    opt.journal._file = Full(opt.journal._file)
    opt.estimate(lm_loss, lm_batch(4))
    with pytest.raises(UserError, match="No space left.*free some space"):
        opt.step()
    assert torch.equal(model.base_model.theta(), before)
    assert (tmp_path / NAME).stat().st_size == size and len(list(steps(tmp_path / NAME))) == 1


def test_a_loop_goes_on_after_ctrl_c_in_the_middle_of_a_record(tmp_path, monkeypatch):
    opt = ZerothOrder(tiny_adapted(layers=1), lr=0.1, queries=2)
    opt.write_journal(tmp_path / NAME, fsync_every=1)
    fsync, presses = os.fsync, [2]

    def interrupted(descriptor):  # the record is in the file, and the disk takes its time
        fsync(descriptor)
        if presses and opt.step_index == presses[0]:
            presses.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    while opt.step_index < 4:
        try:
            opt.estimate(lm_loss, lm_batch(4, seed=opt.step_index))
            opt.step()
        except KeyboardInterrupt:
            assert len(read(tmp_path / NAME).steps) == 2
            opt.zero_grad()
    opt.journal.close()
    assert not presses and [step.index for step in steps(tmp_path / NAME)] == [0, 1, 2, 3]


@pytest.mark.parametrize("back", [False, True], ids=["a step", "going back"])
def test_ctrl_c_between_a_record_and_its_update_waits_for_the_update(tmp_path, monkeypatch, ctrl_c, back):
    model = tiny_adapted(layers=1)
    opt = ZerothOrder(model, lr=0.1, queries=2)
    opt.write_journal(tmp_path / NAME, fsync_every=1)
    fsync, presses = os.fsync, [2]

    def interrupted(descriptor):
        fsync(descriptor)
        if presses and opt.step_index == presses[0]:
            presses.clear()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupted)
    while opt.step_index < 4:
        try:
            opt.estimate(lm_loss, lm_batch(4, seed=opt.step_index))
            opt.go_back(1) if back and opt.step_index == 2 else opt.step()
        except KeyboardInterrupt:
            assert opt.step_index == len(read(tmp_path / NAME).steps) == 3
    opt.journal.close()
    assert not presses and [step.index for step in steps(tmp_path / NAME)] == [0, 1, 2, 3]
    assert torch.equal(replay(tmp_path / NAME).trainable.tensors[0], model.base_model.theta())


def test_steps_are_recorded_in_order(tmp_path):
    _, opt = train(tmp_path, steps_to_do=1)
    journal, _ = Journal.resume(tmp_path / NAME, read(tmp_path / NAME).header)
    with pytest.raises(ValueError, match="expected step 1"):
        journal.append(Step(3, 0.1, 0.0, 0.0, (1.0,)))


def test_no_journal_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="cannot read the journal"):
        replay(tmp_path)
    (tmp_path / NAME).write_bytes(b"something else")
    with pytest.raises(UserError, match="not a journal"):
        replay(tmp_path)


def test_initial_values_of_another_run_are_refused(tmp_path):
    train(tmp_path, noise=0.2)
    values = load_file(initial_file(tmp_path))
    save_file({k: v + 1 for k, v in values.items()}, initial_file(tmp_path))
    with pytest.raises(UserError, match="differ from those of the run"):
        replay(tmp_path)
