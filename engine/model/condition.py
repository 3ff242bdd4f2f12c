"""ConditionEncoder: held keys and state of a frame → its condition, the token that the transformer reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .scene import SceneModel


def action_windows(actions: Tensor, history: int) -> Tensor:
    """Actions (b, history - 1 + t, k) → for each of the last t frames those of the `history` frames up to and
    including it, (b, t, history · k), the oldest first.
    """
    return actions.unfold(1, history, 1).transpose(2, 3).flatten(2)


class ConditionEncoder(nn.Module):
    """Held keys and state of a frame → its condition (b, t, width): one token of d numbers, and behind it the
    scene that belongs to the state, where the world tells one (`parts` takes them apart).

    The keys are those of the last `history` frames and its own, as walking takes many frames to reach its
    speed. Where a world tells no state, or a game has none, a flag says so in its place.
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
        """actions (b, history - 1 + t, k), what is read of the states (b, t, f), has_state (b, t) 1 where
        these are to be believed, ahead (t,) int64: how many frames lie between a frame and the finished one
        that it is made from, prev_sigma (b, t): how noisy this one is → (b, t, width).
        """
        windows = action_windows(actions, self.history)
        has = has_state[..., None].to(windows.dtype)
        # not one_hot, which reads on the host, where a step is to be captured
        place = (ahead[:, None] == torch.arange(self.ahead, device=ahead.device)).to(windows.dtype)
        place = place.expand(len(windows), -1, -1)
        parts = [windows, features.to(windows.dtype) * has, has, place, prev_sigma[..., None]]
        token = self.mlp(torch.cat(parts, -1))
        if self.scene is None:
            return token
        scene = self.scene(features.to(windows.dtype)).flatten(2) * has
        return torch.cat([token, scene.to(token.dtype)], -1)

    def parts(self, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """A condition (b, t, width) → token (b, t, d) and scene (b, t, c, y, x)."""
        if self.scene is None:
            return condition, None
        token, scene = condition.split([self.token_width, self.width - self.token_width], -1)
        return token, scene.unflatten(-1, self.scene.shape)
