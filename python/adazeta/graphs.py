"""Forwards of one shape as one CUDA graph: the host then launches a forward, not its hundreds of kernels.

What is recorded is the forward of the trunk, between token ids and hidden states. Its inputs and the factors of all
adapters lie in memory of their own, which is filled before a graph runs; making factors is not part of it, for a
kernel's seeds are those of its recording. A shape is recorded when it comes for the second time. Where no graph can be
used forwards run as they are, and the reason is told.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .forwards import forward_of
from .planner import is_out_of_memory
from .prefix_identity import precision
from .scoring import language_model, trunk_of
from .tokens import looking

_log = logging.getLogger("adazeta")

#: Shapes that are recorded; each keeps the activations of its forward.
MOST_SHAPES = 16
_PLAIN = (bool, int, float, str, type(None))
#: Runs a function while recording it; returns its result and what runs it again, into the same memory.
Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


class Graphs:
    """CUDA graphs of a model's forwards, by shape.

    Args:
        model: what runs, in whose forwards all probes are virtual.
        tt_model, adapter: the adapters whose factors a graph reads.
        record: how a forward is recorded; by default as a CUDA graph.

    Attributes:
        recorded, replayed: shapes recorded, and forwards that ran as graphs.
    """

    def __init__(self, model: nn.Module, tt_model, adapter: str, record: Recorder | None = None):
        self.model, self.tt_model, self.adapter, self.record = model, tt_model, adapter, record
        self.recorded = self.replayed = 0
        self._graphs: dict[tuple, _Graph] = {}
        self._met: set[tuple] = set()
        self._factors: dict[int, list[torch.Tensor]] = {}  # by number of probes: those of every layer
        self._mark: tuple = ()  # what recordings read besides their inputs
        self._failed: str | None = None
        self._fixed: str | None = None
        self._said: str | None = None

    def why_not(self, *, others: bool = False, shared: bool = False, at_tokens: bool = False) -> str | None:
        """Return why no graph can be used, or None.

        Args:
            others: parameters that are no adapters are perturbed.
            shared: blocks below the first adapter run once per example.
            at_tokens: every probe is a copy of a prompt's last token.
        """
        if self._failed:
            return self._failed
        device = next(self.model.parameters()).device
        if self.record is None and device.type != "cuda":
            return f"the model is on the {device.type.upper()}"
        if self.tt_model is None or others:
            return "trained parameters that are no adapters are made anew for every probe"
        if shared:
            return "blocks below the first adapter run once per example, whose number changes"
        if at_tokens:
            return "probes are copies of the last token, whose number changes with the prompts"
        if self._fixed is None:
            self._fixed = self._of_the_model()
        return self._fixed or None

    def _of_the_model(self) -> str:
        """Why no forward of this model can be recorded; nothing if it can. Looked at once."""
        inner = language_model(self.model)
        if not hasattr(inner, "can_generate") and not hasattr(inner, "encoder"):
            return f"{type(inner).__name__} is no transformers model"
        if any(hasattr(module, "_hf_hook") for module in inner.modules()):
            return "weights move between devices while a forward runs"
        return ""

    @contextmanager
    def used(self, **kind: bool) -> Iterator[bool]:
        """Run the trunk's forwards as graphs inside the ``with`` statement, if that can be done; yields whether.

        Args:
            kind: the arguments of :meth:`why_not`.
        """
        reason = self.why_not(**kind)
        if reason is not None:
            self._say(reason)
            yield False
            return
        self._drop_stale()
        with forward_of(trunk_of(self.model), self._forward):
            yield True

    def _drop_stale(self) -> None:
        """Forget recordings of weights that lie elsewhere by now, or of settings that changed."""
        trunk = trunk_of(self.model)
        weights = [*trunk.parameters(), *trunk.buffers()]
        layers = [layer for _, layer in self.tt_model.tt_layers(self.adapter)]
        mark = (
            [(weight.data_ptr(), weight.dtype) for weight in weights],
            [(layer.act[self.adapter], layer.scale[self.adapter]) for layer in layers],
            precision(weights[0].device),
            getattr(trunk.config, "_attn_implementation", None),
        )
        if mark != self._mark:
            self._graphs.clear()
            self._met.clear()
            self._factors.clear()
            self._mark = mark

    def describe(self, **kind: bool) -> str:
        """Say in a line whether graphs are used, or why not."""
        reason = self.why_not(**kind)
        return f"CUDA graphs: not used, {reason}" if reason else "CUDA graphs: one per shape of a forward"

    def _say(self, reason: str) -> None:
        if reason != self._said:
            self._said = reason
            _log.info("CUDA graphs are not used: %s", reason)

    @torch.compiler.disable  # it puts other forwards into modules that a compiler may be following
    def _forward(self, forward: Callable, *args, **kwargs):
        """Stand in for the trunk's ``forward``."""
        layers = [layer for _, layer in self.tt_model.tt_layers(self.adapter)]
        probes, groups = layers[0].probes, layers[0].factor_groups
        plain = not args and all(torch.is_tensor(value) or isinstance(value, _PLAIN) for value in kwargs.values())
        if looking.get() or probes is None or not plain or self._failed:  # a key-value cache is not plain
            return forward(*args, **kwargs)
        key = (len(probes), *((name, _kind_of(value)) for name, value in sorted(kwargs.items())))
        graph = self._graphs.get(key)
        if graph is None and (key not in self._met or len(self._graphs) >= MOST_SHAPES):
            self._met.add(key)
            return forward(**kwargs)
        factors = self._fill(layers, groups, len(probes))
        if graph is None:
            try:
                graph = self._graphs[key] = self._make(forward, kwargs, layers, groups, factors)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._failed = f"recording failed ({str(error).strip().splitlines()[0]})"
                _log.warning("CUDA graphs are not used any more: %s", self._failed)
                return forward(**kwargs)
            self.recorded += 1
        self.replayed += 1
        return graph.run(kwargs)

    def _fill(self, layers: list, groups, probes: int) -> list[torch.Tensor]:
        """Put the factors of all layers where the graphs read them."""
        if probes not in self._factors:
            self._factors[probes] = [torch.empty_like(groups.of(layer)) for layer in layers]
        for layer, place in zip(layers, self._factors[probes]):
            place.copy_(groups.of(layer))
        return self._factors[probes]

    def _make(self, forward: Callable, inputs: dict, layers: list, groups, factors: list) -> "_Graph":
        fixed = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        places = _Places(layers, factors)
        try:
            for layer in layers:
                vars(layer)["factor_groups"] = places
            output, replay = (self.record or record_cuda)(lambda: forward(**fixed))
        finally:
            for layer in layers:
                vars(layer)["factor_groups"] = groups
        return _Graph(fixed, output, replay)


class _Places:
    """What layers ask for factors while they are recorded: always the same memory."""

    def __init__(self, layers: list, factors: list[torch.Tensor]):
        self._of = {id(layer): place for layer, place in zip(layers, factors)}

    def of(self, layer) -> torch.Tensor:
        return self._of[id(layer)]


class _Graph:
    """A recorded forward, its inputs and its output."""

    def __init__(self, inputs: dict, output, replay: Callable[[], None]):
        self.inputs, self.output, self.replay = inputs, output, replay

    def run(self, inputs: dict):
        for name, value in inputs.items():
            if torch.is_tensor(value):
                self.inputs[name].copy_(value, non_blocking=True)
        self.replay()
        # Of its own: whoever gets it may put other tensors into it.
        return type(self.output)(**self.output) if isinstance(self.output, dict) else self.output


def record_cuda(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record ``function`` as a CUDA graph, after two runs on another stream in which libraries set themselves up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return output, graph.replay


def _kind_of(value) -> Any:
    """What of an input belongs to a recording: all of it but a tensor's numbers."""
    return (value.shape, value.dtype, value.device) if torch.is_tensor(value) else repr(value)
