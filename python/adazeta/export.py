"""Write a trained adapter in a form that other tools read: its factors, a LoRA adapter, or a merged model.

An adapter with the identity as activation is a linear map, ``y + s ((y D + b1) U + b2)`` with ``D = L1 R1`` and
``U = L2 R2``. Behind a linear layer ``y = x W^T + c`` that is ``y + s x (W^T D U) + s ((c D + b1) U + b2)``, before one
``y + s x (D U W^T) + s (b1 U + b2) W^T``: a LoRA of the layer, of the adapter's rank, with a bias.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adazeta_kernels import tt_factors

from .errors import UserError
from .files import replacing_folder
from .quantized import is_quantized
from .runs import Classifier, is_run, read_json, write_json

FORMS = ("low-rank", "lora", "merged")
FACTORS, FACTORS_CARD = "low_rank.safetensors", "low_rank.json"
NAMES = ("L1", "R1", "b1", "L2", "R2", "b2")
FORMULA = "y = x + scale * ((act((x L1) R1 + b1) L2) R2 + b2)"
#: What is in an export alone: a LoRA adapter or a model of another origin has all the other files too.
MARKER = "adazeta_export.json"
EXPORTED = (FACTORS_CARD, MARKER)


@dataclass(frozen=True)
class Factors:
    """One adapter at its trained numbers: ``y = x + scale * ((act((x L1) R1 + b1) L2) R2 + b2)``.

    Args:
        module: name of the module in the base model.
        placement: ``post``: x is the module's output, ``pre``: its input.
        act: ``relu | gelu | silu | tanh | identity``.
        scale: factor on the branch.
        positions: ``all`` tokens, or the ``last`` one of a prompt.
        L1, R1, L2, R2: ``[d, r1]``, ``[r1, b]``, ``[b, r2]``, ``[r2, d]`` float32.
        b1, b2: ``[b]`` and ``[d]`` float32, or None.
    """

    module: str
    placement: str
    act: str
    scale: float
    positions: str
    L1: torch.Tensor
    R1: torch.Tensor
    b1: torch.Tensor | None
    L2: torch.Tensor
    R2: torch.Tensor
    b2: torch.Tensor | None


@dataclass(frozen=True)
class LinearUpdate:
    """What an adapter adds to a linear layer, ``x A^T B^T + bias``: A ``[r, in]``, B ``[out, r]``, bias ``[out]``."""

    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None


def factors_of(model, adapter: str = "default") -> list[Factors]:
    """Return the factors of every adapter of a PEFT model, as its own forward computes them, in the model's order."""
    found = []
    zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    for name, layer in model.base_model.tt_layers(adapter):
        layout = layer.layout[adapter]
        factors = tt_factors(layer.tt_theta[adapter].detach(), layout, *zero)
        parts = [None if part is None else part[0].cpu().contiguous() for part in layout.split_factors(factors)]
        settings = [getattr(layer, key)[adapter] for key in ("placement", "act", "scale", "positions")]
        found.append(Factors(name, *settings, *parts))
    return found


def linear_update(factors: Factors, base: nn.Module) -> LinearUpdate:
    """Return the low-rank update of the linear layer ``base`` that equals the adapter, computed in float64.

    Raises:
        UserError: the activation is not the identity, the adapter acts on the last token only, or ``base`` is no plain
            linear layer, such as a quantised one.
    """
    name = factors.module
    _check_linear(factors.act, factors.positions, f"the adapter at {name}")
    plain = type(base) in (nn.Linear, Conv1D)
    if not plain or is_quantized(base.weight):  # torchao leaves the layer's class as it is
        kind = type(base.weight if plain else base).__name__
        raise UserError(
            f"the adapter at {name} stands at a {kind}, not at a linear layer of plain numbers, whose weight could "
            "take it: name linear layers with --sites in training, leave --quantize out, or use --to low-rank"
        )
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).double().cpu()  # [out, in]
    L1, R1, L2, R2 = (getattr(factors, part).double() for part in ("L1", "R1", "L2", "R2"))
    down, up = L1, factors.scale * (R1 @ L2 @ R2)  # [d, r1], [r1, d]
    A, B = (down.T, weight @ up.T) if factors.placement == "pre" else (down.T @ weight, up.T)
    added = torch.zeros(len(up.T), dtype=torch.float64)  # what the branch gives for a zero
    if factors.b1 is not None:
        added = factors.scale * (factors.b1.double() @ L2 @ R2 + factors.b2.double())
    if factors.placement == "pre":
        added = weight @ added
    elif base.bias is not None:
        added = added + base.bias.double().cpu() @ down @ up
    return LinearUpdate(A.float(), B.float(), added.float() if bool(added.any()) else None)


def _check_linear(act: str, positions: str, what: str) -> None:
    if act != "identity":
        raise UserError(
            f"{what} has the activation {act}: only without one (--act identity in training) is it a linear map, which "
            "a LoRA or a merged weight can be; --to low-rank takes any"
        )
    if positions != "all":
        raise UserError(
            f"{what} acts on the last token of a prompt alone, a LoRA or a merged weight on every token: train with "
            "--positions all, or use --to low-rank"
        )


def export(
    name: str | Path, output: str | Path, to: str, *, dtype: str = "float32", overwrite: bool = False, say=print
) -> Path:
    """Write the adapter of a run in another form; return the folder.

    Args:
        name: run folder.
        output: the folder to write; it appears when all of it is written.
        to: ``low-rank`` (the factors, :func:`read_low_rank`), ``lora`` (a PEFT LoRA adapter) or ``merged`` (a
            transformers model without adapters).
        dtype: of a merged model's numbers: float32 is exact, bfloat16 and float16 round the sum.
        overwrite: replace an earlier export at ``output``.
        say: told what happens.

    Raises:
        UserError: no run, an adapter that cannot have this form (which says why), or ``output`` is in the way.
    """
    name, output = Path(name), Path(output)
    if to not in FORMS:
        raise UserError(f"--to must be one of {', '.join(FORMS)}, got {to!r}")
    if not is_run(name):
        raise UserError(f"{name} is not a run folder: give the --output of `adazeta train`")
    if to != "low-rank":  # said before the model is read
        config = read_json(name / "adapter_config.json")
        _check_linear(config.get("act", "relu"), config.get("positions", "all"), f"the adapter in {name}")
    with replacing_folder(output, overwrite=overwrite, ours=EXPORTED) as folder:
        classifier = Classifier.open(str(name), dtype="float32", say=say)
        factors = factors_of(classifier.model)
        if to == "low-rank":
            _write_low_rank(folder, classifier, factors)
        else:
            _write_linear(folder, classifier, factors, to, dtype, say)
    return output


def read_low_rank(folder: str | Path) -> list[Factors]:
    """Return what ``--to low-rank`` wrote.

    With ``tt_linear`` of ``adazeta_kernels``, which take probes first: ``h = act(tt_linear(x, L1, R1, b1))``, ``y = x +
    scale * tt_linear(h, L2, R2, b2)``, each of ``f.L1[None]`` and so on.
    """
    folder = Path(folder)
    card, tensors = read_json(folder / FACTORS_CARD), load_file(folder / FACTORS)
    return [
        Factors(
            **{key: site[key] for key in ("module", "placement", "act", "scale", "positions")},
            **{part: tensors.get(f"{site['module']}.{part}") for part in NAMES},
        )
        for site in card["sites"]
    ]


def _write_low_rank(folder: Path, classifier: Classifier, factors: list[Factors]) -> None:
    from peft import get_peft_model_state_dict

    tensors, sites = {}, []
    for site in factors:
        parts = {part: getattr(site, part) for part in NAMES if getattr(site, part) is not None}
        tensors |= {f"{site.module}.{part}": value for part, value in parts.items()}
        about = {key: value for key, value in vars(site).items() if key not in NAMES}
        sites.append({**about, "shapes": {part: list(value.shape) for part, value in parts.items()}})
    trained = get_peft_model_state_dict(classifier.model)  # a head that was trained along
    others = {key: value for key, value in trained.items() if "tt_theta" not in key}
    others = {key.removeprefix("base_model.model."): value.cpu().contiguous() for key, value in others.items()}
    save_file({**tensors, **others}, folder / FACTORS, metadata={"format": "pt"})
    write_json(
        folder / FACTORS_CARD,
        {
            "format": 1,
            "formula": FORMULA,
            "base_model": Path(classifier.card["base_model"]).name,
            "task": classifier.card["task"],
            "sites": sites,
            "whole_modules": sorted(others),
        },
    )


def _write_linear(folder: Path, classifier: Classifier, factors: list[Factors], to: str, dtype: str, say) -> None:
    from .heads import Pooled
    from .progress import progress_bar

    model = classifier.model
    if isinstance(model.get_base_model(), Pooled):
        raise UserError(
            "a head on a mean of the hidden states (--pooling mean, attention) is no model of transformers: use --to "
            "low-rank, or train with --pooling own"
        )
    layers = dict(model.base_model.tt_layers("default"))
    updates = {}
    with progress_bar(len(factors), f"export to {to}", "sites") as bar:
        for site in factors:
            updates[site.module] = linear_update(site, layers[site.module].base_layer)
            bar.update()
    if to == "merged":
        _check_mergeable(model, updates, {name: layer.base_layer for name, layer in layers.items()})
    wanted = _outputs(model)
    base = _without_adapters(model)
    if to == "lora":
        exported = _with_lora(base, updates, model.peft_config["default"])
    else:
        exported = _merged(base, updates)
        for parameter in exported.parameters():  # alone: buffers are made anew, not rounded, where the model is loaded
            parameter.data = parameter.to(getattr(torch, dtype))
    found = _outputs(exported)  # of what is written: rounded
    say(
        f"largest difference to the run's own outputs on random tokens: {float((found - wanted).abs().max()):.1e} "
        f"(outputs up to {float(wanted.abs().max()):.1f})"
    )
    if to == "merged":
        classifier.tokenizer.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes biases for parts of sharded weights
        exported.save_pretrained(folder)
    write_json(folder / MARKER, {"format": 1, "form": to})
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card, which names local folders


def _check_mergeable(model, updates: dict[str, LinearUpdate], layers: dict[str, nn.Module]) -> None:
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, update in updates.items():
        if update.bias is not None and layers[name].bias is None:
            raise UserError(
                f"the adapter at {name} adds a bias, and this layer has none in the model's architecture: train "
                "with --no-bias, or use --to lora"
            )
        if owners[id(layers[name].weight)] > 1:
            raise UserError(f"the weight of {name} is used elsewhere in the model too (tied): use --to lora")


def _without_adapters(model) -> nn.Module:
    """Return the base model, with whole trained modules (heads) in their places and without adapters."""
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.load_state_dict(module.modules_to_save["default"].state_dict())
            parent, _, child = name.rpartition(".")  # PEFT's `unload` puts back single layers alone
            setattr(base.get_submodule(parent), child, module.original_module)
    return model.base_model.unload()


def _with_lora(base: nn.Module, updates: dict[str, LinearUpdate], config):
    from peft import LoraConfig, get_peft_model

    ranks = {name: len(update.A) for name, update in updates.items()}
    rank = max(ranks.values())
    others = {name: r for name, r in ranks.items() if r != rank}
    biased = any(update.bias is not None for update in updates.values())
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(updates),
        lora_bias=biased,
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in updates),
        task_type=config.task_type,
        modules_to_save=config.modules_to_save,
        inference_mode=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a layer without a bias could not merge one
        lora = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, update in updates.items():
            layer = lora.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(update.A)
            layer.lora_B["default"].weight.copy_(update.B)
            if biased:
                layer.lora_B["default"].bias.copy_(0.0 if update.bias is None else update.bias)
    return lora


@torch.no_grad()
def _merged(base: nn.Module, updates: dict[str, LinearUpdate]) -> nn.Module:
    for name, update in updates.items():
        layer = base.get_submodule(name)
        change = (update.B.double() @ update.A.double()).to(layer.weight.device)  # [out, in]
        layer.weight.copy_(layer.weight.double() + (change.T if isinstance(layer, Conv1D) else change))
        if update.bias is not None:
            layer.bias.add_(update.bias.to(layer.bias.device))
    return base


@torch.no_grad()
def _outputs(model) -> torch.Tensor:
    """Return the logits for two rows of random tokens."""
    config = model.config.get_text_config()
    ids = torch.randint(3, config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder and config.eos_token_id is not None:  # their heads look for one end a row
        ids[ids == config.eos_token_id] = 3 + (config.eos_token_id == 3)
        ids[:, -1] = config.eos_token_id
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs).logits.float().cpu()
