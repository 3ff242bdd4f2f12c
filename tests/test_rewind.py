"""Games that run backwards and go on: the same game under the same keys, another one under others."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import PlayConfig
from engine.data.recording import Recording
from engine.play.game import open_game
from engine.play.history import BUDGET, History, Life, Moment
from engine.play.playthrough import Playthrough, check_policy
from engine.rollout.player import Player
from engine.rollout.session import Session

KEYS = [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.fixture
def play(tiny_checkpoint):
    """Options → an open playthrough of tiny networks; all are closed in the end."""
    opened: list[Playthrough] = []

    def begin(**options) -> Playthrough:
        config = PlayConfig(checkpoint=str(tiny_checkpoint), device="cpu", precision="fp32", **options)
        replay = check_policy(config.policy)
        opened.append(Playthrough(config, open_game(config), replay))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


def held(number: int) -> np.ndarray:
    return np.array(KEYS[number // 3 % len(KEYS)], np.float32)


def go(game: Playthrough, numbers: range, speculate: bool = True) -> list[np.ndarray]:
    """Plays frames under the keys of these numbers."""
    frames = []
    for number in numbers:
        game.advance(held(number))
        if speculate:
            game.speculate()
        frames.append(game.frame)
    return frames


@pytest.mark.parametrize("back", [1, 5, 20, 29])
def test_rewound_and_played_under_the_same_keys_it_is_the_same_game(back, play):
    game = play(seed=3)
    first = [game.frame, *go(game, range(30))]
    for number in range(back):
        assert game.rewind() and np.array_equal(game.frame, first[29 - number])
    assert game.back_s == pytest.approx(back / game.game.fps)
    again = go(game, range(30 - back, 40))
    whole = go(play(seed=3), range(40), speculate=False)
    assert all(map(np.array_equal, again, whole[30 - back :])) and not game.back_s
    assert not np.array_equal(again[0], again[-1]), "frames differ, or this test could not fail"


def test_other_keys_make_another_game(play):
    game = play(seed=3)
    go(game, range(20))
    for _ in range(10):
        game.rewind()
    game.advance(np.array([0, 1, 0], np.float32))
    assert not np.array_equal(game.frame, go(play(seed=3), range(11))[-1])


def test_across_a_reset_and_not_further_than_the_beginning(play):
    game = play(seed=3)
    frames = [game.frame, *go(game, range(6))]
    game.reset()
    seed = game.seed
    go(game, range(4))
    for _ in range(7):
        assert game.rewind()
    assert np.array_equal(game.frame, frames[4])
    assert all(map(np.array_equal, go(game, range(4, 6)), frames[5:])) and game.seed == seed - 1 == 3
    while game.rewind():
        pass
    assert np.array_equal(game.frame, frames[0])
    assert all(map(np.array_equal, go(game, range(6)), frames[1:]))


def test_a_recording_tells_where_it_branched_and_replays(play, tmp_path):
    game = play(seed=3)
    go(game, range(7))
    game.record(tmp_path / "trunk")
    shown = [game.frame, *go(game, range(7, 20))]
    for _ in range(8):
        game.rewind()
    shown += [game.frame, *go(game, range(5))]
    game.stop_recording()
    for _ in range(3):
        game.rewind()
    game.advance(held(0))
    game.stop_recording()
    recording = Recording(tmp_path / "trunk")
    assert len(recording) == 20 and recording.resets.nonzero()[0].tolist() == [0, 14]
    (event,) = recording.events[14]
    assert event["parent"] == {"recording": "trunk", "frame": 5} and event["reset"]["seed"] == 3
    assert sum(frames for _, frames in event["reset"]["held"]) == 12
    again = play(policy=str(tmp_path / "trunk"))
    for frame in shown:
        assert np.array_equal(again.frame, frame)
        if not again.over:
            again.advance()


def test_a_new_recording_names_the_one_in_which_its_first_frame_is(play, tmp_path):
    game = play(seed=3)
    game.record(tmp_path / "trunk")
    go(game, range(9))
    game.stop_recording()
    for _ in range(4):
        game.rewind()
    game.record(tmp_path / "branch")
    go(game, range(3))
    game.stop_recording()
    assert Recording(tmp_path / "branch").parent == {"recording": "trunk", "frame": 5}
    assert Recording(tmp_path / "trunk").parent is None


def test_a_replay_that_was_run_backwards_goes_on_with_the_recorded_keys(play, tmp_path):
    game = play(seed=3)
    game.record(tmp_path / "walk")
    frames = [game.frame, *go(game, range(12))]
    game.stop_recording()
    again = play(policy=str(tmp_path / "walk"))
    for _ in range(8):
        again.advance()
    for _ in range(5):
        again.rewind()
    for frame in frames[4:]:
        again.advance()
        assert np.array_equal(again.frame, frame)
    assert again.over


@pytest.mark.parametrize(
    "frame, snapshot", [(36_864, 1_153_953), (230_400, 5_000_000), (2_764_800, 60_000_000)]
)
def test_memory_is_bounded_and_holds_two_minutes_of_a_small_world(frame, snapshot):
    history = History(17.5, frame, snapshot)
    life, picture, keys = Life(0, ""), np.zeros(0, np.uint8), np.zeros(0)
    for age in range(6000):
        taken = {"state": age} if history.wants_snapshot(age) else None
        history.add(Moment(picture, keys, life, age, taken))
        if age % 100 == 99:
            snapshots = sum(moment.snapshot is not None for moment in history.moments)
            assert len(history.moments) * frame + snapshots * snapshot < 1.2 * BUDGET + 2 * snapshot
            assert history.moments[0].snapshot is not None, (
                "everything that is remembered can be gone back to"
            )
    if frame < 40_000:
        assert len(history.moments) * frame + snapshots * snapshot < 200e6
        assert len(history.moments) > 120 * 17.5


@pytest.mark.parametrize("frame, snapshot, life", [(36_864, 1_153_953, 3), (36_864, 900_000_000, 500)])
def test_games_that_begin_anew_all_the_time_and_large_ones_are_remembered_too(frame, snapshot, life):
    history = History(17.5, frame, snapshot)
    for age in range(3000):
        taken = {"state": age} if history.wants_snapshot(age % life) else None
        history.add(Moment(np.zeros(0, np.uint8), np.zeros(0), Life(0, ""), age % life, taken))
        assert history.moments[0].snapshot is not None
    count = sum(moment.snapshot is not None for moment in history.moments)
    assert count * snapshot + len(history.moments) * frame < max(200e6, 4 * snapshot)


def test_a_replay_does_not_go_back_to_what_it_has_not_shown(play, tmp_path):
    game = play(seed=3)
    go(game, range(7))
    game.record(tmp_path / "late")
    frames = [game.frame, *go(game, range(7, 12))]
    game.stop_recording()
    again = play(policy=str(tmp_path / "late"))
    again.advance()
    while again.rewind():
        pass
    assert np.array_equal(again.frame, frames[0])
    for frame in frames[1:]:
        again.advance()
        assert np.array_equal(again.frame, frame)


def test_a_snapshot_of_other_networks_is_refused(tiny_checkpoint):
    session = Session(Player(tiny_checkpoint, "cpu", "fp32"))
    session.reset(1, np.zeros((4, 96, 128, 3), np.uint8))
    session.step(np.zeros(3, np.float32))
    snapshot = session.snapshot()
    before = session.rollout.last.clone()
    for name, value in (("buffer", snapshot["buffer"][:1]), ("held", snapshot["held"][:1])):
        with pytest.raises(ValueError, match="other networks"):
            session.restore(snapshot | {name: value})
    with pytest.raises(ValueError):
        session.restore({name: value for name, value in snapshot.items() if name != "window"})
    assert (session.rollout.last == before).all()
    session.speculate()
    with pytest.raises(RuntimeError, match="before speculate"):
        session.snapshot()
