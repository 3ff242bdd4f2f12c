"""Cached steps are the written-out definition, keys reach the frame they cause, and the cost stays."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from engine.kernels import qknorm_rope
from torch import Tensor

import engine.rollout
from engine.config import DenoiserConfig
from engine.denoiser import Denoiser
from engine.kv_cache import Context, Written
from engine.rollout import Rollout
from engine.sampler import add_noise, counter_noise, ramp, scalings
from engine.window import bind

KEYS, SHAPE = 3, (2, 4, 6)  # channels, rows, columns: 6 tokens and the action's


def tiny(**changes) -> Denoiser:
    """An untrained denoiser whose every weight matters: gates that start at zero would hide mistakes."""
    size = {"width": 32, "layers": 2, "head_dim": 16, "patch": 2, "fine": 8, "stem": 1, "head": 1}
    plain = {**size, "window": 3, "recent": 3, "sink": 1, "ladder": [0.5, 0.8, 1.0], "correction": 0.9}
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(**{**plain, **changes}), KEYS, *SHAPE)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            small = parameter.ndim == 4 or name.startswith("motion")
            parameter.add_((0.04 if small else 0.2) * torch.randn_like(parameter))
    return denoiser.eval()


def game(batch: int = 2, start: int = 4, frames: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start latents and their actions, then the actions to play (frames, b, k), and seeds."""
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, start, *SHAPE, generator=random)
    before = (torch.rand(batch, start, KEYS, generator=random) < 0.5).float()
    played = (torch.rand(frames, batch, KEYS, generator=random) < 0.5).float()
    return latents, before, played, torch.arange(batch) + 11


def play(denoiser: Denoiser, latents: Tensor, before: Tensor, played: Tensor, seed: Tensor) -> Tensor:
    """→ the emitted frames (frames, b, c, y, x)."""
    rollout = Rollout(denoiser, len(latents))
    rollout.reset(latents, before, seed)
    return torch.stack([rollout.step(action) for action in played])


def close(made: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return (made - expected).abs().max().item() < tolerance


@torch.no_grad()
def context(denoiser: Denoiser, latents: Tensor, actions: Tensor, first: int = 0) -> Context:
    """What a window behind all these finished frames sees, from one pass; `first` is the first's number."""
    config, tokens, count = denoiser.config, denoiser.transformer.tokens, latents.shape[1]
    written, layers = Written(), []
    denoiser.commit(latents, actions, first, written)
    for k, v in written.layers:
        k, v = (x.unflatten(1, (count, tokens)) for x in (k, v))
        place = count - config.recent - config.sink
        sink = denoiser.transformer.positions.shift(k[:, : config.sink], place)
        joined = (
            torch.cat([sink, k[:, -config.recent :]], 1),
            torch.cat([v[:, : config.sink], v[:, -config.recent :]], 1),
        )
        layers.append(tuple(x.flatten(1, 2) for x in joined))
    held = torch.cat([actions.new_zeros(len(actions), 4, actions.shape[2]), actions], 1)[:, -4:]
    return Context(layers, latents[:, -2:], held)


def test_cached_commits_are_one_masked_pass():
    denoiser = tiny(sink=2)
    config, tokens = denoiser.config, denoiser.transformer.tokens
    latents, actions, _, _ = game(start=17)
    rollout = Rollout(denoiser, 2)
    rollout.reset(latents[:, :5], actions[:, :5], torch.zeros(2, dtype=torch.int64))
    cache = rollout.cache
    with torch.no_grad():
        whole = Written()
        denoiser.commit(latents, actions, 0, whole)
        for frame in range(5, 17):
            cache.take(latents[:, frame], actions[:, frame])
            denoiser.commit_pending(cache)
    ring, sink = config.recent + 1, config.sink
    for layer, pair in enumerate(whole.layers):
        for which, x in enumerate(pair):
            frames = x.unflatten(1, (17, tokens))
            for frame in range(17 - ring, 17):
                kept = cache.buffer[layer, which, :, frame % ring]
                assert close(kept, frames[:, frame]), (layer, which, frame)
            if which:
                kept = cache.buffer[layer, 1, :, ring : ring + sink]
                assert close(kept, frames[:, :sink]), "the sink's values"
    first = whole.layers[1][0].unflatten(1, (17, tokens))[:, :sink]
    assert close(cache.anchor[1], first), "the sink's keys"


@torch.no_grad()
@pytest.mark.parametrize("sink", [1, 2])
def test_window_in_play_is_the_window_in_training(sink):
    """Through the cache after some steps, and through the context that the training loss builds."""
    denoiser = tiny(sink=sink)
    latents, actions, _, _ = game(batch=1, start=13)
    rollout, start = Rollout(denoiser, 1), sink + 3
    rollout.reset(latents[:, :start], actions[:, :start], torch.zeros(1, dtype=torch.int64))
    cache = rollout.cache
    for frame in range(start, 13):
        cache.take(latents[:, frame], actions[:, frame])
        denoiser.commit_pending(cache)
    rollout._place_sink()
    cache.look(3)
    written = Written()
    denoiser.commit(latents, actions, 0, written)
    trained = denoiser._context(written, 13, windows=1)  # of a batch of one, so the sink is its own
    noisy, sigma = torch.randn(1, 3, *SHAPE), torch.tensor([[0.5, 0.8, 1.0]])
    inputs = noisy, sigma, *bind(torch.eye(3)[None], 0), 13
    expected = denoiser(*inputs, trained)
    assert close(denoiser(*inputs, cache), expected)
    assert close(denoiser(*inputs, context(denoiser, latents, actions)), expected)
    cache.place_sink(torch.zeros_like)
    assert not close(denoiser(*inputs, cache), expected, 1e-2), "the sink counts"


def test_shifted_keys_are_keys_made_at_the_new_place():
    positions = tiny().transformer.positions
    raw, weight = torch.randn(2, 7, 3 * 2 * 16), torch.randn(16)
    here = qknorm_rope(raw, weight, weight, *positions(4, 1))[1]
    for frame in (0, 5, 9, 1004, 100_004):
        there = qknorm_rope(raw, weight, weight, *positions(torch.tensor(frame), 1))[1]
        assert close(positions.shift(here, frame - 4), there, 1e-5)
        assert close(positions.shift(there, 4 - frame), here, 1e-5)
    assert not close(positions.shift(here, 1), here, 1e-2)


@torch.no_grad()
def test_only_relative_time_counts():
    denoiser = tiny()
    latents, actions, _, _ = game(start=9)
    noisy, sigma = torch.randn(2, 3, *SHAPE), torch.tensor([[0.5, 0.8, 1.0]]).expand(2, 3)
    shown, known = bind(torch.eye(3).expand(2, 3, 3), 0)
    made = [
        denoiser(noisy, sigma, shown, known, first + 9, context(denoiser, latents, actions, first))
        for first in (0, 1000)
    ]
    assert close(*made)
    late = denoiser(noisy, sigma, shown, known, 10, context(denoiser, latents, actions))
    assert not close(late, made[0], 1e-2), "a frame more in between is another thing"


def test_gradient_path_gives_the_same_numbers():
    denoiser = tiny()
    latents, before, played, seed = game()
    learning, playing = Rollout(denoiser, 2), Rollout(denoiser, 2)
    for rollout in (learning, playing):
        rollout.reset(latents, before, seed)
    for action in played[:5]:
        made = learning.predict(action)
        with torch.no_grad():
            expected = playing.predict(action)
        assert made.requires_grad and not expected.requires_grad and close(made, expected)
        assert close(learning.advance(made, action), playing.advance(expected, action))
    made.square().sum().backward()  # after the commit has written into the cache
    silent = {name for name, p in denoiser.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == {"actions.null"}, "only dropped actions use it"
    assert denoiser.transformer.layers[0].attention.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("commit_position", [0, 1, 2])
def test_action_is_committed_with_the_frame_that_it_causes(commit_position, monkeypatch):
    denoiser = tiny(commit_position=commit_position)
    latents, before, played, seed = game()
    rollout, commits, shown = Rollout(denoiser, 2), [], denoiser._pending
    rollout.reset(latents, before, seed)

    def watched(memory) -> tuple[Tensor, ...]:
        commits.append((memory.last[:, 1].clone(), memory.held[:, -1].clone(), int(memory.frame) - 1))
        return shown(memory)

    monkeypatch.setattr(denoiser, "_pending", watched)
    emitted = torch.stack([rollout.step(action) for action in played])
    expected = torch.cat([before[:, -1].expand(commit_position, -1, -1), played])[: len(played) - 1]
    assert torch.equal(torch.stack([actions for _, actions, _ in commits]), expected)
    assert torch.equal(torch.stack([frames for frames, _, _ in commits]), emitted[:-1])
    assert [frame for _, _, frame in commits] == list(range(4, 15)), "each once, by the step behind it"


@torch.no_grad()
@pytest.mark.parametrize("correction", [0, 0.9])
def test_a_commit_along_with_the_window_is_one_of_its_own(correction):
    denoiser = tiny(correction=correction)
    latents, before, played, seed = game()
    both = [Rollout(denoiser, 2, folded=folded) for folded in (True, False)]
    for rollout in both:
        rollout.reset(latents, before, seed)
    for action in played:
        assert close(*(rollout.step(action) for rollout in both))
    kept, expected = (rollout.cache.buffer[:, :, :, : rollout.cache.ring] for rollout in both)
    last = int(both[0].cache.slots[0])  # is yet to be committed by the one
    others = [slot for slot in range(both[0].cache.ring) if slot != last]
    assert close(kept[:, :, :, others], expected[:, :, :, others])


@pytest.mark.parametrize("correction", [0, 0.9])
@pytest.mark.parametrize("commit_position", [0, 1])
def test_a_key_changes_the_frame_it_was_held_for_and_none_before(commit_position, correction):
    denoiser = tiny(commit_position=commit_position, correction=correction)
    latents, before, played, seed = game()
    other = played.clone()
    other[6] = 1 - other[6]
    made = play(denoiser, latents, before, played, seed)
    difference = (made - play(denoiser, latents, before, other, seed)).abs().flatten(1).amax(1)
    assert (difference[:6] == 0).all() and difference[6 + commit_position] > 0.1


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"commit_position": 1}, {"correction": 0}, {"sink": 2, "recent": 2}])
def test_cached_steps_are_the_written_out_definition(changes):
    """DESIGN §3 with nothing kept but latents: each step recomputes the whole game's keys and values."""
    denoiser = tiny(**changes)
    config, c = denoiser.config, denoiser.config.commit_position
    latents, before, played, seed = game(frames=8)
    made = play(denoiser, latents, before, played, seed)

    def estimate(clean: Tensor, levels: Tensor, keys: Tensor, known: Tensor) -> Tensor:
        frame = latents.shape[1]
        noise = counter_noise(seed, frame, torch.zeros(len(levels), dtype=torch.int64), SHAPE)
        sigma, memory = levels.expand(2, -1), context(denoiser, latents, before)
        guess, doubt = denoiser.motion(memory.last, memory.held, keys)
        noisy = add_noise(clean, doubt * noise, sigma)
        missed = ((noisy - (1 - sigma[..., None, None, None]) * guess) / doubt).clamp(-4, 4)
        skip, out, scale = (s[..., None, None, None] for s in scalings(sigma))
        action = denoiser.actions(keys, known)
        last = latents[:, -1:].expand_as(guess)
        made = denoiser.transformer(scale * missed, guess, last, sigma, action, frame, memory)
        return guess + doubt * (skip * missed + out * made)

    ladder, window = torch.tensor(config.ladder), config.window
    known = torch.tensor([[float(k <= c) for k in range(window)]] * 2)
    clean, actions, held = torch.zeros(2, window, *SHAPE), [before[:, -1]] * window, before[:, -1]
    for filled in range(window - 1):
        clean = estimate(clean, ramp(ladder, filled), torch.stack(actions, 1), known)
    since = torch.full((2,), window)  # frames since the keys changed
    for step, action in enumerate(played):
        early = held if config.correction else action  # the window is denoised before the new keys are known
        actions[c:] = [early] * (window - c)
        clean = estimate(clean, ladder, torch.stack(actions, 1), known)
        actions[c:] = [action] * (window - c)
        head, since = clean[:, :1], torch.where((action != held).any(-1), 0, since + 1)
        if config.correction:
            level = torch.tensor([config.correction])
            again = estimate(head, level, actions[0][:, None], torch.ones(2, 1))
            head = torch.where((since < window - 1)[:, None, None, None, None], again, head)
        assert close(made[step], head[:, 0]), f"step {step}"
        latents, before = torch.cat([latents, head], 1), torch.cat([before, actions[0][:, None]], 1)
        clean = torch.cat([clean[:, 1:], torch.zeros_like(head)], 1)
        actions, held = [*actions[1:], actions[-1]], action


@torch.no_grad()
def test_work_done_ahead_is_the_step_s_own():
    """Whether there was time to prepare or not; and a reset forgets what was prepared."""
    denoiser = tiny()
    latents, before, played, seed = game()
    rollout, expected = Rollout(denoiser, 2), play(denoiser, latents, before, played, seed)
    for _ in range(2):
        rollout.reset(latents, before, seed)
        for number, (action, frame) in enumerate(zip(played, expected, strict=True)):
            if number % 3:
                rollout.prepare()
                rollout.prepare()
            assert torch.equal(rollout.step(action), frame)
        rollout.prepare()


@torch.no_grad()
def test_a_change_costs_one_frame_s_pass_once_it_is_known():
    """All that a step does behind `prepare`: nothing, or the leaving frame's guess and pass."""
    denoiser = tiny()
    latents, before, played, seed = game()
    rollout, passes = Rollout(denoiser, 2), []
    rollout.reset(latents, before, seed)
    plain, motion = denoiser.transformer.forward, denoiser.motion.forward

    def watch(name: str, at: int, function):
        def watched(*given, **named):
            passes.append((name, given[at].shape[1]))
            return function(*given, **named)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser.transformer, "forward", watch("pass", 0, plain))
        patch.setattr(denoiser.motion, "forward", watch("guess", 2, motion))
        new = 1 - before[:, -1]
        for held, again in [(before[:, -1], 0), (new, 1), (new, 1), (new, 0)]:  # frames in flight, too
            rollout.prepare()
            passes.clear()
            rollout.step(held)
            assert passes == [("guess", 1), ("pass", 1)] * again


def test_a_frame_keeps_its_noise(monkeypatch):
    """Every pass over a frame, the correction's too, has the frame's own noise; no two frames share it."""
    drawn: dict[int, Tensor] = {}

    def watched(seed: Tensor, frame: Tensor, level: Tensor, shape: tuple[int, ...]) -> Tensor:
        noise = counter_noise(seed, frame, level, shape)
        for place in range(len(level)):
            assert torch.equal(noise[:, place], drawn.setdefault(int(frame) + place, noise[:, place]))
        return noise

    monkeypatch.setattr(engine.rollout, "counter_noise", watched)
    play(tiny(), *game(frames=20))
    assert len(drawn) == 22 and len({noise.sum().item() for noise in drawn.values()}) == 22


def test_game_is_determined_by_seed_and_actions():
    denoiser = tiny()
    latents, before, played, seed = game()
    first = play(denoiser, latents, before, played, seed)
    torch.manual_seed(99)
    assert torch.equal(play(denoiser, latents, before, played, seed), first)
    other = play(denoiser, latents, before, played, seed + torch.tensor([0, 1]))
    assert (
        close(other[:, 0], first[:, 0]) and (other[:, 1] - first[:, 1]).abs().flatten(1).amax(1).min() > 0.1
    )


def test_second_game_of_a_rollout_is_like_a_fresh_one():
    denoiser = tiny()
    latents, before, played, seed = game()
    rollout = Rollout(denoiser, 2)
    rollout.reset(latents.flip(0), 1 - before, seed + 3)
    for action in 1 - played:
        rollout.step(action)
    rollout.reset(latents, before, seed)
    again = torch.stack([rollout.step(action) for action in played])
    assert torch.equal(again, play(denoiser, latents, before, played, seed))


def test_games_side_by_side_are_games_alone():
    denoiser = tiny()
    latents, before, played, seed = game()
    played[:, 0] = played[3, 0]  # game 0 holds its keys, game 1 does not
    both = play(denoiser, latents, before, played, seed)
    for one in range(2):
        only = slice(one, one + 1)
        assert close(play(denoiser, latents[only], before[only], played[:, only], seed[only]), both[:, only])


def test_correction_touches_only_games_whose_keys_changed():
    latents, before, played, seed = game()
    played[:] = before[:, -1]
    played[5:, 0] = 1 - before[0, -1]  # game 0 changes its keys once, game 1 never
    plain = play(tiny(correction=0), latents, before, played, seed)
    corrected = play(tiny(correction=0.9), latents, before, played, seed)
    difference = (plain - corrected).abs().flatten(2).amax(2)  # (frames, b)
    assert (difference[:, 1] == 0).all() and (difference[:5, 0] == 0).all() and difference[5, 0] > 0.1


@pytest.mark.parametrize("given", [1, 2])
def test_a_short_start_is_filled_up_with_its_first_frame(given):
    denoiser = tiny()
    latents, before, played, seed = game(start=given)
    missing = Rollout(denoiser).start_frames - given
    padded = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
    idle = F.pad(before, (0, 0, missing, 0))  # no key is held in the frames that are made up
    made = play(denoiser, latents, before, played, seed)
    assert made.isfinite().all() and torch.equal(made, play(denoiser, padded, idle, played, seed))


def test_a_long_start_is_used_whole():
    denoiser = tiny()
    latents, before, played, seed = game(start=20)
    made = play(denoiser, latents, before, played, seed)
    changed = latents.clone()
    changed[:, 0] += 1
    assert not close(play(denoiser, changed, before, played, seed), made, 1e-2), "its first frame is the sink"
    changed = latents.clone()
    changed[:, 5] += 1  # two layers of three frames each reach from 19 back to 11
    assert close(play(denoiser, changed, before, played, seed), made)


def tensors(thing, name: str = "") -> dict[str, Tensor]:
    """All tensors that `thing`, its cache and its window hold, by name."""
    found = {}
    for key, value in vars(thing).items():
        if isinstance(value, Tensor):
            found[f"{name}{key}"] = value
        elif type(value).__module__.startswith("engine.") and not isinstance(
            value, Denoiser | DenoiserConfig
        ):
            found |= tensors(value, f"{name}{key}.")
    return found


def test_a_long_game_costs_what_a_short_one_costs():
    denoiser = tiny()
    latents, before, played, seed = game(batch=1, frames=300)
    rollout = Rollout(denoiser, 1)
    rollout.reset(latents, before, seed)
    sizes = {name: x.untyped_storage().nbytes() for name, x in tensors(rollout).items()}
    fixed = {
        name: tensors(rollout)[name].data_ptr() for name in ("cache.buffer", "cache.anchor", "window.clean")
    }
    seconds = []
    for action in played:
        start = time.process_time()
        frame = rollout.step(action)
        seconds.append(time.process_time() - start)
        assert frame.isfinite().all()
    early, late = statistics.median(seconds[10:70]), statistics.median(seconds[-60:])
    assert late < 1.5 * early, f"{1000 * early:.2f} ms a step at first, {1000 * late:.2f} ms at last"
    assert fixed == {name: tensors(rollout)[name].data_ptr() for name in fixed}
    after = {name: x.untyped_storage().nbytes() for name, x in tensors(rollout).items()}
    assert after.keys() == sizes.keys() and all(after[name] <= sizes[name] for name in sizes), "state grew"


def test_an_emitted_frame_belongs_to_its_receiver():
    """Whatever is done with it does not reach the game."""
    denoiser = tiny()
    latents, before, played, seed = game()
    rollout, expected = Rollout(denoiser, 2), play(denoiser, latents, before, played, seed)
    rollout.reset(latents, before, seed)
    for action, frame in zip(played, expected, strict=True):
        made = rollout.step(action)
        assert torch.equal(made, frame)
        made.fill_(torch.nan)


def test_picture_is_that_of_the_last_finished_frame():
    latents, before, played, seed = game()
    rollout = Rollout(tiny(), len(latents))  # without an autoencoder, latents are their own picture
    rollout.reset(latents, before, seed)
    assert torch.equal(rollout.picture, latents[:, -1])
    for action in played:
        made = rollout.step(action)
        assert torch.equal(rollout.picture, made)


def test_kernels_play_the_same_game():
    """Ten steps, so that the ring wraps, through Triton's kernels and through the definitions."""
    pytest.importorskip("triton")
    import engine.kernels.attention as attention
    from engine.kernels import dispatch, norm, rope

    denoiser, given, ran = tiny(), game(frames=10), []
    with pytest.MonkeyPatch.context() as patch, dispatch.use("triton"):
        for module, name in (
            (norm, "gate_residual_norm_modulate"),
            (rope, "qknorm_rope_write"),
            (attention, "window_attention"),
        ):
            fused = getattr(module, name)
            patch.setattr(module, name, lambda *x, fused=fused, name=name: ran.append(name) or fused(*x))
        made = play(denoiser, *given)
    with dispatch.use("reference"):
        expected = play(denoiser, *given)
    assert all(ran.count(name) >= 2 * 10 for name in set(ran)) and len(set(ran)) == 3, "in both layers"
    assert close(made, expected)
