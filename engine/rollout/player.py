"""Player: the world model of a checkpoint on a device, ready to play."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import WorldConfig
from ..device import AUTOCAST, autocast, pick_device, pick_precision
from ..model.checkpoint import Checkpoint
from ..model.networks import load_world_model
from ..model.state import StateModel
from ..model.state_reader import completed
from .inference_weights import cast_weights, pack_weights
from .rollout import Rollout


class Player:
    """A world model on a device, in a precision, with weights laid out for play."""

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        precision: str = "auto",
        rollout: Callable[..., Rollout] = Rollout,
        state: bool = True,
    ):
        """`rollout`: the class that plays games, another one in ablations. `state`: whether games may use the
        state; with False they are played as in a world without one. Raises UserError for a checkpoint, device
        or precision that cannot be used.
        """
        self.rollout = rollout
        self.checkpoint = Checkpoint(checkpoint)
        self.world: WorldConfig = self.checkpoint.world
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.dtype = AUTOCAST[self.precision]
        self.model = load_world_model(self.checkpoint, state).to(self.device).eval().requires_grad_(False)
        for large in (self.model.autoencoder, self.model.generator.denoiser):  # the others stay in float32
            cast_weights(large, self.precision)
            if self.device.type == "cpu":
                pack_weights(large, self.precision)

    @property
    def states(self) -> StateModel | None:
        """The network that predicts the world's state; None without state."""
        return self.model.generator.states

    @property
    def known_frames(self) -> int:
        """How many true frames a game should begin with."""
        return self.model.generator.denoiser.config.known_frames

    def make_rollout(self, batch: int, correction: float | None = None) -> Rollout:
        """A rollout of `batch` games side by side; `correction`: as in Rollout."""
        dtype = self.dtype or torch.float32
        return self.rollout(self.model.generator, batch, dtype, correction=correction)

    def laid_states(self, states: list[dict[str, float] | None] | None, frames: int) -> Tensor | None:
        """The states of so many frames as a tensor (1, frames, s) on the device, NaN for numbers that are not
        known; None for a world without state.
        """
        if self.states is None:
            return None
        names = self.states.spec.names
        rows = [[(state or {}).get(name, np.nan) for name in names] for state in states or [None] * frames]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)[None]

    @torch.inference_mode()
    def known_states(self, latents: Tensor, actions: Tensor, states: Tensor | None) -> Tensor | None:
        """A start's latents (b, t, c, y, x), actions (b, t, k) and states (b, t, s), NaN where unknown →
        states (b, t, s) without gaps. Unchanged if the checkpoint has no reader.
        """
        reader = self.model.generator.reader
        if states is None or reader is None:
            return states
        return completed(self.states, reader, latents.float(), actions, states)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 frames (t, h, w, 3) → latents (1, t, c, y, x)."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(self.device)
        with autocast(self.device, self.dtype):
            return self.model.autoencoder.encode(pixels)[None]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (t, c, y, x) → uint8 frames (t, h, w, 3)."""
        with autocast(self.device, self.dtype):
            return self.model.autoencoder.decode(latents).permute(0, 2, 3, 1).contiguous().cpu().numpy()
