"""stage=evaluate: each figure on pictures and worlds whose answer is known."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from engine.config import TrainConfig, UserError, load_config
from engine.data.dataset import split
from engine.data.find import find_recordings
from engine.data.picture import load_picture
from engine.data.recording import Recorder, Recording
from engine.data.sight import wall_views
from engine.evaluation import behaviour, control, drift, evaluate, fidelity, latency, returning, stage
from engine.evaluation.build_routes import Builder
from engine.evaluation.clips import Clips
from engine.evaluation.compare import compare
from engine.evaluation.features import COUNT, Reference, features, frechet, frechet_distance
from engine.evaluation.generated import Games, play, roll
from engine.evaluation.measures import (
    difference,
    highpass_correlation,
    horizontal_flow,
    motion,
    octaves,
    psnr,
    sharpness,
    ssim,
)
from engine.evaluation.played import play_routes
from engine.evaluation.probe import WallProbe
from engine.evaluation.route import Route, load_routes, read, save_routes, shipped_routes, written
from engine.evaluation.section import QUICK, Scope, Section
from engine.evaluation.section_cache import SectionCache, key_of
from engine.evaluation.segment_stats import SegmentStats, curves, disagreement, growth
from engine.evaluation.truth import Truth, starts
from engine.rollout.player import Player
from engine.worlds.base import ActionSpace

ROOT = Path(__file__).resolve().parent.parent
WIDE = (
    np.random.default_rng(0).integers(0, 255, (12, 60, 3), np.uint8).repeat(8, 0).repeat(8, 1)
)  # (96, 480, 3)


def view(place: int) -> np.ndarray:
    """What is seen of a wide landscape from `place` pixels to the right of its left edge → (96, 128, 3)."""
    return np.roll(WIDE, -place, 1)[:, :128]


class Panorama:
    """A world that turns, 480 pixels being 360 degrees, and whose forward key walks up to a wall at 195, ever
    brighter. Its corner pixel tells where it is, so that it can go on from any frame, `delay` frames late.
    """

    action_space = ActionSpace(("forward", "turn_left", "turn_right"), (("W",), ("Left",), ("Right",)))
    fps, state_kinds = 17.5, {"x": "position", "y": "position", "angle": "angle"}

    def __init__(self, episode: int = 1000):
        self.episode = episode

    def reset(self, seed: int) -> np.ndarray:
        return self.go_on(37 * seed % 480, 0, np.zeros(3))

    def go_on(self, place: int, depth: int, held: np.ndarray, delay: int = 0) -> np.ndarray:
        self.place, self.depth, self.frames, self.done = place, depth, 0, False
        self.queue = [held] * delay
        return self._frame()

    def step(self, action: np.ndarray) -> np.ndarray:
        self.queue.append(np.array(action))
        forward, left, right = self.queue.pop(0)
        self.place = (self.place + int(8 * (right - left))) % 480
        self.depth = min(195, self.depth + 3 * int(forward))
        self.frames += 1
        self.done = self.frames >= self.episode
        return self._frame()

    def _frame(self) -> np.ndarray:
        frame = (view(self.place) * (0.4 + self.depth / 330)).astype(np.uint8)
        frame[0, 0] = self.place // 2, self.place % 2, self.depth
        return frame

    def state(self) -> dict[str, float]:
        return {"x": float(self.depth), "y": 0.0, "angle": self.place * 0.75}

    def map_lines(self) -> np.ndarray:
        return np.zeros((0, 4))

    def close(self) -> None:
        pass


def obedient(delay: int = 0, twist=lambda actions: actions):
    """In place of the network: the world itself, under the keys as twisted, `delay` frames late."""

    def roll(player, games, name="", correction=None):
        start, made = games.frames.shape[1], []
        for clip, acts in zip(games.frames, games.actions.numpy(), strict=True):
            world, (half, odd, depth) = Panorama(), clip[-1, 0, 0].tolist()
            world.go_on(2 * half + odd, depth, twist(acts[start - 1]), delay)
            made.append([world.step(twist(action)) for action in acts[start:]])
        return np.array(made)

    return roll


def mirrored(actions: np.ndarray) -> np.ndarray:
    return actions[..., [0, 2, 1]]


def frozen(actions: np.ndarray) -> np.ndarray:
    return 0 * actions


@pytest.fixture(scope="module")
def player(tiny_checkpoint) -> Player:
    return Player(tiny_checkpoint, "cpu", "fp32")


@pytest.fixture(scope="module")
def turns(player, tmp_path_factory) -> Path:
    """A recording that turns left (the picture moves right by 5 a frame), right and rests, 12 frames each;
    nothing may be written there.
    """
    data, place, way = tmp_path_factory.mktemp("turns"), 200, 0
    with Recorder(data / "turns", player.world, "true", 0, lossless=True) as recorder:
        for number in range(120):
            way = (1, 0, -1, 0)[number // 12 % 4] if number else 0  # 1: left
            place -= 5 * way
            recorder.add(view(place), [0, way == 1, way == -1], reset=number == 0, t_ns=number)
    return data


@pytest.fixture(scope="module")
def clips(player, turns) -> Clips:
    return Clips([Recording(turns / "turns")], player)


@pytest.fixture(scope="module")
def reference(clips) -> Reference:
    return Reference(clips.sample(64, 0))


def routes(length: int = 24) -> list[Route]:
    """Routes in the panorama: turning and back, walking and turning, a return."""
    forward, left, right = np.eye(3, dtype=np.float32)
    half = length // 2
    plans = {"turn": [left] * half + [right] * half, "open": [forward, left] * half}
    plans["return_5"] = [left] * (half - 4) + [right] * (half - 4) + [0 * left] * 8
    return [
        Route(kind, seed, np.repeat(left[None], 20, 0), np.stack(plan))
        for kind, plan in plans.items()
        for seed in (1, 2)
    ]


@pytest.fixture
def scope(player, clips, reference, tmp_path) -> Scope:
    truth, size = Truth(Panorama(), 4), replace(QUICK, states=3, flips=6, settings=True)
    lines = np.zeros((0, 4))
    return Scope(player, None, truth, "", clips, reference, None, lines, routes(), tmp_path, 0, size, 40)


@pytest.mark.parametrize("shift", [-9, -1, 1, 4, 16])
def test_flow_is_the_shift_of_the_picture(shift):
    assert horizontal_flow(view(100), view(100 - shift)) == shift


def test_flow_of_what_does_not_move_or_shows_nothing_is_zero():
    assert horizontal_flow(view(50), view(50)) == 0
    wall = np.full((96, 128, 3), 90, np.uint8)
    assert horizontal_flow(wall, wall) == 0 and horizontal_flow(view(50), wall) == 0


def test_measures_of_known_pictures():
    grey = np.full((2, 96, 128, 3), 100, np.uint8)
    assert psnr(grey, grey + 10) == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    assert psnr(grey, grey) == 78 and ssim(grey, grey) == pytest.approx(1)
    assert sharpness(grey) == motion(grey) == motion(grey[:1]) == 0
    stripes = grey.copy()
    stripes[:, ::2] += 10
    assert sharpness(stripes) == pytest.approx(10)
    light, contrast = 6.5025, 58.5225  # Wang et al.'s constants of 8-bit pictures
    known = (2 * 105 * 100 + light) / (105**2 + 100**2 + light) * contrast / (25 + contrast)
    assert ssim(stripes, grey) == pytest.approx(known, abs=1e-3)
    assert motion(np.stack([grey[0], grey[0] + 7, grey[0]])) == 7
    assert difference(stripes, grey) == pytest.approx([5, 5]), "grain is averaged away"


def test_energy_by_octave_is_where_the_pattern_is():
    """Checks of 1, 2, 4 and 8 pixels: each is lost by halving as often as it says, and not before."""
    for number, side in enumerate((1, 2, 4, 8)):
        y, x = np.indices((96, 128)) // side
        checks = np.repeat((100 + 20 * ((x + y) % 2)).astype(np.uint8)[None, ..., None], 3, -1)
        energies = octaves(checks)
        assert energies.argmax() == number, (side, energies)
        assert energies[number] == pytest.approx(100, rel=0.35), "the variance of 100 and 120 by turns"
    assert octaves(np.full((2, 96, 128, 3), 90, np.uint8)) == pytest.approx([0] * 4)


def test_high_pass_correlation_tells_detail_in_place_from_detail_elsewhere():
    detail = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8)
    assert highpass_correlation(detail, detail) == pytest.approx(1, abs=1e-4)
    assert highpass_correlation(255 - detail, detail) == pytest.approx(-1, abs=1e-4)
    assert abs(highpass_correlation(np.roll(detail, 1, 2), detail)) < 0.1, "sharp, and in the wrong place"
    assert abs(highpass_correlation(detail[::-1], detail)) < 0.1
    slope = np.linspace(0, 60, 128).astype(np.uint8)[None, None, :, None]
    assert highpass_correlation(detail // 2 + slope, detail) > 0.95, "light and contrast do not count"
    flat = np.full_like(detail, 90)
    assert highpass_correlation(flat, detail) == 0


def test_frechet_distance_of_known_gaussians():
    a = torch.randn(20_000, 3, dtype=torch.float64)
    mixed = torch.tensor([[1.0, 2, 0], [0, 1, 1], [0, 0, 3]], dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + torch.tensor([3.0, 4, 0])) == pytest.approx(25)
    assert frechet(a, 3 * a) == pytest.approx(4 * float(torch.cov(a.T).trace() + a.mean(0).square().sum()))
    b = a @ mixed
    # the definition, by a root of the product itself, which is not symmetric
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    whole = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    assert frechet(a, b) == pytest.approx(float(whole - 2 * product))


def textured(count: int = 40) -> np.ndarray:
    """Views of the panorama with its grain, uint8 (n, 96, 128, 3)."""
    grain = np.random.default_rng(1).integers(0, 60, (count, 96, 128, 3), np.uint8)
    return np.stack([view(9 * n) // 2 for n in range(count)]) + 40 + grain


def blurred(frames: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of `side` pixels."""
    n, h, w, c = frames.shape
    small = frames.reshape(n, h // side, side, w // side, side, c).mean((2, 4))
    return small.repeat(side, 1).repeat(side, 2).astype(np.uint8)


def test_fixed_features_have_not_changed():
    """Figures of one year are compared with those of another: whoever changes them makes these void."""
    y, x = np.indices((96, 128))
    picture = np.stack([(3 * x + y) % 251, (x * y // 7) % 239, (5 * y) % 227], -1).astype(np.uint8)[None]
    points = features(picture)[0]
    assert len(points) == COUNT == 100
    known = [0.757, 2.234, 2.21, 2.549, 1.352, 1.807, -0.119, -0.194]
    assert points[[0, 5, 17, 40, 63, 64, 80, 99]].tolist() == pytest.approx(known, abs=2e-3)


def test_frechet_distance_of_pictures_grows_with_what_is_wrong():
    frames = textured(20)
    true = features(frames)
    assert frechet_distance(frames, frames) == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(2).normal(size=frames.shape)
    ladders = {
        "blur": [blurred(frames, side) for side in (2, 4, 8)],
        "noise": [(frames + a * noise).clip(0, 255).astype(np.uint8) for a in (10, 30, 60)],
        "colour": [(frames + np.array([a, 0, -a])).clip(0, 255).astype(np.uint8) for a in (5, 15, 30)],
    }
    for name, worse in ladders.items():
        each = [frechet(features(some), true) for some in worse]
        assert 0.01 < each[0] < each[1] < each[2], (name, each)


def test_nearest_distance_minds_the_picture_and_not_which_view_it_is():
    frames = textured(80)
    reference, others = Reference(frames[::2]), features(frames[1::2])
    near = reference.nearest_distance(others)
    soft, grey = features(blurred(frames[1::2], 4)), features(np.full((9, 96, 128, 3), 99, np.uint8))
    assert reference.nearest_distance(reference.points) == pytest.approx(0, abs=1e-5)
    assert near < 0.6 * reference.nearest_distance(soft) and near < 0.6 * reference.nearest_distance(grey)


def test_the_probe_tells_walls_from_rooms_also_when_they_are_soft():
    """Rooms: landscapes above a floor. Walls: one texture all over."""
    random, rooms, walls = np.random.default_rng(0), textured(96), []
    for _ in range(96):
        tile = random.integers(60, 120, (12, 16, 1), np.uint8)
        walls.append(np.tile(tile, (8, 8, 3)) + random.integers(0, 9, (96, 128, 3), np.uint8))
    frames, kinds = np.stack([*rooms, *walls]), np.arange(192) >= 96
    mixed = random.permutation(192)
    probe = WallProbe(frames[mixed], kinds[mixed])
    assert probe.accuracy > 0.97 and probe.share == 0.5
    assert probe.fills(blurred(frames, 2))[::7].tolist() == kinds[::7].tolist()
    shuffled = WallProbe(frames[mixed], random.permutation(kinds))
    assert shuffled.accuracy < 0.7, "what cannot be learned is not claimed"


def test_the_true_world_is_brought_back_to_its_states(scope):
    truth = scope.truth
    state = truth.state(5, 30)
    assert len(state.script) == 30 and state.frames.shape == (4, 96, 128, 3)
    assert (state.actions == state.script[-4:]).all(), "the last frames and what caused them"
    keys = control.alternatives(3)
    branches = truth.branch(state, np.repeat(keys[:, None], 3, 1))
    half, odd, depth = state.frames[-1, 0, 0].tolist()
    world = Panorama()
    for key, frames in zip(keys, branches.frames, strict=True):
        world.go_on(2 * half + odd, depth, key)
        assert (frames == [world.step(key) for _ in range(3)]).all()
    games = starts([branches, branches], 7)
    assert games.frames.shape == (8, 4, 96, 128, 3) and games.actions.shape == (8, 7, 3)
    assert games.seeds.tolist() == [7] * 4 + [8] * 4, "all branches of a state have the same noise"
    actions = games.actions.numpy()
    assert (actions[2, :4] == state.actions).all() and (actions[2, 4:] == keys[2]).all()
    assert [len(told) for told in games.told] == [4] * 8 and games.told[5][-1] == state.told[-1]


def test_true_frames_are_sampled_with_their_states(scope):
    frames, told = scope.truth.sample(70, 3)
    assert len(frames) == len(told) == 70
    assert [one["x"] for one in told] == [frame[0, 0, 2] for frame in frames], "the corner tells the depth"
    again, _ = scope.truth.sample(70, 3)
    assert (frames == again).all() and len({frame.tobytes() for frame in frames}) > 30


def test_states_whose_episode_ends_are_passed_over():
    truth = Truth(Panorama(episode=40), 4)
    assert truth.state(0, 45) is None
    plan = np.zeros((2, 5, 3), np.float32)
    found = truth.gather(2, 0, lambda number, state: plan, "test")
    assert len(found) == 2 and all(len(one.state.script) in (4, 30) for one in found)
    assert truth.gather(2, 0, lambda number, state: np.zeros((1, 50, 3)), "test") == []
    assert Truth(Panorama(episode=3), 4).gather(2, 0, lambda number, state: plan, "test") == []


def test_a_world_that_does_not_repeat_itself_is_no_truth():
    class Fickle(Panorama):
        games = 0

        def reset(self, seed):
            self.games += 1
            return super().reset(seed + self.games)

    truth = Truth(Fickle(), 4)
    with pytest.raises(UserError, match="does not repeat itself"):
        truth.run(truth.state(0, 30), np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("twist, obeyed", [(None, "nft"), (mirrored, "nf"), (frozen, "n")])
def test_control_tells_obedience_from_defiance(scope, monkeypatch, twist, obeyed):
    """A world that obeys; one that confuses left and right; one that does nothing whatever the key."""
    monkeypatch.setattr(control, "roll", obedient(twist=twist or (lambda actions: actions)))
    figures = control.control(scope).figures
    assert figures["control_trials"] >= 8
    for name in ("none", "forward", "turn_left", "turn_right"):
        assert figures[f"control_{name}"] == (name[0] in obeyed), name
    assert (figures["control"] == 1) == (twist is None)
    if twist is not mirrored:
        size = 0 if twist is frozen else 1
        assert figures["control_size"] == pytest.approx(size) == figures["control_direction"]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_an_answer_after_k_frames_is_measured_as_k(scope, monkeypatch, delay):
    monkeypatch.setattr(latency, "roll", obedient(delay))
    monkeypatch.setattr(latency, "ANSWERS", 6)
    figures = latency.latency(scope).figures
    assert figures["latency_true_first"] == 1
    assert figures["latency_first_frames"] == figures["latency_half_frames"] == 1 + delay
    waiting = (delay + 0.5) * 1000 / 17.5
    assert figures["latency_ms"] == pytest.approx(waiting + figures["latency_answer_ms"], abs=0.02)
    assert figures["latency_answer_ms"] > 0
    if not delay:
        assert figures["latency_full_frames"] == figures["latency_half_true_frames"] == 1
        assert figures["latency_strength"] == 1


def test_frames_until_a_share_of_the_answer():
    made = np.array([[0, 0.2, 0.6, 1.0], [0, 0, 0, 0.4], [0.7, 0, 0, 1.0]])
    assert latency.strength(made) == pytest.approx([0.6, 0.4 / 3, 1 / 3])
    seen = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)
    assert latency.frames_until(made, seen, 0.1).tolist() == [2, 4, 3]
    assert latency.frames_until(made, seen, 0.5).tolist() == [3, 5, 3], "5 is never, of 4"
    pale = np.full((3, 4), 0.3)
    all_seen = np.ones((3, 4), bool)
    assert latency.summary(pale, all_seen) == {"first": 1, "half": 1, "full": 1}
    assert latency.summary(pale / 6, all_seen) == {"first": 5, "half": 5, "full": 5}, "as good as none"


def test_the_interval_of_a_share_is_wilsons():
    assert control.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert control.wilson(540, 600) == pytest.approx((0.8735, 0.9216), abs=1e-3)
    low, high = control.wilson(0, 20)
    assert low == pytest.approx(0) and 0.15 < high < 0.17


def test_a_correction_of_zero_reaches_the_rollout(player):
    """Uncorrected, the window is denoised under the keys themselves; corrected, under those of before."""
    frames = np.stack([view(0)] * 4)[None]
    actions = torch.zeros(1, 8, 3)
    actions[:, 4::2, 1] = 1
    games = Games(frames, actions, torch.tensor([3]))
    own, none, high = (roll(player, games, correction=level) for level in (None, 0.0, 0.8))
    assert np.array_equal(own, high), "0.8 is the checkpoint's own"
    assert not np.array_equal(own, none)


def test_states_are_given_to_networks_that_know_them_and_kept_from_others(player, tiny_checkpoint):
    """What tells them apart is the flag in the condition, and all that is read of the states."""
    blind = Player(tiny_checkpoint, "cpu", "fp32", state=False)
    told = [{"x": 40.0 * n, "y": 90.0, "angle": 10.0 * n} for n in range(4)]
    frames, actions = np.stack([view(n) for n in range(4)])[None], torch.zeros(1, 6, 3)

    def played(who: Player, states: list | None) -> np.ndarray:
        return roll(who, Games(frames, actions, torch.zeros(1).long(), states and [states]))

    unknown = played(player, None)
    assert not np.array_equal(played(player, told), unknown)
    assert not np.array_equal(played(player, told), played(player, [{**one, "x": 9.0} for one in told]))
    assert np.array_equal(played(player, [*told[:3], {"x": 3.0}]), unknown), "not all are known"
    assert np.array_equal(played(blind, told), unknown) and np.array_equal(played(blind, None), unknown)
    rollout = blind.make_rollout(1)
    rollout.reset(blind.encode(frames[0]), actions[:, :4], torch.zeros(1).long(), None)
    assert rollout.has_state.tolist() == [0] and rollout.carry is None


def game(frames: list[np.ndarray], scope: Scope, policy: str = "scripted") -> SegmentStats:
    watch = SegmentStats(scope.reference, 9, policy)
    for frame in frames:
        watch.add(frame)
    return watch


def test_drift_of_steady_fading_and_frozen_games(scope):
    steady = [view(5 * n) for n in range(36)]
    fading = [(f * max(0.2, 1 - n / 36)).astype(np.uint8) for n, f in enumerate(steady)]
    movies = {"steady": steady, "fading": fading, "still": [view(0)] * 36}
    games = {name: game(frames, scope) for name, frames in movies.items()}
    rows = {name: some.rows for name, some in games.items()}
    assert len(rows["steady"]) == 4 and growth([games["steady"]], 4, 1) < 1.5
    assert growth([games["fading"]], 4, 1) > 2 * growth([games["steady"]], 4, 1)
    assert rows["fading"][-1]["sharpness"] < 0.5 * rows["steady"][-1]["sharpness"]
    assert growth([games["still"]], 4, 1) == 1, "what is frozen does not drift, so motion is told"
    assert rows["still"][-1]["motion"] == rows["still"][-1]["away"] == 0 < rows["steady"][-1]["motion"]
    assert rows["fading"][-1]["away"] > 5
    share = lambda made, true: drift.motion_share(scope, made, true, 4)  # noqa: E731
    assert share([games["steady"]], [games["steady"]]) == pytest.approx(1, rel=0.05)
    assert share([games["still"]], [games["steady"]]) == share([games["still"]], []) == 0


def test_drift_pools_games_and_tells_whether_halves_agree(scope):
    def played(*nearest: float) -> SegmentStats:
        return SegmentStats(scope.reference, 9, rows=[{"nearest": value} for value in nearest])

    first, second = played(1, 2, 3, 6), played(3, 2, 5, 2)
    assert growth([first, second], 4, 1) == (6 + 2) / (1 + 3)
    assert growth([first, second], 4, 2) == (3 + 6 + 5 + 2) / (1 + 2 + 3 + 2)
    assert disagreement([first, first], 4, 1) == 0
    assert disagreement([first, second], 4, 1) == pytest.approx((6 - 2 / 3) / ((6 + 2 / 3) / 2))
    assert disagreement([first], 4, 1) == float("inf")
    assert curves([first, played(3)])["nearest"].tolist() == [2, 2, 3, 6]


def test_flicker_is_what_stands_still_changes_by(scope):
    flicker = [np.full((96, 128, 3), 100 + 2 * (n % 2), np.uint8) for n in range(36)]
    games = [game(flicker, scope, "idle"), game(flicker, scope, "random")]
    section = Section("")
    drift.steps(section, games)
    assert section.figures["flicker_idle"] == section.figures["flicker_idle_last"] == 2
    assert section.figures["random_growth"] == pytest.approx(1, abs=0.1)


def test_routes_are_written_as_text_and_read_again(tmp_path):
    keys = ("forward", "left")
    actions = np.array([[1, 0]] * 3 + [[1, 1]] * 2 + [[0, 0]], np.float32)
    assert written(actions, keys) == "forward:3 forward+left:2 -:1"
    assert (read("forward:3 forward+left:2 -:1", ("left", "forward")) == actions[:, ::-1]).all()
    one = Route("open", 7, actions[:2], actions, (1.5, -2.25, 90.0))
    save_routes(tmp_path / "r.json", "w", keys, [one, replace(one, kind="wall")], "a command")
    first, second = load_routes(tmp_path / "r.json", "w", keys)
    assert (first.kind, first.seed, first.end, second.kind) == ("open", 7, one.end, "wall")
    assert (first.actions == actions).all() and (first.warmup == actions[:2]).all()


ROUTE = '{"format": 1, "world": "w", "routes": [{"kind": "a", "seed": 1, "warmup": "", "keys": "%s"}]}'


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "could not be read"),
        ("{", "no file of routes"),
        ('{"format": 9, "world": "w", "routes": []}', "has format 9"),
        ('{"format": 1, "world": "other", "routes": []}', "are of other"),
        ('{"format": 1, "world": "w", "routes": []}', "holds no routes"),
        (ROUTE % "jump:2", "jump"),
        (ROUTE % "forward:x", "no file of routes"),
    ],
)
def test_what_is_no_file_of_routes_is_said(text, said, tmp_path):
    path = tmp_path / "routes.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_routes(path, "w", ("forward",))


def test_the_shipped_routes_are_many_and_of_all_kinds():
    keys = ("forward", "backward", "strafe_left", "strafe_right", "turn_left", "turn_right")
    file = shipped_routes("doom_gathering", keys)
    some = load_routes(file, "doom_gathering", keys)
    short = [route for route in some if not route.kind.startswith("return")]
    assert len(short) >= 96 and {len(route.actions) for route in short} == {64}
    assert {route.kind for route in short} == {"open", "turn", "wall", "random", "scripted"}
    assert min(len(route.warmup) for route in some) >= 16
    seconds = {route.kind: len(route.actions) / 17.5 for route in some if route not in short}
    assert seconds == {f"return_{n}": pytest.approx(n, abs=0.05) for n in (5, 10, 20)}
    assert len({route.seed for route in some}) == len(some)
    assert shipped_routes("doom_gathering", keys[:3]) is None is shipped_routes("another", keys)


@pytest.mark.slow
def test_the_shipped_routes_lead_where_they_say():
    """One of each kind in the true game: `play_routes` refuses those that end elsewhere."""
    pytest.importorskip("vizdoom")
    world = load_config("train", TrainConfig, ["world=doom_gathering"]).world
    some = load_routes(shipped_routes(world.name, world.keys), world.name, world.keys)
    one_each = {route.kind: route for route in some}
    truth = Truth.open(world, 16, 0)
    try:
        lines = truth.world.map_lines()
        shown = {kind: play_routes(truth, [route]) for kind, route in one_each.items()}
    finally:
        truth.close()
    walls = {kind: wall_views(played.told[0], lines) for kind, played in shown.items()}
    assert walls["open"].mean() < 0.2 and walls["wall"][-8:].all() and not walls["wall"][:4].any()
    for kind, played in shown.items():
        if kind.startswith("return"):
            assert psnr(played.true[0, -1:], played.before[0, -1:]) > 27
            assert psnr(played.true[0, 30:31], played.before[0, -1:]) < 25, "one has been away"


def test_routes_are_played_in_the_true_world(scope):
    played = play_routes(scope.truth, routes()[:2])
    assert played.true.shape == (2, 24, 96, 128, 3) and played.before.shape[1] == 4
    world = Panorama()
    world.reset(2)
    seen = [world.step(action) for action in [*routes()[1].warmup, *routes()[1].actions]]
    assert (played.true[1] == seen[-24:]).all() and (played.before[1] == seen[16:20]).all()
    assert played.told[1][-1] == world.state() and len(played.told_before[1]) == 4
    assert (played.actions[1, :4] == routes()[1].warmup[-4:]).all()
    assert (played.actions[1, 4:] == routes()[1].actions).all()
    assert played.cut(5).true.shape[1] == 5 and played.cut(5).games(3).actions.shape[1] == 9
    with pytest.raises(UserError, match="does not lead here"):
        play_routes(scope.truth, [replace(routes()[0], end=(50.0, 0.0, 0.0))])
    with pytest.raises(UserError, match="warm-up of 4 frames"):
        play_routes(scope.truth, [replace(routes()[0], warmup=np.zeros((2, 3), np.float32))])


def test_routes_that_are_drawn_keep_their_promises():
    """In the panorama forward ends at a wall, and turning back shows the same view again."""
    builder = Builder(Truth(Panorama(), 1), np.zeros((0, 4)), 17.5, 0)
    found = list(builder.build({"wall": 2, "turn": 2, "random": 1}, {5: 2}))
    kinds = [route.kind for route in found]
    assert kinds.count("turn") == 2 and kinds.count("random") == 1 and kinds.count("return_5") == 2
    assert {len(route.actions) for route in found if route.kind != "return_5"} == {64}
    truth = Truth(Panorama(), 4)
    for route in found:
        frames, told = truth.follow(route.seed, np.concatenate([route.warmup, route.actions]))
        last = told[-1]
        assert route.end == (last["x"], last["y"], last["angle"])
        if route.kind == "return_5":
            assert psnr(frames[len(route.warmup)][None], frames[-1:]) >= 28
            assert not route.warmup[-20:].any() and not route.actions[-20:].any()


def test_fidelity_of_the_true_world_itself_is_perfect_and_of_a_mirrored_one_is_not(scope, monkeypatch):
    figures = {}
    for name, twist in (("true", lambda actions: actions), ("mirrored", mirrored)):
        monkeypatch.setattr(fidelity, "roll", obedient(twist=twist))
        figures[name] = fidelity.fidelity(scope).figures
    true, wrong = figures["true"], figures["mirrored"]
    assert true["psnr_1"] == true["psnr_16"] == 78 and true["psnr_16_of_turn"] == 78
    assert true["sharpness_8"] == true["octave1_8"] == true["octave4_8"] == true["highpass_8"] == 1
    assert true["frechet"] == pytest.approx(0, abs=1e-3) and true["frechet_autoencoder"] > 1
    assert "psnr_64" not in true and "wall_ratio" not in true, "the routes are shorter, and there is no map"
    assert wrong["psnr_16"] < 25 and wrong["highpass_8"] < 0.5 < wrong["sharpness_8"]
    assert true["repeat_psnr_16"] < 30 and true["autoencoder_psnr_16"] < 30, "an untrained one"
    assert true["repeat_psnr_16"] == wrong["repeat_psnr_16"]


def test_open_views_and_walls_are_told_apart(scope, monkeypatch):
    """A map whose wall is near where the walking routes end, and far from where the turning ones stay."""
    monkeypatch.setattr(fidelity, "roll", obedient())
    lines = np.array([[120, -900, 120, 900], [-900, -900, -900, 900]], float)
    walker = np.eye(3, dtype=np.float32)[:1].repeat(24, 0)
    told = {"open": routes()[2], "wall": replace(routes()[2], kind="wall", warmup=walker, actions=walker)}
    monkeypatch.setattr(Panorama, "state", lambda self: {"x": float(self.depth), "y": 0.0, "angle": 0.0})
    found = fidelity.fidelity(replace(scope, lines=lines, routes=list(told.values()))).figures
    assert found["views_16"] == 2 and found["views_16_wall"] == found["views_16_open"] == 1
    assert found["psnr_16_wall"] == found["psnr_16_open"] == 78


def test_a_return_is_compared_with_the_true_view_there(scope, monkeypatch):
    monkeypatch.setattr(returning, "roll", obedient())
    figures = returning.returning(scope).figures
    assert figures["return_psnr_5"] == 78 and figures["return_start_5"] == 78
    assert figures["return_elsewhere_5"] < 25
    monkeypatch.setattr(returning, "roll", obedient(twist=frozen))
    assert returning.returning(scope).figures["return_psnr_5"] == 78, "who never left is back, too"
    monkeypatch.setattr(returning, "roll", obedient(twist=lambda actions: actions * [1, 1, 0]))
    assert returning.returning(scope).figures["return_psnr_5"] < 25, "who does not turn back is not"


def test_a_game_in_a_batch_is_the_game_alone(player):
    """A few frames: a network that learned nothing lets a rounding error grow from frame to frame."""
    history = player.known_frames
    frames = np.stack([[view(place + 5 * n) for n in range(history)] for place in (0, 90, 200)])
    actions = (torch.rand(3, history + 4, len(player.world.keys)) < 0.3).float()
    told = [[{"x": 9.0 * n, "y": 40.0, "angle": 7.0 * n} for n in range(history)]] * 2 + [[None] * history]
    games = Games(frames, actions, torch.tensor([4, 9, 4]), told)
    together = np.stack(list(play(player, games)), 1).astype(int)
    for number in range(3):
        alone = np.stack(list(play(player, games.part(slice(number, number + 1)))), 1)[0]
        assert np.abs(together[number] - alone).max() <= 1
    assert np.abs(together[0] - together[2]).mean() > 1, "and no two games are the same"


def test_scripts_of_behaviour_find_a_full_turn_and_a_wall(scope):
    state = scope.truth.state(3, 30)
    actions = behaviour.spin(scope, state)
    assert len(actions) == 2 * 60 and (actions[:60, 1] == 1).all() and (actions[60:, 2] == 1).all()
    frames, states = scope.truth.run(state, actions)
    assert states[59]["angle"] == states[-1]["angle"] == state.told[-1]["angle"], "all the way round"
    push = behaviour.wall(scope, state)
    depths = [s["x"] for s in scope.truth.run(state, push)[1]]
    assert depths[-50:] == [195] * 50


def test_behaviour_of_an_obedient_world_and_of_one_that_confuses_its_keys(scope, monkeypatch):
    for twist, share in ((lambda actions: actions, 1), (mirrored, 0)):
        monkeypatch.setattr(behaviour, "roll", obedient(twist=twist))
        monkeypatch.setattr(behaviour, "rebuilt", lambda player, frames: frames)  # as the fake paints
        figures = behaviour.behaviour(scope).figures
        assert figures["reversal_obeyed"] == share
        assert figures["spin_collapsed"] == figures["wall_collapsed"] == figures["reversal_collapsed"] == 0
    assert figures["spin_return_psnr_true"] > 30


def test_what_counts_as_collapsed():
    moving = np.stack([view(9 * n) for n in range(6)])
    still = np.stack([view(0)] * 6)
    true = behaviour.ending(moving)
    assert not behaviour.collapsed(true, true)
    assert behaviour.collapsed(behaviour.ending(still), true), "stuck"
    assert behaviour.collapsed(true, behaviour.ending(still)), "restless"
    grey = np.full_like(moving, 120) + np.arange(6, dtype=np.uint8)[:, None, None, None] * 20
    assert behaviour.collapsed(behaviour.ending(grey), true), "without any detail"
    pale = behaviour.ending((moving // 2 + 127).astype(np.uint8))
    assert behaviour.collapsed(pale, true), "another colour"


TINY = replace(
    QUICK,
    routes=3,
    returns=1,
    reference=256,
    minutes=(1, 2),
    long_minutes=(3,),
    minute=1.0,
    segment=0.3,
    starts=2,
    rounds=2,
    steps=12,
    states=1,
    flips=1,
    idle=1.0,
)
TIMES = {"latency_answer_ms", "step_ms_p50", "step_ms_p99", "fps_p50", "real_time", "latency_ms", "seconds"}


def options(tiny_checkpoint, turns, out, *more: str) -> TrainConfig:
    plain = ["stage=evaluate", "quick=true", "precision=fp32", "device=cpu"]
    paths = [f"checkpoint={tiny_checkpoint}", f"data={turns}", f"out={out}"]
    return load_config("train", TrainConfig, [*plain, *paths, *more])


@pytest.mark.slow
def test_the_whole_stage_against_the_simulator(tiny_checkpoint, tmp_path, monkeypatch):
    """Without any recording; and, as no routes ship for three keys, with routes that it draws."""
    pytest.importorskip("vizdoom")
    monkeypatch.setattr(stage, "QUICK", TINY)
    monkeypatch.setattr(behaviour, "PUSH_SECONDS", 0.5)
    config = options(tiny_checkpoint, tmp_path / "none", tmp_path / "out")
    figures, folder = evaluate(config), tmp_path / "out" / "evaluation"
    assert json.loads((folder / "figures.json").read_text()) == figures
    absent = {name for name in stage.HEADLINE if "10" in name or "_psnr_20" in name}
    told = {*stage.HEADLINE} - absent
    assert told <= set(figures), told - set(figures)
    more = {"probe_accuracy", "octave4_64", "repeat_psnr_64", "drift_3min_idle", "spin_motion_true"}
    assert more <= set(figures), more - set(figures)
    assert np.isfinite([value for value in figures.values() if not isinstance(value, str)]).all()
    report = (folder / "report.md").read_text()
    shown = re.findall(r"\]\((\S+)\)", report)
    assert len(shown) >= 10 and "Left out" not in report
    for name in set(shown) - {"drift.mp4", "figures.json"}:
        assert load_picture(folder / name).std() > 5, name
    with av.open(str(folder / "drift.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 7 * 5, "two minutes of a second"
    again = evaluate(config)
    assert {k: v for k, v in again.items() if k not in TIMES} == {
        k: v for k, v in figures.items() if k not in TIMES
    }, "two runs agree"


@pytest.mark.slow
def test_without_a_simulator_what_needs_it_is_left_out_and_said(
    tiny_checkpoint, turns, tmp_path, monkeypatch, capsys
):
    """In three calls, as the time of the first two is up: what is finished is not measured again."""
    monkeypatch.setattr(stage, "QUICK", replace(TINY, rounds=1, reference=64, long_minutes=()))
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    given, folder = ("frames=18", "max_minutes=1e-6"), tmp_path / "evaluation"
    first = evaluate(options(tiny_checkpoint, turns, tmp_path, *given))
    left = ["returning", "control", "latency", "behaviour", "speed", "drift"]
    assert first["left"] == ", ".join(left) and {"psnr_16", "psnr_16_of_recorded"} <= set(first)
    said = capsys.readouterr().err
    assert "the same command goes on" in said and "may have learned what it is measured on" in said
    assert first["held_out"] is False
    second = evaluate(options(tiny_checkpoint, turns, tmp_path, *given))
    assert second["left"] == ", ".join(left[1:])
    assert not (folder / "report.md").exists() and len(list((folder / "parts").iterdir())) == 2
    measured = []
    for name, part in stage.MEASURED.items():
        noted = lambda scope, name=name, part=part: measured.append(name) or part(scope)  # noqa: E731
        monkeypatch.setitem(stage.MEASURED, name, noted)
    figures = evaluate(options(tiny_checkpoint, turns, tmp_path, "frames=18"))
    assert measured == left[1:]
    assert "fidelity, returning." in capsys.readouterr().err
    assert {"psnr_16", "drift_1min_idle", "flicker_idle", "fps_p50"} <= set(figures)
    assert not {"control", "latency_first_frames", "spin_collapsed", "return_psnr_5", "left"} & set(figures)
    report = (folder / "report.md").read_text()
    assert report.count("The world needs ViZDoom") == 4
    assert figures["held_out"] is json.loads((folder / "figures.json").read_text())["held_out"] is False
    assert "the network may have learned what it is measured on" in report
    assert report.index("## Fidelity") < report.index("## Drift")
    assert "2 games of 1 s under each of 3 policies" in report
    assert not (folder / "parts").exists(), "the next call measures again"


def test_two_evaluations_are_set_side_by_side():
    before = {"psnr_1": 27.94, "control": 0.88, "control_low": 0.85, "control_high": 0.91, "fps_p50": 35.0}
    after = {"psnr_1": 28.5, "psnr_1_stateless": 28.1, "control": 0.95, "real_time": 2.5, "fps_p50": 35.0}
    after |= {"drift_10min_random": 1.04, "motion_10min_random": 0.9, "drift_10min_idle": 1.0}
    assert compare(before, after).splitlines()[2:] == [
        "| PSNR after 1 | 27.9 | 28.5 |",
        "| PSNR after 1, without state | – | 28.1 |",
        "| control | 0.88 (0.85 to 0.91) | 0.95 |",
        "| 10 min, random: nearest-true distance last/first (motion) | – | 1.04 (0.9) |",
        "| 10 min, idle: nearest-true distance last/first (motion) | – | 1 |",
        "| × real time | 2 | 2.5 |",
    ]


def test_finished_parts_count_for_their_own_evaluation_only(scope, tmp_path):
    key, section = key_of(scope), Section("Title", {"figure": 1.5, "trials": 3}, ["text", ""])
    parts = SectionCache(tmp_path / "parts", key)
    assert parts.find("one") is None
    parts.keep("one", section, 2.5)
    assert SectionCache(tmp_path / "parts", key).find("one") == (section, 2.5)
    others = [replace(scope, seed=1), replace(scope, most=41), replace(scope, truth=None)]
    others += [
        replace(scope, size=replace(scope.size, routes=9)),
        replace(scope, clips=Clips([], scope.player)),
        replace(scope, routes=scope.routes[1:]),
    ]
    assert len({key, *map(key_of, others)}) == 1 + len(others)
    assert SectionCache(tmp_path / "parts", key_of(others[0])).find("one") is None
    (tmp_path / "parts" / "one.json").write_text("{")
    assert parts.find("one") is None, "damaged, so measured anew"
    parts.drop("one")
    assert not (tmp_path / "parts").exists()
    copied = tmp_path / "copied" / "turns"  # what a recording holds counts, not what it is called
    shutil.copytree(scope.clips.recordings[0].directory, copied)
    same = replace(scope, clips=Clips([Recording(copied)], scope.player))
    assert key_of(same) == key
    lines = (copied / "actions.jsonl").read_text()
    (copied / "actions.jsonl").write_text(lines.replace("turn_right", "turn_left"))
    assert key_of(same) != key


@pytest.mark.slow
def test_a_stopped_evaluation_leaves_no_simulator_and_what_it_finished(tiny_checkpoint, tmp_path):
    pytest.importorskip("vizdoom")
    given = ["stage=evaluate", "quick=true", "device=cpu", "precision=fp32", "threads=1"]
    save_routes(tmp_path / "routes.json", "doom_gathering", Panorama.action_space.names, routes(), "")
    paths = [f"checkpoint={tiny_checkpoint}", f"routes={tmp_path / 'routes.json'}", f"out={tmp_path}"]
    command = [sys.executable, "train.py", *given, *paths]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    finished = tmp_path / "evaluation" / "parts" / "fidelity.json"
    try:
        deadline = time.monotonic() + 900
        while not finished.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=300)  # a simulator that lives on holds the pipes open
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 143 and "the same command continues" in said
    assert finished.exists()


def test_missing_libraries_are_told_before_work_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "LIBRARIES", ("torchmetrics", "no_such_library"))
    with pytest.raises(UserError, match=r"needs no_such_library.*\[evaluate\]"):
        evaluate(options("missing.safetensors", tmp_path, tmp_path))


@pytest.mark.parametrize("unseen, names", [(False, {"b"}), (True, {"a", "b"})])
def test_recordings_that_are_new_to_the_network_are_all_used(
    unseen, names, tiny_checkpoint, turns, tmp_path, monkeypatch
):
    for name in ("a", "b"):
        shutil.copytree(turns / "turns", tmp_path / "data" / name)
    turns = tmp_path / "data"
    assert [path.name for path in split(find_recordings(turns))[1]] == ["b"]
    for number in range(9):  # what a network drew is neither truth, nor does it move what was held out
        shutil.copytree(turns / "b", turns / f"dream{number}")
        header = turns / f"dream{number}" / "session.json"
        header.write_text(header.read_text().replace('"source": "true"', '"source": "dream"'))
    seen = set()

    def clips(recordings, player):
        seen.update(recording.directory.name for recording in recordings)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "Clips", clips)
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(tiny_checkpoint, turns, tmp_path, f"unseen={unseen}"))
    assert seen == names


def test_a_checkpoint_of_another_world_than_was_given_is_refused(tiny_checkpoint, turns, tmp_path):
    with pytest.raises(UserError, match="is of doom_gathering, not of doom_home"):
        evaluate(options(tiny_checkpoint, turns, tmp_path, "world=doom_home"))


def test_actions_of_clips_stand_in_the_network_s_order(player, tmp_path):
    """Those of a player who had fewer keys, in another order."""
    few = replace(player.world, keys={"turn_right": ["D"], "forward": ["W"]})
    with Recorder(tmp_path / "few", few, "true", 0) as recorder:
        for number in range(3):
            recorder.add(view(0), [1, number], reset=not number, t_ns=number)
    _, actions, _ = Clips([Recording(tmp_path / "few")], player).choose([(0, 0)], 1, 3, 0)
    assert list(player.world.keys) == ["forward", "turn_left", "turn_right"]
    assert actions.tolist() == [[[0, 0, 1], [1, 0, 1], [1, 0, 1]]]


def test_a_recording_with_other_keys_is_refused(player, tmp_path):
    other = replace(player.world, keys={"jump": ["Space"]})
    with Recorder(tmp_path / "jumps", other, "true", 0) as recorder:
        recorder.add(view(0), [0], reset=True, t_ns=0)
    with pytest.raises(UserError, match="other keys"):
        Clips([Recording(tmp_path / "jumps")], player)
