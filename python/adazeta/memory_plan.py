"""``adazeta info --plan MODEL``: the memory that training will take, told before anything is loaded."""

from __future__ import annotations

from adazeta.base_models import model_folder, told_in_one_line
from adazeta.errors import UserError
from adazeta.memory import MIB, available_bytes, resident_bytes
from adazeta.report import facts


def plan_memory(
    name: str,
    *,
    rank: int = 5,
    bottleneck: int = 64,
    dtype: str = "float32",
    batch_size: int = 16,
    tokens: int = 64,
    directions: str | int = "batch",
    scored: int = 0,
    generated: int = 0,
    memory_budget: int | None = None,
    say=lambda line: None,
) -> dict[str, int]:
    """Return the bytes that training a TT adapter takes: libraries, weights, adapter, one forward, their sum.

    Only the model's configuration is read. Weights are in memory once, and one forward is alive at a time.

    Args:
        name: base model folder, or ``smollm2``.
        rank, bottleneck: of the adapter, at the sites of ``"paper"``.
        dtype: float32, mixed, bfloat16 or float16.
        batch_size: examples in a step.
        tokens: length of the longest example.
        directions: ``"batch"``, ``"example"`` or groups, as in :class:`adazeta.ZerothOrder`.
        scored: tokens of an example that are scored with the whole vocabulary, as ``--task completion`` does.
        generated: tokens of an answer that is generated, as for ``--objective f1``: keys and values are kept for it.
        memory_budget: bytes of a forward; None is half of what is free beside the weights.

    Returns:
        ``libraries`` (a process that holds nothing yet), ``weights``, ``adapter``, ``forward``, ``cache`` (keys and
        values of answers) and ``peak`` in bytes, ``probes`` in a forward and the ``rows`` of each in it.

    Numerics: the peak comes within a tenth of the resident memory that is then measured; activations count without what
    the allocator leaves unused between them.

    Raises:
        UserError: no such model, one of an unknown type or whose adapter sites are not known, one whose forward cannot
            be told without its numbers, or a budget too small for one probe.
    """
    import peft
    import torch
    import transformers

    from adazeta import TTConfig
    from adazeta.footprint import cache_bytes, forward_bytes
    from adazeta.frozen import mix
    from adazeta.planner import Planner
    from adazeta.probes import groups_of

    folder = model_folder(name, say)
    stored = torch.float32 if dtype == "mixed" else getattr(torch, dtype)
    with torch.device("meta"):
        with told_in_one_line(f"{name} describes no model that can be made"):
            only_here = {"local_files_only": True, "trust_remote_code": False}
            config = transformers.AutoConfig.from_pretrained(folder, **only_here)
            architecture = getattr(transformers, (config.architectures or ["none"])[0], None)
            model = architecture(config) if architecture else transformers.AutoModelForCausalLM.from_config(config)
        model = model.to(stored).requires_grad_(False).eval()
        if dtype == "mixed":
            mix(model)
        weights = _bytes_of(model)
        try:
            adapted = peft.get_peft_model(model, TTConfig(rank=rank, bottleneck=bottleneck))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    other = "" if dtype == "bfloat16" else "; --dtype bfloat16 may be"
    with told_in_one_line(f"{name}: the memory of a forward in {dtype} is not known beforehand{other}"):
        forward_bytes(adapted, 1, tokens, tt_model=adapted.base_model)  # experts: torch tells of no float32 for them
    rows = batch_size // groups_of(directions, batch_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if memory_budget is None and device == "cpu":
        memory_budget = max(1, (available_bytes() - weights) // 2)
    planner = Planner(adapted, tt_model=adapted.base_model, memory_budget=memory_budget)
    planner.scored, planner.generated, planner.rows_apart = min(scored, tokens), generated, True
    probes = planner.probes(rows, tokens, device)
    at_once = probes * rows if probes > 1 else planner.rows_at_once(rows, tokens, device)
    found = {
        "weights": weights,
        "adapter": _bytes_of(adapted) - weights,
        "forward": forward_bytes(adapted, at_once, tokens, scored=planner.scored, tt_model=adapted.base_model),
        "cache": at_once * cache_bytes(adapted, tokens, generated) if generated else 0,
    }
    # Asked last, when the libraries that a run uses have been loaded; nothing of the model was.
    _load_products({stored, torch.float32, torch.bfloat16 if dtype == "mixed" else stored})
    found["libraries"] = resident_bytes() or 0
    return {**found, "peak": sum(found.values()), "probes": probes, "rows": min(rows, at_once)}


def describe_plan(name: str, **settings) -> str:
    """Return :func:`plan_memory`'s answer as lines to print."""
    plan = plan_memory(name, **settings)

    def mib(key):
        return f"{plan[key] / MIB:,.1f} MiB"

    tokens = settings.get("tokens", 64)
    return facts(
        [
            ("weights", f"{mib('weights')} in {settings.get('dtype', 'float32')}"),
            ("adapter", mib("adapter")),
            ("one forward", f"{mib('forward')}: {plan['probes']} probes x {plan['rows']} rows x {tokens} tokens"),
            *([("keys, values", f"{mib('cache')} of generated answers")] if plan["cache"] else []),
            ("Python, libraries", mib("libraries")),
            ("peak of training", mib("peak")),
        ]
    )


def _load_products(dtypes) -> None:
    """Let the libraries load and set up what a first forward uses of them: tens of MiB."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        for dtype in dtypes:
            x = torch.ones(1, 1, 512, 512, dtype=dtype)
            F.scaled_dot_product_attention(F.linear(x[0, 0], x[0, 0])[None, None], x, x)


def _bytes_of(model) -> int:
    """Bytes of parameters and buffers, a tied weight once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
