"""Forwards as recorded graphs: which shapes are recorded, the losses of a recording, and reasons why there is none."""

import logging

import pytest
import torch
from tiny import lm_batch, tiny_adapted
from torch import nn

from adazeta import ZerothOrder
from adazeta.block_ends import BlockEnds
from adazeta.graphs import MOST_SHAPES, Graphs
from adazeta.losses import lm_loss


def copying(function):
    """Record as a CUDA graph would: run again what was run, with the same tensors, into the same results."""
    output = function()

    def replay():
        output.last_hidden_state.copy_(function().last_hidden_state)

    output.last_hidden_state.fill_(torch.nan)  # a recording computes nothing
    return output, replay


def optimizer(record=None, **settings):
    model = tiny_adapted(noise=0.2, **settings)
    opt = ZerothOrder(model, lr=0.05, queries=3, weight_decay=0.1, run_seed=5)
    opt.ends = BlockEnds(nn.Identity(), None, "default")  # recordings multiply all tokens
    if record is not None:
        opt.graphs = Graphs(model, model.base_model, "default", record)
    return opt


def run(opt, batches):
    losses = []
    for batch in batches:
        losses.append(opt.estimate(lm_loss, batch))
        opt.step()
    return losses, opt.fingerprint()


def test_a_shape_is_recorded_when_it_comes_again_and_losses_have_the_same_bits():
    long, short = ([lm_batch(2, tokens, seed) for seed in range(5)] for tokens in (9, 6))
    batches = [long[0], short[0], long[1], long[2], short[1], short[2], long[3]]
    opt = optimizer(copying)
    assert run(opt, batches) == run(optimizer(), batches)
    assert (opt.graphs.recorded, opt.graphs.replayed) == (2, 5)
    state = opt.graphs.why_not()
    assert state is None and opt.graphs.describe() == "CUDA graphs: one per shape of a forward"


def test_forwards_of_another_number_of_probes_are_another_shape():
    opt = optimizer(copying)
    opt.planner.probes_per_forward = 4  # six probes: forwards of four and of two
    batches = [lm_batch(2, 9, seed) for seed in range(3)]
    plain = optimizer()
    plain.planner.probes_per_forward = 4
    assert run(opt, batches) == run(plain, batches)
    assert (opt.graphs.recorded, opt.graphs.replayed) == (2, 4)


def test_recordings_of_weights_that_moved_are_forgotten():
    opt, plain, batches = optimizer(copying), optimizer(), [lm_batch(2, 9, seed) for seed in range(3)]
    assert run(opt, batches) == run(plain, batches)
    weight = next(p for p in opt.model.parameters() if not p.requires_grad)
    weight.data = weight.data.clone()  # as of a model that went to another device and back
    assert run(opt, batches) == run(plain, batches)
    assert (opt.graphs.recorded, opt.graphs.replayed) == (2, 4)
    for one in (opt, plain):
        layer = next(layer for _, layer in one.model.base_model.tt_layers("default"))
        layer.scale["default"] = 0.5
    assert run(opt, batches) == run(plain, batches)
    assert opt.graphs.recorded == 3


def test_no_more_shapes_than_the_limit(monkeypatch):
    monkeypatch.setattr("adazeta.graphs.MOST_SHAPES", 1)
    assert MOST_SHAPES > 1
    opt, batches = optimizer(copying), [lm_batch(2, tokens) for tokens in (6, 9, 6, 9, 6, 9)]
    assert run(opt, batches) == run(optimizer(), batches)
    assert (opt.graphs.recorded, opt.graphs.replayed) == (1, 2)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so(caplog):
    def refusing(function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    opt, batches = optimizer(refusing), [lm_batch(2, 9, seed) for seed in range(4)]
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        assert run(opt, batches) == run(optimizer(), batches)
    assert len(caplog.records) == 1 and "operation not permitted when stream is capturing)" in caplog.text
    assert opt.graphs.replayed == 0
    assert opt.graphs.describe().startswith("CUDA graphs: not used, recording failed (CUDA error")

    def full(function):
        raise torch.OutOfMemoryError("no room")

    opt = optimizer(full)
    opt.planner.probes_per_forward = 1
    with pytest.raises(torch.OutOfMemoryError):  # a lack of memory is the planner's business
        run(opt, batches)


def test_reasons(caplog):
    graphs = optimizer().graphs
    assert graphs.describe() == "CUDA graphs: not used, the model is on the CPU"
    graphs.record = copying
    assert "no adapters" in graphs.why_not(others=True) and "once per example" in graphs.why_not(shared=True)
    assert "last token" in graphs.why_not(at_tokens=True)
    graphs.model.base_model.model.model.layers[0]._hf_hook = object()
    assert "between devices" in graphs.why_not()
    assert "Linear is no transformers model" in Graphs(nn.Linear(2, 2), object(), "default", copying).why_not()
    with caplog.at_level(logging.INFO, logger="adazeta"):
        opt = optimizer(copying, layers_to_transform=[2])
        run(opt, [lm_batch(2, 9, seed) for seed in range(3)])
    assert opt.graphs.replayed == 0 and caplog.text.count("run once per example") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
def test_on_a_gpu():
    batches = [lm_batch(2, 9, seed) for seed in range(4)]
    opt, plain = optimizer(), optimizer()
    for one in (opt, plain):
        one.model.cuda()
    plain.graphs.record = lambda function: (_ for _ in ()).throw(RuntimeError("not in this run"))
    torch.testing.assert_close(torch.tensor(run(opt, batches)[0]), torch.tensor(run(plain, batches)[0]))
    assert (opt.graphs.recorded, opt.graphs.replayed) == (1, 3) and plain.graphs.replayed == 0
