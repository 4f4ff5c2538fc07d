"""Frozen weights that ``transformers`` keeps quantised: how they are asked for, and what they are made of.

Adapters and everything that is trained stay in float32; a quantised layer is a frozen layer like any other.
"""

from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import UserError

#: Name -> package. Those of torchao quantise weights alone.
METHODS = {"int8": "torchao", "int4": "torchao", "fp8": "torchao", "bnb8": "bitsandbytes", "bnb4": "bitsandbytes"}


def quantization_config(method: str):
    """Return what ``from_pretrained(quantization_config=...)`` takes for one of ``METHODS``.

    Raises:
        UserError: another name, or a package that is not installed.
    """
    if method not in METHODS:
        raise UserError(f"expected one of {', '.join(METHODS)} to quantize, got {method!r}")
    if find_spec(METHODS[method]) is None:
        package = METHODS[method]
        raise UserError(f"--quantize {method} needs a package that is not installed: pip install {package}")
    if METHODS[method] == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        # A threshold would pick outlier columns over all rows of a forward, and so let probes depend on each other.
        return BitsAndBytesConfig(load_in_8bit=method == "bnb8", load_in_4bit=method == "bnb4", llm_int8_threshold=0.0)
    import torchao.quantization as torchao
    from transformers import TorchAoConfig

    kinds = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int4": torchao.Int4WeightOnlyConfig,
        "fp8": torchao.Float8WeightOnlyConfig,
    }
    return TorchAoConfig(kinds[method]())


def is_quantized(tensor: torch.Tensor | None) -> bool:
    """Return whether a weight is one that torchao or bitsandbytes made."""
    return type(tensor).__module__.partition(".")[0] in METHODS.values()


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a quantised one (torchao's) consists of, in order; of a plain one itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor, quantised or not, holds neither NaN nor infinities."""
    parts = [part.float() if part.itemsize == 1 else part for part in plain_parts(tensor.detach())]
    return all(bool(torch.isfinite(part).all()) for part in parts)
