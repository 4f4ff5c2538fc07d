"""Timing that other programs on the machine disturb little: alternatives take turns, and medians are compared."""

import os
import statistics
import time
from collections.abc import Callable

import torch

from adazeta.memory import freed_memory_kept
from adazeta_kernels.backends import native

ELEMENTS = int(os.environ.get("ADAZETA_BENCH_ELEMENTS", 1 << 24))
ROUNDS = int(os.environ.get("ADAZETA_BENCH_ROUNDS", 7))
SMALL = ELEMENTS < 1 << 20  # a trial run: every case in little


def paired_seconds(
    functions: dict[str, Callable[[], object]],
    rounds: int = ROUNDS,
    *,
    limit: float | None = None,
    warm_up: bool = True,
    on_gpu: bool = False,
) -> dict[str, float]:
    """Median seconds of each function, all called once per round, after one call that is not counted.

    With one thread they are seconds of CPU time, system calls included: being interrupted by another program does not
    count, though sharing caches and memory with it does. With several threads, and on a GPU, which is waited for, they
    are seconds by the clock.

    Args:
        limit: no further round begins that would, if as long as those before, end later than this many seconds after
            the first began; there is always one.
        warm_up: False if all functions have been called before.
        on_gpu: the functions put work on the current CUDA device.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    times = {name: [] for name in functions}
    if warm_up:
        for function in functions.values():
            function()
    wait()
    begin = time.perf_counter()
    for done in range(1, rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            wait()
            times[name].append(clock() - start)
        if limit is not None and (time.perf_counter() - begin) * (done + 1) / done > limit:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def copy_function(size: int) -> Callable[[], object]:
    """A copy that reads size / 2 bytes and writes as many: the floor of an op that moves `size` bytes."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def machine() -> dict[str, object]:
    """What a figure depends on beside the code: threads in use, and how busy other programs keep the machine."""
    return {
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "levels": native.levels(),
    }


def record(benchmark, functions: dict[str, Callable[[], object]], size: int, calls: int = 1, **info) -> None:
    """Time `functions`, the first being the one under test, in turns with copies; write all down.

    Each function makes `calls` calls of the op, each of which moves `size` bytes, as does each of `calls` copies.

    Freed memory stays with the allocator meanwhile, as in training: results go to memory that is there, as copies do.
    """
    copy = copy_function(size)

    def repeated(function):
        def run():
            for _ in range(calls):
                function()

        return run

    with freed_memory_kept():
        seconds = paired_seconds({**functions, "copy": repeated(copy)})
    first = next(iter(functions))
    benchmark.extra_info.update(
        **machine(),
        bytes=size * calls,
        copy_gb_per_s=size * calls / seconds["copy"] / 1e9,
        percent_of_copy=100 * seconds["copy"] / seconds[first],
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        **{f"times_{name}": seconds[name] / seconds[first] for name in functions if name != first},
        **info,
    )
    benchmark.pedantic(functions[first], rounds=1)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error, as a part of the largest exact number."""
    return float((actual.double() - exact).abs().max() / exact.abs().max())
