"""Variants: how a checkpoint may play otherwise than it says, for the ablation table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import DenoiserConfig
from ..denoiser import Denoiser
from ..distillation import shortened
from ..kv_cache import KVCache
from ..rollout import Rollout
from ..sampler import add_noise, counter_noise
from ..session import Player, make_denoiser

REFRESH = 88  # frames between two sinks, five seconds


class Sinkless(Rollout):
    """No sink at all. The config keeps it, so games start from the same frames as all others."""

    def __init__(self, denoiser: Denoiser, batch: int = 1, dtype: torch.dtype = torch.float32, folded=True):
        super().__init__(denoiser, batch, dtype, folded)
        config, tokens = replace(self.config, sink=0), self.cache.tokens
        device = denoiser.ladder.device
        self.cache = KVCache(config, tokens, denoiser.keys, denoiser.shape, batch, device, dtype)


class SinkAtIndex(Rollout):
    """The sink's keys stay turned to the index where they were made, ever farther from the window."""

    def _place_sink(self) -> None:
        self.cache.place_sink(lambda keys: keys)


class SinkRefreshed(Rollout):
    """Every `REFRESH` frames the newest frames whose keys are in the ring become the sink; in between it is
    placed right before the ring, as ever. The method's own sink has the start's content all game long, and
    only its position is renewed.

    What is due is decided on the device, so that a captured step can do it.
    """

    def __init__(self, denoiser: Denoiser, batch: int = 1, dtype: torch.dtype = torch.float32, folded=True):
        super().__init__(denoiser, batch, dtype, folded)
        self.begun = torch.zeros_like(self.cache.frame)  # index of the first frame that was played
        self.made = torch.zeros_like(self.cache.frame)  # index of the sink's first frame
        self.behind = torch.arange(self.config.sink, device=self.made.device)

    def reset(self, latents: Tensor, actions: Tensor, seed: Tensor) -> None:
        self.begun.fill_(max(latents.shape[1], self.start_frames))
        self.made.zero_()
        super().reset(latents, actions, seed)

    def _place_sink(self) -> None:
        cache, age = self.cache, self.cache.frame - self.begun
        due = (age > 0) & (age % REFRESH == 0)
        newest = cache.frame - 1 - cache.sink  # the frame behind is pending: its keys are yet to be written
        keys, values = cache.buffer.index_select(3, (newest + self.behind) % cache.ring).unbind(1)
        kept = cache.buffer[:, 1, :, cache.ring : cache.ring + cache.sink]
        cache.anchor.copy_(torch.where(due, keys, cache.anchor))
        kept.copy_(torch.where(due, values, kept))
        self.made.copy_(torch.where(due, newest, self.made))
        place = cache.frame - self.start_frames - self.made
        cache.place_sink(lambda anchor: self.denoiser.transformer.positions.shift(anchor, place))


class FrameByFrame(Rollout):
    """No frames in flight, as in Self Forcing: each frame is denoised alone, under the keys that cause it,
    down the whole ladder. As many passes a frame of the screen as the window has positions: as many a frame
    as it goes through there, each over one frame instead of all.
    """

    def __init__(self, denoiser: Denoiser, batch: int = 1, dtype: torch.dtype = torch.float32, folded=True):
        super().__init__(denoiser, batch, dtype, folded)
        self.window.commit_position = 0  # its keys are known when a frame is begun
        self.levels = denoiser.config.ladder[::-1]

    def prepare(self) -> None:
        """Nothing can be done before the keys are known."""

    def step(self, action: Tensor, stale: bool | None = None) -> Tensor:
        return self.advance(self._alone(action), action, stale=False)

    @torch.no_grad()
    def _alone(self, action: Tensor) -> Tensor:
        """The keys (b, k) → the frame that they cause (b, 1, c, y, x)."""
        shown, known = (x[:, :1] for x in self.window.bind(action))
        guess = self._guess(shown)
        noise = counter_noise(self.seed, self.cache.frame, self.level[:1], self.denoiser.shape)
        clean = guess.mean
        for level in self.levels:
            sigma = level * self.one
            noisy = add_noise(clean, guess.doubt * noise, sigma)
            clean = self._pass(noisy, sigma, shown, known, guess)
        return clean


class OnePass(FrameByFrame):
    """Frame by frame, each drawn from pure noise in a single pass."""

    def __init__(self, denoiser: Denoiser, batch: int = 1, dtype: torch.dtype = torch.float32, folded=True):
        super().__init__(denoiser, batch, dtype, folded)
        self.levels = self.levels[:1]


@dataclass(frozen=True)
class Variant:
    """How the games are played, and what is otherwise than in the checkpoint's config."""

    title: str  # in the table
    rollout: type[Rollout] = Rollout
    changes: Callable[[DenoiserConfig], dict] = lambda config: {}


VARIANTS = {
    "full": Variant("the full method"),
    "no_sink": Variant("no sink", Sinkless),
    "sink_index": Variant("sink at the index where it was made", SinkAtIndex),
    "sink_refreshed": Variant("sink renewed every 5 s", SinkRefreshed),
    "window_1": Variant("frame by frame, all levels", FrameByFrame),
    "window_1_one_pass": Variant("frame by frame, one pass", OnePass),
    "ladder_3": Variant("window of 3", changes=lambda c: {"window": 3, "ladder": [0.5, 0.8, 1.0]}),
    "ladder_2": Variant("window of 2", changes=lambda c: {"window": 2, "ladder": [0.6, 1.0]}),
    "frozen": Variant(
        "actions frozen at entry", changes=lambda c: {"commit_position": c.window - 1, "correction": 0.0}
    ),
    "c1": Variant("actions final at position 1", changes=lambda c: {"commit_position": 1}),
    "c2": Variant("actions final at position 2", changes=lambda c: {"commit_position": 2}),
    "uncorrected": Variant("no correction", changes=lambda c: {"correction": 0.0}),
    "c1_uncorrected": Variant(
        "position 1, no correction", changes=lambda c: {"commit_position": 1, "correction": 0.0}
    ),
    "c2_uncorrected": Variant(
        "position 2, no correction", changes=lambda c: {"commit_position": 2, "correction": 0.0}
    ),
}


def open_variant(name: str, checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> Player:
    """A checkpoint's networks, with the same weights in all variants, that play as the variant of this name
    does.
    """
    player, variant = Player(checkpoint, device, precision), VARIANTS[name]
    own = player.denoiser.config
    config = replace(own, **variant.changes(own))
    player.rollout = variant.rollout
    if config.window == own.window:
        player.denoiser.config = config
        return player
    made = make_denoiser(player.checkpoint, player.autoencoder)
    player.checkpoint.load_into("denoiser", made)  # anew, as the player's own are laid out for speed
    shorter = Denoiser(config, made.keys, *made.shape, player.autoencoder)
    player.denoiser = player.ready(shortened(made, shorter))
    return player
