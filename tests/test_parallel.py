"""What two processes agree on and tell together, with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.train.parallel import open_ranks

ROOT = Path(__file__).parent.parent
BOTH = """
import json, sys, torch
from pathlib import Path
from engine.config import TrainConfig
from engine.train.metrics import Metrics
from engine.train.parallel import open_ranks

out = Path(sys.argv[1])
with open_ranks("cpu") as ranks:
    r = ranks.rank
    said = {"local": ranks.local, "agree": ranks.agree(r, -r, 0.5), "firsts": ranks.firsts(7.0 - r)}
    said["summed"] = ranks.summed({"both": [1.0 + r, 1.0]} | ({"second": [5.0, 1.0]} if r else {}))
    said["same"] = ranks.same([torch.ones(3)]), ranks.same([torch.full((3,), 1.0 + 1e-7 * r)])
    metrics = Metrics(TrainConfig(stage="state", out=str(out), log_every=2), ranks, 8, 0)
    for step in (1, 2):
        figures = {"loss": torch.tensor(1.0 + 10 * r + step)} | ({"own": torch.tensor(3.0)} if r else {})
        metrics.add(figures | {"finite": torch.tensor(True)}, step, 60.0, 0.5)
    metrics.close()
    said["last"] = {name: value for name, value in metrics.last.items() if name != "rate"}
    (out / f"{r}.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict]:
    """What each of two processes has found, and the first one's line of figures."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "both.py").write_text(BOTH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 400}
    done = subprocess.run(
        [*command, str(folder / "both.py"), str(folder)], cwd=ROOT, env=environment, **pipes
    )
    assert done.returncode == 0, done.stdout[-3000:]
    lines = (folder / "state.jsonl").read_text().splitlines()
    return [
        *(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)),
        *map(json.loads, lines),
    ]


@pytest.mark.parametrize(
    "told", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": ""}]
)
def test_processes_that_nobody_joined_are_told(told, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start them with torchrun"), open_ranks("cpu"):
        pass


def test_processes_choose_alike(said):
    one, other, _ = said
    assert (one["local"], other["local"]) == (0, 1)
    assert one["agree"] == other["agree"] == [1, 0, 0.5], "the largest of each"
    assert one["firsts"] == other["firsts"] == [7]
    assert one["same"] == other["same"] == [True, False], "to the last bit"


def test_figures_are_those_of_all_processes(said):
    one, other, line = said
    assert one["summed"] == other["summed"] == {"both": [3, 2], "second": [5, 1]}
    assert one["last"] == other["last"] == {"loss": 7.5, "own": 3, "skipped": 0}
    assert line["step"] == 2 and line["loss"] == 7.5 and line["own"] == 3, "told once"
