"""ConditionEncoder: a frame's keys and state → its condition, which the transformer reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .scene import SceneModel


def action_windows(actions: Tensor, history: int) -> Tensor:
    """Actions (b, history - 1 + t, k) → for each of the last t frames, its own action and those of the
    `history` - 1 frames before it, oldest first (b, t, history · k).
    """
    return actions.unfold(1, history, 1).transpose(2, 3).flatten(2)


class ConditionEncoder(nn.Module):
    """A frame's keys and state → its condition (b, t, width): a token of d numbers, followed by the scene
    that belongs to the state, where the world has one (`parts` separates the two).

    The keys are those of the last `history` frames, the frame's own included, since walking takes many frames
    to reach its full speed. Where the state is unknown it is replaced by zeros, and a flag says so.
    """

    def __init__(
        self,
        keys: int,
        history: int,
        features: int,
        ahead: int,
        token_width: int,
        scene: SceneModel | None = None,
    ):
        super().__init__()
        self.scene, self.token_width = scene, token_width
        self.width = token_width + (math.prod(scene.shape) if scene else 0)
        width = token_width
        self.history, self.ahead = history, ahead
        given = history * keys + features + 1 + ahead + 1
        self.mlp = nn.Sequential(
            nn.Linear(given, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(
        self,
        actions: Tensor,
        features: Tensor,
        has_state: Tensor,
        ahead: Tensor,
        prev_sigma: Tensor,
    ) -> Tensor:
        """actions (b, history - 1 + t, k); features (b, t, f) of the states (state_spec.py); has_state (b,
        t), 1 where these are known; ahead (t,) int64, the number of frames between a frame and the finished
        one that it is made from; prev_sigma (b, t), the noise level of that one → conditions (b, t, width).
        """
        windows = action_windows(actions, self.history)
        has = has_state[..., None].to(windows.dtype)
        # not one_hot, which reads on the host: a step must be capturable as a CUDA graph
        place = (ahead[:, None] == torch.arange(self.ahead, device=ahead.device)).to(windows.dtype)
        place = place.expand(len(windows), -1, -1)
        parts = [windows, features.to(windows.dtype) * has, has, place, prev_sigma[..., None]]
        token = self.mlp(torch.cat(parts, -1))
        if self.scene is None:
            return token
        scene = self.scene(features.to(windows.dtype)).flatten(2) * has
        return torch.cat([token, scene.to(token.dtype)], -1)

    def parts(self, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """A condition (b, t, width) → token (b, t, d), and scene (b, t, c, y, x) or None without one."""
        if self.scene is None:
            return condition, None
        token, scene = condition.split([self.token_width, self.width - self.token_width], -1)
        return token, scene.unflatten(-1, self.scene.shape)
