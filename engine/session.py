"""Session: a generated world with the verbs of a true one, on a device, with timings."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from .autoencoder import Autoencoder, to_bytes
from .checkpoint import Checkpoint
from .config import UserError, WorldConfig
from .denoiser import Denoiser
from .device import AUTOCAST, autocast, pick_device, pick_precision
from .graph import StepGraph
from .rollout import Rollout
from .weights import cast_weights, pack_weights
from .worlds.base import ActionSpace


class Player:
    """The networks of a checkpoint, ready to play: autoencoder and denoiser on a device."""

    rollout: type[Rollout] = Rollout  # how they play; ablations play otherwise

    def __init__(self, checkpoint: str | Path, device: str = "auto", precision: str = "auto"):
        self.checkpoint = Checkpoint(checkpoint)
        self.world: WorldConfig = self.checkpoint.world
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.dtype = AUTOCAST[self.precision]
        self.autoencoder = Autoencoder(self.checkpoint.model.autoencoder)
        self.checkpoint.load_into("autoencoder", self.autoencoder)
        self.denoiser = make_denoiser(self.checkpoint, self.autoencoder)
        self.checkpoint.load_into("denoiser", self.denoiser)
        for module in (self.autoencoder, self.denoiser):
            self.ready(module)

    def ready(self, module: Module) -> Module:
        """A network with its weights, brought to the device and laid out for play there."""
        module.to(self.device).eval().requires_grad_(False)
        cast_weights(module, self.precision)
        if self.device.type == "cpu":
            pack_weights(module, self.precision)
        return module

    def make_rollout(self, batch: int, folded: bool = True) -> Rollout:
        """Games side by side in these networks."""
        return self.rollout(self.denoiser, batch, self.dtype or torch.float32, folded)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 frames (t, h, w, 3) → latents (1, t, c, y, x)."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(self.device)
        with autocast(self.device, self.dtype):
            return self.autoencoder.encode(pixels)[None]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (t, c, y, x) → uint8 frames (t, h, w, 3)."""
        with autocast(self.device, self.dtype):
            return self.autoencoder.decode(latents).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_denoiser(checkpoint: Checkpoint, autoencoder: Autoencoder) -> Denoiser:
    """The denoiser that a checkpoint's configs describe, with fresh weights."""
    model, world = checkpoint.model, checkpoint.world
    return Denoiser(model.denoiser, len(world.keys), *model.autoencoder.latent_shape(world), autoencoder)


class Session:
    """A game inside the network: `reset` from start frames, then `step(action)` → the frame that this action
    caused. On a GPU a step is a CUDA graph (`graph`), captured at the first reset.
    """

    def __init__(self, player: Player, graph: bool = True, folded: bool = True):
        self.player, self.world = player, player.world
        keys = self.world.keys
        self.action_space = ActionSpace(tuple(keys), tuple(tuple(codes) for codes in keys.values()))
        self.fps, self.done = self.world.fps, False
        self.rollout = player.make_rollout(1, folded)
        on_gpu = player.device.type == "cuda"
        self.graph = StepGraph(self._draw, len(keys), player.device) if graph and on_gpu else None
        self.held = np.zeros(len(keys), np.float32)
        self.since = 0  # frames since the keys changed
        self.step_ms: deque[float] = deque(maxlen=600)  # the last steps' times, decode included
        self.frames = 0  # since the last reset

    def reset(self, seed: int, frames: np.ndarray, actions: np.ndarray | None = None) -> np.ndarray:
        """Starts from true frames, uint8 (t, h, w, 3), and the actions that caused them (t, k) → the last of
        them.
        """
        shape = (self.world.height, self.world.width, 3)
        if frames.shape[1:] != shape:
            size = f"{frames.shape[2]}x{frames.shape[1]}"
            raise UserError(
                f"This model plays frames of {shape[1]}x{shape[0]}; the start frames have {size}."
            )
        if actions is None:
            actions = np.zeros((len(frames), len(self.action_space)), np.float32)
        latents = self.player.encode(frames)
        held = torch.from_numpy(np.asarray(actions, np.float32)).to(self.player.device)[None]
        seeds = torch.tensor([seed], dtype=torch.int64, device=self.player.device)
        with torch.inference_mode(), autocast(self.player.device, self.player.dtype, cache=False):
            self.rollout.reset(latents, held, seeds)
            if self.graph and not self.graph.captured:
                self.graph.capture()
                self.rollout.reset(latents, held, seeds)
        self.held, self.since = actions[-1], self.rollout.config.window
        self.frames = 0
        self.step_ms.clear()
        return frames[-1]

    def prepare(self) -> None:
        """Does what can be done before it is known which keys are held next; a GPU has no need for it."""
        if not self.graph:
            with torch.inference_mode(), autocast(self.player.device, self.player.dtype, cache=False):
                self.rollout.prepare()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3)."""
        start = time.perf_counter()
        self.since = self.since + 1 if np.array_equal(action, self.held) else 0
        stale = self.since < self.rollout.config.window - 1
        with torch.inference_mode():
            if self.graph and self.frames:  # the first step has nothing to commit: it is another one
                frame = self.graph(action, stale)
            else:
                held = torch.from_numpy(np.asarray(action, np.float32)).to(self.player.device)[None]
                with autocast(self.player.device, self.player.dtype, cache=False):
                    frame = self._draw(held, stale).cpu().numpy()
        self.held = np.array(action)
        self.frames += 1
        self.step_ms.append(1000 * (time.perf_counter() - start))
        return frame

    def _draw(self, held: Tensor, stale: bool) -> Tensor:
        """Keys (1, k) → the frame that they cause, uint8 (h, w, 3), on the device."""
        self.rollout.step(held, stale)
        return to_bytes(self.rollout.picture[0]).permute(1, 2, 0).contiguous()

    def state(self) -> dict[str, float]:
        """Nothing: a network knows no true state."""
        return {}

    def close(self) -> None:
        """Nothing is held open."""
