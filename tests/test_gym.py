"""Gymnasium worlds as they are found: what they draw, raise and call their actions; pygame is shared."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("gymnasium")
import gym_games  # noqa: E402
from gymnasium import spaces  # noqa: E402

from engine.config import TrainConfig, UserError, WorldConfig  # noqa: E402
from engine.data.collection import collect  # noqa: E402
from engine.data.dataset import recorded_world  # noqa: E402
from engine.data.find import find_recordings  # noqa: E402
from engine.data.recording import Recording  # noqa: E402
from engine.programs import play  # noqa: E402
from engine.worlds import make_world  # noqa: E402

PLAIN = gym_games.Plain().picture()  # 40, but a square of (200, 100, 50)


def config(name: str, **changes) -> WorldConfig:
    options = {"id": f"gym_games:{name}-v0", "height": 32, "width": 64, "tics": 1, "fps": 0.0, **changes}
    return WorldConfig("gym", "gym", **options)


def options(name: str, *more: str) -> list[str]:
    world = ["game=true", "world=gym", f"world.id=gym_games:{name}-v0", "world.height=32", "world.width=64"]
    return [*world, "policy=random", *more]


@pytest.fixture
def drawn(monkeypatch):
    """Sets what the game Drawn renders → the frames of a reset and of steps."""

    def see(draw, steps: int = 0) -> list[np.ndarray]:
        monkeypatch.setattr(gym_games.Drawn, "draw", staticmethod(draw))
        world = make_world(config("Drawn"))
        return [world.reset(0)] + [world.step(np.zeros(3)) for _ in range(steps)]

    return see


# frames ----------------------------------------------------------------------------------------------


GREY = PLAIN[..., 0]
ONE = np.full((32, 64, 1), 1)


@pytest.mark.parametrize(
    "draw, expected",
    [
        (lambda p: p, PLAIN),
        (lambda p: p / 255, PLAIN),
        (lambda p: (p / 255).astype(np.float16), PLAIN),
        (lambda p: p / 255 * 1.0001 - 1e-5, PLAIN),
        (lambda p: p.astype(np.float32), PLAIN),
        (lambda p: p.astype(np.int64), PLAIN),
        (lambda p: p.astype(np.uint16), PLAIN),
        (lambda p: p.tolist(), PLAIN),
        (lambda p: p > 90, (PLAIN > 90) * 255),
        (lambda p: p[..., 0], GREY[..., None].repeat(3, 2)),
        (lambda p: p[..., :1] / 255, GREY[..., None].repeat(3, 2)),
        (lambda p: p.transpose(2, 0, 1), PLAIN),
        (lambda p: np.dstack([p, 255 * ONE]).astype(np.uint8), PLAIN),
        (lambda p: np.dstack([p, 0 * ONE]).astype(np.uint8), PLAIN),
        (lambda p: np.dstack([p, 255 * ONE]) / 255, PLAIN),
        (lambda p: np.dstack([p, 255 * (GREY > 90)]).astype(np.uint8), PLAIN * (GREY > 90)[..., None]),
        (lambda p: np.zeros((32, 64, 3)), np.zeros((32, 64, 3))),
    ],
)
def test_pictures_become_the_frames_that_they_mean(drawn, draw, expected):
    frame = drawn(lambda picture, steps: draw(picture))[0]
    assert frame.dtype == np.uint8 and np.abs(frame.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "draw, words",
    [
        (lambda p: None, "nothing"),
        (lambda p: p.astype(int) - 60, "values from -20 to 140"),
        (lambda p: p.astype(int) * 2, "values from 80 to 400"),
        (lambda p: p / 127.5 - 1, "values from -0.68"),
        (lambda p: np.where(p > 90, np.nan, 0.5), "no numbers"),
        (lambda p: p[:0], r"shape \(0, 64, 3\)"),
        (lambda p: p[None], r"shape \(1, 32, 64, 3\)"),
        (lambda p: p[..., :2], r"shape \(32, 64, 2\)"),
        (lambda p: "###", "a str, which"),
        (lambda p: {"rgb": p}, "a dict, which"),
        (lambda p: [[1, 2], [3]], "a list, which"),
        (lambda p: p * 1j, "complex"),
    ],
)
def test_what_is_not_certain_is_refused(drawn, draw, words):
    for bad in (0, 2):  # also in the middle of a game
        with pytest.raises(UserError, match=f"'gym_games:Drawn-v0' renders .*{words}"):
            drawn(lambda picture, steps, bad=bad: draw(picture) if steps >= bad else picture, 2)


def test_floats_have_one_range_in_all_pictures(drawn):
    black, dim, bright = (np.full((32, 64, 3), value) for value in (0.0, 1.0, 77.0))
    seen = drawn(lambda picture, steps: [black, bright, dim][steps], 2)
    assert [int(frame.max()) for frame in seen] == [0, 77, 1], "not white, where 255 is"
    with pytest.raises(UserError, match="up to 1 in one picture and up to 77"):
        drawn(lambda picture, steps: [black, dim, bright][steps], 2)


def test_an_end_of_which_nothing_is_drawn():
    world = make_world(config("Ends"))
    for seed in range(2):
        world.reset(seed)
        frames = [world.step(np.zeros(3)) for _ in range(4)]
        assert world.done and np.array_equal(frames[3], frames[2]) and (frames[2] != frames[1]).any()


# exceptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("the arm\n left its workspace"), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("where", ["__init__", "reset", "step", "render", "close"])
def test_an_environments_exception_is_told_as_its_own(tmp_path, capsys, monkeypatch, where, error):
    monkeypatch.setattr(gym_games.Fails, "where", where)
    monkeypatch.setattr(gym_games.Fails, "error", error)
    record = tmp_path / "r"
    made = ["display=headless", f"record={record}", "world.episode_frames=8", "frames=20"]
    assert play.main(options("Fails", *made)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("play.py:")]
    method = "cannot be made" if where == "__init__" else f"failed in {where}"
    assert len(said) == 1 and f"'gym_games:Fails-v0' {method}: {type(error).__name__}" in said[0]
    assert "gym_games.py:" in said[0] and "\n" not in said[0]
    kept = {"__init__": None, "reset": 9, "step": 6, "render": 5, "close": 23}[where]
    assert len(Recording(record)) == kept if kept else not record.exists()


def test_a_failing_environment_is_told_before_anything_is_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(gym_games.Fails, "where", "__init__")
    wanted = TrainConfig(stage="collect", world=config("Fails"), data=str(tmp_path), frames=20, workers=1)
    with pytest.raises(UserError, match="cannot be made: ValueError: the arm left"):
        collect(wanted)
    assert not list(tmp_path.glob("*/"))


# keys ------------------------------------------------------------------------------------------------


ATARI = ["NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "UPFIRE", "RIGHTFIRE"]


@pytest.fixture
def held(monkeypatch):
    """Sets actions and their names → (world, what holding these keys makes of it)."""

    def make(space: spaces.Space, names=()):
        monkeypatch.setattr(gym_games.Moves, "action_space", space)
        monkeypatch.setattr(gym_games.Moves, "names", names)
        world = make_world(config("Moves"))
        world.reset(0)

        def hold(*keys: str):
            world.step(world.action_space.encode(keys))
            assert space.contains(gym_games.Plain.taken[-1])
            return gym_games.Plain.taken[-1]

        return world, hold

    return make


def test_held_keys_are_composed_as_the_game_has_it(held):
    world, hold = held(spaces.Discrete(len(ATARI)), ATARI)
    keys = dict(zip(world.action_space.names, world.action_space.bindings, strict=True))
    assert keys == {
        "fire": ("Space",), "up": ("Up", "W"), "right": ("Right", "D"), "left": ("Left", "A"),
        "down": ("Down", "S"),
    }  # fmt: skip
    for pressed, action in [
        ((), "NOOP"),
        (("fire",), "FIRE"),
        (("up", "fire"), "UPFIRE"),
        (("left", "up"), "UPLEFT"),
        (("down", "fire"), "FIRE"),  # DOWNFIRE is not there: the first that is
        (("left", "right"), "NOOP"),
        (("left", "right", "up"), "UP"),
        (("left", "right", "fire", "up"), "UPFIRE"),
    ]:
        assert ATARI[hold(*pressed)] == action, pressed


def test_all_of_ataris_actions_are_reached_by_five_keys(held):
    ways = ["", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT"]
    names = ["NOOP" if not way + fire else way + fire for fire in ("", "FIRE") for way in ways]
    world, hold = held(spaces.Discrete(18), names)
    assert len(world.action_space) == 5
    reached = {
        hold(*keys) for count in range(4) for keys in itertools.combinations(world.action_space.names, count)
    }
    assert reached == set(range(18))


@pytest.mark.parametrize(
    "names, keys, pressed, action",
    [
        (["NOOP", "right", "right A", "right B", "right A B", "A", "left"], "right a left b", "right a b", 4),
        (["NOOP", "UP", "RIGHT", "RIGHTFIRE"], "up right fire", "right fire", 3),
        (["NOOP", "RIGHTFIRE", "LEFTFIRE"], "rightfire leftfire", "leftfire", 2),
        (["left", "right", "forward", "pick up", "up"], "left right forward pick_up up", "pick_up", 3),
        ([["NOOP"], ["right"], ["right", "A"]], "right a", "right a", 2),
        ({0: "wait", 1: "Turn Left"}, "wait turn_left", "turn_left", 1),
        (["a", "a", "b"], "action_0 action_1 action_2", "action_2 action_1", 1),
    ],
)
def test_names_are_taken_apart_where_their_parts_are_actions(held, names, keys, pressed, action):
    world, hold = held(spaces.Discrete(len(names)), names)
    assert world.action_space.names == tuple(keys.split())
    assert hold(*pressed.split()) == action


def test_no_key_is_given_twice(held):
    names = ["noop", "fire", "jump", "up", "forward", "turn_left", "strafe_left", "left"]
    names += [f"spell_{i}" for i in range(60)]
    world, _ = held(spaces.Discrete(len(names)), names)
    codes = [code for binding in world.action_space.bindings for code in binding]
    assert len(codes) == len(set(codes)) > 45
    keys = dict(zip(world.action_space.names, world.action_space.bindings, strict=True))
    assert keys["fire"] == ("Space",) and keys["left"] == ("Left", "A") and keys["up"] == ("Up", "W")
    assert keys["jump"] == ("1",) and keys["forward"] == ("2",) and keys["turn_left"] and not keys["spell_59"]


def test_keys_are_those_of_a_keyboard(held):
    import pygame

    from engine.play.ui.keys import check_bindings

    pygame.display.init()
    try:
        check_bindings(held(spaces.Discrete(99))[0].action_space)
    finally:
        pygame.display.quit()


def test_some_keys_can_be_given(held, monkeypatch):
    monkeypatch.setattr(gym_games.Moves, "action_space", spaces.Discrete(4))
    monkeypatch.setattr(gym_games.Moves, "names", ["noop", "left", "right", "up"])
    world = make_world(config("Moves", keys={"right": ["P", "A"]}))
    assert world.action_space.names == ("left", "right", "up")
    assert world.action_space.bindings == (("Left",), ("P", "A"), ("Up", "W")), "A is taken"
    with pytest.raises(UserError, match="some of left, right, up, or as many .*; given are jump, up"):
        make_world(config("Moves", keys={"jump": ["P"], "up": ["U"]}))


def test_actions_without_a_key_are_told(capsys, monkeypatch):
    monkeypatch.setattr(gym_games.Moves, "action_space", spaces.Discrete(60))
    monkeypatch.setattr(gym_games.Moves, "names", [])
    assert play.main(options("Moves", "display=headless", "frames=3")) == 0
    said = capsys.readouterr()
    assert "13 of 60 actions have no key (action_47, " in said.err and "action_59)" in said.err
    assert json.loads(said.out.splitlines()[-1])["frames"] == 3


def test_nothing_held_is_nought_where_actions_lie_around_it(held):
    world, hold = held(spaces.Discrete(3, start=-1))
    assert [hold(), hold("action_0"), hold("action_1"), hold("action_2")] == [0, -1, 0, 1]


def test_several_choices_at_once(held):
    world, hold = held(spaces.MultiDiscrete([3, 2, 1]))
    assert world.action_space.names == ("choice_0_1", "choice_0_2", "choice_1")
    assert hold().tolist() == [0, 0, 0] and hold("choice_0_2", "choice_1").tolist() == [2, 1, 0]
    assert hold("choice_0_1", "choice_0_2").tolist() == [1, 0, 0]
    world, hold = held(spaces.MultiDiscrete([[2, 2], [2, 3]]))
    assert hold("choice_1_0", "choice_1_1_2").tolist() == [[0, 0], [1, 2]]
    world, hold = held(spaces.MultiBinary((2, 2)))
    assert hold("button_1_0", "button_0_1").tolist() == [[0, 1], [1, 0]]


def test_buttons_are_called_as_the_environment_calls_them(held, monkeypatch):
    monkeypatch.setattr(gym_games.Moves, "buttons", ["B", None, "LEFT", "RIGHT"], raising=False)
    world, hold = held(spaces.MultiBinary(4))
    assert world.action_space.names == ("b", "left", "right")
    assert world.action_space.bindings[1] == ("Left", "A") and hold("b", "right").tolist() == [1, 0, 0, 1]


def test_dicts_of_all_that(held):
    space = spaces.Dict(
        {
            "attack": spaces.Discrete(2),
            "camera": spaces.Box(-90, 90, (2,)),
            "left": spaces.Discrete(2),
            "hand": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)]),
            "tool": spaces.Discrete(4),
        }
    )
    world, hold = held(space)
    keys = dict(zip(world.action_space.names, world.action_space.bindings, strict=True))
    assert keys["attack"] == ("Space",) and keys["left"] == ("Left", "A") and all(keys.values())
    assert {"camera_0_minus", "camera_1_plus", "hand_0_0", "hand_0_1_2", "hand_1_1", "tool_3"} <= set(keys)
    action = hold(
        "left", "camera_1_plus", "camera_0_plus", "camera_0_minus", "hand_0_1_2", "hand_1_0", "tool_3"
    )
    assert action["left"] == 1 and action["attack"] == 0 and action["tool"] == 3
    assert action["camera"].tolist() == [0, 90], "both sides of an axis are none"
    assert [part.tolist() for part in action["hand"]] == [[0, 2], [1, 0]]


def test_axes(held):
    world, hold = held(spaces.Box(np.array([-2, 0, -np.inf]), np.array([4, 1, np.inf]), dtype=np.float64))
    assert world.action_space.names == (
        "axis_0_minus",
        "axis_0_plus",
        "axis_1_plus",
        "axis_2_minus",
        "axis_2_plus",
    )
    assert hold().tolist() == [0, 0, 0]
    assert hold("axis_0_plus", "axis_1_plus", "axis_2_minus").tolist() == [4, 1, -1]


@pytest.mark.parametrize(
    "space, words",
    [
        (spaces.Text(4), "not Text"),
        (spaces.Dict({"say": spaces.Text(4)}), "not Text"),
        (spaces.Dict({}), "nothing to play"),
        (spaces.MultiDiscrete([1, 1]), "nothing to play"),
        (spaces.Discrete(10**12), "more than 1024 keys"),
        (spaces.MultiDiscrete([3] * 600), "more than 1024 keys"),
        (spaces.MultiDiscrete([2, 10**9]), "more than 1024 keys"),
        (spaces.Box(-1, 1, (600,)), "more than 1024 keys"),
        (spaces.Dict({"look": spaces.Box(0, 1, (4000, 4000))}), "more than 1024 keys"),
    ],
)
def test_what_keys_cannot_play_is_refused(held, space, words):
    with pytest.raises(UserError, match=words):
        held(space)


# rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told, changes, fps",
    [
        ({"render_fps": 50}, {}, 50),
        ({"render_fps": 50}, {"tics": 4}, 12.5),
        ({"render_fps": 50}, {"tics": 4, "fps": 20.0}, 20),
        ({}, {}, 20),
        ({"render_fps": None}, {}, 20),
        ({"render_fps": "fast"}, {}, 20),
        ({"render_fps": float("inf")}, {}, 20),
        ({"render_fps": 0}, {}, 20),
    ],
)
def test_the_rate_is_the_environments_unless_given(monkeypatch, told, changes, fps):
    monkeypatch.setattr(gym_games.Plain, "metadata", {"render_modes": ["rgb_array"], **told})
    assert make_world(config("Plain", **changes)).fps == fps


def test_the_rate_is_recorded_and_trained_with(tmp_path, capsys):
    assert play.main(options("Plain", "display=headless", "frames=3", f"record={tmp_path / 'r'}")) == 0
    assert Recording(tmp_path / "r").fps == 50
    data = tmp_path / "data"
    wanted = TrainConfig(stage="collect", world=config("Plain"), data=str(data), frames=20, workers=1)
    assert collect(wanted)["frames"] == 20
    recording = Recording(find_recordings(data)[0])
    assert recording.fps == recording.header["config"]["fps"] == 50
    found = recorded_world(str(data), wanted.world, [])
    assert found.fps == 50 and list(found.keys) == list(recording.names)
    with pytest.raises(UserError, match="world.fps is 50.0 there and 20.0 here"):
        collect(TrainConfig(stage="collect", world=config("Plain", fps=20.0), data=str(data), frames=40))


def test_a_rate_of_nought_is_for_gymnasium_alone():
    with pytest.raises(UserError, match="at least 0.01, or 0 for kind gym"):
        WorldConfig(fps=0)


# window ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["CartPole-v1", "gym_games:Pygame-v0"])
def test_an_environment_that_ends_pygame_leaves_the_window_alone(capsys, monkeypatch, id):
    import pygame

    from engine.play.ui.screen import Screen

    sizes, close = [], Screen.close

    def last(screen: Screen) -> None:
        assert pygame.display.get_init() and pygame.font.get_init(), "the window is the last to go"
        sizes.append(pygame.display.get_window_size())
        close(screen)

    monkeypatch.setattr(Screen, "close", last)
    made = ["display=window", "game=true", "world=gym", f"world.id={id}", "world.episode_frames=10"]
    own = (pygame.quit, pygame.display.set_mode, pygame.event.get)
    assert play.main([*made, "policy=random", "frames=25", "scale=2"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["frames"] == 25
    assert sizes == [(256, 192)] and not pygame.display.get_init()
    assert own == (pygame.quit, pygame.display.set_mode, pygame.event.get), "pygame is everybody's again"


def test_keys_reach_the_window_though_an_environment_reads_all_events(monkeypatch, tmp_path, capsys):
    """F10 leaves a game without an end, whose environment empties the queue at each frame."""
    import pygame

    from engine.play.ui.loop import Loop

    look, seen = Loop.look, []

    def press(loop: Loop) -> None:
        look(loop)
        seen.append(loop.stepper.view)
        if len(seen) == 5:
            for key in (pygame.KSCAN_LEFT, pygame.KSCAN_F10):
                pygame.event.post(pygame.event.Event(pygame.KEYDOWN, scancode=key, mod=0))

    monkeypatch.setattr(Loop, "look", press)
    assert play.main(options("Pygame", "display=window", "frames=2000")) == 0
    assert 4 <= json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] < 2000
