"""Bad input to the player: one sentence that says what to do, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.config import WorldConfig
from engine.data.picture import save_picture
from engine.data.recording import Recorder, Recording
from engine.programs import play

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def refused(tiny_checkpoint, capsys, tmp_path, monkeypatch):
    """Calls play.py with bad input → the sentence, which must be the only one."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, display: str = "headless", checkpoint: object = tiny_checkpoint) -> str:
        options = [f"checkpoint={checkpoint}", f"display={display}", "frames=3", "policy=idle"]
        options += ["device=cpu", "precision=fp32"]
        given = {argument.split("=")[0] for argument in arguments}
        options = [option for option in options if option.split("=")[0] not in given]
        assert play.main([*options, *arguments]) == 2
        said = capsys.readouterr()
        assert not said.out.strip().startswith("{") and "Traceback" not in said.err
        lines = [line for line in said.err.splitlines() if not line.lstrip("\r").startswith("play:")]
        assert len(lines) == 1 and lines[0].startswith("play.py: "), said.err
        return lines[0]

    return call


def walk(directory: Path, world: WorldConfig, frames: int = 12, held: str = "") -> Recording:
    """Makes a recording in which the key `held` is down in every second frame."""
    noise = np.random.default_rng(0).integers(0, 255, (world.height, world.width, 3), np.uint8)
    with Recorder(directory, world, "true", 0) as recorder:
        for number in range(frames):
            action = [number % 2 * (name == held) for name in world.keys]
            recorder.add(noise, action, reset=number == 0)
    return Recording(directory)


# the checkpoint ----------------------------------------------------------------------------------


def test_missing_checkpoint(refused):
    assert "no checkpoint" in refused(checkpoint="none.safetensors")


def test_truncated_checkpoint(refused, tiny_checkpoint, tmp_path):
    whole = tiny_checkpoint.read_bytes()
    for share in (0, 0.001, 0.5, 0.99):
        (tmp_path / "cut.safetensors").write_bytes(whole[: int(share * len(whole))])
        assert "not a readable checkpoint" in refused(checkpoint="cut.safetensors")


def test_pickle_is_not_opened(refused, tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "model.pt")
    assert "not a readable checkpoint" in refused(checkpoint="model.pt")


def test_foreign_checkpoint(refused, tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    assert "another program" in refused(checkpoint="other.safetensors")


def test_wrong_config_in_a_checkpoint(refused, tiny_checkpoint, tmp_path):
    with safe_open(tiny_checkpoint, "pt") as file:
        head = json.loads(file.metadata()["rollplay"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def rewrite(change) -> str:
        changed = json.loads(json.dumps(head))
        change(changed)
        save_file(tensors, tmp_path / "changed.safetensors", {"rollplay": json.dumps(changed)})
        return refused(checkpoint="changed.safetensors")

    assert "do not fit" in rewrite(lambda head: head["model"]["denoiser"].update(width=64))
    assert "do not fit" in rewrite(lambda head: head["model"].pop("denoiser"))
    assert "not one that" in rewrite(lambda head: head["model"]["denoiser"].update(colour="red"))
    for wrong in ("99", "1", "null", '"2"'):
        said = rewrite(lambda head, wrong=wrong: head.update(format=json.loads(wrong)))
        assert f"has format {wrong}, and this version reads 2; train it anew" in said
    assert "holds no denoiser" in rewrite(lambda head: head.update(modules=["autoencoder"]))


# options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, said",
    [
        ("polcy=idle", "polcy"),
        ("frames=many", "frames"),
        ("frames=-1", "frames must be at least 0"),
        ("threads=-1", "threads must be at least 0"),
        ("scale=0", "scale must be at least 1"),
        ("world.fps=nan", "world.fps must be"),
        ("game=chess", "chess"),
        ("display=tv", "tv"),
        ("precision=int3", "int3"),
        ("policy=clever", "clever"),
        ("world=doom_nowhere", "choose one of doom_arena"),
        ("world=doom (1)", "choose one of doom_arena"),
        ("=3", "no option"),
        ("world.nmae=x", "world.nmae"),
        ("world.keys.forwrd=[W]", "only forward, backward"),
        ("world.tics=0", "world.tics must be at least 1"),
        ("world.name=../x", "world.name must be without slashes"),
        ("device=abacus", "abacus"),
        ("just words", "just words"),
        ("start=nowhere", "its shipped starts are a, b"),
    ],
)
def test_options(refused, option, said):
    assert said in refused(option)


def test_no_display(refused, monkeypatch):
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform.startswith("linux"):
        assert "display=headless" in refused(display="window")
    monkeypatch.setenv("SDL_VIDEODRIVER", "no such driver")
    assert "display=headless" in refused(display="window")


def test_vizdoom_is_not_installed(refused, monkeypatch, tiny_checkpoint):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert "pip install -e .[doom]" in refused("game=true")
    assert "start=RECORDING" in refused(checkpoint=tiny_checkpoint.parent / "startless.safetensors")


def test_a_binding_that_is_no_key(refused):
    pytest.importorskip("vizdoom")
    sentence = refused("game=true", "world.keys.forward=[Wheel]", display="window")
    assert "'Wheel'" in sentence and "forward" in sentence


# recordings and pictures to start from or to replay ----------------------------------------------


def test_keys_that_the_checkpoint_does_not_know(refused, tmp_path, tiny_checkpoint):
    world = WorldConfig(keys={"forward": ["W"], "fly": ["F"]})
    walk(tmp_path / "flying", world, held="fly")
    assert "fly" in refused("policy=flying") and "fly" in refused("start=flying")
    walk(tmp_path / "walking", world, held="forward")  # a key that is never held is no matter
    assert play.main(["display=headless", f"checkpoint={tiny_checkpoint}", "policy=walking"]) == 0


def test_broken_recordings(refused, tmp_path, tiny_checkpoint, capsys):
    recording = walk(tmp_path / "r", WorldConfig(keys={"forward": ["W"]}), 60, "forward").directory
    lines = (recording / "actions.jsonl").read_bytes().splitlines(keepends=True)
    (recording / "actions.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:9] + b"".join(lines[21:]))
    assert "damaged at line 21" in refused("policy=r") and "damaged at line" in refused("start=r:3")
    (recording / "actions.jsonl").write_bytes(b"".join(lines))
    assert "no frame 99" in refused("start=r:99")

    video = (recording / "frames.mkv").read_bytes()
    (recording / "frames.mkv").write_bytes(video[: len(video) // 2])  # cut, as in a kill: the rest is good
    options = ["display=headless", "device=cpu", f"checkpoint={tiny_checkpoint}", "policy=r"]
    assert play.main(options) == 0
    assert 0 < json.loads(capsys.readouterr().out)["frames"] < 59
    (recording / "frames.mkv").write_bytes(b"")
    assert "cannot be read" in refused("policy=r")
    assert "not a recording" in refused(f"policy={tmp_path}")


def test_pictures_to_start_from(refused, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in refused("start=text.png")
    save_picture(tmp_path / "there.png", np.zeros((96, 128, 3), np.uint8))
    playlist = f"#EXTM3U\n#EXTINF:1,\n{(tmp_path / 'there.png').as_uri()}\n#EXT-X-ENDLIST\n"
    for name in ("list.png", "list.m3u8"):  # a file that one was given opens no others
        (tmp_path / name).write_text(playlist)
        assert "no picture" in refused(f"start={name}")
    (tmp_path / "cut.png").write_bytes((tmp_path / "there.png").read_bytes()[:-40])
    assert "cut.png could not be read" in refused("start=cut.png")


# what cannot be written --------------------------------------------------------------------------


def test_places_that_cannot_be_written(refused, tmp_path):
    walk(tmp_path / "there", WorldConfig(keys={"forward": ["W"]}))
    before = {path: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    assert "already holds a recording" in refused("record=there")
    assert {path: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    (tmp_path / "file").write_text("")
    assert "file/r" in refused("record=file/r")
    assert "file/v.mp4" in refused("video=file/v.mp4")
    assert "video=FILE.mp4" in refused("video=there")  # a folder


def test_nothing_is_begun_before_all_is_checked(refused, tmp_path):
    """A video that is there is not touched, and of what is refused nothing stays."""
    walk(tmp_path / "there", WorldConfig(keys={"forward": ["W"]}))
    (tmp_path / "old.mp4").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    assert "old.mp4 is there already" in refused("video=old.mp4", "record=new")
    assert "already holds a recording" in refused("video=new.mp4", "record=there")
    assert "already holds a recording" in refused("video=there/new.mp4", "record=there")
    assert "start=nowhere" in refused("video=old.mp4", "record=new", "start=nowhere")
    assert "Cannot record into" in refused("video=a/b/new.mp4", f"record=c/d/{'x' * 300}")
    assert "could not be written" in refused(f"video=a/b/{'x' * 300}.mp4", "record=c/d")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "old.mp4").read_bytes() == b"mine"


def test_keys_are_checked_before_anything_is_written(refused, tmp_path):
    pytest.importorskip("vizdoom")
    options = ["game=true", "world.keys.forward=[Wheel]", "video=v.mp4", "record=r"]
    assert "'Wheel'" in refused(*options, display="window")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["record", "video", "checkpoint", "policy"])
def test_every_error_of_the_system_is_a_sentence(refused, option):
    name = 300 * "x" + (".mp4" if option == "video" else "")
    assert "too long" in refused(f"{option}={name}").lower()


@pytest.mark.skipif(sys.platform == "win32", reason="folders in use cannot be deleted")
def test_a_folder_that_is_gone(tmp_path):
    code = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
    code += "from engine.programs import play; sys.exit(play.main(['display=headless', 'frames=2']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("play.py: the folder that this was started in is gone"), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk(tiny_checkpoint, tmp_path):
    """The recording ends with a sentence and what it holds is readable; no figures, as if all were well."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); "
    code += "from engine.programs import play; "
    options = (
        f"checkpoint={tiny_checkpoint} display=headless policy=random frames=2000 record={tmp_path / 'r'}"
    )
    command = [sys.executable, "-c", code + "sys.exit(play.main(sys.argv[1:]))", *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert "stopped after" in done.stderr.splitlines()[-1]
    recording = Recording(tmp_path / "r")
    assert len(recording) > 5 and recording.frames().shape[0] == len(recording)


def test_a_recording_that_cannot_begin_while_playing(refused, tmp_path, monkeypatch):
    """The key for it tells so in the window, the game goes on, and the program says it again at its end."""
    import pygame

    from engine.play.ui.loop import Loop

    told, keys = [], {3: pygame.KSCAN_F12, 6: pygame.KSCAN_F9, 12: pygame.KSCAN_F10}
    look = Loop.look

    def press(loop: Loop) -> None:
        look(loop)
        told.append(loop.message)
        if len(told) in keys:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, scancode=keys[len(told)], mod=0))

    monkeypatch.setattr(Loop, "look", press)
    (tmp_path / "file").write_text("")
    assert "Cannot record into" in refused("out=file", "frames=0", "policy=keyboard", display="window")
    assert any("picture" in words for words in told[3:7]) and "Cannot record" in told[-1] and len(told) >= 12
