"""``TTConfig``: the settings of the tensor-train adapter as a PEFT method."""

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "identity")
INITS = ("identity", "paper")
POSITIONS = ("all", "last")


@dataclass
class TTConfig(PeftConfig):
    """Settings of tensor-train adapters ``y = x + scale * up(act(down(x)))``, each of ``down``, ``up`` a TT linear.

    Args:
        rank: TT rank of every bond, or one rank per bond (``len(cores) - 1`` of them). Paper: 5.
        bottleneck: width between ``down`` and ``up``. Paper: 64.
        shapes: ``"auto"`` (balanced factors of each width), or ``{"width": [...], "bottleneck": [...]}``.
        sites: ``"paper"`` (after attention and MLP output), ``"mlp"`` (after the MLP output only), ``"published"`` (the
            authors' Llama code: before gate and up, after down), or a list of module names; ``"pre:name"`` puts the
            adapter before the module.
        act: ``relu | gelu | silu | tanh | identity`` between ``down`` and ``up``.
        bias: whether ``down`` and ``up`` carry a bias.
        scale: factor on the adapter's branch.
        positions: ``"all"`` tokens as published, or ``"last"``: only the last token of a prompt, the scored one. No
            probe then changes what earlier tokens look like, so a prompt runs once for all probes and a probe costs one
            token (``adazeta.probe_tokens``). For label words of one token; with a KV cache, generated tokens are
            adapted as well.
        init: ``"identity"`` (last core of ``up`` zero, so the adapted model starts as the base model) or ``"paper"``
            (all cores random, which changes the model before the first step).
        init_gain: standard deviation of ``down``'s output for a unit-variance input, at initialisation.
        init_seed: 64-bit seed of the initial numbers; with it a journal rebuilds a run from nothing.
        target_modules: module names (or one regular expression) to adapt instead of ``sites``; adapters stand after
            each unless ``sites`` names a module with ``pre:``.
        exclude_modules: module names (or one regular expression) to leave out.
        modules_to_save: further modules trained and saved whole, a task head for example.
        layers_to_transform: index or indices of the blocks that get adapters, or ``"middle"``: those from a third of
            the depth to three quarters; all by default.
        layers_pattern: name of the block list, where it cannot be guessed.

    Source: AdaZeta, Yang et al., EMNLP 2024 (arXiv 2406.18060), section 3.1.
    """

    rank: int | list[int] = field(default=5, metadata={"help": "TT rank of every bond, or one per bond"})
    bottleneck: int = field(default=64, metadata={"help": "width between down and up"})
    shapes: Any = field(default="auto", metadata={"help": "'auto' or {'width': [...], 'bottleneck': [...]}"})
    sites: Any = field(default="paper", metadata={"help": "'paper', 'mlp', 'published' or module names"})
    act: str = field(default="relu", metadata={"help": "relu | gelu | silu | tanh | identity"})
    bias: bool = field(default=True, metadata={"help": "biases on down and up"})
    scale: float = field(default=1.0, metadata={"help": "factor on the adapter's branch"})
    positions: str = field(default="all", metadata={"help": "all | last: which tokens the adapters act on"})
    init: str = field(default="identity", metadata={"help": "identity | paper"})
    init_gain: float = field(default=1.0, metadata={"help": "std of down's output for unit-variance input"})
    init_seed: int = field(default=0, metadata={"help": "64-bit seed of the initial numbers"})
    target_modules: Any = field(default=None, metadata={"help": "module names or a regular expression"})
    exclude_modules: Any = field(default=None, metadata={"help": "module names or a regular expression to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    layers_to_transform: Any = field(default=None, metadata={"help": "indices of the blocks that get adapters"})
    layers_pattern: Any = field(default=None, metadata={"help": "name of the block list"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TT
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.sites, tuple):
            self.sites = list(self.sites)
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {ACTIVATIONS}, got {self.act!r}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be True or False (biases of the TT linears), got {self.bias!r}")
        if not 0 <= self.init_seed < 2**64:
            raise ValueError(f"init_seed must be in [0, 2**64), got {self.init_seed}")
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not 0 < abs(self.scale) < math.inf:
            raise ValueError(f"scale must be finite and not 0, with which nothing could be learned, got {self.scale}")
        if not 0 < self.init_gain < math.inf:
            raise ValueError(f"init_gain must be positive and finite, got {self.init_gain}")
