"""The student learns on its own games: schedule, gradients against written-out ones, and progress."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import train
from engine import distillation, matching
from engine.autoencoder import Autoencoder
from engine.checkpoint import Checkpoint, save_checkpoint
from engine.config import DenoiserConfig, StageConfig, TrainConfig, UserError, load_config
from engine.denoiser import Denoiser
from engine.distillation import DistillLoss, endless, shortened
from engine.kv_cache import KVCache
from engine.matching import Clip, critic_loss, matching_loss
from engine.motion import Guess
from engine.optim import Optimiser, learning_rate, moving_average
from engine.recording import Recorder
from engine.rollout import Rollout
from engine.session import Player

KEYS, SHAPE = 2, (2, 4, 6)
SMALL = {"width": 48, "layers": 2, "head_dim": 24, "patch": 2, "sink": 1, "fine": 16, "stem": 1, "head": 1}
SMALL |= {"window": 3, "recent": 3, "ladder": [0.5, 0.8, 1.0], "correction": 0.8}
PACE = StageConfig(unroll=6, critic_turns=2, far=0, alone_share=0.0, regression=0.0, warmup=10, ema=0.95)
PACE = replace(PACE, flip_share=0.0, jitter=0.0)


def tiny(seed: int = 0, scramble: float = 0.1, **changes) -> Denoiser:
    """An untrained denoiser whose every weight matters: gates that start at zero would hide mistakes."""
    torch.manual_seed(seed)
    denoiser = Denoiser(DenoiserConfig(**{**SMALL, **changes}), KEYS, *SHAPE)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            small = parameter.ndim == 4 or name.startswith("motion")
            parameter.add_(scramble * (0.2 if small else 1) * torch.randn_like(parameter))
    return denoiser


def three(pace: StageConfig = PACE, **changes) -> DistillLoss:
    return DistillLoss(*(tiny(seed, **changes) for seed in range(3)), pace)


def segments(batch: int = 2, frames: int = 12) -> tuple[Tensor, Tensor]:
    """Frame t is about the number t, and its keys are its own."""
    made = torch.Generator().manual_seed(5)
    latents = 0.1 * torch.arange(frames)[:, None, None, None] + torch.randn(
        batch, frames, *SHAPE, generator=made
    )
    return latents, (torch.rand(batch, frames, KEYS, generator=made) < 0.5).float()


class Choice(random.Random):
    """Says what is to be drawn: shares by `random`, then the phase."""

    def __init__(self, phase: int):
        super().__init__(0)
        self.phase = phase

    def randrange(self, *given) -> int:
        return self.phase


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize("alone", [False, True])
def test_only_windows_that_do_not_overlap_keep_gradients(alone, phase, monkeypatch):
    """Every third step of six, none of the passes that fill the window at the start, none of the commits."""
    loss, passes = three(replace(PACE, alone_share=float(alone))), []
    forward = loss.student.transformer.forward

    def watched(missed, guess, before, sigma, *rest, unpainted=0):
        kind = "commit" if unpainted == missed.shape[1] else sigma.shape[1] - unpainted
        passes.append((kind, torch.is_grad_enabled(), sigma[0].tolist()))
        return forward(missed, guess, before, sigma, *rest, unpainted=unpainted)

    monkeypatch.setattr(loss.student.transformer, "forward", watched)
    latents, actions = segments()
    actions[:] = actions[:, :1]  # held, so that play corrects nothing
    clips, _ = loss.play(latents, actions, Choice(phase), learns=True)
    assert len(clips) == 2 and all(clip.made.requires_grad for clip in clips)
    assert all(clip.made.shape[1] == (1 if alone else 3) for clip in clips)
    made = [(kind, gradient) for kind, gradient, _ in passes if kind != "commit"]
    assert made[:2] == [(3, False)] * 2, "ramp-up"
    size = 1 if alone else 3
    steps = [gradient for kind, gradient in made[2:] if kind == size]
    assert steps == [step % 3 == phase for step in range(phase + 4)], "none behind the last one"
    assert not any(gradient for kind, gradient, _ in passes if kind == "commit")
    levels = [sigma[-size:] for kind, gradient, sigma in passes if gradient]
    assert levels == [pytest.approx([0.8] if alone else SMALL["ladder"])] * 2


@pytest.mark.parametrize("commit_position", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_a_clip_has_the_actions_that_its_window_was_told(alone, commit_position, monkeypatch):
    """And its past the frames before it, each with the action that was committed with it."""
    loss = three(replace(PACE, alone_share=float(alone)), commit_position=commit_position)
    told, taken = [], []
    encode, take = loss.student.actions.forward, distillation.Rollout.advance

    def watched(actions, known, dropped=None):
        if torch.is_grad_enabled():
            told.append((actions.clone(), known.clone()))
        return encode(actions, known, dropped)

    def advanced(rollout, *given, **named):
        head = take(rollout, *given, **named)
        taken.append((head, rollout.cache.held[:, -1].clone()))
        return head

    monkeypatch.setattr(loss.student.actions, "forward", watched)
    monkeypatch.setattr(distillation.Rollout, "advance", advanced)
    latents, actions = segments()
    clips, _ = loss.play(latents, actions, Choice(1), learns=True)
    assert len(told) == len(clips) == 2
    for step, clip, (shown, known) in zip((1, 4), clips, told, strict=True):
        assert torch.equal(clip.shown, shown) and torch.equal(clip.known, known)
        ahead = 0 if alone else 1  # frame by frame the true keys are known, a window is denoised before
        newest, certain = actions[:, 4 + step - ahead], 1 if alone else commit_position + 1
        assert known[0].tolist() == [1.0] * certain + [0.0] * (shown.shape[1] - certain)
        # the leaving frame's, bound when it came to position c
        own = actions[:, 4 + step - max(ahead, commit_position)]
        expected = torch.stack([own, newest, newest][: 1 + 2 * (not alone)], 1)
        assert torch.equal(shown, expected)
        frames = [*latents[:, :4].unbind(1), *(head for head, _ in taken[:step])]
        held = [*actions[:, :4].unbind(1), *(action for _, action in taken[:step])]
        assert torch.equal(clip.past.latents, torch.stack(frames[-4:], 1))
        assert torch.equal(clip.past.actions, torch.stack(held[-4:], 1))
        assert torch.equal(clip.past.sink, latents[:, :1])
        assert not any(x.requires_grad for x in (*clip.past, *clip.guess, clip.shown))


def test_training_plays_what_play_plays():
    """Number for number: with gradients and without, the frames that come out are those of `Rollout.step`."""
    loss, (latents, actions) = three(), segments()

    def same(one: Tensor, other: Tensor) -> None:
        """To the last bit; where gradients are wanted attention sums in another order, and with AVX2 alone
        oneDNN does for batches of other sizes.
        """
        exact = not learns and torch.backends.cpu.get_cpu_capability() != "AVX2"
        assert torch.allclose(one, other, atol=0 if exact else 1e-5, rtol=0)

    for learns in (False, True):
        torch.manual_seed(3)
        clips, _ = loss.play(latents, actions, Choice(2), learns)
        torch.manual_seed(3)
        rollout = Rollout(loss.student, 2)
        rollout.reset(latents[:, :4], actions[:, :4], torch.randint(2**31, (2,)))
        frames = [*latents[:, :4].unbind(1)]
        for step in range(6):
            if step % 3 == 2:
                clip = clips[step // 3]
                same(clip.past.latents, torch.stack(frames[-4:], 1))
                with torch.no_grad():
                    made = rollout.predict(rollout.told(actions[:, 4 + step]))
                same(clip.made, made)
            frames.append(rollout.step(actions[:, 4 + step]))
        same(loss.rollout.cache.last[:, 1], frames[-1])


def test_a_game_that_has_gone_on_is_played_under_the_keys_of_others_and_has_no_true_frames():
    pace = replace(PACE, batch=2, far=30, far_share=1.0, regression=1.0)
    loss, (latents, actions) = three(pace), segments()
    clips, errors = loss.play(latents, actions, random.Random(1), learns=True)
    assert not errors and int(loss.rollout.cache.frame) > 4 + 6 + 3
    assert loss.play(latents, actions, random.Random(2), learns=True)[1] == []
    near = three(replace(pace, far_share=0.0))
    errors = near.play(latents, actions, Choice(0), learns=True)[1]
    assert len(errors) == 2 and all(error.requires_grad and error.shape == (2, 3) for error in errors)
    keys = endless(torch.arange(6.0).view(2, 3, 1), 1)
    assert [next(keys)[:, 0].tolist() for _ in range(6)] == [[1, 4], [2, 5], [3, 0], [4, 1], [5, 2], [0, 3]]


@pytest.mark.parametrize("sink", [1, 0])
def test_a_long_game_goes_on_from_where_it_was_left_until_it_is_old(sink, monkeypatch):
    pace = replace(PACE, batch=2, far=5, far_share=1.0, longest=30)
    loss, (latents, actions) = three(pace, sink=sink), segments()
    begun, taken = [], []
    reset, take = Rollout.reset, Rollout.advance
    monkeypatch.setattr(Rollout, "reset", lambda r, *given: begun.append(given[:2]) or reset(r, *given))
    monkeypatch.setattr(Rollout, "advance", lambda *a, **k: taken.append(take(*a, **k)) or taken[-1])
    start, ages, left = sink + 3, [], None
    for iteration in range(12):
        taken.clear()
        clips, _ = loss.play(latents, actions, random.Random(iteration), learns=False)
        frames, keys = begun[-1]
        if left is None:
            assert torch.equal(frames, latents[:, :start]) and torch.equal(keys, actions[:, :start])
        else:
            first, kept = (latents[:, :sink], actions[:, :sink]), left
            assert torch.equal(frames, torch.cat([first[0], kept[0][:, -3:]], 1))
            assert torch.equal(keys, torch.cat([first[1], kept[1][:, -3:]], 1))
        assert all(torch.equal(clip.past.sink, latents[:, :sink]) for clip in clips)
        ages.append(len(taken) + (ages[-1] if left else 0))
        held = loss.rollout.cache.held[:, -1]
        left = (torch.stack(taken, 1), loss.long_actions.clone()) if ages[-1] < 30 else None
        assert torch.equal(loss.long_latents[:, -3:], torch.stack(taken[-3:], 1))
        assert torch.equal(loss.long_actions[:, -1], held)
        assert int(loss.age) == (ages[-1] if left else 0)
    assert ages.count(max(ages)) < 12 and min(ages) < 15 and max(ages) >= 30, "several games"
    loss.long_latents.fill_(float("nan"))
    loss.age.fill_(1)
    loss.play(latents, actions, random.Random(0), learns=False)
    assert loss.age == 0, "what is no picture any more is not gone on with"


@pytest.mark.parametrize("flip", [0, 1, 2])
def test_keys_change_by_each_scored_window(flip, monkeypatch):
    """Game i goes on under the keys of game i - 1, then i - 2, from `flip` steps before each scored window
    on; of what follows no true frames are known.
    """

    class Chosen(Choice):
        def randrange(self, *given) -> int:  # first the phase, then the flip
            self.phase, drawn = flip, self.phase
            return drawn

    loss = three(replace(PACE, flip_share=1.0, regression=1.0, unroll=7))
    latents, actions = segments(3)
    actions[:] = torch.arange(3)[:, None, None]
    taken, take = [], distillation.Rollout.advance

    def advanced(rollout, clean, action, **named):
        taken.append(action[:, 0].tolist())
        return take(rollout, clean, action, **named)

    monkeypatch.setattr(distillation.Rollout, "advance", advanced)
    clips, errors = loss.play(latents, actions, Chosen(0), learns=True)
    assert not errors and len(clips) == 3
    turns = [sum((step + flip) % 3 == 0 for step in range(last + 1)) for last in range(7)]
    assert taken == [[(game - turn) % 3 for game in range(3)] for turn in turns]


def slow_memory(denoiser: Denoiser, clip: Clip, game: int) -> KVCache:
    """Of one game, through a cache as play has it: the newest frames' own, and the sink of another start."""
    past, nobody = clip.past, torch.zeros(1, dtype=torch.int64)
    rollout, other = Rollout(denoiser, 1), Rollout(denoiser, 1)
    rollout.reset(past.latents[[game]], past.actions[[game]], nobody)
    other.reset(past.sink[[game]].expand(1, 4, *SHAPE), past.sink_actions[[game]].expand(1, 4, KEYS), nobody)
    cache = rollout.cache
    cache.anchor.copy_(other.cache.anchor)
    cache.buffer[:, 1, :, cache.ring : cache.ring + 1] = other.cache.buffer[
        :, 1, :, cache.ring : cache.ring + 1
    ]
    rollout._place_sink()
    return cache


def one_clip(size: int = 3) -> Clip:
    loss = three(replace(PACE, alone_share=float(size == 1)))
    clips, _ = loss.play(*segments(), Choice(2), learns=True)
    return clips[1]._replace(made=clips[1].made.detach().requires_grad_())


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("size", [1, 3])
def test_the_distributions_gradient_is_the_written_out_one(size, guidance, monkeypatch):
    """Game by game, through a cache as play has it; scores written as scores, with the level's factor off."""
    teacher, critic, clip = tiny(1), tiny(2), one_clip(size)
    noise, sigma = torch.randn_like(clip.made), torch.tensor([[0.3], [0.8]]).expand(2, size)
    monkeypatch.setattr(matching, "one_level", lambda _: (noise, sigma))
    loss, logs = matching_loss(teacher, critic, clip, guidance)
    loss.backward()
    assert not any(p.grad is not None for network in (teacher, critic) for p in network.parameters())
    for game in range(2):
        x, level, doubt = clip.made[[game]].detach(), sigma[game, 0].item(), clip.guess.doubt[[game]]
        guess = Guess(clip.guess.mean[[game]], doubt)
        told = sigma[[game]], clip.shown[[game]], clip.known[[game]]

        @torch.no_grad()
        def clean(network, noisy, dropped=None, game=game, told=told, guess=guess) -> Tensor:
            cache = slow_memory(network, clip, game)
            cache.look(size)
            return network(noisy, *told, 4, cache, dropped, guess)

        noisy = (1 - level) * x + level * doubt * noise[[game]]
        scores = [-(noisy - (1 - level) * clean(n, noisy)) / (level * doubt) ** 2 for n in (teacher, critic)]
        if guidance:
            blind = clean(teacher, (1 - level) * x + level * noise[[game]], torch.ones(1, size) > 0)
            known = scores[0] + noisy / (level * doubt) ** 2  # what the score says of the clean frame
            keys = known - (1 - level) * blind / (level * doubt) ** 2
            scores[0] = scores[0] + guidance * keys * doubt.square().clamp_max(1)
        real = (scores[0] * (level * doubt) ** 2 + noisy) / (1 - level)
        gradient = (scores[1] - scores[0]) * (level * doubt) ** 2 / (1 - level)
        gradient = gradient / (x - real).abs().mean() / clip.made.numel()
        assert gradient.abs().max() > 1e-6
        assert torch.allclose(clip.made.grad[[game]], gradient, rtol=1e-3, atol=1e-5)
    assert logs["pull"] > 0


def test_a_student_that_is_what_the_teacher_says_is_left_alone():
    """No difference of the two, no gradient; NaN nowhere."""
    teacher, clip = tiny(1), one_clip()
    loss, logs = matching_loss(teacher, copy.deepcopy(teacher), clip, 0.0)
    loss.backward()
    assert loss == 0 and not clip.made.grad.any() and logs["apart"] == 0


def test_turns_move_their_own_weights_alone():
    """Two critic's turns, then the student's; the teacher never."""
    loss = three(replace(PACE, regression=0.5))
    batch, seen = segments(), []
    before = copy.deepcopy(loss.teacher.state_dict())
    for _ in range(6):
        loss.zero_grad(set_to_none=True)
        value, logs = loss(batch)
        value.backward()
        having = {name.split(".")[0] for name, p in loss.named_parameters() if p.grad is not None}
        seen.append(having)
        assert value.isfinite() and ("critic" in logs) == (having == {"critic"})
    assert seen == [{"critic"}, {"critic"}, {"student"}] * 2
    assert all(torch.equal(value, before[name]) for name, value in loss.teacher.state_dict().items())
    assert not any(p.requires_grad for p in loss.teacher.parameters())


def test_no_gradient_flows_into_the_past_and_none_comes_of_what_is_overwritten():
    """A window's gradient at the end of the game, when the ring has moved on, is what it was at once."""
    loss, (latents, actions) = three(), segments()
    latents = latents.requires_grad_()
    weight = loss.student.transformer.layers[0].attention.qkv.weight

    def gradient(unroll: int) -> Tensor:
        loss.pace = replace(PACE, unroll=unroll)
        torch.manual_seed(4)
        clips, _ = loss.play(latents, actions, Choice(1), learns=True)
        found = torch.autograd.grad(clips[0].made.square().sum(), [weight, latents], allow_unused=True)
        assert found[1] is None, "nothing flows back through the frames before"
        return found[0]

    at_once, late = gradient(2), gradient(6)
    assert at_once.abs().max() > 0 and torch.equal(at_once, late)
    assert not loss.rollout.cache.buffer.requires_grad and not loss.rollout.window.clean.requires_grad


def test_half_precision_does_not_lose_the_students_gradient():
    """Autocast may hand out weights that were cast in a pass without gradients."""
    loss = three(replace(PACE, critic_turns=0))
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = loss(segments())
    value.backward()
    layer = loss.student.transformer.layers[0]
    assert all(w.grad is not None and w.grad.any() for w in (layer.attention.qkv.weight, layer.mlp_in.weight))


def test_the_critic_learns_what_the_student_makes():
    """Its loss on fixed clips, with fixed noise, falls."""
    critic, optimiser = tiny(2), None
    loss = three()
    clips, _ = loss.play(*segments(8), Choice(0), learns=False)
    clip = matching.merged(clips)
    optimiser = torch.optim.AdamW([p for p in critic.parameters() if p.requires_grad], lr=3e-3)

    @torch.no_grad()
    def measured() -> float:
        torch.manual_seed(1)
        return sum(critic_loss(critic, clip).item() for _ in range(4)) / 4

    before = measured()
    torch.manual_seed(2)
    for _ in range(30):
        critic_loss(critic, clip).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert measured() < 0.7 * before


def test_a_shorter_window_keeps_all_that_its_weights_say():
    """Of the flow's weights those for frames that are no longer in the window go; the others are the same."""
    made = tiny(1)
    short = shortened(made, tiny(2, window=2, ladder=[0.6, 1.0]))
    last, held, actions = torch.randn(2, 2, *SHAPE), torch.rand(2, 4, KEYS), torch.rand(2, 2, KEYS)
    for one, other in zip(made.motion(last, held, actions), short.motion(last, held, actions), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    loss = DistillLoss(short, made, copy.deepcopy(made), PACE)
    clips, _ = loss.play(*segments(), Choice(1), learns=True)
    assert [clip.made.shape[1] for clip in clips] == [2, 2, 2]
    with pytest.raises(UserError, match="window"):
        shortened(short, tiny(0))


def wave(place: Tensor) -> Tensor:
    """A wave at `place` (...), which comes round after 6 → latents (..., c, y, x) of unit variance."""
    phase = (place[..., None] - torch.arange(SHAPE[2])) * (2 * torch.pi / SHAPE[2])
    both = 2**0.5 * torch.stack([phase.cos(), phase.sin()], -2)  # (..., c, x)
    return both[..., None, :].expand(*place.shape, *SHAPE).clone()


def world(batch: int, frames: int, made: torch.Generator) -> tuple[Tensor, Tensor]:
    """A wave that moves left or right by one a frame, as its key says → latents, actions."""
    key = torch.randint(2, (batch, frames), generator=made)
    start = torch.randint(SHAPE[2], (batch, 1), generator=made)
    place = start + (2 * key - 1).cumsum(1)
    return wave(place), torch.nn.functional.one_hot(key, 2).float()


def fit(module: torch.nn.Module, loss, pace: StageConfig, steps: int) -> torch.nn.Module:
    """→ the moving average of the module, after `steps` of what `loss` says."""
    optimiser, average = Optimiser(module, pace), moving_average(module, pace.ema)
    for step in range(steps):
        loss()[0].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), pace.grad_clip)
        optimiser.step(learning_rate(pace, step, step / steps))
        optimiser.zero_grad()
        average.update_parameters(module)
    return average.module


@torch.no_grad()
def after_twenty_steps(denoiser: Denoiser) -> tuple[float, float, float]:
    """Of 64 games' own frames 17 to 24: how often they move as the key says, going by the nearest pictures
    that the world has; how far from these they are, and how far from the true frames, both mean squares.
    """
    latents, actions = world(64, 28, torch.Generator().manual_seed(5))
    rollout = Rollout(denoiser.eval(), 64)
    rollout.reset(latents[:, :4], actions[:, :4], torch.arange(64))
    made = torch.stack([rollout.step(action) for action in actions[:, 4:].unbind(1)], 1)[:, -8:]
    off, nearest = (made[:, :, None] - wave(torch.arange(6.0))).square().flatten(3).mean(3).min(2)
    obeyed = (nearest[:, 1:] - nearest[:, :-1]) % 6 == torch.where(actions[:, -7:, 1] > 0, 1, 5)
    return obeyed.float().mean().item(), off.mean().item(), (made - latents[:, -8:]).square().mean().item()


def test_the_student_gets_better_than_its_start():
    """By how often frames behind sixteen of its own still move as the key says; and they are about as near to
    the true ones, and to any that the world has.
    """
    teacher = tiny(0, scramble=0.0)
    teacher.motion.doubt_out.bias.data.zero_()  # an unmoved wave is off by about 1, as the guess would learn
    teacher.motion.calm.data.fill_(9)
    made = torch.Generator().manual_seed(1)
    plain = replace(PACE, learning_rate=3e-3, ema=0.9)
    teacher = fit(teacher, lambda: teacher.loss(*world(16, 8, made), windows=2), plain, 150)
    before = after_twenty_steps(teacher)
    pace = replace(PACE, batch=16, far=20, longest=200, alone_share=0.5)
    pace = replace(pace, learning_rate=3e-4, regression=0.1, guidance=0.5)
    loss = DistillLoss(copy.deepcopy(teacher), teacher, copy.deepcopy(teacher), pace)
    student = fit(loss, lambda: loss(world(16, 12, made)), pace, 120).student
    after = after_twenty_steps(student)
    said = f"obeyed, off, wrong: {before} → {after}"

    assert after[0] > before[0] + 0.08 and after[1] < 1.1 * before[1] and after[2] < 1.1 * before[2], said


# as a stage of train.py

PLAIN = ("preset=toy", "stage=distill", "device=cpu", "precision=fp32", "threads=1", "max_minutes=1000")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with recordings of a picture that moves (data) and networks that have learnt nothing."""
    folder = tmp_path_factory.mktemp("distillation")
    config = load_config("train", TrainConfig, list(PLAIN))
    frames = np.random.default_rng(0).integers(0, 255, (1, 6, 8, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    with Recorder(folder / "data" / "walk", config.world, "true", 0, lossless=True) as recorder:
        for number in range(60):
            keys = np.eye(len(config.world.keys), dtype=np.float32)[number // 3 % 6]
            recorder.add(np.roll(frames[0], 4 * number, 1), keys, reset=number % 30 == 0)
    torch.manual_seed(0)
    autoencoder = Autoencoder(config.model.autoencoder)
    shape = config.model.autoencoder.latent_shape(config.world)
    denoiser = Denoiser(config.model.denoiser, len(config.world.keys), *shape, autoencoder)
    for name, weights in denoiser.named_parameters():
        small = weights.ndim == 4 and not name.startswith("motion")
        torch.nn.init.normal_(weights, std=0.04 if small else 0.1)
    (folder / "out").mkdir()
    networks = {"autoencoder": autoencoder, "denoiser": denoiser}
    save_checkpoint(folder / "out" / "denoiser.safetensors", networks, config.model, config.world)
    return folder


def options(place: Path, out: Path, *more: str) -> list[str]:
    shutil.copytree(place / "out", out, dirs_exist_ok=True)
    return [*PLAIN, f"data={place}/data", f"out={out}", *more]


def test_the_stage_writes_its_students_average_and_that_can_be_played(place, tmp_path):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main(options(place, tmp_path, "steps=10", "log_every=5")) == 0
    figures = json.loads(said.getvalue().splitlines()[-1])
    assert figures["stage"] == "distill" and figures["steps"] == 10
    assert all(np.isfinite(figures[name]) for name in ("loss", "critic", "pull", "apart"))
    made = Checkpoint(tmp_path / "distill.safetensors")
    assert made.modules == ["autoencoder", "denoiser"] and (tmp_path / "distill.png").exists()
    state = torch.load(tmp_path / "distill.state.pt")
    saved, far, near = Player(made.path, "cpu", "fp32").denoiser.state_dict(), 0.0, 0.0
    for name, value in saved.items():
        far += (value - state["module"][f"student.{name}"]).abs().sum().item()
        near += (value - state["average"][f"module.student.{name}"]).abs().sum().item()
    assert 0 < near < 0.3 * far, "but for the rounding of a saved weight"


def test_a_share_of_the_first_weights_may_be_kept(place, tmp_path):
    given = options(place, tmp_path, "steps=9", "stages.distill.kept=0.25")
    training = train.Training(load_config("train", TrainConfig, given), rank=0, ranks=1)
    begun = {name: x.clone() for name, x in training.module.student.state_dict().items()}
    for _ in range(9):
        training.iterate(training.progress())
    learnt, changed = training.average.module.student.state_dict(), 0
    for name, value in training.stage.trained(training.average.module)["denoiser"].state_dict().items():
        assert torch.allclose(value, 0.25 * begun[name] + 0.75 * learnt[name], atol=1e-6)
        changed += int(not torch.equal(value, learnt[name]))
    assert changed > 10


def test_a_stage_that_is_continued_is_the_same_stage(place, tmp_path):
    """Five iterations, a new start, five more: weights, optimiser, average and losses of ten in one go."""

    def begun(name: str) -> train.Training:
        given = options(place, tmp_path / name, "steps=10")
        training = train.Training(load_config("train", TrainConfig, given), rank=0, ranks=1)
        training.resume()
        return training

    def advance(of: train.Training, steps: int) -> list[float]:
        return [of.iterate(of.progress())["loss"].item() for _ in range(steps)]

    whole = begun("whole")
    losses = advance(whole, 10)
    half = begun("half")
    first = advance(half, 5)
    half.save()
    torch.manual_seed(12345)
    rest = begun("half")
    assert rest.step == 5 and first + advance(rest, 5) == losses and len(set(losses)) == 10
    for part in ("module", "average"):
        one, other = (getattr(x, part).state_dict() for x in (rest, whole))
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_two_processes_distill_one_student(place, tmp_path):
    """Whose turn it is, which windows are scored and how long a game goes on they draw alike."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "train.py", *options(place, tmp_path, "steps=4")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 90}
    root, environment = Path(train.__file__).parent, {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, cwd=root, env=environment, **pipes)
    assert child.returncode == 0, child.stdout[-3000:]
    one, other = (torch.load(tmp_path / f"distill.state{rank}.pt") for rank in ("", 1))
    assert one["step"] == other["step"] == 4 and not torch.equal(one["random"], other["random"])
    alike = {name: value for name, value in one["module"].items() if not name.startswith("long_")}
    assert all(torch.equal(value, other["module"][name]) for name, value in alike.items())


def test_what_does_not_fit_is_refused_in_one_sentence(place, tmp_path, capsys):
    config = load_config("train", TrainConfig, list(PLAIN))
    shape = config.model.autoencoder.latent_shape(config.world)
    torch.manual_seed(1)
    autoencoder = Autoencoder(config.model.autoencoder)
    denoiser = Denoiser(config.model.denoiser, len(config.world.keys), *shape, autoencoder)
    networks = {"autoencoder": autoencoder, "denoiser": denoiser}
    save_checkpoint(tmp_path / "other.safetensors", networks, config.model, config.world)
    for more, word in (
        ([f"teacher={tmp_path}/other.safetensors"], "cannot teach"),
        ([f"teacher={tmp_path}/none.safetensors"], "no checkpoint"),
        (["stages.distill.unroll=2"], "unroll"),
        (["model.denoiser.window=4", "model.denoiser.ladder=[0.4,0.6,0.8,1.0]"], "longer than the 3"),
    ):
        assert train.main(options(place, tmp_path / "out", *more)) == 2
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if line.startswith("train.py: ")]
        assert not out and len(said) == 1 and word in said[0], err
