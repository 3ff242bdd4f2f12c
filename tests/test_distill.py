"""Stage `distill`: who learns from what, and that games regain what regression has taken from them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from games import KEYS, SHAPE, SMALL, make_denoiser, make_states
from torch import Tensor, nn

from engine.data.segments import Clip
from engine.model.denoiser import Denoiser
from engine.model.world_model import Generator
from engine.rollout.rollout import Rollout
from engine.stage_config import DistillStageConfig
from engine.train.denoiser import DenoiserLoss
from engine.train.distill import DistillLoss
from engine.train.rollout import RolloutLoss, Windows

START, HISTORY = SMALL.sink_frames + SMALL.context_frames, SMALL.action_history
STRIPES = torch.tensor([1.0, -1.0]).repeat(SHAPE[2] // 2)
OWN = DistillStageConfig(game_frames=6, game_groups=1, teacher_forcing=0.0, still_games=0, lost_threshold=1e6)


def random_clip(batch: int = 2, frames: int = START + 8) -> Clip:
    """Stripes of a sign that nothing foretells, one a frame; random keys and states."""
    signs = (torch.randint(2, (batch, frames, 1, 1, 1)) * 2.0 - 1) * STRIPES
    states = torch.rand(batch, frames, 6) * torch.tensor([200, 100, 360, 100, 8, 8.0])
    actions = (torch.rand(batch, HISTORY - 1 + frames, KEYS) < 0.5).float()
    return Clip(signs.expand(-1, -1, *SHAPE).clone(), actions, states)  # (b, t, c, y, x)


def gradients(seed: int = 1, shake: float = 0.0, **changes) -> tuple[dict[str, Tensor], DistillLoss]:
    """Of one iteration, the critic moved by `shake` beforehand."""
    loss = DistillLoss(
        Generator(make_denoiser(True), make_states()),
        DistillStageConfig(**{**vars(OWN), **changes}),
        make_denoiser(True),
    )
    with torch.no_grad():
        for weight in loss.critic.parameters():
            weight.add_(shake * torch.ones_like(weight))
    torch.manual_seed(seed)
    value, _ = loss(random_clip(), 0)
    value.backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}, loss


def alike(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> bool:
    names = [name for name in one if name.startswith(part)]
    assert names and any(one[name].abs().max() > 0 for name in names)
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in names)


def test_a_student_moves_by_what_its_critic_says_otherwise_than_its_teacher():
    plain, matched = gradients(distribution_weight=0.0)[0], gradients(distribution_weight=5.0)[0]
    assert alike(plain, matched, "generator.denoiser."), (
        "a critic that says what the teacher says moves nothing"
    )
    shaken = gradients(distribution_weight=5.0, shake=0.1)[0]
    assert not alike(plain, shaken, "generator.denoiser.")
    assert alike(plain, gradients(distribution_weight=0.0, shake=0.1)[0], "generator.denoiser.")


def test_each_network_learns_from_its_own_loss_alone():
    plain, matched = gradients(distribution_weight=0.0)[0], gradients(distribution_weight=5.0)[0]
    assert alike(plain, matched, "critic."), "what the student is told does not move the critic"
    _, loss = gradients()
    trained = [name for name, weight in loss.named_parameters() if weight.requires_grad]
    parts = {name.removeprefix("generator.").split(".")[0] for name in trained}
    assert parts == {"denoiser", "critic"}, "the teacher is not trained"


def test_only_averages_are_held_against_the_truth():
    """Frames that differ from the true ones in detail alone are no error."""
    loss = DistillLoss(Generator(make_denoiser(True), make_states()), OWN, make_denoiser(True))
    clip = random_clip()
    value = []
    for by in (0.0, 3.0):
        torch.manual_seed(2)
        loss.games.clear()
        moved = clip.latents.clone()
        moved[:, START:] += by * STRIPES
        loss.forward(Clip(moved, clip.actions, clip.states), 0)
        value.append(loss.logs["coarse"].item())
    assert value[0] == pytest.approx(value[1], rel=1e-4)
    torch.manual_seed(2)
    loss.games.clear()
    loss.forward(
        Clip(clip.latents + 3.0 * (torch.arange(START + 8) >= START)[:, None, None, None], *clip[1:]),
        0,
    )
    assert loss.logs["coarse"].item() > 2 * value[0]


def still_clip(batch: int = 2) -> Clip:
    """As `random_clip`, but from the start's last frame on nothing moves."""
    clip = random_clip(batch)
    clip.latents[:, START:] = clip.latents[:, START - 1 : START]
    return clip


def test_where_the_true_game_stands_still_neither_teacher_nor_critic_has_a_say():
    def moved(distribution: float, clip: Clip) -> dict[str, Tensor]:
        loss = DistillLoss(
            Generator(make_denoiser(True), make_states()),
            DistillStageConfig(**{**vars(OWN), "distribution_weight": distribution}),
            make_denoiser(True),
        )
        with torch.no_grad():
            for weight in loss.critic.parameters():
                weight.add_(0.1)
        torch.manual_seed(1)
        loss(clip, 0)[0].backward()
        return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}

    still, walk = still_clip(), random_clip()
    assert alike(moved(0.0, still), moved(5.0, still), "generator.denoiser.")
    assert not alike(moved(0.0, walk), moved(5.0, walk), "generator.denoiser.")


def clip_of(numbers: list[float]) -> Clip:
    """A game whose frame t is numbers[t] all over, without keys."""
    latents = torch.tensor(numbers)[None, :, None, None, None].expand(2, -1, *SHAPE).clone()
    t = len(numbers)
    return Clip(latents, torch.zeros(2, HISTORY - 1 + t, KEYS), torch.zeros(2, t, 6))


def test_what_stands_still_is_held_against_what_was_shown_when_that_began():
    """Not against the own frame before, which may have left it already, nor against the true one."""
    walk = [0.3 * t for t in range(START + 3)]  # own frames 0, 1, 2 move, those after them do not
    loss = DistillLoss(
        Generator(make_denoiser(True)),
        DistillStageConfig(**{**vars(OWN), "stop_share": 0.0}),
        make_denoiser(True),
    )
    clip, shown, made = clip_of(walk + walk[-1:] * 6), [], []
    errors = loss.window_errors
    loss.window_errors = lambda rollout, windows: shown.append(windows) or errors(rollout, windows)
    for turn in range(6):
        loss(clip, turn)
        made.append(loss.games[0].rollout.last[:, 1:].clone())
    assert [windows.still[0].tolist() for windows in shown[:4]] == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [1, 1, 1],
    ]
    for number, windows in enumerate(shown):
        before = clip.latents[:, START - 1 : START] if number == 0 else made[min(number - 1, 2)]
        assert torch.equal(windows.own_reference, before), number
    assert not torch.equal(made[2], made[4]), "own frames differ, or this test could not fail"
    windows = shown[5]
    away = (windows.predicted - windows.own_reference).square().mean()
    assert (
        loss.logs["still_change"].item() == pytest.approx(away.item(), rel=1e-5)
        and loss.logs["still_share"].item() == 1
    )


@pytest.mark.parametrize("stop", [0.0, 1.0])
def test_games_whose_truth_stands_still_may_stand_so_to_their_end(stop):
    """Where it does so under keys that were held for as long as they count."""
    numbers = [0.3 * t for t in range(START + 6)]
    numbers[START + 1] = numbers[START]  # still once, while a key has just been let go
    numbers[START + 4] = numbers[START + 3]
    clip = clip_of(numbers)
    clip.actions[:, : HISTORY - 1 + START + 1, 0] = 1
    clip.actions[:, HISTORY - 1 + START + 5 :, 1] = 1
    stage = DistillStageConfig(**{**vars(OWN), "stop_share": stop, "stateless": 0.0})
    loss = RolloutLoss(Generator(make_denoiser()), stage)
    played = overheard(loss, clip, 6)
    true, actions = clip.latents.clone(), clip.actions[:, HISTORY - 1 :].clone()
    if stop:
        true[:, START + 4 :] = true[:, START + 4 : START + 5]
        actions[:, START + 4 :] = actions[:, START + 4 : START + 5]
    for number, windows in enumerate(played[:4]):
        assert torch.equal(windows.true, true[:, START + number : START + number + 3])
        assert torch.equal(windows.action, actions[:, START + number])


def overheard(loss: RolloutLoss, clip: Clip, turns: int) -> list[Windows]:
    """The windows of the last group of games, one a turn."""
    heard, errors = [], loss.window_errors
    loss.window_errors = lambda rollout, windows: heard.append(windows) or errors(rollout, windows)
    for turn in range(turns):
        loss(clip, turn)
    return heard[len(loss.all_games) - 1 :: len(loss.all_games)]


@pytest.mark.parametrize("skip", [0, 4])
def test_some_games_stand_still_for_longer_than_any_recording(skip):
    """Those that come to stand first; nothing is learnt where it is not known what is true."""
    clip = Clip(*(torch.cat(parts) for parts in zip(random_clip(3), still_clip(2), strict=True)))
    clip = clip._replace(actions=torch.zeros_like(clip.actions))
    n = clip.latents.shape[1]
    clip.latents[:3] += 0.3 * torch.arange(n)[:, None, None, None]  # they never stand still
    stage = DistillStageConfig(**{**vars(OWN), "still_games": 3, "still_frames": 40, "still_skip": skip})
    loss = RolloutLoss(Generator(make_denoiser()), stage)
    turns = 40 // (skip + 1)  # of one game
    played = overheard(loss, clip, turns + 5)
    assert loss.still_game.frame == START + 5 * (skip + 1), "the second game has gone on five times"
    for turn, windows in enumerate(played):
        number = turn % turns * (skip + 1) + skip
        true = clip.latents[3:, START - 1][:, None].expand(-1, 3, -1, -1, -1)
        assert torch.equal(windows.true[:2], true) and windows.valid[:2].all()
        assert windows.valid[2].all() == (START + number + 3 <= n)
        assert windows.still[:2].all() and not windows.action.any()
    anchors = torch.stack([windows.own_reference[:2] for windows in played[:turns]])
    assert (anchors == anchors[0]).all(), "what they are held against stays the same for as long"


def test_what_has_left_its_picture_is_asked_to_be_plausible():
    """Neither is it drawn back to what it cannot know any more, nor is it free to become anything."""

    def moved(**changes) -> dict[str, Tensor]:
        torch.manual_seed(0)
        networks = make_denoiser(True), make_states(), make_denoiser(True)
        loss = DistillLoss(
            Generator(*networks[:2]), DistillStageConfig(**{**vars(OWN), **changes}), networks[2]
        )
        with torch.no_grad():
            for weight in loss.critic.parameters():
                weight.add_(0.1)
        torch.manual_seed(1)
        loss(still_clip(), 0)[0].backward()
        return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}

    one, other = moved(lost_threshold=1e-9, still_weight=1.0), moved(lost_threshold=1e-9, still_weight=9.0)
    assert alike(one, other, "generator.denoiser.")
    assert not alike(one, moved(lost_threshold=1e-9, distribution_weight=5.0), "generator.denoiser.")
    assert not alike(
        moved(lost_threshold=1e6, still_weight=1.0),
        moved(lost_threshold=1e6, still_weight=9.0),
        "generator.denoiser.",
    )


def test_games_under_way_go_on_elsewhere():
    """With what `resume_state` tells, as plain values and tensors, another loss plays on just the same."""
    clip = Clip(*(torch.cat(parts) for parts in zip(random_clip(3), still_clip(1), strict=True)))
    stage = DistillStageConfig(**{**vars(OWN), "game_groups": 2, "still_games": 2, "still_frames": 30})
    loss = RolloutLoss(Generator(make_denoiser(True), make_states()), stage)
    for turn in range(4):
        loss(clip, turn)
    file = io.BytesIO()
    torch.save(loss.resume_state(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = RolloutLoss(copy.deepcopy(loss.generator), stage)
    other.load_resume_state(saved)
    for turn in range(4, 8):
        values = []
        for one in (loss, other):
            torch.manual_seed(turn)
            values.append(one(clip, turn)[0].item())
        assert values[0] == values[1]
    for one, two in zip(loss.all_games, other.all_games, strict=True):
        assert (one.frame, one.end) == (two.frame, two.end)
        assert torch.equal(one.rollout.last, two.rollout.last) and torch.equal(
            one.own_reference, two.own_reference
        )


@torch.no_grad()
def restlessness(denoiser: Denoiser) -> float:
    """Mean square by which the frames of own games change where the true ones do not."""
    clip, rollout = still_clip(16), Rollout(Generator(denoiser), 16)
    actions = clip.actions[:, HISTORY - 1 :]
    rollout.reset(clip.latents[:, :START], actions[:, :START], torch.arange(16))
    made = torch.stack([rollout.step(action) for action in actions[:, START:].unbind(1)], 1)
    return (made[:, 1:] - made[:, :-1]).square().mean().item()


@pytest.mark.slow
def test_own_games_learn_to_stand_still():
    torch.manual_seed(0)
    student = make_denoiser()
    loss = DistillLoss(Generator(student), OWN, copy.deepcopy(student))
    before = restlessness(student)
    descend(loss, 60, 1e-2, still_clip)
    after = restlessness(student)
    assert after < 0.2 * before, f"{before:.3f} → {after:.3f}"


def descend(loss: nn.Module, steps: int, rate: float, clip: Callable[[int], Clip] = random_clip) -> None:
    trained = [p for p in loss.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, rate, betas=(0.9, 0.98))
    for turn in range(steps):
        loss(clip(16), turn)[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def boldness(denoiser: Denoiser) -> float:
    """Mean square of the latents of own games; 1 in the true ones."""
    clip, rollout = random_clip(32), Rollout(Generator(denoiser), 32)
    actions = clip.actions[:, HISTORY - 1 :]
    rollout.reset(clip.latents[:, :START], actions[:, :START], torch.arange(32))
    return (
        torch.stack([rollout.step(action) for action in actions[:, START:].unbind(1)]).square().mean().item()
    )


@pytest.mark.slow
def test_games_regain_what_regression_has_taken_from_them():
    """The best guess of a sign that nothing foretells is 0, which no true frame is."""
    torch.manual_seed(0)
    teacher = Denoiser(SMALL, KEYS, 0, *SHAPE)
    descend(DenoiserLoss(Generator(teacher), DistillStageConfig(memoryless=0.8, windows=2)), 200, 3e-3)
    student = copy.deepcopy(teacher)
    descend(RolloutLoss(Generator(student), OWN), 100, 3e-3)
    before = boldness(student)
    descend(DistillLoss(Generator(student), OWN, teacher), 200, 2e-3)
    after = boldness(student)
    assert before < 0.3 and after > 2 * before, f"{before:.2f} → {after:.2f}"
