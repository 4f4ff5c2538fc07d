"""Timing that other programs on the machine disturb little: alternatives take turns, and medians are compared."""

import os
import statistics
import time
from collections.abc import Callable

import torch

ELEMENTS = int(os.environ.get("ADAZETA_BENCH_ELEMENTS", 1 << 24))
ROUNDS = int(os.environ.get("ADAZETA_BENCH_ROUNDS", 7))


def paired_seconds(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each function, all called once per round, after one call that is not counted."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_function(size: int) -> Callable[[], object]:
    """A copy that reads size / 2 bytes and writes as many: the floor of an op that moves `size` bytes."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
