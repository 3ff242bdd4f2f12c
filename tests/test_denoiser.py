"""The denoiser learns what keys do, is told what is known, and its history never looks ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import engine.denoiser
from engine.config import DenoiserConfig
from engine.denoiser import Denoiser, weighted_error
from engine.kv_cache import Context, Written
from engine.motion import Guess
from engine.rollout import Rollout
from engine.sampler import scalings

SHAPE = (2, 4, 6)
SMALL = {"width": 48, "layers": 2, "head_dim": 24, "patch": 2, "sink": 1, "fine": 16, "stem": 1, "head": 1}
SMALL |= {"window": 3, "recent": 3, "ladder": [0.5, 0.8, 1.0]}


def make(scramble: float = 0.0, **changes) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(**{**SMALL, **changes}), 2, *SHAPE)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            share = 0.2 if parameter.ndim == 4 else 1
            parameter.add_(scramble * share * torch.randn_like(parameter))
    return denoiser


def picture(place: Tensor) -> Tensor:
    """A wave at `place` (...), which comes round after 6 → latents (..., c, y, x) of unit variance."""
    phase = (place[..., None] - torch.arange(SHAPE[2])) * (2 * torch.pi / SHAPE[2])
    wave = 2**0.5 * torch.stack([phase.cos(), phase.sin()], -2)  # (..., c, x)
    return wave[..., None, :].expand(*place.shape, *SHAPE).clone()


def world(batch: int, frames: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A wave that moves left or right by one a frame, as its key says → latents, actions, places."""
    key = torch.randint(2, (batch, frames), generator=random)
    start = torch.randint(SHAPE[2], (batch, 1), generator=random)
    place = start + (2 * key - 1).cumsum(1)
    return picture(place), torch.nn.functional.one_hot(key, 2).float(), place


def train(denoiser: Denoiser, steps: int, permuted: bool = False) -> list[float]:
    """→ the loss of every step; `permuted` gives each game another one's actions."""
    random = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=3e-3, betas=(0.9, 0.98))
    losses = []
    for _ in range(steps):
        latents, actions, _ = world(16, 8, random)
        if permuted:
            actions = actions[torch.randperm(16, generator=random)]
        loss, _ = denoiser.loss(latents, actions, windows=2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def obedience(denoiser: Denoiser) -> float:
    """How often a first estimate, made of noise under a counterfactual key, lies nearer to where that key
    leads than to where the other one leads; of the key for which it does so more rarely.
    """
    latents, actions, place = world(64, 4, torch.Generator().manual_seed(2))
    rollout = Rollout(denoiser, 64)
    rollout.reset(latents, actions, torch.arange(64))
    noise, sigma, right = torch.randn(64, 3, *SHAPE), torch.ones(64, 3), []
    for key in range(2):
        shown, known = rollout.window.bind(torch.eye(2)[key].expand(64, 2))
        doubt = denoiser.guess(shown, rollout.cache).doubt
        head = denoiser(doubt * noise, sigma, shown, known, 4, rollout.cache)[:, 0]
        there, other = (picture(place[:, -1] + step) for step in ((1, -1) if key else (-1, 1)))
        nearer = (head - there).square().flatten(1).sum(1) < (head - other).square().flatten(1).sum(1)
        right.append(nearer.float().mean().item())
    return min(right)


@pytest.mark.parametrize("permuted", [False, True])
def test_it_learns_what_keys_do(permuted):
    """The loss falls, and keys move the wave; with another game's keys the same must fail."""
    denoiser = make()
    denoiser.motion.doubt_out.bias.data.zero_()  # an unmoved wave is off by about 1, as the guess would learn
    denoiser.motion.calm.data.fill_(9)
    assert obedience(denoiser) < 0.7
    losses = train(denoiser, 80, permuted)
    found, first, last = obedience(denoiser.eval()), sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    if permuted:
        assert found < 0.7
    else:
        assert found > 0.95 and last < 0.7 * first, f"loss {first:.3f} → {last:.3f}, obedience {found:.2f}"


def outside(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Context]:
    """Arguments of a pass over a window without a past."""
    nothing = torch.zeros(batch, 0, 2, 24)
    noisy, sigma = torch.randn(batch, 3, *SHAPE), torch.tensor([[0.5, 0.8, 1.0]]).expand(batch, 3)
    actions = torch.eye(2)[torch.randint(2, (batch, 3))]
    return (
        noisy,
        sigma,
        actions,
        torch.ones(batch, 3),
        0,
        Context([(nothing, nothing)] * 2, torch.randn(batch, 2, *SHAPE), torch.rand(batch, 4, 2).round()),
    )


@torch.no_grad()
def test_flags_and_actions_reach_the_network():
    denoiser = make(scramble=0.2)
    noisy, sigma, actions, known, frame, context = outside()
    plain = denoiser(noisy, sigma, actions, known, frame, context)
    assert plain.shape == noisy.shape and plain.dtype == torch.float32

    def change(**changes) -> list[float]:
        given = {"noisy": noisy, "sigma": sigma, "actions": actions, "known": known, **changes}
        other = denoiser(**given, frame=frame, memory=context)
        return (other - plain).abs().flatten(1).amax(1).tolist()  # per game

    first = torch.tensor([1.0, 0.0])
    assert change() == [0, 0]
    for what, changes in {
        "known": {"known": known - first[:, None] * torch.tensor([0, 0, 1.0])},
        "actions": {"actions": torch.where(first[:, None, None] > 0, 1 - actions, actions)},
        "sigma": {"sigma": sigma - 0.1 * first[:, None]},
        "dropped": {"dropped": (first > 0)[:, None].expand(2, 3)},
    }.items():
        mine, other = change(**changes)
        assert mine > 1e-2 and other < 1e-5, f"{what} of one game changes that game only"


@torch.no_grad()
def test_a_dropped_action_says_nothing():
    denoiser = make(scramble=0.2)
    noisy, sigma, actions, known, frame, context = outside()
    dropped = torch.tensor([[True, True, True], [False, True, True]])
    one = denoiser(noisy, sigma, actions, known, frame, context, dropped)
    other = denoiser(noisy, sigma, 1 - actions, 1 - known, frame, context, dropped)
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("dropping", [False, True])
def test_an_estimate_is_the_guess_and_what_it_misses(dropping):
    """Written out: Motion moves the last frame as the shown keys say, and the network does the rest."""
    denoiser = make(scramble=0.2)
    noisy, sigma, actions, known, frame, context = outside()
    dropped = torch.tensor([[True] * 3, [False, True, False]]) if dropping else None
    before = context.last[:, 1:]
    one, doubt = denoiser.motion(context.last, context.held, actions)
    assert (one - before).abs().max() > 0.1, "the guess is not just the last frame"
    if dropping:
        one[0], one[1, 1] = before[0], before[1, 0]
        doubt[0] = doubt[1, 1] = 1
    level = sigma[..., None, None, None]
    skip, out, scale = (s[..., None, None, None] for s in scalings(sigma))
    missed = ((noisy - (1 - level) * one) / doubt).clamp(-4, 4)
    action = denoiser.actions(actions, known, dropped)
    last = before.expand_as(one)
    made = denoiser.transformer(scale * missed, one, last, sigma, action, frame, context)
    expected = one + doubt * (skip * missed + out * made)
    assert torch.allclose(
        denoiser(noisy, sigma, actions, known, frame, context, dropped), expected, atol=1e-5
    )
    given = denoiser(noisy, sigma, actions, known, frame, context, dropped, Guess(one + 1, doubt))
    assert (given - expected).abs().max() > 0.1, "a guess that is given is taken"


@torch.no_grad()
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_a_commit_tells_each_frame_from_the_one_before(level, monkeypatch):
    """Frame t is held against frame t - 1, the very first against itself. The memory keeps two frames and
    four actions.
    """
    denoiser = make(scramble=0.2)
    latents, actions, _ = world(2, 6, torch.Generator().manual_seed(0))
    sigma = torch.full((2, 6), level)
    seen = []
    monkeypatch.setattr(denoiser.transformer, "forward", lambda *given, unpainted: seen.append(given))
    memory = Written()
    denoiser.commit(latents[:, :1], actions[:, :1], 0, memory, sigma[:, :1])
    assert torch.equal(memory.last, latents[:, [0, 0]])
    assert not memory.held[:, :3].any() and torch.equal(memory.held[:, 3:], actions[:, :1])
    denoiser.commit(latents, actions, 0, memory := Written(), sigma)
    assert torch.equal(memory.last, latents[:, 4:]) and torch.equal(memory.held, actions[:, 2:])
    missed, guess, last = seen[1][:3]
    for frame in range(6):
        before = latents[:, [max(0, frame - 1)]]
        assert torch.equal(guess[:, [frame]], before), frame
        scale = ((0.5 * (1 - level)) ** 2 + level**2) ** -0.5
        rest = scale * (latents[:, [frame]] - (1 - level) * before)
        assert torch.allclose(missed[:, [frame]], rest, atol=1e-5), frame
        assert torch.equal(last[:, [frame]], before), frame
    memory.last.fill_(torch.nan)
    assert latents.isfinite().all(), "the memory has a frame of its own"


@torch.no_grad()
def test_a_clean_frame_stays_as_it_is():
    noisy, _, *rest = outside()
    denoiser, doubt = make(scramble=0.2), torch.full_like(noisy, 2.0)
    guess = denoiser.guess(rest[0], rest[3])._replace(doubt=doubt)
    made = denoiser(noisy, torch.zeros(2, 3), *rest, guess=guess)
    assert torch.allclose(made, noisy, atol=1e-5)
    far = denoiser(guess.mean + 100, torch.zeros(2, 3), *rest, guess=guess)
    assert torch.allclose(far, guess.mean + 4 * doubt, atol=1e-4), "what lies too far off is not believed"


@torch.no_grad()
def test_history_looks_back_exactly_so_far():
    """The second layer's keys have seen their own frame and the `recent` before it, each of which brings
    along the frame before itself, and nothing later.
    """
    denoiser = make(scramble=0.2)
    latents, actions, _ = world(2, 10, torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, 4] += torch.randn(2, *SHAPE)

    def keys(of: Tensor) -> Tensor:
        memory = Written()
        denoiser.commit(of, actions, 0, memory)
        return memory.layers[1][0].unflatten(1, (10, -1))  # (b, t, n, h, d)

    moved = (keys(latents) - keys(changed)).abs().amax((0, 2, 3, 4)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]
    assert denoiser.history_mask(10, torch.device("cpu")).shape == (70, 70)


@torch.no_grad()
def test_half_of_a_batch_is_trained_with_a_foreign_sink():
    denoiser = make(scramble=0.2)
    latents, actions = torch.randn(4, 9, *SHAPE), torch.eye(2)[torch.randint(2, (4, 9))]
    memory = Written()
    denoiser.commit(latents, actions, 0, memory)
    tokens, context = denoiser.transformer.tokens, denoiser._context(memory, 9, 2)
    assert torch.equal(context.last, latents[:, -2:].repeat(2, 1, 1, 1, 1)), "the frames before are its own"
    assert torch.equal(context.held, actions[:, -4:].repeat(2, 1, 1))
    for (k, v), (past_k, past_v) in zip(memory.layers, context.layers, strict=True):
        sources = [1, 0, 2, 3] * 2
        assert torch.equal(past_v[:, :tokens], v[sources, :tokens])
        turned = denoiser.transformer.positions.shift(k[sources, :tokens], 9 - 4)
        assert torch.allclose(past_k[:, :tokens], turned, atol=1e-6)
        for past, own in ((past_k, k), (past_v, v)):
            assert torch.equal(past[:, tokens:], own[:, 6 * tokens :].repeat(2, 1, 1, 1)), "its own ring"


@pytest.mark.parametrize("commit_position", [0, 1])
def test_loss_lays_actions_on_the_frames_that_they_cause(commit_position, monkeypatch):
    """Frame t is the number t and so is its action: what the networks and the guess are given must agree."""
    denoiser = make(scramble=0.2, commit_position=commit_position)
    number = torch.arange(10.0)
    latents = number[:, None, None, None].expand(2, 10, *SHAPE)
    actions = number[:, None].expand(2, 10, 2)
    monkeypatch.setattr(engine.denoiser, "FARTHEST", 100)
    monkeypatch.setattr(engine.denoiser, "training_sigma", lambda ladder, b: torch.zeros(b, len(ladder)))
    monkeypatch.setattr(denoiser, "_roughen", lambda clean: (clean, torch.zeros(clean.shape[:2])))
    forward, guesses, tellings, passes = denoiser.transformer.forward, [], [], []

    def watched(missed: Tensor, guess: Tensor, before: Tensor, *rest, unpainted: int = 0) -> Tensor | None:
        passes.append((missed[0, :, 0, 0, 0], guess[0, :, 0, 0, 0], rest[2]))
        assert (before[0, :, 0, 0, 0] == guess[0, :, 0, 0, 0]).all()
        assert (unpainted < before.shape[1]) == (len(passes) == 2), "a commit paints nothing"
        return forward(missed, guess, before, *rest, unpainted=unpainted)

    def guessed(last: Tensor, held: Tensor, actions: Tensor, picture: Tensor | None) -> Guess:
        guesses.append([last[0, :, 0, 0, 0].tolist(), held[0, :, 0].tolist(), actions[0, :, 0].tolist()])
        mean = last[:, 1:].expand(-1, actions.shape[1], -1, -1, -1)
        return Guess(mean, torch.full_like(mean, 0.5))

    def told(actions: Tensor, known: Tensor, dropped: Tensor | None = None) -> Tensor:
        gone = known[0] * 0 > 0 if dropped is None else dropped[0]
        tellings.append((actions[0, :, 0].tolist(), known[0].tolist(), gone.tolist()))
        return torch.zeros(*known.shape, SMALL["width"])

    monkeypatch.setattr(denoiser.transformer, "forward", watched)
    monkeypatch.setattr(denoiser.motion, "forward", guessed)
    monkeypatch.setattr(denoiser.actions, "forward", told)
    starts, sizes, drops = set(), set(), set()
    for _ in range(60):
        for seen in (guesses, tellings, passes):
            seen.clear()
        denoiser.loss(latents, actions, windows=2)
        ((last, held, moving),) = guesses
        (history, certain, _), (shown, known, gone) = tellings
        (committed, first_guess, first), (window, guess, start) = passes
        committed = (0.5 * committed + first_guess).tolist()
        window = ((1 if gone[0] else 0.5) * window + guess).tolist()  # in units of the doubt
        first_guess, guess = first_guess.tolist(), guess.tolist()
        places = list(range(len(window)))
        assert first == 0 and history == committed == list(range(start)) and set(certain) == {1}
        assert first_guess == [0, *history[:-1]]
        assert window == [start + k for k in places]
        assert shown == [start + min(k, commit_position) for k in places]
        assert known == [float(k <= commit_position) for k in places]
        assert guess == [start - 1] * len(window) and last == [start - 2, start - 1]
        assert held == [start - 4, start - 3, start - 2, start - 1] and moving == shown
        starts.add(start)
        sizes.add(len(window))
        drops.add(gone[0])
    assert starts == {4, 5, 6, 7} and sizes == {1, 3} and drops == {False, True}


def test_loss_takes_the_shortest_segment_and_none_shorter():
    denoiser = make(scramble=0.2)
    latents, actions, _ = world(2, 7, torch.Generator().manual_seed(0))  # sink 1 + recent 3 + window 3
    for _ in range(12):
        loss, logs = denoiser.loss(latents, actions, windows=2)
        assert loss.isfinite() and loss.requires_grad and logs.keys() < {"head", "single"}
    with pytest.raises(RuntimeError):
        denoiser.loss(latents[:, :6], actions[:, :6], windows=2)


def test_every_weight_is_trained():
    denoiser = make(scramble=0.2)
    latents, actions, _ = world(8, 8, torch.Generator().manual_seed(0))
    for _ in range(8):  # enough that some action is dropped
        denoiser.loss(latents, actions, windows=4)[0].backward()
    trained = [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]
    still = [name for name, p in trained if p.grad is None or not p.grad.any()]
    assert not still


def test_weighted_error_is_that_of_the_networks_output():
    clean, noisy = torch.randn(2, 3, *SHAPE), torch.randn(2, 3, *SHAPE)
    sigma = torch.tensor([[0.3, 0.6, 1.0], [0.2, 0.9, 0.5]])
    skip, out, _ = (s[..., None, None, None] for s in scalings(sigma))
    guess, network = torch.randn_like(clean), torch.randn_like(clean)
    missed = noisy - (1 - sigma[..., None, None, None]) * guess
    target = (clean - guess - skip * missed) / (0.5 * out)
    error = weighted_error(guess + skip * missed + 0.5 * out * network, clean, sigma, 0.5)
    assert error.shape == (2, 3)
    assert torch.allclose(error, (network - target).square().mean((2, 3, 4)), rtol=1e-4)
    off = clean + 0.1
    assert torch.allclose(
        weighted_error(off, clean, torch.zeros(2, 3), 0.5), torch.full((2, 3), 4.0), rtol=1e-4
    ), "bounded"
