"""Recordings: exact round trips, and nothing but the last moment lost whatever happens to process or disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.config import UserError, WorldConfig
from engine.data.film import Film
from engine.data.find import find_recordings
from engine.data.recording import ACTIONS, FRAMES, HEADER, Recorder, Recording

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("left", "right", "run", "jump")
WORLD = WorldConfig(name="test", keys={name: [name.upper()] for name in NAMES})  # 96 x 128 at 17.5 fps


def numbered(number: int) -> np.ndarray:
    """A noisy frame with its number as 16 black or white blocks, legible after lossy compression."""
    frame = np.random.default_rng(number).integers(90, 110, (96, 128, 3), np.uint8)
    for bit in range(16):
        top, left = divmod(bit, 8)
        frame[top * 16 : top * 16 + 16, left * 16 : left * 16 + 16] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    blocks = frame[:32].reshape(2, 16, 8, 16, 3).mean((1, 3, 4)).ravel()
    return sum(1 << bit for bit, value in enumerate(blocks) if value > 127)


def action_of(number: int) -> np.ndarray:
    return np.array([number >> bit & 1 for bit in range(4)], np.float32)


def write(directory: Path, count: int, episode: int = 50, **options) -> list[np.ndarray]:
    frames = [numbered(i) for i in range(count)]
    with Recorder(directory, WORLD, "true", 7, **options) as recorder:
        for i, frame in enumerate(frames):
            recorder.add(frame, action_of(i), reset=i % episode == 0, state={"x": i}, rng=i, t_ns=i * 1000)
    return frames


def check_alignment(recording: Recording) -> None:
    frames = recording.frames()
    assert [number_of(frame) for frame in frames] == list(range(len(recording)))
    for i, action in enumerate(recording.actions):
        np.testing.assert_array_equal(action, action_of(i))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "r"
    write(directory, 120)
    return directory


def test_round_trip(whole):
    recording = Recording(whole)
    assert len(recording) == 120 and recording.names == NAMES and recording.fps == 17.5
    assert recording.header["source"] == "true" and recording.header["seed"] == 7
    assert recording.header["config"]["name"] == "test" and recording.header["keymap"]["run"] == ["RUN"]
    assert recording.episodes() == [(0, 50), (50, 100), (100, 120)]
    assert recording.states[3] == {"x": 3} and recording.times.tolist() == [i * 1000 for i in range(120)]
    check_alignment(recording)
    frames = recording.frames()
    wanted = np.stack([numbered(i) for i in range(120)])
    error = np.square(frames.astype(np.float32) - wanted).mean()
    assert 10 * np.log10(255**2 / error) > 40


@pytest.mark.parametrize("start,stop", [(1, 5), (17, 19), (18, 60), (50, 50), (119, None), (-3, None)])
def test_any_stretch_is_the_same(whole, start, stop):
    recording = Recording(whole)
    np.testing.assert_array_equal(recording.frames(start, stop), recording.frames()[start:stop])


def test_pick_yields_the_numbers_asked_for(whole):
    picked = Recording(whole).pick([0, 3, 4, 77, 119])
    assert [number_of(frame) for frame in picked] == [0, 3, 4, 77, 119]


def test_lossless_is_exact_and_bytes_repeat(tmp_path):
    frames = write(tmp_path / "a", 40, lossless=True)
    write(tmp_path / "b", 40, lossless=True)
    np.testing.assert_array_equal(Recording(tmp_path / "a").frames(), np.stack(frames))
    for name in (HEADER, ACTIONS, FRAMES):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_add_copies_and_checks(tmp_path):
    frame = np.zeros((96, 128, 3), np.uint8)
    with Recorder(tmp_path / "r", WORLD, "dream", 0, lossless=True, checkpoint="abc") as recorder:
        for i in range(8):
            frame[:] = i
            recorder.add(frame, action_of(0), events=[{"down": "A"}])
        with pytest.raises(ValueError, match="uint8"):
            recorder.add(frame[:32], action_of(0))
        with pytest.raises(ValueError):
            recorder.add(frame, np.zeros(3))
    recording = Recording(tmp_path / "r")
    assert recording.frames()[:, 0, 0, 0].tolist() == list(range(8)) and recorder.frames_written == 8
    assert recording.events[0] == [{"down": "A"}] and (np.diff(recording.times) > 0).all()
    with pytest.raises(UserError, match="closed"):
        recorder.add(frame, action_of(0))


def test_state_axes_and_parent_come_back(tmp_path):
    kinds, parent = {"x": "position", "angle": "angle", "fuel": "scalar"}, {"recording": "abc", "frame": 7}
    with Recorder(
        tmp_path / "r", WORLD, "dream", 0, state_kinds=kinds, parent=parent, policies={"idle": 1.0}
    ) as recorder:
        for i in range(8):
            state = {"x": i / 3, "angle": 359.5, "fuel": -1} if i else None
            recorder.add(numbered(i), action_of(i), state=state, axes={"stick": i / 7} if i % 2 else None)
        with pytest.raises(ValueError):
            recorder.add(numbered(8), action_of(8), state={"x": float("nan")})
    recording = Recording(tmp_path / "r")
    assert recording.state_kinds == kinds and recording.parent == parent and not recording.damage
    assert recording.states[0] is None and recording.states[5] == {"x": 5 / 3, "angle": 359.5, "fuel": -1}
    assert recording.axes[4] == {} and recording.axes[5] == {"stick": 5 / 7} and len(recording) == 8
    assert recording.header["policies"] == {"idle": 1.0}


def test_recordings_of_schema_1_are_still_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    header = json.loads((whole / HEADER).read_text())
    for name in ("state_kinds", "parent", "policies"):
        header.pop(name)
    (tmp_path / "r" / HEADER).write_text(json.dumps({**header, "schema": 1}))
    rows = [json.loads(row) for row in (whole / ACTIONS).read_text().splitlines()]
    for row in rows:
        del row["axes"], row["crc"]
        row["state"] = {"x": 1.0, "y": 2.0, "angle": 3.0, "health": 100.0, "ammo": 0.0}
    (tmp_path / "r" / ACTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recording = Recording(tmp_path / "r")
    check_alignment(recording)
    assert recording.axes == [{}] * 120 and recording.parent is None
    assert recording.state_kinds == {
        **dict.fromkeys(("x", "y"), "position"),
        **{"angle": "angle", "health": "scalar", "ammo": "scalar"},
    }


def child(script: str, *arguments: str) -> subprocess.Popen:
    head = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom test_recording import *\n"
    )
    command = [sys.executable, "-c", head + script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def play(directory: str, pause: float) -> None:
    """Records until it is killed; writes the time of every frame into a log beside the directory."""
    log = os.open(directory + ".log", os.O_WRONLY | os.O_CREAT)
    frames = [numbered(i) for i in range(32)]
    recorder = Recorder(directory, WORLD, "dream", 0)
    for i in range(100_000):
        recorder.add(frames[i % 32], action_of(i % 32), reset=i == 0)
        os.write(log, b"%d\n" % time.monotonic_ns())
        time.sleep(pause)


# Forks its players, so that the imports are paid for once; tells their process ids.
PLAYERS = """
for directory in sys.argv[2:]:
    if (pid := os.fork()) == 0:
        play(directory, float(sys.argv[1]))
    print(pid, flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def kill_after(moments: list[float], pause: float, root: Path) -> list[tuple[Recording, list[int]]]:
    """Kills a player at each moment (seconds after its first frame) → recordings, times of all frames."""
    places = [root / f"{pause:.3f}-{moment}" for moment in moments]
    players = child(PLAYERS, str(pause), *map(str, places))
    pids = [int(players.stdout.readline()) for _ in places]
    logs = [Path(f"{place}.log") for place in places]
    waiting = set(range(len(places)))
    while waiting:
        for i in sorted(waiting):
            first = logs[i].read_text().split("\n")[:-1] if logs[i].exists() else []
            if first and time.monotonic_ns() >= int(first[0]) + moments[i] * 1e9:
                os.kill(pids[i], signal.SIGKILL)
                waiting.remove(i)
        time.sleep(0.005)
    assert players.communicate()[1] == b""
    times = [[int(row) for row in log.read_text().split("\n")[:-1]] for log in logs]
    return [(Recording(place), when) for place, when in zip(places, times, strict=True)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    "moments,pause",
    [([0.0, 0.2, 0.35, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5], 1 / WORLD.fps), ([0.3, 0.6], 0.0)],
    ids=["in play", "at full speed"],
)
def test_kill_9_loses_less_than_a_second(tmp_path, moments, pause):
    for recording, when in kill_after(moments, pause, tmp_path):
        lost = when[len(recording) :]
        print(f"killed after {len(when)} frames: {len(recording)} readable")
        assert not lost or lost[-1] - lost[0] < 1e9, f"{len(lost)} of {len(when)} frames lost"
        assert len(recording) or len(when) < 16  # 8 in the queue, 1 being encoded, a cluster of 250 ms
        assert [number_of(frame) for frame in recording.frames()] == [i % 32 for i in range(len(recording))]
        for i, action in enumerate(recording.actions):
            np.testing.assert_array_equal(action, action_of(i % 32))


def test_every_truncation_of_the_video_stays_readable(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    original, video = Recording(whole).frames(), (whole / FRAMES).read_bytes()
    lengths = []
    for size in np.linspace(len(video) * 0.2, len(video) - 1, 10).astype(int):
        (tmp_path / "r" / FRAMES).write_bytes(video[:size])
        recording = Recording(tmp_path / "r")
        np.testing.assert_array_equal(recording.frames(), original[: len(recording)])
        np.testing.assert_array_equal(recording.frames(15), original[15 : len(recording)])
        lengths.append(len(recording))
    assert lengths == sorted(lengths) and lengths[0] >= 12 and lengths[-1] >= 115


def zeroed(video: bytes) -> bytes:
    at = int(len(video) * 0.3)
    return video[:at] + bytes(65536) + video[at + 65536 :]


def cut_out(video: bytes) -> bytes:
    at = int(len(video) * 0.3)
    return video[:at] + video[at + 30_000 :]


def halved(video: bytes) -> bytes:
    return video[: len(video) // 2]


def flipped(at: float) -> Callable[[bytes], bytes]:
    def flip(video: bytes) -> bytes:
        changed = bytearray(video)
        changed[int(len(video) * at)] ^= 16
        return bytes(changed)

    return flip


@pytest.mark.parametrize("harm", [zeroed, cut_out, halved, *map(flipped, (0.2, 0.35, 0.5, 0.65, 0.8))])
def test_damage_is_told_and_never_seen(whole, tmp_path, harm, caplog):
    shutil.copytree(whole, tmp_path / "r")
    (tmp_path / "r" / FRAMES).write_bytes(harm((whole / FRAMES).read_bytes()))
    recording = Recording(tmp_path / "r")
    lost = 120 - len(recording)
    assert 10 < len(recording) < 120
    assert f"{lost} of 120 frames, from frame {len(recording)} on" in recording.damage
    assert recording.damage in caplog.text
    np.testing.assert_array_equal(recording.frames(), Recording(whole).frames(0, len(recording)))


def test_a_whole_recording_tells_no_damage(whole, caplog):
    assert Recording(whole).damage == "" and not caplog.text


def test_a_cut_last_line_is_left_out(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    lines = (whole / ACTIONS).read_bytes()
    (tmp_path / "r" / ACTIONS).write_bytes(lines[:-9])
    assert len(Recording(tmp_path / "r")) == 119
    check_alignment(Recording(tmp_path / "r"))


def header(**changes) -> bytes:
    right = {"schema": 2, "names": list(NAMES), "fps": 17.5, "height": 96, "width": 128}
    return json.dumps(right | changes).encode()


def line(**changes) -> bytes:
    right = {"frame": 0, "t_ns": 0, "keys": [], "events": [], "reset": True}
    return json.dumps(right | changes).encode() + b"\n"


WRONG_HEADERS = [
    *({"fps": fps} for fps in ("x", 0, -1, 1e9, None, True)),
    *({"names": names} for names in (5, [1], ["a", "a"], None)),
    *({"height": height} for height in (10**9, 0, 96.0, "96")),
    {"width": -128},
    *({"source": source} for source in (3, "Dream", "network", ["dream"])),
    {"precision": "int3"},
    {"precision": 16},
    {"state_kinds": {"x": "colour"}},
    {"parent": "abc"},
    {"config": []},
    {"keymap": {"forward": 5}},
    {"keymap": {"forward": [5]}},
    {"seed": "x"},
    {"seed": True},
    {"policies": {"idle": "x"}},
    {"names": [str(number) for number in range(5000)]},
    {"fps": 1e-9},
    {"state_kinds": {"x": ["position"]}},
]
WRONG_CONFIGS = [
    {"keys": 5},
    {"keys": {"forward": "W"}},
    {"fps": "x"},
    {"height": 10**9},
    {"tics": 0},
    {"name": 5},
]
WRONG_LINES = [
    *({"t_ns": time} for time in ("x", 1.5, 2**70, None)),
    *({"keys": keys} for keys in ("left", [1], None)),
    {"reset": 1},
    {"events": {}},
    {"frame": 1},
    {"rng": "x"},
    {"state": [1]},
    {"state": {"x": "1"}},
    {"axes": {"stick": None}},
    {"axes": {"stick": 1e300}},
    {"state": {"x": 1e300}},
    {"state": {"x": 10**40}},
    {"events": [{"reset": 5}]},
    {"events": [{"reset": {"seed": "x"}}]},
    {"events": [{"reset": {"seed": 1.5}}]},
    {"events": [{"reset": {"start": 5}}]},
]


@pytest.mark.parametrize(
    "name,content,said",
    [
        (HEADER, None, "not a recording"),
        (HEADER, b"{", "not JSON"),
        (HEADER, b'{"a": 1}', "not written by Rollplay"),
        *((HEADER, header(schema=schema), "has schema") for schema in (99, 0, -1, "2", None, True, 1.5, [2])),
        *((HEADER, header(config=wrong), "in its config world") for wrong in WRONG_CONFIGS),
        (HEADER, header(height=64, width=96), "has pictures of 128x96, but its recording tells of 96x64"),
        (HEADER, header().replace(b"17.5", b"1e999"), "its fps cannot be"),
        *((HEADER, header(**wrong), f"its {next(iter(wrong))} cannot be") for wrong in WRONG_HEADERS),
        *((ACTIONS, line(**wrong), "damaged at line 1") for wrong in WRONG_LINES),
        (ACTIONS, line(keys=["fly"]), "the key 'fly'"),
        (ACTIONS, line(state={"x": float("nan")}), "damaged at line 1"),
        (ACTIONS, b'{"frame": 0}\n', "line 1"),
        (ACTIONS, b"[]\nx\n", "line 1"),
        (FRAMES, b"nothing of the kind", "cannot be read"),
        (FRAMES, None, "cannot be read"),
    ],
)
def test_foreign_and_broken_directories(whole, tmp_path, name, content, said):
    shutil.copytree(whole, tmp_path / "r")
    (tmp_path / "r" / name).unlink()
    if content is not None:
        (tmp_path / "r" / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        Recording(tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_seeds_of_any_size_are_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    for seed in (-3, 2**70):
        (tmp_path / "r" / HEADER).write_bytes(header(seed=seed))
        (tmp_path / "r" / ACTIONS).write_bytes(line(events=[{"reset": {"seed": seed, "start": "a"}}, "W"]))
        recording = Recording(tmp_path / "r")
        assert recording.header["seed"] == recording.events[0][0]["reset"]["seed"] == seed


def test_never_overwrites(whole):
    with pytest.raises(UserError, match="already holds"):
        Recorder(whole, WORLD, "true", 0)
    assert len(Recording(whole)) == 120


def test_of_two_that_begin_at_once_one_alone_gets_the_files(whole, tmp_path, monkeypatch):
    """Both have found the place free, and the other was first: what is there stays as it is."""
    video = tmp_path / "seen.mp4"
    video.write_bytes(b"the other's")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "lexists", lambda path: False)
        with pytest.raises(UserError, match="File exists"):
            Recorder(whole, WORLD, "true", 0)
        with pytest.raises(UserError, match="is there already"):
            Film(video, 96, 128, 20.0)
    assert len(Recording(whole)) == 120 and video.read_bytes() == b"the other's"


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes").write_text("mine")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.data.recording.VideoWriter", full)
        for place in ("own", "a/b"):
            with pytest.raises(UserError, match="No space left"):
                Recorder(tmp_path / place, WORLD, "true", 0)
    with pytest.raises(UserError, match="Cannot record into"):
        Recorder(tmp_path / "a" / "b" / ("x" * 300), WORLD, "true", 0)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "own", tmp_path / "own" / "notes"]
    write(tmp_path / "own", 3)
    assert len(Recording(tmp_path / "own")) == 3


def test_no_permission(tmp_path):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file", tmp_path / "file" / "r"]
    if sys.platform == "linux":
        places.append(Path("/proc/rollplay"))  # denied even to root
    if os.name == "posix" and os.geteuid():
        (tmp_path / "shut").mkdir(mode=0o500)
        places += [tmp_path / "shut", tmp_path / "shut" / "r"]
    for place in places:
        with pytest.raises(UserError, match="Cannot record into"):
            Recorder(place, WORLD, "true", 0)


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    write(sys.argv[1], 150)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_told_once_and_the_rest_is_readable(tmp_path, whole):
    for size in (150_000, (whole / FRAMES).stat().st_size):  # in the middle; and in the last moment
        directory = tmp_path / str(size)
        said, errors = child(FULL, str(directory), str(size)).communicate()
        assert not errors and b"stopped after" in said and said.count(b"\n") == 1, (said, errors)
        recording = Recording(directory)
        assert len(recording) > 5
        check_alignment(recording)


def test_a_slow_disk_holds_up_the_caller_and_drops_nothing(tmp_path, monkeypatch):
    real = Recorder.write

    def slow(self, frame, line):
        time.sleep(0.01)
        real(self, frame, line)

    monkeypatch.setattr(Recorder, "write", slow)
    with Recorder(tmp_path / "r", WORLD, "true", 0) as recorder:
        assert not recorder.slow
        for i in range(60):
            recorder.add(numbered(i), action_of(i), reset=i == 0)
        assert recorder.slow
    assert len(Recording(tmp_path / "r")) == 60
    check_alignment(Recording(tmp_path / "r"))


@pytest.mark.slow
def test_recording_costs_less_than_3_percent_of_a_step(tmp_path):
    frames, spent = [numbered(i) for i in range(60)], []
    with Recorder(tmp_path / "r", WORLD, "true", 0) as recorder:
        for frame in frames:
            begin = time.perf_counter()
            recorder.add(frame, action_of(5))
            spent.append(time.perf_counter() - begin)
            while recorder.frames_written < len(spent):
                time.sleep(0.001)
        cpu = time.process_time()
        for frame in frames:
            recorder.add(frame, action_of(5))
    cpu = (time.process_time() - cpu) / len(frames)
    print(f"add {np.median(spent) * 1e6:.0f} us, with the writer thread {cpu * 1e6:.0f} us of CPU per frame")
    assert np.median(spent) < 0.03 * 0.057 and cpu < 0.03 * 0.057


def test_find_recordings(tmp_path):
    with pytest.raises(UserError, match="stage=collect"):
        find_recordings(tmp_path)
    for name in ("b", "a", "c.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / HEADER).write_text(json.dumps({}))
    assert find_recordings(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_links_to_recordings_are_followed(tmp_path):
    """To one, to a folder of some, twice to the same one, and back to the folder itself."""
    data = tmp_path / "data"
    for name in ("data/own", "elsewhere/one", "elsewhere/two", "far/three"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / HEADER).write_text("{}")
    (data / "link").symlink_to(tmp_path / "far" / "three")
    (data / "more").symlink_to(tmp_path / "elsewhere")
    (data / "same").symlink_to(data / "link")
    (data / "back").symlink_to(data)
    assert find_recordings(data) == [data / name for name in ("link", "more/one", "more/two", "own")]
    (tmp_path / "all").symlink_to(data)
    assert len(find_recordings(tmp_path / "all")) == 4
