"""How far parameters drift that are perturbed and restored in place: relative norm after many central differences.

Usage: python scripts/measure_drift.py [--cycles 1000] [--numbers 100000] [--eps 1e-3]

A cycle is the two probes of one direction. "alone" restores theta after every cycle (three passes); "chain" moves from
the last probe of a cycle to the first of the next in one pass, as ``adazeta.in_place`` does within an estimate.
"""

import argparse

import torch

from adazeta.in_place import InPlace


def drift(dtype: torch.dtype, *, chained: bool, cycles: int, numbers: int, eps: float) -> float:
    """Return ``|theta' - theta| / |theta|`` after ``cycles`` cycles, of normal numbers of standard deviation .02."""
    theta = (0.02 * torch.randn(numbers, generator=torch.Generator().manual_seed(0))).to(dtype)
    start = theta.double()
    per_restore = cycles if chained else 1
    for first in range(0, cycles, per_restore):
        with InPlace([theta]) as others:
            for seed in range(first, first + per_restore):
                others.move_to(seed, eps)
                others.move_to(seed, -eps)
    return float((theta.double() - start).norm() / start.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--numbers", type=int, default=100_000)
    parser.add_argument("--eps", type=float, default=1e-3)
    settings = vars(parser.parse_args())
    print(f"{'dtype':<10} {'alone':>9} {'chain':>9}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        alone, chain = (drift(dtype, chained=chained, **settings) for chained in (False, True))
        print(f"{str(dtype).removeprefix('torch.'):<10} {alone:9.1e} {chain:9.1e}")


if __name__ == "__main__":
    main()
