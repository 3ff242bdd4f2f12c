"""Numbers in configs: bounds stated beside each field, all checked in one place; and seeds of any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

from .errors import UserError

LONGEST = 4096  # items of a list or mapping
MANY = 10**9  # of frames, steps and the like: what nobody will wait for
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
PASSES = {
    "least": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "most": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}


def number(default: Any, **bounds: float) -> Any:
    """A dataclass's field for a number, or for a list of such, within `bounds`: least, above, most, below."""
    how = {"metadata": {"bounds": bounds}}
    if isinstance(default, list):
        return field(default_factory=default.copy, **how)
    return field(default=default, **how)


def count(default: int, least: int = 1, most: int = MANY) -> Any:
    """A field for how many there are of something."""
    return number(default, least=least, most=most)


def share(default: float) -> Any:
    """A field for a share, a probability or a noise level."""
    return number(default, least=0, most=1)


def weight(default: float) -> Any:
    """A field for what a part of a loss is multiplied by, or something else without a natural end."""
    return number(default, least=0, most=1e6)


class Checked:
    """A config: making one of values of the wrong type or out of their bounds raises UserError."""

    section = ""  # under which options its fields stand

    def __post_init__(self) -> None:
        if said := wrong(type(self), vars(self)):
            raise UserError(said)


def wrong(kind: type[Checked], values: Mapping[str, Any]) -> str:
    """What keeps `values`, by their names, from being fields of a config, in a sentence; empty: nothing."""
    for one in fields(kind):
        if one.name not in values:
            continue
        value, must = values[one.name], f"{kind.section}.{one.name}".lstrip(".") + " must be"
        if not _fits(value, _hints(kind)[one.name]):
            return f"{must} {_words(_hints(kind)[one.name])}, not {shortened(repr(value))}."
        bounds = one.metadata.get("bounds", {})
        several = value if isinstance(value, (list, tuple)) else [value]
        if not all(PASSES[name][1](x, bound) for x in several for name, bound in bounds.items()):
            said = [f"{PASSES[name][0]} {bound:,}".removesuffix(".0") for name, bound in bounds.items()]
            return f"{must} {' and '.join(said)}, not {shortened(repr(value))}."
    return ""


def short_seed(seed: int) -> int:
    """A seed of any size or sign → 0 to 2**31 - 1, which every generator and world takes; itself where it
    fits.
    """
    if 0 <= seed < 2**31:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") >> 1


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that a field declares."""
    parts = get_args(kind)
    if get_origin(kind) is list:
        return (
            isinstance(value, (list, tuple))
            and len(value) <= LONGEST
            and all(_fits(item, parts[0]) for item in value)
        )
    if get_origin(kind) is dict:
        return (
            isinstance(value, dict)
            and len(value) <= LONGEST
            and all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items())
        )
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def _words(kind: Any) -> str:
    """A field's type in a sentence."""
    parts = get_args(kind)
    if get_origin(kind) is list:
        return f"a list, each item {_words(parts[0])}"
    if get_origin(kind) is dict:
        return f"a mapping of names, each to {_words(parts[1])}"
    return WORDS.get(kind, "a mapping of options")


def shortened(said: str) -> str:
    """A value's text, so that it fits into a sentence."""
    said = " ".join(said.split())
    return said if len(said) < 60 else said[:57] + "..."
