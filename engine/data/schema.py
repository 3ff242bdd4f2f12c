"""Reads and checks the files of a recording: `session.json` and the lines of `actions.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

from ..bounds import shortened, wrong
from ..config import FASTEST, KEYS, PRECISIONS, SLOWEST, UserError, WorldConfig
from ..worlds.base import STATE_KINDS

SCHEMA = 2  # 1 had no state kinds, axes, parent and checksums, and is still read
HEADER, ACTIONS, FRAMES = "session.json", "actions.jsonl", "frames.mkv"
SOURCES = ("true", "dream", "")  # of frames; "": not known, taken as true
LARGEST = 16_384  # most pixels of a side
FAR = 1e12  # largest absolute value in a state: its square fits into float32
KINDS_OF_1 = {"x": "position", "y": "position", "angle": "angle", "health": "scalar", "ammo": "scalar"}


def read_header(directory: Path) -> dict:
    """The content of a recording's `session.json`, with defaults for optional fields. Raises UserError where
    it is missing or damaged, or of another version.
    """
    path = directory / HEADER
    try:
        header = json.loads(path.read_text("utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise UserError(f"{directory} is not a recording: it has no {HEADER}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(header, dict) or not {"schema", "names", "fps", "height", "width"} <= header.keys():
        raise UserError(f"{path} was not written by Rollplay.")
    if not _is_whole(header["schema"]) or header["schema"] not in (1, SCHEMA):
        said = f"{path} has schema {shortened(json.dumps(header['schema']))}"
        raise UserError(f"{said}, but this version reads 1 and {SCHEMA}; it may come from a newer one.")
    known = {"source": "", "checkpoint": "", "precision": "", "seed": 0, "world": "", "config": {}}
    known |= {"keymap": {}, "codec": {}}
    # policies: None where a person played, and none of them where an older version did not tell
    header = {**known, "state_kinds": None, "parent": None, "policies": {}, **header}
    for name, right in HEADER_CHECKS.items():
        if not right(header[name]):
            raise UserError(f"{path} is damaged: its {name} cannot be {shortened(json.dumps(header[name]))}.")
    if said := wrong(WorldConfig, header["config"]):
        raise UserError(f"{path} is damaged: in its config {said}")
    return header


def read_lines(directory: Path, names: tuple[str, ...]) -> list[dict]:
    """All lines of a recording's `actions.jsonl`, without a last one that a kill has cut. `names`: the keys
    that may be held. Raises UserError for a damaged line, and for another key.
    """
    path = directory / ACTIONS
    try:
        rows = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []  # killed between session.json and here
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    lines, known = [], set(names)
    for number, row in enumerate(rows):
        try:
            line = json.loads(row, parse_constant=_refuse)
            right = _is_line(line, number)
        except (ValueError, RecursionError):
            right = False
        if not right:
            raise UserError(f"{path} is damaged at line {number + 1}.")
        if not known.issuperset(line["keys"]):
            unknown = next(name for name in line["keys"] if name not in known)
            raise UserError(f"{directory} holds the key {unknown!r}, which its {HEADER} lacks.")
        lines.append(line)
    return lines


def known_kinds(states: list[dict | None]) -> dict[str, str]:
    """The kinds of the numbers in states of schema 1, which did not store them."""
    first = next((state for state in states if state), {})
    return {name: KINDS_OF_1[name] for name in first if name in KINDS_OF_1}


def _is_line(line: object, number: int) -> bool:
    return (
        isinstance(line, dict)
        and {"frame", "t_ns", "keys", "events", "reset"} <= line.keys()
        and line["frame"] == number
        and _is_whole(line["t_ns"])
        and isinstance(line["keys"], list)
        and all(isinstance(name, str) for name in line["keys"])
        and _are_events(line["events"])
        and isinstance(line["reset"], bool)
        and _is_whole(line.get("rng", 0))
        and _is_whole(line.get("crc", 0))
        and _are_numbers(line.get("state") or {})
        and _are_numbers(line.get("axes", {}))
    )


def _is_whole(value: object) -> bool:
    """An integer that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FAR


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= KEYS and all(map(_is_number, value.values()))


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_events(value: object) -> bool:
    """A list of events of any form, except that those with "reset", which are replayed, must be valid."""
    if not isinstance(value, list):
        return False
    began = [event["reset"] for event in value if isinstance(event, dict) and "reset" in event]
    return all(map(_is_beginning, began))


def _is_beginning(told: object) -> bool:
    return (
        isinstance(told, dict)
        and _is_seed(told.get("seed", 0))
        and isinstance(told.get("start", ""), str)
        and isinstance(told.get("held", []), list)
        and all(map(_is_run, told.get("held", [])))
    )


def _is_run(run: object) -> bool:
    """Whether it is [names of held keys, frames for which they were held]."""
    return (
        isinstance(run, list)
        and len(run) == 2
        and isinstance(run[0], list)
        and all(isinstance(name, str) for name in run[0])
        and _is_whole(run[1])
        and run[1] > 0
    )


def _is_size(value: object) -> bool:
    return _is_whole(value) and 0 < value <= LARGEST


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value) <= KEYS
    )


def _are_kinds(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and len(value) <= KEYS and all(kind in STATE_KINDS for kind in value.values())
    )


def _are_bindings(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in value.values()
    )


HEADER_CHECKS = {
    "names": _are_names,
    "fps": lambda value: _is_number(value) and SLOWEST <= value <= FASTEST,
    "height": _is_size,
    "width": _is_size,
    "world": lambda value: isinstance(value, str),
    "source": lambda value: value in SOURCES,
    "checkpoint": lambda value: isinstance(value, str),
    "precision": lambda value: value == "" or value in PRECISIONS[1:],
    "seed": _is_seed,
    "config": lambda value: isinstance(value, dict),
    "keymap": _are_bindings,
    "codec": lambda value: isinstance(value, dict),
    "state_kinds": _are_kinds,
    "parent": lambda value: value is None or isinstance(value, dict),
    "policies": lambda value: value is None or _are_numbers(value),
}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
