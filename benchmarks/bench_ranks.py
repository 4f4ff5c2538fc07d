"""What a step gains when several processes share its queries: each has one thread, and so has the one alone.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_ranks.py [--model smollm2-135m] [--json FILE]

The step of one process and that of all take turns, all by the clock, with a barrier before each; while one steps alone
the others sleep in the barrier. What counts is the median of the ratios of neighbours. `wait` is what of a step of all
is the exchange of scalars, waiting for the slowest included. ADAZETA_BENCH_ROUNDS sets the rounds, `--little` takes a
tiny model of the family: a trial run. The learning rate is 0, so theta stays the same on all.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from step_engines import ADAPTER, EPS, LITTLE_ADAPTER, loss_for
from step_models import MODELS, build, make_batch
from timing import ROUNDS, machine

from adazeta import TTConfig, ZerothOrder
from adazeta.distributed import join
from adazeta.frozen import pack
from adazeta.planner import tokens_per_forward


def measure(arguments, ranks) -> dict:
    """Return medians of seconds per step, alone and together, and of their ratios, with the quartiles."""
    torch.set_num_threads(1)
    base = build(arguments.model, torch.float32, little=arguments.little)
    model = peft.get_peft_model(base, TTConfig(**(LITTLE_ADAPTER if arguments.little else ADAPTER))).eval()
    if arguments.gemm == "packed":
        pack(base, tokens_per_forward(base))
    batch, loss = make_batch(base, arguments.rows, arguments.tokens), loss_for(base)
    settings = {"lr": 0.0, "eps": EPS, "queries": arguments.queries, "prefix_cache": "off"}
    alone, together = ZerothOrder(model, **settings), ZerothOrder(model, ranks=ranks, **settings)
    waits = []
    exchange = ranks._exchange

    def timed_exchange(*message):
        start = time.perf_counter()
        received = exchange(*message)
        waits.append(time.perf_counter() - start)
        return received

    ranks._exchange = timed_exchange

    def seconds(optimizer, mine: bool) -> float:
        dist.barrier()
        start = time.perf_counter()
        if mine:
            optimizer.estimate(loss, batch)
            optimizer.step()
        return time.perf_counter() - start

    times = []
    for done in range(ROUNDS + 1):  # the first round is not counted
        pair = seconds(alone, ranks.rank == 0), seconds(together, True)
        if done:
            times.append(pair)
    ratios = [one / all_ranks for one, all_ranks in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "model": arguments.model,
        "ranks": ranks.size,
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        "queries": arguments.queries,
        "gemm": arguments.gemm,
        "rounds": ROUNDS,
        **machine(),
        "alone_ms": 1e3 * statistics.median(one for one, _ in times),
        "together_ms": 1e3 * statistics.median(all_ranks for _, all_ranks in times),
        "wait_ms": 1e3 * statistics.median(waits[1:]),
        "speedup": middle,
        "speedup_quartiles": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cpu = [name for name, model in MODELS.items() if not model.gpu_only]
    parser.add_argument("--model", choices=on_cpu, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--gemm", choices=("plain", "packed"), default="packed")
    parser.add_argument("--little", action="store_true", help="a tiny model of the family: a trial run")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    ranks = join()
    if ranks is None:
        parser.error("start it with torchrun --standalone --nproc-per-node 2")
    found = measure(arguments, ranks)
    if ranks.rank == 0:
        print(
            f"{found['model']}, {found['rows']} x {found['tokens']} tokens, {found['queries']} queries: one process "
            f"{found['alone_ms']:.0f} ms, {found['ranks']} processes {found['together_ms']:.0f} ms (of which "
            f"{found['wait_ms']:.1f} ms exchange): {found['speedup']:.2f} times as fast"
        )
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
