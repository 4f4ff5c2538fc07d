"""A run's journal is opened, with a header that says all that a replay needs besides: no base model and no data."""

import platform
from pathlib import Path

import numpy
import torch

from . import __version__
from .digests import base_sha256, sha256_of
from .errors import JournalError
from .journal import Journal, read
from .journal_format import VERSION, check_same
from .replay import MOST_NUMBERS, initial_values, rebuild_initial
from .update import Step

_NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode")


def record_run(
    optimizer, path: str | Path, resume: bool, identity: dict | None, about: dict | None, fsync_every: int
) -> tuple[Journal, list[Step]]:
    """Begin or go on with the journal of ``optimizer``'s run; return it and the steps that it holds.

    An optimizer at step 0 takes the numbers that the journal begins with. Arguments and errors are those of
    ``ZerothOrder.write_journal``.
    """
    header, initial = describe_run(optimizer, identity, about)
    if not resume:
        if optimizer.step_index:
            raise ValueError(f"a journal begins at step 0, the optimizer is at step {optimizer.step_index}")
        return Journal.create(path, header, initial, fsync_every=fsync_every), []
    journal, recorded = Journal.resume(path, header, fsync_every=fsync_every)
    try:
        if len(recorded) < optimizer.step_index:
            raise JournalError(
                f"{path} holds {len(recorded)} steps, but the checkpoint is at step {optimizer.step_index}; take an "
                "earlier checkpoint, or none: the journal makes its steps again"
            )
        if optimizer.step_index == 0 and journal.header["initial_sha256"] != header["initial_sha256"]:
            optimizer.take(initial_values(journal.header, journal.path).trainable)
    except BaseException:
        journal.close()
        raise
    return journal, recorded


def check_resumed(optimizer, path: Path, task: dict) -> None:
    """Raise JournalError, which names the setting, where a run that resumes has another task, or trains other numbers.

    The whole header is compared when training begins. A checkpoint is loaded before, and where its numbers have other
    shapes that ends in a line, or many, that name no setting.
    """
    found, now = read(path, repair=True).header, _trained(optimizer)
    if isinstance(earlier := found["about"].get("task"), dict):
        check_same(path, {"task": earlier}, {"task": task})
    check_same(path, {"run_seed": found["run_seed"]}, {"run_seed": optimizer.run_seed})  # the adapter's follows from it
    check_same(path, {key: found.get(key) for key in now}, now)


def record_going_back(optimizer, to: int) -> Step:
    """Return the step with which ``optimizer`` goes back to before step ``to``, recorded unless the journal has it."""
    group, index = optimizer.param_groups[0], optimizer.step_index
    if optimizer.journal is None or not 0 <= to <= index:
        raise ValueError(f"going back to step {to} needs a journal, and so many steps: there are {index}")
    lr = float(group["lr"]) * optimizer.guard.lr_factor
    step = Step(index, lr, group["momentum"], group["weight_decay"], coefficients=(), back_to=to)
    if not optimizer.pending:
        optimizer.journal.append(step)
    elif optimizer.next_recorded.back_to != to:
        raise ValueError(f"the journal goes on with another step {index} than going back to {to}")
    return step


def describe_run(
    optimizer, identity: dict | None = None, about: dict | None = None
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the header for ``optimizer``'s run and the initial values that its seed does not rebuild.

    Args:
        optimizer: a ``ZerothOrder``.
        identity: JSON values that a resumed run must share, such as a digest of the data.
        about: JSON values that a reader of the journal wants, such as the task; a resumed run may differ in them.

    Returns:
        ``(header, initial)``; ``initial`` is empty when the adapter still is what ``TTConfig.init_seed`` makes and no
        other parameter is trained.
    """
    tensors = optimizer.trainable().tensors
    config = optimizer.tt_model.peft_config[optimizer.adapter] if optimizer.tt_model else None
    header = {
        "version": VERSION,
        "run_seed": optimizer.run_seed,
        "distribution": optimizer.distribution,
        "init": {"init": config.init, "gain": config.init_gain, "seed": config.init_seed} if config else None,
        **_trained(optimizer),
        "initial_sha256": sha256_of(tensors),
        "base_sha256": base_sha256(optimizer.model, optimizer.others.values()),
        "config": {**optimizer.settings(), **(identity or {})},
        "about": about or {},
        "software": software(),
    }
    initial = {_saved_name(name, optimizer.adapter): p.data for name, p in optimizer.others.items()}
    if optimizer.tt_model:
        theta = optimizer.tt_model.theta(optimizer.adapter)
        if theta.numel() > MOST_NUMBERS or not torch.equal(rebuild_initial(header), theta.cpu()):
            initial["theta"] = theta
    header["initial"] = "file" if initial else "seed"
    return header, initial


def _trained(optimizer) -> dict:
    """Return the part of a header that says which numbers train."""
    config = optimizer.tt_model.peft_config[optimizer.adapter] if optimizer.tt_model else None
    return {
        "sites": [
            {"name": f"base_model.model.{name}.tt_theta", "layout": layout.encode()} for name, layout in optimizer.sites
        ],
        "params": [
            {"name": _saved_name(name, optimizer.adapter), "shape": list(p.shape), "decayed": p.ndim > 1}
            for name, p in optimizer.others.items()
        ],
        "adapter": _adapter(config),
    }


def software() -> dict[str, str]:
    """Return the versions that made a run."""
    return {
        "adazeta": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _adapter(config) -> dict | None:
    """Return the adapter's PEFT settings as JSON values, without what names paths and versions."""
    if config is None:
        return None
    settings = {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in config.to_dict().items()
    }
    return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_ADAPTER}


def _saved_name(name: str, adapter: str) -> str:
    """Return the name PEFT saves a parameter under: without the adapter's name and without its wrapper."""
    return name.replace(f".modules_to_save.{adapter}.", ".")
