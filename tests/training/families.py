"""One tiny random model of every family in the table of sites, and batches for it."""

import torch
import transformers
from peft import get_peft_model
from tiny import moved

from adazeta import TTConfig
from adazeta.scoring import kind_of

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_DECODER = {**_GROUPED, "head_dim": 8}
_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "share_att_key": True}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}
_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "init_std": 0.1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **_SPECIAL,
}
SETTINGS = {
    "bert": _COMMON,
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "ernie", "megatron-bert", "mpnet"), _COMMON
    ),
    "electra": {**_COMMON, "embedding_size": 16},
    "deberta": {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "eurobert": {**_GROUPED, **_SPECIAL},
    "deberta-v2": {**_COMMON, **_DEBERTA, "norm_rel_ebd": "layer_norm"},
    "distilbert": {
        "vocab_size": 64,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 40,
        "initializer_range": 0.1,
    },
    "modernbert": {
        **_COMMON,
        **_SPECIAL,
        "global_attn_every_n_layers": 2,
        "local_attention": 6,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "initializer_cutoff_factor": 2.0,
    },
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,  # with projections in and out, as OPT-350M
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "init_std": 0.1,
    },
    **dict.fromkeys(("gpt2", "gpt_bigcode"), {**_SIZES, "n_positions": 40}),
    "gptj": {**_SIZES, "n_positions": 40, "rotary_dim": 4, **_SPECIAL},
    "codegen": {**_SIZES, "n_positions": 40, "rotary_dim": 4, **_SPECIAL},
    "gpt_neo": {
        **_COMMON,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        **_SPECIAL,
    },
    "gpt_neox": _COMMON,
    "falcon": {**_COMMON, "num_kv_heads": 2, "new_decoder_architecture": True, **_SPECIAL},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "mpt": {
        "vocab_size": 64,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "expansion_ratio": 2,
        "initializer_range": 0.1,
    },
    "phi": {**_GROUPED, **_SPECIAL},
    **dict.fromkeys(("llama", "helium", "apertus", "arcee", "glm", "glm4"), _DECODER),
    **dict.fromkeys(("granite", "cohere", "olmo", "stablelm", "nemotron", "starcoder2", "smollm3"), _GROUPED),
    **dict.fromkeys(("cohere2", "olmo2", "olmo3", "exaone4", "seed_oss", "ministral3"), _DECODER),
    "mistral": {**_DECODER, "sliding_window": 4},
    "qwen2": _GROUPED,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 0.5},
    "gemma3_text": {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3": {
        "text_config": {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4},
        "vision_config": {**_COMMON, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "phi3": {**_GROUPED, **_SPECIAL},
    "qwen3_5_text": {
        **_DECODER,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    "mixtral": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen2_moe": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
}
MASKED = (
    *("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "ernie", "megatron-bert", "mpnet"),
    *("deberta", "deberta-v2", "distilbert", "modernbert", "eurobert"),
)
SEQ2SEQ = ("t5", "mt5", "umt5", "bart", "mbart")
FAMILIES = sorted(SETTINGS)


def build(model_type: str, auto=None, **settings):
    """Return the family's model with a language-model head (or of the class ``auto``), the same at every call."""
    torch.manual_seed(0)
    known = SETTINGS[model_type]
    if "text_config" in known and (blocks := settings.pop("num_hidden_layers", None)):
        known = {**known, "text_config": {**known["text_config"], "num_hidden_layers": blocks}}
    config = transformers.AutoConfig.for_model(model_type, **{"pad_token_id": 0, **known, **settings})
    if auto is None:
        auto = (
            transformers.AutoModelForMaskedLM
            if model_type in MASKED
            else transformers.AutoModelForSeq2SeqLM
            if model_type in SEQ2SEQ
            else transformers.AutoModelForCausalLM
        )
    return auto.from_config(config).eval()


def adapted(model_type: str, noise: float = 0.3, auto=None, task_type=None, **config):
    """Return the model with TT adapters away from the identity by ``noise``."""
    settings = {"rank": 2, "bottleneck": 8, "act": "gelu", "task_type": task_type, **config}
    model = get_peft_model(build(model_type, auto), TTConfig(**settings)).eval()
    return moved(model, noise)


def batch_for(model, rows: int, tokens: int, seed: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Return inputs with padding and one or two labels a row, of the kind that the model's head predicts."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, tokens), generator=g)
    lengths = torch.tensor([tokens - i % 3 if tokens > 4 else tokens for i in range(rows)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    kind = kind_of(model)
    scored = (torch.arange(tokens) >= lengths[:, None] - 2) & mask.bool()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(scored, torch.tensor(-100))}
    if left:
        shift = (torch.arange(tokens) - (tokens - lengths)[:, None]) % tokens
        batch = {name: value.gather(1, shift) for name, value in batch.items()}
    if kind == "seq2seq":
        batch["labels"] = torch.randint(3, 64, (rows, 3), generator=g)
        batch["labels"][::2, 2] = -100
    return batch


def row_alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return one row of a batch without its padding."""
    real = batch["attention_mask"][row].bool()
    return {
        name: value[row : row + 1] if value.shape[1] != len(real) else value[row : row + 1, real]
        for name, value in batch.items()
    }
