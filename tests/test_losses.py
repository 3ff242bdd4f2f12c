"""What the stages minimise: training sees what play sees, nothing from the future, and it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from games import KEYS, SHAPE, SMALL, SPEC, Game, close, make_denoiser, make_game, make_states
from torch import Tensor, nn

from engine.config import AutoencoderConfig, DenoiserConfig
from engine.data.segments import Clip
from engine.model.autoencoder import Autoencoder, to_float
from engine.model.denoiser import Denoiser
from engine.model.state import StateModel
from engine.model.world_model import Generator
from engine.rollout.rollout import Rollout
from engine.stage_config import DecoderStageConfig, DenoiserStageConfig, DistillStageConfig
from engine.train.decoder import DecoderLoss, finest_octave, sharpness
from engine.train.denoiser import DenoiserLoss
from engine.train.optim import Optimiser
from engine.train.rollout import RolloutLoss

HISTORY = SMALL.action_history
START = SMALL.sink_frames + SMALL.context_frames
EXACT = DenoiserStageConfig(windows=24, context_noise=0.0, stateless=0.0, jitter=0.0)


def played(denoiser: Denoiser, states: StateModel | None, game: Game) -> Clip:
    """A whole game as a batch of recorded segments: its frames, its keys, and the states that it went by."""
    rollout, rows = Rollout(Generator(denoiser, states), len(game.latents)), [game.states]
    rollout.reset(game.latents, game.before, game.seed, game.states if states else None)
    frames = [game.latents]
    for action in game.played:
        frames.append(rollout.step(action)[:, None])
        rows.append(
            rollout.carry.state[:, None].clone() if states else torch.zeros(len(action), 1, len(SPEC))
        )
    actions = torch.cat([game.before, game.played.transpose(0, 1)], 1)
    return Clip(torch.cat(frames, 1), F.pad(actions, (0, 0, HISTORY - 1, 0)), torch.cat(rows, 1))


def random_clip(batch: int = 2, frames: int = 10) -> Clip:
    states = torch.rand(batch, frames, len(SPEC)) * torch.tensor([200, 100, 360, 100, 8, 8.0])
    actions = (torch.rand(batch, HISTORY - 1 + frames, KEYS) < 0.5).float()
    return Clip(torch.randn(batch, frames, *SHAPE), actions, states)


@pytest.mark.parametrize("told", [False, True], ids=["keys alone", "with states"])
@pytest.mark.parametrize("changes", [{}, {"sink_frames": 0}, {"sink_frames": 2, "context_frames": 2}])
def test_training_sees_what_play_sees(told, changes):
    """For the same history, noise and levels, training's windows and single frames get play's conditions and
    play's estimates: through a mask over whole segments there, through rings of keys and values here.
    """
    denoiser, states = make_denoiser(told, **changes), make_states() if told else None
    start = denoiser.config.sink_frames + denoiser.config.context_frames
    game, windows = make_game(batch=2, start=start, frames=9), []
    game.played[3:] = game.played[3]  # from here on windows are under one set of keys
    clip = played(denoiser, states, game)
    hook = denoiser.register_forward_hook(lambda module, given, made: windows.append((given, made.detach())))
    DenoiserLoss(Generator(denoiser, states), replace(EXACT, windows=60))(clip, 0)
    hook.remove()
    rollout, seen = Rollout(Generator(denoiser, states), 2), set()
    for (noisy, sigma, before, condition, frame, _), expected in windows:
        size = noisy.shape[1]
        keys = clip.actions[:, HISTORY - 1 + frame : HISTORY - 1 + frame + size]
        if not (keys == keys[:, :1]).all() or (frame, size) in seen:
            continue
        seen.add((frame, size))
        rollout.reset(game.latents, game.before, game.seed, game.states if states else None)
        for action in game.played[: frame - start]:
            rollout.step(action)
        told_in_play = []

        def same_noise(module, given, noisy=noisy, sigma=sigma, kept=told_in_play):
            kept.append(given)
            return noisy.detach(), sigma, *given[2:]

        hook = denoiser.register_forward_pre_hook(same_noise)
        with torch.no_grad():
            made = (rollout.correct if size == 1 else lambda head, key: rollout.predict(key))(
                clip.latents[:, frame : frame + 1], keys[:, 0]
            )
        hook.remove()
        ((_, _, last, its_condition, its_frame, *_),) = told_in_play
        assert int(its_frame) == frame and close(last, before) and close(its_condition, condition, 1e-3)
        assert close(made, expected, 1e-3), (frame, size)
    assert {size for _, size in seen} == {1, 3} and len(seen) > 4


@pytest.mark.parametrize("told", [False, True])
def test_nothing_comes_from_the_future_or_from_other_games(told):
    """What a window's estimate is made from, its own noisy frames left out: sink, ring and the last frame.
    Half of a batch has another game's sink.
    """
    denoiser, states, made = make_denoiser(told), make_states() if told else None, []
    clip = random_clip(batch=4, frames=11)
    leaves = [clip.latents, clip.actions] + [clip.states] * told
    for leaf in leaves:
        leaf.requires_grad_()
    denoiser.register_forward_pre_hook(lambda module, given: (given[0].detach(), *given[1:]))
    denoiser.register_forward_hook(lambda module, given, out: made.append((given[4], out)))
    DenoiserLoss(Generator(denoiser, states), EXACT)(clip, 0)
    assert len({frame for frame, _ in made}) > 3
    for frame, out in made:
        grads = torch.autograd.grad(out[0].sum(), leaves, retain_graph=True)
        latents, actions = (grad.abs().flatten(2).amax(2) for grad in grads[:2])  # (b, t)
        assert (latents[0, frame - SMALL.context_frames : frame] > 0).all(), "its ring"
        assert not latents[:, frame:].any(), "nothing of what comes is in its history"
        assert not latents[2:].any() and latents[1].nonzero().tolist() == [[0]], "a foreign sink, and no more"
        end = frame + out.shape[1]
        assert actions[0, HISTORY - 1 + end - 1] > 0 and not actions[:, HISTORY - 1 + end :].any()
        if told:
            moved = grads[2].abs().amax(2)
            assert moved[0, end - 1] > 0 and not moved[:, end:].any()
        own = torch.autograd.grad(out[2].sum(), clip.latents, retain_graph=True)[0].abs().flatten(2).amax(2)
        assert own[2, 0] > 0 and not own[[0, 1, 3]].any(), "the other half has its own"


def numbered(numbers: list[float], actions: Tensor) -> Clip:
    """Frames that are a number all over; actions (b, history - 1 + t, k)."""
    latents = torch.tensor(numbers)[None, :, None, None, None].expand(len(actions), -1, *SHAPE)
    return Clip(latents.contiguous(), actions, torch.zeros(len(actions), len(numbers), 0))


def fresh(**changes) -> Denoiser:
    """A denoiser that has learnt nothing: its estimate is the last finished frame."""
    sizes = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    return Denoiser(DenoiserConfig(**sizes | changes), KEYS, 0, *SHAPE)


def test_windows_are_held_against_the_frames_that_follow():
    """Frame t is the number t; whoever repeats the last frame is off by 1, 2 and 3."""
    clip = numbered([float(t) for t in range(12)], torch.zeros(2, HISTORY - 1 + 12, KEYS))
    loss, logs = DenoiserLoss(Generator(fresh()), EXACT)(clip, 0)
    assert logs["head"] == 1 and logs["far"] == 9 and logs["single"] == 1
    singles = (14 / 3 - loss.item()) / (14 / 3 - 1) * EXACT.windows
    assert singles == pytest.approx(round(singles), abs=1e-3) and 0 < round(singles) < EXACT.windows / 2


def test_history_is_rough_in_a_share_of_games_and_the_network_is_told():
    stage = DenoiserStageConfig(windows=1, context_noise=0.4, context_noise_share=0.6, stateless=0.3)
    denoiser, states, told, given = make_denoiser(True), make_states(), [], []
    denoiser.condition.register_forward_hook(lambda module, inputs, made: told.append(inputs))
    denoiser.register_forward_hook(lambda module, inputs, made: given.append(inputs))
    clip = random_clip(batch=200)
    clip.states[:50] = torch.nan
    DenoiserLoss(Generator(denoiser, states), stage)(clip, 0)
    (_, _, before, _, frame, _) = given[0]
    (_, features, has_state, ahead, sigma) = told[1]
    assert ahead.tolist() == list(range(len(ahead))) and torch.equal(sigma, sigma[:, :1].expand_as(sigma))
    level, true = sigma[:, 0], clip.latents[:, frame - 1]
    off = (before[:, 0] - true).flatten(1).norm(dim=1) / (48 * (1 + 1)) ** 0.5  # per level: noise - clean
    assert (off[level == 0] == 0).all() and 0.25 < (level == 0).float().mean() < 0.55
    assert level.max() <= 0.4 and torch.allclose(off, level, rtol=0.5, atol=0.02)
    assert not has_state[:50].any() and 0.55 < has_state[50:, 0].mean() < 0.85
    assert features.isfinite().all(), "what is not known is nothing, not NaN"
    assert (told[0][3] == 0).all() and torch.equal(told[0][4][:, 0], level)


# the model's own frames ---------------------------------------------------------------------------

OWN = DistillStageConfig(
    unroll=4,
    game_frames=12,
    game_groups=1,
    teacher_forcing=0.0,
    jitter=0.0,
    stateless=0.0,
    still_games=0,
)


def by_definition(numbers: list[float], actions: Tensor, begin: int, correction: float) -> Tensor:
    """Mean error of a network that repeats frame START - 1 for ever, over the windows of frames begin …
    begin + unroll: those of their positions up to which the keys are those that were assumed, and the leaving
    frames that are sent back. actions (b, t, k).
    """
    errors, window = [], SMALL.window_frames
    for keys in actions:
        since = window
        for frame in range(START, begin + OWN.unroll):
            since = 0 if (keys[frame] != keys[frame - 1]).any() else since + 1
            if frame < begin:
                continue
            assumed = keys[frame - 1] if correction else keys[frame]
            off = [(numbers[frame + k] - numbers[START - 1]) ** 2 for k in range(window)]
            for k in range(window):
                if (keys[frame : frame + k + 1] == assumed).all():
                    errors.append(off[k])
            if correction and since < window - 1:
                errors.append(off[0])
    return torch.tensor(errors).mean()


@pytest.mark.parametrize("correction", [0.0, 0.9])
def test_own_windows_are_learnt_from_where_their_keys_came_true(correction):
    """A game goes on with its own clip from iteration to iteration, and takes the one at hand when it is
    over.
    """
    loss = RolloutLoss(Generator(fresh(correction=correction)), OWN)
    total = START + OWN.game_frames + 2
    numbers = [0.1 * t + 0.01 * t * t for t in range(total)]
    random = torch.Generator().manual_seed(1)
    for turn in range(9):
        change = torch.rand(2, total, 1, generator=random) < 0.3
        given = (change.cumsum(1) % 2).float().expand(-1, -1, KEYS)
        begin = START + OWN.unroll * (turn % 3)
        keys = given if begin == START else keys  # noqa: F821 (of the turn before)
        value, logs = loss(numbered(numbers, F.pad(given, (0, 0, HISTORY - 1, 0))), turn)
        assert value.item() == pytest.approx(by_definition(numbers, keys, begin, correction).item(), rel=1e-4)
        frame = begin + OWN.unroll - 1
        name = "own_old" if turn % 3 > 0 else "own_young"
        assert logs[name].item() == pytest.approx((numbers[frame] - numbers[START - 1]) ** 2, rel=1e-4)


@pytest.mark.slow
def test_groups_of_games_are_of_different_ages_and_none_is_longer_than_asked():
    stage = DistillStageConfig(game_frames=8, game_groups=4, teacher_forcing=0.0, still_games=0)
    loss, ages = RolloutLoss(Generator(make_denoiser(True), make_states()), stage), []
    clip = random_clip(frames=START + stage.game_frames + 2)
    clip = Clip(*(torch.cat([part, part]) for part in clip))  # four games
    for turn in range(20):
        loss(clip, turn)
        ages.append([game.frame - START for game in loss.games])
        assert [len(game.clip.latents) for game in loss.games] == [1, 1, 1, 1]
    assert all(len(set(row)) == 4 for row in ages[8:]), "no two begin together"
    assert max(map(max, ages)) == stage.game_frames and min(map(min, ages)) == 1


@pytest.mark.parametrize("games, groups, sizes", [(6, 4, [2, 2, 1, 1]), (5, 3, [2, 2, 1]), (2, 4, [1, 1])])
def test_any_number_of_games_is_shared_out(games, groups, sizes):
    stage = DistillStageConfig(game_frames=4, game_groups=groups, teacher_forcing=0.0)
    loss = RolloutLoss(Generator(make_denoiser()), stage)
    for turn in range(6):  # also where they begin anew
        assert loss(random_clip(games, START + stage.game_frames + 2), turn)[0].isfinite()
        assert [len(game.clip.latents) for game in loss.games] == sizes


def test_true_frames_are_as_many_as_windows_need():
    """Also where `clip` is shorter than what a window of this model looks at."""
    stage = DistillStageConfig(teacher_forcing=1.0, windows=4, clip=6, context_noise=0.0)
    denoiser, committed = make_denoiser(context_frames=9), []
    commit = denoiser.commit
    denoiser.commit = lambda clean, *given: committed.append(clean.shape[1]) or commit(clean, *given)
    loss = RolloutLoss(Generator(denoiser), stage)
    assert loss(random_clip(frames=30), 0)[0].isfinite() and committed == [1 + 9 + 3]


def test_own_history_has_no_gradient_and_targets_are_the_true_frames():
    denoiser, states, clip = make_denoiser(True), make_states(), random_clip(frames=START + 11)
    clip.latents.requires_grad_()
    value, _ = RolloutLoss(Generator(denoiser, states), OWN)(clip, 0)
    value.backward()
    grad = clip.latents.grad.abs().flatten(2).amax(2)
    assert not grad[:, :START].any() and (grad.sum(1) > 0).all(), (
        "true frames are where the game began, no more"
    )
    weights = dict(denoiser.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in weights.values())
    assert weights["condition.mlp.0.weight"].grad.abs().max() > 0


@pytest.mark.slow
def test_true_frames_are_mixed_in_and_states_are_kept_back():
    stage = DistillStageConfig(teacher_forcing=0.5, stateless=1.0, windows=2, game_frames=4, clip=12)
    clip, kinds = random_clip(), []
    loss = RolloutLoss(Generator(make_denoiser(True), make_states()), stage)
    for turn in range(16):
        _, logs = loss(clip, turn)
        kinds.append("own_young" in logs or "own_old" in logs)
    assert all(game.rollout.has_state.tolist() == [0] for game in loss.games)
    assert 3 < sum(kinds) < 13
    again = RolloutLoss(Generator(make_denoiser(True), make_states()), stage)
    again = [again(clip, turn)[1] for turn in range(8, 16)]
    assert ["own_young" in x or "own_old" in x for x in again] == kinds[8:], (
        "by what is saved with the weights"
    )


# learning -----------------------------------------------------------------------------------------

TWO = 2  # keys: left and right


def wave(place: Tensor) -> Tensor:
    """A wave at `place` (...), which comes round after 6 → latents (..., c, y, x) of unit variance."""
    phase = (place[..., None] - torch.arange(SHAPE[2])) * (2 * torch.pi / SHAPE[2])
    both = 2**0.5 * torch.stack([phase.cos(), phase.sin()], -2)  # (..., c, x)
    return both[..., None, :].expand(*place.shape, *SHAPE).clone()


def wave_clip(batch: int, frames: int, random: torch.Generator) -> tuple[Clip, Tensor]:
    """A wave that moves left or right by one a frame, as its key says → clip, and its places (b, t)."""
    stays = torch.rand(batch, frames, generator=random) < 0.6
    key = ((~stays).cumsum(1) + torch.randint(2, (batch, 1), generator=random)) % 2
    place = torch.randint(SHAPE[2], (batch, 1), generator=random) + (2 * key - 1).cumsum(1)
    actions = F.pad(F.one_hot(key, TWO).float(), (0, 0, HISTORY - 1, 0))
    return Clip(wave(place), actions, torch.zeros(batch, frames, 0)), place


def descend(loss: DenoiserLoss, steps: int, frames: int, rate: float = 4e-3) -> list[float]:
    """→ the loss of every step."""
    random, losses = torch.Generator().manual_seed(1), []
    optimiser = torch.optim.AdamW(loss.parameters(), lr=rate, betas=(0.9, 0.98))
    for turn in range(steps):
        value, _ = loss(wave_clip(16, frames, random)[0], turn)
        value.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(value.item())
    return losses


@torch.no_grad()
def missed(denoiser: Denoiser, frames: int = 6) -> tuple[float, float]:
    """Own games → error of all their frames, and how often the first one after a key lies nearer to where the
    key leads than to where the other one does.
    """
    clip, place = wave_clip(64, START + frames, torch.Generator().manual_seed(2))
    rollout, actions = Rollout(Generator(denoiser), 64), clip.actions[:, HISTORY - 1 :]
    rollout.reset(clip.latents[:, :START], actions[:, :START], torch.arange(64))
    made = torch.stack([rollout.step(action) for action in actions[:, START:].unbind(1)], 1)
    error = (made - clip.latents[:, START:]).square().mean().item()
    step = place[:, START] - place[:, START - 1]
    there, other = wave(place[:, START - 1] + step), wave(place[:, START - 1] - step)
    near, far = ((made[:, 0] - x).square().flatten(1).sum(1) for x in (there, other))
    return error, (near < far).float().mean().item()


@pytest.mark.slow
def test_it_learns_what_keys_do_and_then_on_its_own_frames():
    """From true frames first; then on its own, where what it has become makes the next."""
    torch.manual_seed(0)
    sizes = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__} | {
        "width": 48,
        "head_dim": 24,
    }
    denoiser = Denoiser(DenoiserConfig(**sizes | {"conv_width": 16}), TWO, 0, *SHAPE)
    assert missed(denoiser)[1] < 0.7
    stage = DistillStageConfig(windows=2, game_frames=8, teacher_forcing=0.2)
    fell = descend(DenoiserLoss(Generator(denoiser), stage), 80, START + 5)
    first, last = sum(fell[:5]) / 5, sum(fell[-10:]) / 10
    plain_error, obeyed = missed(denoiser)
    assert last < 0.5 * first and obeyed > 0.75, f"loss {first:.3f} → {last:.3f}, obeys {obeyed:.2f}"
    descend(RolloutLoss(Generator(denoiser), stage), 25, START + 10)
    error, obeyed = missed(denoiser)
    assert error < 0.5 * plain_error and obeyed > 0.9, f"own games {plain_error:.3f} → {error:.3f}"


# the decoder --------------------------------------------------------------------------------------

SHARP = DecoderStageConfig(discriminator_width=8, gan_weight=1.0, gan_warmup=4)


def pictures(count: int = 4) -> tuple[Autoencoder, Tensor, Tensor]:
    """A tiny autoencoder, true frames (n, 3, h, w) uint8, latents of their colours (n, c, y, x)."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(3, [8, 8, 12], 1)).eval()
    colours = torch.rand(count, 3, 4, 6)
    frames = F.interpolate(colours, scale_factor=8) + 0.1 * torch.randn(count, 3, 32, 48)
    return autoencoder, (255 * frames.clamp(0, 1)).to(torch.uint8), 4 * colours - 2


@pytest.mark.parametrize("turns, share", [(0, 0.25), (1, 0.5), (9, 1.0)])
def test_decoder_and_discriminator_move_only_themselves(turns, share):
    """The gradients of both are those of their own losses, written out, the other one being fixed."""
    autoencoder, frames, latents = pictures()
    loss = DecoderLoss(autoencoder.decoder, SHARP).eval()  # spectral norms stay as they are
    with torch.no_grad():
        for p in loss.decoder.parameters():
            p.add_(0.03 * torch.randn_like(p))
    value, logs = loss((latents, frames), turns)
    value.backward()
    assert all(p.grad is None for p in loss.blurred.parameters())
    found = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    true, made, blurred = to_float(frames), loss.decoder(latents), loss.blurred(latents).detach()
    scores, felt = loss.discriminator(made, blurred)
    features = loss.discriminator(true, blurred)[1]
    matched = sum((f - t.detach()).abs().mean() for f, t in zip(felt, features, strict=True))
    pixels = (made - true).abs().mean() + 2 * (made - true).square().mean()
    (pixels + share * (0.1 * matched - 0.06 * scores.mean())).backward()
    expected = {name: p.grad for name, p in loss.named_parameters() if name.startswith("decoder.")}
    expected = {name: grad.clone() for name, grad in expected.items()}
    loss.zero_grad()
    of_true, of_made = (loss.discriminator(x, blurred)[0] for x in (true, made.detach()))
    hinge = F.relu(1 - of_true).mean() + F.relu(1 + of_made).mean()
    hinge.backward()
    expected |= {n: p.grad for n, p in loss.named_parameters() if n.startswith("discriminator.")}
    assert logs["discriminator"].item() == pytest.approx(hinge.item(), rel=1e-4)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, rtol=1e-3, atol=1e-6), name


def test_the_decoder_learns_and_the_blurred_picture_stays():
    autoencoder, frames, latents = pictures(8)
    loss = DecoderLoss(autoencoder.decoder, replace(SHARP, gan_weight=0.3))
    blurred, seen = loss.blurred(latents), []
    optimiser = Optimiser(loss, SHARP)
    for turn in range(60):
        value, logs = loss((latents, frames), turn)
        value.backward()
        optimiser.step(5e-3, torch.tensor(True))
        optimiser.zero_grad()
        seen.append(logs["psnr"].item())
    assert seen[-1] > seen[0] + 4, f"PSNR {seen[0]:.1f} → {seen[-1]:.1f}"
    assert torch.equal(loss.blurred(latents), blurred)


def test_sharpness_and_the_finest_octave_know_blur():
    sharp = torch.rand(2, 3, 32, 48)
    blurred = F.avg_pool2d(sharp, 3, 1, 1)
    for measure in (sharpness, finest_octave):
        assert 0 < measure(blurred) < 0.7 * measure(sharp)
        assert measure(torch.full((1, 3, 8, 8), 0.3)) < 1e-6
    ramp = torch.arange(8.0)[None, None, None].expand(1, 3, 4, 8)
    assert sharpness(ramp) == 1
