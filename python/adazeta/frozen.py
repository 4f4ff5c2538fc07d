"""The frozen linear layers of a float32 model in bfloat16: half their memory, and several times the speed where the
hardware multiplies bfloat16."""

import time

import torch
from torch import nn
from torch.nn import functional as F

# Products of bfloat16 numbers err by 2^-9 of their size. Projected gradients correlate with float32's by .98 at eps .03
# and by .55 at .003 (docs/guide.md).
LEAST_EPS = 0.03


class MixedLinear(nn.Linear):
    """``x W^T + b`` with a bfloat16 weight, products summed in float32 and rounded once, for x of any dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in the dtype of ``x``."""
        y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


def mix(model: nn.Module) -> int:
    """Turn the frozen float32 linear layers of ``model`` into :class:`MixedLinear`, in place; return how many.

    The output layer stays: losses are differences of its results, and it runs at scored positions only. Norms,
    embeddings, attention and everything between layers stay float32.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    count = 0
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if type(module) is nn.Linear and module is not head and frozen and module.weight.dtype == torch.float32:
            module.__class__ = MixedLinear
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
            count += 1
    return count


def bfloat16_pays(size: int = 512, repeats: int = 5) -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones, by trying."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        seconds = []
        for _ in range(repeats + 1):  # the first also sets the library up
            start = time.perf_counter()
            F.linear(matrix, matrix)
            seconds.append(time.perf_counter() - start)
        best[dtype] = min(seconds)
    return best[torch.float32] >= 1.5 * best[torch.bfloat16]


def choose_dtype(eps: float) -> str:
    """Return what ``--dtype auto`` stands for in training: ``mixed`` where it pays and harms nothing."""
    if torch.cuda.is_available() or eps < LEAST_EPS:
        return "float32"
    return "mixed" if bfloat16_pays() else "float32"
