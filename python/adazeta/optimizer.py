"""``ZerothOrder``: a torch optimizer whose ``estimate`` stands where ``loss.backward()`` stood."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, is_dataclass
from pathlib import Path
from typing import Any

import torch

from adazeta_kernels import derive_seeds

from .assets import cache_dir
from .batches import to_device
from .block_ends import BlockEnds
from .config import check_probes, check_update
from .digests import crc_of, sha256_of
from .estimates import losses_of
from .estimator import coefficients, probe_signs, projected_gradients
from .first_look import FirstLook
from .graphs import Graphs
from .guards import Guard
from .in_place import Drift
from .interrupts import uninterrupted
from .journal import Journal
from .next_step import next_step
from .others import WAYS, Others, trainable_adapter
from .planner import Planner
from .prefix import Prefix
from .prefix_cache import cache_of
from .probes import Plan, batch_size, check_mask, groups_of
from .recording import record_going_back, record_run
from .replay import decayed_views, redo_estimates, replay
from .schedule import as_schedule
from .state import check_state, restore, state_of
from .tokens import TokenCount
from .update import Step, Trainable, apply_step


class ZerothOrder(torch.optim.Optimizer):
    """Zeroth-order SGD on the trainable parameters of a model: forward passes only, nothing is stored per parameter.

    ``estimate`` evaluates the probes of one batch and keeps one number per query; ``step`` draws the directions again
    and updates: ``theta <- (1 - lr wd) theta - lr sum_j c_j z_j``, the coefficients as in ``adazeta.estimator``.

    Args:
        model: a model with trainable parameters; those of a TT adapter are perturbed virtually (in batched forwards),
            all others as ``perturb`` says, one probe at a time.
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
        memory_budget: bytes that a forward may take above the weights; by default half of what is free.
        share_prefix: run the blocks below the first adapter once per example.
        prefix_cache: where their outputs are kept for later steps: ``"off"``, ``"memory"`` or ``"disk"``, with a limit
            as in ``"memory:2GiB"`` (else a quarter of what is free); ``"auto"`` is memory.
        perturb: how trainable parameters that are not adapters are perturbed: ``"streamed"`` (made as they are read,
            never written; ``adazeta.streamed``) or ``"in-place"`` (no memory, but they drift; ``adazeta.in_place``).
        on_divergence: what becomes of a step that ``adazeta.guards.Guard`` refuses: ``"stop"`` raises ``Diverged``,
            ``"rollback"`` goes back to the journal's best point and on with half the learning rate, ``"ignore"`` makes
            the step all the same.
        ranks: an ``adazeta.distributed.Ranks``, where many processes share the queries or the data of a step.
        privacy: an ``adazeta.privacy.Privacy``: what a step learns from its examples is clipped and noised. The
            journal then holds no losses and no counts of examples; ``estimate`` returns the loss to you alone.

    The first estimate looks once, with two rows, whether the losses of a row depend on the other rows of its forward
    (``adazeta.first_look``); from then on every probe has a forward of its own.

    Raises:
        ValueError: an option out of its range, no trainable parameter or one that cannot be perturbed, or several
            trainable adapters.

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
        memory_budget: int | None = None,
        share_prefix: bool = True,
        prefix_cache: str = "auto",
        perturb: str = WAYS[0],
        on_divergence: str = "stop",
        ranks=None,
        privacy=None,
    ):
        check_update(lr, momentum, weight_decay)
        check_probes(eps, directions, difference, distribution, run_seed)
        coefficients(torch.zeros(1), combine=combine, floor=floor, clip=clip)
        self.model, self.eps, self.queries = model, eps, as_schedule(queries)
        self.directions, self.difference, self.distribution = directions, difference, distribution
        self.combine, self.floor, self.clip = combine, floor, clip
        self.run_seed, self.steps_per_epoch = run_seed, steps_per_epoch
        self.tt_model, self.adapter = trainable_adapter(model)
        self.planner = Planner(
            model,
            tt_model=self.tt_model,
            adapter=self.adapter,
            probes_per_forward=probes_per_forward,
            memory_budget=memory_budget,
        )
        cache = cache_of(prefix_cache, cache_dir() / "prefix")
        self.prefix = Prefix(self.tt_model, self.adapter, cache) if self.tt_model and share_prefix else None
        self.graphs, self.ends = (kind(model, self.tt_model, self.adapter) for kind in (Graphs, BlockEnds))
        self.tokens = TokenCount()
        layers = self.tt_model.tt_layers(self.adapter) if self.tt_model else []
        adapter_ids = {id(layer.tt_theta[self.adapter]) for _, layer in layers}
        self.sites = [(name, layer.layout[self.adapter]) for name, layer in layers]
        self.others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapter_ids}
        parameters = [layer.tt_theta[self.adapter] for _, layer in layers] + list(self.others.values())
        if not parameters:
            raise ValueError("the model has no trainable parameter; add an adapter or set requires_grad")
        self._others, self._first_look = Others(self.others, perturb), FirstLook()
        self.step_index = self.rows = self.evaluations = self.dropped = self.clipped = 0
        self.spread = 0.0
        # The record of a private step tells no loss, so steps without one are nothing to stop at.
        self.guard = Guard(on_divergence, patience=math.inf if privacy else Guard.patience)
        self.ranks, self.privacy = ranks, privacy
        for part in (ranks, privacy):
            if part is not None:
                part.check(self)
        self.journal: Journal | None = None
        self._recorded: list[Step] = []  # of a journal that is resumed; those from step_index on are still to be done
        self._mean_losses: list[float] = []
        self._header: dict = {}
        self._counted = (0, 0)
        self._momentum: list[torch.Tensor] = []
        self._decayed: list[torch.Tensor] = []  # of theta, as long as it is _decayed_of
        self._decayed_of: torch.Tensor | None = None
        self._seeds_used = 0
        self._projected: list[torch.Tensor] = []
        self.probe_losses: torch.Tensor | None = None  # of the last estimate, [G, Q, S], summed over a group's rows
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict) -> None:
        """Refuse a second group: what trains, where it lies in a direction and its lr are settled with the optimizer.

        Raises:
            ValueError: always, but from the constructor.
        """
        if self.param_groups:
            raise ValueError(
                "ZerothOrder trains what required grad when it was made, in one group: set requires_grad on further "
                "parameters, then make a new ZerothOrder(model, ...)"
            )
        super().add_param_group(param_group)

    def trainable(self) -> Trainable:
        """Return the numbers that ``step`` changes: flat ``theta`` of the adapter, then the other parameters."""
        theta = [self.tt_model.theta(self.adapter)] if self.tt_model else []
        if theta and self._decayed_of is not theta[0]:
            self._decayed, self._decayed_of = decayed_views(theta[0], [layout for _, layout in self.sites]), theta[0]
        others = [p.data for p in self.others.values()]
        tensors, decayed = theta + others, self._decayed + [tensor for tensor in others if tensor.ndim > 1]
        self._momentum = [m.to(t.device) for m, t in zip(self._momentum, tensors)]  # the model may have moved
        return Trainable(tensors, decayed, self._momentum)

    @torch.no_grad()
    def estimate(self, loss_fn: Callable[[torch.nn.Module, dict], torch.Tensor], batch: Mapping[str, Any]) -> float:
        """Evaluate this step's probes on ``batch`` and keep their projected gradients; nothing is updated.

        Called more than once before ``step``, it accumulates: the step averages over all queries of all batches.

        Args:
            loss_fn: ``loss_fn(model, batch) -> [rows]``, one float32 loss per row of the (expanded) batch; or one of
                ``adazeta.objectives``.
            batch: mapping whose tensors have the examples in dimension 0; lists and tuples of as many entries go with
                them. For a model on a GPU best on the CPU still, or from ``adazeta.batches.prefetched``: then nothing
                but the losses is read from the GPU. Of a private step maybe ``{}``: no example.

        Returns:
            The mean of all finite losses, an estimate of the loss at theta; NaN if none is finite.

        Raises:
            TypeError: a batch that is no mapping, a loss that is no tensor.
            ValueError: a row whose attention mask is all zeros; other than one loss per row; the adapter is not active,
                or disabled; with the data spread over ranks, a loss that is no mean over examples.
        """
        if self.pending:
            return self.next_recorded.loss
        if self.privacy and self._projected:
            raise RuntimeError("a private step has one estimate: call step() before the next")
        if self.ranks:
            self.ranks.check_loss(loss_fn)
        least = 0 if self.ranks else 1  # a rank may get none of a small batch, and a drawn batch may be empty
        examples = batch_size(batch, least) if not self.privacy or batch else 0
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            batch = to_device(batch, device)
        check_mask(batch)
        groups = groups_of(self.directions, examples)
        if self.ranks and self.directions != "batch":
            self.ranks.same_batch(examples, self.step_index)
        queries = self.queries(self.step_index, self.steps_per_epoch)
        seeds = derive_seeds(self.run_seed, self.step_index, self._seeds_used + queries * groups)[self._seeds_used :]
        mine = self.ranks.queries(queries) if self.ranks else range(queries)
        chosen = [seeds[group * queries + query] for group in range(groups) for query in mine]
        plan = Plan(chosen, self.eps, probe_signs(self.difference), groups, examples // groups)
        losses, rows = torch.empty(groups, len(mine), len(plan.signs), plan.rows_per_probe), 0
        if losses.numel():
            losses, rows = losses_of(self, plan, batch, loss_fn)
        finite = losses[torch.isfinite(losses)].double()
        loss = own_loss = float(finite.mean()) if len(finite) else math.nan
        if self.privacy:
            self.privacy.check_rows(loss_fn, mix=self._first_look.rows_mix)
            losses = self.privacy.release(losses)
            rows = queries * len(plan.signs) * getattr(loss_fn, "rows_per_example", 1) * self.privacy.batch_size
        number, evaluations = losses.shape[-1], losses.numel()
        if self.ranks:
            due = self.step_index % self.ranks.check_every == 0 or self.step_index == len(self._recorded)
            digest = crc_of(self.trainable().tensors) if due else 0
            central = self.difference == "central"
            lr = float(self.param_groups[0]["lr"]) * self.guard.lr_factor
            found = self.ranks.gather(losses, queries, self.step_index, digest, rows, lr=lr, central=central)
            sums, number, loss, rows, evaluations = astuple(found)
        else:
            sums = losses.double().sum(-1)
        if self.privacy:  # what is counted and recorded says how many examples are expected, not how many came
            loss, evaluations = math.nan, evaluations * self.privacy.batch_size
        # Sums of losses are exact in float64, so nothing depends on how examples are spread over ranks.
        self._projected.append((projected_gradients(sums, self.eps, self.difference) / number).reshape(-1))
        self.probe_losses = sums
        self._seeds_used += len(seeds)
        self.rows += rows
        self.evaluations += evaluations
        self._mean_losses.append(loss)
        return own_loss if self.privacy else loss

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Record the step in the journal, if there is one, then update the parameters in place.

        Raises:
            RuntimeError: no ``estimate`` since the last step.
            Diverged: the guard refuses the step; the parameters are then unchanged.
            JournalError: the step is one of a resumed journal, and the parameters are not those it was made with.
            UserError: the journal can't be written; the parameters are then unchanged.
        """
        if closure is not None:
            raise TypeError("ZerothOrder.step takes no closure; call estimate(loss_fn, batch) before it")
        trainable = self.trainable()
        step = self.next_recorded if self.pending else next_step(self, trainable)
        with uninterrupted():  # Ctrl-C finds a step made, counted and recorded, or none of it
            if self.pending:
                redo_estimates(trainable, step, Drift.of(self._header), self.run_seed)
                self.rows, self.evaluations = self.rows + step.rows, self.evaluations + step.losses
            elif self.journal is not None:
                self.journal.append(step)
            self._make(step, trainable)

    def _make(self, step: Step, trainable: Trainable) -> None:
        """Update the numbers and everything that is counted."""
        if step.back_to is None:
            apply_step(trainable, step, self.run_seed, self.distribution)
            self._momentum = trainable.momentum
        else:
            self.take(replay(self.journal.path, step.back_to, repair=True).trainable)
        self.guard.observe(step)
        self.dropped += step.dropped
        self.clipped += step.clipped
        self.spread = step.spread
        self.step_index += 1
        self._counted = (self.rows, self.evaluations)
        self.zero_grad()

    def go_back(self, to: int) -> None:
        """Make the numbers those before step ``to``, out of the journal, which keeps this as a step of its own.

        Raises:
            ValueError: no journal, or it holds no such step.
        """
        if to != self.step_index:
            with uninterrupted():
                self._make(record_going_back(self, to), self.trainable())

    def take(self, source: Trainable) -> None:
        """Copy the numbers and the momentum of ``source``."""
        target = self.trainable()
        for own, other in zip(target.tensors, source.tensors):
            own.copy_(other)
        self._momentum = [m.to(t.device) for m, t in zip(source.momentum, target.tensors)]

    @property
    def pending(self) -> int:
        """Steps of a resumed journal that are still to be done: ``estimate`` needs no forward for them."""
        return max(0, len(self._recorded) - self.step_index)

    @property
    def next_recorded(self) -> Step:
        """The first of the ``pending`` steps."""
        return self._recorded[self.step_index]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget estimates that no step has used; there are no gradients."""
        self._seeds_used = 0
        self._projected = []
        self._mean_losses = []

    def write_journal(
        self,
        path: str | Path,
        resume: bool = False,
        *,
        identity: dict | None = None,
        about: dict | None = None,
        fsync_every: int = 0,
    ) -> Journal:
        """Record every step in ``path`` from now on.

        With ``resume`` the journal of an interrupted run is gone on with. It is the truth about all of its steps: those
        behind ``step_index`` (which a checkpoint may have set) are done again from their records, while ``estimate``
        and ``step`` are called with the same batches in the same order, and forwards begin where it ends.

        Args:
            path: the journal.
            resume: go on with it instead of replacing it.
            identity: JSON values to keep in its header that a resumed run must share, such as a digest of the data.
            about: JSON values to keep in its header that it need not share.
            fsync_every: steps after which records are forced to the disk, 0 for only at the end.

        Raises:
            UserError: another process writes to it, or it can't be read or written.
            JournalError: to resume, it is damaged, of another run, or ends before ``step_index``.
        """
        self.journal, recorded = record_run(self, path, resume, identity, about, fsync_every)
        self.take_up(recorded, self.journal.header)
        return self.journal

    def take_up(self, steps: list[Step], header: dict) -> None:
        """Make the recorded ``steps`` of a journal from ``step_index`` on as they are called for, without forwards."""
        self._recorded, self._header = steps, header
        for step in steps[: self.step_index]:
            self.guard.observe(step)

    def settings(self) -> dict[str, Any]:
        """Return the settings that a run's results depend on, besides the model and those that are recorded per step.

        How probes are put into forwards is not among them: results depend on it by rounding alone.
        """
        names = ("eps", "directions", "difference", "combine", "floor", "clip", "steps_per_epoch")
        queries = repr(self.queries) if is_dataclass(self.queries) else type(self.queries).__qualname__
        settings = {**{name: getattr(self, name) for name in names}, "queries": queries}
        if self.privacy:
            settings["privacy"] = asdict(self.privacy)
        return {**settings, "perturb": self._others.way} if self.others else settings

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-identical continuation needs besides the parameters."""
        return {**super().state_dict(), "zeroth_order": state_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; of lr, momentum and weight decay what is set now, where it is new.

        A new ``lr`` is scaled as a schedule had scaled the old one (a scheduler keeps rates of its own: ``base_lrs``).

        Raises:
            ValueError: the state belongs to another run seed or to other parameters.
        """
        check_state(self, state_dict)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        restore(self, state_dict)

    def __getstate__(self):
        raise TypeError(
            "a ZerothOrder is not copied or pickled without its model: make one for a copy of the model, and give it "
            "this one's state_dict() with load_state_dict()"
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of all trainable numbers: equal on machines that hold the same bits."""
        return sha256_of(self.trainable().tensors)
