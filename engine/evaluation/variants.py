"""Variants: other ways to play a checkpoint, for the ablation table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..model.kv_cache import KVCache
from ..model.noise import add_noise, counter_noise
from ..rollout.player import Player
from ..rollout.rollout import Rollout

REFRESH = 88  # frames after which the sink is renewed: five seconds


class Sinkless(Rollout):
    """No sink. The config still has it, so that games start from the same frames as in other variants."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        config, cache = replace(self.config, sink_frames=0), self.cache
        self.cache = KVCache(config, cache.tokens, len(self.seed), cache.frame.device, cache.buffer.dtype)


class SinkAtIndex(Rollout):
    """The sink's keys keep the position at which they were made, farther and farther from the window."""

    def place_sink(self) -> None:
        self.cache.place_sink(lambda keys: keys)


class SinkRefreshed(Rollout):
    """Every `REFRESH` frames the newest frames with keys in the ring become the sink; its position is right
    before the ring, as usual. In the method itself the sink is always the start's, and only its position
    changes.

    The device decides when that happens, so that the step can be captured as a CUDA graph.
    """

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.begun = torch.zeros_like(self.cache.frame)  # index of the first frame that was played
        self.made = torch.zeros_like(self.cache.frame)  # index of the sink's first frame
        self.behind = torch.arange(self.config.sink_frames, device=self.made.device)

    def reset(self, latents: Tensor, *given, **named) -> None:
        self.begun.fill_(max(latents.shape[1], self.start_frames))
        self.made.zero_()
        super().reset(latents, *given, **named)

    def place_sink(self) -> None:
        cache, age = self.cache, self.cache.frame - self.begun
        due = (age > 0) & (age % REFRESH == 0)
        newest = cache.frame - 1 - cache.sink  # the frame after it is pending: its keys are not written yet
        keys, values = cache.buffer.index_select(3, (newest + self.behind) % cache.ring).unbind(1)
        kept = cache.buffer[:, 1, :, cache.ring : cache.ring + cache.sink]
        cache.unrotated_sink.copy_(torch.where(due, keys, cache.unrotated_sink))
        kept.copy_(torch.where(due, values, kept))
        self.made.copy_(torch.where(due, newest, self.made))
        place = cache.frame - self.start_frames - self.made
        cache.place_sink(lambda sink: self.denoiser.transformer.positions.shift(sink, place))


class FrameByFrame(Rollout):
    """No frames in flight, as in Self Forcing: each frame is denoised alone, under the keys that cause it,
    down the whole ladder. It takes as many passes as the window has positions, each over one frame.
    """

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.levels = self.config.ladder[::-1]

    def speculate(self) -> None:
        """Does nothing: the keys must be known."""

    def step(self, action: Tensor, renoise: bool | None = None) -> Tensor:
        return self.advance(self._alone(action), action, renoise=False)

    @torch.no_grad()
    def _alone(self, action: Tensor) -> Tensor:
        """Keys (b, k) → the frame that they cause, repeated for each position of a window (b, w, c, y, x)."""
        condition = self.window_condition(action[:, None])
        noise = counter_noise(self.seed, self.cache.frame, 1, self.denoiser.shape)
        clean = self.last[:, 1:]
        for level in self.levels:
            sigma = level * self.one
            clean = self.run_pass(add_noise(clean, noise, sigma), sigma, condition)
        return clean.expand(-1, self.config.window_frames, -1, -1, -1)


class OnePass(FrameByFrame):
    """Frame by frame, each made from pure noise in a single pass."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.levels = self.levels[:1]


class Uncorrected(Rollout):
    """The window is denoised once the keys are known, and no frame is corrected."""

    def __init__(self, *given, **named):
        super().__init__(*given, **(named | {"correction": 0.0}))


@dataclass(frozen=True)
class Variant:
    """One way to play a checkpoint."""

    title: str  # in the ablation table
    rollout: type[Rollout] = Rollout
    state: bool = True  # whether games use the state


VARIANTS = {
    "full": Variant("the full method"),
    "no_sink": Variant("no sink", Sinkless),
    "sink_index": Variant("sink at the index where it was made", SinkAtIndex),
    "sink_refreshed": Variant("sink renewed every 5 s", SinkRefreshed),
    "window_1": Variant("frame by frame, all levels", FrameByFrame),
    "window_1_one_pass": Variant("frame by frame, one pass", OnePass),
    "uncorrected": Variant("no correction", Uncorrected),
    "stateless": Variant("no state", state=False),
}


def open_variant(name: str, checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> Player:
    """A checkpoint's networks, which play as the variant `name` does; all variants have the same weights."""
    return Player(checkpoint, device, precision, VARIANTS[name].rollout, VARIANTS[name].state)
