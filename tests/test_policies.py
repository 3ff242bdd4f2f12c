"""Players without a player: reproducible by seed, with any keys, and with a map they look into rooms."""

from itertools import groupby

import numpy as np
import pytest

from engine.config import POLICIES, UserError
from engine.data.floor import Floor
from engine.data.policies import OPPOSITES, SHARES, PolicyMixture, make_policy
from engine.data.sight import filled_views, free_distances, wall_share
from engine.worlds import ActionSpace

WALK = ("forward", "backward", "strafe_left", "strafe_right", "turn_left", "turn_right")
SQUARE = [[0, 0, 800, 0], [800, 0, 800, 800], [800, 800, 0, 800], [0, 800, 0, 0]]
# two rooms with a door of 64 units in the wall between them
ROOMS = np.array([*SQUARE, [400, 0, 400, 368], [400, 432, 400, 800]], float)
SQUARE = np.array(SQUARE, float)


def space_of(keys: tuple[str, ...]) -> ActionSpace:
    return ActionSpace(keys, ((),) * len(keys))


class Walker:
    """A body of 16 units to each side that walks 14 units and turns 7 degrees a frame, as in Doom."""

    def __init__(self, lines: np.ndarray, place: tuple[float, float, float] = (200.0, 200.0, 0.0)) -> None:
        self.lines, self.place = lines, np.array(place)

    def state(self) -> dict[str, float]:
        return dict(zip(("x", "y", "angle"), map(float, self.place), strict=True))

    def step(self, held: tuple[str, ...]) -> None:
        self.place[2] = (self.place[2] + 7 * (("turn_left" in held) - ("turn_right" in held))) % 360
        ways = {"forward": 0, "backward": 180, "strafe_left": 90, "strafe_right": -90}
        for angle in [self.place[2] + ways[name] for name in held if name in ways]:
            gaze = np.deg2rad(angle)
            for step in (np.array([np.cos(gaze), 0]) * 14, np.array([0, np.sin(gaze)]) * 14):  # slides
                there = self.place[:2] + step
                around = np.repeat(there[None], 16, axis=0)
                if free_distances(self.lines, around, np.arange(16) * 22.5).min() >= 16:
                    self.place[:2] = there


def walk(policy, lines: np.ndarray, frames: int, told: bool = True) -> tuple[np.ndarray, list[tuple]]:
    """Places (n, 3) and the held keys of a policy that plays the walker."""
    walker, space, places, held = Walker(lines), space_of(WALK), [], []
    for _ in range(frames):
        held.append(space.decode(policy(walker.state() if told else {}, space)))
        walker.step(held[-1])
        places.append(walker.place.copy())
    return np.array(places), held


def test_free_distances_and_filled_views():
    centre = np.array([[400.0, 400.0]] * 3)
    assert free_distances(SQUARE, centre, np.array([0.0, 90.0, 45.0])) == pytest.approx(
        [400, 400, 400 * 2**0.5]
    )
    assert np.isinf(free_distances(SQUARE, np.array([[900.0, 400.0]]), np.array([0.0]))).all()
    assert np.isinf(free_distances(np.zeros((0, 4)), centre, np.zeros(3))).all()
    # 60 units before a wall it fills the view; 80 units before it the outer rays are 104 long
    places = np.array([[740, 400, 0], [720, 400, 0], [740, 400, 90], [740, 400, 180.0]])
    assert filled_views(SQUARE, places).tolist() == [True, False, False, False]
    states = [{"x": 740, "y": 400, "angle": 0}, None, {"health": 1}, {"x": 720, "y": 400, "angle": 0}]
    assert wall_share(states, SQUARE) == 0.5
    assert wall_share(states, np.zeros((0, 4))) is None and wall_share([None, {}], SQUARE) is None


def test_routes_lead_through_the_door():
    floor, rng, crossed = Floor(ROOMS), np.random.default_rng(0), 0
    assert not floor.clear(np.array([200.0, 200.0]), np.array([600.0, 200.0]))
    assert floor.clear(np.array([200.0, 400.0]), np.array([600.0, 400.0]))
    for _ in range(20):
        route = floor.route(np.array([200.0, 200.0]), rng)
        assert np.abs(np.diff(route, axis=0)).sum(1) == pytest.approx(floor.cell)
        through = np.flatnonzero((route[:-1, 0] < 400) & (route[1:, 0] > 400))
        crossed += len(through)
        assert (np.abs(route[through, 1] - 400) < 32).all()
    assert crossed > 3
    assert not len(floor.route(np.array([5000.0, 0.0]), rng)), "from outside nothing can be reached"


@pytest.mark.parametrize("lines", [SQUARE, ROOMS], ids=["one room", "two rooms"])
def test_explorer_sees_rooms_and_visits_them_all(lines):
    places, held = walk(make_policy("explore", space_of(WALK), 0, lines), lines, 4000)
    assert filled_views(lines, places).mean() < 0.2
    cells = {(int(x // 100), int(y // 100)) for x, y, _ in places}
    assert len(cells) > 50, f"{len(cells)} of 64 parts of the map were visited"
    assert {key for keys in held for key in keys} == set(WALK)
    again, _ = walk(make_policy("explore", space_of(WALK), 0, lines), lines, 300)
    other, _ = walk(make_policy("explore", space_of(WALK), 1, lines), lines, 300)
    assert np.array_equal(again, places[:300]) and not np.array_equal(other, again)


def reversals(places: np.ndarray) -> int:
    """How often 12 frames of walking, over 100 units, were followed by a turn and the same way back."""
    way = places[1:][np.hypot(*np.diff(places[:, :2], axis=0).T) > 2]  # without standing and turning
    found = 0
    for turn in range(12, len(way) - 12):
        there, back = way[turn - 12 : turn][::-1], way[turn + 1 : turn + 13]
        far = np.hypot(*(back[-1] - way[turn])[:2]) > 100
        near = (np.hypot(*(there - back)[:, :2].T) < 30).all()
        turned = abs((back[-1, 2] - there[-1, 2]) % 360 - 180) < 30
        found += bool(far and near and turned)
    return found


def test_explorer_comes_back_the_same_way():
    places, _ = walk(make_policy("explore", space_of(WALK), 3, SQUARE), SQUARE, 4000)
    blind, _ = walk(make_policy("random", space_of(WALK), 3), SQUARE, 4000)
    assert reversals(places) > 5 > reversals(blind)


def test_explorer_survives_a_new_episode():
    policy, space, walker = make_policy("explore", space_of(WALK), 0, SQUARE), space_of(WALK), Walker(SQUARE)
    far = []
    for _ in range(6):
        for start in ((700.0, 700.0, 0.0), (100.0, 100.0, 90.0)):
            walker.place, went = np.array(start), []
            for _ in range(80):
                walker.step(space.decode(policy(walker.state(), space)))
                went.append(np.hypot(*(walker.place - start)[:2]))
            far.append(max(went))
    assert np.median(far) > 100


def test_scripted_turns_about_where_nothing_is_told():
    """In a dream there is no state: it must not stand at the wall that it came to."""
    places, _ = walk(make_policy("scripted", space_of(WALK), 0), SQUARE, 4000, told=False)
    filled = filled_views(SQUARE, places)
    longest = max((len(list(run)) for full, run in groupby(filled) if full), default=0)
    assert longest < 200, f"it saw nothing but wall for {longest} frames"
    assert len({(int(x // 100), int(y // 100)) for x, y, _ in places}) > 30


def test_taps_are_short():
    space = space_of(WALK)
    policy = make_policy("taps", space, 0)
    held = [space.decode(policy({}, space)) for _ in range(600)]
    runs = [len(list(run)) for keys, run in groupby(held) if keys]
    assert len(runs) > 40 and max(runs) <= 3 and set(runs) == {1, 2, 3}
    assert {key for keys in held for key in keys} == set(WALK)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "keyboard"] + ["mixture"])
@pytest.mark.parametrize("keys", [("forward", "backward", "turn_left", "turn_right"), ("a", "b"), ("x",)])
@pytest.mark.parametrize("told", [True, False], ids=["state", "no state"])
def test_policies_play_any_keys_reproducibly(name, keys, told):
    space = space_of(keys)

    def actions(seed):
        policy = PolicyMixture(space, seed, 17.5) if name == "mixture" else make_policy(name, space, seed)
        walk = ({"x": 3.0 * min(t, 100), "y": 0.0} for t in range(300))  # walks, then runs into something
        return np.stack([policy(state if told else {}, space) for state in walk])

    played = actions(0)
    assert played.shape == (300, len(keys)) and np.array_equal(played, actions(0))
    assert played.any() == (name != "idle")
    if name not in ("idle", "spin") and len(keys) > 1:
        assert not np.array_equal(played, actions(1))
    for pair in OPPOSITES:
        if set(pair) <= set(keys):
            assert not played[:, [keys.index(key) for key in pair]].all(1).any()


def test_mixture_shares():
    space = space_of(("forward", "turn_left", "turn_right"))
    mixture, names = PolicyMixture(space, 0, 17.5), []
    for _ in range(100_000):
        mixture({}, space)
        names.append(mixture.name)
    for name, share in SHARES.items():
        assert names.count(name) / len(names) == pytest.approx(share, abs=0.08, rel=0.5), name
    assert sum(SHARES.values()) == pytest.approx(1)
    with pytest.raises(UserError, match="no policy 'keyboard'"):
        make_policy("keyboard", space, 0)
