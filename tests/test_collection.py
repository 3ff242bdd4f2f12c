"""Collecting: the same recordings for any number of workers, and after an interruption."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.config import TrainConfig, UserError, WorldConfig
from engine.data import collection
from engine.data.collection import collect
from engine.data.find import find_recordings
from engine.data.recording import Recorder, Recording

ROOT = Path(__file__).parent.parent
WORLD = yaml.safe_load((ROOT / "configs" / "world" / "doom_gathering.yaml").read_text())


@pytest.fixture(autouse=True)
def short_recordings(monkeypatch):
    monkeypatch.setattr(collection, "RECORDING_FRAMES", 90)


def config(data: Path, frames: int = 240, **changes) -> TrainConfig:
    world = WorldConfig(**{**WORLD, "episode_frames": 50})
    return TrainConfig(stage="collect", world=world, data=str(data), frames=frames, lossless=True, **changes)


def content(directory: Path) -> list[tuple[bytes, bytes]]:
    found = find_recordings(directory)
    return [((path / "actions.jsonl").read_bytes(), Recording(path).frames().tobytes()) for path in found]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    data = tmp_path_factory.mktemp("collect") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection, "RECORDING_FRAMES", 90)
        return data, collect(config(data, workers=2))


def test_recordings_hold_what_was_asked_for(two_workers):
    data, figures = two_workers
    assert figures["frames"] == 240 and figures["recordings"] == 3 and figures["fps"] > 0
    recordings = [Recording(path) for path in find_recordings(data)]
    assert [path.name for path in find_recordings(data)] == [f"doom_gathering-0-{i:05d}" for i in range(3)]
    assert [len(recording) for recording in recordings] == [90, 90, 60]
    assert figures["episodes"] == sum(recording.resets.sum() for recording in recordings) == 6
    first = recordings[0]
    assert first.header["policies"] == collection.SHARES and first.parent is None
    assert (
        first.state_kinds.keys() == first.states[0].keys() >= {"x", "y", "angle", "eye", "vx", "vy", "health"}
    )
    assert first.resets[0] and not first.actions[first.resets].any() and first.actions.any()
    assert list(np.flatnonzero(first.resets)) == [0, 51]
    starts = [recording.frames(0, 1) for recording in recordings]
    assert len({start.tobytes() for start in starts}) == 3, "every episode has a seed of its own"


def test_an_action_stands_at_the_frame_that_it_caused(two_workers):
    recording = Recording(find_recordings(two_workers[0])[0])
    angles = np.array([state["angle"] for state in recording.states])
    turned = (np.diff(angles) + 180) % 360 - 180
    keys = [recording.names.index(name) for name in ("turn_left", "turn_right")]
    left, right = recording.actions[1:, keys].T > 0
    whole = ~recording.resets[1:]
    assert np.array_equal(turned[whole] > 1, left[whole]) and np.array_equal(turned[whole] < -1, right[whole])


@pytest.mark.slow
def test_workers_change_nothing_but_the_speed(two_workers, tmp_path):
    collect(config(tmp_path, workers=1))
    assert content(tmp_path) == content(two_workers[0])


@pytest.mark.slow
def test_a_collection_grows_to_the_same_bytes(two_workers, tmp_path):
    assert collect(config(tmp_path, frames=100))["frames"] == 100
    grown = collect(config(tmp_path, frames=240, workers=1))
    assert grown["frames"] == 140 and grown["kept_frames"] == 100 and grown["recordings"] == 2
    assert content(tmp_path) == content(two_workers[0])
    again = collect(config(tmp_path, frames=100))
    assert again["frames"] == 0 and content(tmp_path) == content(two_workers[0])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"doom_gathering-0-{number:05d}" for number in range(3)
    ]


@pytest.mark.slow
def test_a_recording_that_lost_frames_is_made_anew(two_workers, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(two_workers[0], data)
    video = data / "doom_gathering-0-00001" / "frames.mkv"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    left = len(Recording(video.parent))
    assert 0 < left < 90
    assert collect(config(data))["frames"] == 90 - left
    assert content(data) == content(two_workers[0])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lossless": False}, "lossless is True there and False here"),
        ({"width": 160, "height": 128}, "world.height is 96 there and 128 here; world.width is 128 there"),
        ({"tics": 4}, "world.tics is 2 there and 4 here"),
        (
            {"name": "doom_home", "scenario": "my_way_home"},
            "world.name is doom_gathering there and doom_home",
        ),
        ({"keys": {"forward": ["W"]}}, "world.keys"),
    ],
)
def test_another_job_is_refused(two_workers, changes, said):
    data, _ = two_workers
    before = content(data)
    wanted = config(data, frames=300)
    wanted.lossless = changes.pop("lossless", True)
    wanted.world = replace(wanted.world, **changes)
    with pytest.raises(UserError, match=said) as caught:
        collect(wanted)
    assert "\n" not in str(caught.value) and content(data) == before


def test_other_policies_are_another_job(two_workers, monkeypatch):
    monkeypatch.setattr(collection, "SHARES", {"random": 1.0})
    with pytest.raises(UserError, match="policies is explore .* there and random 1.0 here"):
        collect(config(two_workers[0], frames=300))


@pytest.mark.parametrize("name", ["doom_gathering-0-00000", "doom_gathering-0-00001.tmp"])
def test_what_an_older_version_collected_is_another_job(name, tmp_path):
    """Its header did not tell who played; its name tells that it was collected."""
    with Recorder(tmp_path / name, config(tmp_path).world, "true", 0, lossless=True) as recorder:
        recorder.add(np.zeros((96, 128, 3), np.uint8), [0] * 6, reset=True)
    file = tmp_path / name / "session.json"
    header = json.loads(file.read_text())
    del header["policies"]
    file.write_text(json.dumps(header))
    for seed in (0, 1):
        with pytest.raises(UserError, match="policies is not told there and explore .* here"):
            collect(config(tmp_path, seed=seed))
    file.parent.rename(tmp_path / "mine")  # as a person's may be called
    assert collect(config(tmp_path, frames=20))["frames"] == 20


@pytest.mark.slow
def test_seeds_of_any_size_lie_side_by_side(tmp_path):
    seeds = (2**63, -5)
    for seed in seeds:
        assert collect(config(tmp_path, frames=30, seed=seed))["frames"] == 30
    recordings = [Recording(path) for path in find_recordings(tmp_path)]
    assert len({recording.header["seed"] for recording in recordings}) == 2  # each hashed to one of its own
    first, second = (recording.actions.tobytes() for recording in recordings)
    assert first != second


@pytest.mark.slow
def test_the_same_collection_twice_at_once(tmp_path):
    """One makes it, the other is refused or finds it made; nothing is spoilt."""
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, yaml\nfrom engine.data.collection import collect\nfrom engine.config import *\n"
        "if __name__ == '__main__':\n"
        "    world = WorldConfig(**yaml.safe_load(open(sys.argv[1])))\n"
        "    try:\n"
        "        config = TrainConfig('collect', world=world, data='data', frames=120)\n"
        "        print(collect(config)['frames'])\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, str(script), str(ROOT / "configs" / "world" / "doom_gathering.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, env=environment, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0] and "120" in said, said
    assert all(words in ("120", "0") or words.startswith("Another collection is writing") for words in said)
    assert len(Recording(tmp_path / "data" / "doom_gathering-0-00000")) == 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "program.py"], (
        "ViZDoom left something"
    )


def test_a_collection_that_came_late_is_still_alone(tmp_path):
    """It has opened the lock before another one ends, and takes it after that."""
    fcntl = pytest.importorskip("fcntl")
    collect(config(tmp_path, frames=0))
    with open(tmp_path / ".doom_gathering-0.lock") as late:
        collect(config(tmp_path, frames=0))
        fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="Another collection"):
            collect(config(tmp_path, frames=0))
    assert collect(config(tmp_path, frames=0))["frames"] == 0


def test_an_interrupted_collection_is_finished_with_the_same_bytes(two_workers, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(two_workers[0], data)
    whole = data / "doom_gathering-0-00001"
    whole.rename(whole.with_suffix(".tmp"))
    (data / "doom_gathering-0-00001.tmp" / "actions.jsonl").write_text("half a li")
    figures = collect(config(data, workers=2))
    assert figures["frames"] == 90 and figures["kept_frames"] == 150
    assert content(data) == content(two_workers[0]) and not list(data.glob("*.tmp"))
    assert collect(config(data))["frames"] == 0


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tmp_path):
    """Killed while it plays, in an environment without a simulator process that would be left behind."""
    pytest.importorskip("gymnasium")
    world = WorldConfig("gym", "gym", id="CartPole-v1", tics=1, fps=20.0)
    wanted = TrainConfig(stage="collect", world=world, data=str(tmp_path), frames=400, workers=1)
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if any(tmp_path.glob("*/actions.jsonl")):
                worker = multiprocessing.active_children()[0]
                worker.kill()
                killed.append(worker.pid)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    figures = collect(wanted)
    killer.join()
    assert killed and figures["frames"] == 400
    recordings = [Recording(path) for path in find_recordings(tmp_path)]
    assert [len(recording) for recording in recordings] == [90, 90, 90, 90, 40]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_killed_parent_takes_its_workers_along(tmp_path):
    program = (
        "import sys, yaml\nfrom engine.data.collection import collect\nfrom engine.config import *\n"
        "if __name__ == '__main__':\n"
        "    world = WorldConfig(**yaml.safe_load(open(sys.argv[1])))\n"
        "    collect(TrainConfig(stage='collect', world=world, data=sys.argv[2], workers=1))\n"
    )
    script, data = tmp_path / "program.py", tmp_path / "data"
    script.write_text(program)
    yaml_file = ROOT / "configs" / "world" / "doom_gathering.yaml"
    process = subprocess.Popen(
        [sys.executable, str(script), str(yaml_file), str(data)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    lines = data / "doom_gathering-0-00000.tmp" / "actions.jsonl"
    deadline = time.monotonic() + 30
    while not (lines.exists() and lines.stat().st_size > 1000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    size = lines.stat().st_size
    time.sleep(0.5)
    assert size == lines.stat().st_size, "a worker went on without its parent"


def test_a_full_disk_or_a_forbidden_folder_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        collect(config(tmp_path / "file" / "data"))

    class FullDisk(collection.Recorder):
        def add(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(collection, "Recorder", FullDisk)
    with pytest.raises(UserError, match="No space left"):
        collection.play(collection.plan(config(tmp_path / "data"))[0])


def test_an_unknown_scenario_is_told_by_the_parent(tmp_path):
    broken = config(tmp_path, frames=10)
    broken.world.scenario = "nowhere"
    with pytest.raises(UserError, match="no scenario 'nowhere'"):
        collect(broken)


@pytest.mark.parametrize("name", ["doom_gathering-0-00001", "doom_gathering-0-00001.tmp", "plain"])
def test_what_somebody_else_made_is_never_replaced(name, tmp_path):
    """A person's recording, or a folder, that is called as a recording of this job would be."""
    there = tmp_path / name.replace("plain", "doom_gathering-0-00000")
    if name == "plain":
        there.mkdir()
        (there / "notes.txt").write_text("mine")
    else:
        with Recorder(there, config(tmp_path).world, "true", 0, lossless=True) as recorder:
            for number in range(3):
                recorder.add(np.zeros((96, 128, 3), np.uint8), [0] * 6, reset=not number)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=f"{there.name} was not made by this collection and is not replaced"):
        collect(config(tmp_path))
    after = {path: path.read_bytes() for path in before}
    assert after == before and {path.name for path in tmp_path.iterdir() if path.is_dir()} == {there.name}


def test_nothing_is_collected_beside_recordings_of_another_world(tmp_path):
    """A network could be trained on neither."""
    world = replace(config(tmp_path).world, fps=35.0)
    with Recorder(tmp_path / "mine", world, "true", 0) as recorder:
        recorder.add(np.zeros((96, 128, 3), np.uint8), [0] * 6, reset=True)
    with pytest.raises(UserError, match="mine is of 35 frames a second, not of 17.5 frames a second"):
        collect(config(tmp_path))
    assert len(find_recordings(tmp_path)) == 1


@pytest.mark.slow
def test_a_person_s_recordings_may_have_any_name(two_workers, tmp_path):
    """What is called as a collection's, and has other pixels, is no other job."""
    with Recorder(tmp_path / "walk-2026-10003", config(tmp_path).world, "true", 0) as recorder:
        recorder.add(np.zeros((96, 128, 3), np.uint8), [0] * 6, reset=True)
    assert collect(config(tmp_path))["frames"] == 240
    assert len(find_recordings(tmp_path)) == 4


def test_other_keys_of_one_environment_are_another_job(tmp_path):
    pytest.importorskip("gymnasium")
    world = WorldConfig("gym", "gym", id="CartPole-v1", tics=1, fps=20.0)
    named = replace(world, keys={"left": ["A"], "right": ["D"]})
    collect(TrainConfig(stage="collect", world=named, data=str(tmp_path), frames=20, workers=1))
    for seed in (0, 1):
        wanted = TrainConfig(stage="collect", world=world, data=str(tmp_path), frames=40, seed=seed)
        with pytest.raises(UserError, match="world.keys is left, right there and action_0, action_1 here"):
            collect(wanted)
