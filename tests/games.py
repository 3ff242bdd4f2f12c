"""Tiny games for tests of the model: a denoiser whose every weight matters, a predictor, keys, starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.config import DenoiserConfig
from engine.model.denoiser import Denoiser
from engine.model.state import StateModel
from engine.model.state_spec import StateSpec, features_width, scene_columns
from engine.rollout.rollout import Rollout

KEYS, SHAPE = 3, (2, 4, 6)  # channels, rows, columns: 6 patches and the condition's token
SPEC = StateSpec(
    ("x", "y", "angle", "health", "vx", "vy"),
    ("position", "position", "angle", "scalar", "velocity", "velocity"),
    ("health",),
)
SMALL = DenoiserConfig(
    width=32, layers=2, head_dim=16, patch=2, conv_width=8, conv_in_layers=1, conv_out_layers=1,
    action_history=4, context_frames=3, scene_width=16,
)  # fmt: skip


def shaken(module: nn.Module, by: float = 0.2) -> nn.Module:
    """Every weight moved: gates that start at zero would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((0.2 * by if parameter.ndim == 4 else by) * torch.randn_like(parameter))
    return module


def make_denoiser(states: bool = False, **changes) -> Denoiser:
    """Without `states`, of a world that tells nothing."""
    config = DenoiserConfig(**{**asdict(SMALL), **changes})
    torch.manual_seed(0)
    told = (features_width(SPEC), *SHAPE, scene_columns(SPEC)) if states else (0, *SHAPE)
    return shaken(Denoiser(config, KEYS, *told)).eval()


def make_states() -> StateModel:
    """A predictor whose state moves by whole steps as keys say, fitted to walks over a map of 200 by 100."""
    torch.manual_seed(0)
    states = StateModel(SPEC, KEYS, 8, 16)
    random = torch.Generator().manual_seed(3)
    walk = torch.rand(400, len(SPEC), generator=random) * torch.tensor([200, 100, 360, 100, 8, 8.0])
    keys = (torch.rand(400, KEYS, generator=random) < 0.5).float()
    states.fit(walk, keys, torch.zeros(400, dtype=torch.bool))
    return shaken(states, 0.1).eval().requires_grad_(False)


class Game(NamedTuple):
    """A start and the keys that follow."""

    latents: Tensor  # (b, t, c, y, x)
    before: Tensor  # (b, t, k)
    played: Tensor  # (frames, b, k)
    seed: Tensor  # (b,)
    states: Tensor  # (b, t, s)


def make_game(batch: int = 2, start: int = 4, frames: int = 12) -> Game:
    """Random latents, states and keys, the same each time."""
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, start, *SHAPE, generator=random)
    before = (torch.rand(batch, start, KEYS, generator=random) < 0.5).float()
    played = (torch.rand(frames, batch, KEYS, generator=random) < 0.5).float()
    scale = torch.tensor([200, 100, 360, 100, 8, 8.0])
    states = torch.rand(batch, start, len(SPEC), generator=random) * scale
    return Game(latents, before, played, torch.arange(batch) + 11, states)


def play(rollout: Rollout, game: Game, told: bool = True) -> Tensor:
    """Resets and plays the whole game → the emitted frames (frames, b, c, y, x)."""
    states = game.states if told and rollout.states else None
    rollout.reset(game.latents, game.before, game.seed, states)
    return torch.stack([rollout.step(action) for action in game.played])


def close(made: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return (made - expected).abs().max().item() < tolerance
