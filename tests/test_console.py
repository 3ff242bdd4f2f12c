"""Programs in a terminal of another encoding: what they say is never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NARROW = {"PYTHONIOENCODING": "ascii"}
PLAIN_C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def run(encoding: dict[str, str], *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    environment = {**inherited, "PYTHONPATH": str(ROOT), **encoding}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True)
    assert b"Traceback" not in done.stderr, done.stderr.decode("utf-8", "replace")
    return done


@pytest.mark.parametrize("encoding", [NARROW, PLAIN_C], ids=["ascii", "C"])
def test_help_of_training(encoding: dict[str, str]) -> None:
    done = run(encoding, str(ROOT / "train.py"), "--help")
    assert done.returncode == 0 and b"laptop (overnight on 2 cores)" in done.stdout
    assert b"\\xb7" in done.stdout  # the dot between presets


def test_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"frechet": 10.5}), "utf-8")
    done = run(NARROW, "-m", "engine.evaluation.compare", "a.json", "a.json", cwd=tmp_path)
    assert done.returncode == 0 and b"Fr\\xe9chet distance | 10.5 | 10.5" in done.stdout


def test_play_with_a_name_that_cannot_be_printed(tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = [f"checkpoint={tiny_checkpoint}", "display=headless", "frames=2", "policy=idle", "device=cpu"]
    done = run(NARROW, str(ROOT / "play.py"), *options, "record=größe→", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "größe→" / "frames.mkv").stat().st_size > 100
    assert b"gr\\xf6\\xdfe\\u2192" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == 2
