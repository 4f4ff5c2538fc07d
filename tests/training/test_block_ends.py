"""Linear layers before the first adapter multiply a row once, those behind the last attention scored tokens only."""

import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from families import FAMILIES, SEQ2SEQ, batch_for, build
from peft import get_peft_model
from tiny import lm_batch, moved, tiny_adapted, tiny_llama
from torch import nn

from adazeta import TTConfig, ZerothOrder
from adazeta.block_ends import BlockEnds, _by_row
from adazeta.forwards import forward_of
from adazeta.losses import lm_loss

#: Layers of the last block that multiply scored tokens only. Fused layers that also make keys and values do not, nor
#: does what stands before a router: other tokens would ask for other experts.
LLAMA = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
BERT = {"attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"}
ATTENTION = {"self_attn.q_proj", "self_attn.o_proj"}
T5 = {
    *("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
    *("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.o"),
    *("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1", "layer.2.DenseReluDense.wo"),
}
BART = {
    *("self_attn.q_proj", "self_attn.out_proj", "encoder_attn.q_proj", "encoder_attn.out_proj"),
    *("fc1", "fc2"),
}
ABOVE = {
    **dict.fromkeys(FAMILIES, LLAMA),
    **dict.fromkeys(("apertus", "arcee", "nemotron"), LLAMA - {"mlp.gate_proj"}),
    **dict.fromkeys(("glm", "glm4"), {*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"}),
    "phi3": {"self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "lfm2": {"self_attn.q_proj", "self_attn.out_proj", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
    "starcoder2": {*ATTENTION, "mlp.c_fc", "mlp.c_proj"},
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), ATTENTION),
    "qwen2_moe": {
        *ATTENTION,
        *(f"mlp.base_layer.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        "mlp.base_layer.shared_expert_gate",
    },
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "ernie"), BERT),
    "megatron-bert": BERT,
    # A query layer that also multiplies the table of relative positions, and one with keys and values in it.
    **dict.fromkeys(("deberta-v2", "deberta"), BERT - {"attention.self.query"}),
    "mpnet": {"attention.attn.q", "attention.attn.o", "intermediate.dense", "output.dense"},
    "distilbert": {"attention.q_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"},
    "modernbert": {"attn.Wo", "mlp.Wi", "mlp.Wo"},
    **dict.fromkeys(("gpt2", "gpt_bigcode"), {"attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "gpt_neo": {"attn.attention.q_proj", "attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    **dict.fromkeys(("bloom", "falcon"), {"self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "codegen": {"attn.out_proj", "mlp.fc_in", "mlp.fc_out"},
    "gptj": {"attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"},
    "mpt": {"attn.out_proj", "ffn.up_proj", "ffn.down_proj"},
    "phi": {"self_attn.q_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"},
    "opt": {"self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"},
    **dict.fromkeys(("bart", "mbart"), BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
}
OFF = BlockEnds(nn.Identity(), None, "default")


def steps(model, batch, loss=lm_loss, ends=None, count=2, **settings):
    """Return the losses of a few steps, and the optimizer that took them; theta is put back."""
    theta = model.base_model.theta()
    before, seen = theta.clone(), []
    opt = ZerothOrder(model, lr=0.05, eps=0.1, queries=3, **settings)
    opt.ends = ends or opt.ends
    for _ in range(count):
        seen.append(opt.estimate(loss, batch))
        opt.step()
    theta.copy_(before)
    return torch.tensor(seen), opt


def in_block(model, layers):
    """Return the names of ``layers`` inside their block."""
    names = {module: name.removesuffix(".base_layer") for name, module in model.named_modules()}
    return {re.sub(r"^.*?\.\d+\.", "", names[layer]) for layer in layers}


@contextmanager
def tokens_multiplied(model):
    """Yield ``{name: tokens}`` that the linear layers of ``model`` multiply."""
    counts = Counter()

    def count(name, forward, x):
        counts[name] += x[..., 0].numel()
        return forward(x)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(forward_of(module, partial(count, re.sub(r"^.*layers\.|\.base_layer$", "", name))))
        yield counts


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_losses_are_those_of_all_tokens_of_all_rows(model_type, left):
    model = get_peft_model(build(model_type), TTConfig(rank=2, bottleneck=8, act="gelu")).eval()
    moved(model, 0.3)
    batch = batch_for(model, 4, 12, left=left)
    for settings in ({}, {"directions": "example"}, {"probes_per_forward": 2}):
        plain, _ = steps(model, batch, ends=OFF, **settings)
        assert plain.std() > 1e-6
        spared, opt = steps(model, batch, **settings)
        torch.testing.assert_close(spared, plain, atol=1e-5, rtol=1e-5)
    assert in_block(model, opt.ends.above) == ABOVE[model_type]
    attention = {name for name in in_block(model, opt.ends.below) if "att" in name or "conv" in name}
    assert len(attention) >= (0 if model_type in SEQ2SEQ else 2), attention


@pytest.mark.parametrize("per_forward", [None, 2], ids=["one forward", "three"])
def test_what_is_multiplied(per_forward):
    """Three queries are six probes of four rows of seven tokens; two tokens of a row are scored."""
    model = tiny_adapted(noise=0.3)
    steps(model, lm_batch(), count=1)  # what is looked at once
    opt = ZerothOrder(model, lr=0.05, eps=0.1, queries=3, probes_per_forward=per_forward)
    opt.estimate(lm_loss, lm_batch())
    with tokens_multiplied(model) as counts:
        opt.estimate(lm_loss, lm_batch())
    every, once, scored = 6 * 4 * 7, 4 * 7, 6 * 4 * 2
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert counts[f"0.self_attn.{name}"] == once
        assert counts[f"1.self_attn.{name}"] == every
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert counts[f"2.{name}"] == scored
    assert counts["2.self_attn.k_proj"] == counts["2.self_attn.v_proj"] == counts["0.mlp.up_proj"] == every


def test_nothing_is_kept_beyond_what_is_allowed():
    model, batch = tiny_adapted(noise=0.3), lm_batch()
    _, opt = steps(model, batch)
    for keep, expected in ((0, 0), (4 * 7 * 32 * 4, 1), (1 << 24, 4)):
        with opt.ends.used(alike=True, keep=keep):
            lm_loss(model, batch)
            assert sum(map(len, opt.ends._kept.values())) == expected
        assert not opt.ends._kept


def test_rows_that_differ_in_their_mask_alone_are_not_alike():
    model = get_peft_model(build("bert"), TTConfig(rank=2, bottleneck=8)).eval()
    moved(model, 0.3)
    batch = batch_for(model, 4, 12)
    batch["input_ids"] = batch["input_ids"][:1].repeat(4, 1)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 5] = 9
    spared, _ = steps(model, batch, directions="example")
    torch.testing.assert_close(spared, steps(model, batch, ends=OFF, directions="example")[0], atol=1e-5, rtol=1e-5)


class MixesBehind(nn.Module):
    """A norm over all tokens of a row in place of the one behind the last block."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def test_a_model_that_mixes_tokens_behind_its_last_block_is_left_alone():
    base = tiny_llama()
    base.model.norm = MixesBehind()
    model = get_peft_model(base, TTConfig(rank=3, bottleneck=8)).eval()
    moved(model, 0.3)
    spared, opt = steps(model, lm_batch())
    assert not opt.ends.above and not opt.ends.below
    assert torch.equal(spared, steps(model, lm_batch(), ends=OFF)[0])


def test_perturbed_embeddings_are_not_shared():
    def perturbed(ends=None):
        model = tiny_adapted(noise=0.3)
        model.get_input_embeddings().weight.requires_grad_(True)
        return steps(model, lm_batch(), ends=ends)

    spared, opt = perturbed()
    plain, _ = perturbed(OFF)
    assert opt.ends.below
    torch.testing.assert_close(spared, plain, atol=1e-5, rtol=1e-5)


def test_columns_by_row():
    rows, columns = torch.tensor([2, 0, 0]), torch.tensor([4, 1, 3])
    expected = torch.tensor([[1, 3], [0, 0], [4, 4]])  # a row without a scored token computes one that nobody reads
    assert torch.equal(_by_row(rows, columns, (3, 8)), expected)
    assert _by_row(rows, columns, (3, 3)) is None  # as many as are spared


def test_adapters_that_come_later_are_looked_at_again():
    model = tiny_adapted(noise=0.3)
    _, opt = steps(model, lm_batch())
    before = list(opt.ends.below)
    model.delete_adapter("default")
    model.add_adapter("default", TTConfig(rank=3, bottleneck=8, layers_to_transform=[1, 2]))
    opt.ends._look()
    assert len(opt.ends.below) > len(before)
