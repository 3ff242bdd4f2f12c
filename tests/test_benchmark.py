"""The benchmark rehearsed without a GPU: its gate, its loops at the paper's shape made small, its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.kernels import reference
from engine.kernels.benchmark import __main__ as benchmark
from engine.kernels.benchmark import cases, gate, optable, ourloop, paper, peerloop, processes, timing, tuning
from engine.kernels.benchmark.report import BEGIN, END, markdown, with_tables

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
OPS = "gate_residual_norm_modulate", "qknorm_rope_write", "window_attention"
EMPTY = torch.empty


@pytest.fixture(autouse=True)
def definitions(monkeypatch):
    """Rehearsals take the definitions; in Triton's interpreter they would take minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "engine.kernels.benchmark", "--device", "cpu", *arguments]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_runs_end_to_end(tmp_path):
    done = run_command("--budget", "30", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["gate"] == "green" and said["checked"] >= 20 and said["device"] == "CPU"
    assert said["torch"] == torch.__version__ and said["ceilings"]["tflops"] > 0
    assert {row["op"] for row in said["rows"]} == {
        "window_attention",
        "qknorm_rope_write",
        "gate_residual_norm_modulate",
    }
    assert all(row["ms"] > 0 and row["share"] > 0 for row in said["rows"])
    assert said["step"]["shipped"]["ratios"].keys() == {"graph", "eager"}
    assert "peer sdpa / ours own" in said["step"]["paper"]["ratios"]
    assert said["step"]["paper"]["difference"]["ours own"] < 1e-5
    full = json.loads((tmp_path / "bench.json").read_text())
    skipped = {row["provider"] for row in full["rows"] if "skipped" in row}
    assert {"cudnn", "varlen", "flex"} <= skipped  # rows that say why, no crash
    assert "| ours own |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("name", ["gate_residual_norm_modulate", "qknorm_rope_write", "window_attention"])
def test_a_wrong_kernel_turns_the_gate_red_and_nothing_is_timed(name, monkeypatch, tmp_path, capsys):
    def wrong(*given, **more):
        made = getattr(reference, name)(*given, **more)
        (made[0] if isinstance(made, tuple) else made)[..., -1].mul_(1.01)
        return made

    ops = SimpleNamespace(**{op: getattr(reference, op) for op in (*OPS, "qknorm_rope")})
    setattr(ops, name, wrong)
    monkeypatch.setattr(gate, "operations", lambda device: ops)
    assert benchmark.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["gate"] == "red" and said["rows"] == [] and "step" not in said
    assert all(name in failure for failure in said["failures"])
    assert '"ms"' not in (tmp_path / "bench.json").read_text()
    assert " ms " not in (tmp_path / "table.md").read_text()


def test_what_is_left_unwritten_or_not_repeated_is_wrong():
    def partly(q, *given):
        out = torch.empty_like(q)
        out[:, :-1] = reference.window_attention(q, *given)[:, :-1]
        return out

    def noisy(q, *given):
        return reference.window_attention(q, *given) * (1 + 1e-7 * torch.randint(0, 9, ()))

    for function, said in ((partly, "not finite"), (noisy, "other bits")):
        ops = SimpleNamespace(**{op: getattr(reference, op) for op in (*OPS, "qknorm_rope")})
        ops.window_attention = function
        todo = [check for check in gate.checks(ops, CPU) if check.name.startswith("window_attention")]
        found = list(processes.outcomes(todo, timing.Budget(60), lambda name: None))
        assert all(x["state"] == "wrong" and said in x["why"] for x in found)
    assert torch.empty is EMPTY and "new_empty" not in vars(torch.Tensor)  # as they were


@pytest.mark.slow
def test_checks_are_shared_out_among_processes():
    """And done there: where none could start, the gate would do all of them itself."""
    todo = list(gate.checks(reference, CPU))
    found = processes.side_by_side("gate", todo, CPU, timing.Budget(60), workers=2)
    assert [x for x in found if x["state"] != "right"] == [] and len(found) == len(todo) >= 20
    verdict = gate.run(CPU, timing.Budget(60), workers=0)
    assert verdict["gate"] == "green" and not verdict["left"] and verdict["checked"] == len(todo)


def test_a_process_that_breaks_is_a_failed_check(tmp_path):
    lines = [{"name": "a", "state": "right"}, {"name": "b", "state": "began"}]
    file = tmp_path / "0.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"name": "b", "sta')
    file.with_suffix(".log").write_text("Segmentation fault\n\n")
    states = [
        [x["state"] for x in processes.read_outcomes(file, ["a", "b", "c"], broken)]
        for broken in (True, False)
    ]
    assert states == [["right", "wrong", "wrong"], ["right", "left", "left"]]
    assert "Segmentation fault" in processes.read_outcomes(file, ["b"], True)[0]["why"]


@pytest.mark.parametrize("attention", ["triton", "sdpa"])
@pytest.mark.parametrize("kept", [21, 9])
def test_our_loop_makes_the_reference_loops_frames(attention, kept):
    """Ten steps in float32, in which the ring goes round."""
    weights = paper.Weights(replace(paper.TOY, kept=kept), torch.float32, CPU)
    peer = peerloop.PeerLoop(weights, "sdpa")
    ours = ourloop.OurLoop(weights, reference, attention)
    peer.start()
    ours.start()
    noise = weights.noise()
    for _ in range(10):
        given = next(noise)
        true, made = peer.step(given), ours.step(given)
        assert (made - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("broken", ["anchor", "ring", "time"])
def test_a_loop_that_is_wrong_is_found(broken):
    """The comparison above would notice a sink that stays behind, a ring that stands still, a wrong clock."""
    weights = paper.Weights(paper.TOY, torch.float32, CPU)
    peer, ours = peerloop.PeerLoop(weights, "sdpa"), ourloop.OurLoop(weights, reference)
    peer.start()
    ours.start()
    if broken == "anchor":
        ours.anchor *= 0.9
    elif broken == "ring":
        ours.within = ours.within * 0
    else:
        ours.time = 1.1 * ours.time
    noise = weights.noise()
    true, made = ([loop.step(next(noise)).clone() for _ in range(2)] for loop in (peer, ours))
    assert (made[1] - true[1]).norm() > 1e-4 * true[1].norm()


def test_a_step_has_as_many_operations_as_was_counted():
    shape = paper.Shape()
    assert shape.flops() / 1e12 == pytest.approx(30 * (2.34 + 4.71 + 0.94 + 0.09), rel=0.01)
    assert replace(shape, kept=6).flops() / 1e12 == pytest.approx(30 * (2.34 + 4.71 + 0.27 + 0.09), rel=0.01)


def test_sections_over_their_time_are_skipped(tmp_path, capsys):
    options = ["--device", "cpu", "--only", "ceilings,table,paper", "--budget", "0", "--out", str(tmp_path)]
    assert benchmark.main(options) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["gate"] == "not run" and said["skipped"].keys() == {"ceilings", "table", "paper"}
    rows = optable.table(CPU, timing.Budget(0), {"tflops": 1.0, "tbytes": 1.0}, lambda text: None)
    assert rows and all(row["skipped"] == "over the time of this section" for row in rows)
    assert gate.run(CPU, timing.Budget(0), 0)["gate"] == "red"  # what is unchecked is not green


def test_a_provider_that_cannot_is_a_row_that_says_why():
    def broken(number: int) -> None:
        raise RuntimeError("not on this chip\nand a long story")

    found = timing.interleaved({"good": lambda number: None, "bad": broken}, CPU, 0.01)
    assert found["good"].ms >= 0 and found["good"].samples >= 3
    assert found["bad"] == "RuntimeError: not on this chip"
    with pytest.raises(TimeoutError), timing.limit(0.05):
        time.sleep(2)


def test_ways_to_cut_the_kernel_are_of_all_shapes_that_are_timed():
    ops = SimpleNamespace(attention=pytest.importorskip("engine.kernels.attention"))
    for case in cases.ATTENTION + cases.TOY_ATTENTION:
        ways = tuning.candidates(ops, case, CPU)
        assert len(set(ways)) == len(ways) >= 2
        assert all(isinstance(way, ops.attention.Config) for way in ways)


def test_tuning_makes_a_table_of_the_fastest_that_are_right(monkeypatch, tmp_path):
    """A kernel that is wrong when it is cut into tiles of 32 keys; the device's own table is not touched."""
    attention = pytest.importorskip("engine.kernels.attention")
    tables = {path: path.read_bytes() for path in Path(attention.__file__).parent.glob("tables/*.json")}

    def kernel(*given, config=None):
        return reference.window_attention(*given) * (1.01 if config.block_n == 32 else 1)

    ops = SimpleNamespace(window_attention=kernel, attention=attention)
    monkeypatch.setattr(tuning, "operations", lambda device: ops)
    chosen = tuning.tune(CPU, timing.Budget(20), 0, tmp_path, lambda text: None)
    rules = json.loads((tmp_path / "cpu.json").read_text())["window_attention"]
    assert len(rules) == len(chosen) == 2 and [rule["page"] for rule in rules] == [13, 16]
    assert all(attention.Config(**rule["config"]).block_n == 64 for rule in rules)
    assert tables == {path: path.read_bytes() for path in tables}


def test_tuning_that_cannot_be_is_a_failure(tmp_path, capsys):
    """The definitions, which this rehearses, cannot be cut."""
    assert benchmark.main(["--tune", "--only", "tune", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "cannot be cut" in json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]["tune"]


def test_a_tuned_table_is_one_that_attention_reads(monkeypatch):
    attention = pytest.importorskip("engine.kernels.attention")
    small, large = attention.Config(64, 64, 4, 3), attention.Config(128, 128, 8, 2, 0, True)
    rules = [tuning.rule((64, 52, 169, 13), small), tuning.rule((64, 2048, 4352, 256), large)]
    table = json.loads(tuning.render({"measured": True, "window_attention": rules}))
    monkeypatch.setattr(attention, "read_table", {"made": table}.__getitem__)
    attention.pick.cache_clear()
    pick = lambda rows, keys, page: attention.pick(("made",), 64, torch.bfloat16, rows, keys, page)  # noqa: E731
    assert pick(52, 169, 13) == pick(40, 100, 64) == small
    assert pick(2048, 4352, 256) == pick(53, 169, 256) == large
    with pytest.raises(ValueError, match="no rule"):
        pick(2048, 4352, 13)  # the accelerator's tiles are larger than such a page
    attention.pick.cache_clear()


RESULT = {
    "gate": "green",
    "checked": 3,
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "ceilings": {"tflops": 790.0, "tbytes": 4.3},
    "rows": [
        {"op": "window_attention", "shape": "paper", "dtype": "bfloat16", "provider": "triton"}
        | {"ms": 9.123456, "spread": 0.1, "tflops": 516.2, "share": 0.653},
        {"op": "window_attention", "shape": "paper", "dtype": "bfloat16", "provider": "flex"}
        | {"skipped": "a | b"},
    ],
    "step": {"shipped": {"ms": {"graph": 0.4, "peer-style": 8.0}, "p99": {"graph": 0.5, "peer-style": 9.0}}},
}


def test_tables_are_made_from_files(tmp_path):
    RESULT["step"]["shipped"]["ratios"] = {"graph": 20.0}
    (tmp_path / "h200.json").write_text(json.dumps(RESULT))
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    options = ["--table", str(tmp_path / "h200.json"), "--document", str(document)]
    for _ in range(2):  # the second time changes nothing
        assert benchmark.main(options) == 0
        text = document.read_text()
        assert text.startswith(f"before\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nafter\n")
        assert "old" not in text and text.count("NVIDIA H200") == 1
    assert "| paper | triton | 9.123 | 0.1 | 516.2 | 65% |" in text
    assert "| paper | flex | – | – | – | skipped: a / b |" in text
    assert "| graph | 0.4 | 0.5 | 20.00 |" in text
    document.write_text("no place for them")
    with pytest.raises(ValueError, match="each once"):
        with_tables([tmp_path / "h200.json"], document)
    assert "not checked" in markdown({**RESULT, "gate": "not run"})


def test_the_document_has_the_figures_of_the_committed_files():
    document, files = ROOT / "docs" / "kernels.md", list((ROOT / "docs" / "bench").glob("*.json"))
    text = document.read_text("utf-8")
    assert files and with_tables(files, document) == text, "run --table docs/bench/*.json"
