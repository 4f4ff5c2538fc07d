"""One setting of a run: its flag and YAML key, its unit, its default and where its value goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adazeta.errors import UserError
from adazeta.presets import PRESETS
from adazeta.schedule import AdaptiveQueries, ConstantQueries


@dataclass(frozen=True)
class Option:
    """One setting.

    Args:
        name: flag without ``--``; the YAML key is the same (``_`` for ``-`` is accepted).
        kind: turns the flag's text or the YAML value into the value; ValueError or TypeError if it cannot.
        help: what it does, with its unit.
        default: value where neither flag, file nor preset gives one; None means "left to what it is passed to".
        goes_to: ``tt.field``, ``zo.field`` or ``train.field`` (TTConfig, ZOConfig, TrainingArguments), or empty.
        shown: how the default reads in the help, where the value alone would not do.
        choices: the values that are allowed.
        tasks: the kinds of task that read it; empty: every kind does.
    """

    name: str
    kind: Callable[[Any], Any]
    help: str
    default: Any = None
    goes_to: str = ""
    shown: str = ""
    choices: tuple = ()
    tasks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name in Python and in a settings dict."""
        return self.name.replace("-", "_")

    def preset_value(self, preset: str):
        """Return this option's value in a preset, or the table's default."""
        section, _, field = self.goes_to.partition(".")
        values = getattr(PRESETS[preset], section) if section else {}
        return values.get(field, self.default)

    def read(self, value, where: str):
        """Return the value for what a flag or a file says; ``where`` names the origin in the error."""
        if value is None:
            return None
        try:
            value = self.kind(value)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: {error}") from error
        if self.choices and value not in self.choices:
            raise UserError(f"{where}: expected one of {', '.join(map(str, self.choices))}, got {value!r}")
        return value

    def describe(self) -> str:
        """Return the help line with the default of every preset."""
        if self.shown:
            return f"{self.help} (default: {self.shown})"
        values = {name: _show(self.preset_value(name)) for name in PRESETS}
        if len(set(values.values())) == 1:
            return f"{self.help} (default: {next(iter(values.values()))})"
        return f"{self.help} (preset {'; '.join(f'{name}: {value}' for name, value in values.items())})"


def plain(value):
    """Return a setting as a JSON value that its option reads again."""
    return _show(value) if isinstance(value, (ConstantQueries, AdaptiveQueries)) else value


def _show(value) -> str:
    if value is None:
        return "none"
    if isinstance(value, ConstantQueries):
        return str(value.number)
    if isinstance(value, AdaptiveQueries):
        return f"adaptive:{value.alpha},{value.beta},{value.maximum}{'' if value.by == 'epoch' else ',step'}"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={word.strip()}" for key, word in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
