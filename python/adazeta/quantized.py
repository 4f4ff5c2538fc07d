"""Frozen weights that ``transformers`` keeps quantised: how they are asked for, and what they are made of.

Adapters and everything that is trained stay in float32; a quantised layer is a frozen layer like any other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import UserError

#: Name -> package. Those of torchao quantise weights alone.
METHODS = {"int8": "torchao", "int4": "torchao", "fp8": "torchao", "bnb8": "bitsandbytes", "bnb4": "bitsandbytes"}


#: Numbers of a row that share a scale in 4 bits: torchao leaves rows that do not divide by it as they are, so few.
INT4_GROUP = 32


def quantization_config(method: str, device: str = "cpu"):
    """Return what ``from_pretrained(quantization_config=...)`` takes for one of ``METHODS``.

    Args:
        device: type of the device on which the model computes, ``"cpu"`` or ``"cuda"``.

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
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if method == "int4":
        return TorchAoConfig(_int4_config(device))
    return TorchAoConfig(Int8WeightOnlyConfig() if method == "int8" else Float8WeightOnlyConfig())


def _int4_config(device: str):
    """Return torchao's configuration for weights of 4 bits, which it packs in another way for each kind of device."""
    if device == "cpu":
        try:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        except ImportError as error:
            raise UserError(
                f"--quantize int4: torchao {version('torchao')} packs no weights of 4 bits for CPUs, 0.18 does"
            ) from error
        return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP)
    if find_spec("mslk") is None:
        raise UserError("--quantize int4 on a GPU needs torchao's kernels, which are not installed: mslk >= 1.0")
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=INT4_GROUP)


def left_plain(model: torch.nn.Module, begin: Sequence[str] = ()) -> tuple[int, int]:
    """Return how many linear layers of a quantised model hold plain numbers, and how many there are.

    Its output layer is not counted, nor the modules ``begin``, which no checkpoint holds.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and name.partition(".")[0] not in begin
    ]
    return sum(not is_quantized(m._parameters.get("weight")) for m in linear), len(linear)


def check_products(model: torch.nn.Module, device: str) -> None:
    """Raise UserError where bitsandbytes' product of 4 bits on some CPUs fails: rows that end within a block."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if device != "cpu" or state is None or not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if module.in_features % state.blocksize:
            raise UserError(
                f"--quantize bnb4: bitsandbytes multiplies rows of a multiple of {state.blocksize} on this CPU, {name} "
                f"reads {module.in_features}; try int8 or int4"
            )


@contextmanager
def trains_adapters(model: torch.nn.Module | None) -> Iterator[None]:
    """Let ``transformers.Trainer`` be made for a model whose frozen weights let no gradient through: none is asked for.

    It refuses int4 of torchao, GGUF and others unless it has been told of adapters, as it is here meanwhile.
    """
    told = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if told:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if told:
            del model._hf_peft_config_loaded


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
