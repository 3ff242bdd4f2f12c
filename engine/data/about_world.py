"""Completes a world's config from the opened game, or from recordings.

`world_of` alone decides of which world a folder of recordings is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import UserError, WorldConfig
from ..worlds import World

# fields of WorldConfig in which recordings of one world agree; those that name the game come first
COMPARED = ("id", "name", "scenario", "map", "width", "height", "tics", "fps", "keys")
TAKEN = (*COMPARED, "kind", "episode_frames")  # fields that are read from recordings


def described(config: WorldConfig, game: World) -> WorldConfig:
    """The config with keys and rate of the opened game, which only the environment of a Gymnasium world
    knows.
    """
    space = game.action_space
    keys = dict(zip(space.names, map(list, space.bindings), strict=True))
    return replace(config, keys=keys, fps=game.fps)


def told(header: dict) -> dict[str, Any]:
    """The world's fields in the header of a recording (schema.py), by the names of WorldConfig; empty ones
    are left out.
    """
    about = header["config"] | {"name": header["world"], "fps": float(header["fps"])}
    about |= {name: header[name] for name in ("width", "height")}
    about |= {"keys": {name: list(header["keymap"].get(name, [])) for name in header["names"]}}
    about = {name: about[name] for name in TAKEN if about.get(name) or name == "keys"}
    return {"id": "", **about} if "name" in about else about


def world_of(
    recordings: Mapping[Path, dict], world: WorldConfig, given: Collection[str] | None = None
) -> WorldConfig:
    """The world of all true recordings (path → header); `world` itself without recordings.

    `given`: names of the options on the command line. The fields of `world` that they set must agree with the
    recordings; all others are taken from these. None: all fields of `world` must agree, except for empty keys
    and an fps of 0. Raises UserError where a recording is of another world, or two are of different ones.
    """
    _check_kinds(recordings)
    return agreed({path: told(header) for path, header in recordings.items()}, world, given)


def agreed(
    tellers: Mapping[Path, dict[str, Any]], world: WorldConfig, given: Collection[str] | None = None
) -> WorldConfig:
    """`world_of` for any files that describe a world: path → fields of WorldConfig, by name."""
    if not tellers:
        return world
    wanted = {name: value for name, value in asdict(world).items() if _is_chosen(name, value, world, given)}
    learnt: dict[str, Path] = {}  # field → the recording from which it was taken
    own_keys = wanted.get("keys", {})  # the command line may change the scancodes of some keys
    for path, one in tellers.items():
        for name in (name for name in TAKEN if name in one):
            grows = name == "keys" and (name in learnt or given is not None)
            if name in wanted and name in COMPARED and not _alike(name, one, wanted, grows):
                raise _refusal(path, one, wanted, name, learnt)
            if name not in wanted or (grows and len(one[name]) > len(wanted[name])):
                wanted[name], learnt[name] = one[name], path
    keys = {name: own_keys.get(name) or codes for name, codes in wanted["keys"].items()}
    keys = {name: codes or world.keys.get(name, []) for name, codes in keys.items()}
    same = all(wanted.get(name, value) == value for name, value in (("id", world.id), ("name", world.name)))
    return replace(world if same else WorldConfig(), **(wanted | {"keys": keys}))


def _is_chosen(name: str, value: Any, world: WorldConfig, given: Collection[str] | None) -> bool:
    if given is None:
        return bool(value) or name not in ("keys", "fps")
    if any(option == f"world.{name}" or option.startswith(f"world.{name}.") for option in given):
        return True
    # world=NAME chooses a game; but `gym` stands for all of Gymnasium, and only the id says which one
    return "world" in given and (name == "name" or (name == "id" and not value))


def _alike(name: str, one: dict[str, Any], wanted: dict[str, Any], grows: bool) -> bool:
    there, here = one[name], wanted[name]
    if name == "keys":  # a key that a recording lacks was never held in it
        return set(there) <= set(here) or (grows and set(here) <= set(there))
    if name == "fps":
        return math.isclose(there, here, rel_tol=1e-3)
    if name == "name" and one.get("id") and wanted.get("id"):
        return True  # one environment, whatever its config is called
    return there == here or (name in ("scenario", "map") and not (there and here))


def _refusal(
    path: Path, one: dict[str, Any], wanted: dict[str, Any], name: str, learnt: dict[str, Path]
) -> UserError:
    there, here = _words(name, one), _words(name, one | wanted)
    if name in learnt:
        said = f"{learnt[name]} is {here} and {path} {there}, and a network learns one world"
        return UserError(f"{said}; keep them in a folder each, and give data=DIR of one.")
    return UserError(f"{path} is {there}, not {here}; choose world= as it was made, or give something else.")


def _words(name: str, about: dict[str, Any]) -> str:
    if name in ("id", "name"):
        return f"of {about.get('id') or about['name']}"
    if name in ("width", "height"):
        return "of {width}x{height}".format(**about)
    words = {"tics": "of {} tics a frame", "fps": "of {:g} frames a second"}
    if name == "keys":
        return f"played with the keys {', '.join(about[name]) or '(none)'}"
    return words.get(name, f"of the {name} {{}}").format(about[name])


def _check_kinds(recordings: Mapping[Path, dict]) -> None:
    """Raises UserError where a number of the state is of different kinds in two recordings."""
    known: dict[str, tuple[str, Path]] = {}
    for path, header in recordings.items():
        for name, kind in (header["state_kinds"] or {}).items():
            other, where = known.setdefault(name, (kind, path))
            if other != kind:
                said = f"{name} is a {other} in {where} and a {kind} in {path}"
                raise UserError(f"{said}; keep them in a folder each, and give data=DIR of one.")


def other_game(header: dict, world: WorldConfig) -> str:
    """The game of a recording if that is not `world`; "" if it is, or is not known."""
    one = told(header)
    game, own = one.get("id") or one.get("name", ""), world.id or world.name
    return "" if not game or game == own or one.get("name") == own else game


def check_keys_mean_the_same(header: dict, world: WorldConfig, what: str) -> str:
    """As `other_game`. Raises UserError if keys of that game may do something else, though they have the same
    names: only Doom's worlds name them alike. `what`: the option that is read, such as `start=x`, for the
    message.
    """
    game = other_game(header, world)
    if game and not header["config"].get("kind", "doom") == world.kind == "doom":
        raise UserError(f"{what} is a recording of {game}, and this game is {world.id or world.name}.")
    return game
