"""What of a model is trained: one adapter, and parameters that are no adapters and get to a probe in their own ways."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from .in_place import InPlace
from .split_heads import heads_of
from .streamed import Streamed
from .tuner import TTModel
from .tuner.layer import TTLayer

log = logging.getLogger("adazeta")

#: How they are perturbed, the first by default.
WAYS = ("streamed", "in-place")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Others:
    """Trainable parameters of a model besides its adapter's, which lie behind the adapter's numbers in a direction.

    Args:
        named: the parameters by name, in the model's order.
        way: one of ``WAYS``.

    Raises:
        ValueError: an unknown way, or a parameter that cannot be perturbed.
    """

    def __init__(self, named: Mapping[str, torch.Tensor], way: str):
        if way not in WAYS:
            raise ValueError(f"perturb must be one of {WAYS}, got {way!r}")
        for name, p in named.items():
            if p.dtype not in DTYPES or not p.is_contiguous():
                raise ValueError(
                    f"trainable parameters must be contiguous and float32, bfloat16 or float16; {name} is {p.dtype} of "
                    f"shape {tuple(p.shape)} and strides {p.stride()}"
                )
        self.named, self.way = dict(named), way
        self._dtypes = {name: p.dtype for name, p in self.named.items()}

    def at_probes(self, model: nn.Module, offset: int, distribution: str) -> InPlace | Streamed | None:
        """Return what moves them from probe to probe, or None if there are none.

        Args:
            offset: numbers before them in a direction.
            distribution: ``"gaussian"`` or ``"rademacher"``.

        Raises:
            ValueError: one was cast, or is no longer the model's, since the optimizer was made.
        """
        if not self.named:
            return None
        held = {id(p) for p in model.parameters()}
        if gone := [name for name, p in self.named.items() if id(p) not in held]:
            raise ValueError(f"the model does not hold the parameters {gone} any more; make a new optimizer for it")
        for name, p in self.named.items():
            if p.dtype != self._dtypes[name]:
                raise ValueError(
                    f"{name} was {self._dtypes[name]} when the optimizer was made and is {p.dtype} now; cast the model "
                    "first, then make the optimizer"
                )
        if self.way == "streamed":
            return Streamed(model, self.named, offset=offset, distribution=distribution)
        return InPlace([p.data for p in self.named.values()], offset=offset, distribution=distribution)

    def heads(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that may run probe by probe inside one forward, if they hold all of the parameters."""
        return heads_of(model, self.named) if self.named and self.way == "streamed" else []

    def behind_adapters(self, model: nn.Module) -> bool:
        """Whether rows of the same tokens are the same up to the first adapter, at all probes."""
        return not self.named or bool(self.heads(model))


def trainable_adapter(model: torch.nn.Module) -> tuple[TTModel | None, str]:
    """Return the ``TTModel`` inside ``model`` and the name of its trainable adapter.

    Raises:
        TypeError: ``model`` is no module, or one that makes copies of the model inside it.
        ValueError: several adapters are trainable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "ZerothOrder takes the model itself, not its parameters: ZerothOrder(model, lr=...) trains those that "
            f"require grad; got {type(model).__name__}"
        )
    check_unwrapped(model)
    tt_model = next((m for m in model.modules() if isinstance(m, TTModel)), None)
    if tt_model is None:
        if any(isinstance(m, TTLayer) for m in model.modules()):
            log.warning(
                "these adapters were not made by peft.get_peft_model(model, TTConfig(...)), which lets probes share "
                "forwards: they train as other parameters do, one probe a forward"
            )
        return None, "default"
    names = [
        name
        for name in tt_model.peft_config
        if any(layer.tt_theta[name].requires_grad for _, layer in tt_model.tt_layers(name))
    ]
    if len(names) > 1:
        raise ValueError(f"adapters {names} are all trainable; make one active with model.set_adapter(name)")
    return (tt_model, names[0]) if names else (None, "default")


def check_unwrapped(model) -> None:
    """Raise TypeError where ``model`` is a wrapper that makes copies of a model, whose probes it would not know of."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"expected the model itself, got it inside {type(model).__name__}: give model.module, and let several GPUs "
            "be used by as many processes (torchrun, ranks=adazeta.distributed.join())"
        )


def check_active(tt_model: TTModel, adapter: str) -> None:
    """Raise ValueError if forwards do not pass through ``adapter``, so that all probes would have the same losses."""
    for _, layer in tt_model.tt_layers(adapter):
        if layer.disable_adapters:
            raise ValueError(f"the optimizer trains the adapter {adapter!r}, which is disabled; enable it first")
        if adapter not in layer.active_adapters:
            raise ValueError(
                f"the optimizer trains the adapter {adapter!r}, which is not active; call set_adapter({adapter!r}), or "
                f"make an optimizer for {', '.join(map(repr, layer.active_adapters))}"
            )
