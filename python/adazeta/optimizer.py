"""``ZerothOrder``: a torch optimizer whose ``estimate`` stands where ``loss.backward()`` stood."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adazeta_kernels import derive_seeds

from .estimator import coefficients, probe_signs, projected_gradients
from .journal import Journal, decayed_views, sha256_of
from .probe_tokens import can_use_probe_tokens, evaluate_probe_tokens
from .probes import Plan, batch_size, evaluate_probes
from .recording import describe_run
from .schedule import as_schedule
from .tuner import TTModel
from .update import Step, Trainable, apply_step


class ZerothOrder(torch.optim.Optimizer):
    """Zeroth-order SGD on the trainable parameters of a model: forward passes only, nothing is stored per parameter.

    ``estimate`` evaluates the probes of one batch and keeps one number per query; ``step`` draws the directions again
    and updates: ``theta <- (1 - lr wd) theta - lr sum_j c_j z_j``, the coefficients as in ``adazeta.estimator``.

    Args:
        model: a model with trainable parameters; those of a TT adapter are perturbed virtually (in batched forwards),
            all others in place, one probe at a time.
        lr: learning rate. With ``combine="spread"`` the step is normalised: about ``lr * sqrt(numel / queries)`` long.
        eps: distance of a probe from theta, in units of the parameters.
        queries: queries per step (and per group): an integer or a schedule such as ``AdaptiveQueries``.
        directions: who shares a direction: ``"batch"`` (all examples, as published), ``"example"`` (each its own), or
            the number of groups that the batch is cut into.
        difference: ``"central"`` (two rows per query and example) or ``"forward"`` (one; needs 2 or more queries).
        combine: ``"mean"`` or ``"spread"`` (divide by the spread of the projected gradients).
        floor: smallest spread that is divided by.
        clip: bound on a projected gradient, in spreads, or None.
        momentum: factor on the running direction, in [0, 1).
        weight_decay: decoupled, per unit of lr, on everything but biases.
        distribution: ``"gaussian"`` or ``"rademacher"``.
        run_seed: 64-bit seed that, with step and query, names every direction.
        steps_per_epoch: batches per epoch, for schedules that grow by epoch.
        probes_per_forward: most probes evaluated in one forward; by default from the number of tokens.
        share_prefix: run the blocks below the first adapter once per example.
        virtual: False perturbs adapters in place too (slow; the same losses up to rounding).

    Raises:
        ValueError: an option out of its range, no trainable parameter, or several trainable adapters.

    Source: AdaZeta (arXiv 2406.18060), equations 3 to 5; MeZO (arXiv 2305.17333) for seeds instead of directions.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float = 1e-2,
        *,
        eps: float = 1e-2,
        queries=1,
        directions: str | int = "batch",
        difference: str = "central",
        combine: str = "spread",
        floor: float = 0.0,
        clip: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        distribution: str = "gaussian",
        run_seed: int = 0,
        steps_per_epoch: int = 1,
        probes_per_forward: int | None = None,
        share_prefix: bool = True,
        virtual: bool = True,
    ):
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"expected lr >= 0, weight_decay >= 0, 0 <= momentum < 1, got {lr=}, {weight_decay=}, {momentum=}"
            )
        if directions not in ("batch", "example") and not (isinstance(directions, int) and directions >= 1):
            raise ValueError(f"directions must be 'batch', 'example' or a number of groups, got {directions!r}")
        if probes_per_forward is not None and probes_per_forward < 1:
            raise ValueError(f"probes_per_forward must be at least 1 or None, got {probes_per_forward}")
        if not 0 <= run_seed < 2**64:
            raise ValueError(f"run_seed must be in [0, 2**64), got {run_seed}")
        if distribution not in ("gaussian", "rademacher"):
            raise ValueError(f"distribution must be 'gaussian' or 'rademacher', got {distribution!r}")
        probe_signs(difference)
        coefficients(torch.zeros(1), combine=combine, floor=floor, clip=clip)
        self.model, self.eps, self.queries = model, eps, as_schedule(queries)
        self.directions, self.difference, self.distribution = directions, difference, distribution
        self.combine, self.floor, self.clip = combine, floor, clip
        self.run_seed, self.steps_per_epoch = run_seed, steps_per_epoch
        self.probes_per_forward, self.share_prefix, self.virtual = probes_per_forward, share_prefix, virtual
        self.tt_model, self.adapter = _trainable_adapter(model)
        layers = self.tt_model.tt_layers(self.adapter) if self.tt_model else []
        adapter_ids = {id(layer.tt_theta[self.adapter]) for _, layer in layers}
        self.sites = [(name, layer.layout[self.adapter]) for name, layer in layers]
        self.others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapter_ids}
        parameters = [layer.tt_theta[self.adapter] for _, layer in layers] + list(self.others.values())
        if not parameters:
            raise ValueError("the model has no trainable parameter; add an adapter or set requires_grad")
        self.step_index = self.rows = self.evaluations = self.dropped = self.clipped = 0
        self.spread = 0.0
        self.journal: Journal | None = None
        self._momentum: list[torch.Tensor] = []
        self._seeds_used = 0
        self._projected: list[torch.Tensor] = []
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def trainable(self) -> Trainable:
        """Return the numbers that ``step`` changes: flat ``theta`` of the adapter, then the other parameters."""
        theta = [self.tt_model.theta(self.adapter)] if self.tt_model else []
        decayed = decayed_views(theta[0], [layout for _, layout in self.sites]) if theta else []
        decayed += [p.data for p in self.others.values() if p.ndim > 1]
        return Trainable(theta + [p.data for p in self.others.values()], decayed, self._momentum)

    @torch.no_grad()
    def estimate(self, loss_fn: Callable[[torch.nn.Module, dict], torch.Tensor], batch: Mapping[str, Any]) -> float:
        """Evaluate this step's probes on ``batch`` and keep their projected gradients; nothing is updated.

        Called more than once before ``step``, it accumulates: the step averages over all queries of all batches.

        Args:
            loss_fn: ``loss_fn(model, batch) -> [rows]``, one float32 loss per row of the (expanded) batch.
            batch: mapping whose tensors have the examples in dimension 0.

        Returns:
            The mean of all finite losses, an estimate of the loss at theta; NaN if none is finite.
        """
        examples = batch_size(batch)
        groups = self._groups(examples)
        queries = self.queries(self.step_index, self.steps_per_epoch)
        seeds = derive_seeds(self.run_seed, self.step_index, self._seeds_used + queries * groups)[self._seeds_used :]
        plan = Plan(seeds, self.eps, probe_signs(self.difference), groups, examples // groups)
        virtual = self.tt_model is not None and self.virtual
        # Asked for even where it is not perturbed itself: it makes the layers' offsets those of the flat vector.
        theta = [self.tt_model.theta(self.adapter)] if self.tt_model is not None else []
        if virtual and not self.others and can_use_probe_tokens(self.tt_model, self.adapter, loss_fn):
            losses, rows = evaluate_probe_tokens(
                plan,
                batch,
                self.model,
                loss_fn,
                tt_model=self.tt_model,
                adapter=self.adapter,
                distribution=self.distribution,
                probes_per_forward=self.probes_per_forward,
                share_prefix=self.share_prefix,
            )
        else:
            rows = plan.rows * getattr(loss_fn, "rows_per_example", 1)
            losses = evaluate_probes(
                plan,
                batch,
                lambda part: loss_fn(self.model, part),
                tt_model=self.tt_model if virtual else None,
                adapter=self.adapter,
                in_place=([] if virtual else theta) + [p.data for p in self.others.values()],
                in_place_offset=theta[0].numel() if virtual else 0,
                distribution=self.distribution,
                probes_per_forward=self.probes_per_forward,
                share_prefix=self.share_prefix,
            )
        self._projected.append(projected_gradients(losses.double().mean(-1), self.eps, self.difference).reshape(-1))
        self._seeds_used += len(seeds)
        self.rows += rows
        self.evaluations += losses.numel()
        finite = torch.isfinite(losses)
        return float(losses[finite].double().mean()) if finite.any() else float("nan")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Record the step in the journal, if there is one, then update the parameters in place.

        Raises:
            RuntimeError: no ``estimate`` since the last step.
            UserError: the journal can't be written; the parameters are then unchanged.
        """
        if closure is not None:
            raise TypeError("ZerothOrder.step takes no closure; call estimate(loss_fn, batch) before it")
        if not self._projected:
            raise RuntimeError("step() without estimate(): there is nothing to update with")
        result = coefficients(torch.cat(self._projected), combine=self.combine, floor=self.floor, clip=self.clip)
        group = self.param_groups[0]
        record = Step(
            self.step_index, float(group["lr"]), group["momentum"], group["weight_decay"], tuple(result.values)
        )
        if self.journal is not None:
            self.journal.append(record)
        trainable = self.trainable()
        apply_step(trainable, record, self.run_seed, self.distribution)
        self._momentum = trainable.momentum
        self.dropped += result.dropped
        self.clipped += result.clipped
        self.spread = result.spread
        self.step_index += 1
        self._seeds_used = 0
        self._projected = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget estimates that no step has used; there are no gradients."""
        self._seeds_used = 0
        self._projected = []

    def _groups(self, examples: int) -> int:
        if self.directions == "batch":
            return 1
        if self.directions == "example":
            return examples
        # The last batch of an epoch may be smaller: the most groups that divide it evenly.
        return max(g for g in range(1, min(self.directions, examples) + 1) if examples % g == 0)

    def write_journal(self, path: str | Path, resume: bool = False) -> Journal:
        """Record every step in ``path`` from now on; with ``resume``, go on after the current step's predecessor."""
        header, initial = describe_run(self)
        self.journal = (
            Journal.resume(path, header, self.step_index) if resume else Journal.create(path, header, initial)
        )
        return self.journal

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-identical continuation needs besides the parameters."""
        own = {
            "step": self.step_index,
            "rows": self.rows,
            "evaluations": self.evaluations,
            "dropped": self.dropped,
            "clipped": self.clipped,
            "run_seed": self.run_seed,
            "momentum": [m.clone() for m in self._momentum],
        }
        return {**super().state_dict(), "zeroth_order": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: the state belongs to another run seed or to other parameters.
        """
        own = state_dict["zeroth_order"]
        if own["run_seed"] != self.run_seed:
            raise ValueError(f"the state was saved with run_seed {own['run_seed']}, this run has {self.run_seed}")
        shapes = [t.shape for t in self.trainable().tensors]
        if own["momentum"] and [m.shape for m in own["momentum"]] != shapes:
            raise ValueError(f"momentum of shapes {[tuple(m.shape) for m in own['momentum']]} does not fit {shapes}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.step_index, self.rows, self.evaluations = own["step"], own["rows"], own["evaluations"]
        self.dropped, self.clipped = own["dropped"], own["clipped"]
        self._momentum = [m.to(t.device).clone() for m, t in zip(own["momentum"], self.trainable().tensors)]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all trainable numbers: equal on machines that hold the same bits."""
        return sha256_of(self.trainable().tensors)


def _trainable_adapter(model: torch.nn.Module) -> tuple[TTModel | None, str]:
    """Return the ``TTModel`` inside ``model`` and the name of its trainable adapter."""
    tt_model = next((m for m in model.modules() if isinstance(m, TTModel)), None)
    if tt_model is None:
        return None, "default"
    names = [
        name
        for name in tt_model.peft_config
        if any(layer.tt_theta[name].requires_grad for _, layer in tt_model.tt_layers(name))
    ]
    if len(names) > 1:
        raise ValueError(f"adapters {names} are all trainable; make one active with model.set_adapter(name)")
    return (tt_model, names[0]) if names else (None, "default")
