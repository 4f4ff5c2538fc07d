"""Base models by their name at the Hugging Face hub, ``hub:OWNER/NAME[@REVISION]``: fetched once, into its own cache.

Weights, configuration and tokenizer are fetched, no Python file; safetensors where the repository has them. What lies
whole in the cache is used as it is, without the network: a run's base model stays what it was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adazeta.errors import UserError
from adazeta.rows import HUB

FORM = f"{HUB}OWNER/NAME[@REVISION]"
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_TEXT = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that a repository has

#: The commands let libraries look nothing up by themselves (``adazeta.commands.stay_offline`` sets this); a model that
#: the user names is fetched all the same.
kept_offline = False


def is_hub_name(model: str | Path) -> bool:
    """Whether ``model`` is one of the hub."""
    return str(model).startswith(HUB)


def could_be_hub_name(model: str | Path) -> bool:
    """Whether ``hub:`` before ``model`` would make it one of the hub."""
    return _NAME.fullmatch(str(model)) is not None


def hub_folder(model: str, say=lambda line: None) -> Path:
    """Return the folder of a model of the hub, in the hub's cache (``HF_HOME``); fetched if it is not there.

    Raises:
        UserError: a name of another form, no such repository or revision, one that asks for a login, no weights in it,
            or a hub that cannot be reached.
    """
    match = _NAME.fullmatch(model.removeprefix(HUB))
    if match is None:
        raise UserError(f"expected a model of the hub as {FORM}, got {model!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def snapshot(weights: str, **local) -> Path:
        wanted = {"allow_patterns": [*_TEXT, weights], "ignore_patterns": "*/*"}
        return Path(snapshot_download(match["name"], revision=match["revision"], **wanted, **local))

    for weights in _WEIGHTS:
        try:
            folder = snapshot(weights, local_files_only=True)
        except (OSError, ValueError):
            continue  # not in the cache
        if _is_whole(folder):
            return folder
    say(f"fetching {model}")
    try:
        with _online():
            folder = snapshot(_WEIGHTS[0])
            if not any(folder.glob(_WEIGHTS[0])):
                folder = snapshot(_WEIGHTS[1])
    except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:  # the last are those of its http library
        raise UserError(f"{model} cannot be had from the hub: {_reason(error)}") from error
    if not _is_whole(folder):
        raise UserError(
            f"{model} has no config.json or no weights ({' or '.join(_WEIGHTS)}): is it a transformers model?"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether configuration and weights are there, of weights in parts all of them."""
    if not (folder / "config.json").is_file():
        return False
    for index in folder.glob("*.index.json"):
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError):
            return False
        if all((folder / part).is_file() for part in parts):
            return True
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


@contextmanager
def _online() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before and not kept_offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its owner lets in who asks at its page: do, then log in (`hf auth login`)"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or log in (`hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        offline = ", and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") and not kept_offline else ""
        return f"it is not in the cache, and the hub cannot be reached{offline}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
