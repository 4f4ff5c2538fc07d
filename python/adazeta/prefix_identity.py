"""What the hidden states below the first adapter depend on: its tensors, marks of a change, a digest for other runs."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .frozen import PackedLinear
from .quantized import plain_parts

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
        CannotShare: a tensor is trainable, a module in training mode, or an adapter is active below.
    """
    for name, module in backbone.named_modules():
        if _above(name, blocks, first):
            continue
        if trains(module):
            raise CannotShare(f"{name or 'the model'} is in training mode; call model.eval()")
        if isinstance(module, BaseTunerLayer) and (active := _active(module)):
            raise CannotShare(f"the adapter {active[0]!r} is active in {name}")
        for own, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if not isinstance(tensor, torch.Tensor):  # packed weights are plain attributes
                continue
            if tensor.requires_grad:
                raise CannotShare(f"{name}.{own} is trainable")
            yield f"{name}.{own}", tensor


class Watch:
    """Tell before every estimate whether what lies below the first adapter is still what it was, in little time.

    Modules, their hooks and tensors are compared by identity, tensors also by memory, dtype and version. Writes through
    ``.data`` leave no trace but the numbers: ``SAMPLES`` of each tensor are read.

    Args:
        backbone, blocks, first: as for :func:`frozen_tensors`, which is asked once.
    """

    def __init__(self, backbone: nn.Module, blocks: str, first: int):
        self.tensors = dict(frozen_tensors(backbone, blocks, first))
        self._device = next(iter(self.tensors.values())).device
        self._held: list[tuple[dict, str, Any]] = []  # who holds what under which name
        self._sizes: list[tuple[dict, int]] = []
        self._tuners: list[tuple[BaseTunerLayer, list]] = []
        self._hooked: list[tuple[nn.Module, list]] = []
        self._modules: list[nn.Module] = []
        for name, module in backbone.named_modules():
            if _above(name, blocks, first):
                continue
            self._modules.append(module)
            if name:  # what the backbone's own hooks change is seen in what it is given
                self._hooked.append((module, _hooks(module)))
            prefix = f"{name}." if name else ""
            below = {key: child for key, child in module._modules.items() if not _above(prefix + key, blocks, first)}
            tensors = {key: one for key, one in vars(module).items() if torch.is_tensor(one)}  # packed weights are such
            for own, kept in (
                (module._modules, below),
                (module._parameters, module._parameters),
                (module._buffers, module._buffers),
                (vars(module), tensors),
            ):
                self._held += [(own, key, one) for key, one in kept.items()]
                if own is not vars(module):
                    self._sizes.append((own, len(own)))
            if isinstance(module, BaseTunerLayer):
                self._tuners.append((module, _active(module)))
        views = []
        for tensor in self.tensors.values():
            if _is_plain(tensor) and tensor.is_contiguous() and tensor.numel() and tensor.device.type != "meta":
                count = min(SAMPLES, tensor.numel())
                views.append(tensor.detach().as_strided((count,), (tensor.numel() // count,)))
        self._views = views  # of the memory that the tensors had
        self._samples = self._read()
        self._marks = self._look()

    def same(self) -> bool:
        """Whether nothing has changed since this was made."""
        return (
            not any(map(trains, self._modules))
            and all(own.get(key) is one for own, key, one in self._held)
            and all(len(own) == size for own, size in self._sizes)
            and all(_active(module) == active for module, active in self._tuners)
            and all(_hooks(module) == hooks for module, hooks in self._hooked)
            and self._look() == self._marks
            and torch.equal(self._read(), self._samples)
        )

    def _look(self) -> list:
        """What changes when tensors are moved, cast, written to or made trainable, and when precision does."""
        found: list = [precision(self._device)]
        for tensor in self.tensors.values():
            place = tensor.data_ptr() if _is_plain(tensor) else 0
            version = 0 if tensor.is_inference() else tensor._version
            found.append((place, version, tensor.dtype, tensor.requires_grad))
        return found

    def _read(self) -> torch.Tensor:
        return torch.cat([view.to(self._device) for view in self._views]) if self._views else torch.empty(0)


def _above(name: str, blocks: str, first: int) -> bool:
    """Whether a module is block ``first`` or one behind it, or the pooler behind all, or inside of one."""
    if name.partition(".")[0] == "pooler":
        return True
    return name.startswith(f"{blocks}.") and int(name[len(blocks) + 1 :].split(".")[0]) >= first


def trains(module: nn.Module) -> bool:
    """Whether a module may compute at random: in training mode, and more than a place for an adapter's parts."""
    return module.training and not isinstance(module, (BaseTunerLayer, nn.ModuleDict, nn.ParameterDict))


def _hooks(module: nn.Module) -> list:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _named(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _active(layer: BaseTunerLayer) -> list[str]:
    """The adapters that ``layer`` applies."""
    if layer.disable_adapters:
        return []
    held = {adapter for kind in layer.adapter_layer_names for adapter in getattr(layer, kind)}
    return sorted(held.intersection(layer.active_adapters))


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided


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
        "hooks": [_named(hook) for name, module in backbone.named_modules() if name for hook in _hooks(module)],
        # Products of another packing have other bits, though the numbers are the same.
        "packed": [module.packed_for for module in backbone.modules() if isinstance(module, PackedLinear)],
        "first": first,
        "torch": torch.__version__,
        "device": torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision(device),
    }
    for name in ("_name_or_path", "transformers_version", "id2label", "label2id"):
        about["config"].pop(name, None)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in plain_parts(tensor.detach()):
            dense = part if part.layout == torch.strided else part.to_dense()
            digest.update(dense.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
