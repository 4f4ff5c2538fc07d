"""A classification head of which the last layer trains in full, and what stands before it as TT adapters."""

import pytest
import torch
from families import build
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from adazeta import TTConfig, ZerothOrder
from adazeta.heads import Pooled, behind_trunk, head_modules
from adazeta.losses import HeadScores
from adazeta.tuner.places import tt_head


def classifier(family):
    torch.manual_seed(0)
    return build(family, AutoModelForSequenceClassification, num_labels=3).eval().requires_grad_(False)


def batch():
    ids = torch.randint(3, 60, (8, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 3}


def adapted(model, **keywords):
    found = tt_head(model, "paper", head_modules(model))
    config = TTConfig(rank=2, bottleneck=8, init_gain=1.0, **{"layers_to_transform": [1], **found, **keywords})
    return get_peft_model(model, config).eval()


def test_roberta_s_inner_layer_gets_an_adapter_whatever_blocks_do(tmp_path):
    base = classifier("roberta")
    expected = base(**{k: v for k, v in batch().items() if k != "labels"}).logits
    model = adapted(base)
    names = [name for name, _ in model.base_model.tt_layers("default")]
    assert [name.split("layer.1.")[-1] for name in names] == [
        "attention.output.dense",
        "output.dense",
        "classifier.dense",
    ]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "tt_theta" not in name} == {
        f"base_model.model.classifier.out_proj.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    torch.testing.assert_close(HeadScores().scores(model, batch()), expected)  # it begins as the identity
    optimizer, losses = ZerothOrder(model, queries=16, lr=0.05, eps=0.02), []
    for _ in range(25):
        losses.append(float(optimizer.estimate(HeadScores(), batch())))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier("roberta"), tmp_path).eval()
    torch.testing.assert_close(HeadScores().scores(again, batch()), HeadScores().scores(model, batch()))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("family, trains", [("roberta", False), ("bert", True)])
@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_probes_share_forwards_and_the_blocks_below(family, trains, layers):
    base = classifier(family)
    if trains:  # as where the checkpoint lacks it
        base.bert.pooler.requires_grad_(True)
    model = adapted(base, layers_to_transform=layers)
    assert len(model.base_model.tt_layers("default")) == 2 * len(layers) + 1
    assert model.base_model.block_list("default") == (f"{family}.encoder.layer", layers[0])
    settings = {"queries": 4, "eps": 0.02, "prefix_cache": "off"}
    alone = ZerothOrder(model, probes_per_forward=1, **settings)
    together = ZerothOrder(model, **settings)
    for optimizer in (alone, together):
        optimizer.estimate(HeadScores(), batch())
        assert not optimizer._first_look.rows_mix
    torch.testing.assert_close(together._projected, alone._projected, atol=1e-3, rtol=1e-3)


def test_heads_of_one_layer_stay_as_they_are_and_names_that_peft_mixes_up_are_told():
    assert tt_head(classifier("bert"), "paper", ["classifier"]) == {}
    pooled = Pooled(build("bert", AutoModel), 3).eval()
    assert tt_head(pooled, "paper", head_modules(pooled)) == {}
    distilbert = classifier("distilbert")
    with pytest.raises(ValueError, match="PEFT takes 'pre_classifier' for 'classifier'"):
        tt_head(distilbert, "paper", head_modules(distilbert))


def test_a_name_without_a_path_keeps_to_the_blocks():
    """PEFT's ``layers_to_transform`` chooses among blocks; a site such as ``dense`` is not meant beside them."""
    model = get_peft_model(
        classifier("roberta"), TTConfig(rank=2, bottleneck=8, sites=["dense"], layers_to_transform=[1])
    )
    assert all(".layer.1." in name for name, _ in model.base_model.tt_layers("default"))


def test_what_stands_behind_a_trunk():
    assert behind_trunk(classifier("roberta")) == ["classifier"]
    assert behind_trunk(classifier("bert")) == ["bert.pooler", "classifier"]
    assert behind_trunk(Pooled(build("bert", AutoModel), 2, attention=True)) == ["token_scores", "classifier"]
    assert behind_trunk(build("bert", AutoModel)) == behind_trunk(torch.nn.Linear(2, 2)) == []
    assert behind_trunk(build("llama")) == ["lm_head"]
