"""The two sides of `bench_step.py`, the comparison of their losses, the trunk floor, and where a step's time goes."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from baselines.published_step import PublishedStep
from peft import get_peft_model
from step_models import MASK, WORDS
from torch.profiler import ProfilerActivity, profile, record_function

from adazeta import LabelWords, MaskedLabelWords, TTConfig, ZerothOrder
from adazeta.frozen import mix, pack, pack_where_faster
from adazeta.planner import tokens_per_forward
from adazeta.scoring import kind_of, model_inputs, trunk_of
from adazeta.tuner.layer import TTLayer
from adazeta.tuner.sites import resolve_sites
from adazeta_kernels import TTAdapterLayout, derive_seeds, fill_normal_

#: AdaZeta's adapters; drawn at random ("paper") so that they act and their perturbations are seen in the losses.
ADAPTER = {"rank": 5, "bottleneck": 64, "sites": "paper", "init": "paper"}
LITTLE_ADAPTER = {**ADAPTER, "rank": 2, "bottleneck": 8}
EPS, LR, WEIGHT_DECAY, RUN_SEED = 3e-2, 1e-6, 1e-2, 7
GEMM = os.environ.get("ADAZETA_BENCH_GEMM", "auto")

#: Largest difference of the two implementations' losses, root mean square, over the spread of the losses over probes.
#: Float32 sums in another order; bfloat16 activations are rounded 50 times on the way to a loss.
TOLERANCE = {"float32": 5e-4, "mixed": 0.25, "bfloat16": 0.25}


class _Words:
    """What the losses need of a tokenizer: a word is the text of its token id."""

    pad_token_id, mask_token_id = 0, MASK

    def encode(self, word: str, add_special_tokens: bool) -> list[int]:
        return [int(word)]


def loss_for(model):
    """Return the loss over the label words for a causal or a masked language model."""
    loss = MaskedLabelWords if kind_of(model) == "masked" else LabelWords
    return loss(_Words(), [str(word) for word in WORDS])


class Ours:
    """`ZerothOrder` on TT adapters in `base`, with a journal in `folder`, as a training run takes its steps.

    `dtype` is that of `base`, or "mixed": linear layers in bfloat16. `gemm` tells what the frozen linear layers
    multiply with: plain, packed, or (auto) what a trial finds faster, as in training.
    """

    def __init__(
        self,
        base,
        queries: int,
        folder: str | Path,
        adapter: Mapping = ADAPTER,
        dtype: str = "float32",
        gemm: str = GEMM,
        **options,
    ):
        self.dtype = dtype
        if dtype == "mixed":
            mix(base)
        self.model = get_peft_model(base, TTConfig(**adapter)).eval()
        tokens = tokens_per_forward(base)
        self.gemm = pack_where_faster(base, tokens) if gemm == "auto" else gemm
        if gemm == "packed":
            pack(base, tokens)
        self.loss_fn = loss_for(base)
        options = {
            "lr": LR,
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
            "combine": "mean",
            "run_seed": RUN_SEED,
        } | options
        self.optimizer = ZerothOrder(self.model, queries=queries, **options)
        self.optimizer.write_journal(Path(folder) / "journal.azj")

    def step(self, batch) -> float:
        loss = self.optimizer.estimate(self.loss_fn, batch)
        self.optimizer.step()
        return loss

    def frozen_forward(self, batch) -> torch.Tensor:
        """Run the base model once, without adapters and without its head, with what the loss gives it."""
        with torch.no_grad(), self.model.disable_adapter():
            return trunk_of(self.model)(**model_inputs(self.model, batch)).last_hidden_state


def published(base, adapter: Mapping = ADAPTER) -> PublishedStep:
    """Put the published adapters into `base`, at the sites where `Ours` has them; their numbers are zero."""
    placed = resolve_sites(adapter["sites"], base.config.model_type)
    sites = {
        name: TTAdapterLayout.auto(module.out_features, adapter["bottleneck"], adapter["rank"])
        for name, module in base.named_modules()
        if any(name.endswith(f".{site}") for site in placed)
    }
    return PublishedStep(base, sites, WORDS, eps=EPS, lr=LR, weight_decay=WEIGHT_DECAY)


def our_normals(seed: int, parameters):
    """Yield the direction that the kernels draw for `seed`, cut into the parameters."""
    flat = torch.empty(sum(p.numel() for p in parameters), device=parameters[0].device)
    fill_normal_(flat, seed)
    for p, z in zip(parameters, flat.split([p.numel() for p in parameters])):
        yield z.view(p.shape)


def compare_losses(ours: Ours, theirs: PublishedStep, batch: Mapping[str, torch.Tensor], queries: int) -> float:
    """Evaluate `queries` queries of this step's directions with both and return how far the losses are apart.

    Returns:
        The root mean square of the differences over the root mean square of a row's losses about their mean over the
        probes: 0 is perfect, and about 1.4 what other directions give.

    Raises:
        AssertionError: that is above `TOLERANCE` of the dtype, or not a number.
    """
    optimizer, seen = ours.optimizer, []

    def recorded(model, part):
        seen.append(ours.loss_fn(model, part))
        return seen[-1]

    recorded.rows_per_example = 1
    schedule, optimizer.queries = optimizer.queries, lambda step, per_epoch: queries
    normals, theirs.normals = theirs.normals, our_normals
    try:
        optimizer.estimate(recorded, batch)
        optimizer.zero_grad()
        theirs.load(optimizer.trainable().tensors[0])
        _, expected = theirs.estimate(batch, derive_seeds(optimizer.run_seed, optimizer.step_index, queries))
    finally:
        optimizer.queries, theirs.normals = schedule, normals
    expected = expected.flatten(0, 1).double()  # [probes, rows]
    # The optimizer's first estimate begins with a look at the model; the probes come last.
    actual = torch.cat(seen)[-expected.numel() :].view(expected.shape).double()
    spread = (expected - expected.mean(0)).square().mean().sqrt()
    apart = float((actual - expected).square().mean().sqrt() / spread)
    tolerance = TOLERANCE[ours.dtype]
    if not apart <= tolerance:
        raise AssertionError(
            f"losses differ by {apart:.2g} of their spread over the probes, {tolerance} is allowed; a speed would mean "
            "nothing"
        )
    return apart


def profile_split(ours: Ours, batch: Mapping[str, torch.Tensor], steps: int = 1) -> dict[str, float]:
    """Return the share of one step's time, in per cent, that each of its parts takes; the shares add up to 100.

    base: the frozen model without its head. adapters: the adapters, without their factors. factors: making the factors
    of all probes. head: gathering scored positions, head, loss. update: the change of theta. journal: its record. host:
    everything else. On a GPU the times are the device's, and what it waits is not in them.
    """
    handles = []

    def range_of(module, name):
        opened = []

        def enter(*_):
            opened.append(record_function(name))
            opened[-1].__enter__()

        def leave(*_):
            opened.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    optimizer, loss_fn, append = ours.optimizer, ours.loss_fn, ours.optimizer.journal.append
    range_of(trunk_of(ours.model), "bench.trunk")
    adapt = TTLayer._adapt  # not by hooks of the layers that it follows: it writes over the output of those without any

    def adapter(*arguments):
        with record_function("bench.adapters"):
            return adapt(*arguments)

    def loss(model, part):
        with record_function("bench.loss"):
            return loss_fn(model, part)

    loss.rows_per_example = 1

    def journal(record):
        with record_function("bench.journal"):
            append(record)

    on_gpu = batch["input_ids"].is_cuda
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    optimizer.journal.append, TTLayer._adapt = journal, adapter
    try:
        with profile(activities=activities) as prof:
            for _ in range(steps):
                with record_function("bench.estimate"):
                    optimizer.estimate(loss, batch)
                with record_function("bench.step"):
                    optimizer.step()
    finally:
        optimizer.journal.append, TTLayer._adapt = append, adapt
        for handle in handles:
            handle.remove()
    total = {e.key: e.device_time_total if on_gpu else e.cpu_time_total for e in prof.key_averages()}
    get = {name: total.get(name, 0.0) for name in ("bench.trunk", "bench.adapters", "bench.journal")}
    factors = total.get("adazeta::tt_factors", 0.0)
    parts = {
        "base": get["bench.trunk"] - get["bench.adapters"],
        "adapters": get["bench.adapters"] - factors,
        "factors": factors,
        "head": total["bench.loss"] - get["bench.trunk"],
        "update": total["bench.step"] - get["bench.journal"],
        "journal": get["bench.journal"],
        "host": total["bench.estimate"] - total["bench.loss"],
    }
    whole = total["bench.estimate"] + total["bench.step"]
    return {name: 100 * value / whole for name, value in parts.items()}


def pair(base, queries: int, folder, adapter: Mapping = ADAPTER, dtype: str = "float32") -> tuple[Ours, PublishedStep]:
    """Return both sides, on equal copies of `base`; only ours knows mixed layers."""
    theirs = published(copy.deepcopy(base), adapter)
    return Ours(base, queries, folder, adapter, dtype), theirs


def stored(dtype: str) -> torch.dtype:
    """Return the dtype that a model's weights are made in."""
    return torch.float32 if dtype == "mixed" else getattr(torch, dtype)
