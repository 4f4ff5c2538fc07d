"""One adapted module: the frozen base layer with tensor-train adapters before or after it."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from adazeta_kernels import TTAdapterLayout, tt_adapter, tt_factors

from ..factors import FactorGroups
from ..frozen import MixedLinear, PackedLinear
from ..probe_tokens import ProbeTokens
from ..probes import Probes

# One probe of scale 0.
_AT_THETA = (torch.zeros(1, dtype=torch.int64), torch.zeros(1))

# They make a new output in every call and keep nothing of it.
_FORGETFUL = (nn.Linear, MixedLinear, PackedLinear, Conv1D)


class TTLayer(nn.Module, BaseTunerLayer):
    """A base layer whose output (``post``) or input (``pre``) passes through ``x + scale * up(act(down(x)))``.

    All numbers of one adapter are one flat parameter ``tt_theta.<adapter>``, itself a view of the model's flat
    ``theta`` (see ``TTModel.theta``); ``layout[adapter]`` names the cores and biases inside it.
    """

    adapter_layer_names = ("tt_theta",)
    other_param_names = ("layout", "placement", "act", "scale", "positions", "offset")

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.tt_theta = nn.ParameterDict()
        self.layout: dict[str, TTAdapterLayout] = {}
        self.placement: dict[str, str] = {}
        self.act: dict[str, str] = {}
        self.scale: dict[str, float] = {}
        self.positions: dict[str, str] = {}
        self.offset: dict[str, int] = {}
        # Set only inside adazeta.probes.probing().
        self.probes: Probes | None = None
        self.factor_groups: FactorGroups | None = None
        self.focus: torch.Tensor | ProbeTokens | None = None  # set only inside adazeta.probe_tokens.focused()
        self._disable_adapters = False
        self.merged_adapters = []
        self.register_state_dict_post_hook(_own_storage)

    def add_adapter(self, name, layout, placement, act, scale, positions, offset, theta):
        """Register adapter ``name`` with its numbers ``theta`` (``[layout.numel]``), at ``offset`` in the flat one."""
        self.tt_theta[name] = nn.Parameter(theta)
        self.layout[name] = layout
        self.placement[name] = placement
        self.act[name] = act
        self.scale[name] = float(scale)
        self.positions[name] = positions
        self.offset[name] = offset

    def cores(self, name: str = "default") -> dict[str, torch.Tensor]:
        """Return the named cores and biases of adapter ``name`` as views of its numbers."""
        theta = self.tt_theta[name]
        return {
            segment.name: theta[segment.offset : segment.offset + segment.numel].view(segment.shape)
            for segment in self.layout[name].segments()
        }

    def forward(self, *args, **kwargs):
        active = () if self._disable_adapters else [a for a in self.active_adapters if a in self.layout]
        for name in active:
            if self.placement[name] == "pre":
                args = (self._adapt(args[0], name), *args[1:])
        out = self.base_layer(*args, **kwargs)
        overwrite = self._output_is_ours()
        for name in active:
            if self.placement[name] == "post":
                adapted = self._adapt(out[0] if isinstance(out, tuple) else out, name, overwrite)
                out = (adapted, *out[1:]) if isinstance(out, tuple) else adapted
        return out

    def _output_is_ours(self) -> bool:
        """Whether nobody else can hold the base layer's output, so that it may be overwritten."""
        base, everywhere = self.base_layer, getattr(nn.modules.module, "_global_forward_hooks", ())
        watched = base._forward_hooks or everywhere or "forward" in vars(base) or torch.is_grad_enabled()
        return type(base) in _FORGETFUL and not watched

    def _adapt(self, x: torch.Tensor, name: str, overwrite: bool = False) -> torch.Tensor:
        if self.positions[name] == "all":
            return self._adapt_rows(x, name, overwrite)
        if x.ndim != 3:  # OPT flattens rows and tokens before its MLP
            raise ValueError(
                f"an adapter with positions='last' needs rows and tokens apart, [rows, tokens, width], got "
                f"{tuple(x.shape)}: leave this module out (sites=[...]), or use positions='all'"
            )
        if isinstance(self.focus, ProbeTokens):
            first = x.shape[1] - self.focus.copies
            y = self.focus.to_rows(self._adapt_rows(self.focus.to_probes(x[:, first:]), name))
            return torch.cat((x[:, :first], y), dim=1)
        if self.focus is None:  # no padding behind the last token: generation, or a prompt alone
            return torch.cat((x[:, :-1], self._adapt_rows(x[:, -1:], name)), dim=1)
        rows = torch.arange(len(x), device=x.device)
        y = self._adapt_rows(x[rows, self.focus].unsqueeze(1), name)
        return x.index_put((rows, self.focus), y.squeeze(1))

    def _adapt_rows(self, x: torch.Tensor, name: str, overwrite: bool = False) -> torch.Tensor:
        """Apply the adapter to every token of ``x``, dimension 0 probe-major where probes are active."""
        layout = self.layout[name]
        probes = self.probes if self.probes is not None and self.probes.adapter == name else None
        count = 1 if probes is None else len(probes)
        if x.shape[0] % count:
            raise ValueError(
                f"{count} probes are active, but the input has {x.shape[0]} rows; dimension 0 of the batch must be "
                "probe-major and a multiple of the number of probes"
            )
        if probes is None:  # theta itself; differentiable in grad mode, for comparison with first-order training
            factors = tt_factors(self.tt_theta[name], layout, *_AT_THETA)
        else:
            factors = self.factor_groups.of(self)
        factors = factors.to(x.device)  # theta is in one place; `device_map` may have put blocks in several
        rows, settings = x.reshape(count, -1, x.shape[-1]), {"act": self.act[name], "scale": self.scale[name]}
        return tt_adapter(rows, factors, layout, overwrite=overwrite, **settings).reshape(x.shape)

    def merge(self, safe_merge: bool = False, adapter_names=None) -> None:
        raise ValueError("a TT adapter has a non-linearity and cannot be merged into the base weights")

    def unmerge(self) -> None:
        raise ValueError("a TT adapter cannot be merged, so there is nothing to unmerge")

    def __repr__(self) -> str:
        return "tt." + super().__repr__()


def _own_storage(layer: TTLayer, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Put copies in the place of views of the flat theta: safetensors refuses tensors that share a storage."""
    for name in layer.tt_theta:
        key = f"{prefix}tt_theta.{name}"
        if not isinstance(state_dict[key], nn.Parameter):  # with keep_vars=True the parameters themselves are wanted
            state_dict[key] = state_dict[key].clone()
