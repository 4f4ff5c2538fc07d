"""Blocks below the first adapter see no perturbation: run them once per example, and keep what they gave.

While an estimate is made, the module that turns token ids into hidden states is wrapped. Rows with the same real
tokens are recognised by them, whatever the loss made of the batch; the blocks below the first adapter run for rows
that are new, without padding, and everywhere else stand-ins hand the known hidden states ``[tokens, width]`` to the
first adapted block. Neither the model's code nor the loss function notices.

Numerics: with a cache a row passes the lower blocks alone, so that its hidden states depend on nothing but its tokens
and the model: found, missed, thrown out or read from disk, losses have the same bits. Without a cache the new rows of
a forward pass together: the same losses up to the rounding of matrix products of another height.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import host
from .forwards import forward_of, is_compiled
from .prefix_identity import CannotShare, Watch, identity
from .tokens import looking, told

_log = logging.getLogger("adazeta")


@dataclass(frozen=True)
class _Rows:
    """The rows of one forward.

    Args:
        inputs: ``{key: [names, tokens] int64 on the CPU}`` of the distinct rows, padding cut.
        names: the per-token inputs that the rows of a value are.
        index: which distinct row every row is.
        starts: first real column of every distinct row.
        columns: columns of the forward.
        copies: how many of the last columns are copies of the last real token, 0 for none.
        masked: the dtype of the forward's attention mask ``[rows, columns]``, None if it has none.
    """

    inputs: dict[bytes, torch.Tensor]
    names: list[str]
    index: list[int]
    starts: list[int]
    columns: int
    copies: int
    masked: torch.dtype | None


class Prefix:
    """The embeddings and the blocks below the first adapter of a model.

    Args:
        tt_model: a ``TTModel`` whose adapted layers sit in one list of blocks (``model.layers.<i>...``).
        adapter: name of the adapter.
        cache: what keeps hidden states from one estimate to the next (``adazeta.prefix_cache``), or None.

    Attributes:
        hits, misses: examples found in the cache and computed; one counts once in an estimate.
    """

    def __init__(self, tt_model, adapter: str, cache=None):
        self.tt_model, self.adapter, self.cache = tt_model, adapter, cache
        self.hits = self.misses = 0
        self._watch: Watch | None = None  # of the model that _known and what is kept belong to
        self._known: tuple[str, int] | None = None
        self._step: dict[bytes, torch.Tensor] = {}
        self._outputs = 0  # length of the tuple that a block returns, 0 for a bare tensor
        self._said: set[str] = set()

    @contextmanager
    def shared(self) -> Iterator[bool]:
        """Share the lower blocks inside the ``with`` statement, for one estimate; yields whether that can be done."""
        try:
            possible = self._prepare()
        except CannotShare as reason:
            self._say(reason)
            possible = False
        if not possible:
            yield False
            return
        self._step.clear()
        try:
            with forward_of(self.backbone, self._forward):
                yield True
        finally:
            self._step.clear()

    def describe(self) -> str:
        """Say what is shared and kept, nothing where all blocks are adapted."""
        found = self.tt_model.block_list(self.adapter)
        if found is None or found[1] == 0:
            return ""
        kept = f"; their outputs are kept in {self.cache.describe()}" if self.cache else ""
        return f"blocks below the first adapter ({found[1]}) run once per example{kept}"

    def counts(self) -> dict[str, int]:
        """Return how often examples were found and computed, and the bytes kept: of a run's summary and log."""
        return {"hits": self.hits, "misses": self.misses, "bytes": self.cache.bytes if self.cache else 0}

    def _say(self, reason: CannotShare) -> None:
        line = f"blocks below the first adapter run once per probe: {reason}"
        if line not in self._said:
            self._said.add(line)
            _log.warning("%s", line)

    def _prepare(self) -> bool:
        """Find the blocks and forget what is kept if they changed; False where no block is below the first adapter."""
        found = self.tt_model.block_list(self.adapter)
        if found is None:
            raise CannotShare("the adapted layers are not in one list of blocks")
        name, self.first = found
        if self.first == 0:
            return False
        if self._watch is not None and self._known == found and self._watch.same():
            held = [self.tt_model.model.get_submodule(path) for path in (name, self._path)]
            if held == [self.blocks, self.backbone]:
                return True
        self._watch = None
        self.blocks = self.tt_model.model.get_submodule(name)
        self.backbone, self._path, inner = self._find_backbone(name)
        if any(map(is_compiled, self.tt_model.modules())):
            raise CannotShare("the model is compiled")
        watch = Watch(self.backbone, inner, self.first)
        self._parameters = list(inspect.signature(self.backbone.forward).parameters)
        self._no_cache = {"use_cache": False} if "use_cache" in self._parameters else {}
        self._stand_in_for = {name: _StandIn(block, self) for name, block in self.blocks.named_children()}
        self._check()
        if self.cache is not None:
            self.cache.open(lambda: identity(self.backbone, watch.tensors, self.first))
        self._watch, self._known = watch, found
        return True

    def _find_backbone(self, blocks: str) -> tuple[nn.Module, str, str]:
        """Return the innermost module around the blocks that takes token ids, its name, and the blocks' name in it."""
        path = blocks.split(".")
        for depth in range(len(path) - 1, -1, -1):
            name = ".".join(path[:depth])
            module = self.tt_model.model.get_submodule(name)
            if "input_ids" in inspect.signature(module.forward).parameters and hasattr(module, "get_input_embeddings"):
                return module, name, ".".join(path[depth:])
        raise CannotShare("no module around the blocks takes input_ids")

    @torch.no_grad()
    def _check(self) -> None:
        """Try both ways on seven tokens: a family whose blocks hand on more than hidden states gives itself away."""
        embeddings = self.backbone.get_input_embeddings()
        ids = torch.arange(2, 9) % embeddings.num_embeddings
        inputs = {"input_ids": ids[None].to(embeddings.weight.device)}
        forward = self.backbone.forward
        plain = _first_tensor(forward(**inputs))
        rows = _Rows({b"": ids[None]}, ["input_ids"], [0], [0], len(ids), 0, None)
        try:
            hidden = self._run_below(forward, rows, [b""])[0]
            other = _first_tensor(self._run_above(forward, inputs, hidden[None]))
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise CannotShare(f"{type(self.backbone).__name__} fails without them ({error})") from error
        bound = 1e-3 * float(plain.nan_to_num().abs().max())
        if plain.shape != other.shape or not torch.allclose(plain, other, rtol=0, atol=bound, equal_nan=True):
            raise CannotShare(f"the blocks of {type(self.backbone).__name__} hand on more than hidden states")

    @torch.compiler.disable  # it puts other forwards into modules that a compiler may be following
    def _forward(self, forward: Callable, *args, **kwargs):
        """Stand in for the backbone's ``forward``."""
        if looking.get():
            return forward(*args, **kwargs)
        inputs = dict(zip(self._parameters, args)) | kwargs
        try:
            rows = _rows_of(inputs)
        except CannotShare as reason:
            self._say(reason)
            return forward(*args, **kwargs)
        device = inputs["input_ids"].device
        self._learn(forward, rows, device)
        known = [self._step[key] for key in rows.inputs]
        hidden = known[0].new_zeros(len(known), rows.columns, known[0].shape[-1])
        for row, start, value in zip(hidden, rows.starts, known):
            row[start : start + len(value)] = value
            if rows.copies:
                row[-rows.copies :] = value[-1]
        if rows.index != list(range(len(known))):
            hidden = hidden.index_select(0, torch.tensor(rows.index, device=device))
        return self._run_above(forward, inputs, hidden)

    def _learn(self, forward: Callable, rows: _Rows, device: torch.device) -> None:
        """Get the hidden states of every row that this estimate has not met yet: from the cache, or by computing."""
        missing = []
        for key in rows.inputs:
            if key in self._step:
                continue
            value = None if self.cache is None else self.cache.get(key)
            if value is None:
                missing.append(key)
            else:
                self.hits += 1
                self._step[key] = value.to(device)
        self.misses += len(missing)
        groups = [missing] if self.cache is None else [[key] for key in missing]
        for group in filter(None, groups):
            for key, value in zip(group, self._run_below(forward, rows, group)):
                self._step[key] = value
                if self.cache is not None:
                    self.cache.put(key, value.cpu())

    def _run_below(self, forward: Callable, rows: _Rows, keys: list[bytes]) -> list[torch.Tensor]:
        """Return the hidden states ``[tokens, width]`` below the first adapted block, of rows padded to one length."""
        device = self.backbone.get_input_embeddings().weight.device
        lengths = [rows.inputs[key].shape[1] for key in keys]
        padded = torch.zeros(len(rows.names), len(keys), max(lengths), dtype=torch.int64)
        for column, key in enumerate(keys):
            padded[:, column, : lengths[column]] = rows.inputs[key]
        inputs: dict[str, Any] = {name: value.to(device) for name, value in zip(rows.names, padded)}
        if rows.masked is not None:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            inputs["attention_mask"] = mask.to(device, rows.masked)
        seen: list[torch.Tensor] = []

        def catch(hidden):
            if not seen:
                seen.append(hidden)
            return hidden

        def look(module, args, output):
            self._outputs = len(output) if isinstance(output, tuple) else 0

        above = range(self.first, len(self.blocks))
        handle = self.blocks[self.first - 1].register_forward_hook(look)
        try:
            with ExitStack() as stack:
                stack.enter_context(self._stand_ins(above, catch))
                if (pooler := getattr(self.backbone, "pooler", None)) is not None:  # one that trains takes probes' rows
                    stack.enter_context(forward_of(pooler, lambda original, hidden: hidden))
                forward(**inputs, **self._no_cache)
        finally:
            handle.remove()
        hidden = seen[0]
        if hidden.shape[:-1] != padded.shape[1:]:
            raise CannotShare(f"expected hidden states of {tuple(padded.shape[1:])} tokens, got {tuple(hidden.shape)}")
        return [row[:length].clone() for row, length in zip(hidden, lengths)]

    def _run_above(self, forward: Callable, inputs: Mapping[str, Any], hidden: torch.Tensor):
        """Return what ``forward`` gives when the first adapted block gets ``hidden`` ``[rows, columns, width]``."""
        embeddings = self.backbone.get_input_embeddings()

        def nothing(original, ids, *args, **kwargs):
            # Shape, dtype and device of the embeddings without their memory.
            weight = embeddings.weight
            return weight.new_zeros(()).expand(*ids.shape, weight.shape[1])

        with ExitStack() as stack:
            stack.enter_context(self._stand_ins(range(self.first), lambda other: hidden.to(other.device)))
            stack.enter_context(forward_of(embeddings, nothing))
            return forward(**{**inputs, **self._no_cache})

    @contextmanager
    def _stand_ins(self, indices: range, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Put stand-ins, which return ``replace(hidden states)``, into the places of some blocks."""
        own = {str(i): self.blocks._modules[str(i)] for i in indices}
        self.replace = replace
        try:
            self.blocks._modules.update((name, self._stand_in_for[name]) for name in own)
            yield
        finally:
            self.blocks._modules.update(own)
            self.replace = None  # it holds hidden states


class _StandIn(nn.Module):
    """A block that computes nothing; its attributes are those of the block, for models that ask for them."""

    def __init__(self, block: nn.Module, prefix: Prefix):
        super().__init__()
        self.__dict__.update(block=block, prefix=prefix, training=False)
        self.__dict__["argument"] = next(iter(inspect.signature(block.forward).parameters))

    def __getattr__(self, name: str):
        return getattr(self.__dict__["block"], name)

    def forward(self, *args, **kwargs):
        hidden = self.prefix.replace(args[0] if args else kwargs[self.argument])
        return (hidden, *[None] * (self.prefix._outputs - 1)) if self.prefix._outputs else hidden


def _rows_of(inputs: Mapping[str, Any]) -> _Rows:
    """Tell the rows of a forward apart by their real tokens.

    Raises:
        CannotShare: something in ``inputs`` is neither one number per token nor a mask of padded tokens.
    """
    ids, mask, known = inputs.get("input_ids"), inputs.get("attention_mask"), told()
    if ids is None or ids.ndim != 2:
        raise CannotShare("a forward without input_ids [rows, tokens]")
    for name in ("past_key_values", "output_hidden_states", "output_attentions"):
        if inputs.get(name) not in (None, False):
            raise CannotShare(f"a forward with {name}")
    copies = known.copies if known else 0
    columns = ids.shape[1] - max(0, copies - 1)  # copies behind the first have the same hidden states
    plain = mask is not None and mask.shape == ids.shape
    if not plain and mask is not None and not copies:
        raise CannotShare(f"a forward with an attention mask of shape {tuple(mask.shape)}")
    real = known.mask if known else mask if plain else torch.ones_like(ids)
    if real.shape != (len(ids), columns):
        raise CannotShare(f"real tokens were told for {tuple(real.shape)}, a forward has {(len(ids), columns)}")
    names = []
    for name, value in inputs.items():
        if name == "attention_mask" or not torch.is_tensor(value):
            continue
        if value.shape not in (ids.shape, (1, ids.shape[1])) or value.is_floating_point():
            raise CannotShare(f"a forward with {name} of shape {tuple(value.shape)}")
        names.append(name)
    values = [host(real), *(host(inputs[name]).expand(len(ids), -1)[:, :columns] for name in names)]
    numbers = torch.stack([value.long() for value in values])
    real = numbers[0].bool()
    counts, first = real.sum(1), real.long().argmax(1)
    column = torch.arange(columns)
    if not torch.equal(real, (column >= first[:, None]) & (column < (first + counts)[:, None])) or not counts.all():
        raise CannotShare("a forward whose attention mask has holes")
    if first.any() and "position_ids" not in names:
        raise CannotShare("padding on the left, and no position_ids")
    about = f"{' '.join(names)} {plain}".encode()
    distinct: dict[bytes, torch.Tensor] = {}
    order: dict[bytes, int] = {}
    index, starts = [], []
    for row, (start, count) in enumerate(zip(first.tolist(), counts.tolist())):
        tokens = numbers[1:, row, start : start + count]
        key = about + tokens.numpy().tobytes()
        if key not in order:
            order[key], distinct[key] = len(order), tokens
            starts.append(start)
        index.append(order[key])
    return _Rows(distinct, names, index, starts, ids.shape[1], copies, mask.dtype if plain else None)


def _first_tensor(output) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]
