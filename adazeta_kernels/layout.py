"""Tensor-train (TT) shapes for any width, and where every core lies in the flat vector `theta`.

Nothing here computes with tensors except `TTAdapterLayout.split_factors`, which makes views. All layouts are
immutable and hashable, and `encode()` turns one into the `int[]` that the registered ops take.

Source: AdaZeta (arXiv 2406.18060), section 3; TT format: Oseledets 2011, "Tensor-Train Decomposition".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from adazeta_kernels.factorization import balanced_factors

_ENCODING_VERSION = 1


class Segment(NamedTuple):
    """One block of `theta`: a core `(r_left, n, r_right)` or a bias `(n,)`, from element `offset` on."""

    name: str
    offset: int
    shape: tuple[int, ...]
    is_bias: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TTShape:
    """The shape of a TT linear `W = L R` with `W` of shape `(d_in, d_out)`.

    Core k has shape `(ranks[k-1], n_k, ranks[k])`, with `n = in_factors + out_factors` and rank 1 at both ends. `L`
    `(d_in, bond)` is the contraction of the cores of `in_factors`, `R` `(bond, d_out)` of the rest; the first factor
    is the slowest index.

    Args:
        in_factors: factors of `d_in`, one per core.
        out_factors: factors of `d_out`, one per core.
        ranks: one rank per bond, `len(in_factors) + len(out_factors) - 1` of them.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: an entry is below 1, the number of ranks is wrong, or a rank is above `min(d_in, d_out)`.
    """

    in_factors: tuple[int, ...]
    out_factors: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self):
        for name in ("in_factors", "out_factors", "ranks"):
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))
        bonds = len(self.in_factors) + len(self.out_factors) - 1
        if len(self.ranks) != bonds:
            raise ValueError(
                f"ranks has {len(self.ranks)} entries, expected {bonds}: one per bond between the "
                f"{bonds + 1} cores {list(self.in_factors)} | {list(self.out_factors)}"
            )
        limit = min(self.d_in, self.d_out)
        if max(self.ranks) > limit:
            raise ValueError(
                f"rank {max(self.ranks)} is above min(d_in, d_out) = {limit} of a {self.d_in} x {self.d_out} map, "
                f"which has no higher rank: use a rank of at most {limit}"
            )

    @classmethod
    def auto(cls, d_in: int, d_out: int, rank: int | Sequence[int]) -> TTShape:
        """Choose the most balanced factors of both widths.

        Args:
            d_in: input width.
            d_out: output width.
            rank: one integer for every bond, or one integer per bond.

        Raises:
            ValueError: a width is prime or nearly so, or a rank is above its limit. See `from_factors`.
        """
        return cls.from_factors(balanced_factors(d_in), balanced_factors(d_out), rank)

    @classmethod
    def from_factors(cls, in_factors: Sequence[int], out_factors: Sequence[int], rank: int | Sequence[int]) -> TTShape:
        """Build a shape from factors and an integer rank or one rank per bond.

        An integer is used on every bond, as the paper does: at rank 5 its last bond of 4096 x 64 is above its limit
        of 4, which wastes a few numbers and is allowed so that the published counts (1,100) hold. Ranks given bond
        by bond are checked against each bond's own limit, the smaller of the products of dimensions on either side.

        Raises:
            ValueError: a rank is below 1 or above its limit, or there is not one rank per bond.
        """
        dims = _int_tuple("in_factors", in_factors) + _int_tuple("out_factors", out_factors)
        if isinstance(rank, int) and not isinstance(rank, bool):
            if rank < 1:
                raise ValueError(f"rank must be at least 1, got {rank}")
            return cls(tuple(in_factors), tuple(out_factors), (rank,) * (len(dims) - 1))
        if isinstance(rank, bool) or not isinstance(rank, Sequence):
            raise TypeError(f"rank must be an integer or one integer per bond, got {rank!r}")
        ranks = _int_tuple("rank", rank)
        for bond, value in enumerate(ranks[: len(dims) - 1]):
            limit = min(prod(dims[: bond + 1]), prod(dims[bond + 1 :]))
            if value > limit:
                raise ValueError(
                    f"rank {value} of bond {bond} is above its limit {limit} in {list(in_factors)} | "
                    f"{list(out_factors)}: use at most {limit} there"
                )
        return cls(tuple(in_factors), tuple(out_factors), ranks)

    @property
    def d_in(self) -> int:
        return prod(self.in_factors)

    @property
    def d_out(self) -> int:
        return prod(self.out_factors)

    @property
    def bond(self) -> int:
        """The rank between `L` and `R`."""
        return self.ranks[len(self.in_factors) - 1]

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """`(r_left, n, r_right)` of every core, in order."""
        dims, ends = self.in_factors + self.out_factors, (1, *self.ranks, 1)
        return tuple((ends[k], n, ends[k + 1]) for k, n in enumerate(dims))

    @property
    def numel(self) -> int:
        """Numbers in all cores."""
        return sum(prod(shape) for shape in self.core_shapes)

    @property
    def mirror(self) -> TTShape:
        """The shape of the map back, `d_out -> d_in`: factors swapped, ranks reversed."""
        return TTShape(self.out_factors, self.in_factors, self.ranks[::-1])

    def __str__(self) -> str:
        def join(values):
            return ", ".join(map(str, values))

        return f"[{join(self.in_factors)} | {join(self.out_factors)}] ranks ({join(self.ranks)})"


@dataclass(frozen=True)
class TTAdapterLayout:
    """The layout of one adapter `x + s * up(act(down(x)))` in `theta`: down cores, down bias, up cores, up bias.

    Args:
        width: model width d.
        bottleneck: bottleneck width b.
        down: shape of the map d -> b.
        up: shape of the map b -> d.
        bias: whether both maps have a bias.

    Attributes:
        numel: length of theta.
        factor_numel: numbers of factors per probe.
        max_cores: the larger number of cores of the two maps.
        max_bond: the larger of the two ranks between L and R.

    Raises:
        ValueError: the shapes do not map `width -> bottleneck -> width`.
    """

    width: int
    bottleneck: int
    down: TTShape
    up: TTShape
    bias: bool = True

    def __post_init__(self):
        want = (self.width, self.bottleneck)
        if (self.down.d_in, self.down.d_out) != want or (self.up.d_out, self.up.d_in) != want:
            raise ValueError(
                f"an adapter of width {self.width} and bottleneck {self.bottleneck} needs down {self.width} x "
                f"{self.bottleneck} and up {self.bottleneck} x {self.width}, got down {self.down.d_in} x "
                f"{self.down.d_out} and up {self.up.d_in} x {self.up.d_out}"
            )
        # Plain attributes, computed once: these are read on every forward and under torch.compile.
        object.__setattr__(self, "_segments", _segments(self))
        factors, augmented = _factor_blocks(self)
        object.__setattr__(self, "_factor_plan", _split_plan(factors))
        object.__setattr__(self, "_augmented_plan", _split_plan(augmented))
        object.__setattr__(self, "_segment_plan", _split_plan([segment.shape for segment in self._segments]))
        object.__setattr__(self, "numel", sum(segment.numel for segment in self._segments))
        object.__setattr__(self, "factor_numel", sum(map(prod, factors)))
        object.__setattr__(self, "_encoded", _encode(self))
        object.__setattr__(self, "max_cores", max(len(shape.core_shapes) for shape in (self.down, self.up)))
        object.__setattr__(self, "max_bond", max(self.down.bond, self.up.bond))

    @classmethod
    def auto(
        cls,
        width: int,
        bottleneck: int = 64,
        rank: int | Sequence[int] = 5,
        shapes: str | dict[str, Sequence[int]] = "auto",
        bias: bool = True,
    ) -> TTAdapterLayout:
        """Lay out an adapter for any width.

        Args:
            width: model width d.
            bottleneck: bottleneck width b.
            rank: one integer for every bond, or one per bond of `down` (`up` takes them in reverse).
            shapes: "auto" for the most balanced factors, or `{"width": (..), "bottleneck": (..)}`; a key left out is
                chosen automatically.
            bias: give both maps a bias.

        Raises:
            TypeError: `shapes` is neither "auto" nor a dict.
            ValueError: no factors exist, given factors do not multiply to their width, or a rank is above its limit.
        """
        if isinstance(shapes, str) and shapes == "auto":
            shapes = {}
        if not isinstance(shapes, dict):
            raise TypeError(f'shapes must be "auto" or a dict with "width" and "bottleneck", got {shapes!r}')
        unknown = sorted(set(shapes) - {"width", "bottleneck"})
        if unknown:
            raise ValueError(f'unknown keys in shapes: {unknown}; known are "width" and "bottleneck"')
        factors = {}
        for name, size in (("width", width), ("bottleneck", bottleneck)):
            given = shapes.get(name)
            factors[name] = balanced_factors(size, name) if given is None else _int_tuple(f"shapes[{name!r}]", given)
            if prod(factors[name]) != size:
                raise ValueError(
                    f"shapes[{name!r}] = {factors[name]} multiplies to {prod(factors[name])}, expected {name} {size}"
                )
        down = TTShape.from_factors(factors["width"], factors["bottleneck"], rank)
        return cls(width, bottleneck, down, down.mirror, bool(bias))

    def segments(self) -> tuple[Segment, ...]:
        """Every core and bias in the order of `theta`: "down.0", .., "down.bias", "up.0", .., "up.bias"."""
        return self._segments

    def split_factors(self, factors: torch.Tensor):
        """Cut factors `(P, factor_numel)` into views.

        Returns:
            `L1 (P, d, r1)`, `R1 (P, r1, b)`, `b1 (P, b)`, `L2 (P, b, r2)`, `R2 (P, r2, d)`, `b2 (P, d)`; None in place
            of the biases where the layout has none. Each bias lies right behind its `R`, see `split_augmented`.

        Raises:
            ValueError: `factors` is not of shape `(P, factor_numel)`.
        """
        parts = _split(factors, self._factor_plan, self.factor_numel, "factors")
        return tuple(parts) if self.bias else (parts[0], parts[1], None, parts[2], parts[3], None)

    def split_augmented(self, factors: torch.Tensor) -> list[torch.Tensor]:
        """Cut factors into views `L1, R1b, L2, R2b`, where `R1b (P, r1+1, b)` and `R2b (P, r2+1, d)` hold the bias as
        last row, so that `[h, 1] R` adds it at no cost. Without biases they equal `R1` and `R2`."""
        return _split(factors, self._augmented_plan, self.factor_numel, "factors")

    def split_theta(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Cut copies of theta `(P, numel)` into views `(P, *segment.shape)`, one per segment."""
        return _split(rows, self._segment_plan, self.numel, "rows")

    def encode(self) -> list[int]:
        """Write the layout as a list of integers, for the op schemas."""
        return list(self._encoded)

    @staticmethod
    def decode(code: Sequence[int]) -> TTAdapterLayout:
        """Read a layout written by `encode`.

        Raises:
            ValueError: `code` is not such a list.
        """
        return _decode(tuple(code))

    def describe(self) -> str:
        """Say shapes and parameter counts in a few lines of text."""
        biases = sum(segment.numel for segment in self._segments if segment.is_bias)
        lines = [
            f"TT adapter {self.width} -> {self.bottleneck} -> {self.width}: {self.numel:,} numbers"
            + (f", {biases:,} ({100 * biases / self.numel:.0f} %) of them biases" if self.bias else ", no biases")
        ]
        for name, shape in (("down", self.down), ("up", self.up)):
            dense = shape.d_in * shape.d_out
            lines.append(
                f"  {name:4} {shape.d_in} x {shape.d_out} = {shape}: {shape.numel:,} numbers for {dense:,} "
                f"({dense / shape.numel:.0f}x fewer)"
            )
        return "\n".join(lines)


def _int_tuple(name: str, values) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must hold integers, got {value!r} of type {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must hold integers of at least 1, got {list(values)}")
    if not values:
        raise ValueError(f"{name} must not be empty")
    return tuple(values)


def _segments(layout: TTAdapterLayout) -> tuple[Segment, ...]:
    out, offset = [], 0
    for name, shape in (("down", layout.down), ("up", layout.up)):
        blocks = [(f"{name}.{k}", core, False) for k, core in enumerate(shape.core_shapes)]
        if layout.bias:
            blocks.append((f"{name}.bias", (shape.d_out,), True))
        for block, dims, is_bias in blocks:
            out.append(Segment(block, offset, dims, is_bias))
            offset += prod(dims)
    return tuple(out)


def _factor_blocks(layout: TTAdapterLayout):
    """Shapes of L, R, bias of both maps, and the same with each bias as the last row of its R."""
    factors, augmented = [], []
    for shape in (layout.down, layout.up):
        factors += [(shape.d_in, shape.bond), (shape.bond, shape.d_out)] + [(shape.d_out,)] * layout.bias
        augmented += [(shape.d_in, shape.bond), (shape.bond + layout.bias, shape.d_out)]
    return tuple(factors), tuple(augmented)


def _split_plan(shapes) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Sizes for one call to split, and the shape of each view; computed once, since it is used on every forward."""
    return [prod(shape) for shape in shapes], tuple((-1, *shape) for shape in shapes)


def _split(rows, plan, numel, name):
    if rows.dim() != 2 or rows.shape[1] != numel:
        raise ValueError(f"{name} must have shape (P, {numel}), got {tuple(rows.shape)}")
    sizes, shapes = plan
    return [part.view(shape) for part, shape in zip(torch.split_with_sizes(rows, sizes, 1), shapes, strict=True)]


def _encode(layout: TTAdapterLayout) -> tuple[int, ...]:
    out = [_ENCODING_VERSION, layout.width, layout.bottleneck, int(layout.bias)]
    for shape in (layout.down, layout.up):
        out += [len(shape.in_factors), len(shape.out_factors), *shape.in_factors, *shape.out_factors, *shape.ranks]
    return tuple(out)


@lru_cache(maxsize=1024)
def _decode(code: tuple[int, ...]) -> TTAdapterLayout:
    try:
        version, width, bottleneck, bias, *rest = code
        if version != _ENCODING_VERSION or bias not in (0, 1):
            raise ValueError(f"version {version}, bias {bias}")
        shapes = []
        for _ in range(2):
            m, n, *rest = rest
            sizes = (m, n, m + n - 1)
            if min(sizes) < 1 or len(rest) < sum(sizes):
                raise ValueError("cut short")
            shapes.append(TTShape(tuple(rest[:m]), tuple(rest[m : m + n]), tuple(rest[m + n : sum(sizes)])))
            rest = rest[sum(sizes) :]
        if rest:
            raise ValueError(f"{len(rest)} integers too many")
        return TTAdapterLayout(width, bottleneck, *shapes, bool(bias))
    except (ValueError, TypeError) as error:
        raise ValueError(f"not an encoded TTAdapterLayout: {list(code)} ({error})") from error
