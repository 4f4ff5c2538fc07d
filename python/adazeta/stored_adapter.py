"""What an adapter folder says of itself, checked before modules are made of it: its files may come from anywhere."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

#: Settings that PEFT puts into regular expressions, or takes for one.
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Check the content of ``adapter_config.json`` at ``path``: the method, and names of modules.

    Raises:
        UserError: another method than ours, or a regular expression in the place of names.
    """
    method = settings.get("peft_type")
    if method != "TT":
        raise UserError(f"{path}: peft_type must be 'TT', got {_shown(method)}")
    for key in NAMES:
        value = settings.get(key)
        names = [value] if isinstance(value, str) else value
        if names is None or (isinstance(names, list) and all(map(_is_plain, names))):
            continue
        raise UserError(f"{path}: {key} must be plain names of modules, got {_shown(value)}")


def check_shapes(saved: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that what the settings ask for is what is stored; tensors beyond that are allowed.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for key, shape in expected.items():
        if saved.get(key) != shape:
            got = f"has shape {list(saved[key])}" if key in saved else "is missing"
            raise ValueError(f"{key} {got}, adapter_config.json asks for {list(shape)}")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.]+", name) is not None


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
