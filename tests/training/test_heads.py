"""The heads of our own: a mean of an encoder's hidden states, plain or with weights that train."""

import pytest
import torch
from families import FAMILIES, SEQ2SEQ, batch_for, build
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from adazeta import TTConfig, ZerothOrder
from adazeta.heads import Pooled, head_modules
from adazeta.losses import HeadScores


class Table(nn.Module):
    """Hidden states that are looked up: of token i, row i."""

    def __init__(self, width=6, tokens=9):
        super().__init__()
        self.config = PreTrainedConfig(hidden_size=width)
        self.states = nn.Embedding(tokens, width)

    def forward(self, input_ids, attention_mask=None):
        return BaseModelOutput(last_hidden_state=self.states(input_ids))


@pytest.fixture(params=[False, True], ids=["mean", "attention"])
def pooled(request):
    torch.manual_seed(0)
    model = Pooled(Table(), 3, attention=request.param).requires_grad_(False)
    if request.param:
        assert model.token_scores.weight.count_nonzero() == 0
        model.token_scores.weight.normal_(std=2.0)
    model.classifier.weight.normal_()
    return model


def by_hand(model, tokens):
    """The formula, in float64, of one row of real tokens."""
    h = model.encoder.states.weight[tokens].double()
    scores = h @ model.token_scores.weight[0].double() if model.token_scores is not None else h[:, 0] * 0
    weights = scores.exp() / scores.exp().sum()
    return model.classifier.weight.double() @ (weights @ h) + model.classifier.bias.double()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_formula_at_real_tokens_alone(pooled, side):
    rows = [[1, 2, 3, 4], [5], [6, 7]]
    pad = [[8] * (4 - len(row)) for row in rows]  # a row of its own in the table, so padding that counts is seen
    ids = torch.tensor([row + more if side == "right" else more + row for row, more in zip(rows, pad)])
    found = pooled(input_ids=ids, attention_mask=(ids != 8).long()).logits
    torch.testing.assert_close(
        found.double(), torch.stack([by_hand(pooled, row) for row in rows]), atol=2e-6, rtol=2e-6
    )
    whole = torch.tensor([rows[0]])
    torch.testing.assert_close(pooled(input_ids=whole).logits, found[:1], atol=1e-6, rtol=1e-6)


def test_large_scores_stay_finite():
    model = Pooled(Table(), 2, attention=True).requires_grad_(False)
    model.token_scores.weight.fill_(1e4)
    ids = torch.tensor([[1, 2, 8], [3, 8, 8]])
    highest = max((1, 2), key=lambda token: float(model.encoder.states.weight[token].sum()))
    found = model(input_ids=ids, attention_mask=(ids != 8).long()).logits
    torch.testing.assert_close(found, model.classifier(model.encoder.states.weight[[highest, 3]]))


@pytest.mark.parametrize("attention", [False, True])
def test_nothing_of_the_encoder_trains_with_the_head(attention):
    """PEFT takes modules by the ends of their names, and an encoder has many that end in ``attention``."""
    base = Pooled(build("bert", AutoModel), 3, attention=attention).requires_grad_(False)
    names = ["token_scores", "classifier"] if attention else ["classifier"]
    assert head_modules(base) == names
    model = get_peft_model(base, TTConfig(rank=2, bottleneck=8, modules_to_save=head_modules(base)))
    saved = {name.split(".modules_to_save")[0] for name, p in model.named_parameters() if "modules_to_save" in name}
    assert saved == {f"base_model.model.{name}" for name in names}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SEQ2SEQ])  # whose head is its own
def test_a_head_on_a_mean_of_every_family(family, tmp_path):
    """It starts as the base model, scores probes together as one by one, and is saved and loaded."""

    def adapted():
        torch.manual_seed(1)
        base = Pooled(build(family, AutoModel), 2, attention=True).requires_grad_(False).eval()
        return base, get_peft_model(base, TTConfig(rank=2, bottleneck=8, modules_to_save=head_modules(base))).eval()

    batch = {**batch_for(build(family), 3, 6), "labels": torch.tensor([0, 1, 0])}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    base, model = adapted()
    with model.disable_adapter():
        plain = base(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, plain)
    found = []
    for probes in (None, 1):
        opt = ZerothOrder(model, lr=0.1, eps=0.1, queries=2, probes_per_forward=probes)
        opt.estimate(HeadScores(), batch)
        found.append(torch.cat(opt._projected))
        opt.zero_grad()
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    opt.estimate(HeadScores(), batch)
    opt.step()
    moved = model(**inputs).logits
    assert not torch.allclose(moved, plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(adapted()[0], tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, moved)
