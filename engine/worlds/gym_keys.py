"""Moves: which keys play an environment's action space, and how held keys become one of its actions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bounds import shortened
from ..config import KEYS, UserError

NATURAL = {
    "left": ("Left", "A"),
    "right": ("Right", "D"),
    "up": ("Up", "W"),
    "forward": ("Up", "W"),
    "down": ("Down", "S"),
    "backward": ("Down", "S"),
    "fire": ("Space",),
    "jump": ("Space",),
    "attack": ("Space",),
    "shoot": ("Space",),
}
ARROWS = [("Left", "A"), ("Right", "D"), ("Down", "S"), ("Up", "W")]
SPARE = [(key,) for key in ("Space", *"1234567890QERFZXCVTGBYHNUJMIKOLP")]
SPARE += [(f"Keypad {digit}",) for digit in "1234567890"]
OPPOSITES = ({"left", "right"}, {"up", "down"}, {"forward", "backward"})
# what a name may be made of: UPRIGHTFIRE, "right A B"
DIRECTIONS = r"up|down|left|right|forward|backward|fire"
BUTTONS = {*NATURAL, "a", "b", "c", "x", "y", "z", "l", "r", "select", "start"}
MANY = f"more than {KEYS} keys; it has to be wrapped into fewer actions"
REST = ("noop", "no_op", "nop", "none", "nothing", "do_nothing", "idle")


@dataclass(frozen=True)
class Moves:
    """`names` of the keys; `move`: which of them are held, bool (k,) → an action of the environment."""

    names: list[str]
    move: Callable[[np.ndarray], Any]


def moves_of(env: Any) -> Moves:
    """The keys of an environment. Raises UserError for an action space that keys cannot play."""
    from gymnasium.spaces import Discrete

    space = env.action_space
    if isinstance(space, Discrete):
        meanings = getattr(env.unwrapped, "get_action_meanings", lambda: [])() or []
        said = meanings.values() if isinstance(meanings, dict) else meanings
        moves = _actions(int(space.n), int(space.start), list(map(_tidy, said)))
    else:
        moves = _part(space, "", getattr(env.unwrapped, "buttons", None))
    if len(moves.names) > KEYS:
        raise UserError(f"The action space {shortened(str(space))} would need {MANY}.")
    if not moves.names:
        raise UserError(f"There is nothing to play in the action space {space}: it has a single action.")
    names = moves.names
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" for i, name in enumerate(names)]
    return Moves(names, moves.move)


def bindings_of(names: list[str], given: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The scancodes of each key: those given, else those that its name, or a word of it, speaks of, else the
    next that are free; none where no more are left. No scancode is chosen twice.
    """
    found = dict(given)
    spoken = [(name, NATURAL.get(name, ())) for name in names]
    spoken += [(name, NATURAL.get(word, ())) for name in names for word in _words(name)]
    spoken += [(name, keys) for name in names for keys in ([] if name in NATURAL else ARROWS) + SPARE]
    taken = {code for codes in given.values() for code in codes}
    for name, keys in spoken:
        if name not in found and (free := tuple(code for code in keys if code not in taken)):
            found[name] = free
            taken |= set(free)
    return [found.get(name, ()) for name in names]


def _actions(size: int, start: int, names: list[str]) -> Moves:
    """One of a list of actions, named or not: held keys are composed as far as the game has it."""
    _check_size(size)
    if len(names) != size or len(set(names)) != size or not all(names):
        names = [f"action_{i}" for i in range(size)]
    keys = composed(names)
    rest = keys.index(frozenset()) if frozenset() in keys else min(max(0, -start), size - 1)

    def move(held: np.ndarray) -> int:
        pressed = {name for name, down in zip(known, held, strict=True) if down}
        for pair in OPPOSITES:
            if pair <= pressed and not any(pair <= needed for needed in keys):
                pressed -= pair
        fitting = [i for i, needed in enumerate(keys) if needed and needed <= pressed]
        return start + max(fitting, key=lambda i: (len(keys[i]), -i), default=rest)

    single = [key for needed in keys if len(needed) == 1 for key in needed]
    known = list(dict.fromkeys(single + [key for needed in keys for key in sorted(needed)]))
    return Moves(known, move)


def composed(names: list[str]) -> list[frozenset[str]]:
    """Actions' tidy names → the keys that are held for each: none to rest, several where a name is made of
    buttons and the game also has it with one of them less (up, upfire, uprightfire); else its own.
    """
    words = [_words(name) for name in names]
    alone = {parts[0] for parts in words if len(parts) == 1} | BUTTONS
    keys: list[frozenset[str]] = [frozenset([name]) for name in names]
    made = set()
    for i in sorted(range(len(names)), key=lambda i: len(words[i])):
        parts = frozenset(words[i])
        if names[i] in REST:
            keys[i] = frozenset()
        elif parts not in made and parts <= alone and any(parts - {part} in made for part in parts):
            keys[i] = parts
        made.add(keys[i])
    return keys


def _tidy(said: Any) -> str:
    """What an environment calls an action → letters, digits and underscores, in small letters."""
    said = " ".join(map(str, said)) if isinstance(said, list | tuple) else str(said)
    return re.sub(r"\W+", "_", said.lower()).strip("_")


def _indexed(name: str, index: tuple) -> str:
    return "_".join(filter(None, (name, *map(_tidy, index))))


def _words(name: str) -> list[str]:
    words = []
    for word in name.split("_"):
        words += re.findall(DIRECTIONS, word) if re.fullmatch(f"(?:{DIRECTIONS})+", word) else [word]
    return words


def _part(space: Any, name: str, buttons: Any = None) -> Moves:
    """Any space but a single list of actions; `name` is its own inside a Dict."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return _choice(int(space.n), int(space.start), name)
    if isinstance(space, spaces.MultiDiscrete):
        sizes, starts = space.nvec, np.broadcast_to(getattr(space, "start", 0), space.nvec.shape)
        parts = [
            _choice(int(sizes[index]), int(starts[index]), _indexed(name or "choice", index))
            for index in np.ndindex(sizes.shape)
        ]
        return _joined(parts, lambda values: np.array(values, space.dtype).reshape(space.shape))
    if isinstance(space, spaces.MultiBinary):
        parts = [_choice(2, 0, _indexed(name or "button", index)) for index in np.ndindex(space.shape)]
        if isinstance(buttons, list | tuple) and len(buttons) == len(parts):  # None: a place without a button
            parts = [_choice(2 if said else 1, 0, _tidy(said)) for said in buttons]
        return _joined(parts, lambda values: np.array(values, space.dtype).reshape(space.shape))
    if isinstance(space, spaces.Box):
        return _axes(space, name or "axis")
    if isinstance(space, spaces.Dict):
        parts = [_part(inner, _indexed(name, (key,))) for key, inner in space.spaces.items()]
        return _joined(parts, lambda values: dict(zip(space.spaces, values, strict=True)))
    if isinstance(space, spaces.Tuple):
        parts = [_part(inner, _indexed(name or "part", (i,))) for i, inner in enumerate(space.spaces)]
        return _joined(parts, tuple)
    said = "Keys can play Discrete, MultiDiscrete, MultiBinary and Box action spaces, and a Dict or Tuple"
    raise UserError(f"{said} of these, not {type(space).__name__}.")


def _choice(size: int, start: int, name: str) -> Moves:
    """One of several values; with no key held the one that means nothing, 0, or the first."""
    _check_size(size)
    rest = min(max(0, -start), size - 1)
    others = [start + i for i in range(size) if i != rest]
    names = [name] if len(others) == 1 else [f"{name}_{value}".replace("-", "minus_") for value in others]
    return Moves(names, lambda held: others[int(np.argmax(held))] if held.any() else start + rest)


def _check_size(size: int) -> None:
    """Before names are made, of which there may be billions."""
    if size - 1 > KEYS:
        raise UserError(f"An action space of {size:,} values would need {MANY}.")


def _axes(space: Any, name: str) -> Moves:
    """Each number has a key for its lowest and one for its highest value; both together are none."""
    _check_size(space.low.size)
    low, high = (np.nan_to_num(side, posinf=1, neginf=-1) for side in (space.low, space.high))
    rest = np.clip(np.zeros_like(low), low, high).astype(space.dtype)
    names, entries = [], []
    for index in np.ndindex(low.shape):
        for side, value in (("minus", low[index]), ("plus", high[index])):
            if value != rest[index]:  # a pedal, from 0 to 1, has one direction only
                names.append(f"{_indexed(name, index)}_{side}")
                entries.append((index, value))

    def move(held: np.ndarray) -> np.ndarray:
        action, pressed = rest.copy(), [entries[key] for key in np.flatnonzero(held)]
        places = [index for index, _ in pressed]
        for index, value in pressed:
            if places.count(index) == 1:
                action[index] = value
        return action

    return Moves(names, move)


def _joined(parts: list[Moves], build: Callable[[list], Any]) -> Moves:
    """Several choices, each with its own keys."""
    ends = np.cumsum([len(part.names) for part in parts])[:-1]
    names = [name for part in parts for name in part.names]

    def move(held: np.ndarray) -> Any:
        return build([part.move(own) for part, own in zip(parts, np.split(held, ends), strict=True)])

    return Moves(names, move)
