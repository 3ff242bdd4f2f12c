"""The true games: same bytes for the same seed and keys, keys that do as they are called, clear refusals."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.config import POLICIES, UserError, WorldConfig
from engine.policies import OPPOSITES, PolicyMixture, make_policy
from engine.worlds import ActionSpace, make_world
from engine.worlds.gym import fit

CONFIGS = Path(__file__).parent.parent / "configs" / "world"
DOOM = ("doom_arena", "doom_gathering", "doom_defend", "doom_home")


def world_config(name: str, **changes) -> WorldConfig:
    return WorldConfig(**{**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), **changes})


@pytest.fixture(scope="module", params=DOOM)
def doom(request):
    world = make_world(world_config(request.param))
    yield world
    world.close()


def play(world, seed: int, frames: int = 60) -> list[bytes]:
    rng = np.random.default_rng(seed)
    seen = [world.reset(seed).tobytes()]
    for _ in range(frames):
        if world.done:
            seen.append(world.reset(seed + 1).tobytes())
        seen.append(world.step(rng.random(len(world.action_space)) < 0.4).tobytes())
    return seen


def hold(world, name: str, frames: int = 10, seed: int = 1) -> tuple[dict, dict]:
    world.reset(seed)
    before = world.state()
    for _ in range(frames):
        world.step(world.action_space.encode([name]))
    return before, world.state()


def test_doom_is_determined_by_seed_and_actions(doom):
    first = play(doom, 3)
    other = play(doom, 4)
    assert play(doom, 3) == first != other
    fresh = make_world(doom.config)
    try:
        assert play(fresh, 3) == first
    finally:
        fresh.close()


def test_doom_frames_are_pictures(doom):
    frame = doom.reset(0)
    assert frame.shape == (96, 128, 3) and frame.dtype == np.uint8
    assert frame.std() > 10
    kept = frame.copy()
    doom.step(np.zeros(len(doom.action_space)))
    assert np.array_equal(frame, kept), "a frame must not be overwritten by the next one"


def test_doom_walking_keys_move_along_the_gaze(doom):
    directions = {"forward": 0, "backward": 180, "strafe_left": 90, "strafe_right": -90}
    there = [name for name in directions if name in doom.action_space.names]
    assert len(there) in (0, 4)
    for name in there:
        # several starts, as a wall may be in the way of one
        turned = []
        for seed in range(3):
            before, after = hold(doom, name, seed=seed)
            way = complex(after["x"] - before["x"], after["y"] - before["y"])
            gaze = np.deg2rad(before["angle"] + directions[name])
            turned.append((way * np.exp(-1j * gaze)).real)
        assert max(turned) > 30, name


def test_doom_turning_and_shooting(doom):
    for name, sign in (("turn_left", 1), ("turn_right", -1)):
        before, after = hold(doom, name)
        turned = (after["angle"] - before["angle"] + 180) % 360 - 180
        assert 30 < sign * turned < 120
    if "attack" in doom.action_space.names:
        before, after = hold(doom, "attack")
        assert after["ammo"] < before["ammo"]


def test_doom_idle_player_keeps_the_place(doom):
    doom.reset(1)
    before = doom.state()
    for _ in range(10):
        doom.step(np.zeros(len(doom.action_space)))
    assert {k: before[k] for k in ("x", "y", "angle")} == {k: doom.state()[k] for k in ("x", "y", "angle")}


def test_doom_episode_ends_by_death_and_by_length():
    short = make_world(world_config("doom_gathering", episode_frames=5))
    nothing = np.zeros(len(short.action_space))
    short.reset(0)
    assert [short.step(nothing) is not None and short.done for _ in range(5)] == [False] * 4 + [True]
    with pytest.raises(RuntimeError, match="reset"):
        short.step(nothing)
    short.reset(1)
    assert not short.done
    short.config.episode_frames = 1050
    frames = [short.step(nothing) for _ in iter(lambda: short.done, True)]  # the floor kills who stands still
    assert 100 < len(frames) < 300 and frames[-1].shape == (96, 128, 3)
    short.close()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scenario": "doom_nowhere"}, "no scenario 'doom_nowhere'"),
        ({"keys": {"fly": ["F"]}}, "not fly"),
        ({"width": 96}, "cannot draw 96x96"),
    ],
)
def test_doom_refuses_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        make_world(world_config("doom_gathering", **changes))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("id", ["CartPole-v1", "gymnasium.envs.classic_control:Pendulum-v1"])
def test_gym_worlds(id):
    world = make_world(world_config("gym", id=id, episode_frames=12))
    assert all(world.action_space.bindings) and len(world.action_space) == 2
    first = play(world, 3, frames=30)
    assert first == play(world, 3, frames=30) and len(first[0]) == 96 * 128 * 3 and len(set(first)) > 10
    assert world.state() == {}
    world.close()


def test_gym_key_names_can_be_given():
    world = make_world(world_config("gym", keys={"left": ["A"], "right": ["D"]}))
    assert world.action_space.names == ("left", "right")
    world.reset(0)
    right = [world.step(world.action_space.encode(["right"])) for _ in range(3)][-1]
    world.reset(0)
    left = [world.step(world.action_space.encode(["left"])) for _ in range(3)][-1]
    assert not np.array_equal(left, right)
    world.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "id, words", [("Nope-v0", "Nope"), ("no_module:X-v0", "no_module"), ("", "needs the id")]
)
def test_gym_refuses_in_one_sentence(id, words):
    with pytest.raises(UserError, match=words):
        make_world(world_config("gym", id=id))


def test_fit_averages_areas_and_keeps_the_aspect():
    wide = np.arange(64 * 256 * 3, dtype=np.uint32).reshape(64, 256, 3).astype(np.uint8)
    frame = fit(wide, 32, 64)
    mean = wide.reshape(16, 4, 64, 4, 3).astype(int).sum((1, 3))
    assert np.array_equal(frame[8:24], (mean + 8) // 16) and not frame[:8].any() and not frame[24:].any()
    small = np.full((3, 4, 3), 9, np.uint8)
    assert (fit(small, 96, 128) == 9).all()


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "keyboard"] + ["mixture"])
@pytest.mark.parametrize("keys", [("forward", "backward", "turn_left", "turn_right"), ("a", "b"), ("x",)])
def test_policies_play_any_keys_reproducibly(name, keys):
    space = ActionSpace(keys, ((),) * len(keys))

    def actions(seed):
        policy = PolicyMixture(space, seed, 17.5) if name == "mixture" else make_policy(name, space, seed)
        states = ({"x": 3.0 * min(t, 100), "y": 0.0} for t in range(300))  # walks, then runs into something
        return np.stack([policy(state, space) for state in states])

    played = actions(0)
    assert played.shape == (300, len(keys)) and np.array_equal(played, actions(0))
    assert played.any() == (name != "idle")
    if name not in ("idle", "spin") and len(keys) > 1:
        assert not np.array_equal(played, actions(1))
    for pair in OPPOSITES:
        if set(pair) <= set(keys):
            assert not played[:, [keys.index(key) for key in pair]].all(1).any()


def test_mixture_shares():
    space = ActionSpace(("forward", "turn_left", "turn_right"), ((),) * 3)
    mixture, names = PolicyMixture(space, 0, 17.5), []
    for _ in range(60_000):
        mixture({}, space)
        names.append(mixture.name)
    shares = {name: names.count(name) / len(names) for name in set(names)}
    assert abs(shares["scripted"] - 0.55) < 0.1 and abs(shares["random"] - 0.20) < 0.1
    assert abs(shares["idle"] - 0.12) < 0.05 and abs(shares["walls"] + shares["spin"] - 0.18) < 0.08
    with pytest.raises(UserError, match="no policy 'keyboard'"):
        make_policy("keyboard", space, 0)
