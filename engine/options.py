"""Options of the command line, `name=value`: those whose type is text are taken as they stand."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .bounds import WORDS, shortened
from .errors import UserError

SWITCHES = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
NUMBERS = {int: int, float: float, bool: lambda text: SWITCHES.index(text.lower())}  # how each is read
# of a list of texts: in quotes, or without a comma in it
ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*?))\s*(?:,|$)""")


def split_texts(schema: type, words: list[str], groups: Path) -> tuple[dict[str, Any], list[str]]:
    """The options that are texts or lists of texts, by name, and the words that are not.

    Numbers and the like have a grammar; a file name that looks like one (2026_10_03, 1e5, a#b) is a name.
    `groups` has a folder for each option that names a file there. Raises UserError for a name that is no
    option's, and a file that is not there.
    """
    texts: dict[str, Any] = {}
    others = []
    for word in words:
        name, _, value = word.partition("=")
        kind = _kind(schema, name.lstrip("+~"))
        if kind is None:
            raise UserError(f"{word!r} is no option; options are name=value, and --help shows them.")
        if name.startswith("~"):
            others.append(word)
        elif (groups / name).is_dir():
            known = sorted(path.stem for path in (groups / name).glob("*.yaml"))
            if value not in known:
                raise UserError(f"There is no {name} {value!r}; choose one of {', '.join(known)}.")
            others.append(word)
        elif "=" not in word or kind not in (str, str | None, list[str]):
            _check_number(word, kind)
            others.append(word)
        elif kind == list[str]:
            texts[name] = _items(value)
        else:
            texts[name] = None if kind != str and value == "null" else value  # noqa: E721
    return texts, others


def _check_number(word: str, kind: Any) -> None:
    """Raises UserError where an option for a number has another value; what is quoted, or stands for the
    value of another option, is left to Hydra.
    """
    name, _, value = word.partition("=")
    if kind not in NUMBERS or "=" not in word or any(mark in value for mark in "$'\""):
        return
    try:
        NUMBERS[kind](value.strip())
    except ValueError:  # also of more digits than Python reads
        said = f"{shortened(word)} was not understood"
        raise UserError(f"{said}: {name.lstrip('+')} must be {WORDS[kind]}.") from None


def lay(texts: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Puts texts into the nested `values` → these. Raises UserError for a name that is not there; one that
    begins with + may be new.
    """
    for name, value in texts.items():
        *path, last = name.lstrip("+").split(".")
        inside = values
        for part in path:
            inside = inside[part]
        if last not in inside and not name.startswith("+"):
            known = ", ".join(inside) or "none"
            raise UserError(f"There is no {name}, only {known}; +{name}=... adds it.")
        inside[last] = value
    return values


def build(schema: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass of dataclasses from nested dicts."""
    kinds = get_type_hints(schema)
    return schema(
        **{name: build(kinds[name], x) if is_dataclass(kinds[name]) else x for name, x in values.items()}
    )


def _kind(schema: Any, name: str) -> Any:
    """The type of the option `name`, with dots for what lies inside; None where there is none."""
    for part in name.split("."):
        if is_dataclass(schema):
            schema = get_type_hints(schema).get(part)
        elif get_origin(schema) is dict:
            schema = get_args(schema)[1]
        else:
            return None
    return schema


def _items(value: str) -> list[str]:
    """[a,b] → a and b, where a comma may stand in quotes; what has no brackets is a single text."""
    if not (value.startswith("[") and value.endswith("]")):
        return [value] if value else []
    return ["".join(found) for found in ITEM.findall(value[1:-1]) if any(found)]
