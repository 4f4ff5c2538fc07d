"""Every model type in the table of sites, from a tiny random configuration: identity at start, sites found, probes."""

import pytest
import torch
import transformers
from peft import get_peft_model

from adazeta import TTConfig
from adazeta.probes import Probes, probing
from adazeta.tuner.sites import SITES, resolve_sites

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_ENCODER = {**{k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim")}, "num_labels": 2}
SETTINGS = {
    **{name: _DECODER for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")},
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "max_position_embeddings": 40},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1},
    "gpt_neox": {k: _DECODER[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    | {"num_attention_heads": 4},
}


def build(model_type):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, pad_token_id=0, **SETTINGS[model_type])
    encoder = model_type in ("bert", "roberta")
    kind = transformers.AutoModelForSequenceClassification if encoder else transformers.AutoModelForCausalLM
    return kind.from_config(config).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("sites", ["paper", "published", "mlp"])
@pytest.mark.parametrize("model_type", sorted(SITES))
def test_family(model_type, sites):
    base = build(model_type)
    ids = torch.randint(2, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    expected = logits(base, ids)
    model = get_peft_model(base, TTConfig(rank=2, bottleneck=8, sites=sites)).eval()
    placements = resolve_sites(sites, model_type).values()
    per_block = sum(placement != "none" for placement in placements)
    assert sites != "mlp" or per_block == 1
    assert len(model.base_model.tt_layers("default")) == 2 * per_block
    assert torch.equal(logits(model, ids), expected)
    theta = model.base_model.theta()
    theta.add_(torch.randn(theta.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    alone = logits(model, ids)
    assert not torch.allclose(alone, expected, atol=1e-4)
    with probing(model.base_model, Probes.of([1, 2], [0.0, 0.3])):
        both = logits(model, ids.repeat(2, 1))
    torch.testing.assert_close(both[:3], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[3:], alone, atol=1e-4)
