"""Of which world recordings are: what nobody chose they tell, and what is of another is refused in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import UserError, WorldConfig
from engine.data.about_world import world_of
from engine.data.dataset import recorded_world, true_recordings
from engine.data.recording import Recorder, Recording
from engine.data.schema import read_header
from engine.data.starts import load_start
from engine.play.replay import Replay
from engine.worlds.base import ActionSpace

KEYS = {"push": ["Left"], "pull": ["Right"]}
CART = WorldConfig("gym", "gym", id="Cart-v1", height=32, width=64, tics=3, fps=50.0, keys=KEYS)
PLAIN = WorldConfig("gym", "gym", id="CartPole-v1", tics=1, fps=0)  # as its YAML leaves it
HOME = WorldConfig("doom_home", scenario="my_way_home", keys={"forward": ["W"]})


def record(where: Path, world: WorldConfig = CART, source: str = "true", **about) -> Path:
    """Two frames, in which the first key is held."""
    with Recorder(where, world, source, 0, **about) as recorder:
        for number in range(2):
            held = [1.0] + [0.0] * (len(recorder.names) - 1)
            recorder.add(np.zeros((world.height, world.width, 3), np.uint8), held, reset=not number)
    return where


def headers(folder: Path, *worlds: WorldConfig) -> dict[Path, dict]:
    paths = [record(folder / f"r{number}", world) for number, world in enumerate(worlds)]
    return {path: read_header(path) for path in paths}


@pytest.mark.parametrize("given", [(), ("world",), ("world", "data"), ("world", "world.id")])
def test_what_nobody_chose_the_recordings_tell(given, tmp_path):
    """Game, size, rate, tics and keys with what presses them; that also where the game was chosen."""
    world = replace(PLAIN, id="Cart-v1") if "world.id" in given else PLAIN
    assert world_of(headers(tmp_path, CART, CART), world, given) == CART
    assert world_of({}, world, given) == world


@pytest.mark.parametrize(
    "chosen, option, said",
    [
        ({"id": "Car-v0"}, "world.id", "of Cart-v1, not of Car-v0"),
        ({"height": 64}, "world.height", "of 64x32, not of 64x64"),
        ({"tics": 2}, "world.tics", "of 3 tics a frame, not of 2 tics"),
        ({"fps": 30.0}, "world.fps", "of 50 frames a second, not of 30 frames"),
        ({"keys": {"go": ["W"]}}, "world.keys.go", "keys push, pull, not played with the keys go"),
    ],
)
@pytest.mark.parametrize("on_a_command_line", [True, False])
def test_what_was_chosen_otherwise_is_refused(on_a_command_line, chosen, option, said, tmp_path):
    world, given = (PLAIN, [option]) if on_a_command_line else (CART, None)
    with pytest.raises(UserError, match=said):
        world_of(headers(tmp_path, CART), replace(world, **chosen), given)


def test_a_game_that_was_chosen_is_not_taken_from_recordings(tmp_path):
    for world, folder, said in ((HOME, CART, "of Cart-v1, not of doom_home"), (PLAIN, HOME, "of doom_home")):
        with pytest.raises(UserError, match=said):
            world_of(headers(tmp_path / folder.name, folder), world, ["world"])


def test_of_another_game_nothing_stays(tmp_path):
    """The scenario and keys of the world that would have been played are not those of the recorded one."""
    there = replace(CART, fps=17.5, tics=2)
    assert world_of(headers(tmp_path, there), replace(HOME, map="map02"), []) == there


@pytest.mark.parametrize(
    "change, said",
    [
        ({"id": "Car-v0"}, "r0 is of Cart-v1 and .*r1 of Car-v0"),
        ({"name": "doom_home", "kind": "doom", "id": ""}, "r0 is of Cart-v1 and .*r1 of doom_home"),
        ({"width": 96}, "r0 is of 64x32 and .*r1 of 96x32"),
        ({"tics": 4}, "r0 is of 3 tics a frame and .*r1 of 4 tics"),
        ({"fps": 25.0}, "r0 is of 50 frames a second and .*r1 of 25 frames"),
        (
            {"keys": {"push": ["Left"], "jump": ["Space"]}},
            "keys push, pull and .*r1 played with .*push, jump",
        ),
    ],
)
def test_mixtures_are_refused_and_both_are_named(change, said, tmp_path):
    found = headers(tmp_path, CART, replace(CART, **change))
    for order in (found, dict(reversed(found.items()))):
        with pytest.raises(UserError, match="a network learns one world; keep them in a folder each"):
            world_of(order, PLAIN, [])
    with pytest.raises(UserError, match=said):
        world_of(found, PLAIN, [])


def test_one_environment_under_two_names_and_other_ways_to_press_keys_are_one_world(tmp_path):
    other = replace(CART, name="cart", keys={"pull": [], "push": ["A"]}, episode_frames=9)
    found = world_of(headers(tmp_path, CART, other), PLAIN, ["world"])
    assert found == CART


def test_a_player_with_fewer_keys_did_not_hold_the_others(tmp_path):
    few = replace(CART, keys={"pull": ["Right"]})
    for number, worlds in enumerate(((few, CART), (CART, few))):
        assert world_of(headers(tmp_path / str(number), *worlds), PLAIN, []).keys == KEYS
    with pytest.raises(UserError, match="played with"):
        world_of(headers(tmp_path / "all", CART), few)  # here they are all that there are


def test_a_key_that_was_given_other_scancodes_keeps_its_place(tmp_path):
    other = replace(PLAIN, keys={"pull": ["Space"]})
    found = world_of(headers(tmp_path, CART), other, ["world", "world.keys.pull"])
    assert found == replace(CART, keys={"push": ["Left"], "pull": ["Space"]}) and list(found.keys) == list(
        KEYS
    )


def test_states_of_one_name_are_of_one_kind(tmp_path):
    paths = [record(tmp_path / kind, state_kinds={"x": kind}) for kind in ("position", "scalar")]
    with pytest.raises(UserError, match="x is a position in .* and a scalar in "):
        world_of({path: read_header(path) for path in paths}, PLAIN, [])


def test_what_is_taken_from_recordings_is_told_once(tmp_path, capsys):
    record(tmp_path / "a")
    record(tmp_path / "b", replace(CART, id="Dreamt-v0"), source="dream")
    assert recorded_world(str(tmp_path), PLAIN, ["world"]) == CART
    err = capsys.readouterr().err
    assert "id Cart-v1" in err and "width 64, tics 3." in err and len(err.splitlines()) == 1
    assert recorded_world(str(tmp_path), CART, []) == CART and not capsys.readouterr().err
    assert recorded_world(str(tmp_path / "none"), PLAIN, []) == PLAIN
    assert true_recordings(str(tmp_path), CART) == ([tmp_path / "a"], [])


def test_a_header_that_tells_nothing_of_its_world_is_believed_in_the_rest(tmp_path):
    """As of recordings that were imported."""
    header = read_header(record(tmp_path / "a")) | {"config": {}, "keymap": {}, "world": ""}
    found = world_of({tmp_path / "a": header}, PLAIN, [])
    assert (found.id, found.tics, found.keys) == ("CartPole-v1", 1, {"push": [], "pull": []})
    assert (found.height, found.width, found.fps) == (32, 64, 50.0)


def game(space: ActionSpace, world: WorldConfig) -> SimpleNamespace:
    """What a replay asks of the game that it is to play."""
    return SimpleNamespace(action_space=space, world=world, source="true", digest="")


def test_keys_of_another_environment_are_not_the_own_ones(tmp_path):
    """Though they be called alike; in games of Doom they do the same."""
    record(tmp_path / "cart")
    space, where = ActionSpace(tuple(KEYS), tuple(map(tuple, KEYS.values()))), f"{tmp_path}/cart"
    for world, said in (
        (replace(CART, id="Car-v0"), "of Cart-v1, and this game is Car-v0"),
        (HOME, "doom_home"),
    ):
        with pytest.raises(UserError, match=said):
            load_start(where, space, {}, 4, world)
        with pytest.raises(UserError, match=said):
            Replay(where).fit(game(space, world))
    assert load_start(where, space, {}, 4, CART).actions.any()
    Replay(where).fit(game(space, CART))
    record(tmp_path / "home", HOME)
    space, gathering = ActionSpace(("forward",), (("W",),)), replace(HOME, name="doom_gathering")
    Replay(tmp_path / "home").fit(game(space, gathering))
    assert load_start(f"{tmp_path}/home", space, {}, 4, gathering).actions.any()
    assert Recording(tmp_path / "home").names == ("forward",)
