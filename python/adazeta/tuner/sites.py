"""Where a model gets its adapters: module names per model type, and whether an adapter stands before or after one.

``"paper"`` follows the text of AdaZeta (arXiv 2406.18060, section 3.1): one adapter after the attention output and one
after the MLP output of every block. ``"published"`` follows the code the authors published for Llama: adapters before
the gate and up projections and after the down projection. ``"mlp"`` keeps only the adapter after the MLP output.
"""

from collections.abc import Iterable, Mapping

PLACEMENTS = ("post", "pre", "none")
NAMED = ("paper", "published", "mlp")

_LLAMA_PAPER = {"o_proj": "post", "down_proj": "post"}
_LLAMA_PUBLISHED = {"gate_proj": "pre", "up_proj": "pre", "down_proj": "post"}
_BERT_PAPER = {"attention.output.dense": "post", "output.dense": "post"}
_BERT_PUBLISHED = {**_BERT_PAPER, "attention.output.dense": "none"}  # its name ends like the MLP's

#: model_type -> {"paper" | "published": {module name: placement}}. The output projection is the last operation of its
#: sub-block in all of these, so an adapter after it is an adapter after the attention (or MLP) output.
SITES: dict[str, dict[str, dict[str, str]]] = {
    **{
        name: {"paper": _LLAMA_PAPER, "published": _LLAMA_PUBLISHED}
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")
    },
    **{name: {"paper": _BERT_PAPER, "published": _BERT_PUBLISHED} for name in ("bert", "roberta")},
    "opt": {"paper": {"out_proj": "post", "fc2": "post"}, "published": {"fc1": "pre", "fc2": "post"}},
    "gpt2": {
        "paper": {"attn.c_proj": "post", "mlp.c_proj": "post"},
        "published": {"c_fc": "pre", "mlp.c_proj": "post"},
    },
    "gpt_neox": {
        "paper": {"attention.dense": "post", "dense_4h_to_h": "post"},
        "published": {"dense_h_to_4h": "pre", "dense_4h_to_h": "post"},
    },
}


def resolve_sites(sites: str | Iterable[str] | Mapping[str, str], model_type: str | None) -> dict[str, str]:
    """Return ``{module name: "pre" | "post" | "none"}`` for ``sites`` of a model of type ``model_type``.

    Args:
        sites: ``"paper"``, ``"published"``, ``"mlp"``, a list of module names (``"o_proj"`` or
            ``"post:o_proj"`` puts the adapter after the module, ``"pre:up_proj"`` before it), or the mapping itself.
        model_type: ``config.model_type`` of the base model; only needed for the named choices.

    Raises:
        ValueError: unknown choice, unknown model type, or another placement.
    """
    if isinstance(sites, Mapping):
        placed = dict(sites)
    elif isinstance(sites, str):
        if sites not in NAMED:
            raise ValueError(f"sites must be one of {NAMED} or a list of module names, got {sites!r}")
        if model_type not in SITES:
            raise ValueError(
                f"no adapter sites are known for model type {model_type!r} (known: {', '.join(sorted(SITES))}); name "
                "the modules yourself: sites=['o_proj', 'down_proj'] puts adapters after them, 'pre:up_proj' before it"
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
        ValueError: another string, or a model whose configuration does not say how many blocks it has.
    """
    if not isinstance(layers, str):
        return layers
    if layers != "middle":
        raise ValueError(f"layers_to_transform must be indices of blocks or 'middle', got {layers!r}")
    number = model_config.get("num_hidden_layers") or model_config.get("n_layer")
    if not number:
        raise ValueError("layers_to_transform='middle' needs a model configuration with num_hidden_layers")
    return list(range(number // 3, max(number // 3 + 1, 3 * number // 4)))


def placement_of(key: str, sites: Mapping[str, str]) -> str:
    """Return the placement of the module named ``key``: the longest matching name in ``sites`` wins, else ``post``."""
    matches = [name for name in sites if key == name or key.endswith(f".{name}")]
    return sites[max(matches, key=len)] if matches else "post"
