"""The state network, its reader, its training and its measure, on a toy body in a square room."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import games
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config import (
    AutoencoderConfig,
    DenoiserConfig,
    ModelConfig,
    StateConfig,
    TrainConfig,
    UserError,
    WorldConfig,
)
from engine.data.latents import LatentsCache
from engine.data.recording import Recorder
from engine.data.state_logs import StateLogs, StatePictures
from engine.evaluation.state import escapes, evaluate_state, state_of
from engine.model import networks
from engine.model.autoencoder import Autoencoder
from engine.model.checkpoint import Checkpoint, save_checkpoint
from engine.model.networks import load_autoencoder, load_reader, load_states, make_denoiser
from engine.model.scene import SceneModel
from engine.model.state import StateCarry, StateModel
from engine.model.state_reader import StateReader, completed
from engine.model.state_spec import StateScales, StateSpec, features_width, scene_columns, state_features
from engine.model.world_model import Generator
from engine.rollout.player import Player
from engine.rollout.rollout import Rollout
from engine.rollout.session import Session
from engine.stage_config import StagesConfig, StateStageConfig
from engine.train.optim import MovingAverage
from engine.train.state import Given, StateLoss, StateStage

KINDS = {"x": "position", "y": "position", "angle": "angle", "eye": "scalar"}
KINDS |= {"vx": "velocity", "vy": "velocity", "health": "scalar"}
SPEC = StateSpec.of(KINDS)
KEYS = ("forward", "turn_left", "turn_right")
ROOM = 100.0


def play(frames: int, seed: int, episode: int = 300) -> StateLogs:
    """A body with thrust and friction in a room of 200 x 200: keys held 10 frames; a reset every episode."""
    rng = np.random.default_rng(seed)
    states, actions, resets = [], [], []
    for frame in range(frames):
        reset = frame % episode == 0
        if reset:
            place, speed, angle = rng.uniform(-ROOM / 2, ROOM / 2, 2), np.zeros(2), rng.uniform(0, 360)
        if frame % 10 == 0:
            held = (rng.random(3) < (0.7, 0.3, 0.3)).astype(np.float32) * (rng.random() < 0.7)
        action = np.zeros(3, np.float32) if reset else held
        angle = (angle + 5 * (action[1] - action[2])) % 360
        radians = math.radians(angle)
        speed = 0.8 * speed + 2 * action[0] * np.array([math.cos(radians), math.sin(radians)])
        moved = np.clip(place + speed, -ROOM, ROOM)
        speed = np.where(np.abs(place + speed) > ROOM, 0.0, speed)
        place = moved
        states.append([*place, angle, 41 + np.hypot(*speed), *speed, 100 - frame % episode % 50])
        actions.append(action)
        resets.append(reset)
    parts = (np.array(states, np.float32), np.array(actions), np.array(resets))
    return StateLogs(*map(torch.from_numpy, parts))


@pytest.fixture(scope="module")
def logs() -> StateLogs:
    return play(6000, seed=1)


@pytest.fixture
def model(logs: StateLogs) -> StateModel:
    """Units and linear motion from the data, nothing trained."""
    torch.manual_seed(0)
    model = StateModel(SPEC, len(KEYS))
    model.fit(logs.states, logs.actions, logs.resets)
    return model


def make_reader(logs: StateLogs, width: int = 16) -> StateReader:
    """Of latents (4, 6, 8)."""
    reader = StateReader(4, 6, 8, SPEC, width)
    reader.fit(logs.states, logs.resets)
    return reader


def make_scene() -> SceneModel:
    """Of the same latents."""
    return SceneModel(scene_columns(SPEC), 4, 6, 8, 16)


@pytest.fixture(scope="module")
def trained(logs: StateLogs) -> StateModel:
    torch.manual_seed(0)
    model = StateModel(SPEC, len(KEYS))
    model.fit(logs.states, logs.actions, logs.resets)
    stage = StateStageConfig(batch=32, unroll=8)
    loss = StateLoss(model, make_reader(logs), make_scene(), stage)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(50):
        loss.predict(logs.batch(step, stage))[0].backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.requires_grad_(False)


def body(x: float, y: float, angle: float, speed: float = 0.0) -> torch.Tensor:
    """(1, 1, S): a body that moves along its heading."""
    radians = math.radians(angle)
    velocity = [speed * math.cos(radians), speed * math.sin(radians)]
    return torch.tensor([[[x, y, angle, 41.0 + speed, *velocity, 80.0]]])


def keys(*held: str, games: int = 1) -> torch.Tensor:
    return torch.tensor([[float(name in held) for name in KEYS]]).expand(games, -1)


def test_a_scene_that_is_made_alone_is_the_denoisers() -> None:
    model = ModelConfig(AutoencoderConfig(4, [8, 8, 12], 1), DenoiserConfig(32, 1, 32, scene_width=8))
    model.state, world = StateConfig(**SPEC.to_dict()), WorldConfig(keys={"go": ["W"]})
    alone, inside = networks.make_scene(model, world), make_denoiser(model, world).condition.scene
    inside.load_state_dict(alone.state_dict())
    features = torch.rand(3, features_width(SPEC))
    assert alone(features).shape == (3, 4, 12, 16) and torch.equal(alone(features), inside(features))
    assert networks.make_scene(replace(model, state=StateConfig()), world) is None


def test_spec_survives_the_checkpoints_config() -> None:
    assert StateSpec.from_dict(SPEC.to_dict()) == SPEC
    assert SPEC.pictured == ("health",)
    assert [SPEC.names[i] for i in SPEC.indices("scalar")] == ["eye"]


@pytest.mark.parametrize(
    "names, kinds, pictured",
    [
        (("x",), ("place",), ()),
        (("x", "x"), ("position", "position"), ()),
        (("x", "y"), ("position",), ()),
        (("x", "angle"), ("position", "angle"), ("angle",)),
        (("x",), ("position",), ("health",)),
    ],
)
def test_spec_refuses(names, kinds, pictured) -> None:
    with pytest.raises(UserError):
        StateSpec(names, kinds, pictured)


def test_unroll_is_repeated_steps(model: StateModel, logs: StateLogs) -> None:
    with torch.no_grad():
        for value in model.parameters():
            value += 0.02 * torch.randn_like(value)
    batch = logs.cut(torch.tensor([3, 301]), 24, 4)
    carry = model.begin(batch.states[:, :4], batch.actions[:, :4])
    made = model.unroll(carry, batch.actions[:, 4:])
    for t in range(20):
        carry = model.step(carry, batch.actions[:, 4 + t])
        torch.testing.assert_close(carry.state, made[:, t], atol=1e-3, rtol=1e-4)
    assert (made[..., SPEC.names.index("health")] == batch.states[:, 3, -1:]).all(), "keys decide no health"


def test_what_was_played_before_matters(model: StateModel, logs: StateLogs) -> None:
    """Two starts from one state with other keys before it are told apart."""
    batch = logs.cut(torch.tensor([30]), 8, 8)
    other = 1 - batch.actions
    a, b = (model.begin(batch.states, actions).hidden for actions in (batch.actions, other))
    assert not torch.allclose(a, b)


def test_frames_apart_are_the_first_of_an_unroll(model: StateModel, logs: StateLogs) -> None:
    batch = logs.cut(torch.tensor([40, 340]), 7, 6)
    apart = model.next_states(batch.states, batch.actions)  # (2, 6, S)
    carry = model.begin(batch.states[:, :6], batch.actions[:, :6])
    torch.testing.assert_close(
        model.step(carry, batch.actions[:, 6]).state[:, :6], apart[:, -1, :6], atol=1e-3, rtol=1e-4
    )


def test_free_motion_is_solved_for(model: StateModel) -> None:
    """Without a step of training, a body in the open does what the toy's equations say."""
    start = body(0, 0, 30, speed=8.0)
    state = model.step(model.begin(start, keys("forward")[:, None]), keys("forward")).state[0]
    speed = 0.8 * 8.0 + 2
    radians = math.radians(30)
    assert state[0].item() == pytest.approx(speed * math.cos(radians), abs=0.1)
    assert state[1].item() == pytest.approx(speed * math.sin(radians), abs=0.1)


@pytest.mark.parametrize("angle", [90.0, 210.0])
def test_motion_is_the_bodys_own(model: StateModel, angle: float) -> None:
    """A turned body in the open makes the same step, turned."""
    steps = []
    for heading in (0.0, angle):
        start = body(0, 0, heading, speed=5.0)
        state = model.step(model.begin(start, keys("forward")[:, None]), keys("forward", "turn_left")).state[
            0
        ]
        step = complex(state[0].item(), state[1].item())
        steps.append(step * complex(math.cos(-math.radians(heading)), math.sin(-math.radians(heading))))
    assert abs(steps[0] - steps[1]) < 0.2 and abs(steps[0]) > 4, "but for the smallest steps, which vanish"


def test_angles_go_round(model: StateModel) -> None:
    carry = model.begin(body(0, 0, 358), keys()[:, None])
    turned = [(carry := model.step(carry, keys("turn_left"))).state[0, 2].item() for _ in range(4)]
    assert all(0 <= angle < 360 for angle in turned)
    assert turned[-1] == pytest.approx(18, abs=1.5)


def test_standing_is_standing(model: StateModel) -> None:
    carry = model.begin(body(10, -20, 77), keys()[:, None])
    with torch.no_grad():
        for _ in range(500):
            carry = model.step(carry, keys())
    assert (carry.state[0, :2] - torch.tensor([10.0, -20.0])).norm() < 3


def test_nothing_runs_away(model: StateModel) -> None:
    """Whatever the weights say, the body stays on the known map and every number finite."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value))
        carry = model.begin(body(0, 0, 0).expand(4, -1, -1), keys("forward", games=4)[:, None])
        states = model.unroll(carry, (torch.rand(4, 300, 3) > 0.5).float())
    assert torch.isfinite(states).all()
    assert (states[..., :2].abs() <= ROOM + 1e-3).all()
    assert (states[..., 2] >= 0).all() and (states[..., 2] <= 360).all()


def test_a_step_is_cheap(model: StateModel) -> None:
    carry = model.begin(body(0, 0, 0), keys()[:, None])
    with FlopCounterMode(display=False) as counter:
        model.step(carry, keys())
    assert 0 < counter.get_total_flops() < 0.01e9


def test_gradients_reach_every_weight(model: StateModel, logs: StateLogs) -> None:
    loss = StateLoss(model, make_reader(logs), make_scene(), StateStageConfig())
    with torch.no_grad():
        for value in model.parameters():
            value += 0.02 * torch.randn_like(value)
    pictures = StatePictures(torch.randn(5, 4, 6, 8), logs.states[:5])
    value, parts = loss(Given(logs.cut(torch.tensor([0, 700, 1500]), 28, 4), pictures))
    value.backward()
    assert {"place", "pace", "read", "scene"} == parts.keys()
    dead = [name for name, value in loss.named_parameters() if value.grad is None or not value.grad.any()]
    assert not dead


def test_a_perfect_prediction_costs_nothing(model: StateModel, logs: StateLogs) -> None:
    """Against what the network itself makes, loss and slope vanish; one angle beside the border does not."""
    loss, batch = (
        StateLoss(model, make_reader(logs), make_scene(), StateStageConfig()),
        logs.cut(torch.tensor([2, 333]), 16, 16),
    )
    carry = model.begin(batch.states[:, :4], batch.actions[:, :4])
    own = torch.cat([batch.states[:, :4], model.unroll(carry, batch.actions[:, 4:])], 1).detach()
    torch.manual_seed(1)  # draws no noise on these two games
    with torch.no_grad():
        right = loss.predict(batch._replace(states=own, warm=4))[0]
        own[:, 4:, 2] = (own[:, 4:, 2] + 20) % 360
        wrong = loss.predict(batch._replace(states=own, warm=4))[0]
    assert right < 1e-3 < 0.5 < wrong


def test_a_scene_is_learned_from_pictures_and_does_not_mind_the_pace(model: StateModel, logs: StateLogs):
    """Each place has a picture of its own; velocities and the step to a frame change nothing."""
    torch.manual_seed(0)
    loss = StateLoss(model, make_reader(logs), make_scene(), StateStageConfig())
    states = logs.states[::7][:64].clone()
    known = model.scales.normalise(states)
    pictures = StatePictures(known[:, :4, None, None].expand(-1, -1, 6, 8).contiguous(), states)
    optimiser, first = torch.optim.Adam(loss.scene.parameters(), 3e-3), loss.scene_error(pictures).item()
    for _ in range(200):
        loss.scene_error(pictures).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.scene_error(pictures).item() < 0.2 * first
    moved = states.clone()
    moved[:, SPEC.indices("velocity")] += 3.0
    alike, other = (state_features(model.scales, *pair) for pair in ((states, states), (moved, states + 1)))
    places = [i for i in range(len(SPEC)) if SPEC.kinds[i] != "velocity"]
    assert torch.equal(alike[:, scene_columns(SPEC)], other[:, scene_columns(SPEC)]) and len(places) > 3


def test_the_moving_average_stays_finite(model: StateModel, logs: StateLogs) -> None:
    """Buffers are averaged as weights are: an infinite bound would become no number."""
    loss = StateLoss(model, make_reader(logs), make_scene(), StateStageConfig())
    average = MovingAverage(loss, 0.9)
    for count in range(3):
        average.update(loss, count, torch.tensor(True))
    kept, own = average.module.state_dict(), loss.state_dict()
    assert all(torch.isfinite(value).all() for value in kept.values())
    for name in own:
        torch.testing.assert_close(kept[name], own[name])


def test_games_lie_inside_an_episode(logs: StateLogs) -> None:
    assert (logs.left[:3] == torch.tensor([300, 299, 298])).all() and logs.left[-1] == 1
    stage, lengths, begun = StateStageConfig(batch=64, unroll=32), set(), 0
    for seed in range(24):
        batch = logs.batch(seed, stage)
        lengths.add(batch.states.shape[1] - batch.warm if batch.warm else 0)
        ages = batch.states[..., 6]  # health says how old an episode is, modulo 50
        assert (((ages[:, :-1] - ages[:, 1:]) % 50) == 1).all()
        begun += int((batch.actions[:, 0] == 0).all(1).sum())
        again = logs.batch(seed, stage)
        assert torch.equal(batch.states, again.states) and torch.equal(batch.actions, again.actions)
    assert lengths == {0, 8, 16, 32}, "frames apart, and every length up to `unroll`"
    assert begun > 24


def test_episodes_that_are_too_short_are_told() -> None:
    short = play(60, seed=0, episode=10)
    with pytest.raises(UserError, match="frames"):
        for seed in range(8):
            short.batch(seed, StateStageConfig(batch=4, unroll=8))


def recording(states: list, resets=None, names=("turn_left", "forward")) -> SimpleNamespace:
    actions = np.arange(len(states) * 2, dtype=np.float32).reshape(-1, 2)
    resets = np.array(resets or [i == 0 for i in range(len(states))])
    return SimpleNamespace(states=states, actions=actions, resets=resets, names=names, directory="there")


def test_logs_are_read_from_recordings() -> None:
    names = ("x", "angle")
    states = [{"x": i, "angle": 2 * i, "more": 0} for i in range(5)]
    whole, holed = recording(states), recording([states[0], None, states[2], states[3]])
    logs = StateLogs.read([whole, recording([None, None]), holed], names, ("forward", "turn_left", "jump"))
    assert logs.states.tolist() == [[i, 2 * i] for i in (0, 1, 2, 3, 4, 0, 2, 3)]
    assert logs.actions[1].tolist() == [3, 2, 0], "keys by name; one that the recording lacks is not held"
    assert logs.resets.nonzero()[:, 0].tolist() == [0, 5, 6], "what follows a frame without state begins anew"


def test_recordings_without_the_state_are_told() -> None:
    with pytest.raises(UserError, match="vx"):
        StateLogs.read([recording([{"x": 1.0}])], ("x", "vx"), ("forward",))
    assert StateLogs.read([recording([None])], ("x", "vx"), ("forward",)) is None


def test_training_learns_the_walls(logs: StateLogs, model: StateModel, trained: StateModel) -> None:
    """A few seconds of training, unrolled part included, predict unseen games better than linear motion."""
    unseen = play(1500, seed=2)
    figures = [evaluate_state(m, unseen, logs, horizons=(8,), warm=4, minutes=0.1) for m in (model, trained)]
    before, after = figures
    assert after["velocity_8_p95"] < 0.7 * before["velocity_8_p95"]
    assert after["position_8_median"] < 2


def test_worlds_without_positions_or_angles() -> None:
    """A turret that only turns, and a ball on a line."""
    for spec in (StateSpec(("angle",), ("angle",)), StateSpec(("x", "vx"), ("position", "velocity"))):
        states = torch.cumsum(torch.rand(64, len(spec)), 0)
        model = StateModel(spec, 2)
        actions, resets = torch.rand(64, 2), torch.arange(64) == 0
        model.fit(states, actions, resets)
        carry = model.begin(states[None, :4], actions[None, :4])
        assert model.unroll(carry, actions[None, 4:]).shape == (1, 60, len(spec))
        features = state_features(model.scales, states[1:], states[:-1])
        assert features.shape == (63, features_width(spec)) and torch.isfinite(features).all()


def test_features_are_of_the_step_in_the_bodys_axes(logs: StateLogs) -> None:
    scales = StateScales(SPEC)
    scales.fit(logs.states, logs.resets)
    before = torch.cat([body(0, 0, 0), body(0, 0, 90)])[:, 0]
    after = torch.cat([body(6, 0, 0), body(0, 6, 90)])[:, 0]
    features = state_features(scales, after, before)
    assert features.shape == (2, features_width(SPEC))
    moved = features[:, -15:]  # step, turn, and two sines and cosines of each
    torch.testing.assert_close(moved[0], moved[1])
    assert moved[0, 0] > 0.1 and abs(moved[0, 1]) < 1e-5
    still = state_features(scales, before, before)[:, -15:]
    assert (still[:, :3] == 0).all()


def test_unusable_states_are_told() -> None:
    scales = StateScales(SPEC)
    with pytest.raises(UserError):
        scales.fit(torch.full((10, 7), torch.nan), torch.zeros(10, dtype=torch.bool))
    with pytest.raises(UserError):
        scales.fit(torch.zeros(10, 7), torch.ones(10, dtype=torch.bool))


def test_the_reader_learns(logs: StateLogs) -> None:
    """Latents that show the state: after some steps it is read off ones that were not shown."""
    torch.manual_seed(0)
    reader = make_reader(logs)
    show = torch.randn(8, 4 * 6 * 8)
    radians = torch.deg2rad(logs.states[:, 2:3])
    plain = reader.scales.normalise(logs.states)
    seen = torch.cat([plain[:, [0, 1, 3, 4, 5, 6]], radians.cos(), radians.sin()], 1)
    latents = (seen @ show).view(-1, 4, 6, 8)
    optimiser = torch.optim.AdamW(reader.parameters(), 3e-3)
    for step in range(200):
        rows = torch.arange(64) * 70 + step
        loss = reader.loss(latents[rows], logs.states[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        read = reader(latents[-1000:])
    off = (read - logs.states[-1000:]).abs()
    turn = 180 - (off[:, 2] - 180).abs()
    assert off[:, :2].median() < 12 and off[:, 6].median() < 5 and turn.median() < 12
    assert (read[:, 2] >= 0).all() and (read[:, 2] <= 360).all()


def test_a_place_that_looks_like_another_is_one_of_both(logs: StateLogs) -> None:
    """Two places of one look: the reader tells one of them, not what lies between."""
    torch.manual_seed(0)
    reader, show = make_reader(logs), torch.randn(3, 4, 6, 8)
    optimiser = torch.optim.AdamW(reader.parameters(), 3e-3)
    for _ in range(150):
        number, left = torch.randint(3, (32,)), torch.randint(2, (32,))
        states = logs.states[:1].repeat(32, 1)
        states[:, 0], states[:, 2] = 30 * number + 10 - 100 * left, 90.0 + 180 * left
        loss = reader.loss(show[number], states)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    read = reader(show).detach()
    for number, state in enumerate(read):
        near = [abs(state[0] - 30 * number - 10 + 100 * left) for left in (0, 1)]
        assert min(near) < 12, state
        assert abs(state[2] - (90, 270)[near.index(min(near))]) < 15


class Seer(StateReader):
    """Sees one state, whatever it is shown, and health in the first latent."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        state = torch.tensor([10.0, 20, 30, 41, 7, 7, 0]).repeat(len(latents), 1)
        state[:, 6] = latents[:, 0, 0, 0]
        return state


def test_gaps_of_a_start_are_filled(model: StateModel, logs: StateLogs) -> None:
    """What is known stays; what is not is read off the first frame, at rest, and then follows the keys."""
    seer = Seer(4, 6, 8, SPEC)
    latents = torch.arange(5.0)[None, :, None, None, None].expand(2, 5, 4, 6, 8)
    actions = keys("forward")[None].expand(2, 5, -1)
    states = torch.full((2, 5, 7), torch.nan)
    states[1, :, :3] = torch.tensor([-50.0, 5, 200])
    made = completed(model, seer, latents, actions, states)
    assert torch.equal(made[1, :, :3], states[1, :, :3]) and torch.isfinite(made).all()
    torch.testing.assert_close(made[0, 0], torch.tensor([10.0, 20, 30, 41, 0, 0, 0]))
    start = made[:1, :1]
    torch.testing.assert_close(
        made[0, 1:, :6], model.unroll(model.begin(start, actions[:1, :1]), actions[:1, 1:])[0, :, :6]
    )
    assert made[0, 4, 0] > 12, "it walks"
    assert torch.equal(made[0, :, 6], torch.arange(5.0))
    whole = logs.states[None, :5].repeat(2, 1, 1)
    assert torch.equal(completed(model, seer, latents, actions, whole), whole)
    picture = completed(model, seer, latents[:, :1], actions[:, :1], states[:, :1])
    torch.testing.assert_close(picture[0, 0], made[0, 0])


def test_what_is_not_seen_is_left_alone(logs: StateLogs) -> None:
    """The share that is read is measured, and only a large one counts."""
    seer = Seer(4, 6, 8, SPEC)
    states = logs.states[:200]
    latents = states[:, 6, None, None, None].expand(-1, 4, 6, 8)
    shown = seer.measured(latents, states)
    hidden = seer.measured(latents.flip(0), states)
    assert shown[6] == 1 and hidden[6] < 0.3 and shown[0] < 0.3
    assert seer.seen == []
    seer.share.copy_(shown)
    assert seer.seen == [6]


WORLD = WorldConfig("yard", height=32, width=32, keys={name: ["W"] for name in KEYS})


def collected(folder, told: bool, source: str = "true", recordings: int = 3) -> None:
    """Recordings of 60 frames of the toy."""
    kinds = KINDS if told else {}
    for number in range(recordings):
        logs = play(60, seed=number)
        where = folder / f"{source}-{told}-{number}"
        with Recorder(where, WORLD, source, number, lossless=True, state_kinds=kinds) as recorder:
            for row, state in enumerate(logs.states.tolist()):
                frame = np.full((32, 32, 3), row, np.uint8)
                given = dict(zip(KINDS, state, strict=True)) if told else None
                recorder.add(frame, logs.actions[row].numpy(), reset=row == 0, state=given)


def stage_of(folder, weights: str = "") -> StateStage:
    """Stage `state` on the recordings in `folder`."""
    autoencoder = AutoencoderConfig(4, [4, 4, 4], 1)
    model = ModelConfig(autoencoder=autoencoder)
    save_checkpoint(
        folder / "autoencoder.safetensors", {"autoencoder": Autoencoder(autoencoder)}, model, WORLD
    )
    stage = StateStageConfig(batch=8, unroll=8, frames=50)
    config = TrainConfig("state", world=WORLD, model=model, stages=StagesConfig(state=stage), weights=weights)
    config.data = config.out = str(folder)
    return StateStage(config, torch.device("cpu"), None, 0, 1)


def test_the_stage_trains_predictor_and_reader(tmp_path) -> None:
    collected(tmp_path, True)
    collected(tmp_path, False, recordings=1)  # tells nothing, and spoils nothing
    collected(tmp_path, True, "dream", recordings=2)  # tells what a network believed
    stage = stage_of(tmp_path)
    frames = {60 * count for count in range(1, 4)}  # of the true ones that tell
    assert stage.trains and {len(stage.logs), len(stage.held_out)} <= frames
    given, again = stage.batch(5), stage.batch(5)
    assert torch.equal(given.games.states, again.games.states)
    assert torch.equal(given.pictures.latents, again.pictures.latents)
    before = copy.deepcopy(stage.module.state_dict())
    loss, parts = stage.module(given)
    loss.backward()
    assert torch.isfinite(loss) and "read" in parts
    scores = stage.validate(stage.module)
    assert np.isfinite(list(scores.values())).all() and {"position_read", "health_r2"} <= scores.keys()
    assert stage.picture(stage.module).ndim == 3
    stage.save(tmp_path / "state.safetensors", stage.module, {})
    written = Checkpoint(tmp_path / "state.safetensors")
    assert written.modules == ["autoencoder", "states", "reader", "scene"] and written.model.state.names == [
        *KINDS
    ]
    reader, states = load_reader(written), load_states(written)
    for name, value in reader.state_dict().items():
        assert name == "share" or torch.equal(value, before[f"reader.{name}"]), name
    for name, value in states.state_dict().items():
        assert torch.equal(value, before[f"model.{name}"]), name


@pytest.mark.parametrize("later", [False, True])
def test_given_weights_are_gone_on_from(tmp_path, later: bool) -> None:
    """Those of a later stage, too, whose scene is a part of the denoiser."""
    collected(tmp_path, True)
    first, path = stage_of(tmp_path), tmp_path / "given.safetensors"
    games.shaken(first.module)
    first.save(path, first.module, {})
    if later:
        written = Checkpoint(path)
        denoiser = make_denoiser(written.model, WORLD)
        written.load_into("scene", denoiser.condition.scene)
        made = {"autoencoder": first.autoencoder, "denoiser": denoiser}
        made |= {"states": first.module.model, "reader": load_reader(written)}
        save_checkpoint(path, made, written.model, WORLD)
    again = stage_of(tmp_path, str(path)).module.state_dict()
    for name, value in first.module.state_dict().items():
        assert name == "reader.share" or torch.equal(again[name], value), name


def test_pictures_and_states_belong_together(tmp_path) -> None:
    """Frame n of the toy has the grey level n, and health tells its number."""
    collected(tmp_path, True)
    stage = stage_of(tmp_path)
    recordings = sorted(tmp_path.glob("true-*"))
    cache = LatentsCache.build(recordings, lambda x: x[:, :1, :1, :1].float(), tmp_path / "grey", "grey")
    read = StatePictures.read(cache, tuple(KINDS), 70, 1)
    assert len(read.latents) == 70
    number = read.latents[:, 0, 0, 0].float()
    torch.testing.assert_close(100 - number % 50, read.states[:, 6])
    assert len(stage.pictures.latents) == 50


def test_a_world_without_state_has_nothing_to_train(tmp_path) -> None:
    collected(tmp_path, False)
    stage = stage_of(tmp_path)
    assert not stage.trains and stage.validate(stage.module) == {}
    assert stage.picture(stage.module).ndim == 3
    stage.save(tmp_path / "state.safetensors", stage.module, {})
    written = Checkpoint(tmp_path / "state.safetensors")
    assert written.modules == ["autoencoder"] and written.model.state.names == []
    assert load_states(written) is None and load_reader(written) is None


@pytest.mark.parametrize("sees", [True, False])
def test_play_goes_by_what_is_seen(sees: bool) -> None:
    """Health is read off every finished frame where the reader was found to see it, and else stays."""
    game, spec = games.make_game(), games.SPEC
    health = spec.names.index("health")

    class Reader(StateReader):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return latents.mean((1, 2, 3))[:, None].repeat(1, len(spec)) + 500

    reader = Reader(*games.SHAPE, spec)
    reader.share[health] = 0.9 if sees else 0.1
    told = [Rollout(Generator(games.make_denoiser(True), games.make_states(), r), 2) for r in (reader, None)]
    for rollout in told:
        rollout.reset(game.latents, game.before, game.seed, game.states)
    head, _ = (rollout.step(game.played[0]) for rollout in told)
    here, without = (rollout.carry.state for rollout in told)
    if sees:
        torch.testing.assert_close(here[:, health], reader(head)[:, health])
        assert torch.equal(here[:, :health], without[:, :health])
    else:
        assert torch.equal(here, without)


@pytest.mark.parametrize("reads", [True, False])
def test_a_start_picture_gets_a_state(tmp_path, reads: bool) -> None:
    """A checkpoint without reader still plays, without state."""
    collected(tmp_path, True)
    stage = stage_of(tmp_path)
    stage.save(tmp_path / "state.safetensors", stage.module, {})
    before = Checkpoint(tmp_path / "state.safetensors")
    model = replace(before.model, denoiser=replace(games.SMALL, patch=4))
    modules = {"autoencoder": load_autoencoder(before), "states": load_states(before)}
    modules |= {"reader": load_reader(before)} if reads else {}
    modules |= {"denoiser": make_denoiser(model, WORLD)}
    save_checkpoint(tmp_path / "denoiser.safetensors", modules, model, WORLD)
    session = Session(Player(tmp_path / "denoiser.safetensors", "cpu", "fp32"))
    session.reset(0, np.zeros((1, 32, 32, 3), np.uint8))
    assert set(session.state()) == (set(KINDS) if reads else set())
    session.step(np.array([1, 0, 0], np.float32))
    assert np.isfinite(list(session.state().values())).all()
    known = dict(zip(KINDS, body(3, 4, 50)[0, 0].tolist(), strict=True))
    session.reset(0, np.zeros((1, 32, 32, 3), np.uint8), None, [known])
    assert session.state() == pytest.approx(known), "what the world told is believed"


def test_the_state_of_a_checkpoint_is_measured_on_recordings(tiny_checkpoint, tmp_path) -> None:
    figures = state_of(tiny_checkpoint, tiny_checkpoint.parent, minutes=0.1)
    assert figures["idle_drift"] >= 0 and figures["escapes_per_ten_minutes"] >= 0
    with pytest.raises(UserError, match="no state"):
        stateless = tmp_path / "stateless.safetensors"
        save_checkpoint(stateless, {}, ModelConfig(), WorldConfig())
        state_of(stateless, tiny_checkpoint.parent)


def test_escapes_are_seen(model: StateModel, logs: StateLogs) -> None:
    """The room that a player saw half of is left for ever by a body that walks through the other half."""
    forward = copy.deepcopy(logs)
    forward.actions[:] = keys("forward")[0]
    whole = escapes(model, forward, logs, warm=2, fps=17.5, minutes=0.15)
    assert whole["escapes_per_ten_minutes"] == 0 and whole["never_returned"] == 0
    half = StateLogs(logs.states.clone(), logs.actions, logs.resets)
    half.states[:, 0] = -half.states[:, 0].abs()
    outside = escapes(model, forward, half, warm=2, fps=17.5, minutes=0.15)
    assert outside["escapes_per_ten_minutes"] > 0 and outside["never_returned"] > 0


def test_carry_can_be_picked_apart(model: StateModel) -> None:
    """The generator keeps carries and writes what it reads off pictures into them."""
    carry = model.begin(body(1, 2, 3), keys()[:, None])
    state = carry.state.clone()
    state[0, 6] = 12.0
    assert model.step(StateCarry(carry.hidden, state), keys()).state[0, 6] == 12.0


def test_states_are_computed_in_float32(logs: StateLogs) -> None:
    """Under bfloat16, too: what is rounded in each frame adds up."""
    model = StateModel(SPEC, len(KEYS))
    torch.nn.init.normal_(model.free_rest[-1].weight)
    model.fit(logs.states, logs.actions, logs.resets)
    games = logs.cut(torch.tensor([0, 5]), 40, 8)
    right = model.unroll(model.begin(games.states[:, :8], games.actions[:, :8]), games.actions[:, 8:])
    with torch.autocast("cpu", torch.bfloat16):
        made = model.unroll(model.begin(games.states[:, :8], games.actions[:, :8]), games.actions[:, 8:])
    assert torch.equal(made, right)
