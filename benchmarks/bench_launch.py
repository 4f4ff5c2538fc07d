"""Time the host spends on a call of each op: native against Triton, on tensors so small that only that counts.

    python benchmarks/bench_launch.py [--calls N] [--repeats N] [--json FILE]

On a GPU a call returns when its launch is queued: what is timed is Python, checks, dispatch, small tables and the
launch. On a CPU native runs the op itself, on a few numbers, and Triton is left out, with the reason. Figures are
microseconds a call, the least of the repeats' means, backends taking turns.
"""

import argparse
import json
import time

import torch

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout

BACKENDS = ("native", "triton")
LAYOUT = TTAdapterLayout.auto(64, 16, 2)


def cases(device):
    """Name -> op and its arguments."""
    theta = torch.randn(LAYOUT.numel, device=device)
    few, many = [torch.randn(64, device=device)], [torch.randn(64, device=device) for _ in range(100)]
    directions = torch.arange(2), torch.full((2,), 1e-3)
    factors = kernels.tt_factors(theta, LAYOUT, *directions, backend="reference")
    left, right, bias, _, _, _ = LAYOUT.split_factors(factors)
    x, base = torch.randn(2, 4, LAYOUT.width, device=device), torch.randn(2, 4, LAYOUT.bottleneck, device=device)
    return {
        "fill_normal_": (kernels.fill_normal_, few[0], 1),
        "perturb_ of 1 tensor": (kernels.perturb_, few, *directions),
        "perturb_ of 100 tensors": (kernels.perturb_, many, *directions),
        "tt_factors": (kernels.tt_factors, theta, LAYOUT, *directions),
        "tt_adapter": (kernels.tt_adapter, x, factors, LAYOUT),
        "tt_linear": (kernels.tt_linear, x, left, right, bias),
        "low_rank_linear": (kernels.low_rank_linear, x, base, left, right),
    }


def microseconds(op, args, backends, calls, repeats):
    """Backend -> least mean time of a call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for backend in backends:
        op(*args, backend=backend)  # compiles, measures configurations, fills caches
    best = dict.fromkeys(backends, float("inf"))
    for _ in range(repeats):
        for backend in backends:
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                op(*args, backend=backend)
            best[backend] = min(best[backend], 1e6 * (time.perf_counter() - start) / calls)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # 200 launches wait in the queue of the device at most, which holds about 1,000: the host is never held up.
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "backends": kernels.backends(),
        "microseconds": {},
        "left_out": {},
    }
    print(f"host microseconds a call on {result['device']}, torch {torch.__version__}")
    with torch.no_grad():
        for name, (op, *args) in cases(device).items():
            found = {backend: kernels.explain(op, *args, backend=backend) for backend in BACKENDS}
            left_out = {
                backend: found[backend].passed_over[backend] for backend in BACKENDS if found[backend].passed_over
            }
            backends = [backend for backend in BACKENDS if backend not in left_out]
            times = microseconds(op, args, backends, arguments.calls, arguments.repeats)
            result["microseconds"][name], result["left_out"][name] = times, left_out
            told = [f"{backend} {times[backend]:8.1f}" for backend in backends]
            print(f"{name:24} " + "  ".join(told + [f"no {b}: {reason}" for b, reason in left_out.items()]))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
