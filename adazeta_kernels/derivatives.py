"""Whether derivatives are asked of a call: then the reference runs it, and writing in place is refused."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether derivatives are wanted: an input requires grad in grad mode, or forward mode is on, where torch cannot
    ask every tensor for its tangent (not inside vmap)."""
    if _in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def carries_tangent(*tensors: torch.Tensor) -> bool:
    """Whether forward mode goes through one of the tensors, and not just on around the call, as in `differentiated`."""
    return _in_forward_mode() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _in_forward_mode():
    return getattr(forward_ad, "_current_level", 0) >= 0  # private; where it is gone, it counts as on
