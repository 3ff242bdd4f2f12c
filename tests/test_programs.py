"""How programs end when the system fails them: one sentence, exit code 2, files whole or as they were."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.picture import load_picture, save_picture
from engine.errors import UserError, run_program
from engine.files import write_whole
from engine.programs import play

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "play.py": ["play.py", "--help"],
    "train.py": ["train.py", "--help"],
    "benchmark": ["-m", "engine.kernels.benchmark", "--help"],
    "compare": ["-m", "engine.evaluation.compare", "{tmp}/figures.json", "{tmp}/figures.json"],
}


def run(command: list[str], tmp_path: Path, **how) -> subprocess.CompletedProcess:
    (tmp_path / "figures.json").write_text('{"psnr_1": 20.5}')
    command = [sys.executable, *(part.format(tmp=tmp_path) for part in command)]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **how)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name, unbuffered", [*((name, "") for name in PROGRAMS), ("compare", "1")])
def test_an_output_that_is_full_or_gone(name, unbuffered, tmp_path):
    how = {"env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
    with open("/dev/full", "w") as full:
        full = run(PROGRAMS[name], tmp_path, stdout=full, **how)
    read, write = os.pipe()
    os.close(read)  # as after `| head -1`
    gone = run(PROGRAMS[name], tmp_path, stdout=write, **how)
    os.close(write)
    for done, word in ((full, "No space left"), (gone, "Broken pipe")):
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"{name}: ") and word in done.stderr


def test_an_output_that_was_never_there(tmp_path):
    """What is written goes into nothing, not into the file that is opened next."""
    code = "import os, sys; from engine.errors import run_program; os.close(1); sys.stdout = None\n"
    code += "def work():\n    file = open(sys.argv[1], 'w'); print('words'); os.write(1, b'more')\n"
    code += "    file.close(); return 0\n"
    code += "sys.exit(run_program('x', work))"
    assert run(["-c", code, str(tmp_path / "made")], tmp_path).returncode == 0
    assert (tmp_path / "made").read_text() == ""


@pytest.mark.parametrize(
    "command, word",
    [
        (["-m", "engine.evaluation.compare", "{tmp}/none.json", "{tmp}/figures.json"], "none.json"),
        (["-m", "engine.evaluation.compare", "{tmp}", "{tmp}/figures.json"], "directory"),
        (["-m", "engine.evaluation.compare", "{tmp}/figures.json"], "two files"),
        (["-m", "engine.evaluation.table", "{tmp}", "{tmp}/none.md"], "none.md"),
        (["-m", "engine.kernels.benchmark", "--table", "{tmp}/none.json"], "none.json"),
        (["-m", "engine.kernels.benchmark", "--table", "{tmp}/figures.json"], "bench.json"),
        (
            ["-m", "engine.kernels.benchmark", "--device", "cpu", "--out", "{tmp}/figures.json/out"],
            "figures.json",
        ),
    ],
)
def test_other_programs(command, word, tmp_path):
    done = run(command, tmp_path, stdout=subprocess.PIPE)
    assert done.returncode == 2 and not done.stdout and word in done.stderr.lower()
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "text, word",
    [("{", "not JSON"), ("[1]", "no figures"), ('{"psnr_1": "x"}', "psnr_1"), ("[" * 100_000, "not JSON")],
)
def test_files_that_hold_no_figures(text, word, tmp_path):
    from engine.evaluation.compare import read

    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(UserError, match=word):
        read(tmp_path / "figures.json")


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("Wrong; do this."), "x: Wrong; do this."),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "x: a/b: Read-only file system;"),
        (
            OSError("Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: [Errno 28] Full"),
            "x: [Errno 28] Full;",
        ),
        (
            UserError("Caught UserError in DataLoader worker.\nTraceback\nengine.errors.UserError: Wrong."),
            "x: Wrong.",
        ),
    ],
)
def test_errors_are_one_line(error, said, capsys):
    def work() -> int:
        raise error

    assert run_program("x", work) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(said) and len(err.splitlines()) == 1


def half_written(monkeypatch) -> None:
    """From now on the disk is full after 20 bytes."""
    whole = Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        whole(path, content[:20])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_game_that_is_stopped_tells_by_what(number, monkeypatch, capsys):
    before = {each: signal.getsignal(each) for each in (*play.ENDING, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", ["play.py", "display=headless"])
    monkeypatch.setattr(play, "play_headless", lambda config: os.kill(os.getpid(), number))
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert play.program() == 128 + number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "stopped" in capsys.readouterr().err


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    save_picture(tmp_path / "new" / "p.png", picture)
    np.testing.assert_array_equal(load_picture(tmp_path / "new" / "p.png"), picture)
    write_whole(tmp_path / "text", "words")
    half_written(monkeypatch)
    for path, write in (
        (tmp_path / "new" / "p.png", lambda path: save_picture(path, picture)),
        (tmp_path / "text", lambda path: write_whole(path, 100 * "other words")),
    ):
        before = path.read_bytes()
        with pytest.raises(
            UserError, match="could not be written .No space left on device.; free some space"
        ):
            write(path)
        assert path.read_bytes() == before
        with pytest.raises(UserError):
            write(path.with_name("other"))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["p.png", "text"]
