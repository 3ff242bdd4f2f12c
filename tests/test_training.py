"""train.py on a small true recording: all stages, exact continuation, processes, packing, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY, TOY_STAGES, run_training
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import TrainConfig, load_config
from engine.data.dataset import split
from engine.data.picture import load_picture
from engine.data.recording import Recorder
from engine.model.checkpoint import Checkpoint, save_checkpoint
from engine.model.networks import load_autoencoder, load_denoiser, load_reader, load_states
from engine.programs import train
from engine.rollout.player import Player
from engine.rollout.session import Session
from engine.stage_config import TRAINED, DenoiserStageConfig
from engine.train.denoiser import DenoiserStage
from engine.train.loop import Training

ROOT = Path(__file__).parent.parent
NETWORKS = {
    "autoencoder": ["autoencoder"],
    "state": ["autoencoder", "states", "reader", "scene"],
    "denoiser": ["autoencoder", "states", "reader", "denoiser"],
    "distill": ["autoencoder", "states", "reader", "denoiser"],
    "decoder": ["autoencoder", "states", "reader", "denoiser"],
}


@pytest.fixture
def started(toy, tmp_path) -> Path:
    """A folder of one's own with the checkpoints of all stages, none of which can be gone on with."""
    out = tmp_path / "out"
    out.mkdir()
    for stage in TOY_STAGES:
        shutil.copy(toy[0] / f"{stage}.safetensors", out)
    return out


def lines(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", TOY_STAGES)
def test_every_stage_writes_what_the_next_one_reads(toy, stage):
    out, figures = toy
    steps = load_config("train", TrainConfig, ["preset=toy", f"stage={stage}"]).stage_config().steps
    assert figures[stage]["stage"] == stage and figures[stage]["steps"] == steps
    assert figures[stage]["checkpoint"] == str(out / f"{stage}.safetensors")
    checkpoint = Checkpoint(out / f"{stage}.safetensors")
    assert checkpoint.modules == NETWORKS[stage] and checkpoint.about["steps"] == steps
    assert checkpoint.world.name == "doom_gathering" and "ViZDoom" in checkpoint.about["licence"]
    origin = checkpoint.about["origin"]
    assert origin["seed"] == 0 and origin["precision"] == "fp32"
    sources = {name: Checkpoint(out / f"{name}.safetensors").digest() for name in TRAINED[stage].reads}
    assert origin["made_from"] == sources
    log = [line for line in lines(out, stage) if "rate" in line]
    assert [line["step"] for line in log] == list(range(5, steps + 1, 5))
    assert not any(line["skipped"] for line in log), "all gradients are finite"
    assert all(np.isfinite(list(line.values())).all() and line["rate"] > 0 for line in log)
    picture = load_picture(out / f"{stage}.png")
    assert picture.ndim == 3 and picture.std() > 5
    assert not list(out.glob("*.tmp"))


def test_weights_between_stages_are_whole(toy):
    """What the decoder's stage does not train is bit for bit what the one before it wrote."""
    before, after = (Checkpoint(toy[0] / f"{stage}.safetensors") for stage in ("distill", "decoder"))
    compared = 0
    for key, value in after.tensors.items():
        if not key.startswith("autoencoder.decoder."):
            assert torch.equal(value.nan_to_num(), before.tensors[key].nan_to_num()), key
            compared += value.numel()
    assert compared > 10_000
    assert {value.dtype for value in after.tensors.values()} <= {torch.float32, torch.int64, torch.bool}


def test_what_is_trained_can_be_played(toy_checkpoint):
    session = Session(Player(toy_checkpoint, "cpu", "fp32"))
    start = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8)
    session.reset(3, start)
    frames = [session.step(session.action_space.encode(["forward"])) for _ in range(4)]
    assert all(frame.shape == (96, 128, 3) and frame.dtype == np.uint8 for frame in frames)


def test_what_is_packed_can_be_played(toy_checkpoint, toy_data, tmp_path):
    options = [f"checkpoint={toy_checkpoint}", f"data={toy_data}", f"out={tmp_path}/small.safetensors"]
    figures = run_training("stage=pack", *options)
    assert figures["error"] < 0.01
    packed, whole = Path(figures["checkpoint"]), toy_checkpoint.stat().st_size
    assert packed.stat().st_size - sum(x.nbytes for x in Checkpoint(packed).extras.values()) < 0.6 * whole
    one, other = (load_denoiser(Checkpoint(path)).state_dict() for path in (packed, toy_checkpoint))
    error = sum((one[name] - other[name]).double().norm() ** 2 for name in one) ** 0.5
    assert 0 < error < 0.01 * sum(value.double().norm() ** 2 for value in other.values()) ** 0.5
    assert Player(packed, "cpu", "fp32").checkpoint.path == packed


@pytest.mark.slow
def test_a_ladder_that_was_given_is_kept(started, toy_data):
    """Also where the preset of the later stage says otherwise; and what is given there counts."""
    places = [f"data={toy_data}", f"out={started}", "steps=2"]
    run_training("stage=denoiser", "model.denoiser.ladder=[0.3,0.6,1.0]", *places)
    run_training("stage=distill", "model.denoiser.correction=0.7", *places)
    model = Checkpoint(started / "distill.safetensors").model.denoiser
    assert model.ladder == [0.3, 0.6, 1.0] and model.correction == 0.7


def training(stage: str, data: Path, out: Path) -> Training:
    options = [*TOY, f"stage={stage}", f"data={data}", f"out={out}", "steps=6"]
    return Training(load_config("train", TrainConfig, options))


def advance(of: Training, steps: int) -> list[float]:
    return [of.iterate(of.progress())["loss"].item() for _ in range(steps)]


def flat(state, name: str = "") -> dict[str, object]:
    """A nested state as one table of names and values."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list | tuple):
        pairs = enumerate(state)
    else:
        return {name: state}
    return {key: value for k, v in pairs for key, value in flat(v, f"{name}/{k}").items()}


@pytest.mark.parametrize("stage", TOY_STAGES)
def test_continued_training_is_the_same_training(stage, toy_data, started, tmp_path):
    """Three steps, a new start, three more: weights, optimiser, average and losses of six in one go, also
    where games are under way.
    """
    other = tmp_path / "other"
    shutil.copytree(started, other)
    whole = training(stage, toy_data, started)
    losses = advance(whole, 6)
    random = torch.get_rng_state()
    half = training(stage, toy_data, other)
    first = advance(half, 3)
    half.save()
    torch.manual_seed(12345)
    np.random.seed(12345)
    rest = training(stage, toy_data, other)
    assert rest.step == 3 and first + advance(rest, 3) == losses
    assert len(set(losses)) == 6 and whole.progress() == rest.progress() == 1
    for part in ("module", "optimiser", "average.module"):
        one, two = (flat(attrgetter(part)(x).state_dict()) for x in (rest, whole))
        assert one.keys() == two.keys()
        for name, value in one.items():
            same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
            assert same, (part, name)
    assert torch.equal(torch.get_rng_state(), random)


def test_games_with_short_episodes_can_be_trained(started, tmp_path):
    """Many a game of one's own lasts for a second or two."""
    config = load_config("train", TrainConfig, ["stage=collect", "world=doom_gathering"])
    frames = np.random.default_rng(0).integers(0, 255, (60, 3, 4, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    action = np.zeros(len(config.world.keys), np.float32)
    with Recorder(tmp_path / "data" / "short", config.world, "true", 0) as recorder:
        for i, frame in enumerate(frames):
            recorder.add(frame, action, reset=i % 20 == 0, t_ns=i)
    figures = run_training("stage=denoiser", f"data={tmp_path}/data", f"out={started}", "steps=5")
    assert figures["steps"] == 5 and (started / "denoiser.png").exists()


@pytest.mark.parametrize("least, made", [(3, 16), (4, 16), (5, 1)])
def test_where_no_held_out_game_goes_on_one_is_shown_that_was_trained_on(
    least, made, tiny_checkpoint, tmp_path
):
    """Games of 20 frames, of which 4 are the start; held-out ones of a few frames."""
    before = Checkpoint(tiny_checkpoint)
    train_on, held_out = (paths[0] for paths in split([tmp_path / "data" / "a", tmp_path / "data" / "b"]))
    for path, frames in ((train_on, 20), (held_out, least)):
        with Recorder(path, before.world, "true", 0) as recorder:
            for i in range(40):
                recorder.add(np.zeros((96, 128, 3), np.uint8), [0, 0, 0], reset=i % frames == 0, t_ns=i)
    config = TrainConfig("denoiser", world=before.world, model=before.model, data=str(tmp_path / "data"))
    config.out, config.weights = str(tmp_path), str(tiny_checkpoint)
    config.stages.denoiser = DenoiserStageConfig(batch=2, clip=8)
    stage = DenoiserStage(config, torch.device("cpu"), None, 0, 1)
    true, own = stage.play(stage.module.generator, stage.shown)
    assert true.shape == own.shape and own.shape[1] == made
    assert np.isfinite(stage.validate(stage.module)["psnr_1"]) and stage.picture(stage.module).ndim == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["denoiser", "distill"])
def test_two_processes_train_one_network(stage, started, toy_data):
    """That they have the same weights is checked whenever they save; the latents are not cached yet."""
    fresh = started / "data"
    shutil.copytree(toy_data, fresh, ignore=shutil.ignore_patterns("latents-*"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*TOY, f"stage={stage}", "steps=4", f"data={fresh}", f"out={started}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "train.py", *options]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        said, _ = child.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)  # the launcher takes its workers with it
        said, _ = child.communicate(timeout=60)
    assert child.returncode == 0, said[-3000:]
    states = [torch.load(started / f"{stage}.state{rank}.pt") for rank in ("", 1)]
    assert states[0]["step"] == states[1]["step"] == 4
    assert not torch.equal(states[0]["random"], states[1]["random"])
    made = started / f"{stage}.safetensors"
    assert Checkpoint(made).about["steps"] == 4 and Player(made, "cpu", "fp32").checkpoint.path == made


def refusal(capsys, *options: str) -> str:
    """What main() says when it refuses these options: one sentence on stderr, nothing on stdout."""
    code = train.main([*TOY, *options])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert code == 2 and not out and len(said) == 1, (code, out, err)
    assert "Traceback" not in err
    return said[0]


@pytest.mark.parametrize(
    "options, word",
    [
        (["stage=autoencder"], "autoencder"),
        (["stage=denoiser", "world=doom_nowhere"], "doom_nowhere"),
        (["stage=denoiser", "max_minute=3"], "max_minute"),
        (["stage=denoiser", "steps=many"], "steps"),
        (["stage=denoiser", "preset=huge"], "huge"),
        (["stage=denoiser", "model.denoiser.width=100"], "100"),
        (["stage=denoiser", "model.denoiser.head_dim=0"], "head_dim"),
        (["stage=denoiser", "model.denoiser.ladder=[0.9,0.5,1]"], "ladder"),
        (["stage=denoiser", "model.denoiser.patch=5"], "patch"),
        (["stage=distill", "model.denoiser.layers=5"], "model.denoiser.layers=5"),
        (["stage=denoiser", "device=abacus"], "abacus"),
        (["stage=denoiser", "world=doom_defend"], "doom_gathering"),
        (["stage=autoencoder", "data={tmp}/empty"], "no recording"),
        (["stage=denoiser", "out={tmp}/empty"], "no checkpoint"),
        (["stage=autoencoder", "out={tmp}/file/out"], "file/out"),
        (["stage=autoencoder", "out={tmp}/file"], "file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(options, word, started, toy_data, tmp_path, capsys):
    (tmp_path / "file").touch()
    given = {text.split("=")[0]: text.format(tmp=tmp_path) for text in options}
    assert word in refusal(capsys, *({"data": f"data={toy_data}", "out": f"out={started}"} | given).values())


@pytest.mark.slow
def test_a_teacher_of_another_encoder_is_refused(started, toy_data, tmp_path, capsys):
    """What it says would be of other latents. Another decoder is no matter."""
    before = Checkpoint(started / "denoiser.safetensors")
    for part, refused in (("encoder", True), ("decoder", False)):
        weights = tmp_path / f"{part}.safetensors"
        networks = {
            "autoencoder": load_autoencoder(before),
            "states": load_states(before),
            "reader": load_reader(before),
            "denoiser": load_denoiser(before),
        }
        with torch.no_grad():
            next(getattr(networks["autoencoder"], part).parameters()).add_(1e-3)
        save_checkpoint(weights, networks, before.model, before.world)
        options = ["stage=distill", f"weights={weights}", f"data={toy_data}", f"out={started}", "steps=1"]
        if refused:
            assert "teacher" in refusal(capsys, *options)
        else:
            run_training(*options)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "other config", "older"])
def test_a_damaged_state_is_refused(damage, toy, started, toy_data, capsys):
    file, options, word = started / "denoiser.state.pt", [], "delete it"
    state = (toy[0] / "denoiser.state.pt").read_bytes()
    file.write_bytes(
        {"cut": state[: len(state) // 2], "empty": b"", "foreign": b"no state"}.get(damage, state)
    )
    if damage == "older":
        older = torch.load(file, weights_only=True)
        del older["version"]
        torch.save(older, file)
    elif damage == "other config":
        options, word = ["model.denoiser.layers=3"], "model.denoiser.layers was 2 and is 3"
    said = refusal(capsys, "stage=denoiser", f"data={toy_data}", f"out={started}", *options)
    assert "denoiser.state.pt" in said and word in said


def test_a_full_disk_while_saving_is_refused_and_costs_nothing(toy, started, toy_data, capsys, monkeypatch):
    state = started / "denoiser.state.pt"
    shutil.copy(toy[0] / "denoiser.state.pt", state)
    before = state.read_bytes()

    def full(content, path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    said = refusal(capsys, "stage=denoiser", f"data={toy_data}", f"out={started}", "steps=42")
    assert "free some space" in said and state.read_bytes() == before and not list(started.glob("*.tmp"))


def test_the_program_itself_exits_with_2():
    command = [sys.executable, "train.py", "stage=nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: ") and len(done.stderr.splitlines()) == 1


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read, and shapes that depend on values."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.item")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).rsplit(".", 1)[0] in self.NAMES:
            where = "".join(traceback.format_stack(limit=12))
            if "reference.py" not in where:  # on a GPU kernels stand in for the definitions
                self.found.append(where)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", TOY_STAGES)
def test_an_iteration_does_not_wait_for_its_device(stage, started, toy_data):
    """Once its data are there. The first one makes what is kept."""
    one = training(stage, toy_data, started)
    batches = [one.stage.batch(turn) for turn in range(4)]
    one.stage.batch = lambda turn: batches[turn]
    one.iterate(0.0)
    with Reads() as reads:
        for _ in range(3):
            one.iterate(0.0)
    assert not reads.found, reads.found[0]
