"""Denoiser: noisy latents, noise levels, the last finished frame, conditions and memory → clean estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DenoiserConfig
from .condition import ConditionEncoder
from .kv_cache import KVCache, KVRecorder
from .layers import AttentionContext
from .scene import SceneModel
from .transformer import Transformer


class Finished(NamedTuple):
    """A finished frame whose keys and values the next pass will write."""

    clean: Tensor  # (b, 1, c, y, x)
    prev_frame: Tensor  # (b, 1, c, y, x), the frame before it
    condition: Tensor  # (b, 1, width)


class Denoiser(nn.Module):
    """Estimates the clean latents of a window of frames, each with its own noise level and condition.

    The transformer's output is added to the last finished frame, so that an untrained network repeats it.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        keys: int,
        features: int,
        channels: int,
        rows: int,
        columns: int,
        scene_columns: Sequence[int] = (),
    ):
        """`features`: width of a state's features; `scene_columns`: those of them that determine the scene.
        Latents are (channels, rows, columns).
        """
        super().__init__()
        self.config, self.keys, self.features = config, keys, features
        self.shape = (channels, rows, columns)
        scene = SceneModel(scene_columns, *self.shape, config.scene_width) if scene_columns else None
        self.condition = ConditionEncoder(
            keys, config.action_history, features, config.window_frames, config.width, scene
        )
        self.transformer = Transformer(config, channels, rows, columns, scene is not None)
        self.register_buffer("ladder", torch.tensor(config.ladder), persistent=False)

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        prev_frame: Tensor,
        condition: Tensor,
        frame: Tensor | int,
        memory: AttentionContext,
        pending: Finished | None = None,
    ) -> Tensor:
        """noisy (b, t, c, y, x), sigma (b, t), the last finished frame (b, 1, c, y, x), condition (b, t,
        width), index of the first frame, memory → clean (b, t, c, y, x), float32. If a frame is pending, its
        keys and values are written in the same pass.
        """
        given = (noisy, prev_frame.expand_as(noisy), sigma, condition)
        if pending:
            given = [torch.cat(both, 1) for both in zip(self._committed(pending), given, strict=True)]
            frame = frame - 1
        made = self._transformed(*given, frame, memory, context_only_frames=1 if pending else 0)
        return prev_frame + made.float()

    def commit(
        self, clean: Tensor, condition: Tensor, frame: int, memory: KVRecorder, sigma: Tensor | None = None
    ) -> None:
        """Writes the keys and values of finished frames (b, t, c, y, x) with conditions (b, t, width) into an
        empty memory; `frame`: index of the first; sigma (b, t): their noise levels, 0 unless given. Each
        frame attends to itself and to the `context_frames` before it, not to the sink.
        """
        sigma = clean.new_zeros(clean.shape[:2]) if sigma is None else sigma
        prev_frame = torch.cat([clean[:, :1], clean[:, :-1]], 1)
        mask = self.history_mask(clean.shape[1], clean.device)
        self._transformed(clean, prev_frame, sigma, condition, frame, memory, mask, clean.shape[1])

    def commit_pending(self, pending: Finished, memory: KVCache) -> None:
        """Writes the keys and values of the last finished frame, in a pass of its own."""
        memory.plan_pass(0, pending=True)
        self._transformed(*self._committed(pending), memory.frame - 1, memory, context_only_frames=1)

    def _transformed(
        self, noisy: Tensor, prev_frame: Tensor, sigma: Tensor, condition: Tensor, *given, **named
    ) -> Tensor | None:
        return self.transformer(noisy, prev_frame, sigma, *self.condition.parts(condition), *given, **named)

    def _committed(self, pending: Finished) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = pending.clean.new_zeros(len(pending.clean), 1)
        return pending.clean, pending.prev_frame, sigma, pending.condition

    def history_mask(self, frames: int, device: torch.device) -> Tensor:
        """(frames · n, frames · n): 0 where a token may attend to a key of its own frame or of the
        `context_frames` before it, -inf elsewhere.
        """
        index = torch.arange(frames, device=device)
        age = index[:, None] - index
        allowed = (age >= 0) & (age <= self.config.context_frames)
        n = self.transformer.tokens
        mask = torch.where(allowed, 0.0, -torch.inf).repeat_interleave(n, 0).repeat_interleave(n, 1)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return mask.to(dtype or torch.float32)

    def make_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for games played side by side."""
        return KVCache(self.config, self.transformer.tokens, batch, device, dtype)
