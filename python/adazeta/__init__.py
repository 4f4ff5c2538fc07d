"""adazeta: zeroth-order fine-tuning of language models with tensor-train adapters.

from adazeta import TTConfig, ZerothOrder, ZOConfig, ZOTrainer, AdaptiveQueries
"""

import importlib

__version__ = "0.1.0"

# Loaded on first use, so that the command line can print its help without importing torch.
_EXPORTS = {
    "TTConfig": ".tuner",
    "ZerothOrder": ".optimizer",
    "ZOConfig": ".config",
    "ZOTrainer": ".trainer",
    "AdaptiveQueries": ".schedule",
    "ConstantQueries": ".schedule",
    "LabelWords": ".losses",
    "MaskedLabelWords": ".losses",
    "Seq2SeqLabelWords": ".losses",
    "CandidateLikelihood": ".losses",
    "HeadScores": ".losses",
    "label_words": ".losses",
    "lm_loss": ".losses",
    "GenerationObjective": ".objectives",
    "ClassObjective": ".objectives",
    "UserError": ".errors",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
