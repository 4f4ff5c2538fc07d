"""Another function in the place of a module's ``forward``, for a while."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


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
