"""Where a model gets its adapters: module names per model type, and whether an adapter stands before or after one.

``"paper"`` follows the text of AdaZeta (arXiv 2406.18060, section 3.1): one adapter after the attention output and one
after the MLP output of every block. ``"published"`` follows the code the authors published for Llama: adapters before
the gate and up projections and after the down projection.
"""

from collections.abc import Iterable, Mapping

PLACEMENTS = ("post", "pre")

_LLAMA_PAPER = {"o_proj": "post", "down_proj": "post"}
_LLAMA_PUBLISHED = {"gate_proj": "pre", "up_proj": "pre", "down_proj": "post"}
_BERT_PAPER = {"attention.output.dense": "post", "output.dense": "post"}

#: model_type -> {"paper" | "published": {module name: placement}}. The output projection is the last operation of its
#: sub-block in all of these, so an adapter after it is an adapter after the attention (or MLP) output.
SITES: dict[str, dict[str, dict[str, str]]] = {
    **{
        name: {"paper": _LLAMA_PAPER, "published": _LLAMA_PUBLISHED}
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")
    },
    **{name: {"paper": _BERT_PAPER, "published": {"output.dense": "post"}} for name in ("bert", "roberta")},
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
    """Return ``{module name: "pre" | "post"}`` for ``sites`` of a model of type ``model_type``.

    Args:
        sites: ``"paper"``, ``"published"``, a list of module names (``"o_proj"`` or ``"post:o_proj"`` puts the adapter
            after the module, ``"pre:up_proj"`` before it), or the mapping itself.
        model_type: ``config.model_type`` of the base model; only needed for the two named choices.

    Raises:
        ValueError: unknown choice, unknown model type, or a placement other than ``pre`` and ``post``.
    """
    if isinstance(sites, Mapping):
        placed = dict(sites)
    elif isinstance(sites, str):
        if sites not in ("paper", "published"):
            raise ValueError(f"sites must be 'paper', 'published' or a list of module names, got {sites!r}")
        if model_type not in SITES:
            raise ValueError(
                f"no adapter sites are known for model type {model_type!r} (known: {', '.join(sorted(SITES))}); name the "
                "modules yourself: sites=['o_proj', 'down_proj'] puts an adapter after each, 'pre:up_proj' before it"
            )
        placed = SITES[model_type][sites]
    else:
        placed = {}
        for entry in sites:
            placement, separator, name = entry.partition(":")
            placed[name if separator else entry] = placement if separator else "post"
    for name, placement in placed.items():
        if placement not in PLACEMENTS:
            raise ValueError(f"placement of {name!r} must be one of {PLACEMENTS}, got {placement!r}")
    return dict(placed)


def placement_of(key: str, sites: Mapping[str, str]) -> str:
    """Return the placement of the module named ``key``: the longest matching name in ``sites`` wins, else ``post``."""
    matches = [name for name in sites if key == name or key.endswith(f".{name}")]
    return sites[max(matches, key=len)] if matches else "post"
