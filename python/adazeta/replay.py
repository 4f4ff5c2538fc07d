"""Do a recorded run again: its numbers after any step, from the journal alone, bit for bit on any machine."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from adazeta_kernels import TTAdapterLayout, derive_seeds, derive_seeds_of_steps

from .digests import crc_of, sha256_of
from .errors import JournalError, UserError
from .in_place import Drift
from .journal import NAME, initial_path, read
from .memory import freed_memory_kept
from .others import DTYPES
from .tuner.init import initial_theta
from .update import Step, Trainable, apply_step, step_scales

# Of adapters that a header alone makes, a GiB: a hostile one of a few hundred bytes must not fill the memory. A run of
# more numbers keeps its initial ones in a file.
MOST_NUMBERS = 2**28
_SEEDS_AT_ONCE = 1 << 16


@dataclass
class Replayed:
    """A run's numbers as its journal makes them.

    Args:
        tensors: named and shaped as in the saved adapter.
        trainable: the same memory, as ``apply_step`` takes it.
        step: steps done.
        header: that of the journal.
    """

    tensors: dict[str, torch.Tensor]
    trainable: Trainable
    step: int
    header: dict


def rebuild_initial(header: dict) -> torch.Tensor:
    """Return the initial flat ``theta`` of the adapter that ``header`` describes, from its seed alone."""
    layouts = [TTAdapterLayout.decode(site["layout"]) for site in header["sites"]]
    numbers = sum(layout.numel for layout in layouts)
    if numbers > MOST_NUMBERS:
        raise JournalError(
            f"the journal's sites hold {numbers:,} numbers, more than {MOST_NUMBERS:,}; is it damaged?", key="sites"
        )
    theta, offset, init = torch.empty(numbers), 0, header["init"]
    for layout in layouts:
        own = theta[offset : offset + layout.numel]
        initial_theta(layout, init=init["init"], gain=init["gain"], seed=init["seed"], offset=offset, out=own)
        offset += layout.numel
    return theta


def decayed_views(theta: torch.Tensor, layouts: Sequence[TTAdapterLayout]) -> list[torch.Tensor]:
    """Return the parts of ``theta`` that are not biases, as views as long as may be."""
    ranges, offset = [], 0
    for layout in layouts:
        for segment in layout.segments():
            first = offset + segment.offset
            if segment.is_bias:
                continue
            if ranges and ranges[-1][1] == first:
                ranges[-1][1] = first + segment.numel
            else:
                ranges.append([first, first + segment.numel])
        offset += layout.numel
    return [theta[first:last] for first, last in ranges]


def effective(steps: Sequence[Step]) -> list[Step]:
    """Return the steps whose updates are still in the numbers: without those that a later step went back behind."""
    kept: list[Step] = []
    for step in steps:
        if step.back_to is None:
            kept.append(step)
        else:
            while kept and kept[-1].index >= step.back_to:
                kept.pop()
    return kept


def initial_values(header: dict, path: Path, device: str | torch.device = "cpu") -> Replayed:
    """Return the numbers, on ``device``, that the run of the journal at ``path`` began with.

    Raises:
        UserError: the file of initial values is missing or damaged.
        JournalError: the initial values are not those of the run.
    """
    beside = initial_path(path, header)
    stored = _stored_values(header, beside)
    tensors: dict[str, torch.Tensor] = {}
    flat, decayed = [], []
    if header["sites"]:
        layouts = [TTAdapterLayout.decode(site["layout"]) for site in header["sites"]]
        if "theta" in stored:
            theta = _checked(stored, "theta", [sum(layout.numel for layout in layouts)], beside)
        else:
            theta = rebuild_initial(header)
        theta, offset = theta.to(device), 0
        for site, layout in zip(header["sites"], layouts):
            tensors[site["name"]] = theta[offset : offset + layout.numel]
            offset += layout.numel
        decayed += decayed_views(theta, layouts)
        flat.append(theta)
    for parameter in header["params"]:
        tensor = _checked(stored, parameter["name"], parameter["shape"], beside).to(device)
        tensors[parameter["name"]] = tensor
        flat.append(tensor)
        if parameter["decayed"]:
            decayed.append(tensor)
    if sha256_of(flat) != header["initial_sha256"]:
        raise JournalError(
            f"the initial values rebuilt for {path} differ from those of the run; was the file changed?",
            key="initial_sha256",
        )
    return Replayed(tensors, Trainable(flat, decayed), 0, header)


def _checked(stored: dict[str, torch.Tensor], name: str, shape: list[int], path: Path) -> torch.Tensor:
    found = stored.get(name)
    allowed = (torch.float32,) if name == "theta" else DTYPES
    if found is None or list(found.shape) != shape or found.dtype not in allowed:
        what = "nothing" if found is None else f"{found.dtype} of shape {list(found.shape)}"
        raise JournalError(f"{path} holds {what} as {name!r}, expected numbers of shape {shape}", key=name)
    return found


def _stored_values(header: dict, path: Path) -> dict[str, torch.Tensor]:
    if header["initial"] != "file":
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}, which the replay needs: {error}") from error


def apply_steps(
    trainable: Trainable,
    steps: Sequence[Step],
    run_seed: int,
    distribution: str,
    *,
    drift: Drift | None = None,
    backend: str | None = None,
) -> None:
    """Do recorded steps again, in place; what training did step by step, with the seeds of many steps made at once.

    Args:
        drift: what every step's estimate did to parameters perturbed in place.

    Raises:
        JournalError: the numbers before a step are not those that the run had there.
    """
    for block in _blocks(steps):
        seeds = derive_seeds_of_steps(run_seed, [s.index for s in block], [len(s.coefficients) for s in block])
        for step, own in zip(block, seeds):
            redo_estimates(trainable, step, drift, run_seed, own.tolist())
            apply_step(trainable, step, run_seed, distribution, seeds=own, backend=backend)


def redo_estimates(
    trainable: Trainable, step: Step, drift: Drift | None, run_seed: int, seeds: list[int] | None = None
) -> None:
    """Bring the numbers to where the run had them when it made ``step``, and compare with the record's digest.

    Args:
        drift: what the step's estimates did to parameters perturbed in place.
        seeds: those of the step, where they have been derived already.

    Raises:
        JournalError: they differ, or the step is one that no run makes.
    """
    if step.back_to is None and not torch.isfinite(step_scales(step)).all():
        raise JournalError(f"the update of step {step.index} is beyond float32: no run records such a step")
    if drift is not None:
        if step.back_to is not None:
            return  # its estimates are not recorded, for the numbers that they left are thrown away
        drift.redo(trainable.tensors, seeds or derive_seeds(run_seed, step.index, len(step.coefficients)))
    check_digest(trainable, step)


def check_digest(trainable: Trainable, step: Step) -> None:
    """Compare the numbers before ``step`` with the digest in its record, if it has one.

    Raises:
        JournalError: they differ.
    """
    if step.digest is not None and crc_of(trainable.tensors) != step.digest:
        raise JournalError(
            f"the numbers before step {step.index} differ from those the run had there: another initial adapter, "
            "checkpoint or version made them"
        )


def _blocks(steps: Sequence[Step]) -> Iterator[list[Step]]:
    block, count = [], 0
    for step in steps:
        block.append(step)
        count += len(step.coefficients)
        if count >= _SEEDS_AT_ONCE:
            yield block
            block, count = [], 0
    if block:
        yield block


def journal_path(name: str | os.PathLike) -> Path:
    """Return the journal that a run folder or the file itself names."""
    return Path(name) / NAME if Path(name).is_dir() else Path(name)


def replay(
    folder: str | os.PathLike,
    at: int | None = None,
    *,
    device: str = "cpu",
    backend: str | None = None,
    repair: bool = False,
) -> Replayed:
    """Rebuild the trained numbers of the run in ``folder`` from its journal, after all steps or the first ``at``.

    Only the journal is read (and the initial values beside it, for numbers that no seed makes); neither the base model
    nor the data is needed. The result is bit-identical to what training left, on every device and backend.

    Args:
        folder: run folder, or the journal itself.
        at: steps to do; all by default.
        device: where the numbers are computed and left.
        backend: as of ``adazeta_kernels.perturb_``.
        repair: leave a torn last record out instead of refusing it.

    Raises:
        UserError: no journal, or no initial values beside it.
        JournalError: a damaged or cut one, fewer steps than ``at``, or initial values that do not match it.
    """
    path = journal_path(folder)
    found = read(path, repair)
    header, steps = found.header, found.steps
    at = len(steps) if at is None else at
    if not 0 <= at <= len(steps):
        raise JournalError(f"{path} holds {len(steps)} steps, so none can be done up to {at}", key="at")
    state = initial_values(header, path, device)
    drift = Drift.of(header)
    kept = effective(steps[:at])
    with freed_memory_kept():  # a step with momentum makes and frees as much as the numbers take
        apply_steps(state.trainable, kept, header["run_seed"], header["distribution"], drift=drift, backend=backend)
    if at < len(steps) and drift is None:
        check_digest(state.trainable, steps[at])
    state.step = at
    return state
