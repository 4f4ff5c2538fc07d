"""Every model family in the table of sites, from a tiny random configuration; what cannot be is a printed reason."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MASKED, SEQ2SEQ, adapted, batch_for, build, row_alone
from peft import get_peft_model
from tiny import dense_float64

from adazeta import TTConfig
from adazeta.losses import lm_loss
from adazeta.planner import Planner
from adazeta.probes import Plan, Probes, evaluate_probes, probing
from adazeta.scoring import aligned, kind_of, scored_logits
from adazeta.tuner.sites import SITES, candidate_modules, resolve_sites
from adazeta_kernels import perturb_

SIGNS = (1.0, -1.0)
EPS = 0.2


def full_logits(model, batch):
    """The logits of all words at all positions, by the model's own forward."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if kind_of(model) == "seq2seq":
        inputs["decoder_input_ids"] = torch.full_like(batch["input_ids"], 5)
    with torch.no_grad():
        return model(**inputs).logits


def test_the_table_is_what_is_tested():
    assert sorted(SITES) == FAMILIES


@pytest.mark.parametrize("sites", ["paper", "published", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_at_start_and_disabled(family, sites):
    if sites not in ("mlp", *SITES[family]):
        with pytest.raises(ValueError, match="fused weights") as error:
            adapted(family, sites=sites)
        pytest.skip(str(error.value))
    base = build(family)
    batch = batch_for(base, 3, 6)
    expected = full_logits(base, batch)
    model = get_peft_model(base, TTConfig(rank=2, bottleneck=8, sites=sites)).eval()
    names = [name for name, _ in model.base_model.tt_layers("default")]
    placed = [n for n, placement in resolve_sites(sites, family).items() if placement != "none"]
    found = [n for n in placed if any(name.endswith(f".{n}") for name in names)]
    assert set(placed) - set(found) <= {"wi"}  # of a T5 without gates
    # Two blocks; others have two in the encoder and two in the decoder, and cross-attention only there.
    crossed = sum(".EncDecAttention." in name or ".encoder_attn." in name for name in names)
    assert crossed == (2 if family in SEQ2SEQ and sites == "paper" else 0)
    # A block has attention, or in some families what stands for it.
    named = [name for name in found if name not in ("EncDecAttention.o", "linear_attn.out_proj", "conv.out_proj")]
    assert len(names) - crossed == (4 if family in SEQ2SEQ else 2) * len(named)
    assert torch.equal(full_logits(model, batch), expected)
    model.base_model.theta().add_(0.3)
    assert not torch.allclose(full_logits(model, batch), expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(full_logits(model, batch), expected)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_sequential_equals_dense(family, layers):
    """Also for one row of one token (two where a causal head needs them) and for odd numbers of rows."""
    model = adapted(family, layers_to_transform=layers)
    least = 2 if kind_of(model) == "causal" else 1
    for rows, tokens in ((3, 7), (1, least), (5, 3)):
        batch, plan = batch_for(model, rows, tokens), Plan([1, 2], EPS, SIGNS, 1, rows)
        together, alone = (
            evaluate_probes(
                plan,
                batch,
                lambda part: lm_loss(model, part),
                tt_model=model.base_model,
                planner=Planner(probes_per_forward=limit),
            ).view(4, rows)
            for limit in (4, 1)
        )
        torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)
        assert together.std(0).max() > 1e-4
        for index in (0, 3):
            seed, scale, _ = plan.probe(index)
            theta = model.base_model.theta().clone()
            perturb_([theta], [seed], [scale])
            with torch.no_grad():
                dense = lm_loss(dense_float64(model, theta), batch)
            torch.testing.assert_close(together[index], dense.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side(family, left):
    model = adapted(family)
    batch = batch_for(model, 4, 7, left=left)
    assert int(batch["attention_mask"][1, 0]) == 1 - left
    with torch.no_grad():
        padded = lm_loss(model, batch)
        alone = torch.cat([lm_loss(model, row_alone(batch, row)) for row in range(4)])
    torch.testing.assert_close(padded, alone, atol=5e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scored_positions_alone_reach_the_head(family):
    """The same logits as the model's own at all positions, for all words and for two of them."""
    model = adapted(family)
    batch = aligned(batch_for(model, 3, 7))
    expected = full_logits(model, batch)
    if kind_of(model) == "seq2seq":
        batch["decoder_input_ids"] = torch.full_like(batch["input_ids"], 5)
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 4])
    sizes = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: sizes.append((args[0].shape[-2], out.shape[-1])))
    with torch.no_grad():
        for words in (None, torch.tensor([9, 4])):
            got = scored_logits(model, batch, rows, columns, words)
            wanted = expected[rows, columns] if words is None else expected[rows, columns][:, words]
            torch.testing.assert_close(got, wanted, atol=5e-6, rtol=0)
    handle.remove()
    whole = hasattr(model.get_base_model(), "final_logits_bias")  # BART's, of the vocabulary's size
    assert sizes == [(3, 64), (3, 64 if whole else 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache(family):
    """Two probes of a prompt with padding on the left and a cache; each densely, without padding and cache."""
    if family in MASKED:
        pytest.skip(f"{family}: a masked language model does not generate")
    model = adapted(family)
    batch = batch_for(model, 2, 6, left=True)
    padded = {name: batch[name][1:2].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with probing(model.base_model, Probes.of([3, 4], [EPS, EPS])):
        both = model.generate(**padded, **settings, use_cache=True)
    for seed, row in zip([3, 4], both):
        theta = model.base_model.theta().clone()
        perturb_([theta], [seed], [EPS])
        alone = row_alone(batch, 1)["input_ids"]
        dense = dense_float64(model, theta).generate(input_ids=alone, **settings, use_cache=False)
        assert torch.equal(row[-6:], dense[0, -6:])


def test_saved_and_loaded_in_a_new_process(tmp_path):
    """One process loads them all."""
    for family in FAMILIES:
        model = adapted(family)
        model.save_pretrained(tmp_path / family)
        torch.save(full_logits(model, batch_for(model, 3, 6)), tmp_path / family / "logits.pt")
    code = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import adazeta.tuner
from families import FAMILIES, batch_for, build
from peft import PeftModel
from test_families import full_logits
for family in FAMILIES:
    folder = {str(tmp_path)!r} + "/" + family
    model = PeftModel.from_pretrained(build(family), folder).eval()
    same = torch.equal(full_logits(model, batch_for(model, 3, 6)), torch.load(folder + "/logits.pt"))
    print(family, same, bool(model.base_model.theta().any()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{family} True True" for family in FAMILIES]


def test_an_unknown_family_lists_its_modules(monkeypatch):
    monkeypatch.delitem(SITES, "llama")
    base = build("llama")
    with pytest.raises(ValueError, match="type 'llama'.*linear layers of this model: self_attn.q_proj, .*down_proj"):
        get_peft_model(base, TTConfig(rank=2, bottleneck=8))
    model = get_peft_model(base, TTConfig(rank=2, bottleneck=8, target_modules=["o_proj"]))
    assert len(model.base_model.tt_layers("default")) == 2
    assert candidate_modules(build("gpt2")) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert candidate_modules(torch.nn.Sequential(torch.nn.Linear(2, 2))) == ["0"]


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "t5", "bart", "gpt_neo", "mpt"])
def test_middle_blocks_of_families_that_name_their_depth_otherwise(family):
    model = adapted(family, layers_to_transform="middle")
    blocks = {re.search(r"\.(\d+)\.", name)[1] for name, _ in model.base_model.tt_layers("default")}
    assert blocks == {"0"}
