"""The journal: replay to the last bit, damage found, resume cut to the checkpoint, a full disk."""

import errno
import os

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import lm_batch, tiny_adapted

from adazeta import UserError, ZerothOrder
from adazeta.journal import INITIAL_NAME, NAME, Journal, read, replay, steps
from adazeta.losses import causal_lm_loss
from adazeta.update import Step


def train(folder, steps_to_do=4, noise=0.0, model_settings=None, **settings):
    model = tiny_adapted(noise=noise, **(model_settings or {}))
    opt = ZerothOrder(model, **{"lr": 0.1, "queries": 2, "run_seed": 11, **settings})
    opt.write_journal(folder / NAME)
    for k in range(steps_to_do):
        opt.param_groups[0]["lr"] = 0.1 / (k + 1)
        opt.estimate(causal_lm_loss, lm_batch(4, seed=k))
        opt.step()
    opt.journal.close()
    model.save_pretrained(folder)
    return model, opt


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
    rebuilt = replay(tmp_path)
    assert rebuilt.keys() == saved.keys()
    assert all(torch.equal(rebuilt[name], saved[name]) for name in saved)
    # An untouched start needs only the seed; one that was moved has its values beside the journal.
    assert (tmp_path / INITIAL_NAME).exists() == (noise > 0)


def test_replay_with_a_trained_head(tmp_path):
    model, _ = train(tmp_path, model_settings={"modules_to_save": ["lm_head"]}, weight_decay=0.1, momentum=0.5)
    saved = get_peft_model_state_dict(model)
    rebuilt = replay(tmp_path)
    assert rebuilt.keys() == saved.keys() and all(torch.equal(rebuilt[n], saved[n]) for n in saved)


def test_a_step_costs_a_few_bytes(tmp_path):
    train(tmp_path, steps_to_do=1)
    one = (tmp_path / NAME).stat().st_size
    train(tmp_path, steps_to_do=5)
    assert (tmp_path / NAME).stat().st_size - one == 4 * (40 + 2 * 4)


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
    ends = [end for _, end in read(path)[1]]
    header_end = ends[0] - 48
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size in (header_end, *ends):
            continue  # a run that was stopped between two steps is whole
        with pytest.raises(UserError):
            read(path)
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            read(path)


def test_resume_cuts_back_to_the_checkpoint_and_heals_a_torn_record(tmp_path):
    _, opt = train(tmp_path, steps_to_do=4)
    path = tmp_path / NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    header = read(path, repair=True)[0]
    journal = Journal.resume(path, header, 2)
    journal.append(Step(2, 0.5, 0.0, 0.0, (1.0,)))
    journal.close()
    assert [s.lr for s in steps(path)] == [0.1, 0.05, 0.5]
    path.write_bytes(whole)
    with pytest.raises(UserError, match="holds 4 steps, but the checkpoint is at step 9"):
        Journal.resume(path, header, 9)
    with pytest.raises(UserError, match="another run_seed"):
        Journal.resume(path, {**header, "run_seed": 5}, 2)


def test_full_disk_keeps_whole_records_and_theta(tmp_path, monkeypatch):
    model = tiny_adapted()
    opt = ZerothOrder(model, lr=0.1)
    opt.write_journal(tmp_path / NAME)
    opt.estimate(causal_lm_loss, lm_batch(4))
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
    opt.estimate(causal_lm_loss, lm_batch(4))
    with pytest.raises(UserError, match="No space left.*free some space"):
        opt.step()
    assert torch.equal(model.base_model.theta(), before)
    assert (tmp_path / NAME).stat().st_size == size and len(list(steps(tmp_path / NAME))) == 1


def test_steps_are_recorded_in_order(tmp_path):
    _, opt = train(tmp_path, steps_to_do=1)
    journal = Journal.resume(tmp_path / NAME, read(tmp_path / NAME)[0], 1)
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
    values = load_file(tmp_path / INITIAL_NAME)
    from safetensors.torch import save_file

    save_file({k: v + 1 for k, v in values.items()}, tmp_path / INITIAL_NAME)
    with pytest.raises(UserError, match="differ from those of the run"):
        replay(tmp_path)
