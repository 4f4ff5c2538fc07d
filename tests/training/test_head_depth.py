"""The depth of a head: the block behind which the frozen model's hidden states tell classes apart best."""

import pytest
import torch
from test_head_start import CLASSES, Letters, classifier, examples
from transformers import BertConfig, BertModel

from adazeta.errors import UserError
from adazeta.head_depth import losses_by_depth, settle_depth
from adazeta.head_start import fit_head
from adazeta.heads import Pooled
from adazeta.runs import Classifier
from adazeta.tasks import HeadTask, from_dict, to_dict


def encoder(depth, spoilt):
    """The first blocks of an encoder of four; the output of the ``spoilt`` is constant."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=4)).eval().requires_grad_(False)
    for block in spoilt:
        model.encoder.layer[block].output.LayerNorm.weight.zero_()
    model.encoder.layer = model.encoder.layer[:depth]
    pooled = Pooled(model, len(CLASSES)).eval()
    return Classifier(pooled, Letters(), HeadTask(CLASSES, pooling="mean"), {})


def test_the_loss_of_every_depth_is_that_of_a_head_fitted_there():
    rows, done = examples(), []
    losses = losses_by_depth(encoder(4, (3,)), rows, batch_size=7, progress=done.append)
    assert len(losses) == 4 and sum(done) == len(rows)
    assert losses == pytest.approx([fit_head(encoder(depth, (3,)), rows) for depth in (1, 2, 3, 4)], abs=1e-4)
    assert losses[3] > max(losses[:3]) + 0.1  # nothing tells the classes apart behind block 4


@pytest.mark.parametrize("spoilt, depth", [((1, 2, 3), 1), ((), None)])
def test_the_best_depth_is_settled_and_told(monkeypatch, spoilt, depth):
    settings = {"task": "head", "depth": "auto", "dp_epsilon": None, "dp_noise": None, "eval_batch_size": 8}
    asked, said = [], []
    monkeypatch.setattr("adazeta.prepare.new_classifier", lambda *all: asked.append(all[0]) or encoder(4, spoilt))
    found = settle_depth(settings, examples(), "default", said.append)
    assert asked == [{**settings, "depth": None, "gemm": "plain"}]
    losses = losses_by_depth(encoder(4, spoilt), examples())
    assert found == {**settings, "depth": 1 + losses.index(min(losses))} and depth in (None, found["depth"])
    assert said[0].startswith(f"depth {found['depth']} of 4 blocks: ")


def test_a_number_is_kept_too_few_examples_tell_nothing_and_private_ones_are_refused():
    said = []
    settings = {"task": "head", "depth": "auto", "dp_epsilon": None, "dp_noise": None}
    assert settle_depth({**settings, "task": "label-words"}, examples(), "default")["depth"] == "auto"  # has no effect
    assert settle_depth({**settings, "depth": 2}, [], "default")["depth"] == 2
    assert settle_depth(settings, examples(4), "default", said.append)["depth"] is None  # all blocks
    assert said == ["all blocks run: --depth auto compares them by 5 examples at least, got 4"]
    with pytest.raises(UserError, match="give a private run a number"):
        settle_depth({**settings, "dp_epsilon": 8.0}, examples(), "default")


@pytest.mark.parametrize("depth", [0, -1, "x", 1.5, True, [1]])
def test_what_is_no_depth_is_refused_wherever_it_comes_from(depth):
    stored = {**to_dict(HeadTask(CLASSES, pooling="mean", depth=2)), "depth": depth}
    with pytest.raises(UserError, match="depth must be a number of blocks, at least 1, or auto, got"):
        from_dict(stored)


def test_a_task_without_a_depth_is_stored_as_before():
    task = HeadTask(CLASSES, pooling="mean")
    assert "depth" not in to_dict(task) and from_dict(to_dict(task)) == task
    with pytest.raises(KeyError, match="template"):
        from_dict({name: value for name, value in to_dict(task).items() if name != "template"})


def test_losses_do_not_depend_on_the_size_of_a_forward():
    it = classifier("mean")
    found = [losses_by_depth(it, examples(), batch_size=size) for size in (7, 60)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
