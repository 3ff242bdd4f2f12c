"""The training loop around a stage of two weights: continuation, refusals, signals, pause, processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import TrainConfig, UserError, WorldConfig, load_config
from engine.data.dataset import recorded_world
from engine.data.lock import alone
from engine.data.recording import Recorder
from engine.model.checkpoint import Checkpoint, save_checkpoint
from engine.programs import train
from engine.train import loop
from engine.train.loop import Training, train_stage
from engine.train.parallel import Ranks
from engine.train.stop import Stop, Stopped

ROOT = Path(__file__).parent.parent
PLAIN = ("preset=toy", "device=cpu", "precision=fp32", "max_minutes=1000", "log_every=2")


class Line(nn.Module):
    """y = weight · x, regressed; it counts its batches, as games of one's own would be kept in a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: torch.Tensor, turn: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen += 1
        noise = 0.1 * torch.randn(len(batch))
        loss = (batch @ self.weight - batch @ torch.tensor([2.0, -1.0]) + noise).square().mean()
        return loss, {"twice": 2 * loss.detach()}


class LineStage:
    """A stage as the loop sees it."""

    trains = True

    def __init__(self, config, device, dtype, rank=0, ranks=1):
        self.config, self.module, self.rank = config, Line(), rank
        self.asked: list[int] = []

    def batch(self, step: int) -> torch.Tensor:
        self.asked.append(step)
        rng = np.random.default_rng((step, self.rank))
        return torch.from_numpy(rng.normal(size=(4, 2)).astype(np.float32))

    def validate(self, module: Line) -> dict[str, float]:
        return {"away": float((module.weight.detach() - torch.tensor([2.0, -1.0])).norm())}

    def picture(self, module: Line) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)

    def save(self, path: Path, module: Line, about: dict) -> None:
        config = self.config
        save_checkpoint(path, {"line": module}, config.model, config.world, seed=config.seed, **about)

    def resume_state(self) -> list:
        """Empty: nothing beside the weights."""
        return []

    def load_resume_state(self, saved: list) -> None:
        """Nothing to load."""


@pytest.fixture
def data(tmp_path) -> Path:
    world = WorldConfig("hall", height=32, width=32, keys={"go": ["W"]})
    for number in range(2):
        with Recorder(tmp_path / "data" / f"r{number}", world, "true", number) as recorder:
            for i in range(4):
                recorder.add(np.zeros((32, 32, 3), np.uint8), [0], reset=i == 0, t_ns=i)
    return tmp_path / "data"


@pytest.fixture
def options(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_stage", LineStage)
    return lambda *more: [
        *PLAIN,
        "stage=autoencoder",
        "steps=8",
        f"data={data}",
        f"out={tmp_path}/out",
        *more,
    ]


def config_of(options: list[str]) -> TrainConfig:
    return load_config("train", TrainConfig, options)


@pytest.fixture
def begin(options):
    def make(*more: str) -> Training:
        config = config_of(options(*more))
        Path(config.out).mkdir(exist_ok=True)
        return Training(config)

    return make


@pytest.fixture
def run(options):
    """train_stage with these options → figures."""
    return lambda *more: train_stage(config_of(options(*more)), Ranks(), Stop())


def lines(out: Path) -> list[dict]:
    """What was written of the training itself."""
    found = [json.loads(line) for line in (out / "autoencoder.jsonl").read_text().splitlines()]
    return [line for line in found if "rate" in line]


def advance(of: Training, steps: int) -> list[float]:
    return [of.iterate(of.progress())["loss"].item() for _ in range(steps)]


def test_continued_training_is_the_same_training(begin, tmp_path):
    losses = advance(begin(), 8)
    half = begin()
    first = advance(half, 5)
    half.save()
    torch.manual_seed(5)
    rest = begin()
    assert rest.step == 5 and first + advance(rest, 3) == losses and len(set(losses)) == 8
    assert rest.module.seen == 8 and rest.stage.asked == [5, 6, 7]


def test_gradients_of_several_batches_are_summed_up(begin):
    """Two batches a step are the mean of both gradients: one step of plain arithmetic."""
    one = begin("stages.autoencoder.accumulate=2", "stages.autoencoder.grad_clip=1e9")
    seen = []
    one.optimiser.step = lambda rate, finite: seen.append(one.module.weight.grad.clone())
    torch.manual_seed(3)
    figures = one.iterate(0.0)
    assert one.stage.asked == [0, 1] and one.step == 1
    torch.manual_seed(3)
    module, losses = Line(), []
    for batch in (one.stage.batch(0), one.stage.batch(1)):
        loss, _ = module(batch)
        (loss / 2).backward()
        losses.append(loss.item())
    assert torch.allclose(seen[0], module.weight.grad)
    assert figures["loss"].item() == pytest.approx(np.mean(losses))
    assert figures["twice"].item() == pytest.approx(2 * np.mean(losses))
    one.iterate(0.0)
    assert one.stage.asked[-2:] == [2, 3]


def test_gradients_that_are_not_finite_move_nothing_and_are_counted(begin, run, monkeypatch, tmp_path):
    plain = LineStage.batch

    def broken(self, step: int) -> torch.Tensor:
        return plain(self, step) * (float("nan") if step in (2, 3, 5) else 1)

    monkeypatch.setattr(LineStage, "batch", broken)
    training = begin()
    advance(training, 2)
    weight, average = training.module.weight.clone(), training.average.module.weight.clone()
    assert not torch.equal(weight, average)
    assert not training.iterate(0.0)["finite"] and training.step == 3
    assert torch.equal(training.module.weight, weight) and weight.isfinite().all()
    assert torch.equal(training.average.module.weight, average) and average.isfinite().all()
    assert run()["steps"] == 8
    told = lines(tmp_path / "out")
    assert [line["skipped"] for line in told] == [0, 2, 1, 0]
    assert "loss" not in told[1] and all(np.isfinite(line["loss"]) for line in told if line["skipped"] < 2)
    monkeypatch.setattr(LineStage, "batch", lambda self, step: plain(self, step) * float("inf"))
    with pytest.raises(UserError, match="not finite for 100 steps"):
        run("steps=1000")


def test_a_finished_stage_stays_finished(run, tmp_path, monkeypatch):
    first = run()
    assert first["steps"] == 8 and np.isfinite(first["loss"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(LineStage, "__init__", None)  # it is not even opened
    again = run()
    assert again["steps"] == 8 and again["checkpoint"] == first["checkpoint"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_picture_that_fails_costs_no_step(run, tmp_path, monkeypatch):
    """Neither in the end, nor on the way."""
    for given, step in ((["steps=8"], 8), (["steps=20", "picture_minutes=0"], 8)):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(LineStage, "picture", lambda self, module: 1 / 0)
            run(*given)
        assert torch.load(tmp_path / "out" / "autoencoder.state.pt")["step"] == step
        assert Checkpoint(tmp_path / "out" / "autoencoder.safetensors").about["steps"] == step
    figures = run("steps=20")
    assert figures["steps"] == 20 and figures["scores"]["away"] > 0


def test_steps_may_be_raised_and_lines_are_not_doubled(run, begin, tmp_path):
    run()
    training = begin("steps=20")
    advance(training, 4)  # and killed before it saved
    (tmp_path / "out" / "autoencoder.jsonl").open("a").write('{"step": 10, "loss": 1}\n{"step": 12, "lo')
    assert run("steps=20")["steps"] == 20
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(2, 21, 2))


@pytest.mark.parametrize(
    "change, word",
    [
        ("stages.autoencoder.batch=5", "stages.autoencoder.batch was 8 and is 5"),
        ("stages.autoencoder.learning_rate=1", "stages.autoencoder.learning_rate was 0.003 and is 1.0"),
        ("model.autoencoder.channels=6", "model.autoencoder.channels was 4 and is 6"),
        ("model.denoiser.correction=0.7", "model.denoiser.correction was not given and is 0.7"),
        ("world.height=64", "world.height was 96 and is 64"),
        ("seed=7", "seed was 0 and is 7"),
        ("precision=bf16", "precision was fp32 and is bf16"),
        ("weights={tmp}/w.safetensors", "weights was not there"),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(change, word, run, begin, tmp_path, capsys):
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    training = begin()
    advance(training, 3)
    training.save()
    state = (tmp_path / "out" / "autoencoder.state.pt").read_bytes()
    change = change.format(tmp=tmp_path)
    with pytest.raises(UserError) as caught:
        run(change)
    assert word in str(caught.value) and "again=true" in str(caught.value)
    assert (tmp_path / "out" / "autoencoder.state.pt").read_bytes() == state
    assert run(change, "again=true")["steps"] == 8
    assert word in capsys.readouterr().err
    # and once it is begun anew, it is gone on with
    assert begin(change, "again=true", "steps=20").step == 8


def test_a_field_that_only_a_newer_version_has_is_no_difference(run, begin, tmp_path):
    training = begin()
    advance(training, 3)
    training.save()
    file = tmp_path / "out" / "autoencoder.state.pt"
    state = torch.load(file)
    assert state["origin"]["model"]["autoencoder"].pop("depth") and state["origin"]["stage"].pop("crop")
    torch.save(state, file)
    with pytest.raises(UserError, match="model.autoencoder.channels was 4 and is 6"):
        run("model.autoencoder.channels=6")
    assert begin().step == 3


def test_what_other_stages_make_may_change(run, begin):
    """The sizes of a later stage's network are nothing to this one, unless they are given on its command
    line.
    """
    run()
    config = config_of([*PLAIN, "stage=autoencoder", "model.denoiser.layers=3"])
    assert config.model.denoiser.layers == 3
    assert begin("steps=9", "max_minutes=77", "stages.denoiser.batch=3").step == 8


def test_recordings_that_came_are_told(run, data, capsys):
    run()
    assert "came or went" not in capsys.readouterr().err
    for name in ("session.json", "actions.jsonl", "frames.mkv"):
        (data / "r2").mkdir(exist_ok=True)
        (data / "r2" / name).write_bytes((data / "r1" / name).read_bytes())
    assert run("steps=10")["steps"] == 10
    assert "came or went" in capsys.readouterr().err


def test_checkpoints_know_what_they_were_made_from(run, tmp_path):
    run()
    out = tmp_path / "out"
    first = Checkpoint(out / "autoencoder.safetensors")
    assert first.about["stage"] == "autoencoder" and first.about["origin"]["made_from"] == {}
    assert first.about["origin"]["stage"]["batch"] == 8 and len(first.about["origin"]["data"]) == 16
    run("stage=state")
    made = Checkpoint(out / "state.safetensors").about["origin"]["made_from"]
    assert made == {"autoencoder": first.digest()}


@pytest.mark.slow
def test_nothing_mixed_comes_of_a_stage_that_changed(run, tmp_path, capsys):
    for stage in ("autoencoder", "state", "denoiser"):
        run(f"stage={stage}")
    run("stage=autoencoder", "steps=10")
    with pytest.raises(UserError, match="autoencoder is another"):
        run("stage=state")
    for stage in ("denoiser", "distill"):  # the one after it is made from what no longer belongs together
        with pytest.raises(
            UserError, match="state.safetensors was made from another autoencoder.safetensors"
        ):
            run(f"stage={stage}")
    assert run("stage=state", "again=true")["steps"] == 8
    with pytest.raises(UserError, match="state is another"):
        run("stage=denoiser")
    assert run("stage=denoiser", "again=true")["steps"] == 8
    before = (tmp_path / "out" / "denoiser.safetensors").read_bytes()
    assert run("stage=denoiser", "again=true")["steps"] == 8, "what fits is not trained again"
    assert (tmp_path / "out" / "denoiser.safetensors").read_bytes() == before
    assert run("stage=distill")["steps"] == 8


def test_precision_is_decided_once(begin, monkeypatch):
    chosen = iter(["bf16"])
    monkeypatch.setattr(loop, "pick_precision", lambda name, device: next(chosen))
    first = begin("precision=auto")
    assert first.dtype is torch.bfloat16
    first.save()
    again = begin("precision=auto")
    assert again.dtype is torch.bfloat16 and again.precision == "bf16"


@pytest.mark.parametrize("option", ["threads=-1", "workers=-1", "frames=-1"])
def test_what_cannot_be_negative_is_refused(option, capsys):
    assert train.main([option]) == 2
    out, err = capsys.readouterr()
    assert not out and f"{option.split('=')[0]} must be at least 0" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_so(number, options, tmp_path, capsys, monkeypatch):
    plain = LineStage.batch

    def batch(self, step: int) -> torch.Tensor:
        if step == 5:
            os.kill(os.getpid(), number)
        return plain(self, step)

    monkeypatch.setattr(LineStage, "batch", batch)
    before = signal.getsignal(number)
    assert train.main(options("steps=1000")) == 128 + number
    out, err = capsys.readouterr()
    assert not out and "saved at step 6" in err and "Traceback" not in err
    assert torch.load(tmp_path / "out" / "autoencoder.state.pt")["step"] == 6
    assert Checkpoint(tmp_path / "out" / "autoencoder.safetensors").about["steps"] == 6
    assert signal.getsignal(number) == before


def test_a_closed_pipe_saves_as_a_signal_does(options, tmp_path, monkeypatch):
    """As in `train.py 2>&1 | head`: nobody can be told, but nothing is lost."""
    read, write = os.pipe()
    plain = LineStage.batch

    def batch(self, step: int) -> torch.Tensor:
        if step == 5:
            os.close(read)
        return plain(self, step)

    monkeypatch.setattr(LineStage, "batch", batch)
    with open(write, "w", buffering=1) as pipe, contextlib.suppress(BrokenPipeError):
        monkeypatch.setattr(sys, "stderr", pipe)
        assert train.main(options("steps=1000", "log_every=1")) == 128 + signal.SIGPIPE
    assert torch.load(tmp_path / "out" / "autoencoder.state.pt")["step"] == 6
    assert Checkpoint(tmp_path / "out" / "autoencoder.safetensors").about["steps"] == 6


def test_a_signal_before_the_first_step_says_that_nothing_is_saved(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "make_stage", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(options()) == 143
    assert "nothing was saved yet" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_second_signal_ends_it_at_once():
    stop = Stop()
    with stop.listening():
        with stop.gently():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(Stopped) as caught:
                os.kill(os.getpid(), signal.SIGINT)
            assert caught.value.code == 130


def test_under_nohup_it_goes_on_when_the_terminal_goes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.listening(), stop.gently():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_waits_while_a_pause_file_is_there(run, tmp_path, capsys, monkeypatch):
    pause, steps, plain = tmp_path / "out" / "pause", [], LineStage.batch
    lifted = threading.Event()

    def batch(self, step: int) -> torch.Tensor:
        steps.append((step, lifted.is_set()))
        if step == 3:
            pause.touch()
            threading.Timer(0.5, lambda: (lifted.set(), pause.unlink())).start()
        return plain(self, step)

    monkeypatch.setattr(LineStage, "batch", batch)
    assert run()["steps"] == 8
    assert steps == [(step, step > 3) for step in range(8)]
    assert capsys.readouterr().err.count("Paused") == 1
    assert torch.load(tmp_path / "out" / "autoencoder.state.pt")["seconds"] < 0.5, "waiting is no training"


def test_a_paused_training_can_be_stopped(options, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pause").touch()
    monkeypatch.setattr(loop, "say_paused", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(options()) == 143
    assert "saved at step 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, error, word",
    [
        ("out={tmp}/" + 300 * "x", None, "name too long"),
        ("out={tmp}/file/out", None, "file"),
        (None, OSError(28, "No space left on device", "metrics"), "No space left"),
        (None, OSError(30, "Read-only file system", "metrics"), "Read-only"),
        (None, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "too little memory"),
        (None, torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
        (None, MemoryError(), "too little memory"),
    ],
)
def test_every_error_of_the_system_is_a_sentence(option, error, word, options, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    if error:

        def fail(self, step: int):
            raise error

        monkeypatch.setattr(LineStage, "batch", fail)
    given = options(option.format(tmp=tmp_path)) if option else options()
    assert train.main(given) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert not out and len(said) == 1 and word.lower() in said[0].lower() and "Traceback" not in err


@pytest.mark.parametrize(
    "option, word",
    [
        ("stages.autoencoder.batch=0", "at least 1"),
        ("stages.autoencoder.accumulate=0", "at least 1"),
        ("stages.autoencoder.max_minutes=-1", "stages.autoencoder.max_minutes must be at least 0"),
        ("max_minutes=-3", "max_minutes must be at least 0"),
        ("steps=-1", "steps must be at least 0"),
    ],
)
def test_numbers_that_train_nothing_are_refused(option, word, options, capsys):
    assert train.main(options(option)) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 2**63, 2**80, -1, 1_795_000_000_123_456_789])
def test_any_seed_will_do(seed, begin):
    assert len(set(advance(begin(f"seed={seed}"), 3))) == 3


RANKED = """
import os, sys, signal
sys.path.insert(0, {tests!r})
import torch, test_loop
from engine.programs import train
from engine.train import loop
rank = int(os.environ["RANK"])
class Stage(test_loop.LineStage):
    def __init__(self, *given):
        super().__init__(*given)
        self.module.seen += 100 * rank  # games of its own
    def batch(self, step):
        if step == {signal} and rank == 1: os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)
loop.make_stage = Stage
sys.exit(train.main(sys.argv[1:]))
"""


def launch(tmp_path: Path, options: list[str], signal: int = -1) -> subprocess.CompletedProcess:
    """Two processes of torchrun, the second of which is signalled at batch `signal`."""
    script = tmp_path / "ranked.py"
    script.write_text(RANKED.format(tests=str(ROOT / "tests"), signal=signal))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 400}
    return subprocess.run([*command, str(script), *options], cwd=ROOT, env=environment, **pipes)


@pytest.mark.slow
def test_processes_save_at_one_step_and_go_on_as_they_were(options, tmp_path):
    """Stopped by a signal to the second one alone, and continued, against eight steps in one go."""
    given = options("stages.autoencoder.accumulate=2")
    whole = launch(tmp_path, options("stages.autoencoder.accumulate=2", f"out={tmp_path}/whole"))
    assert whole.returncode == 0, whole.stdout[-3000:]
    stopped = launch(tmp_path, given, signal=7)
    assert "saved at step 4" in stopped.stdout, stopped.stdout[-3000:]
    states = [torch.load(tmp_path / "out" / f"autoencoder.state{rank}.pt") for rank in ("", 1)]
    assert states[0]["step"] == states[1]["step"] == 4
    assert not torch.equal(states[0]["random"], states[1]["random"]) and states[1]["buffers"]["seen"] == 108
    assert launch(tmp_path, given).returncode == 0
    for rank in ("", 1):
        one, other = (
            torch.load(tmp_path / name / f"autoencoder.state{rank}.pt") for name in ("whole", "out")
        )
        assert one["step"] == other["step"] == 8 and torch.equal(one["random"], other["random"])
        part = "buffers" if rank else "module"
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())


class Pair(Ranks):
    """Two processes, the other one of which says `other` whenever they agree on something."""

    def __init__(self, *other: float):
        super().__init__()
        self.count, self.other = 2, other

    def agree(self, *values: float) -> list[float]:
        return [max(pair) for pair in zip(values, self.other, strict=True)]


def test_processes_whose_weights_have_parted_do_not_save(begin, tmp_path):
    training = begin()
    training.ranks = Pair(float("-inf"), float("-inf"))  # agrees to all
    training.save()
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    training.ranks = Pair(12345.0, -12345.0)
    with pytest.raises(UserError, match="other weights"):
        training.save()
    assert not list((tmp_path / "out").iterdir())


def test_two_trainings_in_one_folder(run, options, tmp_path, capsys):
    run("steps=4")
    state = (tmp_path / "out" / "autoencoder.state.pt").read_bytes()
    with alone(tmp_path / "out", "mine"):
        assert train.main(options()) == 2
    assert "Another training is writing into" in capsys.readouterr().err
    assert (tmp_path / "out" / "autoencoder.state.pt").read_bytes() == state
    assert run()["steps"] == 8


def test_damaged_lines_of_figures_are_left_out(run, tmp_path):
    run("steps=4", "log_every=1")
    with open(tmp_path / "out" / "autoencoder.jsonl", "ab") as file:
        file.write(b"\xff\xfe\0\n[]\n{")
    run("steps=6", "log_every=1")
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_a_killed_training_goes_on(options, tmp_path):
    """Killed while it saves after every step: what lies there is whole, and the same command goes on."""
    script = tmp_path / "endless.py"
    script.write_text(RANKED.format(tests=str(ROOT / "tests"), signal=-1))
    given = list(
        {text.split("=")[0]: text for text in options("steps=1000000", "save_minutes=1e-9")}.values()
    )
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    state = tmp_path / "out" / "autoencoder.state.pt"
    with subprocess.Popen([sys.executable, str(script), *given], env=environment, cwd=ROOT) as child:
        deadline = time.monotonic() + 100
        while not state.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        child.kill()
    reached, saved = torch.load(state)["step"], Checkpoint(tmp_path / "out" / "autoencoder.safetensors")
    saved.load_into("line", Line())
    assert reached > 0 and 0 <= saved.about["steps"] - reached <= 1, "the checkpoint is never older"
    config = config_of([*given, f"steps={reached + 2}"])
    config.world = recorded_world(config.data, config.world, config.given)
    assert train_stage(config, Ranks(), Stop())["steps"] == reached + 2
    assert not list((tmp_path / "out").glob("*.tmp")), "leftovers are gone"


def test_config_of_a_stage_is_its_own(options):
    config = config_of(options())
    assert replace(config, stage="denoiser").stage_config().batch == config.stages.denoiser.batch
    assert config.given[:2] == ["preset", "device"] and config.stage_config().steps == 8
