"""How tt_factors cuts the contraction of a layout: four chains of cores, each as the product of two sides.

A chain, the cores of L or of R of one map, gives a matrix (M, N): its rows are the left rank and the dimensions of the
cores before a cut, its columns those after it and the right rank. A row of the left side is a product of matrices, one
of each core, picked by the digits of the row's number; so is a column of the right side. The cut makes the matrix as
square as it can be, so that the two sides are little work beside their product.

The plan is a table of integers that the kernel reads, so that one compiled kernel serves all layouts of a rank class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from adazeta_kernels.layout import TTAdapterLayout

# Columns of a chain's row in the table; two sides follow, each a head and its cores.
BEGIN, CORES, COUNT, OUT, ROWS, COLUMNS, CUT = range(7)
HEAD = 8
# Of the head of a side, which tells its first core's row (or column) by the digit of the outer rank.
RANK_DIVISOR, RANK_MODULUS, RANK_STRIDE, STEPS = range(4)
SIDE_HEAD = 4
# Of a core: where it begins in the chain; dimension, divisor of its digit, and strides.
OFFSET, DIMENSION, DIVISOR, DIGIT_STRIDE, SUM_STRIDE, OUT_STRIDE, SUM_RANK, OUT_RANK = range(8)
CORE = 8


@dataclass(frozen=True)
class Plan:
    """What one launch of tt_factors needs to know of a layout.

    Attributes:
        table: int32 `(4, row)`, on the CPU.
        side: integers of one side in a row of the table.
        rank: the largest rank of the layout.
        scratch: numbers in the cores of the longest chain.
        rows: the most rows M of a chain.
    """

    table: torch.Tensor
    side: int
    rank: int
    scratch: int
    rows: int


@lru_cache(maxsize=256)
def plan(layout: TTAdapterLayout) -> Plan:
    """The plan of a layout."""
    chains, begin, out = [], 0, 0
    for shape in (layout.down, layout.up):
        half = len(shape.in_factors)
        for position, cores in enumerate((shape.core_shapes[:half], shape.core_shapes[half:])):
            bias = shape.d_out if layout.bias and position == 1 else 0
            chain = _Chain(cores, begin, out, bias)
            chains.append(chain)
            begin, out = begin + chain.count, out + chain.rows * chain.columns + bias
    sides = [side for chain in chains for side in (chain.left, chain.right)]
    most = max(map(len, sides))
    return Plan(
        torch.tensor([chain.table_row(most) for chain in chains], dtype=torch.int32, device="cpu"),
        SIDE_HEAD + most * CORE,
        max(max(core[SUM_RANK], core[OUT_RANK]) for side in sides for core in side),
        max(chain.numel for chain in chains),
        max(chain.rows for chain in chains),
    )


class _Chain:
    """Cores of shapes (r_left, n, r_right) from element `begin` of theta on, and `bias` numbers behind them."""

    def __init__(self, cores, begin: int, out: int, bias: int):
        self.begin, self.out = begin, out
        self.numel = sum(map(prod, cores))
        self.count = self.numel + bias
        dims, first_rank, last_rank = [n for _, n, _ in cores], cores[0][0], cores[-1][2]
        cut = min(
            range(1, len(cores)),
            key=lambda at: first_rank * prod(dims[:at]) + prod(dims[at:]) * last_rank,
            default=1,
        )
        self.rows, self.columns = first_rank * prod(dims[:cut]), prod(dims[cut:]) * last_rank
        offsets = [sum(map(prod, cores[:k])) for k in range(len(cores))]
        self.left = [
            (offsets[k], n, prod(dims[k + 1 : cut]), right, n * right, 1, left, right)
            for k, (left, n, right) in enumerate(cores[:cut])
        ]
        self.right = [
            (offsets[k], n, prod(dims[k + 1 :]) * last_rank, right, 1, n * right, right, left)
            for k, (left, n, right) in reversed(list(enumerate(cores))[cut:])
        ]
        self.left_head = (prod(dims[:cut]), first_rank, self.left[0][SUM_STRIDE], len(self.left) - 1)
        self.right_head = (1, last_rank, 1, len(self.right) - 1)

    def table_row(self, most_cores: int) -> list[int]:
        """HEAD integers, then for each side SIDE_HEAD and `most_cores` times CORE, zeros where it has fewer cores."""
        row = [self.begin, self.numel, self.count, self.out, self.rows, self.columns, int(bool(self.right)), 0]
        for head, cores in ((self.left_head, self.left), (self.right_head, self.right)):
            side = [*head, *(number for core in cores for number in core)]
            row += side + [0] * (SIDE_HEAD + most_cores * CORE - len(side))
        return row
