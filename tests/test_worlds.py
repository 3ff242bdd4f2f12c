"""The true games: same bytes for the same seed and keys, keys that do as they are called, clear refusals."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.config import UserError, WorldConfig
from engine.data.sight import free_distances
from engine.worlds import make_world
from engine.worlds.base import STATE_KINDS
from engine.worlds.frames import fit

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


def test_doom_tells_its_state(doom):
    doom.reset(1)
    assert doom.state().keys() == doom.state_kinds.keys() and set(doom.state_kinds.values()) <= set(
        STATE_KINDS
    )
    assert ("ammo" in doom.state_kinds) == ("attack" in doom.action_space.names)
    if "forward" not in doom.action_space.names:
        return
    told = []
    for seed in range(3):
        doom.reset(seed)
        for _ in range(12):
            before = doom.state()
            doom.step(doom.action_space.encode(["forward"]))
            told.append((before, doom.state()))
    eyes = [after["eye"] for _, after in told]
    assert max(eyes) - min(eyes) > 3, "the camera bobs in walking"
    # what remains of a tic's way after friction; a frame is two tics, and it may be a wall's fault otherwise
    friction, exact = 0.90625, 0
    for before, after in told:
        for place, speed in (("x", "vx"), ("y", "vy")):
            first = before[speed] + (after[speed] / friction**2 - before[speed]) / (1 + 1 / friction)
            way = first + after[speed] / friction
            exact += abs(after[place] - before[place] - way) < 0.02
    assert exact > len(told)


def test_doom_maps_hold_their_players(doom):
    lines = doom.map_lines()
    assert lines.ndim == 2 and lines.shape[1] == 4 and len(lines) >= 4
    doom.reset(2)
    place = np.array([[doom.state()["x"], doom.state()["y"]]] * 36)
    assert np.isfinite(free_distances(lines, place, np.arange(36) * 10.0)).all(), "there are walls all around"
    if "forward" in doom.action_space.names:
        for _ in range(150):  # into the wall ahead
            if doom.done:
                break
            doom.step(doom.action_space.encode(["forward"]))
        told = doom.state()
        ahead = free_distances(lines, np.array([[told["x"], told["y"]]] * 8), np.arange(8) * 45.0)
        assert 10 < ahead.min() < 80


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that nobody can write into")
def test_doom_starts_where_nothing_can_be_written(monkeypatch):
    monkeypatch.chdir("/proc")
    world = make_world(world_config("doom_gathering"))
    assert Path.cwd() == Path("/proc")
    assert world.reset(2**70).shape == (96, 128, 3) and world.reset(-1).shape == (96, 128, 3)
    world.close()


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
    assert world.state() == world.state_kinds == {} and world.map_lines().shape == (0, 4)
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


def test_a_simulator_ends_with_a_player_that_is_killed():
    """ViZDoom itself minds no signal to end and would play on."""
    pytest.importorskip("vizdoom")
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs Linux")
    code = (
        "import sys, time, yaml\n"
        "from engine.config import WorldConfig\n"
        "from engine.worlds import make_world\n"
        "from engine.worlds.guard import children\n"
        "before, config = children(), yaml.safe_load(open(sys.argv[1]))\n"
        "world = make_world(WorldConfig(**config))\n"
        "print(*children() - before, flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(CONFIGS / "doom_gathering.yaml")]
    player = subprocess.Popen(command, cwd=CONFIGS.parent.parent, stdout=subprocess.PIPE, text=True)
    started = [Path("/proc") / number for number in player.stdout.readline().split()]
    simulators = [path for path in started if "vizdoom" in (path / "cmdline").read_text()]
    assert simulators
    player.kill()
    player.wait()
    until = time.monotonic() + 300
    while any(path.exists() for path in simulators) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(path.exists() for path in simulators)
