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
from engine.dataset import split
from engine.evaluation import behaviour, control, evaluate, latency, stage, turning
from engine.evaluation.branches import Truth, starts
from engine.evaluation.clips import Clips
from engine.evaluation.drift import motion_ratio
from engine.evaluation.features import Features, frechet
from engine.evaluation.generated import play, played_with, roll
from engine.evaluation.measures import difference, horizontal_flow, motion, psnr, sharpness, ssim
from engine.evaluation.parts import Parts, key_of
from engine.evaluation.section import QUICK, Scope, Section
from engine.evaluation.watch import EVERY, Watch, curves, ratio
from engine.picture import load_picture
from engine.recording import Recorder, Recording, find_recordings
from engine.session import Player
from engine.starts import find_starts
from engine.worlds.base import ActionSpace

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "assets" / "doom_gathering.safetensors"
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
    fps = 17.5

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

    def close(self) -> None:
        pass


def obedient(delay: int = 0, twist=lambda actions: actions):
    """In place of the network: the world itself, under the keys as twisted, `delay` frames late."""

    def roll(player, frames, actions, seed, name=""):
        start, made = frames.shape[1], []
        for clip, acts in zip(frames, actions.numpy(), strict=True):
            world, (half, odd, depth) = Panorama(), clip[-1, 0, 0].tolist()
            world.go_on(2 * half + odd, depth, twist(acts[start - 1]), delay)
            made.append([world.step(twist(action)) for action in acts[start:]])
        return np.array(made)

    return roll


def mirrored(actions: np.ndarray) -> np.ndarray:
    return actions[..., [0, 2, 1]]


def frozen(actions: np.ndarray) -> np.ndarray:
    return 0 * actions


@pytest.fixture
def player(tiny_checkpoint) -> Player:
    return Player(tiny_checkpoint, "cpu", "fp32")


@pytest.fixture
def turns(player, tmp_path):
    """A recording that turns left (the picture moves right by 5 a frame), right and rests, 12 frames each."""
    place, way = 200, 0
    with Recorder(tmp_path / "data" / "turns", player.world, "true", 0, lossless=True) as recorder:
        for number in range(240):
            way = (1, 0, -1, 0)[number // 12 % 4] if number else 0  # 1: left
            place -= 5 * way
            recorder.add(view(place), [0, way == 1, way == -1], reset=number == 0, t_ns=number)
    return tmp_path / "data"


@pytest.fixture
def scope(player, turns, tmp_path) -> Scope:
    clips = Clips([Recording(turns / "turns")], player)
    features, truth = Features(player, clips.sample(64, 0), 8), Truth(Panorama(), 4)
    size = replace(QUICK, states=3, flips=6)
    return Scope(player, clips, features, truth, "", tmp_path, 0, size, 40)


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


def test_features_tell_true_pictures_from_others(scope):
    true = scope.clips.sample(48, 1)
    noise = np.random.default_rng(0).integers(0, 255, true.shape, np.uint8)
    features = scope.features
    assert features.distance(noise) > 10 * features.distance(true)
    assert features.stray(features.of(true)) < 0.2 * features.stray(features.of(noise))


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
    frames, actions, seeds = starts([branches, branches], 7)
    assert frames.shape == (8, 4, 96, 128, 3) and actions.shape == (8, 7, 3)
    assert seeds.tolist() == [7] * 4 + [8] * 4, "all branches of a state have the same noise"
    assert (actions[2, :4].numpy() == state.actions).all() and (actions[2, 4:].numpy() == keys[2]).all()


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


def test_settings_reach_the_rollout_and_are_taken_back(player):
    own = player.denoiser.config
    assert [s.name(4) for s in latency.settings(4, 0.9)][3::4] == ["frozen_corrected", "frozen_plain"]
    assert len(latency.settings(3, 0.9)) == 6, "in a window of three, position 2 is that of entry"
    frames = np.stack([view(0)] * 4)[None].repeat(2, 0)
    actions = torch.zeros(2, 8, 3)
    actions[1, 4:, 1] = 1  # one of two games turns; the noise is the same
    parted = {}
    for c in (0, 2):
        with played_with(player.denoiser, c, 0.0):
            made = roll(player, frames, actions, torch.tensor([3, 3]))
        parted[c] = [int(n) for n in np.abs(made[0].astype(int) - made[1]).sum((1, 2, 3))]
    assert player.denoiser.config is own
    assert parted[0][0] > 10 * parted[2][0], "frozen at entry, the leaving frame has the old key"


@pytest.mark.parametrize("obeys, share", [(1, 1.0), (-1, 0.0), (0, 0.0)])
def test_turning_tells_obedience_from_defiance(scope, monkeypatch, obeys, share):
    """A world that turns as told, the wrong way, or not at all, in place of the network."""

    def roll(player, frames, actions, seed, name):
        start = player.denoiser.config.sink + player.denoiser.config.recent
        wide = np.concatenate([frames[:, start - 1]] * 3, 2)
        made = []
        for number in range(start, actions.shape[1]):
            way = (actions[:, start : number + 1, 1] - actions[:, start : number + 1, 2]).sum(1).int()
            made.append(
                [np.roll(w, 5 * obeys * int(n), 1)[:, 128:256] for w, n in zip(wide, way, strict=True)]
            )
        return np.stack(made, 1)

    monkeypatch.setattr(turning, "roll", roll)
    figures = turning.turning(scope).figures
    assert figures["turn_trials"] >= 8
    assert figures["turn_obeyed"] == figures["turn_obeyed_within_2"] == share


def game(frames: list[np.ndarray], scope: Scope, policy: str = "scripted") -> Watch:
    watch = Watch(scope.features, 9, policy)
    for frame in frames:
        watch.add(frame)
    return watch


def test_drift_of_steady_fading_and_frozen_games(scope):
    steady = [view(5 * n) for n in range(36)]
    fading = [(f * max(0.2, 1 - n / 36)).astype(np.uint8) for n, f in enumerate(steady)]
    still = [view(0)] * 36
    movies = {"steady": steady, "fading": fading, "still": still}
    games = {name: game(frames, scope) for name, frames in movies.items()}
    rows = {name: some.rows for name, some in games.items()}
    assert len(rows["steady"]) == 4
    assert ratio([games["fading"]], 4) > 3 * ratio([games["steady"]], 4)
    assert rows["fading"][-1]["stray"] > 2 * rows["steady"][-1]["stray"]
    assert rows["fading"][-1]["sharpness"] < 0.5 * rows["steady"][-1]["sharpness"]
    assert ratio([games["still"]], 4) == pytest.approx(1), "what is frozen does not drift, so motion is told"
    going, stuck = ([game(x, scope, name) for name in ("scripted", "random")] for x in (steady, still))
    assert motion_ratio(scope, going, going) == pytest.approx(1)
    assert motion_ratio(scope, stuck, going) == 0
    assert motion_ratio(scope, stuck, []) == 0 < motion_ratio(scope, going, [])


def test_drift_pools_the_frames_of_all_games(scope):
    """Against the distance of the pictures themselves, put together."""
    long, short = [view(5 * n) for n in range(27)], [view(300 - 7 * n) // 2 for n in range(18)]
    first, second = game(long, scope), game(short, scope)
    both = [
        scope.features.distance(np.stack(long[at : at + 9 : EVERY] + short[at : at + 9 : EVERY]))
        for at in (0, 9)
    ]
    assert ratio([first, second], 2) == pytest.approx(both[1] / both[0])
    assert len(first.points) == 3 and first.points[0].shape == (3, 8), "no more than features is kept"
    figures = curves([first, second])
    each = [some.rows[1]["sharpness"] for some in (first, second)]
    assert figures["sharpness"][1] == pytest.approx(np.mean(each))
    assert figures["sharpness"][2] == first.rows[2]["sharpness"]


def test_a_game_in_a_batch_is_the_game_alone():
    """Of the network that ships: one that learned nothing lets a rounding error grow from frame to frame."""
    player = Player(SHIPPED, "cpu", "fp32")
    recordings = [Recording(path) for path in find_starts(player.world.name, SHIPPED)[:3]]
    history = player.denoiser.config.sink + player.denoiser.config.recent
    frames = np.stack([recording.frames()[-history:] for recording in recordings])
    held = torch.rand(3, history + 8, len(player.world.keys)) < 0.3
    actions, seeds = held.float(), torch.tensor([4, 9, 4])
    together = np.stack(list(play(player, frames, actions, seeds)), 1).astype(int)
    for number in range(3):
        part = slice(number, number + 1)
        alone = np.stack(list(play(player, frames[part], actions[part], seeds[part])), 1)[0]
        assert np.abs(together[number] - alone).max() <= 1


def test_scripts_of_behaviour_find_a_full_turn_and_a_wall(scope):
    state = scope.truth.state(3, 30)
    actions = behaviour.spin(scope, state)
    assert len(actions) == 2 * 60 and (actions[:60, 1] == 1).all() and (actions[60:, 2] == 1).all()
    frames, states = scope.truth.run(state, actions)
    assert states[59]["angle"] == states[-1]["angle"] == state.told["angle"], "all the way round"
    push = behaviour.wall(scope, state)
    depths = [s["x"] for s in scope.truth.run(state, push)[1]]
    assert depths[-50:] == [195] * 50


def test_behaviour_of_an_obedient_world_and_of_one_that_confuses_its_keys(scope, monkeypatch):
    for twist, share in ((lambda actions: actions, 1), (mirrored, 0)):
        monkeypatch.setattr(behaviour, "roll", obedient(twist=twist))
        monkeypatch.setattr(behaviour, "rebuilt", lambda scope, frames: frames)  # as the fake paints
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
    held=400,
    clips=2,
    reference=64,
    turns=3,
    places=1,
    minutes=(1, 2),
    minute=1.0,
    segment=0.3,
    starts=2,
    steps=12,
    states=1,
    flips=1,
    idle=1.0,
)
TIMES = {"latency_answer_ms", "step_ms_p50", "step_ms_p99", "fps_p50", "latency_ms", "seconds"}


def options(tiny_checkpoint, turns, out, *more: str) -> TrainConfig:
    plain = ["stage=evaluate", "quick=true", "precision=fp32", "device=cpu"]
    paths = [f"checkpoint={tiny_checkpoint}", f"data={turns}", f"out={out}"]
    return load_config("train", TrainConfig, [*plain, *paths, *more])


@pytest.mark.slow
def test_the_whole_stage_against_the_simulator(tiny_checkpoint, tmp_path, monkeypatch):
    """Without any recording: it plays its own."""
    pytest.importorskip("vizdoom")
    monkeypatch.setattr(stage, "QUICK", TINY)
    monkeypatch.setattr(behaviour, "PUSH_SECONDS", 0.5)
    config = options(tiny_checkpoint, tmp_path / "none", tmp_path / "out")
    figures, folder = evaluate(config), tmp_path / "out" / "evaluation"
    assert json.loads((folder / "figures.json").read_text()) == figures
    told = {*stage.HEADLINE} - {"drift_10min"}
    assert told <= set(figures), told - set(figures)
    olds = {"psnr_1_moved", "turn_obeyed", "sharpness_64", "spin_motion_last", "idle_motion_woken"}
    assert olds <= set(figures)
    assert np.isfinite([value for value in figures.values() if not isinstance(value, str)]).all()
    report = (folder / "report.md").read_text()
    shown = re.findall(r"\]\((\S+)\)", report)
    assert len(shown) >= 10 and "Left out" not in report
    for name in set(shown) - {"drift.mp4", "figures.json"}:
        assert load_picture(folder / name).std() > 5, name
    with av.open(str(folder / "drift.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 7 * 6, "two minutes of a second"
    again = evaluate(config)
    assert {k: v for k, v in again.items() if k not in TIMES} == {
        k: v for k, v in figures.items() if k not in TIMES
    }, "two runs agree"


def test_without_a_simulator_what_needs_it_is_left_out_and_said(
    tiny_checkpoint, turns, tmp_path, monkeypatch, capsys
):
    """In three calls, as the time of the first two is up: what is finished is not measured again."""
    monkeypatch.setattr(stage, "QUICK", replace(TINY, places=0))
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    given, folder = ("frames=18", "max_minutes=1e-6"), tmp_path / "evaluation"
    first = evaluate(options(tiny_checkpoint, turns, tmp_path, *given))
    left = ["turning", "drift", "control", "latency", "behaviour", "speed"]
    assert first["left"] == ", ".join(left) and "psnr_64" in first and "turn_trials" not in first
    assert "the same command goes on" in capsys.readouterr().err
    second = evaluate(options(tiny_checkpoint, turns, tmp_path, *given))
    assert second["left"] == ", ".join(left[1:]) and "turn_trials" in second
    assert not (folder / "report.md").exists() and len(list((folder / "parts").iterdir())) == 2
    measured = []
    for name, part in stage.MEASURED.items():
        noted = lambda scope, name=name, part=part: measured.append(name) or part(scope)  # noqa: E731
        monkeypatch.setitem(stage.MEASURED, name, noted)
    figures = evaluate(options(tiny_checkpoint, turns, tmp_path, "frames=18"))
    assert measured == left[1:]
    assert "fidelity, turning." in capsys.readouterr().err
    assert {"psnr_64", "motion_ratio", "fps_p50"} <= set(figures)
    assert not {"control", "latency_first_frames", "spin_collapsed", "left"} & set(figures)
    report = (folder / "report.md").read_text()
    assert report.count("The world needs ViZDoom") == 3
    assert report.index("## Fidelity") < report.index("## Drift") and "6 games under 3 policies" in report
    assert not (folder / "parts").exists(), "the next call measures again"


def test_finished_parts_count_for_their_own_evaluation_only(scope, tmp_path):
    key, section = key_of(scope), Section("Title", {"figure": 1.5, "trials": 3}, ["text", ""])
    parts = Parts(tmp_path / "parts", key)
    assert parts.find("one") is None
    parts.keep("one", section, 2.5)
    assert Parts(tmp_path / "parts", key).find("one") == (section, 2.5)
    others = [replace(scope, seed=1), replace(scope, most=41), replace(scope, truth=None)]
    others += [
        replace(scope, size=replace(scope.size, clips=9)),
        replace(scope, clips=Clips([], scope.player)),
    ]
    assert len({key, *map(key_of, others)}) == 1 + len(others)
    assert Parts(tmp_path / "parts", key_of(others[0])).find("one") is None
    (tmp_path / "parts" / "one.json").write_text("{")
    assert parts.find("one") is None, "damaged, so measured anew"
    parts.drop("one")
    assert not (tmp_path / "parts").exists()


@pytest.mark.slow
def test_a_stopped_evaluation_leaves_no_simulator_and_what_it_finished(tiny_checkpoint, turns, tmp_path):
    pytest.importorskip("vizdoom")
    given = ["stage=evaluate", "quick=true", "device=cpu", "precision=fp32", "threads=1"]
    paths = [f"checkpoint={tiny_checkpoint}", f"data={turns}", f"out={tmp_path}"]
    command = [sys.executable, "train.py", *given, *paths]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    finished = tmp_path / "evaluation" / "parts" / "fidelity.json"
    try:
        deadline = time.monotonic() + 60
        while not finished.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=30)  # a simulator that lives on holds the pipes open
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130 and "the same command continues" in said
    assert finished.exists()


def test_missing_libraries_are_told_before_work_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "LIBRARIES", ("torchmetrics", "no_such_library"))
    with pytest.raises(UserError, match=r"needs no_such_library.*\[evaluate\]"):
        evaluate(options("missing.safetensors", tmp_path, tmp_path))


@pytest.mark.parametrize("unseen, names", [(False, {"b"}), (True, {"a", "b"})])
def test_recordings_that_are_new_to_the_network_are_all_used(
    unseen, names, tiny_checkpoint, turns, tmp_path, monkeypatch
):
    (turns / "turns").rename(turns / "a")
    shutil.copytree(turns / "a", turns / "b")
    assert [path.name for path in split(find_recordings(turns))[1]] == ["b"]
    seen = set()

    def clips(recordings, player):
        seen.update(recording.directory.name for recording in recordings)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "Clips", clips)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(tiny_checkpoint, turns, tmp_path, f"unseen={unseen}"))
    assert seen == names


def test_a_recording_with_other_keys_is_refused(player, tmp_path):
    other = replace(player.world, keys={"jump": ["Space"]})
    with Recorder(tmp_path / "jumps", other, "true", 0) as recorder:
        recorder.add(view(0), [0], reset=True, t_ns=0)
    with pytest.raises(UserError, match="other keys"):
        Clips([Recording(tmp_path / "jumps")], player)
