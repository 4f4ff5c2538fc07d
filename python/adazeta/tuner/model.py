"""``TTModel``: puts TT adapters into a model and keeps all their numbers in one flat ``theta``."""

import re
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..heads import behind_trunk
from ..probe_tokens import last_real_token, set_focus
from .config import TTConfig
from .init import initial_theta
from .layer import TTLayer
from .places import is_place, layout_at, resolve
from .sites import placement_of

#: Arguments of ``generate`` with which one forward looks at several candidate tokens.
_CANDIDATES = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class TTModel(BaseTuner):
    """A model with tensor-train adapters, made by ``peft.get_peft_model(model, TTConfig(...))``.

    ``theta(adapter)`` is the flat float32 vector of all trainable numbers of one adapter, in the order of the model's
    modules; every layer's parameter is a view of it, so an update of ``theta`` is an update of the model.
    """

    prefix = "tt_"
    tuner_layer_cls = TTLayer

    def __init__(self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None):
        self._theta: dict[str, torch.Tensor] = {}
        self._layers: dict[str, list[tuple[str, TTLayer]]] = {}  # what tt_layers found; dozens ask in a step
        self._blocks: dict[str, tuple[str, int] | None] = {}  # what block_list found
        self._focuses = False
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)

    def _prepare_adapter_config(self, peft_config: TTConfig, model_config: dict) -> TTConfig:
        return resolve(peft_config, self.model, model_config)

    @staticmethod
    def _check_target_module_exists(peft_config: TTConfig, key: str):
        return is_place(peft_config, key)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
        base_layer = target.get_base_layer() if isinstance(target, TTLayer) else target
        placement = placement_of(current_key, config.sites)
        layout = layout_at(config, self.model, base_layer, current_key)
        layer = target if isinstance(target, TTLayer) else TTLayer(base_layer)
        offset = sum(other.layout[adapter_name].numel for _, other in self.tt_layers(adapter_name))
        device = self._first_device(adapter_name) or _device_of(base_layer)
        if torch.empty(0).device.type == "meta":  # low_cpu_mem_usage: the numbers come from a checkpoint
            theta = torch.empty(layout.numel)
        else:
            theta = initial_theta(
                layout, init=config.init, gain=config.init_gain, seed=config.init_seed, offset=offset
            ).to(device)
        if layer is not target:  # before it has numbers: PEFT would move them to where the base layer's weight is
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(adapter_name, layout, placement, config.act, config.scale, config.positions, offset, theta)
        if adapter_name not in self.active_adapters:
            layer.tt_theta[adapter_name].requires_grad_(False)
        self._layers.clear()
        self._blocks.clear()

    def _first_device(self, adapter_name: str) -> torch.device | None:
        """Return where the adapter's numbers are, one flat vector, when the base model is spread over devices."""
        if not getattr(self.model, "hf_device_map", None):
            return None
        return next((layer.tt_theta[adapter_name].device for _, layer in self.tt_layers(adapter_name)), None)

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._theta.pop(adapter_name, None)
        if self.peft_config[adapter_name].positions == "last" and not self._focuses:
            self._focuses = True
            model.register_forward_pre_hook(self._focus_on_last_tokens, with_kwargs=True)
            model.register_forward_hook(self._forget_focus, always_call=True)
        if all(p.device.type != "meta" for p in self._parameters_of(adapter_name)):
            self.theta(adapter_name)

    @contextmanager
    def _no_base_biases(self):
        """Tell PEFT that the base model's biases stay frozen: its ``bias`` means those, ours the adapters' own."""
        biases = {name: config.bias for name, config in self.peft_config.items()}
        try:
            for config in self.peft_config.values():
                config.bias = "none"
            yield
        finally:
            for name, bias in biases.items():
                self.peft_config[name].bias = bias

    def _check_new_adapter_config(self, config: TTConfig) -> None:
        with self._no_base_biases():
            super()._check_new_adapter_config(config)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        with self._no_base_biases():
            super()._mark_only_adapters_as_trainable(model)

    def disable_adapter_layers(self) -> None:
        with self._no_base_biases():
            super().disable_adapter_layers()

    @classmethod
    def _get_learnable_bias_state_dict(cls, model, state_dict, config):
        return {}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs):
        """Refuse what would be left out without a word, of the arguments of a forward or of ``generate``."""
        if adapter_names is not None:
            raise ValueError(
                "TT adapters cannot be mixed within a batch (adapter_names=...): call the model once for every "
                "adapter, after set_adapter(name), or inside disable_adapter() for the base model"
            )
        asked = [name for name in _CANDIDATES if _setting(kwargs, name) is not None]
        if asked and any(self.peft_config[name].positions == "last" for name in self.active_adapters):
            raise ValueError(
                f"adapters with positions='last' act on one token after the other, and {asked[0]} looks at several "
                "candidate tokens at once: leave it out, or train with positions='all'"
            )
        yield

    def tt_layers(self, adapter_name: str) -> list[tuple[str, TTLayer]]:
        """Return ``(module name, layer)`` of every layer that holds ``adapter_name``, in the model's module order."""
        if adapter_name not in self._layers:
            self._layers[adapter_name] = [
                (name, module)
                for name, module in self.model.named_modules()
                if isinstance(module, TTLayer) and adapter_name in module.tt_theta
            ]
        return self._layers[adapter_name]

    def _parameters_of(self, adapter_name):
        return [layer.tt_theta._parameters[adapter_name] for _, layer in self.tt_layers(adapter_name)]

    def theta(self, adapter_name: str = "default") -> torch.Tensor:
        """Return the flat float32 vector that all parameters of ``adapter_name`` are views of.

        The views break when the model is moved, cast or copied; they are made again here, from the current values.

        Raises:
            ValueError: no such adapter, its parameters on several devices, or not float32.
        """
        layers = [layer for _, layer in self.tt_layers(adapter_name)]
        if not layers:
            raise ValueError(f"no TT adapter named {adapter_name!r}; the model has {sorted(self.peft_config)}")
        parameters = self._parameters_of(adapter_name)
        flat = self._theta.get(adapter_name)
        if flat is not None:
            place = flat.data_ptr()
            if all(p.data_ptr() == place + 4 * layer.offset[adapter_name] for layer, p in zip(layers, parameters)):
                return flat
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"the parameters of adapter {adapter_name!r} must be on one device, got {devices}")
        if any(p.dtype != torch.float32 for p in parameters):
            raise ValueError(
                f"the parameters of adapter {adapter_name!r} must be float32 (bfloat16 erases perturbations), got "
                f"{sorted({str(p.dtype) for p in parameters})}; cast the base model before adding the adapter"
            )
        flat = torch.cat([p.data.reshape(-1) for p in parameters])
        offset = 0
        for layer, p in zip(layers, parameters):
            layer.offset[adapter_name] = offset
            p.data = flat[offset : offset + p.numel()]
            offset += p.numel()
        self._theta[adapter_name] = flat
        return flat

    def _focus_on_last_tokens(self, model, args, kwargs):
        """Find the last real token of every row, for adapters with ``positions="last"``, from the padding mask."""
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if mask is None or ids is None or mask.ndim != 2 or mask.shape != ids.shape or bool(mask[:, -1].all()):
            return  # every row ends with a real token (or this is a step of cached generation)
        set_focus(self, last_real_token(mask))

    def _forget_focus(self, model, args, output):
        set_focus(self, None)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._theta.pop(adapter_name, None)
        self._layers.clear()
        self._blocks.clear()

    def block_list(self, adapter_name: str) -> tuple[str, int] | None:
        """Return the name of the block list and the index of its first adapted block, if all are in one list.

        Adapted layers of a classification head, which reads what the blocks give, may be beside it. None for
        encoder-decoder models too: T5's blocks hand position biases on, whose rows would not be copied again.
        """
        if adapter_name not in self._blocks:
            self._blocks[adapter_name] = self._find_blocks(adapter_name)
        return self._blocks[adapter_name]

    def _find_blocks(self, adapter_name: str) -> tuple[str, int] | None:
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return None
        head = tuple(f"{name}." for name in behind_trunk(self.model))
        names = [name for name, _ in self.tt_layers(adapter_name) if not name.startswith(head)]
        found = [re.match(r"(.*?)\.(\d+)\.", name) for name in names]
        if not found or any(match is None for match in found) or len({match[1] for match in found}) != 1:
            return None
        return found[0][1], min(int(match[2]) for match in found)


def _setting(kwargs: dict, name: str):
    """Return a setting of ``generate``: its argument, or that of the ``generation_config`` that it is given."""
    return kwargs.get(name, getattr(kwargs.get("generation_config"), name, None))


def _device_of(layer: nn.Module) -> torch.device:
    """Return the device that a layer computes on: of one that ``device_map`` offloads, that of its hook."""
    found = next((p.device for p in layer.parameters()), torch.device("cpu"))
    if found.type == "meta" and hasattr(layer, "_hf_hook"):
        return torch.device(layer._hf_hook.execution_device)
    return found
