"""How much goes into one forward: as many tokens as the hardware gains from, within a memory budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from .errors import SettingError
from .memory import MIB, available_bytes

log = logging.getLogger("adazeta")

#: Tokens in a forward beyond which a device gains little (docs/experiments.md has the measurement). On a CPU rows of
#: bfloat16 layers get no cheaper above 256 tokens; those of float32 ones do, by a tenth.
TOKENS_PER_FORWARD = {"cpu": 256, "cpu mixed": 256, "cpu float32": 768, "default": 65536}
#: Tokens beyond which a forward of one probe costs more than its parts, for activations then leave the cache: those
#: between mixed layers are float32. Products that take a matrix unit wait for memory soonest (docs/performance.md).
MOST_TOKENS = {"cpu": 1024, "cpu mixed": 1024, "cpu float32": 1536, "default": 131072}
if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"):
    MOST_TOKENS |= {"cpu": 512, "cpu mixed": 256}

#: Copies of a last token, in prompts, that no forward is cut below for its number of tokens: prompts, which every part
#: repeats, are then a ninth of it at most.
LEAST_COPIES = 8

#: No forward keeps more live numbers per token, in units of the widest linear layer (seen: 4 to 9); only where so many
#: might not fit is the footprint looked up, which takes a second for a large model.
MOST_WIDTHS = 32

#: Lengths are looked up in multiples of this, fewer scored positions in powers of two: every look-up takes a second for
#: a large model.
LOOKED_UP = 32


def tokens_per_forward(model: nn.Module | None, device: str = "cpu") -> int:
    """Return how many tokens a forward of ``model`` should hold, which its frozen linear layers decide.

    Args:
        model: None is a model of which nothing is known.
        device: type of the device that runs it.
    """
    return _look_up(TOKENS_PER_FORWARD, _kind_of(model, device))


def _kind_of(model: nn.Module | None, device: str) -> str:
    """Return the key of ``TOKENS_PER_FORWARD`` and ``MOST_TOKENS``, or another type of device."""
    if device == "cpu" and model is not None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        weights = [vars(layer)["packed"] if "packed" in vars(layer) else layer.weight for layer in layers]
        if weights and all(weight.dtype == torch.float32 for weight in weights):
            return "cpu float32"
        if any(isinstance(m, nn.Embedding) and m.weight.dtype == torch.float32 for m in model.modules()):
            return "cpu mixed"
    return device


def _look_up(table: dict[str, int], kind: str) -> int:
    return table.get(kind, table["default"])


class Planner:
    """Choose the number of probes in a forward, and fewer from then on when memory runs out all the same.

    The choice depends on shapes and on the budget only, never on timing: with a budget of its own a repeated run takes
    the same forwards.

    Args:
        model: what the forwards run; None leaves memory out of the choice.
        tt_model: its ``TTModel``, if probes are virtual.
        adapter: name of the adapter.
        probes_per_forward: most probes in a forward; None leaves it to the number of tokens.
        memory_budget: bytes that a forward may take above the weights; None is half of what is free.

    Attributes:
        scored: positions of an example that the output layer scores with its whole vocabulary: of the batch at hand.
        generated: tokens of an answer, whose keys and values are kept, where a forward generates one: likewise.
        asked_for: the memory budget was given, not found.
        rows_apart: rows do not see each other, so that those of a probe may pass in forwards of their own.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        tt_model=None,
        adapter: str = "default",
        probes_per_forward: int | None = None,
        memory_budget: int | None = None,
    ):
        if probes_per_forward is not None and probes_per_forward < 1:
            raise ValueError(f"probes_per_forward must be at least 1 or None, got {probes_per_forward}")
        if memory_budget is not None and memory_budget < 1:
            raise ValueError(f"memory_budget must be a positive number of bytes or None, got {memory_budget}")
        self.model, self.tt_model, self.adapter = model, tt_model, adapter
        self.probes_per_forward, self.memory_budget = probes_per_forward, memory_budget
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)] if model is not None else []
        self._widest = max((max(m.in_features, m.out_features) for m in linears), default=0)
        self.scored, self.generated, self.rows_apart = 0, 0, False
        self._kind = _kind_of(model, "cpu")
        self.asked_for = memory_budget is not None
        # Rows that fit, by rows wanted, tokens of a row, how many of them are scored, and generated tokens.
        self._fitting: dict[tuple[int, int, int, int], int] = {}
        self._unknown = False  # the model does not run without numbers
        self._most_tokens: int | None = None  # learned by running out of memory

    def probes(self, rows: int, tokens: int, device: str = "cpu") -> int:
        """Return how many probes of ``rows`` sequences of ``tokens`` tokens each share a forward, at least 1.

        Args:
            rows, tokens: size of a probe.
            device: type of the device that runs it.

        Raises:
            SettingError: the memory budget is too small for one probe.
        """
        wanted = self.probes_per_forward or max(1, self._of(TOKENS_PER_FORWARD, device) // max(1, rows * tokens))
        if self._most_tokens is not None:
            wanted = max(1, min(wanted, self._most_tokens // max(1, rows * tokens)))
        wide, least = -(-tokens // LOOKED_UP) * LOOKED_UP, self.rows_at_once(rows, tokens, device)
        fitting = self._rows_that_fit(wanted * rows if wanted > 1 else least, wide, device)
        if fitting < least and not self.asked_for:  # nobody set this limit: memory may do all the same
            return 1
        if fitting < least:
            part = "" if least == rows else f", of which {least} share a forward"
            raise SettingError(
                f"a memory budget of {self._budget(device) / MIB:,.1f} MiB is too small for one probe of {rows} rows "
                f"of up to {wide} tokens{part}, {self._bytes(least, wide) / MIB:,.1f} MiB: raise it, or take a smaller "
                "batch"
            )
        return max(1, fitting // rows)

    def rows_at_once(self, rows: int, tokens: int, device: str = "cpu") -> int:
        """Return how many of a probe's ``rows`` sequences share a forward that has no other probe.

        All of them up to ``MOST_TOKENS``; of more, equal parts, whose activations stay in the cache and take less
        memory. Of fewer where that many were too many once.
        """
        most = min(self._of(MOST_TOKENS, device), self.most_tokens)
        if not self.rows_apart or rows * tokens <= most:
            return rows
        return -(-rows // min(rows, -(-rows * tokens // most)))

    def copies(self, prompt: int, rows: int, device: str = "cpu") -> int:
        """Return how many copies of its last token a prompt of ``prompt`` other tokens has in a forward at most.

        ``rows`` prompts share the forward, of ``MOST_TOKENS``: its mask grows with the square of the copies. But not so
        few that the prompts, which pass once more with every further part, are more than a small share of it.
        """
        return max(1, LEAST_COPIES * prompt, self._of(MOST_TOKENS, device) // rows - prompt)

    def _of(self, table: dict[str, int], device: str) -> int:
        return _look_up(table, self._kind if device == "cpu" else device)

    def rows(self, tokens: int, device: str = "cpu", unit: int = 1) -> int:
        """Return how many sequences of ``tokens`` tokens share a forward, whatever their number of probes.

        Args:
            tokens, device: as for :meth:`probes`.
            unit: sequences that stay together; the number is a multiple of it.

        Raises:
            SettingError: the memory budget is too small for one unit.
        """
        kept = self.probes_per_forward, self.rows_apart
        self.probes_per_forward, self.rows_apart = None, False
        try:
            return unit * self.probes(unit, tokens, device)
        finally:
            self.probes_per_forward, self.rows_apart = kept

    def run(
        self, forward: Callable[[int, int], torch.Tensor], first: int, last: int, tokens: int, unit: int = 1
    ) -> list[torch.Tensor]:
        """Return ``[forward(first, last)]``, or the results of its parts where memory does not hold the whole.

        Args:
            forward: evaluates the probes (or rows) ``first ... last - 1`` in one forward; no part is evaluated twice
                that was evaluated whole.
            tokens: of each.
            unit: parts are multiples of it.

        Raises:
            what ``forward`` raises, where that is no lack of memory or a single unit is too much.
        """
        try:
            return [forward(first, last)]
        except (RuntimeError, MemoryError) as error:
            half = (last - first) // (2 * unit) * unit
            if not is_out_of_memory(error) or half == 0:
                raise
        self.learn((last - first) * tokens, half * tokens)
        parts = ((first, first + half), (first + half, last))
        return [result for part in parts for result in self.run(forward, *part, tokens, unit)]

    def learn(self, failed: int, tokens: int) -> None:
        """Take no more than ``tokens`` from now on, for memory ran out with ``failed``; said once."""
        if self._most_tokens is None:
            log.warning("out of memory in a forward of %s tokens; going on with %s at most", failed, tokens)
        self._most_tokens = min(tokens, self.most_tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def most_tokens(self) -> float:
        """Tokens in a forward that memory was seen not to hold more than."""
        return math.inf if self._most_tokens is None else self._most_tokens

    def _budget(self, device: str) -> int:
        if self.memory_budget is None:
            # Asked once: later answers would count what forwards left behind.
            free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()
            self.memory_budget = max(1, free // 2)
        return self.memory_budget

    def _rows_that_fit(self, wanted: int, tokens: int, device: str) -> int:
        """The most rows of a forward within the budget, at most ``wanted``."""
        plenty = wanted * tokens * self._widest * 4 * MOST_WIDTHS <= self._budget(device) and not self.generated
        if self.model is None or plenty:
            return wanted
        key = (wanted, tokens, self._scored(tokens), self.generated)
        if key not in self._fitting:
            rows = wanted
            while rows and (taken := self._bytes(rows, tokens)) > self._budget(device):
                rows = min(rows - 1, rows * self._budget(device) // taken)
            self._fitting[key] = rows
        return self._fitting[key]

    def _scored(self, tokens: int) -> int:
        if self.scored < LOOKED_UP:  # a few positions of a large vocabulary outweigh everything else
            return min(tokens, self.scored and 1 << (self.scored - 1).bit_length())
        return min(tokens, -(-self.scored // LOOKED_UP) * LOOKED_UP)

    def _bytes(self, rows: int, tokens: int) -> int:
        from .footprint import cache_bytes, forward_bytes

        if self._unknown:
            return 0
        try:
            probes = {"tt_model": self.tt_model, "adapter": self.adapter}
            kept = cache_bytes(self.model, tokens, self.generated) if self.generated else 0
            return rows * kept + forward_bytes(self.model, rows, tokens, scored=self._scored(tokens), **probes)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # A model may look at numbers, or know no way without them.
            log.warning(
                "the memory of a forward of %s is not known beforehand (%s): none is counted, and a forward that runs "
                "out of it is taken in halves",
                type(self.model).__name__,
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            )
            self._unknown = True
            return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(said in str(error) for said in words)
