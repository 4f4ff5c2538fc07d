"""What an optimizer looks at once, and models and batches that change under it."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import lm_batch, tiny_adapted, tiny_llama
from torch import nn

from adazeta import TTConfig, ZerothOrder, frozen
from adazeta.first_look import tolerance
from adazeta.losses import LabelWords, lm_loss


class Normalized(nn.Module):
    """Two layers with batch norm between them: in train mode the losses of a row depend on all rows."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 1)

    def forward(self, x):
        return self.second(self.norm(torch.relu(self.first(x))))


class Routed(nn.Module):
    """The rows with the largest scores, half of the batch, pass the expert: routing with a capacity."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.expert, self.second = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x):
        x = self.first(x)
        chosen = x.sum(1).topk(len(x) // 2).indices
        return self.second(x.index_add(0, chosen, 5 * self.expert(x[chosen])))


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, TTConfig(rank=2, bottleneck=4, sites={"first": "post"}, target_modules=["first"]))


def row_loss(model, batch):
    return model(batch["x"]).square().flatten(1).sum(1)


def forwards(model, loss=row_loss):
    """A loss that notes the rows of its forwards, and the notes."""
    seen = []

    def counted(m, batch):
        seen.append(len(batch["x"]))
        return loss(m, batch)

    return counted, seen


BATCH = {"x": torch.randn(6, 16, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(
    "kind, training, loss",
    [
        (Normalized, True, row_loss),
        (Routed, False, row_loss),
        (Normalized, False, lambda m, batch: row_loss(m, batch) / len(batch["x"])),
    ],
    ids=["batch norm", "routing", "a loss divided by the rows"],
)
def test_mixed_rows_are_found_and_every_probe_gets_a_forward(kind, training, loss):
    torch.manual_seed(0)
    model = adapted(kind()).train(training)
    counted, seen = forwards(model, loss)
    opt = ZerothOrder(model, lr=0.0, queries=2, combine="mean", eps=0.05)
    with pytest.warns(RuntimeWarning, match="depends on the other rows of its forward") as caught:
        opt.estimate(counted, BATCH)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert seen == [2, 4, 2, 2] + [6] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once, and looked at once
        opt.step()
        opt.estimate(counted, BATCH)
    assert seen == [2, 4, 2, 2] + [6] * 8
    assert opt.rows == 2 * 4 * 6  # the look is not counted
    alone = ZerothOrder(model, lr=0.0, queries=2, combine="mean", eps=0.05, probes_per_forward=1)
    alone.estimate(loss, BATCH)
    again = ZerothOrder(model, lr=0.0, queries=2, combine="mean", eps=0.05)
    with pytest.warns(RuntimeWarning):
        again.estimate(loss, BATCH)
    assert torch.equal(again._projected[0], alone._projected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_rows_share_forwards_without_a_word(dtype):
    model = adapted(Normalized().to(dtype)).eval()
    counted, seen = forwards(model, lambda m, batch: row_loss(m, {"x": batch["x"].to(dtype)}).float())
    opt = ZerothOrder(model, queries=2, probes_per_forward=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.estimate(counted, BATCH)
        opt.estimate(counted, BATCH)
    assert seen == [2, 4, 2, 24, 24]


def test_rounding_of_mixed_layers_is_no_mixing_packed_or_not():
    model = tiny_llama()
    expected = tolerance(model)
    assert frozen.mix(model.requires_grad_(False)) and tolerance(model) > 10 * expected
    plain = tolerance(model)
    frozen.pack(model, tokens=16)
    assert tolerance(model) == plain


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("settings", [{}, {"layers_to_transform": [2]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_models_pass(tokens, settings, dtype):
    model = tiny_adapted(noise=0.5, dtype=dtype, **settings)
    batch = lm_batch(3, tokens + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        opt = ZerothOrder(model, queries=2, directions="example")
        opt.estimate(lm_loss, batch)
    assert opt._first_look._done and not opt._first_look.rows_mix


def test_label_words_at_the_last_token_pass():
    tokenizer = SimpleNamespace(pad_token_id=0, encode=lambda word, add_special_tokens: [len(word)])
    opt = ZerothOrder(tiny_adapted(noise=0.5, positions="last"), queries=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        opt.estimate(LabelWords(tokenizer, ["good", "bad"]), {**lm_batch(4), "labels": torch.tensor([0, 1, 0, 1])})
    assert opt._first_look._done and not opt._first_look.rows_mix and opt.rows == 4


def test_a_random_loss_is_named_as_such():
    torch.manual_seed(0)
    model = adapted(Dropping()).train()
    opt = ZerothOrder(model, queries=2)
    with pytest.warns(RuntimeWarning, match=r"loss of a row is random.*model\.eval\(\)"):
        opt.estimate(row_loss, BATCH)
    assert not opt._first_look.rows_mix


class Dropping(Normalized):
    def __init__(self):
        super().__init__()
        self.norm = nn.Dropout(0.5)


def test_a_loss_that_is_not_finite_at_first_is_looked_at_later():
    torch.manual_seed(0)
    model = adapted(Normalized()).train()
    opt = ZerothOrder(model, lr=0.0, queries=2)
    opt.estimate(lambda m, batch: row_loss(m, batch) * math.nan, BATCH)
    assert not opt._first_look._done
    opt.zero_grad()
    with pytest.warns(RuntimeWarning, match="depends on the other rows"):
        opt.estimate(row_loss, BATCH)


def test_no_look_is_needed_where_every_probe_has_its_forward():
    model = adapted(Normalized()).train()
    counted, seen = forwards(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZerothOrder(model, queries=1, probes_per_forward=1).estimate(counted, BATCH)
    assert seen == [6, 6]


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_a_model_cast_during_training_is_an_error_that_names_the_parameter(perturb):
    model = tiny_llama()
    opt = ZerothOrder(model, perturb=perturb)
    opt.estimate(lm_loss, lm_batch(2))
    opt.step()
    model.to(torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"embed_tokens.weight was torch.float32 .* is torch.bfloat16 now"):
        opt.estimate(lm_loss, lm_batch(2))
    assert all(map(torch.equal, model.parameters(), before))


def test_a_cast_adapter_is_an_error_and_a_cast_base_model_is_not():
    model = tiny_adapted()
    opt = ZerothOrder(model)
    opt.estimate(lm_loss, lm_batch(2))
    for name, p in model.named_parameters():
        if "tt_theta" not in name:
            p.data = p.data.to(torch.bfloat16)
    assert math.isfinite(opt.estimate(lm_loss, lm_batch(2)))
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32"):
        opt.estimate(lm_loss, lm_batch(2))


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
@pytest.mark.parametrize("adapters", [True, False])
def test_a_model_that_moves_to_other_memory_goes_on_with_the_same_bits(perturb, adapters):
    """As ``model.to(device)`` does: every parameter, and with it all the momentum, is somewhere else."""
    results = []
    for moves in (False, True):
        model = tiny_adapted(modules_to_save=["lm_head"]) if adapters else tiny_llama()
        opt = ZerothOrder(model, lr=0.01, queries=2, momentum=0.9, perturb=perturb)
        for k in range(3):
            opt.estimate(lm_loss, lm_batch(2, seed=k))
            if moves:
                model._apply(lambda t: t.clone())
            opt.step()
        results.append(opt.trainable().tensors)
    assert all(map(torch.equal, *results))


def test_momentum_follows_the_parameters_to_their_device():
    opt = ZerothOrder(tiny_llama().to("meta"), momentum=0.9)
    opt._momentum = [torch.zeros(p.shape) for p in opt.others.values()]
    assert {m.device.type for m in opt.trainable().momentum} == {"meta"}


def test_batch_keys_may_change_between_estimates():
    """An estimate knows nothing of the last one's batch: keys may come and go, as long as the loss finds its own."""
    batch, other = lm_batch(4), lm_batch(3, tokens=9, seed=5)
    other = {**other, "text": ["a", "b", "c"], "weight": torch.ones(3)}
    del other["attention_mask"]
    opt, fresh = (ZerothOrder(tiny_adapted(noise=0.2), lr=0.0, queries=2) for _ in range(2))
    opt.estimate(lm_loss, batch)
    opt.step()
    opt.estimate(lm_loss, other)
    fresh.step_index = 1
    fresh.estimate(lm_loss, other)
    assert torch.equal(opt._projected[0], fresh._projected[0])


@pytest.mark.parametrize("parameter", [torch.zeros(3, 2).t(), torch.zeros(2, dtype=torch.float64)])
def test_parameters_that_cannot_be_perturbed_are_named(parameter):
    model = nn.Module()
    model.odd = nn.Parameter(parameter)
    with pytest.raises(ValueError, match="contiguous and float32, bfloat16 or float16; odd is"):
        ZerothOrder(model)
