"""What the hidden states below the first adapter depend on: its tensors, marks of a change, a digest for other runs."""

import hashlib
import json
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .frozen import PackedLinear

SAMPLES = 16  # numbers of every tensor that are looked at before each estimate


class CannotShare(Exception):
    """Why a forward has to pass all blocks for every row."""


def frozen_tensors(backbone: nn.Module, blocks: str, first: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of what lies below block ``first``, and of what lies beside the blocks.

    Args:
        backbone: the module that turns token ids into hidden states.
        blocks: name of its list of blocks.
        first: index of the first adapted block.

    Raises:
        CannotShare: a tensor is trainable, or an adapter is active below.
    """
    for name, module in backbone.named_modules():
        inside = name.startswith(f"{blocks}.")
        if inside and int(name[len(blocks) + 1 :].split(".")[0]) >= first:
            continue
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            held = {adapter for kind in module.adapter_layer_names for adapter in getattr(module, kind)}
            if active := sorted(held.intersection(module.active_adapters)):
                raise CannotShare(f"the adapter {active[0]!r} is active in {name}")
        for own, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if not isinstance(tensor, torch.Tensor):  # packed weights are plain attributes
                continue
            if tensor.requires_grad:
                raise CannotShare(f"{name}.{own} is trainable")
            yield f"{name}.{own}", tensor


class _Itself:
    """A tensor that is equal to no other; kept, so that no other gets its place."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __eq__(self, other) -> bool:
        return isinstance(other, _Itself) and self.tensor is other.tensor


def marks(tensors: dict[str, torch.Tensor]) -> tuple[list, torch.Tensor]:
    """Return what changes when tensors are replaced, moved, cast or written to.

    Writes through ``.data`` leave no trace but the numbers: a few of each tensor are read.
    """
    found, samples = [], []
    for name, tensor in tensors.items():
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
        place = tensor.data_ptr() if plain else _Itself(tensor)
        found.append((name, place, 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device))
        if plain and tensor.is_contiguous() and tensor.numel() and tensor.device.type != "meta":
            count = min(SAMPLES, tensor.numel())
            samples.append(tensor.detach().as_strided((count,), (tensor.numel() // count,)))
    found.append(precision(next(iter(tensors.values())).device))
    return found, torch.cat([sample.to(samples[0].device) for sample in samples]).double().cpu()


def precision(device: torch.device) -> list[str]:
    """Return what decides, outside of the model, in which format it computes."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return [str(autocast), torch.get_float32_matmul_precision()]


def identity(backbone: nn.Module, tensors: dict[str, torch.Tensor], first: int) -> str:
    """Return the SHA-256 of all that decides the bits of the hidden states below block ``first``."""
    config = getattr(backbone, "config", None)
    device = next(iter(tensors.values())).device
    on_cpu = device.type == "cpu"
    about = {
        "config": config.to_dict() if hasattr(config, "to_dict") else {},
        "attention": getattr(config, "_attn_implementation", None),
        "modules": [f"{name} {type(module).__qualname__}" for name, module in backbone.named_modules()],
        # Products of another packing have other bits, though the numbers are the same.
        "packed": [module.packed_for for module in backbone.modules() if isinstance(module, PackedLinear)],
        "first": first,
        "torch": torch.__version__,
        "device": torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision(device),
    }
    for name in ("_name_or_path", "transformers_version"):
        about["config"].pop(name, None)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        digest.update(dense.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
