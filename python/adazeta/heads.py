"""Classification heads: which modules of a model they are, and one of our own on a mean of the hidden states."""

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


class Pooled(nn.Module):
    """A linear layer on a mean of an encoder's hidden states at real tokens: ``logits = W sum_t w_t h_t + b``.

    With ``attention``, ``w = softmax_t(a . h_t)`` over a row's real tokens, where ``a`` trains and begins at 0: as the
    plain mean, ``w_t = 1 / tokens``, which it is without. :mod:`adazeta.head_start` fits ``a``, ``W`` and ``b``.

    Args:
        encoder: a transformers model without a head.
        classes: number of classes.
        attention: whether the weights of the tokens train: ``width`` numbers more.

    Source: Lin et al. (2017), *A Structured Self-attentive Sentence Embedding* (arXiv 1703.03130), section 2, with one
    row of attention and scores that are linear in ``h``.
    """

    base_model_prefix = "encoder"  # as models of transformers name theirs: PEFT and transformers look for it

    def __init__(self, encoder: nn.Module, classes: int, attention: bool = False):
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        text = encoder.config.get_text_config()
        self.width = getattr(text, "word_embed_proj_dim", text.hidden_size)  # of what it gives: OPT-350M's is half
        self.token_scores = nn.Linear(self.width, 1, bias=False) if attention else None
        if attention:
            nn.init.zeros_(self.token_scores.weight)
        self.classifier = nn.Linear(self.width, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs):
        """Return the logits ``[rows, classes]`` of token ids ``[rows, tokens]``."""
        hidden, real = self.states(input_ids, attention_mask, **inputs)
        real = real.unsqueeze(-1)
        scores = self.token_scores(hidden) if self.token_scores is not None else hidden.new_zeros(real.shape)
        weights = scores.masked_fill(~real, -torch.inf).softmax(1)
        return SequenceClassifierOutput(logits=self.classifier((hidden * weights).sum(1)))

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs):
        """Return the hidden states ``[rows, tokens, width]``, and whether tokens are real, ``[rows, tokens]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return hidden, real.bool()


def pooler_name(model: nn.Module) -> str | None:
    """Return the name of the module in a model's trunk through which its head reads, as BERT's does; None without one.

    A checkpoint of a language model lacks it, as it lacks the head. A :class:`Pooled` does not read it.
    """
    trunk = getattr(model, "base_model_prefix", "")
    pooler = getattr(getattr(model, trunk, None), "pooler", None)
    return None if pooler is None or isinstance(model, Pooled) else f"{trunk}.pooler"


def behind_trunk(model: nn.Module) -> list[str]:
    """Return the names of the modules with parameters that read what a model's trunk gives, a pooler first."""
    trunk = getattr(model, "base_model_prefix", "")
    if not hasattr(model, trunk):  # it is the trunk, or none of transformers
        return []
    beside = [name for name, _ in model.named_children() if name != trunk]
    names = [*filter(None, [pooler_name(model)]), *beside]
    return [name for name in names if next(model.get_submodule(name).parameters(), None) is not None]


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a classification model's head's modules: those beside the trunk, and a pooler that trains."""
    pooler = pooler_name(model)
    trains = pooler is not None and any(p.requires_grad for p in model.get_submodule(pooler).parameters())
    return [name for name in behind_trunk(model) if trains or name != pooler]
