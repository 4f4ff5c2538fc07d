"""docs/perturbation-spec.md, its test vectors, and every implementation say the same."""

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import gaussian_pair, round32

from adazeta_kernels import derive_seed, fill_normal_
from adazeta_kernels.backends.reference import rng
from adazeta_kernels.seeds import philox

PAGE = (Path(__file__).parents[2] / "docs" / "perturbation-spec.md").read_text()
VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
COEFFICIENTS = {name: Fraction(float.fromhex(value)) for name, value in re.findall(r"\| ([QSC]\d) \| `([^`]+)`", PAGE)}
BACKENDS = ["native", "reference"]


def bits_of(x: Fraction) -> set[int]:
    """Bit patterns of a float32 value; a zero may have either sign."""
    return {0, 0x80000000} if x == 0 else {int(np.float32(float(x)).view(np.uint32))}


def test_philox_known_answers():
    """The vectors that the authors of Philox publish with Random123."""
    full, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((full,) * 4, (full,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_vectorised_philox_equals_the_plain_one():
    for seed, block in ((0, 0), (2**64 - 1, 2**32 - 2), (0x0123456789ABCDEF, 2**61 - 3)):
        for row, words in enumerate(rng.philox(seed, block, 3)):
            counter = ((block + row) % 2**32, (block + row) >> 32, 0, 0)
            assert tuple(words.tolist()) == philox(counter, (seed % 2**32, seed >> 32))


def test_page_lists_the_coefficients_of_the_code():
    for letter, values in (("Q", rng.LOG), ("S", rng.SIN), ("C", rng.COS)):
        listed = [COEFFICIENTS[f"{letter}{n}"] for n in range(len(values) - 1, -1, -1)]
        assert [Fraction(value) for value in values] == listed
    header = (Path(__file__).parents[2] / "csrc/include/adazeta/normal.h").read_text()
    in_header = {Fraction(float.fromhex(value)) for value in re.findall(r"-?0x1\.[0-9a-f]+p[+-]\d+", header)}
    assert set(COEFFICIENTS.values()) <= in_header


def test_page_lists_the_vectors():
    rows = [line.strip("| ").split(" | ") for line in PAGE.split("<!-- vectors -->")[1].splitlines() if "|" in line]
    listed = [row for row in rows if row[0].isdigit()]
    expected = [[str(value) for value in vector.values()] for kind in ("elements", "seeds") for vector in VECTORS[kind]]
    assert listed == expected


@pytest.mark.parametrize("vector", VECTORS["elements"], ids=lambda v: f"{v['seed']}-{v['index']}")
def test_vector_in_exact_arithmetic(vector):
    seed, index = vector["seed"], vector["index"]
    block = index // 4
    words = philox((block % 2**32, block >> 32, 0, 0), (seed % 2**32, seed >> 32))
    assert f"0x{words[index % 4]:08x}" == vector["word"]
    first = index % 4 // 2 * 2
    z = gaussian_pair(words[first], words[first + 1], COEFFICIENTS)[index % 2]
    assert int(vector["gaussian"], 16) in bits_of(z)

    block, bit = index // 128, index % 128
    words = philox((block % 2**32, block >> 32, 0, 0), (seed % 2**32, seed >> 32))
    sign = 1 if words[bit // 32] >> bit % 32 & 1 else -1
    assert int(vector["rademacher"], 16) in bits_of(Fraction(sign))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_of_backend(backend, distribution):
    for vector in VECTORS["elements"]:
        out = fill_normal_(
            torch.empty(1), vector["seed"], offset=vector["index"], distribution=distribution, backend=backend
        )
        assert f"0x{out.view(torch.int32).item() % 2**32:08x}" == vector[distribution], vector


def test_seed_vectors():
    for vector in VECTORS["seeds"]:
        assert derive_seed(vector["run_seed"], vector["step"], vector["query"]) == vector["seed"]


def test_transform_in_exact_arithmetic_at_corners_and_at_random():
    """Ends of the intervals of u and t, interval boundaries of the reductions, and 300 random words."""
    generator = random.Random(1)
    corners = [0, 0xFF, 0x100, 0xFFFFFFFF, 0xFFFFFF00, 0xB504F2 << 8, 0xB504F3 << 8, 0x5A8279 << 8, 0x80000000]
    corners += [(quarter << 30) + delta for quarter in range(4) for delta in (0x1FFFFF00, 0x20000000, 0x20000100)]
    pairs = [(w, v) for w in corners for v in corners]
    pairs += [(generator.getrandbits(32), generator.getrandbits(32)) for _ in range(300)]
    w, v = np.array(pairs, dtype=np.uint32).T
    r, (c, s) = rng.radius(w), rng.cos_sin(v)
    got = np.stack([r * c, r * s], axis=1).view(np.uint32)
    for pair, bits in zip(pairs, got.tolist(), strict=True):
        for value, expected in zip(bits, gaussian_pair(*pair, COEFFICIENTS), strict=True):
            assert value in bits_of(expected), pair


def test_emulated_fma_in_exact_arithmetic():
    """Random operands, near cancellations and halfway cases, where a double rounding would show."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(4000).astype(np.float32) for _ in range(2))
    c = generator.standard_normal(4000).astype(np.float32)
    c[1000:2000] = -(a[1000:2000].astype(np.float64) * b[1000:2000])  # cancels to the rounding error of the product
    # 1 + 2^-24 + a tiny part: halfway between two float32 numbers but for the part, which float64 alone would lose.
    a[2000:3000], b[2000:3000] = 1 + np.float32(2.0**-12), 1 + np.float32(2.0**-12)
    c[2000:3000] = np.ldexp(generator.standard_normal(1000), generator.integers(-60, -20, 1000)).astype(np.float32)
    scale = np.float32(2.0) ** generator.integers(-70, -50, 1000).astype(np.float32)
    a[3000:], b[3000:], c[3000:] = a[3000:] * scale, b[3000:] * scale, c[3000:] * np.float32(2.0**-120)  # subnormals
    for x, y, z, got in zip(a, b, c, rng.fma(a, b, c), strict=True):
        exact = round32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        assert Fraction(float(got)) == exact, (x, y, z)


@pytest.mark.slow
def test_maximum_errors_over_all_words():
    """The errors that the page states, over all 2^24 values of each word, against float64."""
    stated = {
        name: float(value)
        for name, value in re.findall(r"\| (r, absolute|r, relative|cos t and sin t, absolute) \| ([\d.e-]+) \|", PAGE)
    }
    worst = dict.fromkeys(stated, 0.0)
    for begin in range(0, 2**24, 2**18):
        n = np.arange(begin, begin + 2**18, dtype=np.uint32)
        exact = np.sqrt(-2 * np.log((n + 1.0) * 2.0**-24))
        error = np.abs(rng.radius(n << np.uint32(8)) - exact)
        relative = (error[exact > 0] / exact[exact > 0]).max()
        turns = np.abs(
            np.stack(rng.cos_sin(n << np.uint32(8))) - [f(2 * np.pi * 2.0**-24 * n) for f in (np.cos, np.sin)]
        )
        for name, value in zip(stated, (error.max(), relative, turns.max()), strict=True):
            worst[name] = max(worst[name], float(value))
    for name, value in worst.items():
        assert 0.9 * stated[name] < value <= stated[name], (name, value)
    largest = rng.radius(np.zeros(1, np.uint32))[0]
    assert float(largest).hex() == float.fromhex("0x1.7128acp+2").hex()
    assert rng.radius(np.full(1, 0xFFFFFFFF, np.uint32))[0] == 0
