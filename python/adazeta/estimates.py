"""The losses of one estimate: which of the ways to evaluate probes an optimizer takes, and what saves it work."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch

from .block_ends import KEPT_BYTES
from .others import check_active
from .probe_tokens import can_use_probe_tokens, evaluate_probe_tokens
from .probes import Plan, evaluate_probes, tokens_of


def losses_of(optimizer, plan: Plan, batch: Mapping[str, Any], loss_fn: Callable) -> tuple[torch.Tensor, int]:
    """Return the losses of the plan's probes, ``[G, Q, S, rows_per_probe]``, and the forward rows they cost.

    Args:
        optimizer: a ``ZerothOrder``; its first estimate begins with a look at the model.
        plan: the probes.
        batch, loss_fn: as of ``ZerothOrder.estimate``.
    """
    model, tt_model, planner, prefix = optimizer.model, optimizer.tt_model, optimizer.planner, optimizer.prefix
    if tt_model is not None:
        check_active(tt_model, optimizer.adapter)
    # Asked for also where it is not needed: it makes the layers' offsets those of the flat vector.
    offset = tt_model.theta(optimizer.adapter).numel() if tt_model is not None else 0
    others = optimizer._others.at_probes(model, offset, optimizer.distribution)
    settings = {
        "tt_model": tt_model,
        "adapter": optimizer.adapter,
        "distribution": optimizer.distribution,
        "planner": planner,
    }
    per_row = getattr(loss_fn, "per_row", loss_fn)  # what depends on a row alone, where the loss of a row does not
    look = optimizer._first_look
    planner.scored = loss_fn.positions_scored(batch) if hasattr(loss_fn, "positions_scored") else 0
    planner.generated = loss_fn.max_new_tokens if getattr(loss_fn, "generates", False) else 0
    further = {"others": others, "heads": optimizer._others.heads(model)}
    shares = prefix is not None and bool(prefix.describe())
    looked_at = partial(getattr(loss_fn, "continuous", per_row), model)
    look(model, batch, looked_at, eps=optimizer.eps, shares=shares, **further, **settings)
    planner.rows_apart = look.rows_apart
    at_tokens = others is None and not look.rows_mix
    at_tokens = at_tokens and can_use_probe_tokens(tt_model, optimizer.adapter, loss_fn, batch)
    with ExitStack() as stack:
        if not optimizer.privacy:  # a count of tokens tells of the examples
            stack.enter_context(optimizer.tokens.counting(model))
        shares = prefix is not None and not look.rows_mix and not getattr(loss_fn, "generates", False)
        shared = shares and stack.enter_context(prefix.shared())
        graphs = optimizer.graphs.used(others=others is not None, shared=shared, at_tokens=at_tokens)
        if not stack.enter_context(graphs):  # a graph repeats the rows and tokens of its recording
            keep = 0 if planner.asked_for else KEPT_BYTES  # a budget is the forward's
            stack.enter_context(optimizer.ends.used(alike=optimizer._others.behind_adapters(model), keep=keep))
        stack.enter_context(others or nullcontext())
        if at_tokens:
            losses, rows = evaluate_probe_tokens(plan, batch, model, loss_fn, **settings)
        else:
            if look.rows_mix:
                planner.probes_per_forward = 1
            tokens, _ = tokens_of(batch, loss_fn)
            further["apart"] = partial(look.parts, model, batch, looked_at)
            losses = evaluate_probes(plan, batch, partial(per_row, model), tokens=tokens, **further, **settings)
            rows = plan.rows * getattr(loss_fn, "rows_per_example", 1)
    return (loss_fn.of_probes(losses, batch) if hasattr(loss_fn, "of_probes") else losses), rows
