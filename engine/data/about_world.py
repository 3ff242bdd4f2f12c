"""What is known of a world that its config leaves open: from the game once it is open, and from recordings.

`world_of` alone decides what a folder of recordings is of; whoever reads one asks it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import UserError, WorldConfig
from ..worlds import World

# of a world's config: by these two recordings are of one world or not; which game comes first
COMPARED = ("id", "name", "scenario", "map", "width", "height", "tics", "fps", "keys")
TAKEN = (*COMPARED, "kind", "episode_frames")  # these are taken from recordings


def described(config: WorldConfig, game: World) -> WorldConfig:
    """The config with what only the opened game knows: a Gymnasium world chooses keys and rate by its
    environment.
    """
    space = game.action_space
    keys = dict(zip(space.names, map(list, space.bindings), strict=True))
    return replace(config, keys=keys, fps=game.fps)


def told(header: dict) -> dict[str, Any]:
    """What the header of a recording (schema.py) tells of its world, by the names of WorldConfig's fields;
    what it leaves open is not among it.
    """
    about = header["config"] | {"name": header["world"], "fps": float(header["fps"])}
    about |= {name: header[name] for name in ("width", "height")}
    about |= {"keys": {name: list(header["keymap"].get(name, [])) for name in header["names"]}}
    about = {name: about[name] for name in TAKEN if about.get(name) or name == "keys"}
    return {"id": "", **about} if "name" in about else about


def world_of(
    recordings: Mapping[Path, dict], world: WorldConfig, given: Collection[str] | None = None
) -> WorldConfig:
    """The one world that all true recordings, path → header, are of; `world` where there are none.

    `given`: the options that were chosen on a command line; what of `world` they name is what is wanted, and
    all else the recordings tell. None: all of `world` is wanted, but for what it leaves open (keys, fps).
    Raises UserError where a recording is of another world, or two are of different ones.
    """
    _check_kinds(recordings)
    return agreed({path: told(header) for path, header in recordings.items()}, world, given)


def agreed(
    tellers: Mapping[Path, dict[str, Any]], world: WorldConfig, given: Collection[str] | None = None
) -> WorldConfig:
    """`world_of` for anything that tells of a world: path → what it tells, by the names of WorldConfig's
    fields.
    """
    if not tellers:
        return world
    wanted = {name: value for name, value in asdict(world).items() if _is_chosen(name, value, world, given)}
    learnt: dict[str, Path] = {}  # field → which recording told it first, where nobody chose
    own_keys = wanted.get("keys", {})  # on a command line some, whose scancodes are to be others
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
    # world=NAME chooses a game; but `gym` is all those of Gymnasium, and which one it is says its id
    return "world" in given and (name == "name" or (name == "id" and not value))


def _alike(name: str, one: dict[str, Any], wanted: dict[str, Any], grows: bool) -> bool:
    there, here = one[name], wanted[name]
    if name == "keys":  # one that a player did not have was not held
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
    """What two recordings tell of their world's state under one name must be of one kind."""
    known: dict[str, tuple[str, Path]] = {}
    for path, header in recordings.items():
        for name, kind in (header["state_kinds"] or {}).items():
            other, where = known.setdefault(name, (kind, path))
            if other != kind:
                said = f"{name} is a {other} in {where} and a {kind} in {path}"
                raise UserError(f"{said}; keep them in a folder each, and give data=DIR of one.")


def other_game(header: dict, world: WorldConfig) -> str:
    """Which other game than `world` a recording is of; "" where it is of that, or does not tell."""
    one = told(header)
    game, own = one.get("id") or one.get("name", ""), world.id or world.name
    return "" if not game or game == own or one.get("name") == own else game


def check_keys_mean_the_same(header: dict, world: WorldConfig, what: str) -> str:
    """As `other_game`. Raises UserError where the keys of the other game, though they be called alike, do
    something else: all games but those of Doom call theirs as they like. `what` is read, such as `start=x`.
    """
    game = other_game(header, world)
    if game and not header["config"].get("kind", "doom") == world.kind == "doom":
        raise UserError(f"{what} is a recording of {game}, and this game is {world.id or world.name}.")
    return game
