"""Session: a game in a generated world, with the methods of a true world."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from ..bounds import short_seed
from ..config import UserError
from ..data.floor import BODY
from ..data.starts import Start
from ..device import autocast
from ..worlds.base import ActionSpace
from .cuda_graph import StepGraph
from .player import Player


class Session:
    """A generated game: `reset` from start frames, then `step(action)` → the frame that this action causes.
    On a GPU steps are played as CUDA graphs, captured at the first reset, unless `graph` is False.
    """

    def __init__(self, player: Player, graph: bool = True):
        self.player, self.world = player, player.world
        keys = self.world.keys
        self.action_space = ActionSpace(tuple(keys), tuple(tuple(codes) for codes in keys.values()))
        self.fps, self.done = self.world.fps, False
        spec = player.states.spec if player.states else None
        self.state_kinds = dict(zip(spec.names, spec.kinds, strict=True)) if spec else {}
        self.rollout = player.make_rollout(1)
        on_gpu = player.device.type == "cuda"
        self.graph = StepGraph(self._draw, len(keys), player.device) if graph and on_gpu else None
        self.held = np.zeros(len(keys), np.float32)
        self.frames_since_change = 0  # frames since the keys changed
        self.step_ms: deque[float] = deque(maxlen=600)  # milliseconds of the last steps, decoding included
        self.frames = 0  # frames since the last reset

    def reset(
        self,
        seed: int,
        frames: np.ndarray,
        actions: np.ndarray | None = None,
        states: list[dict[str, float] | None] | None = None,
    ) -> np.ndarray:
        """Starts from true frames, uint8 (t, h, w, 3), the actions that caused them (t, k; none held unless
        given) and their states → the last frame. Unknown states are read off the frames, if the checkpoint
        has a reader. Raises UserError for frames of another size.
        """
        shape = (self.world.height, self.world.width, 3)
        if frames.shape[1:] != shape:
            size = f"{frames.shape[2]}x{frames.shape[1]}"
            raise UserError(
                f"This model plays frames of {shape[1]}x{shape[0]}; the start frames have {size}."
            )
        if actions is None:
            actions = np.zeros((len(frames), len(self.action_space)), np.float32)
        return self._begin(seed, frames[-1], self.player.encode(frames), actions, states)

    def begin(self, seed: int, start: Start) -> np.ndarray:
        """Starts from a Start (data/starts.py), frames or latents → its last frame, uint8 (h, w, 3)."""
        if start.latents is None:
            return self.reset(seed, start.frames, start.actions, start.states)
        latents = start.latents[None].to(self.player.device)
        frame = self.player.decode(latents[:, -1])[0]
        return self._begin(seed, frame, latents, start.actions, start.states)

    def _begin(
        self, seed: int, frame: np.ndarray, latents: Tensor, actions: np.ndarray, states
    ) -> np.ndarray:
        held = torch.from_numpy(np.asarray(actions, np.float32)).to(self.player.device)[None]
        seeds = torch.tensor([short_seed(seed)], dtype=torch.int64, device=self.player.device)
        laid = self.player.laid_states(states, latents.shape[1])
        known = self.player.known_states(latents, held, laid)
        with torch.inference_mode(), autocast(self.player.device, self.player.dtype, cache=False):
            self.rollout.reset(latents, held, seeds, known)
            if self.graph and not self.graph.captured:
                self.graph.capture()
                self.rollout.reset(latents, held, seeds, known)
        self.held, self.frames_since_change = actions[-1], self.rollout.config.window_frames
        self.frames = 0
        self.step_ms.clear()
        return frame

    def snapshot(self) -> dict[str, Tensor]:
        """The whole game after its last step, as copies on the CPU. To be taken before `speculate`, after
        which the memory is ahead of the frame.
        """
        if self.rollout.speculated is not None:
            raise RuntimeError("the next step has begun; take a snapshot before speculate()")
        counts = {"held": torch.from_numpy(np.array(self.held, np.float32))}
        counts |= {
            "frames": torch.tensor(self.frames),
            "since_change": torch.tensor(self.frames_since_change),
        }
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in (self.rollout.state() | counts).items()
        }

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Goes on from a snapshot of a game in the same networks, bit for bit on the same machine. ValueError
        where it is of others; the game is then as it was.
        """
        own = self.rollout.state()
        extra = {"held", "frames", "since_change"}
        fits = snapshot.keys() == own.keys() | extra and all(
            snapshot[name].shape == value.shape and snapshot[name].dtype == value.dtype
            for name, value in own.items()
        )
        if not fits or snapshot["held"].shape != self.held.shape:
            raise ValueError("a game of other networks")
        with torch.inference_mode(), autocast(self.player.device, self.player.dtype, cache=False):
            if self.graph and not self.graph.captured:
                self.graph.capture()
            self.rollout.load_state({name: snapshot[name] for name in own})
        self.held = snapshot["held"].numpy().copy()
        self.frames, self.frames_since_change = int(snapshot["frames"]), int(snapshot["since_change"])

    def speculate(self) -> None:
        """Computes what does not depend on the next keys, while there is time; nothing on a GPU with
        graphs.
        """
        if not self.graph:
            with torch.inference_mode(), autocast(self.player.device, self.player.dtype, cache=False):
                self.rollout.speculate()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Plays one frame under the keys `action` (k,) → the frame, uint8 (h, w, 3)."""
        start = time.perf_counter()
        self.frames_since_change = self.frames_since_change + 1 if np.array_equal(action, self.held) else 0
        renoise = self.frames_since_change < max(1, self.rollout.config.window_frames - 1)
        with torch.inference_mode():
            if self.graph and self.frames:  # the first step, without a pending commit, is another computation
                frame = self.graph(action, renoise)
            else:
                held = torch.from_numpy(np.asarray(action, np.float32)).to(self.player.device)[None]
                with autocast(self.player.device, self.player.dtype, cache=False):
                    frame = self._draw(held, renoise).cpu().numpy()
        self.held = np.array(action)
        self.frames += 1
        self.step_ms.append(1000 * (time.perf_counter() - start))
        return frame

    def _draw(self, held: Tensor, renoise: bool) -> Tensor:
        """Plays one frame under the keys (1, k) → the frame, uint8 (h, w, 3), on the device."""
        latents = self.rollout.step(held, renoise)
        return self.player.model.autoencoder.decode(latents)[0].permute(1, 2, 0).contiguous()

    def state(self) -> dict[str, float]:
        """The network's own state at the last frame, by name; empty if this game has none."""
        carry = self.rollout.carry
        if carry is None or not self.rollout.has_state[0]:
            return {}
        return dict(zip(self.player.states.spec.names, carry.state[0].tolist(), strict=True))

    def map_lines(self) -> np.ndarray:
        """Four walls (4, 4), as x and y of both ends, around all positions in the recordings: the network has
        no map, but policies need one. (0, 4) where the state lacks x, y or angle.
        """
        states = self.player.states
        if states is None or not {"x", "y", "angle"} <= set(states.spec.names):
            return np.zeros((0, 4))
        place = [states.spec.names.index(name) for name in ("x", "y")]
        (left, low), (right, high) = (
            edge[place].tolist() for edge in (states.scales.low, states.scales.high)
        )
        corners = [(left - BODY, low - BODY), (right + BODY, low - BODY)]
        corners += [(right + BODY, high + BODY), (left - BODY, high + BODY)]
        return np.array([(*a, *b) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)])

    def close(self) -> None:
        """Does nothing; true worlds have something to close."""
