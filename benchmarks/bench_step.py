"""A whole step: ours, the published way of taking it, and the frozen forwards that it cannot do without.

`-k core-` chooses the cases that docs/performance.md states aims for; ADAZETA_BENCH_STEP=grid adds the grid over
models, batch, tokens, queries and dtypes. Models are configurations with random weights (`step_models.py`).

A case first evaluates both implementations at the same theta and the same directions, and fails unless their losses
agree. `floor` is 2 Q frozen forwards of the batch, one after another, without adapters and without the head, through
the very modules that our step uses. "mixed" is what training chooses for a float32 model where the CPU multiplies
bfloat16 faster: our linear layers are bfloat16 then, the published ones float32. Peak memory is that of one step
above the model, in a process of its own; of one query where a probe fills a forward, for then no other is in memory.
The split is torch.profiler's, of one more step: starting and reading the profiler takes seconds.

Where steps take long, one query of the published step, which takes one after another, is timed for all.
"""

import os
import tempfile
from functools import cache
from itertools import product
from time import perf_counter

import pytest
import torch
from step_engines import ADAPTER, LITTLE_ADAPTER, compare_losses, pair, profile_split, stored
from step_memory import measure
from step_models import MODELS, build, make_batch
from timing import SMALL, machine, paired_seconds

from adazeta.memory import freed_memory_kept
from adazeta.planner import TOKENS_PER_FORWARD

DEVICE = os.environ.get("ADAZETA_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
GRID = os.environ.get("ADAZETA_BENCH_STEP") == "grid"
#: Seconds that the counted rounds of one case may take; the first one always runs.
LIMIT = float(os.environ.get("ADAZETA_BENCH_STEP_SECONDS", 20))

#: model, dtype, examples, tokens, queries
CORE = [
    (model, dtype, *shape)
    for shape in ((1, 32, 10), (16, 64, 4))
    for model, dtype in (
        ("llama-12l", "bfloat16"),
        ("roberta-large", "float32"),
        ("roberta-large", "mixed"),
        ("opt-125m", "float32"),
        ("opt-125m", "mixed"),
    )
]
CORE += [("llama-2-7b", "bfloat16", 16, 64, 10)] + [("roberta-large", "bfloat16", 16, 64, 10)] * (DEVICE != "cpu")
SHAPES, QUERIES = ((1, 8), (1, 32), (1, 128), (4, 64), (16, 64)), (1, 4, 10, 20)
#: Most tokens of a step of the grid on a CPU, where they take about 2 s (125M, bfloat16) to 2 min (355M, float32).
MOST_TOKENS = 2**14 if DEVICE == "cpu" else 2**20


def grid() -> list[tuple]:
    """Return all cases of the grid that are not in `CORE`."""
    cases = [
        (model, dtype, *shape, queries)
        for model, dtype, shape, queries in product(MODELS, ("float32", "bfloat16"), SHAPES, QUERIES)
        if 2 * queries * shape[0] * shape[1] <= MOST_TOKENS
    ]
    return [case for case in cases if case not in CORE]


def name_of(case) -> str:
    model, dtype, examples, tokens, queries = case
    return f"{'core' if case in CORE else 'grid'}-{model}-{dtype}-{examples}x{tokens}-q{queries}"


@cache
def peak_mib(side, model, dtype, examples, tokens, queries) -> float:
    if DEVICE == "cpu" and 2 * examples * tokens > TOKENS_PER_FORWARD["cpu float32"]:
        queries = 1
    settings = {"model": model, "dtype": dtype, "examples": examples, "tokens": tokens, "queries": queries}
    result = measure(side=side, **settings, threads=torch.get_num_threads(), device=DEVICE, little=SMALL)
    return result["peak_bytes"] / 2**20


def measured(benchmark, model: str, dtype: str, examples: int, tokens: int, queries: int) -> dict[str, object]:
    """Compare the losses of both sides, time them in turns, and split ours into its parts."""
    base = build(model, stored(dtype), DEVICE, little=SMALL)
    batch = make_batch(base, examples, tokens)
    forwards, parameters = 2 * queries, sum(p.numel() for p in base.parameters())
    with freed_memory_kept(), tempfile.TemporaryDirectory() as folder:  # as in training; for both sides
        ours, theirs = pair(base, queries, folder, LITTLE_ADAPTER if SMALL else ADAPTER, dtype)
        # Also the call of each side that is not counted. Where forwards are long, one query tells as much.
        compared, begin = min(queries, max(1, 1024 // (examples * tokens))), perf_counter()
        apart = compare_losses(ours, theirs, batch, compared)
        long = (perf_counter() - begin) * queries / compared > LIMIT
        hidden = ours.frozen_forward(batch)
        seconds = paired_seconds(
            {
                "ours": lambda: ours.step(batch),
                # One after another as in a step: a CPU multiplies bfloat16 faster for a moment than for seconds.
                "floor": lambda: [ours.frozen_forward(batch) for _ in range(forwards)],
                "head": lambda: theirs.head(hidden),
                "published": lambda: theirs.step(batch, range(1 if long else queries)),
            },
            limit=LIMIT,
            warm_up=False,
            on_gpu=DEVICE != "cpu",
        )
        seconds["published"] *= queries if long else 1
        # What pytest-benchmark itself shows is the time of this step, profiler included.
        split = benchmark.pedantic(lambda: profile_split(ours, batch), rounds=1)
    step, floor = seconds["ours"], seconds["floor"]
    return {
        "parameters": parameters,
        "gemm": ours.gemm,
        "apart": apart,
        "ours_ms": 1e3 * step,
        "published_ms": 1e3 * seconds["published"],
        "floor_ms": 1e3 * floor,
        "percent_of_floor": 100 * step / floor,
        "published_percent_of_floor": 100 * seconds["published"] / floor,
        "times_published": seconds["published"] / step,
        "times_published_scored": (seconds["published"] - forwards * seconds["head"]) / step,
        "tokens_per_s": forwards * examples * tokens / step,
        "rows_per_s": forwards * examples / step,
        "split_own": sum(split[name] for name in ("adapters", "factors", "update", "journal")),
        **{f"split_{name}": share for name, share in split.items()},
    }


@pytest.mark.parametrize("case", CORE[:4] if SMALL else CORE + (grid() if GRID else []), ids=name_of)
def bench_step(benchmark, threads, case):
    model, dtype, examples, tokens, queries = case
    if MODELS[model].gpu_only and DEVICE == "cpu" and not SMALL:
        pytest.skip(f"{model} needs a GPU: on a CPU its weights take minutes to make, and its steps hours")
    if DEVICE != "cpu" and threads > 1:
        pytest.skip("threads of the CPU do not matter to a GPU; it is timed with one")
    if SMALL:
        tokens, queries = min(tokens, 6), min(queries, 2)
    result = measured(benchmark, model, dtype, examples, tokens, queries)
    sides = ("ours", "published") if case in (CORE[:1] if SMALL else CORE) else ()
    benchmark.extra_info.update(
        **machine(),
        op="step" if case in CORE else "step_grid",
        case=name_of(case).split("-", 1)[1],
        model=model,
        dtype=dtype,
        device="cpu" if DEVICE == "cpu" else torch.cuda.get_device_name(),
        examples=examples,
        tokens=tokens,
        queries=queries,
        **result,
        **{f"peak_{side}_mib": peak_mib(side, model, dtype, examples, tokens, queries) for side in sides},
    )
