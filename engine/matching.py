"""Distribution matching: what a teacher and a critic say of clips that a student made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser, weighted_error
from .kv_cache import Context, Written
from .motion import Guess
from .sampler import add_noise

LEVELS = 0.02, 0.98  # least and most noise at which teacher and critic are asked


class Past(NamedTuple):
    """What games stand on: their first frames and the newest finished ones, with the actions that caused
    them; never with gradients.
    """

    sink: Tensor  # (b, sink, c, y, x)
    sink_actions: Tensor  # (b, sink, k)
    latents: Tensor  # (b, sink + recent, c, y, x)
    actions: Tensor  # (b, sink + recent, k)

    def then(self, head: Tensor, action: Tensor) -> Past:
        """One frame (b, c, y, x) later, that `action` (b, k) caused."""
        latents, actions = (
            torch.cat([old[:, 1:], new.detach()[:, None]], 1)
            for old, new in ((self.latents, head), (self.actions, action))
        )
        return self._replace(latents=latents, actions=actions)


class Clip(NamedTuple):
    """Frames that a student made in one pass, what it was told of them, and what they stand on."""

    made: Tensor  # (b, t, c, y, x)
    guess: Guess
    shown: Tensor  # (b, t, k)
    known: Tensor  # (b, t)
    past: Past


def merged(clips: list[Clip]) -> Clip:
    """All of them side by side: where a clip stands in its game does not matter."""
    made, guesses, shown, known, pasts = zip(*clips, strict=True)
    guess, past = Guess(*beside(guesses)), Past(*beside(pasts))
    return Clip(torch.cat(made), guess, torch.cat(shown), torch.cat(known), past)


def beside(several: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Tuples of tensors as one."""
    return [torch.cat(parts) for parts in zip(*several, strict=True)]


def recall(denoiser: Denoiser, past: Past) -> Context:
    """A past as one of the networks remembers it: sink and recent frames, committed as when a game starts
    there. The window stands behind it, at index sink + recent.
    """
    first, lately = Written(), Written()
    denoiser.commit(past.latents, past.actions, 0, lately)
    recent = denoiser.config.recent * denoiser.transformer.tokens
    layers = [(k[:, -recent:], v[:, -recent:]) for k, v in lately.layers]
    if past.sink.shape[1]:
        denoiser.commit(past.sink, past.sink_actions, 0, first)
        both = zip(first.layers, layers, strict=True)
        layers = [tuple(torch.cat(parts, 1) for parts in zip(*pair, strict=True)) for pair in both]
    return Context(layers, lately.last, lately.held)


def estimate(
    denoiser: Denoiser, clip: Clip, noisy: Tensor, sigma: Tensor, past: Context, blind: bool = False
) -> Tensor:
    """Clean estimates (b, t, c, y, x) of a noised clip; `blind`: without its keys."""
    dropped = torch.ones_like(sigma, dtype=torch.bool) if blind else None
    frame = clip.past.latents.shape[1]
    return denoiser(noisy, sigma, clip.shown, clip.known, frame, past, dropped, clip.guess)


def one_level(clip: Clip) -> tuple[Tensor, Tensor]:
    """Gaussian noise as the clip, and levels (b, t), the same in all frames of a clip."""
    low, high = LEVELS
    sigma = low + (high - low) * torch.rand(len(clip.made), 1, device=clip.made.device)
    return torch.randn_like(clip.made), sigma.expand(clip.made.shape[:2])


def matching_loss(
    teacher: Denoiser, critic: Denoiser, clip: Clip, guidance: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Moves a clip to where the teacher holds it likelier and the critic less likely: distribution matching
    (Yin et al., 2024), whose gradient is the difference of two scores at one noise level.

    What are scores here? A clip is noised in units of its guess's doubt d: noisy = (1 - σ) clip + σ d ε. A
    network's score there, with its clean estimate x̂, is -(noisy - (1 - σ) x̂) / (σ d)²: network and guess
    agree on the noisy clip, so two scores differ by (1 - σ) / (σ d)² times the difference of the estimates.
    The factor is positive and the same for both; as usual the one of the level is left out and the mean
    distance to the teacher's estimate is divided by. So is 1 / d²: it would have places that are all but
    known count most, while in latents a place counts by how far off it is, as in regression.

    Guidance adds what the keys change in the teacher's opinion. Without keys its guess is the frame before,
    doubted by 1, and noise is in that unit; its score per unit is then worth d² of a clean latent's, so where
    the guess leaves nothing open, nothing is exaggerated.
    """
    with torch.no_grad():
        noise, sigma = one_level(clip)
        noisy, past = add_noise(clip.made, clip.guess.doubt * noise, sigma), recall(teacher, clip.past)
        fake = estimate(critic, clip, noisy, sigma, recall(critic, clip.past))
        real = estimate(teacher, clip, noisy, sigma, past)
        if guidance:
            blind = estimate(teacher, clip, add_noise(clip.made, noise, sigma), sigma, past, blind=True)
            real = real + guidance * clip.guess.doubt.square().clamp_max(1) * (real - blind)
        pull = normalised(clip.made, real, fake)
        target = clip.made - pull
        apart = (fake - real).square().mean().sqrt() / (clip.made - real).square().mean().sqrt().clamp_min(
            1e-6
        )
    loss = 0.5 * (clip.made - target).square().mean()
    return loss, {"pull": pull.abs().mean(), "apart": apart}


def normalised(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The gradient (b, t, c, y, x): how the critic's estimates differ from the teacher's, in units of each
    clip's mean distance to the teacher's.
    """
    size = (made - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / size.clamp_min(1e-4))


def critic_loss(critic: Denoiser, clip: Clip) -> Tensor:
    """Flow matching on clips that a student made, none of which gets a gradient."""
    noise, sigma = one_level(clip)
    clean, guess = clip.made.detach(), clip.guess
    made = estimate(
        critic, clip, add_noise(clean, guess.doubt * noise, sigma), sigma, recall(critic, clip.past)
    )
    return weighted_error(made, clean, sigma, critic.config.spread).mean()
