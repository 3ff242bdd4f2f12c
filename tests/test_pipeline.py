"""stage=all: the plan, its minutes, resuming as a whole; the stages themselves are of two weights."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import WorldConfig
from engine.data.recording import Recorder
from engine.model.checkpoint import Checkpoint, save_checkpoint
from engine.programs import train
from engine.stage_config import TRAINED
from engine.train import loop, pipeline

PLAIN = ("stage=all", "preset=toy", "device=cpu", "precision=fp32", "frames=5", "log_every=1")


class Line(nn.Module):
    """Two weights, drawn to zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch: torch.Tensor, turn: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (self.weight * batch).square().mean(), {}


class LineStage:
    """A stage as the loop sees it; `stops`: at which step of which one a signal comes."""

    trains = True
    stops: dict[str, int] = {}

    def __init__(self, config, device, dtype, rank=0, ranks=1):
        self.config, self.module = config, Line()

    def batch(self, step: int) -> torch.Tensor:
        if LineStage.stops.get(self.config.stage) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.ones(3, 2)

    def validate(self, module: Line) -> dict[str, float]:
        return {"weight": module.weight.sum().item()}

    def picture(self, module: Line) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)

    def save(self, path: Path, module: Line, about: dict) -> None:
        save_checkpoint(path, {"line": module}, self.config.model, self.config.world, **about)

    def resume_state(self) -> list:
        """Empty: nothing beside the weights."""
        return []

    def load_resume_state(self, saved: list) -> None:
        """Nothing to load."""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """train.main with these options → exit code, its figures if there are any, lines of the plan, stderr."""

    def collect(config) -> dict:
        world = WorldConfig("hall", height=32, width=32, keys={"go": ["W"]})
        if not (tmp_path / "data" / "r0").exists():
            with Recorder(tmp_path / "data" / "r0", world, "true", 0) as recorder:
                for i in range(config.frames):
                    recorder.add(np.zeros((32, 32, 3), np.uint8), [0], reset=i == 0, t_ns=i)
        return {"frames": config.frames}

    monkeypatch.setattr(pipeline, "collect", collect)
    monkeypatch.setattr(loop, "make_stage", LineStage)
    monkeypatch.setattr(LineStage, "stops", {})

    def call(*more: str) -> tuple[int, dict, list[str], str]:
        given = [*PLAIN, f"data={tmp_path}/data", f"out={tmp_path}/out", *more]
        code = train.main(list({text.split("=")[0]: text for text in given}.values()))
        out, err = capsys.readouterr()
        *plan, last = out.splitlines() if code == 0 else [*out.splitlines(), "{}"]
        return code, json.loads(last), plan, err

    return call


def test_all_stages_are_trained_in_their_order(run, tmp_path):
    code, figures, plan, _ = run("steps=4")
    assert code == 0 and figures["stage"] == "all"
    assert [line.split()[0] for line in plan[1:]] == ["collect", *TRAINED, "together"]
    assert plan[1].split()[1:] == ["5", "frames"] and plan[-1].split()[1] == "2.5", "the preset's minutes"
    assert figures["checkpoint"] == str(tmp_path / "out" / f"{list(TRAINED)[-1]}.safetensors")
    assert list(figures["minutes"]) == ["collect", *TRAINED]
    for name in TRAINED:
        assert figures[name]["steps"] == 4 and "weight" in figures[name]["scores"]
        checkpoint = Checkpoint(tmp_path / "out" / f"{name}.safetensors")
        made_from = checkpoint.about["origin"]["made_from"]
        digests = {of: Checkpoint(tmp_path / "out" / f"{of}.safetensors").digest() for of in made_from}
        assert made_from == digests and set(made_from) == set(TRAINED[name].reads)


def test_the_same_command_finds_all_finished(run, tmp_path):
    first = run("steps=3")[1]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    code, figures, _, err = run("steps=3")
    assert code == 0 and figures["checkpoint"] == first["checkpoint"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")} == before
    assert len(before) == len(TRAINED)


def test_a_stopped_one_goes_on_where_it_was(run, tmp_path):
    first, second, third = list(TRAINED)[:3]
    LineStage.stops[second] = 2
    code, _, _, err = run("steps=6")
    assert code == 143 and "saved at step 3" in err
    done = (tmp_path / "out" / f"{first}.safetensors").stat().st_mtime_ns
    assert not (tmp_path / "out" / f"{third}.safetensors").exists()
    LineStage.stops.clear()
    code, figures, _, _ = run("steps=6")
    assert code == 0 and figures[second]["steps"] == 6
    assert (tmp_path / "out" / f"{first}.safetensors").stat().st_mtime_ns == done
    lines = [json.loads(x) for x in (tmp_path / "out" / f"{second}.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "rate" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_minutes_are_shared_out_as_the_preset_says(run, tmp_path):
    *names, left_out, last = TRAINED
    minutes = {name: number + 1.0 for number, name in enumerate([*names, last])}
    total = 0.02 * sum(minutes.values())
    options = [f"max_minutes={total}", *(f"stages.{name}.max_minutes={x}" for name, x in minutes.items())]
    options += [f"stages.{left_out}.max_minutes=0"]
    code, figures, plan, _ = run(*options)
    assert code == 0
    told = {line.split()[0]: float(line.split()[1]) for line in plan[1:]}
    wanted = {"collect": 5, **{name: 0.02 * x for name, x in minutes.items()}, "together": total}
    assert told == pytest.approx(wanted, rel=1e-3), "a stage without minutes is left out"
    assert left_out not in figures and not (tmp_path / "out" / f"{left_out}.safetensors").exists()
    given = json.loads((tmp_path / "out" / "all.json").read_text())["given"]
    assert given.keys() == minutes.keys() and all(x >= 0.01 for x in given.values())
    assert figures["minutes"].keys() == {"collect", *minutes}
    again = run(*options)[1]
    assert [again[name]["steps"] for name in given] == [figures[name]["steps"] for name in given]


def test_a_stage_that_changed_is_told_and_not_mixed_in(run):
    run("steps=3")
    assert run("stage=autoencoder", "steps=5")[0] == 0
    code, _, _, err = run("steps=3")
    assert code == 2 and "autoencoder is another" in err and "again=true" in err
    code, figures, _, _ = run("steps=3", "again=true")
    assert code == 0 and figures["autoencoder"]["steps"] == 5 and figures[list(TRAINED)[-1]]["steps"] == 3
    assert run("steps=3")[0] == 0


def test_one_s_own_recordings_alone(run, tmp_path, monkeypatch):
    run("stage=all", "steps=1")
    monkeypatch.setattr(pipeline, "collect", None)  # would fail
    assert run("frames=0", "steps=1", f"out={tmp_path}/other")[0] == 0


@pytest.mark.parametrize("content", ["", "[]", '{"given": {"motion": "x"}, "spent": {}}'])
def test_a_damaged_plan_is_told(run, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "all.json").write_text(content)
    code, _, _, err = run("steps=1")
    assert code == 2 and "all.json is damaged" in err


def test_a_preset_without_minutes_is_told(run):
    code, _, _, err = run(*(f"stages.{name}.max_minutes=0" for name in TRAINED))
    assert code == 2 and "nothing to train" in err
