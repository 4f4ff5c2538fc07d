"""One token per probe: what adapters that act on the last prompt token alone (``positions="last"``) make possible.

No probe of such adapters changes any earlier token, so a prompt of T tokens need not pass once per probe. It passes
once, with C copies of its last token behind it, one per probe: every copy has the position T - 1, sees the T - 1 tokens
before it and itself, and is adapted with its own factors. A loss then costs one token instead of T::

    columns     0 ... T-2        T-1 ... T-2+C
    tokens      the prompt       C copies of the last token
    a copy sees all of them      itself

Blocks below the first adapter see the prompt alone (``adazeta.prefix``).
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .batches import host
from .errors import SettingError
from .planner import Planner, is_out_of_memory
from .tokens import looking


@dataclass(frozen=True)
class ProbeTokens:
    """Where the copies are, for the adapted layers: the last ``copies`` tokens of every row.

    Args:
        copies: C, probes per row.
        groups: G groups of rows; the rows of a group share their probes.
    """

    copies: int
    groups: int

    def to_probes(self, x: torch.Tensor) -> torch.Tensor:
        """``[G * R, C, d]`` -> ``[G * C, R, d]``: dimension 0 is the probe, group-major."""
        rows = x.shape[0] // self.groups
        return x.unflatten(0, (self.groups, rows)).transpose(1, 2).reshape(-1, rows, x.shape[2])

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of ``to_probes``."""
        return x.unflatten(0, (self.groups, self.copies)).transpose(1, 2).flatten(0, 1)


def last_real_token(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of the last unmasked token of every row, ``[rows]``, whichever side is padded."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def set_focus(tt_model, focus: "torch.Tensor | ProbeTokens | None") -> None:
    """Tell layers with ``positions="last"`` which tokens to adapt: a position per row, probe tokens, or the last."""
    for name in tt_model.peft_config:
        for _, layer in tt_model.tt_layers(name):
            layer.focus = focus


@contextmanager
def focused(tt_model, focus: "torch.Tensor | ProbeTokens | None") -> Iterator[None]:
    """``set_focus`` for the duration of the ``with`` statement; ``tt_model`` may be None."""
    if tt_model is not None:
        set_focus(tt_model, focus)
    try:
        yield
    finally:
        if tt_model is not None:
            set_focus(tt_model, None)


@dataclass(frozen=True)
class CopiedPrompts:
    """Model inputs with C copies of every prompt's last token.

    Args:
        input_ids: ``[B, T - 1 + C]``.
        position_ids: the same shape.
        attention_mask: additive, ``[B, 1, L, L]`` with ``L = T - 1 + C``.
        copies: C.
        token_type_ids: the same shape as ``input_ids``, or None.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    copies: int
    token_type_ids: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        copies: int,
        dtype: torch.dtype,
        *,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ):
        """Build the inputs from prompts padded on either side; without positions real tokens are counted from 0."""
        tokens = input_ids.shape[1]
        device, last = input_ids.device, last_real_token(attention_mask)
        prompt = tokens - 1
        length = prompt + copies

        def copied(value):
            return torch.cat((value[:, :prompt], value.gather(1, last[:, None]).expand(-1, copies)), 1)

        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_(min=0)
        column = torch.arange(length, device=device)
        real = torch.nn.functional.pad(attention_mask[:, :prompt].bool(), (0, copies))
        causal = (column[None, :] <= column[:, None]) & (column[None, :] < prompt)
        # A copy sees the real tokens before the last one; the last one itself may stand among the prompt's columns.
        before = real & (column < last[:, None])
        seen = torch.where((column < prompt)[None, :, None], (causal & real[:, None, :]), before[:, None, :])
        seen |= torch.eye(length, dtype=torch.bool, device=device)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        types = None if token_type_ids is None else copied(token_type_ids)
        return cls(copied(input_ids), copied(position_ids), mask[:, None], copies, types)


def can_use_probe_tokens(tt_model, adapter: str, loss_fn, batch: Mapping[str, Any]) -> bool:
    """Whether the adapter acts on the last token alone, the loss knows how to score copies of it, and the model takes
    their positions, which must be known, and lets them see the whole prompt."""
    if (
        tt_model is None
        or tt_model.peft_config[adapter].positions != "last"
        or getattr(loss_fn, "rows_per_example", 0) != 1
        or not hasattr(loss_fn, "losses_at_copies")
    ):
        return False
    from .scoring import trunk_of  # which knows TTModel, which knows this file

    trunk = trunk_of(tt_model.model)
    config = trunk.config.get_text_config()
    # The mask of the copies says who sees whom in every layer, also in those that see a window alone.
    # GPT-Neo's local layers also cut a window out by column, of more columns than the look at the model below has.
    if hasattr(config, "attention_types"):
        return False
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((window for window in windows if window is not None), default=math.inf)
    if batch["input_ids"].shape[1] > window:
        return False
    mask = batch.get("attention_mask")
    if mask is not None and batch.get("position_ids") is None and _has_holes(host(mask)):
        return False  # a family may count them or not
    takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
    return takes_positions and _takes_copies(trunk, min(7, window), batch["input_ids"].device)


#: Models that were looked at, and whether a copy of a prompt's last token gets the hidden states of the token.
_LOOKED: "WeakKeyDictionary[torch.nn.Module, bool]" = WeakKeyDictionary()


@torch.no_grad()
def _takes_copies(trunk: torch.nn.Module, tokens: int, device: torch.device) -> bool:
    """Whether the last of three copies gets the hidden state of the last of ``tokens``: a family may take positions and
    count columns all the same."""
    if trunk not in _LOOKED:
        ids = (torch.arange(2, tokens + 2, device=device) % trunk.get_input_embeddings().num_embeddings)[None]
        copied = CopiedPrompts.of(ids, torch.ones_like(ids), 3, next(trunk.parameters()).dtype)
        given = {"position_ids": copied.position_ids, "attention_mask": copied.attention_mask}
        token = looking.set(True)
        try:
            plain, last = trunk(input_ids=ids)[0][0, -1], trunk(input_ids=copied.input_ids, **given)[0][0, -1]
            bound = max(1e-4, 4 * torch.finfo(plain.dtype).eps) * float(plain.nan_to_num().abs().max())
            _LOOKED[trunk] = torch.allclose(last, plain, rtol=0, atol=bound, equal_nan=True)
        finally:
            looking.reset(token)
    return _LOOKED[trunk]


def _has_holes(mask: torch.Tensor) -> bool:
    """Whether tokens that are left out stand between real ones, in any row of ``[rows, tokens]``."""
    begins = torch.nn.functional.pad((mask != 0).long(), (1, 0)).diff(dim=1) > 0
    return bool((begins.sum(1) > 1).any())


@torch.no_grad()
def evaluate_probe_tokens(
    plan,
    batch: Mapping[str, Any],
    model,
    loss_fn,
    *,
    tt_model,
    adapter: str,
    distribution: str = "gaussian",
    planner: Planner | None = None,
) -> tuple[torch.Tensor, int]:
    """Return the loss of every row at every probe, as ``adazeta.probes.evaluate_probes``, and the rows it cost.

    Args:
        plan: the probes.
        batch: input_ids and attention_mask ``[B, T]`` and what else the loss needs, examples in dimension 0.
        model: what ``loss_fn.losses_at_copies(model, batch, copies)`` gets.
        loss_fn: a loss with that method, ``LabelWords`` for one.
        planner: says how many copies share a forward, over all its rows; by default the number of tokens does.

    Returns:
        Losses ``[G, Q, S, rows_per_probe]`` float32 on the CPU, and the number of prompts that passed the model.
    """
    from .probes import Probes, probing, read, take_rows

    planner = planner or Planner()
    per_row = len(plan) // plan.groups
    # Groups are kept whole; a single group (all examples share their probes) is cut by rows.
    unit = plan.rows_per_probe if plan.groups > 1 else 1
    ids = batch["input_ids"]
    prompt = ids.shape[1] - 1
    copies = planner.probes_per_forward or planner.copies(prompt, unit, ids.device.type)
    copies, rows_done = min(per_row, copies), 0

    def forward(first_row: int, last_row: int) -> torch.Tensor:
        nonlocal rows_done
        rows = torch.arange(first_row, last_row)
        part = take_rows(batch, rows)
        groups = len(rows) // plan.rows_per_probe if plan.groups > 1 else 1
        first_group = first_row // plan.rows_per_probe if plan.groups > 1 else 0
        pieces = []
        for first_copy in range(0, per_row, copies):
            count = min(copies, per_row - first_copy)
            chosen = [
                plan.probe((first_group + g) * per_row + first_copy + c) for g in range(groups) for c in range(count)
            ]
            probes = Probes.of([p[0] for p in chosen], [p[1] for p in chosen], adapter, distribution)
            with ExitStack() as stack:
                stack.enter_context(probing(tt_model, probes))
                stack.enter_context(focused(tt_model, ProbeTokens(count, groups)))
                pieces.append(loss_fn.losses_at_copies(model, part, count).float())
            rows_done += len(rows)
        return torch.cat(pieces, 1)  # [rows, per_row]

    blocks: list[torch.Tensor] = []
    first_row = 0
    while first_row < len(ids):
        length, fewer = prompt + copies, -(-copies // 2)
        if copies > 1 and unit * length > planner.most_tokens:
            copies = fewer
            continue
        try:
            step = planner.rows(length, ids.device.type, unit)
        except SettingError:  # a budget that fewer copies may keep to
            if copies == 1:
                raise
            copies = fewer
            continue
        if planner.probes_per_forward and plan.groups > 1:  # otherwise all rows share the copies
            step = min(step, planner.probes_per_forward // copies * plan.rows_per_probe)
        last_row = min(first_row + step, len(ids))
        try:
            blocks += planner.run(forward, first_row, last_row, length, unit)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or copies == 1:
                raise
            planner.learn(unit * length, unit * (prompt + fewer))  # rows alone are too much, with so many copies each
            continue
        first_row = last_row
    losses = read(blocks)
    queries = per_row // len(plan.signs)
    losses = losses.view(plan.groups, plan.rows_per_probe, queries, len(plan.signs))
    return losses.permute(0, 2, 3, 1), rows_done
