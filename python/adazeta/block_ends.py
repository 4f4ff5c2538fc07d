"""What the two ends of an adapted model need not compute: once per example below, scored tokens alone above.

Below: the linear layers that run before the first adapter see no perturbation, so rows of the same tokens give the
same products; an estimate multiplies them once. (Whole blocks below the first adapter never run twice:
``adazeta.prefix``; this is for what stands before the adapter in its own block.)

Above: behind the last block's attention nothing passes from token to token, and the losses read the scored tokens
alone. The linear layers there, all but those that make keys and values, multiply these tokens; the other ones get
zeros, which nobody reads. This is for language-model heads: classification heads may read all tokens.

Which layers these are is found by looking: the model runs once on a few tokens, and a layer of the last block counts
if NaN in place of its results for the other tokens does not reach the block's result at the scored ones.

Numerics: the same products, in matrices of another height: losses are equal up to their rounding.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .batches import host, onto
from .forwards import forward_of, is_compiled
from .heads import Pooled
from .prefix_identity import trains
from .scoring import kind_of, language_model, model_inputs, scored_only, trunk_of
from .tokens import looking
from .tuner.layer import TTLayer

_log = logging.getLogger("adazeta")

#: The model is looked at with so many rows and tokens, and these scored tokens of each row.
ROWS, TOKENS, SCORED = 2, 7, torch.tensor([[6], [5]])
#: Where more than this share of the tokens is scored, gathering them costs more than it saves.
MOST_SCORED = 0.5
#: Most bytes of products below the first adapter that are kept from one forward of an estimate to the next.
KEPT_BYTES = 1 << 24


class BlockEnds:
    """The linear layers before the first adapter and behind the last attention of a model.

    Args:
        model: a transformers or PEFT model, or a ``Pooled`` encoder; others are left alone.
        tt_model, adapter: whose adapters are perturbed, or None.

    Attributes:
        below: layers that multiply a row once per estimate.
        above: layers that multiply scored tokens only.
    """

    def __init__(self, model: nn.Module, tt_model, adapter: str):
        self.model, self.tt_model, self.adapter = model, tt_model, adapter
        self.below: list[nn.Module] = []
        self.above: list[nn.Module] = []
        self._looked_at: list[int] | None = None
        self._modules: list[nn.Module] = []  # of the trunk
        self._kept: dict[tuple, dict[int, torch.Tensor]] = {}  # by the rows of a forward: products of layers
        self._room = 0

    @contextmanager
    def used(self, *, alike: bool, keep: int) -> Iterator[None]:
        """Leave out what can be left out, inside the ``with`` statement, for one estimate.

        Args:
            alike: rows of the same tokens are the same up to the first adapter: nothing else is perturbed.
            keep: most bytes that are kept meanwhile, :data:`KEPT_BYTES` for one.
        """
        self._look()
        self._room = keep
        with ExitStack() as stack:
            if self._shared(alike):
                stack.enter_context(forward_of(trunk_of(self.model), self._once_per_row))
            if self.above:
                token = scored_only.set(self._at_scored)
                stack.callback(scored_only.reset, token)
            stack.callback(self._kept.clear)
            yield

    def describe(self, *, alike: bool = True) -> str:
        """Say what is left out, nothing where nothing is; ``alike`` as for :meth:`used`."""
        self._look()
        parts = []
        if self._shared(alike):
            parts.append(f"{len(self.below)} before the first adapter run once per example")
        if self.above:
            parts.append(f"{len(self.above)} of the last block at scored tokens only")
        return "linear layers: " + ", ".join(parts) if parts else ""

    def _shared(self, alike: bool) -> bool:
        """Whether :attr:`below` multiply a row once: not in training mode, where dropout is drawn for every probe."""
        return bool(self.below) and alike and not any(map(trains, self._modules))

    @torch.compiler.disable  # it puts other forwards into modules that a compiler may be following
    def _once_per_row(self, forward: Callable, *args, **kwargs):
        """Stand in for the trunk's ``forward``: :attr:`below` multiply one of the rows that have the same inputs."""
        inputs = {**dict(zip(("input_ids",), args)), **kwargs}  # classification heads hand the ids over by position
        found = None if looking.get() or len(args) > 1 else _distinct(inputs)
        if found is None:
            return forward(*args, **kwargs)
        with ExitStack() as stack:
            for layer in self.below:
                stack.enter_context(forward_of(layer, partial(self._at_rows, id(layer), *found)))
            return forward(*args, **kwargs)

    def _at_rows(self, layer: int, rows: tuple, first, index, shape: tuple[int, int], forward: Callable, x, *args):
        """Run ``forward`` on the rows ``first`` of ``x``, and row ``i`` gets the result of ``index[i]``."""
        if x.shape[:-1] != shape:
            return forward(x, *args)
        y = self._kept.get(rows, {}).get(layer)
        if y is None:
            y = forward(x.index_select(0, onto(first, x.device)), *args)
            if (size := y.numel() * y.element_size()) <= self._room:
                self._room -= size
                self._kept.setdefault(rows, {})[layer] = y
        return y.index_select(0, onto(index, x.device))

    @contextmanager
    def _at_scored(self, rows: torch.Tensor, columns: torch.Tensor, shape: torch.Size) -> Iterator[None]:
        """Let :attr:`above` multiply N tokens ``(rows[n], columns[n])`` of ``shape`` only."""
        index = None if looking.get() else _by_row(rows, columns, shape)
        with nullcontext() if index is None else _each(self.above, partial(_at_tokens, index, shape, 0.0)):
            yield

    @torch.no_grad()
    def _look(self) -> None:
        """Find :attr:`below` and :attr:`above`, unless the adapted layers are those of the last look."""
        layers = [] if self.tt_model is None else [layer for _, layer in self.tt_model.tt_layers(self.adapter)]
        known = isinstance(language_model(self.model), (PreTrainedModel, Pooled))
        trunk = trunk_of(self.model) if known else None
        now = [id(trunk), *map(id, layers)]
        if now == self._looked_at or trunk is None or any(map(trains, trunk.modules())):
            return
        self._looked_at, self._modules, self.below, self.above = now, list(trunk.modules()), [], []
        if any(map(is_compiled, language_model(self.model).modules())):
            return
        token = looking.set(True)
        try:
            look = _Look(self.model, trunk)
            self.below, self.above = look.before(layers, self.adapter), look.behind_attention() if look.predicts else []
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, StopIteration) as error:
            _log.info("all linear layers multiply all tokens of all probes: a look at the model failed (%s)", error)
        finally:
            looking.reset(token)


class _Look:
    """A forward of a few tokens: which layers ran, in which order, and what the last block was given."""

    def __init__(self, model: nn.Module, trunk: nn.Module):
        inner, self.trunk = language_model(model), trunk
        self.block = next(m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m))[-1]
        #: Whether a language-model head reads the hidden states.
        self.predicts = not isinstance(inner, Pooled) and inner.get_output_embeddings() is not None
        embeddings = (inner if self.predicts else trunk).get_input_embeddings()
        ids = (torch.arange(ROWS * TOKENS) % embeddings.num_embeddings).view(ROWS, TOKENS)
        batch = {"input_ids": ids.to(embeddings.weight.device)}
        if self.predicts:
            if kind_of(model) == "seq2seq":
                batch["decoder_input_ids"] = batch["input_ids"]
            self._forward = partial(inner.forward, **model_inputs(model, batch))
        else:
            self._forward = partial(trunk, **batch)
        self.order: list[nn.Module] = []  # linear and adapted layers, as they ran
        self.other: list[nn.Module] = []  # those of them that also multiply something that is not the tokens
        self.given: tuple[tuple, dict] | None = None
        handles = [self.block.register_forward_pre_hook(self._keep, with_kwargs=True)]
        handles += [m.register_forward_pre_hook(self._note) for m in inner.modules() if isinstance(m, _KINDS)]
        try:
            self.hidden = self._scored(self._run())
        finally:
            for handle in handles:
                handle.remove()

    def before(self, layers: list, adapter: str) -> list[nn.Module]:
        """Return the linear layers of the trunk that run before the first of ``layers`` adapts."""
        found: list[nn.Module] = []
        trunk = set(self.trunk.modules())
        for module in self.order:
            if module not in trunk:  # an encoder's: what the decoder then reads is not integers per row
                return []
            if module in layers:
                base = module.base_layer
                return found + [base] * (module.placement[adapter] == "post" and self._once(base))
            if not isinstance(module, TTLayer) and self._once(module):
                found.append(module)
        return []

    def behind_attention(self) -> list[nn.Module]:
        """Return the linear layers of the last block whose results at other tokens do not reach the scored ones."""
        args, kwargs = self.given
        expected = self._scored(_first_tensor(self.block(*args, **kwargs)))
        found = []
        for layer in filter(self._once, _linear_layers(self.block)):
            with _each([layer], partial(_at_tokens, SCORED, (ROWS, TOKENS), float("nan"), whole=True)):
                alone = self._same(self._scored(_first_tensor(self.block(*args, **kwargs))), expected)
            found += [layer] * alone
        with _each(found, partial(_at_tokens, SCORED, (ROWS, TOKENS), 0.0)):
            hidden = self._scored(self._run())
        if not self._same(hidden, self.hidden):
            raise ValueError("what follows the last block reads other tokens than the scored ones")
        return found

    @staticmethod
    def _same(hidden: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether they are the same numbers, up to the rounding of products in matrices of another height: experts of a
        mixture get other tokens."""
        return torch.allclose(hidden, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))

    def _run(self) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = self.trunk.register_forward_hook(lambda module, args, output: seen.append(_first_tensor(output)))
        try:
            self._forward()
        finally:
            handle.remove()
        return seen[0]

    def _scored(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``hidden`` at the scored tokens, which must be numbers."""
        if hidden.shape[:2] != (ROWS, TOKENS):
            raise ValueError(f"expected hidden states of {ROWS} x {TOKENS} tokens, got {tuple(hidden.shape)}")
        return hidden[torch.arange(ROWS)[:, None], SCORED]

    def _once(self, module: nn.Module) -> bool:
        return self.order.count(module) == 1 and module not in self.other

    def _note(self, module, args):
        tokens = bool(args) and torch.is_tensor(args[0]) and _rows_of(args[0], (ROWS, TOKENS)) is not None
        (self.order if tokens else self.other).append(module)

    def _keep(self, module, args, kwargs):
        self.given = args, kwargs


_KINDS = (TTLayer, nn.Linear, Conv1D)


def _linear_layers(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the linear layers of a block, with their adapters where these act on all tokens alike."""
    for child in block.children():
        if isinstance(child, TTLayer):
            if not isinstance(child.base_layer, _KINDS):
                yield from _linear_layers(child.base_layer)
            else:
                yield child if "last" not in child.positions.values() else child.base_layer
        elif isinstance(child, _KINDS):
            yield child
        else:
            yield from _linear_layers(child)


@contextmanager
def _each(layers: list[nn.Module], function: Callable) -> Iterator[None]:
    """Let ``function`` run where the ``forward`` of each of ``layers`` would."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_of(layer, function))
        yield


def _first_tensor(output: Any) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]


def _rows_of(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return ``x`` as ``[rows, tokens, width]``, None where it has other rows and tokens than ``shape``."""
    if x.ndim == 3 and x.shape[:2] == shape:
        return x
    # OPT flattens rows and tokens before its MLP.
    return x.unflatten(0, shape) if x.ndim == 2 and len(x) == shape[0] * shape[1] else None


def _at_tokens(index: torch.Tensor, shape: tuple[int, int], other: float, forward: Callable, x, *args, whole=False):
    """Run ``forward`` at the tokens ``index`` ``[rows, K]`` of ``x``; the rest of the result is ``other``.

    Args:
        whole: run it at all tokens all the same.
    """
    apart = _rows_of(x, shape)
    if apart is None:
        return forward(x, *args)
    index = onto(index, x.device)
    rows = torch.arange(len(index), device=x.device)[:, None]
    if whole:
        y = _rows_of(forward(x, *args), shape)[rows, index]
    else:
        few = apart[rows, index]
        y = forward(few if x.ndim == 3 else few.flatten(0, 1), *args).view(*index.shape, -1)
    result = y.new_full((*shape, y.shape[-1]), other)
    result[rows, index] = y
    return result if x.ndim == 3 else result.flatten(0, 1)


def _distinct(inputs: Mapping[str, Any]) -> tuple[tuple, torch.Tensor, torch.Tensor, tuple[int, int]] | None:
    """Return the distinct rows of a forward, the first of each, which of them every row is, and the shape of the ids.

    None where an input is more than integers per row.
    """
    ids = inputs.get("input_ids")
    if not torch.is_tensor(ids) or ids.ndim != 2:
        return None
    tensors = [value for value in inputs.values() if torch.is_tensor(value)]
    plain = all(value.ndim == 2 and len(value) == len(ids) and not value.is_floating_point() for value in tensors)
    if not plain or any(inputs.get(name) is not None for name in ("past_key_values", "inputs_embeds")):
        return None
    numbers = torch.cat([host(value).long() for value in tensors], 1).numpy()
    met: dict[bytes, int] = {}  # distinct rows, by the first of each
    firsts = [met.setdefault(row.tobytes(), number) for number, row in enumerate(numbers)]
    first, index = torch.tensor(firsts).unique(return_inverse=True)  # in order, as the rows were met
    return tuple(met), first, index, tuple(ids.shape)


def _by_row(rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return the columns of every row, ``[rows, K]``, its first one in place of missing ones; None if K is large."""
    rows, columns = host(rows), host(columns)
    count = torch.bincount(rows, minlength=shape[0])
    most = int(count.max())
    if most > MOST_SCORED * shape[1]:
        return None
    order = rows.argsort(stable=True)
    rows, columns = rows[order], columns[order]
    begin = count.cumsum(0) - count
    index = torch.zeros(shape[0], most, dtype=torch.int64)
    held = count > 0
    index[held] = columns[begin[held]][:, None].expand(-1, most)
    index[rows, torch.arange(len(rows)) - begin[rows]] = columns
    return index
