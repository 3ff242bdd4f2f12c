"""Game: the generated world and the true one behind the same few verbs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PlayConfig, UserError, WorldConfig
from ..data.about_world import described
from ..data.starts import Start, load_start, packed_starts, true_start
from ..shipped import shipped
from ..worlds import make_world
from ..worlds.base import ActionSpace


class TrueGame:
    """The simulator. `start` says where the running episode began."""

    source, digest, checkpoint, precision = "true", "", "", ""

    def __init__(self, config: PlayConfig) -> None:
        """Opens the simulator. Raises UserError where it is not installed or does not start."""
        self._world = make_world(config.world)
        self.action_space: ActionSpace = self._world.action_space
        self.world: WorldConfig = described(config.world, self._world)
        self.fps, self.state_kinds = self._world.fps, self._world.state_kinds
        self.start = "episode"

    @property
    def done(self) -> bool:
        """The episode is over; `reset` before the next step."""
        return self._world.done

    def reset(self, seed: int, start: str = "") -> np.ndarray:
        """Starts an episode → first frame, uint8 (h, w, 3). There is no choice of starts: the seed is all."""
        return self._world.reset(seed)

    def choose_next(self) -> None:
        """Nothing: the next seed is the next start."""

    def speculate(self) -> None:
        """Nothing: a simulator is quick."""

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3)."""
        return self._world.step(action)

    def snapshot(self) -> None:
        """None: simulators cannot be put back."""

    def state(self) -> dict[str, float]:
        """True state where the simulator tells it."""
        return self._world.state()

    def map_lines(self) -> np.ndarray:
        """The walls of the map, (m, 4), where the simulator tells them."""
        return self._world.map_lines()

    def close(self) -> None:
        """Ends the simulator."""
        self._world.close()


class Dream:
    """The network. A game starts from a few true frames: shipped clips, a recording or a picture."""

    source, done = "dream", False

    def __init__(self, config: PlayConfig) -> None:
        """Loads the checkpoint and the first start. Raises UserError where either is not to be had."""
        # these take torch along, which a window need not wait for
        from ..model.layers import choose_kernels
        from ..rollout.player import Player
        from ..rollout.session import Session

        path = Path(config.checkpoint)
        if not path.is_absolute() and not path.exists():
            path = shipped(path)  # when the program is called from another folder
        choose_kernels(config.kernels)
        player = Player(path, config.device, config.precision)
        self._session = Session(player, config.graph)
        self._frames = player.known_frames
        self._shipped = packed_starts(player.checkpoint.extras, player.checkpoint.model, player.world)
        self._loaded: dict[str, Start] = {}
        self.action_space, self.fps = self._session.action_space, self._session.fps
        self.state_kinds = self._session.state_kinds
        self.world, self.checkpoint, self.digest = player.world, str(path), player.checkpoint.digest()
        self.precision = player.precision
        self.start = config.start or next(iter(self._shipped), "true game")

    def reset(self, seed: int, start: str = "") -> np.ndarray:
        """Starts anew from `start` (empty: the chosen one) → the start's last frame, uint8 (h, w, 3)."""
        self.start = start or self.start
        if self.start not in self._loaded:
            if self.start == "true game":
                loaded = true_start(self.world, 0, self._frames)
            else:
                chosen = self.start, self.action_space, self._shipped, self._frames
                loaded = load_start(*chosen, self.world)
            self._loaded = {self.start: loaded}
        chosen = self._loaded[self.start]
        return self._session.begin(seed, chosen)

    def choose_next(self) -> None:
        """Chooses the next shipped start for the coming resets."""
        names = list(self._shipped)
        if names:
            self.start = names[(names.index(self.start) + 1) % len(names) if self.start in names else 0]

    def speculate(self) -> None:
        """Does what can be done before it is known which keys are held next."""
        self._session.speculate()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3)."""
        return self._session.step(action)

    def snapshot(self) -> dict[str, Any]:
        """The whole game as it is now, before `speculate`; see Session.snapshot."""
        return self._session.snapshot()

    def restore(self, snapshot: Mapping[str, Any], start: str) -> None:
        """Goes on from a snapshot of a game that began at `start`."""
        self._session.restore(snapshot)
        self.start = start

    def state(self) -> dict[str, float]:
        """What the network believes of its world at the last frame; empty where it knows nothing."""
        return self._session.state()

    def map_lines(self) -> np.ndarray:
        """What serves policies as a map; see Session.map_lines."""
        return self._session.map_lines()

    def close(self) -> None:
        """Nothing is held open."""


Game = TrueGame | Dream


def open_game(config: PlayConfig) -> Game:
    """The game that `config.game` asks for. Raises UserError where it is not to be had."""
    if config.game == "true":
        return TrueGame(config)
    if config.threads:
        import torch

        torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
    from ..device import is_lack_of_memory

    try:
        return Dream(config)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        said = f"There is not enough memory for {config.checkpoint}"
        raise UserError(f"{said}; close other programs.") from None
