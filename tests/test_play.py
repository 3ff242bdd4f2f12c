"""The player: headless and in a window, dream and true game; recordings replay, keys are not lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from engine.config import PlayConfig, StateConfig, UserError
from engine.data.floor import BODY
from engine.data.picture import load_picture, save_picture
from engine.data.recording import Recording
from engine.data.starts import cut_start, packed_starts
from engine.model.checkpoint import Checkpoint, save_checkpoint, write_tensors
from engine.model.networks import load_autoencoder, make_denoiser
from engine.play.game import open_game
from engine.play.playthrough import Playthrough, check_policy
from engine.play.schedule import Schedule
from engine.play.timings import Timings
from engine.programs import play
from engine.rollout.player import Player
from engine.rollout.session import Session
from engine.shipped import shipped

ROOT = Path(__file__).resolve().parent.parent


def run(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    """The program's figures; it must succeed."""
    code = play.main(list(arguments))
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out.splitlines()[-1])


def playthrough(checkpoint: Path, **options) -> Playthrough:
    config = PlayConfig(checkpoint=str(checkpoint), device="cpu", precision="fp32", **options)
    return Playthrough(config, open_game(config), check_policy(config.policy))


# headless --------------------------------------------------------------------------------------------


def drawn(checkpoint, name: str) -> np.ndarray:
    """What the network draws of a shipped start's last latents, uint8 (h, w, 3)."""
    player = Player(checkpoint, "cpu", "fp32")
    start = packed_starts(player.checkpoint.extras, player.checkpoint.model, player.world)[name]
    return player.decode(start.latents[-1:])[0]


def test_headless_dream(tiny_checkpoint, tmp_path, capsys):
    film, record = tmp_path / "seen.mp4", tmp_path / "r"
    options = [
        f"checkpoint={tiny_checkpoint}",
        "policy=random",
        "frames=25",
        "seed=5",
        "device=cpu",
        "precision=fp32",
    ]
    figures = run(capsys, "display=headless", *options, f"record={record}", f"video={film}")
    assert figures["frames"] == 25 and figures["seed"] == 5 and figures["game"] == "dream"
    for name in ("fps_p50", "step_ms_p50", "step_ms_p99", "first_frame_s", "real_time_ratio", "rss_mb"):
        assert figures[name] > 0, name
    recording = Recording(record)
    assert len(recording) == 26 and recording.resets.tolist() == [True] + [False] * 25
    assert recording.header["source"] == "dream" and recording.header["seed"] == 5
    assert recording.header["checkpoint"] == open_game(PlayConfig(checkpoint=str(tiny_checkpoint))).digest
    assert not recording.actions[0].any() and recording.actions[1:].any()
    start = drawn(tiny_checkpoint, "a").astype(int)
    assert np.abs(recording.frames(0, 1)[0].astype(int) - start).mean() < 4  # lossy, but that picture
    with av.open(str(film)) as file:
        stream = file.streams.video[0]
        pictures = [picture.to_ndarray(format="rgb24") for picture in file.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert abs(float(stream.average_rate) - 17.5) < 0.01
    assert len(pictures) == 26 and pictures[0].shape == (288, 384, 3)
    assert np.abs(pictures[0][1::3, 1::3].astype(int) - start).mean() < 12


def test_without_a_display_a_policy_plays_into_a_video(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert play.main([f"checkpoint={tiny_checkpoint}", "frames=20"]) == 0
    said = capsys.readouterr().out
    assert "window" in said and str(tmp_path / "rollplay.mp4") in said
    assert json.loads(said.splitlines()[-1])["frames"] == 20
    first = (tmp_path / "rollplay.mp4").read_bytes()
    assert len(first) > 1000
    assert run(capsys, f"checkpoint={tiny_checkpoint}", "frames=3")["video"] == "rollplay-2.mp4"
    assert (tmp_path / "rollplay.mp4").read_bytes() == first and (tmp_path / "rollplay-2.mp4").exists()


def test_without_a_display_the_shipped_world_is_shown_by_its_walk(tmp_path, monkeypatch):
    """Recorded with the network that ships, or its film would show other places than were walked."""
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    walk = Recording(play.choose_display(PlayConfig()).policy)
    assert walk.header["checkpoint"] == Checkpoint(shipped(PlayConfig.checkpoint)).digest()
    assert len(walk) > 200 and not walk.resets[1:].any()
    assert (np.diff(walk.actions, axis=0) != 0).any(1).sum() > 10, "somebody plays"
    for own in ({"seed": 5}, {"start": "2"}, {"checkpoint": "other.safetensors"}):
        assert play.choose_display(PlayConfig(**own)).policy == "explore"
    assert play.choose_display(PlayConfig(policy="spin")).policy == "spin"


def test_help(capsys):
    assert play.main(["--help"]) == 0
    assert "policy=NAME" in capsys.readouterr().out


def test_true_game_goes_on_with_the_next_seed(doom_config, tmp_path):
    config = PlayConfig(game="true", world=doom_config, policy="spin", seed=7, record=str(tmp_path / "r"))
    game = Playthrough(config, open_game(config))
    for _ in range(60):
        game.advance()
    game.close()
    recording = Recording(tmp_path / "r")
    began = [recording.events[frame][-1]["reset"]["seed"] for frame in np.flatnonzero(recording.resets)]
    assert began == [7, 8, 9] and recording.header["source"] == "true"
    assert recording.states[0]["health"] > 0
    again = Playthrough(PlayConfig(game="true", world=doom_config, seed=8), open_game(config))
    second = int(np.flatnonzero(recording.resets)[1])
    assert np.abs(again.frame.astype(int) - recording.frames(second, second + 1)[0]).mean() < 4
    again.close()


# what is reproduced ----------------------------------------------------------------------------------


def test_a_recorded_dream_replays_frame_by_frame(tiny_checkpoint, tmp_path, capsys):
    """With its resets and its changes of start; another seed dreams something else."""
    first = playthrough(tiny_checkpoint, policy="random", seed=3, record=str(tmp_path / "first"), start="b")
    seen = []
    for number in range(30):
        if number == 12:
            first.reset()
        elif number == 20:
            first.game.choose_next()
            first.reset()
        else:
            first.advance()
        seen.append(first.frame)
    first.close()

    again = playthrough(tiny_checkpoint, policy=str(tmp_path / "first"))
    replayed = []
    while not again.over:
        again.advance()
        replayed.append(again.frame)
    np.testing.assert_array_equal(np.stack(replayed), np.stack(seen))
    other = playthrough(tiny_checkpoint, policy=str(tmp_path / "first"), seed=99)
    other.advance()
    assert (other.frame != seen[0]).any()

    figures = run(
        capsys, "display=headless", f"checkpoint={tiny_checkpoint}", "device=cpu", "precision=fp32",
        f"policy={tmp_path / 'first'}", f"record={tmp_path / 'second'}",
    )  # fmt: skip
    assert figures["frames"] == 28  # two of the thirty were resets
    one, two = Recording(tmp_path / "first"), Recording(tmp_path / "second")
    np.testing.assert_array_equal(one.frames(), two.frames())
    np.testing.assert_array_equal(one.actions, two.actions)
    assert [line[-1:] for line in one.events] == [line[-1:] for line in two.events]


def test_starts(tiny_checkpoint, tmp_path):
    game = open_game(PlayConfig(checkpoint=str(tiny_checkpoint), precision="fp32"))
    walk = Recording(tiny_checkpoint.parent / "walk")
    np.testing.assert_array_equal(game.reset(0), drawn(tiny_checkpoint, "a"))
    game.choose_next()
    np.testing.assert_array_equal(game.reset(0), drawn(tiny_checkpoint, "b"))
    game.choose_next()
    assert game.start == "a"
    np.testing.assert_array_equal(game.reset(0, f"{walk.directory}:7"), walk.frames(7, 8)[0])
    assert game.reset(0, str(walk.directory)).shape == (96, 128, 3)
    picture = np.random.default_rng(1).integers(0, 255, (96, 128, 3), np.uint8)
    save_picture(tmp_path / "p.png", picture)
    np.testing.assert_array_equal(game.reset(0, str(tmp_path / "p.png")), picture)


def test_a_start_from_ones_own_screenshot_is_the_frame(tiny_checkpoint, tmp_path, capsys):
    """F12 enlarges frames by four; any other picture is fitted, too, and that is told."""
    game = open_game(PlayConfig(checkpoint=str(tiny_checkpoint), precision="fp32"))
    frame = np.random.default_rng(1).integers(0, 255, (96, 128, 3), np.uint8)
    save_picture(tmp_path / "shot.png", frame.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(game.reset(0, str(tmp_path / "shot.png")), frame)
    assert "512x384" in (said := capsys.readouterr().err) and "128x96" in said
    wide = np.zeros((50, 300, 3), np.uint8)
    wide[:, 116:184] = 200  # the middle, of a frame's shape
    save_picture(tmp_path / "wide.png", wide)
    assert (game.reset(0, str(tmp_path / "wide.png")) == 200).all()


@pytest.mark.parametrize("part", ["latents", "actions", "states"])
def test_shipped_starts_of_other_networks_are_not_offered(tiny_checkpoint, tmp_path, part):
    before, path = Checkpoint(tiny_checkpoint), tmp_path / "other.safetensors"
    cut = {f"extras.starts.a.{part}": before.extras[f"starts.a.{part}"][..., :-1]}
    write_tensors(path, before.tensors | cut, before.about)
    game = open_game(PlayConfig(checkpoint=str(path), device="cpu", precision="fp32"))
    assert game.start == "b"
    game.choose_next()
    assert game.start == "b"


def test_a_damaged_shipped_start_is_told(tiny_checkpoint):
    made = Checkpoint(tiny_checkpoint)
    for part in ("latents", "actions", "states"):
        name = f"starts.a.{part}"
        for extras in ({name: made.extras[name][:-1]}, {name: made.extras[name][0]}):
            with pytest.raises(UserError, match="start 'a' inside the checkpoint is damaged"):
                packed_starts(made.extras | extras, made.model, made.world)
        without = {key: value for key, value in made.extras.items() if key != name}
        with pytest.raises(UserError, match="damaged"):
            packed_starts(without, made.model, made.world)


def test_names_with_colons(tiny_checkpoint, tmp_path, monkeypatch):
    """The whole name comes first, then DIR:FRAME; names are no protocols and no patterns."""
    monkeypatch.chdir(tmp_path)
    game = playthrough(
        tiny_checkpoint, policy="random", record="10:30", video="http:%03d?.mp4", start="b", seed=4
    )
    for _ in range(5):
        game.advance()
    game.close()
    walk = Recording("10:30")
    assert len(walk) == 6
    with av.open((tmp_path / "http:%03d?.mp4").open("rb")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 6
    dream = open_game(PlayConfig(checkpoint=str(tiny_checkpoint), device="cpu", precision="fp32"))
    np.testing.assert_array_equal(dream.reset(0, "10:30"), walk.frames(3, 4)[0])
    np.testing.assert_array_equal(dream.reset(0, "10:30:2"), walk.frames(2, 3)[0])
    shutil.copytree("10:30", "10")
    np.testing.assert_array_equal(dream.reset(0, "10:3"), walk.frames(3, 4)[0])
    save_picture("shot:7.png", np.full((96, 128, 3), 9, np.uint8))
    (tmp_path / "shot:7.png").rename("shot:7")
    assert (dream.reset(0, "shot:7") == 9).all()
    again = playthrough(tiny_checkpoint, policy="10:30")
    assert again.replay.left == 5


def test_a_cut_start_stays_in_its_episode(tiny_checkpoint):
    walk = Recording(tiny_checkpoint.parent / "walk")
    space = open_game(PlayConfig(checkpoint=str(tiny_checkpoint), precision="fp32")).action_space
    cut = cut_start(walk, 25, space, 16, "b")
    np.testing.assert_array_equal(cut.frames, walk.frames(20, 26))  # the episode began at 20
    np.testing.assert_array_equal(cut.actions, walk.actions[20:26])
    assert cut.states == walk.states[20:26] and cut.states[5]["x"] == 225
    assert len(cut_start(walk, 19, space, 16, "c").frames) == 16


def test_a_shipped_start_is_the_recording_that_it_was_cut_from(tiny_checkpoint):
    """Latents (in 8 bits), keys and states as they were: the game is the same, and knows where it is."""
    player = Player(tiny_checkpoint, "cpu", "fp32")
    walk, shipped, recorded = Recording(tiny_checkpoint.parent / "walk"), Session(player), Session(player)
    start = packed_starts(player.checkpoint.extras, player.checkpoint.model, player.world)["a"]
    np.testing.assert_array_equal(shipped.begin(4, start), drawn(tiny_checkpoint, "a"))
    recorded.reset(4, walk.frames(0, 13), walk.actions[:13], walk.states[:13])
    assert shipped.state() == recorded.state() == {"x": 108, "y": 40, "angle": 84}
    for key in (1, 1, 0, 2):
        action = np.eye(3, dtype=np.float32)[key]
        one, other = (session.step(action).astype(int) for session in (shipped, recorded))
        np.testing.assert_allclose(one, other, atol=4)  # latents are in 8 bits
        assert shipped.state() == pytest.approx(recorded.state(), abs=1e-3)
    assert shipped.state()["angle"] != 84


def test_a_start_holds_all_keys_that_a_frame_knows(tiny_checkpoint, tmp_path):
    """Of a model that remembers fewer frames than it knows keys of."""
    before, path = Checkpoint(tiny_checkpoint), tmp_path / "long.safetensors"
    known = replace(before.model.denoiser, action_history=8)
    model = replace(before.model, denoiser=known, state=StateConfig())
    networks = {"autoencoder": load_autoencoder(before), "denoiser": make_denoiser(model, before.world)}
    for weights in networks["denoiser"].parameters():
        torch.nn.init.normal_(weights, std=0.04 if weights.ndim == 4 else 0.2)
    save_checkpoint(path, networks, model, before.world)
    walk, player = Recording(tiny_checkpoint.parent / "walk"), Player(path, "cpu", "fp32")
    game = open_game(PlayConfig(checkpoint=str(path), device="cpu", precision="fp32"))
    game.reset(3, f"{walk.directory}:12")
    session = Session(player)
    session.reset(3, walk.frames(5, 13), walk.actions[5:13], walk.states[5:13])
    action = np.eye(3, dtype=np.float32)[0]
    np.testing.assert_array_equal(game.step(action), session.step(action))


def test_seeds_of_any_size_are_played_and_replayed(tiny_checkpoint, tmp_path):
    first = playthrough(tiny_checkpoint, policy="random", seed=2**63, record=str(tmp_path / "r"))
    first.advance()
    first.close()
    again, other = (playthrough(tiny_checkpoint, policy=str(tmp_path / "r"), seed=x) for x in (0, 2**63 + 1))
    again.advance()
    other.advance()
    assert again.seed == 2**63
    np.testing.assert_array_equal(again.frame, first.frame)
    assert (other.frame != first.frame).any()


def test_a_game_from_a_picture_knows_no_state(tiny_checkpoint, tmp_path):
    save_picture(tmp_path / "p.png", np.zeros((96, 128, 3), np.uint8))
    game = playthrough(tiny_checkpoint, start=str(tmp_path / "p.png"))
    game.advance(np.eye(3, dtype=np.float32)[0])
    assert game.game.state() == {} and game.frame.std() > 0


def test_recording_can_begin_and_end_while_playing(tiny_checkpoint, tmp_path):
    game = playthrough(tiny_checkpoint, policy="random")
    for number in range(12):
        if number == 4:
            game.record(tmp_path / "r")
        elif number == 9:
            game.stop_recording()
        game.advance()
    recording = Recording(tmp_path / "r")
    assert len(recording) == 6 and recording.resets.tolist() == [True] + [False] * 5
    game.close()


# time ------------------------------------------------------------------------------------------------


def test_schedule_neither_drifts_nor_makes_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    schedule = Schedule(10)
    for frame in range(1, 51):
        schedule.begin()
        now[0] += 0.03  # the step
        assert schedule.left() == pytest.approx(100 + frame / 10 - now[0])
        now[0] += schedule.left() + 0.001  # one wakes up a little late, every time
    assert (schedule.late, schedule.dropped) == (0, 0)
    now[0] += 0.35  # a hiccup: three slots are gone, the fourth comes in its rhythm
    schedule.begin()
    assert (schedule.late, schedule.dropped) == (1, 3)
    assert schedule.left() == pytest.approx(0.05 - 0.001)


def test_timings_leave_pauses_out(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timings = Timings()
    for frame in range(20):
        if frame == 10:
            timings.interrupt()
            now[0] += 60
        start = now[0]
        now[0] += 0.02
        timings.add(start)
        now[0] += 0.03
    figures = timings.figures(20)
    assert figures["fps_p50"] == pytest.approx(20) and figures["step_ms_p99"] == pytest.approx(20)
    assert figures["real_time_ratio"] == pytest.approx(1, abs=0.1)


# the window ------------------------------------------------------------------------------------------


def test_keys_are_never_lost():
    from engine.play.ui.keys import HeldKeys, actions_of
    from engine.worlds.base import ActionSpace

    keys = HeldKeys()
    keys.press("W")
    keys.release("W")
    keys.press("Left")
    held, events = keys.read()
    assert held == {"W", "Left"}  # the tap counts
    assert [(event["key"], event["down"]) for event in events] == [("W", True), ("W", False), ("Left", True)]
    assert keys.read() == ({"Left"}, [])  # once, and what is held stays held
    keys.press("D")
    keys.forget()
    keys.release("D")
    assert keys.read()[0] == {"Left"}
    keys.release_all()
    held, events = keys.read()
    assert not held and [(event["key"], event["down"]) for event in events] == [("Left", False)]
    space = ActionSpace(("forward", "left", "right"), (("W", "Up"), ("Left",), ("Right",)))
    assert actions_of({"Up", "W", "Left", "Right", "X"}, space) == ["forward", "left", "right"]


def test_a_window_keeps_the_worlds_pace(tiny_checkpoint, capsys):
    """In SDL's dummy window: never faster than the world; slower only on a machine that is very busy."""
    figures = run(
        capsys, "display=window", f"checkpoint={tiny_checkpoint}", "policy=random", "frames=40", "device=cpu"
    )
    assert figures["frames"] == 40 and {"late", "dropped"} <= figures.keys()
    busy = max(1.0, os.getloadavg()[0] / os.cpu_count())
    assert 0.5 / busy < figures["real_time_ratio"] < 1.1


def test_the_time_from_key_to_picture_is_measured():
    from engine.play.timings import Latency

    latency = Latency()
    assert latency.recent() == 0 and latency.figures() == {}
    for ms in (40, 50, 60):
        latency.shown(time.perf_counter() - ms / 1000)
    assert latency.recent() == pytest.approx(50, abs=2)
    assert latency.figures()["key_to_picture_ms_p50"] == pytest.approx(50, abs=2)
    assert latency.recent(1) == pytest.approx(60, abs=2)


def test_hud_leaves_the_centre_free():
    from engine.play.stepper import View
    from engine.play.ui.hud import draw_banner, draw_help, draw_hud
    from engine.play.ui.screen import Screen
    from engine.worlds.base import ActionSpace

    space = ActionSpace(
        ("forward", "turn_left", "attack"), (("W", "Up"), ("Left", "Q"), ("Space", "Left Ctrl"))
    )
    frame = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    screen = Screen(128, 96, 6, True, False)
    import pygame

    try:
        for scale in (3, 6):
            pygame.display.set_mode((128 * scale, 96 * scale), pygame.RESIZABLE)
            screen.show(frame)
            plain = pygame.surfarray.array3d(screen.surface)
            view = View(frame, ("forward",), (17.5, 30.0, 41.0), "a", "runs/played/x", True, "")
            draw_hud(screen, view, space, 75, 48.0)
            draw_banner(screen, "paused")
            draw_banner(screen, "a long message " * 20, at_top=False)
            if scale == 6:  # in a very small window the help may cover what it must
                draw_help(screen, "doom gathering", space)
            drawn = pygame.surfarray.array3d(screen.surface)
            changed = (drawn != plain).any(-1)  # (x, y)
            assert 0.05 < changed.mean() < 0.5
            across, down = changed.shape
            centre = changed[int(across * 0.4) : int(across * 0.52), int(down * 0.4) : int(down * 0.6)]
            assert not centre.any()
    finally:
        screen.close()


class Window:
    """play.py in a real window, as a player meets it: xdotool presses keys, the recording tells them."""

    def __init__(self, environment: dict[str, str], folder: Path, *arguments: str) -> None:
        self.environment, self.folder, self.record = environment, folder, folder / "r"
        command = [sys.executable, str(ROOT / "play.py"), f"record={self.record}", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        self.wait(lambda: len(self.lines()) > 3)
        self.id = self.do("getwindowfocus")

    def do(self, *words: str) -> str:
        pipes = {"capture_output": True, "text": True, "timeout": 10}
        done = subprocess.run(["xdotool", *words], env=self.environment, **pipes)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def lines(self) -> list[dict]:
        try:
            return [json.loads(row) for row in (self.record / "actions.jsonl").read_text().split("\n")[:-1]]
        except FileNotFoundError:
            return []

    def held(self, key: str) -> int:
        return sum(key in line["keys"] for line in self.lines())

    def wait(self, what: Callable[[], object], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.03)

    def frames_pass(self, count: int) -> None:
        until = len(self.lines()) + count
        self.wait(lambda: len(self.lines()) >= until)

    def picture(self) -> np.ndarray:
        """What the X server shows, uint8 (h, w, 3)."""
        with av.open(self.environment["DISPLAY"], format="x11grab", options={"draw_mouse": "0"}) as grab:
            return next(grab.decode(video=0)).to_ndarray(format="rgb24")


@pytest.fixture
def window(real_display, tmp_path):
    pytest.importorskip("vizdoom")
    if not shutil.which("xdotool"):
        pytest.skip("needs xdotool")
    opened = Window({**real_display, "OMP_NUM_THREADS": "1"}, tmp_path, "game=true", "display=window")
    yield opened
    if opened.process.poll() is None:
        opened.process.send_signal(signal.SIGINT)  # killed, it would leave its simulator behind
        opened.process.communicate(timeout=20)


def test_a_real_window(window, tmp_path):
    window.do("keydown", "w")  # held: in every frame
    window.wait(lambda: window.held("forward") > 3)
    window.do("keyup", "w")
    window.frames_pass(3)
    forward = [number for number, line in enumerate(window.lines()) if "forward" in line["keys"]]
    assert forward == list(range(forward[0], forward[-1] + 1))
    raw = [event for line in window.lines() for event in line["events"] if "key" in event]
    assert [(event["key"], event["down"]) for event in raw] == [("W", True), ("W", False)]

    for taps in range(1, 4):  # shorter than a step: in one frame
        window.do("key", "--delay", "0", "Left")
        window.wait(lambda taps=taps: window.held("turn_left") >= taps)
        window.frames_pass(3)
        assert window.held("turn_left") == taps

    window.do("keydown", "Left", "keydown", "Right")  # opposite ones as they are
    window.wait(lambda: any({"turn_left", "turn_right"} <= set(line["keys"]) for line in window.lines()))
    window.do("keyup", "Left", "keyup", "Right")

    window.do("keydown", "d")  # losing the focus releases
    window.wait(lambda: window.held("strafe_right") > 2)
    window.do("mousemove", "1", "1")  # X sends the repeats of a held key to what lies under the pointer
    root = window.do("search", "--maxdepth", "0", "--class", ".*")
    window.do("windowfocus", root)
    window.wait(lambda: "strafe_right" not in window.lines()[-1]["keys"])
    window.frames_pass(3)
    strafed = window.held("strafe_right")
    window.frames_pass(4)
    assert window.held("strafe_right") == strafed
    window.do("keyup", "d")
    window.do("windowfocus", window.id)
    window.frames_pass(2)

    window.do("key", "F5")  # start again
    window.wait(lambda: sum(line["reset"] for line in window.lines()) == 2)

    window.do("key", "Escape")  # pause
    time.sleep(0.5)
    frames = len(window.lines())
    time.sleep(0.3)
    assert len(window.lines()) == frames
    window.do("key", "Escape")
    window.frames_pass(2)

    window.do("key", "F12")
    window.wait(lambda: list((tmp_path / "runs" / "played").glob("*.png")))
    window.do("key", "F9")  # the recording ends, another begins
    for _ in range(2):
        window.do("key", "F11")
        time.sleep(0.7)  # another window takes its place, and for a moment nobody has the keyboard
    window.do("key", "F9")
    window.wait(lambda: list((tmp_path / "runs" / "played").glob("*/actions.jsonl")))
    plain = window.picture()
    assert plain.std() > 5  # there is a picture
    window.do("key", "F1")
    window.wait(lambda: np.abs(window.picture()[::4, ::4].astype(int) - plain[::4, ::4]).mean() > 3)
    window.do("key", "F10")
    said, wrong = window.process.communicate(timeout=20)
    assert window.process.returncode == 0, wrong
    figures = json.loads(said.splitlines()[-1])
    assert 0.4 < figures["real_time_ratio"] < 1.1 and figures["first_frame_s"] < 20
    assert 1 < figures["key_to_picture_ms_p50"] < 400, "some of a frame's time, and a step of the game"
    screenshot = load_picture(next((tmp_path / "runs" / "played").glob("*.png")))
    assert screenshot.shape == (384, 512, 3) and screenshot.std() > 5
    recording = Recording(window.record)
    assert len(recording) == len(window.lines()) and os.path.isdir(window.record)


def test_stopped_in_the_terminal(real_display, tmp_path, tiny_checkpoint):
    """Ctrl-C ends a dream in a window cleanly; what was recorded and filmed is whole."""
    if not shutil.which("xdotool"):
        pytest.skip("needs xdotool")
    environment = {**real_display, "OMP_NUM_THREADS": "1"}
    window = Window(environment, tmp_path, f"checkpoint={tiny_checkpoint}", "video=seen.mp4")
    window.do("keydown", "Up")
    window.wait(lambda: window.held("forward") > 2)
    window.process.send_signal(signal.SIGINT)
    said, wrong = window.process.communicate(timeout=20)
    assert window.process.returncode == 130 and "Traceback" not in wrong, wrong
    recording = Recording(window.record)
    assert recording.actions[:, 0].sum() > 2 and len(recording) == len(window.lines())
    with av.open(str(tmp_path / "seen.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == len(recording)


def test_a_policy_walks_by_the_edges_of_what_was_seen(tiny_checkpoint):
    """A body's width beyond the places of the recordings, so that all of these can be walked to."""
    session = Session(Player(tiny_checkpoint, "cpu", "fp32"))
    states = session.player.states
    states.scales.low.copy_(torch.tensor([-100.0, 50, 0]))
    states.scales.high.copy_(torch.tensor([300.0, 250, 360]))
    lines = session.map_lines()
    assert lines.shape == (4, 4)
    assert lines.reshape(-1, 2).min(0).tolist() == [-100 - BODY, 50 - BODY]
    assert lines.reshape(-1, 2).max(0).tolist() == [300 + BODY, 250 + BODY]
    assert np.array_equal(lines[:, 2:], np.roll(lines[:, :2], -1, 0)), "they meet"
    assert Session(Player(tiny_checkpoint, "cpu", "fp32", state=False)).map_lines().shape == (0, 4)


def test_a_generated_game_runs_backwards_while_r_is_held(real_display, tiny_checkpoint, tmp_path):
    """In a real window; let go, it goes on from there, and the recording tells where that was."""
    if not shutil.which("xdotool"):
        pytest.skip("needs xdotool")
    chosen = [f"checkpoint={tiny_checkpoint}", "display=window", "device=cpu", "precision=fp32"]
    window = Window({**real_display, "OMP_NUM_THREADS": "1"}, tmp_path, *chosen)
    window.frames_pass(25)
    window.do("keydown", "r")
    time.sleep(0.2)  # a frame under way is still written
    frames = len(window.lines())
    time.sleep(0.5)
    assert len(window.lines()) == frames, "nothing is recorded of what is seen again"
    window.do("keyup", "r")
    window.wait(lambda: sum(line["reset"] for line in window.lines()) == 2)
    window.frames_pass(3)
    (line,) = [line for line in window.lines()[1:] if line["reset"]]
    (event,) = [event for event in line["events"] if "reset" in event]
    assert event["parent"]["recording"] == "r" and 0 <= event["parent"]["frame"] < frames - 3
    assert line["rng"] == sum(count for _, count in event["reset"].get("held", []))
    window.do("key", "F10")
    said, wrong = window.process.communicate(timeout=20)
    assert window.process.returncode == 0, wrong
