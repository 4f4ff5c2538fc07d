"""Host side of the ops on tiles of tokens: how many tokens a program has, and when programs share one tile.

What a configuration can change is who computes a number, not how: the sums over d run over the same chunks under all of
them. With few tokens the columns are split over programs by a rule and not by measuring, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import product

import torch
import triton

from adazeta_kernels.backends.triton import launch, tuning
from adazeta_kernels.backends.triton.compat import BFLOAT16, FLOAT16, FLOAT32, INTERPRETED
from adazeta_kernels.backends.triton.elementwise import DTYPES
from adazeta_kernels.backends.triton.launch import Configuration, Limits
from adazeta_kernels.backends.triton.token_tile import FINISH, PROJECT, WHOLE

LEAST = 16  # rows, and ranks, of a tensor core
MAX_RANK = 64
RANKS = (16, 32, 64)  # padded

# Tokens of a tile, columns of a block of the result at the least rank, and the most padded rank.
_SHAPES = ((64, 64, 16), (32, 128, 64), (LEAST, 128, 64))
_NARROW = 32  # columns at other ranks
_VECTOR = 16  # widths that are multiples of it are read and written 16 bytes at a time
_WARPS, _STAGES = 4, 3
# Bytes of a tile of x: on every processor a few tiles are read twice, and all of them should stay in the cache.
_CACHED_BYTES = 128 << 10
_SHARES = 8  # programs that split a tile where tiles are few: one number, for one compiled kernel
_COLUMNS_OF_A_SHARE = 128  # at least, so that a program's loads overlap


def padded(rank: int) -> int:
    """Columns that hold `rank` of them in a kernel."""
    return max(LEAST, triton.next_power_of_2(rank))


def depth(rank: int, few: bool = False) -> int:
    """Columns of a chunk whose products a tensor core sums: as many as leave registers for the parts of a factor.

    Args:
        few: tiles of the fewest tokens only, as in `candidates`.
    """
    if rank > LEAST:
        return LEAST
    return 32 if few else 64


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    # One program after another is what the interpreter runs.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits(device: torch.device, probes: int, tokens: int, width: int) -> int:
    """Programs that share a tile of the fewest tokens; 1 where tiles occupy half of the device anyway."""
    tiles = probes * triton.cdiv(tokens, LEAST)
    few = 2 * tiles <= processors(device)
    return _SHARES if few and width >= _SHARES * _COLUMNS_OF_A_SHARE else 1


def candidates(rank: int, itemsize: int, width: int, limits: Limits, few: bool) -> list[Configuration]:
    """Configurations for tokens of `width` numbers of `itemsize` bytes and a padded rank, the likely best first.

    Args:
        few: tiles of the fewest tokens only: where tokens are few, and where columns have to be read one by one, which
            takes more registers.
    """
    if INTERPRETED:  # as few operations as there can be
        return [Configuration((("TOKENS", LEAST if few else 64), ("WIDTH", 1024)))]
    return fitting(rank, itemsize, width, limits, few)


def fitting(rank: int, itemsize: int, width: int, limits: Limits, few: bool) -> list[Configuration]:
    """`candidates` for a GPU of such limits."""
    shapes = [s for s in _SHAPES if (s[0] == LEAST or not few) and rank <= s[2]]
    # Large tiles read factors less often, as long as the cache holds them.
    shapes.sort(key=lambda shape: shape[0] * width * itemsize > _CACHED_BYTES)
    found = (
        Configuration((("TOKENS", tokens), ("WIDTH", columns if rank == LEAST else _NARROW)), _WARPS, _STAGES)
        for tokens, columns, _ in shapes
    )
    return launch.configurations(found, partial(_need, rank, itemsize), limits)


def _need(rank: int, itemsize: int, c: Configuration) -> Limits:
    """Chunks on their way, parts of a factor as operands, and a block of the result that changes threads."""
    tokens, width, chunk = c["TOKENS"], c["WIDTH"], depth(rank)
    pipeline = (c.num_stages - 1) * (tokens * itemsize + 4 * rank) * chunk
    numbers = tokens * (width + 4 * rank) + 3 * rank * (chunk + width)
    return Limits(pipeline + 6 * rank * chunk + 4 * tokens * width, 80 + numbers // (32 * c.num_warps))


def run(
    name: str,
    kernel,
    x: torch.Tensor,
    d_out: int,
    ranks: dict[str, int],
    arguments: Callable[[torch.Tensor | None], tuple],
    codes: dict[str, int],
    configuration: Configuration | None,
    shares: int | None,
) -> None:
    """Launch a kernel over all tiles of x, in two stages where several programs share a tile.

    Args:
        x: `(P, T, d)`, neither P nor T zero.
        d_out: width of the result.
        ranks: name of the constexpr -> padded rank; the first is the rank that x is projected to.
        arguments: the kernel's arguments, given the memory for partial projections or None.
        codes: the other constexprs.
        configuration, shares: force them.
    """
    (probes, tokens, width), itemsize, widest = x.shape, x.element_size(), max(ranks.values())
    vectors = width % _VECTOR == 0 and d_out % _VECTOR == 0
    if shares is None:
        shares = splits(x.device, probes, tokens, width) if vectors else 1
    few = shares > 1 or not vectors
    codes = codes | ranks | {"DEPTH": depth(widest, few), "DTYPE": DTYPES[x.dtype], "SPLITS": shares}

    def go(configuration):
        tiles = probes * triton.cdiv(tokens, configuration["TOKENS"])
        if shares == 1:
            launch.launch(kernel, tiles, x.device, configuration, *arguments(None), **codes, STAGE=WHOLE.value)
            return
        numbers = tiles * shares * configuration["TOKENS"] * next(iter(ranks.values()))
        rest = arguments(torch.empty(numbers, dtype=torch.float32, device=x.device))
        for stage in (PROJECT, FINISH):
            launch.launch(kernel, tiles * shares, x.device, configuration, *rest, **codes, STAGE=stage.value)

    if configuration is None:
        found = candidates(widest, itemsize, width, launch.limits(x.device), few)
        shapes = (*launch.shape_class(probes, tokens, width, d_out), *ranks.values(), shares)
        # Measuring on the call's own memory is harmless: the result is written anew, the same, by every launch.
        configuration = tuning.choose(f"{name} {x.dtype}", shapes, found, x.device, lambda: go)
    go(configuration)


def specimens(
    name: str,
    kernel,
    signature: dict[str, str],
    widths: tuple[str, ...],
    ranks: tuple[str, ...],
    codes: dict,
) -> list[launch.Specimen]:
    """A kernel under every configuration that `run` can choose on any GPU, for every dtype of x and padded rank.

    Those named "odd" are for widths that are no multiples of 16.

    Args:
        signature: of all arguments but constexprs, x being of type "*x".
        widths: names of the arguments that are widths, the only ones that kernels specialise on.
        ranks: names of its constexprs that are padded ranks.
        codes: the other constexprs.
    """
    found = []
    pointers = tuple(key for key, value in signature.items() if value[0] == "*")
    for (dtype, code), rank in product((("fp32", FLOAT32), ("bf16", BFLOAT16), ("fp16", FLOAT16)), RANKS):
        itemsize = 4 if code == FLOAT32 else 2
        types = {key: f"*{dtype}" if value == "*x" else value for key, value in signature.items()}
        fixed = dict.fromkeys(ranks, rank) | codes | {"DTYPE": code.value}
        for stage, few, odd in (
            (WHOLE, False, False),
            (WHOLE, True, True),
            (PROJECT, True, False),
            (FINISH, True, False),
        ):
            for c in fitting(rank, itemsize, 0, launch.LIMITS["cuda", 90], few):
                constexprs = fixed | dict(c.sizes) | {"STAGE": stage.value, "SPLITS": 1 if stage == WHOLE else _SHARES}
                constexprs["DEPTH"] = depth(rank, few)
                if stage == WHOLE:
                    constexprs["partial"] = None
                label = f"{name} {dtype} rank={rank} {c['TOKENS']}x{c['WIDTH']} stage={stage.value}{' odd' * odd}"
                present = {key: value for key, value in types.items() if key not in constexprs}
                aligned = tuple(key for key in (*pointers, *(() if odd else widths)) if key in present)
                found.append(launch.Specimen(label, kernel, present, constexprs, c.num_warps, c.num_stages, aligned))
    return found
