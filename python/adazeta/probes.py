"""Probes: which points around ``theta`` a step looks at, and how they are evaluated in few forwards.

A probe is ``theta + scale * z(seed)`` on some rows of the batch. Probes of adapters are virtual: the adapted layers
build the perturbed factors while the batch passes, and ``theta`` is never written. Other trainable parameters see one
probe at a time: made as they are read (``adazeta.streamed``), or written in place (``adazeta.in_place``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .batches import along, host, onto
from .factors import FactorGroups
from .in_place import InPlace
from .planner import Planner, is_out_of_memory
from .split_heads import probe_by_probe
from .streamed import Streamed


@dataclass(frozen=True)
class Probes:
    """The probes of one forward, as the adapted layers see them.

    Args:
        seeds: int64 ``[P]`` (two's complement of the 64-bit seed).
        scales: float32 ``[P]``.
        adapter: name of the adapter they perturb.
        distribution: ``"gaussian"`` or ``"rademacher"``.
    """

    seeds: torch.Tensor
    scales: torch.Tensor
    adapter: str = "default"
    distribution: str = "gaussian"

    @classmethod
    def of(cls, seeds, scales, adapter="default", distribution="gaussian") -> "Probes":
        """Make probes from Python integers (0 <= seed < 2**64) and floats."""
        signed = [s - 2**64 if s >= 2**63 else s for s in seeds]
        return cls(torch.tensor(signed), torch.tensor(scales, dtype=torch.float32), adapter, distribution)

    def __len__(self) -> int:
        return self.seeds.numel()


@dataclass(frozen=True)
class Plan:
    """All probes of one estimate, in the order group, query, sign.

    Args:
        seeds: one seed per (group, query), group-major.
        eps: distance of a probe from theta.
        signs: sign of each probe of a query.
        groups: number of groups G; group g owns rows ``g * rows_per_probe ...`` of the batch.
        rows_per_probe: rows of the batch that a probe sees.
    """

    seeds: list[int]
    eps: float
    signs: tuple[float, ...]
    groups: int
    rows_per_probe: int

    def __len__(self) -> int:
        return len(self.seeds) * len(self.signs)

    @property
    def rows(self) -> int:
        """Forward rows of the whole plan: the unit of cost."""
        return len(self) * self.rows_per_probe

    def probe(self, index: int) -> tuple[int, float, range]:
        """Return seed, scale and batch rows of probe ``index``."""
        query, sign = divmod(index, len(self.signs))
        first = query // (len(self.seeds) // self.groups) * self.rows_per_probe
        return self.seeds[query], self.eps * self.signs[sign], range(first, first + self.rows_per_probe)


def groups_of(directions: str | int, examples: int) -> int:
    """Return the number of groups that a batch is cut into, each with directions of its own."""
    if directions == "batch":
        return 1
    if directions == "example":
        return examples
    # The last batch of an epoch may be smaller: the most groups that divide it evenly.
    return max(g for g in range(1, min(directions, examples) + 1) if examples % g == 0)


def batch_size(batch: Mapping[str, Any], least: int = 1) -> int:
    """Return the number of examples, at least ``least``: dimension 0 of the batch's tensors, which must agree."""
    if not hasattr(batch, "items"):
        raise TypeError(
            "estimate(loss_fn, batch): batch must be a mapping of names to tensors, as tokenizers make, got "
            f"{type(batch).__name__}"
        )
    sizes = {name: value.shape[0] for name, value in batch.items() if torch.is_tensor(value) and value.ndim}
    if not sizes:
        raise ValueError(f"the batch holds no tensor with examples in dimension 0; its keys are {sorted(batch)}")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the tensors of the batch disagree on the number of examples: {sizes}")
    if (size := next(iter(sizes.values()))) < least:
        raise ValueError("the batch is empty")
    return size


def check_mask(batch: Mapping[str, Any]) -> None:
    """Raise ValueError if a row of ``attention_mask`` ``[rows, tokens]`` is all zeros: its loss would mean nothing."""
    mask = batch.get("attention_mask")
    if torch.is_tensor(mask) and mask.ndim == 2 and not bool((read := (host(mask) != 0).any(1)).all()):
        row = int(read.long().argmin())
        raise ValueError(f"row {row} of the batch has no token, its attention_mask is all zeros: leave such rows out")


def take_rows(batch: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Return the batch with dimension 0 of every tensor, and every list or tuple of as many entries as there are
    examples, indexed by ``rows``; other values pass through."""
    examples, chosen = batch_size(batch), rows.tolist()

    def take(value):
        if torch.is_tensor(value) and value.ndim:
            return along(lambda tensor: tensor.index_select(0, onto(rows, tensor.device)), value)
        one_each = isinstance(value, (list, tuple)) and len(value) == examples
        return [value[row] for row in chosen] if one_each else value

    return {name: take(value) for name, value in batch.items()}


def probes_per_forward(plan: Plan, planner: Planner, tokens: int, device: str) -> int:
    """Return how many probes share a forward: as many as ``planner`` says, in whole groups where those fit."""
    probes = planner.probes(plan.rows_per_probe, tokens, device)
    # So that what lies below the first adapter runs once per example.
    per_group = len(plan) // plan.groups
    return probes - probes % per_group if probes > per_group else probes


def tokens_of(batch: Mapping[str, Any], loss_fn: Callable | None = None) -> tuple[int, str]:
    """Return the tokens of an example, with all its candidates, and the type of their device.

    Args:
        batch: with the candidates of multiple choice, if there are any.
        loss_fn: a loss that may repeat a prompt for each of its label words, and put them behind it.
    """
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        if torch.is_tensor(tensor := batch.get(name)):
            shape = tensor.shape[1:-1] if name == "inputs_embeds" else tensor.shape[1:]
            if len(shape) > 1:
                return shape.numel(), tensor.device.type
            behind, rows = (getattr(loss_fn, *known) for known in (("tokens_behind", 0), ("rows_per_example", 1)))
            return rows * (shape.numel() + behind), tensor.device.type
    tensor = next(value for value in batch.values() if torch.is_tensor(value) and value.ndim)
    return 1, tensor.device.type  # an image, say: not known in tokens


@contextmanager
def probing(tt_model, probes: Probes) -> Iterator[None]:
    """Let every adapted layer of ``tt_model`` evaluate ``probes``; dimension 0 of all inputs is then probe-major.

    Meanwhile theta must not change. Meant for ``torch.no_grad``: nothing is recorded for autograd.
    """
    layers = [layer for _, layer in tt_model.tt_layers(probes.adapter)]
    groups = FactorGroups(layers, probes, tt_model.theta(probes.adapter))
    # Past the bookkeeping of nn.Module for attributes, which takes longer than all else here.
    for layer in layers:
        vars(layer).update(probes=probes, factor_groups=groups)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).update(probes=None, factor_groups=None)


@torch.no_grad()
def evaluate_probes(
    plan: Plan,
    batch: Mapping[str, Any],
    loss_fn: Callable[[dict[str, Any]], torch.Tensor],
    *,
    tt_model=None,
    adapter: str = "default",
    others: InPlace | Streamed | None = None,
    heads: Sequence[torch.nn.Module] = (),
    distribution: str = "gaussian",
    planner: Planner | None = None,
    tokens: int | None = None,
    apart: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Return the loss of every row at every probe, ``[G, Q, S, rows_per_probe]`` float32 on the CPU.

    Args:
        plan: the probes.
        batch: the B examples, tensors with examples in dimension 0.
        loss_fn: maps an expanded batch to one loss per row.
        tt_model: the ``TTModel`` whose adapter ``adapter`` is perturbed virtually, or None.
        others: further parameters, inside its ``with`` statement; a forward then has one probe, unless there are
        heads: modules that hold all of them (:func:`adazeta.split_heads.heads_of`).
        planner: says how many probes share a forward; by default the number of tokens does.
        tokens: those of an example, by default as many as the batch holds.
        apart: asked where memory does not hold one probe: do rows not see each other, so that they may pass in parts?

    Raises:
        TypeError: ``loss_fn`` returns no tensor.
        ValueError: it does not return one value per row.
    """
    planner = planner or Planner()

    def forward(first: int, last: int, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """The losses of the rows ``begin ... end - 1`` of the probes ``first ... last - 1``."""
        chunk = [plan.probe(i) for i in range(first, last)]
        rows = torch.tensor([row for _, _, rows in chunk for row in rows[begin:end]])
        seeds, scales = [seed for seed, _, _ in chunk], [scale for _, scale, _ in chunk]
        if others is not None and not heads:
            others.move_to(seeds[0], scales[0])
        with ExitStack() as stack:
            if heads:
                stack.enter_context(probe_by_probe(heads, others, list(zip(seeds, scales))))
            if tt_model is not None:
                stack.enter_context(probing(tt_model, Probes.of(seeds, scales, adapter, distribution)))
            loss = loss_fn(take_rows(batch, rows))
        if not torch.is_tensor(loss):
            raise TypeError(
                f"the loss function must return a tensor of one loss per row, got {type(loss).__name__}: "
                "adazeta.losses.lm_loss is the loss of a language model for every row"
            )
        if loss.shape != (len(rows),):
            raise ValueError(
                f"the loss function must return one loss per row, shape ({len(rows)},), got {tuple(loss.shape)}; "
                "do not average over the batch"
            )
        return loss.float()

    rows, (held, device) = plan.rows_per_probe, tokens_of(batch)
    tokens = held if tokens is None else tokens

    def whole(first: int, last: int) -> torch.Tensor:
        """The losses of some probes together, or of one in as many parts as it takes."""
        if last - first > 1:
            return forward(first, last)
        if not planner.rows_apart:
            try:
                return forward(first, last)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or rows == 1 or not apart():
                    raise
            planner.rows_apart = True
            planner.learn(rows * tokens, rows // 2 * tokens)
        step = planner.rows_at_once(rows, tokens, device)
        parts = [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
        return torch.cat([loss for part in parts for loss in planner.run(partial(forward, first, last), *part, tokens)])

    losses: list[torch.Tensor] = []
    first = 0
    alone = others is not None and not heads  # one probe at a time: they move to it
    while first < len(plan):
        count = 1
        if not alone or planner.asked_for:  # which may be too small for one
            count = probes_per_forward(plan, planner, tokens, device)
        last = first + 1 if alone else min(first + count, len(plan))
        losses += planner.run(whole, first, last, rows * tokens)
        first = last
    shape = (plan.groups, len(plan.seeds) // plan.groups, len(plan.signs), plan.rows_per_probe)
    return read(losses).view(shape)


def read(losses: list[torch.Tensor]) -> torch.Tensor:
    """Return all losses of an estimate, one behind the other, on the CPU: the one time it waits for the device."""
    return torch.cat(losses).cpu()
