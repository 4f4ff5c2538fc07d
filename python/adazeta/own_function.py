"""A function of the user's own, from a Python file that the command line or a settings file names.

The file is run: whoever names it trusts it. Nothing else does: a stored run that was trained with a function says so,
and is gone on with only where the file is named again (:func:`check_named`).
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adazeta.errors import UserError


@dataclass(frozen=True)
class OwnFunction:
    """A function that was loaded; what it raises is told in one line.

    Args:
        name: the file's name, a colon and the function's.
        sha256: of the file's bytes, as they were run. What the file imports is not part of it.
        function: the function.
    """

    name: str
    sha256: str
    function: Callable

    def __call__(self, prompt: str, completion: str, reference: Any) -> float:
        try:
            return float(self.function(prompt, completion, reference))
        except Exception as error:  # whatever the user's code raises, the line says where
            raise UserError(
                f"{self.name} must return a number for prompt {prompt[:40]!r}, completion {completion[:40]!r} and "
                f"reference {reference!r}, but {type(error).__name__}: {error}"
            ) from error


def is_function(objective: str | None) -> bool:
    """Return whether an objective is a function in a file."""
    return ":" in (objective or "")


def load_function(where: str) -> OwnFunction:
    """Run the file of ``FILE.py:function`` and return the function.

    Raises:
        UserError: the file cannot be read or fails, or has no such function.
    """
    path, _, name = where.rpartition(":")
    try:
        source = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"--objective: cannot read {path}: {error.strerror}") from error
    module = types.ModuleType("adazeta_objective")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"--objective: {path} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--objective: {path} has no function {name!r}")
    return OwnFunction(f"{Path(path).name}:{name}", hashlib.sha256(source).hexdigest(), function)


def check_named(stored: Mapping[str, Any] | None, *given: Mapping[str, Any]) -> None:
    """Raise UserError if stored settings name a function that none of the ``given`` flags and files does."""
    objective = (stored or {}).get("objective")
    if is_function(objective) and not any(values.get("objective") for values in given):
        raise UserError(
            f"the run was trained with a function of its own, {objective}: a file is run only where you name it, so "
            "add --objective FILE.py:function"
        )
