"""Streamed perturbation: the bits of a perturbed copy, stored weights that nobody writes, memory that is counted."""

import copy

import pytest
import torch
from tiny import lm_batch, tiny_adapted, tiny_llama
from torch import nn

from adazeta import ZerothOrder, streamed
from adazeta.frozen import pack
from adazeta.losses import lm_loss
from adazeta.streamed import Streamed
from adazeta_kernels import derive_seeds, perturb_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def at_probe(model, parameters, forward, seed=7, scale=0.05, offset=0):
    with torch.no_grad(), Streamed(model, parameters, offset=offset) as others, others.checked():
        others.move_to(seed, scale)
        return forward(model)


def on_a_copy(model, names, forward, seed=7, scale=0.05, offset=0):
    moved = copy.deepcopy(model)
    named = dict(moved.named_parameters())
    with torch.no_grad():
        perturb_([named[name] for name in names], [seed], [scale], offset=offset)
        return forward(moved)


def assert_same_as_a_copy(model, forward, names=None, **probe):
    parameters = {n: p for n, p in model.named_parameters() if names is None or n in names}
    before = {n: p.clone() for n, p in model.named_parameters()}
    dictionaries = [m._parameters for m in model.modules()]
    got = at_probe(model, parameters, forward, **probe)
    assert torch.equal(got, on_a_copy(model, list(parameters), forward, **probe))
    with torch.no_grad():
        assert not torch.equal(got, forward(model))  # the probe was another point, and it is left
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(m._parameters is d and type(d) is dict for m, d in zip(model.modules(), dictionaries))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_those_of_a_perturbed_copy_bit_for_bit(dtype, tied):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    assert_same_as_a_copy(model, lambda m: lm_loss(m, lm_batch(4)), offset=1003)


def test_a_subset_in_named_order():
    model = tiny_llama()
    names = [n for n, _ in model.named_parameters() if "norm" in n or "layers.1.mlp" in n]
    assert_same_as_a_copy(model, lambda m: lm_loss(m, lm_batch(4)), names=names)


class Oddities(nn.Module):
    """A module used twice, parameters of its own around a child that has some, one that is read from outside and one
    that an output is a view of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.outside, self.scale = nn.Linear(6, 6), nn.Linear(6, 4), nn.Parameter(torch.randn(6))
        self.shift, self.positions = nn.Parameter(torch.randn(6)), Positions()

    def forward(self, x):
        scale, positions = self.scale, self.positions()  # both held while others are read
        x = self.twice(self.twice(x * scale) + self.shift)
        return nn.functional.linear(x + positions * scale, self.outside.weight, self.outside.bias)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 6))

    def forward(self):
        return self.table[1:2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_used_twice_nested_read_from_outside_and_views_that_outlive_them(dtype):
    model, x = Oddities().to(dtype), torch.randn(5, 6, dtype=dtype)
    assert_same_as_a_copy(model, lambda m: m(x))


def test_attention_that_reads_the_parameters_of_its_child():
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    nn.init.normal_(model.out_proj.bias)
    assert_same_as_a_copy(model, lambda m: m(x, x, x, need_weights=False)[0])


def test_a_module_that_keeps_a_list_of_its_weights():
    model, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    for seed in (7, 8):
        assert_same_as_a_copy(model, lambda m: m(x)[0], seed=seed)


@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_stored_weights_keep_their_bits_after_an_estimate(ending):
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    addresses = [p.data_ptr() for p in model.parameters()]

    def loss(m, rows):
        values = lm_loss(m, rows)
        if len(rows["labels"]) == 4:  # not in the first look, which forbids to read them
            assert all(torch.equal(before[n], p) for n, p in m.named_parameters())
            if ending == "raises":
                raise KeyError("loss")
        return values

    opt = ZerothOrder(model, eps=0.3, queries=2)
    if ending == "raises":
        with pytest.raises(KeyError):
            opt.estimate(loss, lm_batch(4))
    else:
        opt.estimate(loss, lm_batch(4))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert all(type(m._parameters) is dict for m in model.modules())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_estimate_is_that_of_copies(dtype):
    model, batch = tiny_llama().to(dtype), lm_batch(4)
    names = [n for n, _ in model.named_parameters()]
    opt = ZerothOrder(model, eps=0.05, queries=2, combine="mean", run_seed=9)
    opt.estimate(lm_loss, batch)
    by_hand = []
    for seed in derive_seeds(9, 0, 2):
        a, b = (
            on_a_copy(model, names, lambda m: lm_loss(m, batch).double().mean(), seed, sign * 0.05) for sign in (1, -1)
        )
        by_hand.append((a - b) / 0.1)
    assert torch.equal(opt._projected[0], torch.stack(by_hand))


def test_adapters_and_a_head_together():
    """The head's place in a direction is behind theta's; adapters are virtual, the head is streamed."""
    model, batch = tiny_adapted(noise=0.2, modules_to_save=["lm_head"]), lm_batch(4)
    opt = ZerothOrder(model, lr=0.1, eps=0.05, queries=1, combine="mean")
    assert [n.split(".")[-2:] for n in opt.others] == [["default", "weight"]]
    theta, head = model.base_model.theta(), next(iter(opt.others.values()))
    losses = []
    for sign in (0.05, -0.05):
        saved = theta.clone(), head.clone()
        with torch.no_grad():
            perturb_([theta, head], derive_seeds(0, 0, 1), [sign])
            losses.append(lm_loss(model, batch).double().mean())
            theta.copy_(saved[0])
            head.copy_(saved[1])
    before = head.clone()
    opt.estimate(lm_loss, batch)
    torch.testing.assert_close(opt._projected[0][0], (losses[0] - losses[1]) / 0.1, atol=1e-4, rtol=0)
    assert torch.equal(head, before)
    opt.step()
    assert not torch.equal(head, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_above_packed_layers(dtype):
    """Packed weights have no address that could be compared with the head's."""
    projected = []
    for packed in (False, True):
        model = tiny_adapted(noise=0.2, modules_to_save=["lm_head"], dtype=dtype)
        if packed and not pack(model, 64):
            pytest.skip(f"this processor packs no {dtype} layer")
        opt = ZerothOrder(model, eps=0.05, queries=2)
        opt.estimate(lm_loss, lm_batch(4))
        projected.append(opt._projected[0])
    torch.testing.assert_close(*projected, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    "loss, buffers",
    [
        (lambda m, rows: m(rows["input_ids"]).logits.float().flatten(1).logsumexp(1), 1),
        (lm_loss, 2),  # holds the head's weight while the trunk runs
    ],
)
def test_memory_is_the_largest_module(monkeypatch, loss, buffers):
    model = tiny_llama(tie_word_embeddings=True)
    sizes = []
    monkeypatch.setattr(streamed, "_allocate", counting(sizes))
    opt = ZerothOrder(model, queries=3)
    opt.estimate(loss, lm_batch(4))
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    assert largest == 64 * 32 * 4
    assert sizes == [largest] * 2 * buffers  # for the first look, then for the six probes of the estimate


def test_parameters_that_code_holds_on_to_are_not_written_over(monkeypatch):
    sizes = []
    monkeypatch.setattr(streamed, "_allocate", counting(sizes))
    model, x = Oddities(), torch.randn(5, 6)
    assert_same_as_a_copy(model, lambda m: m(x))
    room = 512 + 512  # of a linear layer's weight and bias, aligned
    assert sizes == [room] * 3  # for the scale, the view of the table, and what is read after them


def counting(sizes):
    def allocate(size, device):
        sizes.append(size)
        return torch.full((size,), 255, dtype=torch.uint8, device=device)  # NaN in every dtype: stale bytes would show

    return allocate


def test_a_module_is_made_once_however_often_it_is_asked(monkeypatch):
    made = []

    def counted(params, *args, **settings):
        made.extend(tuple(p.shape) for p in params)
        perturb_(params, *args, **settings)

    monkeypatch.setattr(streamed, "perturb_", counted)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def forward(m):
        assert m[0].weight.dtype == m[0].weight.dtype == torch.float32
        return m(torch.ones(1, 3))

    at_probe(model, dict(model.named_parameters()), forward)
    assert made == [(4, 3), (4,), (2, 4), (2,)]


class Hoarder(nn.Linear):
    """Reads its weight from a list of its own, as fused code may."""

    def __init__(self):
        super().__init__(3, 4)
        self.hoard = [self.weight]

    def forward(self, x):
        return x @ self.hoard[0].t() + self.bias


@pytest.mark.parametrize(
    "model, loss, match",
    [
        (Hoarder(), lambda m, rows: m(rows["x"]).flatten(1).sum(1), "stored values of weight"),
        (
            nn.Linear(3, 1),
            lambda m, rows: m(rows["x"]).flatten(1).sum(1) + sum(p.square().sum() for p in m.parameters()),
            "stored values of weight",
        ),
    ],
)
def test_what_reads_past_the_attribute_is_told_at_the_first_estimate(model, loss, match):
    batch = {"x": torch.randn(4, 2, 3)}
    with pytest.raises(ValueError, match=f"{match}.*perturb='in-place'"):
        ZerothOrder(model).estimate(loss, batch)
    assert all(type(m._parameters) is dict for m in model.modules())
    opt = ZerothOrder(model, perturb="in-place", eps=0.1, combine="mean")
    opt.estimate(loss, batch)
    assert opt._projected[0].abs() > 1e-3


def test_compiled_modules_are_refused():
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="module '' is compiled"):
        Streamed(torch.compile(plain, backend="eager"), dict(plain.named_parameters()))
    scripted = nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="module '0' is compiled"):
        Streamed(scripted, dict(scripted.named_parameters()))


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_a_parameter_that_the_model_no_longer_holds(perturb):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = ZerothOrder(model, perturb=perturb)
    model[1] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not hold the parameters \['1.weight', '1.bias'\] any more"):
        opt.estimate(lambda m, rows: m(rows["x"]).sum(1), {"x": torch.ones(2, 2)})


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_parameters_of_a_tiny_llama_learn(dtype, perturb):
    """MeZO on a model like SmolLM, embeddings tied: the loss of one batch falls, and every parameter moves."""
    model, batch = tiny_llama(layers=1, tie_word_embeddings=True).to(dtype), lm_batch(8)
    before = {n: p.clone() for n, p in model.named_parameters()}
    opt = ZerothOrder(model, lr=1e-2, eps=1e-2, queries=4, perturb=perturb)
    losses = []
    for _ in range(12):
        losses.append(opt.estimate(lm_loss, batch))
        opt.step()
    assert losses[-1] < losses[0] - 0.08
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("names", [["0.weight", "1.weight", "1.bias"], ["1.bias", "0.weight", "1.weight"], ["1.bias"]])
def test_all_probes_at_once_have_the_bits_of_one_after_another(names):
    """Also where a module's parameters are apart in the direction, and where only some of them are moved."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    stored = dict(model.named_parameters())
    probes = [(seed, scale) for seed in (3, 2**63) for scale in (0.1, -0.1)]
    with torch.no_grad(), Streamed(model, {name: stored[name] for name in names}, offset=1003) as others:
        for index, module in enumerate(model):
            together = others.of_probes(module, probes)
            assert set(together) == {name[2:] for name in names if name.startswith(str(index))}
            for number, (seed, scale) in enumerate(probes):
                others.move_to(seed, scale)
                for key, copies in together.items():
                    assert torch.equal(copies[number], getattr(module, key))
                    assert not torch.equal(copies[number], stored[f"{index}.{key}"])
