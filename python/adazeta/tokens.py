"""Which tokens of a forward are real: for those who count them, and for those who run a row without its padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of the rows of a forward whose own mask does not tell.

    Args:
        mask: ``[rows, T]``, 1 for real tokens.
        copies: C > 0 says that column T - 1 and the C - 1 behind it hold copies of the row's last real token.
    """

    mask: torch.Tensor
    copies: int = 0

    def count(self) -> torch.Tensor:
        """Return the number of real tokens, every copy counted, as a 0-d tensor."""
        return self.mask.sum() + (self.copies - 1) * len(self.mask) if self.copies else self.mask.sum()


#: Whether a forward without numbers runs (``adazeta.footprint``): none that counts, and nobody may look at its ids.
looking: ContextVar[bool] = ContextVar("adazeta_looking", default=False)
_told: ContextVar[RealTokens | None] = ContextVar("real_tokens", default=None)


@contextmanager
def real_tokens(mask: torch.Tensor, copies: int = 0) -> Iterator[None]:
    """Tell which tokens are real (see :class:`RealTokens`) to whoever looks at the model's forward meanwhile."""
    token = _told.set(RealTokens(mask, copies))
    try:
        yield
    finally:
        _told.reset(token)


def told() -> RealTokens | None:
    """Return what :func:`real_tokens` was told, None outside of it."""
    return _told.get()


class TokenCount:
    """Tokens that passed a model, padding included (``processed``) and left out (``real``).

    A token counts once per forward, however many blocks it passed. Sums stay on the device until they are read.
    """

    def __init__(self):
        self._processed, self._real = 0, 0

    @property
    def processed(self) -> int:
        """Tokens so far, padding included."""
        return self._processed

    @property
    def real(self) -> int:
        """Real tokens so far."""
        self._real = int(self._real)
        return self._real

    def restore(self, processed: int, real: int) -> None:
        """Go on from the counts of an earlier run."""
        self._processed, self._real = processed, real

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count the forwards of ``model``, a transformers or PEFT model, inside the ``with`` statement."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        trunk = getattr(inner, "base_model", inner)
        handle = trunk.register_forward_pre_hook(self._count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, module, args, kwargs):
        if looking.get():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if not torch.is_tensor(ids) or ids.ndim < 2:
            return
        mask, known = kwargs.get("attention_mask"), told()
        self._processed += ids.shape[0] * ids.shape[1]
        if known is not None:
            self._real = self._real + known.count()
        elif torch.is_tensor(mask) and mask.ndim == 2:
            self._real = self._real + mask[:, -ids.shape[1] :].sum()  # with a cache, the mask holds earlier tokens too
        else:
            self._real = self._real + ids.shape[0] * ids.shape[1]
