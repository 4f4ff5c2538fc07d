"""What a loop of one's own gets wrong at first, and is told in so many words."""

import logging

import pytest
import torch
from test_trainer import trainer
from tiny import lm_batch, tiny_adapted, tiny_llama
from transformers import LlamaForSequenceClassification, TrainingArguments

from adazeta import TTConfig, ZerothOrder, ZOTrainer
from adazeta.evaluate import judge
from adazeta.losses import Completion, lm_loss


def test_parameters_in_place_of_the_model():
    model = tiny_adapted(1)
    for given in (model.parameters(), list(model.parameters()), [{"params": model.parameters()}]):
        with pytest.raises(TypeError, match=r"takes the model itself, not its parameters: ZerothOrder\(model, lr="):
            ZerothOrder(given, lr=1e-2)


@pytest.mark.parametrize(
    "args", [(lm_loss, [lm_batch()]), (lm_batch(), lm_loss), (lm_loss, torch.zeros(2, 3))], ids=["list", "swap", "ids"]
)
def test_a_batch_that_is_no_mapping(args):
    with pytest.raises(TypeError, match=r"estimate\(loss_fn, batch\): batch must be a mapping .*, got (list|fun|Ten)"):
        ZerothOrder(tiny_adapted(1)).estimate(*args)


@pytest.mark.parametrize("what", ["CausalLMOutputWithPast", "float", "NoneType"])
def test_a_loss_that_is_no_tensor(what):
    def loss(model, batch):
        out = model(**batch)
        return {"CausalLMOutputWithPast": out, "float": float(out.loss), "NoneType": None}[what]

    with pytest.raises(TypeError, match=f"a tensor of one loss per row, got {what}"):
        ZerothOrder(tiny_adapted(1)).estimate(loss, lm_batch())


def test_an_adapter_that_is_not_active():
    model = tiny_adapted(1)
    model.add_adapter("second", TTConfig(rank=2, bottleneck=4))
    opt = ZerothOrder(model)
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"trains the adapter 'default', which is not active; .*'default'"):
        opt.estimate(lm_loss, lm_batch())
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="'default', which is disabled"):
        opt.estimate(lm_loss, lm_batch())
    opt.estimate(lm_loss, lm_batch())
    opt.step()


def test_a_trainer_with_a_loss_of_the_usual_place(tmp_path):
    class Weighted(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs).loss * 2

    with pytest.raises(ValueError, match="does not call compute_loss, which Weighted overrides: give loss="):
        Weighted(model=tiny_adapted(1), args=TrainingArguments(tmp_path, report_to=[]))


def test_an_adapter_of_transformers_own_add_adapter_is_slow_and_said_to_be(caplog):
    model = tiny_llama(1)
    model.add_adapter(TTConfig(rank=2, bottleneck=4))
    with caplog.at_level(logging.WARNING, "adazeta"):
        opt = ZerothOrder(model)
    assert "one probe a forward" in caplog.text and "get_peft_model" in caplog.text
    opt.estimate(lm_loss, lm_batch())
    opt.step()


def test_adapters_are_not_mixed_in_a_batch():
    model, ids = tiny_adapted(1), lm_batch()["input_ids"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="adapter_names"):
            call(input_ids=ids, adapter_names=["__base__"] * len(ids))


def test_texts_as_a_data_loader_collates_them():
    seen = []

    def loss(model, batch):
        seen.extend(zip(batch["input_ids"][:, 0].tolist(), batch["texts"], strict=True))
        return lm_loss(model, batch)

    batch = lm_batch()
    texts = tuple(str(first) for first in batch["input_ids"][:, 0].tolist())  # of (text, answer) pairs: tuples
    ZerothOrder(tiny_adapted(1), queries=2).estimate(loss, {**batch, "texts": texts})
    assert all(str(first) == text for first, text in seen) and len(seen) > len(texts)


def test_a_rank_that_is_no_integer():
    with pytest.raises(TypeError, match=r"rank must be an integer or one integer per bond, got 2\.5"):
        tiny_adapted(1, rank=2.5)


@pytest.mark.parametrize("kind", ["optimizer", "trainer"])
def test_a_model_inside_data_parallel(kind, tmp_path):
    model = torch.nn.DataParallel(tiny_adapted(1))
    with pytest.raises(TypeError, match=r"expected the model itself, got it inside DataParallel: give model\.module"):
        if kind == "optimizer":
            ZerothOrder(model)
        else:
            ZOTrainer(model=model, args=TrainingArguments(tmp_path / "out", report_to=[]))
    assert not (tmp_path / "out").exists()


def test_the_loss_of_a_language_model_for_a_classifier(tmp_path):
    classifier = LlamaForSequenceClassification(tiny_llama(1).config)
    what = r"expected a model with a language-model head, got LlamaFor\w+; the loss of a classifier is .*HeadScores"
    for loss in ({}, {"loss": lm_loss}):
        with pytest.raises(ValueError, match=what):
            ZOTrainer(model=classifier, args=TrainingArguments(tmp_path / "out", report_to=[]), **loss)
    assert not (tmp_path / "out").exists()
    for model in (classifier, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="expected a model with a language-model head, got L"):
            ZerothOrder(model).estimate(lm_loss, lm_batch())


@pytest.mark.parametrize(
    "labels, got", [(None, "none"), (torch.arange(4) % 2, r"shape \(4,\)")], ids=["none", "classes"]
)
def test_labels_of_a_language_model_that_are_no_tokens(labels, got):
    with pytest.raises(ValueError, match=rf"needs labels \[rows, tokens\], .* got {got}; classes .*LabelWords"):
        ZerothOrder(tiny_adapted(1)).estimate(lm_loss, {**lm_batch(), "labels": labels})


def test_a_group_of_parameters_added_later():
    opt = ZerothOrder(tiny_adapted(1))
    with pytest.raises(ValueError, match=r"in one group: set requires_grad on further parameters, then make a new"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(opt.param_groups) == 1


def test_a_row_without_a_token(tmp_path):
    """In a step, and in evaluations, where its loss would go into the mean."""
    batch = lm_batch()
    batch["attention_mask"][2] = 0
    told = "row 2 of the batch has no token, its attention_mask is all zeros"
    with pytest.raises(ValueError, match=told):
        ZerothOrder(tiny_adapted(1)).estimate(lm_loss, batch)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(4)]
    for loss in (None, lambda model, batch: lm_loss(model, batch)):
        with pytest.raises(ValueError, match=told):
            trainer(tmp_path, loss=loss).evaluate(rows)
    with pytest.raises(ValueError, match=told):
        judge(Completion(), tiny_adapted(1), batch)


def test_several_gpus_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="does not use DataParallel; show it one GPU with CUDA_VISIBLE_DEVICES"):
        trainer(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="does not use DataParallel"):
        ZOTrainer(model=tiny_adapted(1))
    assert not list(tmp_path.iterdir())
