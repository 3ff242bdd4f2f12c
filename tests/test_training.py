"""train.py on a small true recording: all stages, exact continuation, kills, several processes, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from engine import losses
from engine.autoencoder import Autoencoder
from engine.checkpoint import Checkpoint
from engine.config import TrainConfig, load_config
from engine.denoiser import Denoiser, weighted_error
from engine.optim import Optimiser, learning_rate, moving_average
from engine.picture import load_picture
from engine.recording import Recorder
from engine.rollout import Rollout
from engine.session import Player, Session, make_denoiser
from engine.stages import make_stage
from engine.window import bind

ROOT = Path(__file__).parent.parent
STAGES = ("autoencoder", "motion", "denoiser", "rollout")
STEPS = dict(zip(STAGES, (60, 40, 80, 8), strict=True))
PLAIN = ("preset=toy", "device=cpu", "precision=fp32", "threads=1", "max_minutes=1000")

pytest.importorskip("vizdoom")


def run(*options: str) -> dict:
    """main() with these options → the figures on the last line of its output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main([*PLAIN, *options]) == 0
    return json.loads(said.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("training") / "data"
    figures = run("stage=collect", "world=doom_gathering", "frames=800", "workers=1", f"data={path}")
    assert figures["frames"] == 800
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """All stages one after another → their folder and each one's figures."""
    out = tmp_path_factory.mktemp("trained")
    figures = {
        stage: run(f"stage={stage}", f"data={data}", f"out={out}", f"steps={steps}")
        for stage, steps in STEPS.items()
    }
    return out, figures


@pytest.fixture
def started(trained, tmp_path) -> Path:
    """A folder of one's own in which the stages before `denoiser` and `rollout` are done."""
    out = tmp_path / "out"
    out.mkdir()
    for stage in STAGES[:3]:
        shutil.copy(trained[0] / f"{stage}.safetensors", out)
    return out


def lines(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage, steps", STEPS.items())
def test_every_stage_writes_what_the_next_one_reads(trained, stage, steps):
    out, figures = trained
    assert figures[stage]["stage"] == stage and figures[stage]["steps"] == steps
    assert figures[stage]["checkpoint"] == str(out / f"{stage}.safetensors")
    checkpoint = Checkpoint(out / f"{stage}.safetensors")
    beside = {"autoencoder": [], "motion": ["motion"]}.get(stage, ["denoiser"])
    assert checkpoint.about["modules"] == ["autoencoder", *beside]
    assert checkpoint.about["steps"] == steps and checkpoint.world.name == "doom_gathering"
    assert checkpoint.about["seed"] == 0 and "ViZDoom" in checkpoint.about["licence"]
    log = lines(out, stage)
    assert [line["step"] for line in log] == list(range(5, steps + 1, 5))
    assert all(np.isfinite(list(line.values())).all() and line["rate"] > 0 for line in log)
    picture = load_picture(out / f"{stage}.png")
    assert picture.shape[0] > 96 and picture.shape[1] > 128 and picture.std() > 5
    assert not list(out.glob("*.tmp"))


def test_losses_fall(trained, data):
    out, _ = trained
    fell = [line["loss"] for line in lines(out, "autoencoder")]  # that of motion: tests/test_motion.py
    assert np.mean(fell[-3:]) < 0.6 * fell[0], fell
    # single batches differ by more than the denoiser learns here: the same ones, with the same noise
    config = load_config("train", TrainConfig, [*PLAIN, "stage=denoiser", f"data={data}", f"out={out}"])
    stage = make_stage(config, torch.device("cpu"), None, 0, 1)

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(1)
        return sum(stage.module(stage.batch(100 + i))[0].item() for i in range(40))

    before = loss()
    Checkpoint(out / "denoiser.safetensors").load_into("denoiser", stage.module.denoiser)
    assert loss() < 0.8 * before


def networks(checkpoint: Checkpoint) -> tuple[Autoencoder, Denoiser]:
    """With the checkpoint's weights, as they were saved."""
    autoencoder = Autoencoder(checkpoint.model.autoencoder)
    denoiser = make_denoiser(checkpoint, autoencoder)
    checkpoint.load_into("autoencoder", autoencoder)
    checkpoint.load_into("denoiser", denoiser)
    return autoencoder, denoiser


def test_rollout_starts_from_the_denoiser(trained):
    out, _ = trained
    before, after = (Checkpoint(out / f"{stage}.safetensors") for stage in STAGES[2:])
    assert after.model == before.model and before.model.denoiser.window == 3
    both = zip(networks(before), networks(after), strict=True)  # autoencoders, denoisers
    pairs = [[dict(network.named_parameters()) for network in two] for two in both]
    for (old, new), small in zip(pairs, (1e-9, 0.5), strict=True):
        moved = sum((old[name] - new[name]).square().sum() for name in old)
        assert moved <= small * sum(value.square().sum() for value in old.values())


def test_what_is_trained_can_be_played(trained):
    player = Player(trained[0] / "rollout.safetensors", "cpu", "fp32")
    session = Session(player)
    start = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8)
    session.reset(3, start)
    frames = [session.step(session.action_space.encode(["forward"])) for _ in range(4)]
    assert all(frame.shape == (96, 128, 3) and frame.dtype == np.uint8 for frame in frames)


def training(stage: str, data: Path, out: Path, *options: str) -> train.Training:
    out.mkdir(exist_ok=True)
    names = [*PLAIN, f"stage={stage}", f"data={data}", f"out={out}", "steps=8", *options]
    made = train.Training(load_config("train", TrainConfig, names), rank=0, ranks=1)
    made.resume()
    return made


def advance(of: train.Training, steps: int) -> list[float]:
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


def assert_same(one, other) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys() and len(one) > 20
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


@pytest.mark.parametrize("stage", STAGES)
def test_continued_training_is_the_same_training(stage, data, started, tmp_path):
    """Four steps, a new start, four more: weights, optimiser, average and losses of eight in one go."""
    other = tmp_path / "other"
    shutil.copytree(started, other)
    whole = training(stage, data, started)
    losses = advance(whole, 8)
    random = torch.get_rng_state()
    half = training(stage, data, other)
    first = advance(half, 4)
    half.save()
    torch.manual_seed(12345)
    np.random.seed(12345)
    rest = training(stage, data, other)
    assert rest.step == 4 and rest.seconds == half.seconds
    assert first + advance(rest, 4) == losses
    assert len(set(losses)) == 8 and whole.progress() == rest.progress() == 1
    for part in ("module", "optimiser", "average"):
        assert_same(getattr(rest, part).state_dict(), getattr(whole, part).state_dict())
    assert torch.equal(torch.get_rng_state(), random)


def test_games_with_short_episodes_can_be_trained(started, tmp_path):
    """Many a game of one's own lasts for a second or two; a toy segment has 9 frames."""
    config = load_config("train", TrainConfig, ["stage=collect", "world=doom_gathering"])
    frames = np.random.default_rng(0).integers(0, 255, (60, 3, 4, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    action = np.zeros(len(config.world.keys), np.float32)
    with Recorder(tmp_path / "data" / "short", config.world, "true", 0) as recorder:
        for i, frame in enumerate(frames):
            recorder.add(frame, action, reset=i % 20 == 0, t_ns=i)
    figures = run("stage=denoiser", f"data={tmp_path}/data", f"out={started}", "steps=5")
    assert figures["steps"] == 5 and (started / "denoiser.png").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_from_the_weights_of_a_checkpoint(stage, trained, started, data):
    """Of the last stage, as it is shipped: every other one finds its networks in it."""
    source = trained[0] / "rollout.safetensors"
    options = [f"stage={stage}", f"data={data}", f"out={started}", f"weights={source}", *PLAIN]
    module = make_stage(load_config("train", TrainConfig, options), torch.device("cpu"), None, 0, 1).module
    autoencoder, denoiser = networks(Checkpoint(source))
    made = {"autoencoder": module, "motion": getattr(module, "motion", None)}
    made = made.get(stage) or module.denoiser
    given = {"autoencoder": autoencoder, "motion": denoiser.motion}.get(stage, denoiser).state_dict()
    compared = 0
    for key, value in made.state_dict().items():
        if stage != "denoiser" or not key.startswith("motion."):  # its motion is that of the stage before
            assert torch.equal(value, given[key]), key
            compared += value.numel()
    assert compared > 1000


def test_a_finished_stage_stays_finished(trained, data):
    out, _ = trained
    before = torch.load(out / "rollout.state.pt")
    assert run("stage=rollout", f"data={data}", f"out={out}", "steps=8")["steps"] == 8
    assert_same(torch.load(out / "rollout.state.pt"), before)


def rolled_loss(adversarial: float = 0.0, alone: bool = False, **size) -> losses.RolloutLoss:
    config = load_config("train", TrainConfig, ["preset=toy", "stage=rollout"])
    size = replace(config.model.denoiser, patch=2, **size)
    pace = replace(config.pace(), unroll=4, plain_share=0.0, adversarial=adversarial, jitter=0.0)
    pace = replace(pace, alone_share=float(alone))
    return losses.RolloutLoss(Denoiser(size, 1, 2, 4, 6), pace)


@pytest.mark.parametrize("commit_position", [0, 1])
@pytest.mark.parametrize("adversarial, alone", [(0.0, False), (1.0, False), (1.0, True)])
def test_rolled_windows_are_held_against_the_frames_of_their_actions(
    adversarial, alone, commit_position, monkeypatch
):
    """Frame t is the number t and so is its action; the window from frame t on is made under the one before,
    as in play, and what is learnt from true frames under its own.
    """
    loss = rolled_loss(adversarial, alone, commit_position=commit_position)
    size = loss.denoiser.config
    number, start, window = torch.arange(10.0), size.sink + size.recent, size.window
    seen: list[tuple] = []

    def watch(name: str) -> None:
        plain = getattr(Rollout, name)

        def watched(rollout: Rollout, *given, **named):
            told = (
                [x.flatten(2)[0, :, 0].tolist() for x in given[:2]]
                if name == "reset"
                else given[0][0, 0].item()
            )
            seen.append((name, int(rollout.cache.frame), told))
            return plain(rollout, *given, **named)

        monkeypatch.setattr(Rollout, name, watched)

    def error(made: torch.Tensor, true: torch.Tensor, sigma: torch.Tensor, spread: float) -> torch.Tensor:
        seen.append(("error", made.requires_grad, true[0, :, 0, 0, 0].tolist(), sigma[0].tolist()))
        return weighted_error(made, true, sigma, spread)

    def assert_guess(one, other) -> None:
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(one, other, strict=True))

    def judge(self, made, true, guess, told) -> tuple[torch.Tensor, torch.Tensor]:
        cache, frame = loss.rollout.cache, int(told[1][0, 0, 0])
        bound = bind(loss.rollout.window.actions, commit_position)[0]
        assert torch.equal(told[0], bound[:, : made.shape[1]])
        assert_guess(guess[0], loss.denoiser.motion(cache.last, cache.held, told[0]))
        past = clip[0][:, frame - 2 : frame]
        shown = bind(clip[1][:, frame : frame + window], commit_position)[0][:, : made.shape[1]]
        assert_guess(guess[1], loss.denoiser.motion(past, clip[1][:, frame - 4 : frame], shown))
        seen.append(("judge", made.requires_grad, *(x.flatten(2)[0, :, 0].tolist() for x in (true, told[1]))))
        return plain_judge(self, made, true, guess, told)

    for name in ("reset", "guess", "predict"):
        watch(name)
    monkeypatch.setattr(losses, "weighted_error", error)
    plain_judge = losses.Discriminator.loss
    monkeypatch.setattr(losses.Discriminator, "loss", judge)
    clip = number[:, None, None, None].expand(2, 10, 2, 4, 6), number[:, None].expand(2, 10, 1)
    value, _ = loss(clip)
    value.backward()
    assert seen.pop(0)[2] == [list(range(start))] * 2
    assert seen.pop(0) == ("guess", start, start - 1), "that of the frames in flight at the start"
    judged: list[bool] = []
    for frame in range(start, start + 4):
        true = list(range(frame, frame + window))
        assert seen.pop(0) == ("guess", frame, frame - 1)
        assert seen.pop(0) == ("predict", frame, frame - 1), "the model's own game goes on"
        if alone:
            assert seen.pop(0) == ("guess", frame, frame), "and its leaving frame is denoised once more"
        judged.append(seen[0][0] == "judge")
        if judged[-1]:
            shown = true[:1] if alone else true
            assert seen.pop(0) == ("judge", True, shown, shown)
            continue
        assert seen.pop(0) == ("guess", frame, frame)
        assert seen.pop(0) == ("predict", frame, frame), "what is learnt from"
        assert seen.pop(0) == ("error", True, true, pytest.approx(size.ladder))
    assert not seen
    assert judged in ([[False] * 4] if not adversarial else [[True, False] * 2, [False, True] * 2])


@pytest.mark.parametrize("changes", [False, True])
def test_stale_estimates_stay_more_often_where_keys_changed(changes, monkeypatch):
    """Most windows are noised from true frames; a half keep their own estimates after a change of keys."""
    loss, true, given = rolled_loss(), torch.randn(64, 10, 2, 4, 6), []
    actions = torch.ones(64, 10, 1)
    if changes:
        actions[:, 6:] = 0
    plain = Rollout.predict

    def predict(rollout: Rollout, action, clean=None, guess=None) -> torch.Tensor:
        if clean is not None:
            given.append((int(rollout.cache.frame), clean.clone(), rollout.window.clean.clone()))
        return plain(rollout, action, clean, guess)

    monkeypatch.setattr(Rollout, "predict", predict)
    for _ in range(4):
        loss((true, actions))
    assert {frame for frame, _, _ in given} == {4, 5, 6, 7}
    shares: dict[bool, list[float]] = {}
    for frame, clean, own in given:
        is_true = (clean == true[:, frame : frame + clean.shape[1]]).flatten(1).all(1)
        assert (is_true | (clean == own).flatten(1).all(1)).all()
        shares.setdefault(changes and frame >= 6, []).append(1 - is_true.float().mean().item())
    for changed, stale in shares.items():
        assert np.mean(stale) == pytest.approx(losses.STALE, abs=0.1) if changed else not any(stale)


def test_learning_rate_warms_up_and_decays():
    pace = load_config("train", TrainConfig, ["preset=toy", "stage=denoiser"]).pace()
    rates = [learning_rate(pace, step, progress) for step, progress in [(0, 0), (4, 0.1), (30, 0.7), (39, 1)]]
    assert rates == pytest.approx([pace.learning_rate / 5, pace.learning_rate, pace.learning_rate, 0])
    assert 0 < learning_rate(pace, 35, 0.85) == pytest.approx(pace.learning_rate / 2)


def test_moving_average_forgets_its_start_and_follows():
    module = torch.nn.Linear(1, 1)
    average = moving_average(module, 0.99)
    with torch.no_grad():
        module.weight.fill_(1000.0)
        average.update_parameters(module)
        module.weight.fill_(1.0)
        for _ in range(100):
            average.update_parameters(module)
        assert average.module.weight.item() == pytest.approx(1, abs=0.1)
        for _ in range(2000):
            average.update_parameters(module)
        module.weight.fill_(2.0)
        average.update_parameters(module)
    assert 1.004 < average.module.weight.item() < 1.02, "a hundredth of the way, later on"
    assert module.weight.item() == 2


def test_a_killed_training_goes_on(data, tmp_path):
    """Killed while it saves after every step: what lies there is whole, and the same command goes on."""
    out = tmp_path / "out"
    options = [*PLAIN, "stage=autoencoder", f"data={data}", f"out={out}", "save_minutes=1e-6"]
    state, checkpoint = out / "autoencoder.state.pt", out / "autoencoder.safetensors"
    command = [sys.executable, "train.py", *options, "steps=100000"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert checkpoint.exists(), said[-2000:]
    assert child.returncode != 0 and "Traceback" not in said
    reached = torch.load(state)["step"]
    network = Checkpoint(checkpoint)
    network.load_into("autoencoder", Autoencoder(network.model.autoencoder))
    assert reached > 0 and abs(network.about["steps"] - reached) <= 1
    figures = run("stage=autoencoder", f"data={data}", f"out={out}", f"steps={reached + 2}")
    assert figures["steps"] == reached + 2
    assert not list(out.glob("*.tmp")), "leftovers are gone"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_two_processes_train_one_network(stage, started, data):
    """Both keep the same weights, each draws noise of its own; the latents are not cached yet."""
    fresh = started / "data"
    shutil.copytree(data, fresh, ignore=shutil.ignore_patterns("latents-*"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*PLAIN, f"stage={stage}", "steps=4", f"data={fresh}", f"out={started}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "train.py", *options]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        said, _ = child.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)  # the launcher takes its workers with it
        said, _ = child.communicate(timeout=60)
    assert child.returncode == 0, said[-3000:]
    states = [torch.load(started / f"{stage}.state{rank}.pt") for rank in ("", 1)]
    for part in ("module", "average", "optimiser"):
        assert_same(states[0][part], states[1][part])
    assert states[0]["step"] == states[1]["step"] == 4
    assert not torch.equal(states[0]["random"], states[1]["random"])
    made = started / f"{stage}.safetensors"
    assert Checkpoint(made).about["steps"] == 4
    if stage != "motion":  # a flow alone cannot be played
        assert Player(made, "cpu", "fp32").checkpoint.path == made


def refusal(capsys, *options: str) -> str:
    """What main() says when it refuses these options: one sentence on stderr, nothing on stdout."""
    code = train.main([*PLAIN, *options])
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
        (["stage=denoiser", "device=abacus"], "abacus"),
        (["stage=autoencoder", "data={tmp}/empty"], "no recording"),
        (["stage=denoiser", "out={tmp}/empty"], "no checkpoint"),
        (["stage=autoencoder", "out={tmp}/file/out"], "file/out"),
        (["stage=autoencoder", "out={tmp}/file"], "file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(options, word, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = [f"data={data}", f"out={tmp_path}/out"]
    given = [option.format(tmp=tmp_path) for option in options]
    places = [place for place in places if not any(place.split("=")[0] == g.split("=")[0] for g in given)]
    assert word in refusal(capsys, *places, *given)


def test_an_autoencoder_of_another_game_is_refused(started, data, capsys):
    said = refusal(capsys, "stage=denoiser", "world=doom_defend", f"data={data}", f"out={started}")
    assert "doom_gathering" in said


def test_patches_that_do_not_divide_the_latents_are_refused(started, data, capsys):
    options = ["stage=denoiser", "model.denoiser.patch=5", f"data={data}", f"out={started}"]
    assert "patch" in refusal(capsys, *options)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "other config", "older"])
def test_a_damaged_state_is_refused(damage, trained, started, data, capsys):
    state, options = (trained[0] / "denoiser.state.pt").read_bytes(), []
    if damage == "cut":
        state = state[: len(state) // 2]
    elif damage == "empty":
        state = b""
    elif damage == "foreign":
        state = b"no state at all"
    elif damage == "older":  # its optimiser was one and not a list of parts
        older = torch.load(io.BytesIO(state), weights_only=True)
        older["optimiser"] = older["optimiser"][0]
        torch.save(older, whole := io.BytesIO())
        state = whole.getvalue()
    else:
        options = ["model.denoiser.layers=3"]
    (started / "denoiser.state.pt").write_bytes(state)
    said = refusal(capsys, "stage=denoiser", f"data={data}", f"out={started}", *options)
    assert "denoiser.state.pt" in said and "delete it" in said


def test_a_full_disk_while_saving_is_refused_and_costs_nothing(trained, started, data, capsys, monkeypatch):
    state = started / "denoiser.state.pt"
    shutil.copy(trained[0] / "denoiser.state.pt", state)
    before = state.read_bytes()

    def full(content, path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    said = refusal(capsys, "stage=denoiser", f"data={data}", f"out={started}", "steps=42")
    assert "free some space" in said and state.read_bytes() == before and not list(started.glob("*.tmp"))


def test_the_program_itself_exits_with_2():
    command = [sys.executable, "train.py", "stage=nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: ") and len(done.stderr.splitlines()) == 1


def test_muon_takes_the_matrices_of_layers_and_both_parts_follow_the_rate():
    config = load_config("train", TrainConfig, ["preset=toy", "stage=denoiser"])
    denoiser = Denoiser(replace(config.model.denoiser, patch=2), 1, 2, 4, 6)
    optimiser = Optimiser(denoiser, config.pace())
    adam, muon = ([p for group in part.param_groups for p in group["params"]] for part in optimiser.parts)
    matrices = {id(m.weight) for m in denoiser.transformer.layers.modules() if isinstance(m, torch.nn.Linear)}
    assert {id(p) for p in muon} == matrices
    trained = {id(p) for p in denoiser.parameters() if p.requires_grad}
    assert {id(p) for p in adam} == trained - matrices, "every weight once, frozen ones never"
    before = {id(p): p.detach().clone() for p in denoiser.parameters()}
    for rate, moved in ((0.0, False), (0.01, True)):
        for p in denoiser.parameters():
            p.grad = torch.randn_like(p)
        optimiser.step(rate)
        assert all(bool((p != before[id(p)]).any()) == moved for p in (*adam, *muon))
    assert len(Optimiser(denoiser, replace(config.pace(), muon=False)).parts) == 1
