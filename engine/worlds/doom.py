"""ViZDoom scenarios as a `World`: headless, silent, the same bytes for the same seed and actions."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..bounds import short_seed
from ..config import UserError, WorldConfig
from .base import ActionSpace
from .guard import Guard, children

BUTTONS = {
    "forward": "MOVE_FORWARD",
    "backward": "MOVE_BACKWARD",
    "strafe_left": "MOVE_LEFT",
    "strafe_right": "MOVE_RIGHT",
    "turn_left": "TURN_LEFT",
    "turn_right": "TURN_RIGHT",
    "attack": "ATTACK",
}
VARIABLES = {
    "x": "POSITION_X",
    "y": "POSITION_Y",
    "angle": "ANGLE",
    "eye": "CAMERA_POSITION_Z",
    "vx": "VELOCITY_X",
    "vy": "VELOCITY_Y",
    "health": "HEALTH",
    "ammo": "SELECTED_WEAPON_AMMO",
}
KINDS = {"x": "position", "y": "position", "angle": "angle", "vx": "velocity", "vy": "velocity"}
STEP, DOORWAY = 24, 56  # map units: the highest step and the lowest gap that a player passes
_starting = threading.Lock()  # the working directory belongs to all threads
START_TICS = 14  # by then the weapon is raised in every scenario


class DoomWorld:
    """One ViZDoom scenario; `step` advances it by `config.tics` of 1/35 s.

    Its state: x, y (map units), angle (degrees, 0 east, 90 north), eye (height of the camera, which bobs in
    walking), vx, vy (map units a tic, after friction), health, and ammo where there is a key to fire.
    """

    def __init__(self, config: WorldConfig) -> None:
        """Starts the simulator. Raises UserError for a missing package, scenario, key or resolution."""
        try:
            import vizdoom
        except ImportError:
            raise UserError("The world needs ViZDoom; install it with: pip install -e .[doom]") from None
        self.config = config
        self.action_space = ActionSpace(tuple(config.keys), tuple(map(tuple, config.keys.values())))
        self.fps = config.fps
        self.done = True
        self._frames = 0
        told = [name for name in VARIABLES if name != "ammo" or "attack" in config.keys]
        self.state_kinds = {name: KINDS.get(name, "scalar") for name in told}
        self._variables = {name: getattr(vizdoom.GameVariable, VARIABLES[name]) for name in told}
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="rollplay-doom-", ignore_cleanup_errors=True)
        except OSError as error:
            raise UserError(f"ViZDoom needs a temporary folder to start in: {error.strerror}.") from None
        others = children()
        try:
            self._game = self._configure(vizdoom)
            with _inside(self._folder.name):
                self._game.init()
        except Exception as error:  # one class per cause; all mean that it did not start
            self._folder.cleanup()
            if isinstance(error, UserError):
                raise
            said = " ".join(str(error).split())
            raise UserError(f"ViZDoom did not start {config.scenario!r}: {said}") from None
        self._lines = _walls(self._game.get_state().sectors)
        self._game.set_sectors_info_enabled(False)  # read once: in every state it costs a fifth of the speed
        self._guard = Guard(children() - others)

    def _configure(self, vizdoom):
        config = self.config
        scenario = Path(vizdoom.scenarios_path) / f"{config.scenario}.cfg"
        if not config.scenario or not scenario.is_file():
            known = ", ".join(sorted(path.stem for path in scenario.parent.glob("*.cfg")))
            raise UserError(f"ViZDoom has no scenario {config.scenario!r}; choose one of {known}.")
        unknown = [name for name in config.keys if name not in BUTTONS]
        if unknown or not config.keys:
            given = ", ".join(unknown) or "none"
            raise UserError(f"world.keys needs some of {', '.join(BUTTONS)}, not {given}.")
        resolution = f"RES_{2 * config.width}X{2 * config.height}"
        if not hasattr(vizdoom.ScreenResolution, resolution):
            raise UserError(
                f"ViZDoom cannot draw {config.width}x{config.height}; 128x96, 160x128 and 256x192 it can."
            )

        game = vizdoom.DoomGame()
        game.load_config(str(scenario))
        game.set_doom_config_path(str(Path(self._folder.name) / "vizdoom.ini"))
        if config.map:
            game.set_doom_map(config.map)
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, resolution))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_available_buttons([getattr(vizdoom.Button, BUTTONS[name]) for name in config.keys])
        game.set_available_game_variables([])
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_render_weapon(True)
        for draw in ("hud", "minimal_hud", "crosshair", "messages", "screen_flashes"):
            getattr(game, f"set_render_{draw}")(False)
        game.set_sectors_info_enabled(True)
        game.set_episode_start_time(START_TICS)
        game.set_episode_timeout(0)  # `done` counts frames itself
        return game

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode → first frame, uint8 (h, w, 3)."""
        self._game.set_seed(short_seed(seed))
        self._game.new_episode()
        self.done = False
        self._frames = 0
        self._read()
        return self._frame

    def step(self, action: np.ndarray) -> np.ndarray:
        """Holds the keys `action` (k,) for one frame → frame, uint8 (h, w, 3); on death the last again."""
        if self.done:
            raise RuntimeError("the episode is over; reset the world before the next step")
        self._game.make_action([float(held > 0.5) for held in action], self.config.tics)
        self._frames += 1
        if self._game.is_episode_finished():
            self.done = True
        else:
            self._read()
            self.done = self._frames >= self.config.episode_frames
        return self._frame

    def _read(self) -> None:
        screen = self._game.get_state().screen_buffer  # (2h, 2w, 3)
        rows = np.add(screen[0::2], screen[1::2], dtype=np.uint16)
        self._frame = ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)  # (h, w, 3)
        self._state = {name: self._game.get_game_variable(value) for name, value in self._variables.items()}

    def state(self) -> dict[str, float]:
        """True state at the last frame, as the class says."""
        return dict(self._state)

    def map_lines(self) -> np.ndarray:
        """The walls and steps that stop a player, in map units: (m, 4), x1 y1 x2 y2."""
        return self._lines

    def close(self) -> None:
        """Ends the simulator."""
        self._game.close()
        self._guard.close()
        self._folder.cleanup()


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Works in `folder` for a moment. ViZDoom writes into the directory that it starts in, and without leave
    to write there, or where several start at once, it may crash.
    """
    with _starting:
        try:
            before = os.getcwd()
        except OSError:  # it has been deleted
            before = tempfile.gettempdir()
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _walls(sectors) -> np.ndarray:
    """ViZDoom's sectors → (m, 4) of the lines that stop a player: walls, high steps and low gaps."""
    sides: dict[tuple, list] = {}
    blocking = set()
    for sector in sectors:
        for line in sector.lines:
            ends = tuple(sorted([(line.x1, line.y1), (line.x2, line.y2)]))
            sides.setdefault(ends, []).append(sector)
            if line.is_blocking:
                blocking.add(ends)
    for ends, (first, *others) in sides.items():
        for other in others:
            gap = min(first.ceiling_height, other.ceiling_height) - max(
                first.floor_height, other.floor_height
            )
            if abs(first.floor_height - other.floor_height) > STEP or gap < DOORWAY:
                blocking.add(ends)
    return np.array([[*a, *b] for a, b in sorted(blocking)], float).reshape(-1, 4)
