"""Base models: what kind a folder holds, and how it is loaded, frozen, with the head that a task needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from adazeta.errors import UserError

Say = Callable[[str], None]
#: Ends of names that tell what a class of transformers is, without loading torch to look it up.
_TOLD_BY_NAME = {"ForCausalLM": "causal", "ForMaskedLM": "masked", "ForSequenceClassification": "head"}
DTYPES = ("float32", "mixed", "bfloat16", "float16")


def model_folder(name: str, say: Say = lambda line: None) -> Path:
    """Return the folder of a base model.

    ``smollm2``, ``minilm`` and ``hub:OWNER/NAME`` are fetched, if need be; a GGUF file, or a folder with one, becomes
    a folder in our cache.
    """
    from adazeta import assets
    from adazeta.gguf_models import gguf_file, gguf_folder
    from adazeta.hub_models import could_be_hub_name, hub_folder, is_hub_name

    fetched = {assets.MODEL_NAME: assets.model_dir, assets.ENCODER_NAME: assets.encoder_dir}
    if name in fetched and not Path(name).is_dir():
        return fetched[name](say)
    if is_hub_name(name):
        return hub_folder(name, say)
    if (file := gguf_file(name)) is not None:
        return gguf_folder(file, say)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        at_hub = f" (hub:{name}?)" if could_be_hub_name(name) else ""
        raise UserError(
            f"no such model folder: {name}; give a folder with config.json and weights, a GGUF file, "
            f"hub:OWNER/NAME{at_hub}, '{assets.MODEL_NAME}' or '{assets.ENCODER_NAME}'"
        )
    if not (folder / "config.json").is_file():
        from adazeta.runs import is_run

        hint = "; it is a run: `adazeta info` shows its base model" if is_run(folder) else ""
        raise UserError(f"{name} is not a model folder (no config.json, no GGUF file){hint}")
    return folder


def architecture(folder: Path) -> str:
    """Return what a model folder's checkpoint is, from its config.json.

    ``"causal"``, ``"masked"`` or ``"seq2seq"`` with that language-model head, ``"head"`` with one for classification,
    ``"encoder"`` without any head.

    Raises:
        UserError: a damaged config.json, or one that tells neither its architecture nor a known model type.
    """
    config, name = _config(folder)
    model_type = config.get("model_type")
    if told := next((kind for end, kind in _TOLD_BY_NAME.items() if str(name).endswith(end)), None):
        return told
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    kinds = {
        "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "head": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    for kind, classes in kinds.items():
        if name and name in classes.values():
            return kind
    if name and config.get("is_encoder_decoder"):
        return "seq2seq"
    if name:
        return "encoder" if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"
    known = [kind for kind, classes in kinds.items() if model_type in classes]
    if not known:
        raise UserError(f"{folder / 'config.json'} names no architecture, and model type {model_type!r} is not known")
    return known[0]


def has_own_head(folder: Path) -> bool:
    """Return whether ``transformers`` has a classification head for the model in ``folder``; True where no type is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    model_type = _config(folder)[0].get("model_type")
    return model_type is None or model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def _config(folder: Path) -> tuple[dict, str]:
    """Return a model folder's config.json, and the architecture that it names, "" where it names none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config, (config.get("architectures") or [""])[0]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error}): get the model again") from error


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turn what ``transformers`` raises at files that it cannot use into a UserError: ``what``, and why."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    wrong = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError)
    try:
        yield
    except (*wrong, OSError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own, which is not run"
        raise UserError(f"{what}: {reason}") from error


def _check_weights(name: str, found: Mapping[str, Iterable], begin: Sequence[str]) -> set[str]:
    """Return the names of a loaded model's weights that began at random, all of them in the modules ``begin``.

    Args:
        name: of the model.
        found: what ``from_pretrained`` tells with ``output_loading_info``.
        begin: modules that a checkpoint may lack, or have in another shape.

    Raises:
        UserError: others began so: the checkpoint is damaged or of another model.
    """
    faults = {key: "is missing" for key in found["missing_keys"]}
    faults |= {key: f"is {list(got)}, expected {list(wanted)}" for key, got, wanted in found["mismatched_keys"]}
    wrong = sorted(key for key in faults if not key.startswith(tuple(f"{module}." for module in begin)))
    if wrong:
        some = "; ".join(f"{key} {faults[key]}" for key in wrong[:3]) + "; ..." * (len(wrong) > 3)
        raise UserError(
            f"{name}: config.json and {len(wrong)} of its weights do not agree ({some}): get the model again"
        )
    return set(faults)


def _config_of_depth(depth: int | str, folder: Path, name: str):
    """Return a model's configuration with ``depth`` blocks; UserError where it has fewer or does not say."""
    from transformers import AutoConfig

    if depth == "auto":
        raise UserError("--depth auto is for a run that begins: give a number of blocks")
    with told_in_one_line(f"{name} cannot be loaded with a classification head"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    blocks = getattr(text, "num_hidden_layers", None)
    if blocks is None or depth > blocks:
        has = "does not say how many blocks it has" if blocks is None else f"has {blocks} blocks"
        raise UserError(f"--depth {depth}: {name} {has}")
    text.num_hidden_layers = depth
    return config


def load_base(
    name: str,
    *,
    task=None,
    dtype: str = "float32",
    quantize: str | None = None,
    device: str = "auto",
    say: Say = lambda line: None,
):
    """Load base model and tokenizer from a folder, frozen and in evaluation mode; ``auto`` is a GPU where there is one.

    ``dtype`` is a floating dtype of torch, or ``mixed``: float32 with linear layers in bfloat16. With a
    :class:`adazeta.tasks.HeadTask` the model gets a classification head, whose parameters alone require gradients,
    beside those of a pooler that the checkpoint lacks; new ones have the same numbers at every call. Any other task
    takes the checkpoint's language-model head.

    ``quantize`` is one of ``adazeta.quantized.METHODS``; a folder that was saved quantised needs none: it stays so.

    Raises:
        UserError: not a model folder, one that needs code or packages of its own, or weights that cannot be read, are
            not there, have another shape or are not finite.
    """
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    from adazeta.devices import chosen_device
    from adazeta.frozen import mix
    from adazeta.heads import Pooled, head_modules, pooler_name
    from adazeta.quantized import all_finite, check_products, left_plain, quantization_config

    folder, place = model_folder(name, say), chosen_device(device)
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    stored = torch.float32 if dtype == "mixed" else getattr(torch, dtype)
    kinds = {"masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
    with_head, kind = task is not None and task.kind == "head", architecture(folder)
    if not with_head and kind in ("head", "encoder"):
        raise UserError(f"{name} has no language-model head: --task head trains one for classification")
    if with_head and stored != torch.float32:
        raise UserError(f"a head that trains needs float32 numbers: use --dtype float32 or mixed, got {dtype}")
    keywords = {"dtype": stored, "local_files_only": True, "trust_remote_code": False}
    keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are for _check_weights
    if quantize is not None:
        keywords["quantization_config"] = quantization_config(quantize, place.type)
    if with_head and task.pooling != "own" and kind == "seq2seq":
        raise UserError(f"--pooling {task.pooling}: {name} is an encoder-decoder, whose head is its own: --pooling own")
    if with_head and task.pooling == "own" and not has_own_head(folder):
        way = "--task label-words" if kind == "seq2seq" else "--pooling attention"
        raise UserError(f"{name}: transformers has no classification head for its model type; use {way}")
    if with_head and task.depth is not None:
        keywords["config"] = _config_of_depth(task.depth, folder, name)
    wanted = "with a classification head" if with_head else "as a language model"
    with told_in_one_line(f"{name} cannot be loaded {wanted}"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if with_head and task.pooling != "own":
                encoder, found = AutoModel.from_pretrained(folder, **keywords)
                model = Pooled(encoder, len(task.labels), attention=task.pooling == "attention")
                begin = ["pooler"]  # which nothing reads
            elif with_head:
                labels = dict(enumerate(task.labels))
                keywords |= {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
                model, found = AutoModelForSequenceClassification.from_pretrained(folder, **keywords)
                begin = [*head_modules(model), *filter(None, [pooler_name(model)])]
            else:
                model, found = kinds.get(kind, AutoModelForCausalLM).from_pretrained(folder, **keywords)
                begin = []
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if quantize == "int4" and place.type == "cpu" and stored == torch.float32:
        say("--quantize int4: CPUs multiply 4 bits slowly in float32, --dtype bfloat16 is some ten times faster")
    new = _check_weights(name, found, begin)
    check_products(model, place.type)
    if quantize is not None and (left := left_plain(model, head_modules(model) if with_head else ()))[0]:
        say(f"--quantize {quantize}: {left[0]} of {left[1]} linear layers stay plain, their width does not fit")
    for parameter_name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise UserError(f"{name}: {parameter_name} holds NaN or infinite numbers: get the model again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    if with_head:
        model.config.pad_token_id = tokenizer.pad_token_id  # heads of causal models look for the last real token
        pooler = pooler_name(model)
        if any(key.startswith(f"{pooler}.") for key in new):  # what trains is saved with the adapter
            model.get_submodule(pooler).requires_grad_(True)
        for module in head_modules(model):
            model.get_submodule(module).requires_grad_(True)
    if dtype == "mixed":
        mix(model)
    return model.to(place), tokenizer
