"""Where a model gets its adapters: module names per model type, and whether an adapter stands before or after one.

``"paper"`` follows the text of AdaZeta (arXiv 2406.18060, section 3.1): one adapter after the attention output and one
after the MLP output of every block. ``"published"`` follows the code the authors published for Llama: adapters before
the gate and up projections and after the down projection. ``"mlp"`` keeps only the adapter after the MLP output.
"""

import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

PLACEMENTS = ("post", "pre", "none")
NAMED = ("paper", "published", "mlp")

_LLAMA = {
    "paper": {"o_proj": "post", "down_proj": "post"},
    "published": {"gate_proj": "pre", "up_proj": "pre", "down_proj": "post"},
}
_NO_GATE = {**_LLAMA, "published": {"up_proj": "pre", "down_proj": "post"}}
_FUSED_GATE = {**_LLAMA, "published": {"gate_up_proj": "pre", "down_proj": "post"}}
_BERT = {
    "paper": {"attention.output.dense": "post", "output.dense": "post"},
    # The attention's module has a name that ends like the MLP's.
    "published": {"intermediate.dense": "pre", "output.dense": "post", "attention.output.dense": "none"},
}
_BART = {"paper": {"out_proj": "post", "fc2": "post"}, "published": {"fc1": "pre", "fc2": "post"}}
_GPT2 = {
    "paper": {"attn.c_proj": "post", "mlp.c_proj": "post"},
    "published": {"c_fc": "pre", "mlp.c_proj": "post"},
}
_GPTJ = {"paper": {"attn.out_proj": "post", "fc_out": "post"}, "published": {"fc_in": "pre", "fc_out": "post"}}
_FALCON = {
    "paper": {"self_attention.dense": "post", "dense_4h_to_h": "post"},
    "published": {"dense_h_to_4h": "pre", "dense_4h_to_h": "post"},
}
_T5 = {
    "paper": {"SelfAttention.o": "post", "EncDecAttention.o": "post", "DenseReluDense.wo": "post"},
    "published": {"wi": "pre", "wi_0": "pre", "wi_1": "pre", "DenseReluDense.wo": "post"},
}
# The experts of a block are one module with fused weights: the adapter stands after their weighted sum. The published
# code adapts single projections, which is nothing that fused experts have.
_EXPERTS = {"paper": {"o_proj": "post", "mlp": "post"}}

_MODELS = [
    (_LLAMA, "llama mistral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma3 smollm3 granite cohere cohere2"),
    (_LLAMA, "olmo olmo2 olmo3 stablelm exaone4 seed_oss helium eurobert"),
    (_NO_GATE, "nemotron arcee apertus"),
    (_FUSED_GATE, "phi3 glm glm4"),
    (_EXPERTS, "mixtral qwen2_moe qwen3_moe olmoe gpt_oss"),
    (_BERT, "bert roberta xlm-roberta xlm-roberta-xl camembert electra ernie megatron-bert deberta deberta-v2"),
    (_BART, "opt bart mbart"),
    (_GPT2, "gpt2 gpt_bigcode"),
    (_GPTJ, "gptj codegen"),
    (_FALCON, "falcon bloom"),
    (_T5, "t5 mt5 umt5"),
]
#: model_type -> {"paper" | "published": {module name: placement}}. The output projection is the last operation of its
#: sub-block in all of these, so an adapter after it is an adapter after the attention (or MLP) output. The MLP's output
#: comes last in "paper".
SITES: dict[str, dict[str, dict[str, str]]] = {
    **{model_type: sites for sites, names in _MODELS for model_type in names.split()},
    # Blocks of two kinds: a linear attention or a convolution stands where others have attention.
    "qwen3_5_text": {**_LLAMA, "paper": {"linear_attn.out_proj": "post", **_LLAMA["paper"]}},
    "lfm2": {
        "paper": {"conv.out_proj": "post", "self_attn.out_proj": "post", "feed_forward.w2": "post"},
        "published": {"feed_forward.w1": "pre", "feed_forward.w3": "pre", "feed_forward.w2": "post"},
    },
    "starcoder2": {"paper": {"o_proj": "post", "mlp.c_proj": "post"}, "published": _GPT2["published"]},
    "phi": {"paper": {"self_attn.dense": "post", "fc2": "post"}, "published": _BART["published"]},
    "mpt": {"paper": {"attn.out_proj": "post", "down_proj": "post"}, "published": _NO_GATE["published"]},
    "gpt_neo": {"paper": {"attention.out_proj": "post", "mlp.c_proj": "post"}, "published": _GPT2["published"]},
    "gpt_neox": {"paper": {"attention.dense": "post", "dense_4h_to_h": "post"}, "published": _FALCON["published"]},
    "mpnet": {
        "paper": {"attn.o": "post", "output.dense": "post"},
        "published": {"intermediate.dense": "pre", "output.dense": "post"},
    },
    "distilbert": {"paper": {"out_lin": "post", "lin2": "post"}, "published": {"lin1": "pre", "lin2": "post"}},
    "modernbert": {"paper": {"attn.Wo": "post", "mlp.Wo": "post"}, "published": {"mlp.Wi": "pre", "mlp.Wo": "post"}},
}


def candidate_modules(model: nn.Module) -> list[str]:
    """Return the names that ``sites`` or ``target_modules`` may take: linear layers of the model's repeated blocks.

    Names are told without the block's index, ``self_attn.o_proj`` for ``model.layers.7.self_attn.o_proj``, in the
    order of the model's modules. A model without blocks tells all of its linear layers.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    inner = [match[1] for match in (re.match(r".*\.\d+\.(.+)", name) for name in linear) if match]
    return list(dict.fromkeys(inner or linear))


def resolve_sites(
    sites: str | Iterable[str] | Mapping[str, str], model_type: str | None, candidates: Iterable[str] = ()
) -> dict[str, str]:
    """Return ``{module name: "pre" | "post" | "none"}`` for ``sites`` of a model of type ``model_type``.

    Args:
        sites: ``"paper"``, ``"published"``, ``"mlp"``, a list of module names (``"o_proj"`` or
            ``"post:o_proj"`` puts the adapter after the module, ``"pre:up_proj"`` before it), or the mapping itself.
        model_type: ``config.model_type`` of the base model; only needed for the named choices.
        candidates: module names to tell of in the error about an unknown model type (:func:`candidate_modules`).

    Raises:
        ValueError: unknown choice, unknown model type, or another placement.
    """
    if isinstance(sites, Mapping):
        placed = dict(sites)
    elif isinstance(sites, str):
        if sites not in NAMED:
            raise ValueError(f"sites must be one of {NAMED} or a list of module names, got {sites!r}")
        if model_type not in SITES:
            modules = ", ".join(candidates)
            raise ValueError(
                f"no adapter sites are known for model type {model_type!r} (known: {', '.join(sorted(SITES))}); name "
                "the modules yourself: sites=['o_proj', 'down_proj'] puts adapters after them, 'pre:up_proj' before it"
                + (f"; linear layers of this model: {modules}" if modules else "")
            )
        if sites == "published" and sites not in SITES[model_type]:
            raise ValueError(
                f"model type {model_type!r} has no 'published' sites: its experts are one module with fused weights; "
                "use sites='paper' or 'mlp', or name modules"
            )
        placed = SITES[model_type]["paper" if sites == "mlp" else sites]
        if sites == "mlp":  # the tables name the attention's module first, the MLP's last
            mlp = list(placed)[-1]
            placed = {name: placement if name == mlp else "none" for name, placement in placed.items()}
    else:
        placed = {}
        for entry in sites:
            placement, separator, name = entry.partition(":")
            placed[name if separator else entry] = placement if separator else "post"
    for name, placement in placed.items():
        if placement not in PLACEMENTS:
            raise ValueError(f"placement of {name!r} must be one of {PLACEMENTS}, got {placement!r}")
    return dict(placed)


def resolve_layers(layers: int | Iterable[int] | str | None, model_config: Mapping) -> int | list[int] | None:
    """Return the block indices that ``layers`` names; ``"middle"`` runs from a third of the depth to three quarters.

    Raises:
        ValueError: no index, one that is not an integer, one beyond the last block, another string, or ``"middle"`` of
            a model whose configuration does not say how many blocks it has.
    """
    if layers is None:
        return None
    # GPT-2, DistilBERT, T5 and BART have their own.
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
    parts = [model_config, model_config.get("text_config") or {}]  # of models that also read images
    number = next((part[name] for part in parts for name in names if part.get(name)), 0)
    if not isinstance(layers, str):
        indices = [layers] if isinstance(layers, int) else list(layers)
        most = max(number, *(model_config.get(name) or 0 for name in ("num_decoder_layers", "decoder_layers")))
        wrong = [index for index in indices if not isinstance(index, int) or index < 0 or (most and index >= most)]
        if wrong or not indices:
            blocks = f"indices of the model's {most} blocks, 0 to {most - 1}" if most else "indices of blocks"
            raise ValueError(f"layers_to_transform must be {blocks}, got {layers!r}")
        return layers
    if layers != "middle":
        raise ValueError(f"layers_to_transform must be indices of blocks or 'middle', got {layers!r}")
    if not number:
        raise ValueError("layers_to_transform='middle' needs a model configuration with num_hidden_layers")
    return list(range(number // 3, max(number // 3 + 1, 3 * number // 4)))


def placement_of(key: str, sites: Mapping[str, str]) -> str:
    """Return the placement of the module named ``key``: the longest matching name in ``sites`` wins, else ``post``."""
    matches = [name for name in sites if key == name or key.endswith(f".{name}")]
    return sites[max(matches, key=len)] if matches else "post"
