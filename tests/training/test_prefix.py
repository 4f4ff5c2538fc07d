"""Blocks below the first adapter: run once per example, in every family, and refused where they cannot be shared."""

import logging

import pytest
import torch
from families import FAMILIES, MASKED, SEQ2SEQ, batch_for, build
from peft import get_peft_model
from tiny import lm_batch, tiny_adapted

from adazeta import TTConfig, ZerothOrder
from adazeta.losses import LabelWords, lm_loss

NOT_SHARED = {**dict.fromkeys(SEQ2SEQ, "not in one list of blocks"), "gemma3": "a forward without input_ids"}
LAYERS = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "codegen", "bloom"), "n_layer"),
    **dict.fromkeys(("distilbert", "mpt"), "n_layers"),
}


#: Families that say of each of their blocks what kind it is.
KINDS = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}


class Words:
    pad_token_id = 0

    def encode(self, text, add_special_tokens):
        return [{"good": 5, "bad": 9}[text]]


LABEL_WORDS = LabelWords(Words(), ["good", "bad"])


def family(model_type, first=2, **config):
    """A tiny model of three blocks with adapters from block ``first`` on."""
    more = KINDS.get(model_type, {})
    base = build(model_type, **{LAYERS.get(model_type, "num_hidden_layers"): 3, **more})
    config = {"rank": 2, "bottleneck": 8, "act": "gelu", "layers_to_transform": list(range(first, 3)), **config}
    model = get_peft_model(base, TTConfig(**config)).eval()
    theta = model.base_model.theta()
    theta.add_(torch.randn(theta.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    return model


def estimates(model, loss, batch, steps=2, queries=3, **settings):
    """Losses of a few steps, from theta as it is; theta is put back."""
    theta = model.base_model.theta()
    before = theta.clone()
    opt = ZerothOrder(model, lr=0.05, eps=0.1, queries=queries, directions="example", **settings)
    losses = []
    for _ in range(steps):
        losses.append(opt.estimate(loss, batch))
        opt.step()
    theta.copy_(before)
    return torch.tensor(losses), opt


def compare(model, loss, batch):
    """Losses with shared blocks, kept and not, against those where every row passes every block."""
    plain, opt = estimates(model, loss, batch, share_prefix=False)
    assert opt.prefix is None and plain.std() > 1e-6
    for setting, misses in (("off", 8), ("memory", 4)):
        shared, opt = estimates(model, loss, batch, prefix_cache=setting)
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
        assert (opt.prefix.misses, opt.prefix.hits) == (misses, 8 - misses)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in NOT_SHARED])
def test_shared_blocks_change_no_loss(model_type):
    for first, left in ((1, False), (2, True)):  # blocks below the first adapter, and the side of the padding
        model = family(model_type, first)
        compare(model, lm_loss, batch_for(model, 4, 7, left=left))


@pytest.mark.parametrize("model_type", sorted(NOT_SHARED))
def test_families_that_cannot_share_say_so_once(model_type, caplog):
    model = family(model_type)
    batch = batch_for(model, 4, 7)
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        shared, opt = estimates(model, lm_loss, batch)
    assert opt.prefix.misses == 0 and len(caplog.records) == 1
    assert NOT_SHARED[model_type] in caplog.records[0].getMessage()
    assert torch.equal(shared, estimates(model, lm_loss, batch, share_prefix=False)[0])


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in (*NOT_SHARED, *MASKED)])
def test_shared_blocks_change_no_loss_of_probe_tokens(model_type):
    model = family(model_type, positions="last", **({"sites": ["out_proj"]} if model_type == "opt" else {}))
    # Families with a sliding window of four tokens take one row per probe where a prompt is longer.
    for tokens, left in ((4, False), (4, True), (7, True)):
        compare(model, LABEL_WORDS, {**batch_for(model, 4, tokens, left=left), "labels": torch.arange(4) % 2})


def blocks_of(model):
    return model.base_model.model.model.layers


def calls(model, monkeypatch):
    """Rows and tokens that the embeddings and every block's MLP get, from now on."""
    seen = {name: [] for name in ("embeddings", *range(len(blocks_of(model))))}
    for index, block in enumerate(blocks_of(model)):
        block.mlp.register_forward_pre_hook(lambda m, args, rows=seen[index]: rows.append(tuple(args[0].shape[:2])))
    look_up = torch.nn.Embedding.forward

    def forward(module, ids):
        seen["embeddings"].append(tuple(ids.shape))
        return look_up(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return seen


@pytest.mark.parametrize("first", [1, 2])
def test_lower_blocks_run_once_per_example_and_never_for_known_ones(first, monkeypatch):
    model = tiny_adapted(layers=3, noise=0.2, layers_to_transform=list(range(first, 3)))
    seen = calls(model, monkeypatch)
    opt = ZerothOrder(model, queries=5, prefix_cache="memory", probes_per_forward=4)
    batch = lm_batch(5)
    lengths = batch["attention_mask"].sum(1).tolist()

    def passed(rows):
        for shapes in seen.values():
            shapes.clear()
        opt.zero_grad()
        opt.estimate(lm_loss, {name: value[rows].clone() for name, value in batch.items()})
        return list(seen.values())

    passed([4])  # and the trial of the family
    alone = [(1, length) for length in lengths]
    assert passed([0, 1, 2, 3]) == [alone[:4]] * (first + 1) + [[(16, 7), (16, 7), (8, 7)]] * (3 - first)
    assert passed([3, 2, 1, 0]) == [[]] * (first + 1) + [[(16, 7), (16, 7), (8, 7)]] * (3 - first)
    batch["input_ids"][1, 0] = 63 - batch["input_ids"][1, 0]
    assert passed([0, 1])[: first + 1] == [[alone[1]]] * (first + 1)  # only the new one
    assert passed([4, 4])[: first + 1] == [[]] * (first + 1)
    assert (opt.prefix.hits, opt.prefix.misses) == (4 + 1 + 1, 1 + 4 + 1)
    assert opt.prefix.cache.bytes == 4 * 32 * sum([*lengths, lengths[1]])


def test_prompts_pass_the_lower_blocks_once_for_all_copies(monkeypatch):
    model = tiny_adapted(layers=3, noise=0.3, positions="last", layers_to_transform=[1, 2])
    batch = {**lm_batch(4), "labels": torch.arange(4) % 2}
    seen = calls(model, monkeypatch)
    opt = ZerothOrder(model, queries=5, directions="example", prefix_cache="off", probes_per_forward=20)
    opt.estimate(LABEL_WORDS, batch)  # and the look at its rows, once
    for shapes in seen.values():
        shapes.clear()
    opt.estimate(LABEL_WORDS, batch)
    assert [shape for shape in seen[0] if shape[0] > 1] == [(2, 7), (2, 7)]  # two prompts of 10 copies a forward
    assert seen[2][-2:] == [(2, 16), (2, 16)]


def reason(caplog):
    return " ".join(record.getMessage() for record in caplog.records)


def estimate(model, batch):
    opt = ZerothOrder(model, prefix_cache="memory")
    opt.estimate(lm_loss, batch)
    return opt.prefix.hits + opt.prefix.misses


def test_nothing_is_shared_where_that_would_be_wrong(caplog):
    batch = lm_batch(4)
    model = tiny_adapted(layers=3, layers_to_transform=[2])
    weight = blocks_of(model)[0].mlp.up_proj.weight
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        assert estimate(model.train(), batch) == 0
        assert "training mode" in reason(caplog)
        model.eval()
        blocks_of(model)[1].mlp.train()
        assert estimate(model, batch) == 0
        assert "layers.1.mlp is in training mode" in reason(caplog)
        model.eval()
        weight.requires_grad_(True)
        assert estimate(model, batch) == 0
        assert "layers.0.mlp.up_proj.weight is trainable" in reason(caplog)
        weight.requires_grad_(False)
        model.add_adapter("lower", TTConfig(rank=2, bottleneck=8, layers_to_transform=[0]))
        assert estimate(model, batch) == 4  # it is not active
        model.base_model.set_adapter(["default", "lower"])
        model.base_model.theta("lower")
        for _, layer in model.base_model.tt_layers("lower"):
            layer.tt_theta["lower"].requires_grad_(False)
        assert estimate(model, batch) == 0
        assert "'lower' is active in layers.0" in reason(caplog)


def handing_on(model, how):
    """Let block 0 tell block 1 a number: in its output, or beside it in a place that every forward clears."""
    inner, blocks, told = model.base_model.model.model, blocks_of(model), {}
    below, above, forward = blocks[0].forward, blocks[1].forward, inner.forward

    def tell(hidden_states, **kwargs):
        hidden = below(hidden_states, **kwargs)
        told["mean"] = 10 * hidden.abs().mean()
        return (hidden, told["mean"]) if how == "in its output" else hidden

    def listen(hidden_states, **kwargs):
        if how == "in its output":
            return above(hidden_states[0] + hidden_states[1], **kwargs)
        return above(hidden_states + told.get("mean", 0), **kwargs)

    def clear(input_ids=None, **kwargs):
        told.clear()
        return forward(input_ids=input_ids, **kwargs)

    blocks[0].forward, blocks[1].forward, inner.forward = tell, listen, clear


@pytest.mark.parametrize("how", ["in its output", "beside"])
def test_families_that_hand_on_more_than_hidden_states_are_told(how, caplog):
    model = tiny_adapted(layers=2, noise=0.3, layers_to_transform=[1])
    before, _ = estimates(model, lm_loss, lm_batch(4), share_prefix=False)
    handing_on(model, how)
    with caplog.at_level(logging.WARNING, logger="adazeta"):
        shared, opt = estimates(model, lm_loss, lm_batch(4))
    told = {"in its output": "LlamaModel fails without them", "beside": "hand on more than hidden states"}[how]
    assert opt.prefix.misses == 0 and told in reason(caplog)
    assert len(caplog.records) == 1  # once, not in every step
    plain, _ = estimates(model, lm_loss, lm_batch(4), share_prefix=False)
    assert torch.equal(shared, plain) and not torch.allclose(shared, before, atol=1e-3)


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
@pytest.mark.parametrize(
    "where, shared", [("lm_head", True), ("model.layers.2.mlp.up_proj", True), ("model.norm", False)]
)
def test_other_trained_parameters_above_the_first_adapter_leave_the_lower_blocks_shared(where, shared, perturb):
    losses = []
    for share_prefix in (True, False):
        model = tiny_adapted(layers=3, noise=0.2, layers_to_transform=[2])
        model.base_model.model.get_submodule(where).weight.requires_grad_(True)
        found, opt = estimates(model, lm_loss, lm_batch(4), 3, share_prefix=share_prefix, perturb=perturb)
        losses.append(found)
        if share_prefix:
            assert (opt.prefix.hits, opt.prefix.misses) == ((8, 4) if shared else (0, 0))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    assert losses[0].std() > 1e-5
