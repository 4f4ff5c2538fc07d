"""Arguments of the ops of adazeta_kernels, for ``fuzz.py``: shapes, strides, dtypes, devices, values of any kind."""

import math
import random
import re
import struct
from pathlib import Path

import numpy as np
import torch

from adazeta_kernels import (
    TTAdapterLayout,
    derive_seeds,
    fill_normal_,
    low_rank_linear,
    perturb_,
    tt_adapter,
    tt_factors,
    tt_linear,
)

ODD = (None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e39, math.inf, -math.inf, math.nan)
ODD += ("", "x", "1", "é\x00", [], [1], ["x"], {}, {"a": 1}, [[]], [0] * 50)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool)
DTYPES += (torch.complex64, torch.float8_e4m3fn)


class Operations:
    """Calls that are mostly right and wrong in a place or two; one that is refused has written nothing."""

    def __init__(self, work: Path):
        self.layout = TTAdapterLayout.auto(32, 8, 2)

    def make(self, chance: random.Random) -> bytes:
        return struct.pack("<Q", chance.getrandbits(64))

    def run(self, content: bytes) -> None:
        chance = random.Random(content)
        tensors: list[torch.Tensor] = []

        def either(*good):
            return chance.choice(good if chance.random() < 0.85 else (*ODD, torch.zeros(0), np.float32(1), object()))

        def tensor(*shape):
            """A tensor of this shape, as a rule: in one of five another shape, dtype, memory format or device."""
            if chance.random() < 0.1:
                shape = [chance.choice((0, 1, 2, 7, n)) for n in shape][chance.randrange(2) :]
            dtype = torch.float32 if chance.random() < 0.9 else chance.choice(DTYPES)
            value = torch.ones(shape).to(dtype)
            if chance.random() < 0.1:
                kind = chance.randrange(6)
                if kind == 0:
                    value = value.to("meta")
                elif kind == 1 and value.ndim > 1:
                    value = value.transpose(0, -1).contiguous().transpose(0, -1)
                elif kind == 2 and value.ndim:
                    value = value[:1].expand(shape)  # elements share memory
                elif kind == 3:
                    value = torch.ones([2 * n for n in shape]).to(dtype)[tuple(slice(0, 2 * n, 2) for n in shape)]
                elif kind == 4 and dtype == torch.float32:
                    value = value.to_sparse()
                elif value.is_floating_point():
                    value.requires_grad_()
            tensors.append(value)
            return either(value)

        call = self._call(chance.randrange(7), chance, either, tensor)
        before = [_bytes(value) for value in tensors]
        try:
            call()
        except (ValueError, TypeError):
            assert [_bytes(value) for value in tensors] == before, "a call was refused, and had written"
            raise
        except RuntimeError as error:  # a named backend that cannot run the call
            if not re.match(r"backend '\w+' cannot run|no backend can run", str(error)):
                raise AssertionError(f"RuntimeError: {error}") from error

    def _call(self, op: int, chance: random.Random, either, tensor):
        """Return a call of one op, its arguments made."""
        backend = either(None, None, "reference", "native", "auto")
        distribution = either("gaussian", "rademacher")
        offset, probes, tokens, width = either(0, 5, 2**40), chance.randrange(1, 4), chance.randrange(1, 5), 32
        if op == 0:
            keywords = {"offset": offset, "distribution": distribution, "backend": backend}
            out, seed = tensor(*[(), (7,), (3, 5)][chance.randrange(3)]), either(0, 2**64 - 1)
            return lambda: fill_normal_(out, seed, **keywords)
        if op == 1:
            some = either([tensor(7), tensor(3, 5)][: chance.randrange(3)])
            if chance.random() < 0.05 and isinstance(some, list):
                some = some + some[:1]  # one of them twice
            number = chance.randrange(3)
            seeds, scales = either(list(range(number))), either([0.5] * number)
            keywords = {"offset": offset, "decay": either(1.0, 0.5), "distribution": distribution, "backend": backend}
            return lambda: perturb_(some, seeds, scales, **keywords)
        if op == 2:
            adapters = either(None, 1, 2)
            theta = tensor(self.layout.numel * (adapters if isinstance(adapters, int) and adapters == 2 else 1))
            layout, seeds, scales = either(self.layout), either([1] * probes), either([0.1] * probes)
            keywords = {"offset": offset, "adapters": adapters, "distribution": distribution, "backend": backend}
            return lambda: tt_factors(theta, layout, seeds, scales, **keywords)
        if op == 3:
            x, factors = tensor(probes, tokens, width), tensor(probes, self.layout.factor_numel)
            layout, act, scale = either(self.layout), either("relu", "gelu", "identity"), either(1.0, 0.5)
            return lambda: tt_adapter(x, factors, layout, act=act, scale=scale, backend=backend)
        if op == 4:
            x, left, right = tensor(probes, tokens, width), tensor(probes, width, 2), tensor(probes, 2, 8)
            bias = either(None, tensor(probes, 8))
            return lambda: tt_linear(x, left, right, bias, backend=backend)
        if op == 5:
            x, base, scale = tensor(probes, tokens, width), tensor(probes, tokens, 8), either(1.0, 0.5)
            a, b = tensor(probes, width, 2), tensor(probes, 2, 8)
            return lambda: low_rank_linear(x, base, a, b, scale=scale, backend=backend)
        step, count = either(0, 2**63), chance.choice((0, 3, 40, 2**33, -1, 1.5, "3", None))
        run_seed = either(0, 2**64 - 1)
        return lambda: derive_seeds(run_seed, step, count)


def _bytes(value: torch.Tensor) -> bytes:
    """Return what a tensor holds; nothing where it is on no real device."""
    if value.device.type == "meta":
        return b""
    value = value.detach()
    dense = value.to_dense() if value.is_sparse else value
    copy = torch.empty(dense.shape, dtype=dense.dtype).copy_(dense).view(-1)
    return copy.view(torch.uint8).numpy().tobytes() if copy.numel() else b""
