"""Another function in the place of a module's ``forward``, for a while."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` runs code that was made of it once, and not what now stands in the place of a ``forward``."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or module._compiled_call_impl is not None or "_orig_mod" in module._modules


@contextmanager
def forward_of(module: nn.Module, function: Callable) -> Iterator[None]:
    """Let ``function(forward, ...)`` run where ``module.forward(...)`` would, inside the ``with`` statement."""
    own = vars(module).get("forward")
    module.forward = functools.partial(function, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
