"""Kinds of settings: what the text of a flag or a value of a YAML file is read as; ValueError where it can't be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.util import find_spec

from adazeta.schedule import AdaptiveQueries, ConstantQueries


def boolean(value) -> bool:
    """Read true/false as YAML and people write them."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError(f"expected true or false, got {value!r}")


def integer(value) -> int:
    """Read an integer; of YAML's other values only a number that is one, such as 3.0."""
    if isinstance(value, bool) or isinstance(value, float) and not value.is_integer():
        raise ValueError(f"expected an integer, got {value!r}")
    try:
        return int(value)
    except (ValueError, TypeError):
        raise ValueError(f"expected an integer, got {value!r}") from None


def positive(value) -> int:
    """Read an integer above zero."""
    number = integer(value)
    if number < 1:
        raise ValueError(f"expected an integer of at least 1, got {value!r}")
    return number


def natural(value) -> int:
    """Read an integer of at least zero."""
    return 0 if str(value).strip() == "0" else positive(value)


def thread_count(value) -> int:
    """Read a number of threads; torch ends the process, without a word, where it can't start as many."""
    number = positive(value)
    if number > 1024:
        raise ValueError(f"expected at most 1024 threads, got {value!r}")
    return number


def minutes(value) -> float:
    """Read a time of at least zero, that ends."""
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"expected a finite number of minutes, 0 or more, got {value!r}")
    return number


def positive_or_auto(value) -> int | str:
    """Read an integer above zero, or ``auto``."""
    try:
        return value if value == "auto" else positive(value)
    except ValueError:
        raise ValueError(f"expected auto or an integer of at least 1, got {value!r}") from None


def number_or_auto(value) -> float | str:
    """Read a number, or ``auto``."""
    return value if value == "auto" else float(value)


def escaped(value: str) -> str:
    r"""Read text in which a shell cannot easily say newline: ``\n`` and ``\t`` stand for newline and tab."""
    return str(value).replace("\\n", "\n").replace("\\t", "\t")


def _text(value) -> str:
    """Return a label, a word or a name as text; ValueError for what YAML has made of a word without quotation marks."""
    if value is None or isinstance(value, bool):
        raise ValueError(
            f"expected text, got {value}: YAML reads Yes, No, On, Off, True, False and null as values; put quotation "
            'marks around such a word, as in "Yes"'
        )
    return str(value)


def mapping(value) -> dict[str, str]:
    """Read ``name=value,name=value`` (or a mapping)."""
    if not isinstance(value, Mapping):
        parts = [part.partition("=") for part in str(value).split(",")]
        if not all(separator for _, separator, _ in parts):
            raise ValueError(f"expected name=value,name=value, got {value!r}")
        value = {name: word for name, _, word in parts}
    return {_text(name).strip(): _text(word).strip() for name, word in value.items()}


def label_words(value) -> dict[str, str]:
    """Read ``label=word,label=word`` (or a mapping); a word without a leading space gets one."""
    if not isinstance(value, Mapping):
        parts = [part.partition("=") for part in str(value).split(",")]
        if not all(separator for _, separator, _ in parts):
            raise ValueError(f"expected label=word,label=word, got {value!r}")
        value = {label.strip(): word for label, _, word in parts}
    words = {_text(label): _text(word) for label, word in value.items()}
    return {label: word if word.startswith(" ") else f" {word}" for label, word in words.items()}


def queries(value) -> ConstantQueries | AdaptiveQueries:
    """Read a number of queries, or ``adaptive[:alpha,beta,maximum[,epoch|step]]``."""
    text = str(value)
    if not text.startswith("adaptive"):
        return ConstantQueries(positive(value))
    parts = text.removeprefix("adaptive").removeprefix(":").split(",") if ":" in text else []
    if parts and len(parts) not in (3, 4):
        raise ValueError(f"expected adaptive:alpha,beta,maximum or adaptive:alpha,beta,maximum,step, got {value!r}")
    numbers = (float(parts[0]), float(parts[1]), int(parts[2])) if parts else ()
    return AdaptiveQueries(*numbers, *parts[3:])


def directions(value) -> str | int:
    """Read ``batch``, ``example`` or a number of groups."""
    return value if value in ("batch", "example") else positive(value)


def names(value) -> str | list[str]:
    """Read ``paper``, ``published``, ``mlp`` or module names separated by commas."""
    if isinstance(value, (list, tuple)):
        return [str(name) for name in value]
    return value if value in ("paper", "published", "mlp") else [name.strip() for name in str(value).split(",")]


def listed(value) -> list[str]:
    """Read values separated by commas."""
    if isinstance(value, (list, tuple)):
        return [_text(v) for v in value]
    return [v.strip() for v in _text(value).split(",")]


#: What logs can be sent to, and the packages any of which it takes.
SERVICES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def services(value) -> list[str]:
    """Read services that logs go to; ValueError for an unknown one, and for one whose package is not installed."""
    names = [name for name in listed(value) if name != "none"]
    for name in names:
        if name not in SERVICES:
            raise ValueError(f"expected {', '.join(SERVICES)} or none, got {name!r}")
        if not any(find_spec(package) for package in SERVICES[name]):
            raise ValueError(f"{name} needs a package that is not installed: pip install {SERVICES[name][-1]}")
    return names


def layers(value) -> str | list[int]:
    """Read ``middle``, or integers separated by commas, ranges ``a-b`` included."""
    if value == "middle":
        return value
    found: list[int] = []
    for part in value if isinstance(value, (list, tuple)) else str(value).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(part))
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"expected middle, or blocks such as 0-5,29, got {value!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def cache_setting(value) -> str:
    """Read auto, off, memory[:SIZE] or disk[:SIZE]."""
    from adazeta.prefix_cache import read_setting

    value = "off" if value is False else str(value)  # YAML reads off as false
    read_setting(value)
    return value


def objective(value) -> str:
    """Read ``loss``, ``accuracy``, ``f1``, ``exact-match``, or ``FILE.py:function``."""
    text = str(value).strip()
    path, _, name = text.rpartition(":")
    if text in ("loss", "accuracy", "f1", "exact-match") or path.endswith(".py") and name.isidentifier():
        return text
    raise ValueError(f"expected loss, accuracy, f1, exact-match or FILE.py:function, got {value!r}")


def metrics(value) -> list[str]:
    """Read names of metrics, a list or with commas between them; accuracy, which is always measured, is left out."""
    names = value if isinstance(value, list) else str(value).split(",")
    names = [str(name).strip() for name in names]
    if unknown := [name for name in names if name not in ("accuracy", "f1", "exact-match")]:
        raise ValueError(f"expected accuracy, f1 or exact-match, got {unknown[0]!r}")
    return [name for name in dict.fromkeys(names) if name != "accuracy"]
