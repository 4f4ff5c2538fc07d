"""Classification heads: which modules of a model they are, and one of our own on the mean of the hidden states."""

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooled(nn.Module):
    """A linear layer on the mean of an encoder's hidden states at real tokens: ``logits = W mean_t(h_t) + b``.

    Args:
        encoder: a transformers model without a head.
        classes: number of classes.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs):
        """Return the logits ``[rows, classes]`` of token ids ``[rows, tokens]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = real.to(hidden.dtype).unsqueeze(-1)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))


def pooler_name(model: nn.Module) -> str | None:
    """Return the name of the module in a model's trunk through which its head reads, as BERT's does; None without one.

    A checkpoint of a language model lacks it, as it lacks the head.
    """
    trunk = getattr(model, "base_model_prefix", "")  # MeanPooled has none, and reads no pooler
    pooler = getattr(getattr(model, trunk, None), "pooler", None)
    return None if pooler is None else f"{trunk}.pooler"


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a classification model's head's modules: those beside the trunk, and a pooler that trains."""
    trunk = "encoder" if isinstance(model, MeanPooled) else model.base_model_prefix
    pooler = pooler_name(model)
    trains = pooler is not None and any(p.requires_grad for p in model.get_submodule(pooler).parameters())
    return [pooler] * trains + [
        name for name, module in model.named_children() if name != trunk and next(module.parameters(), None) is not None
    ]
