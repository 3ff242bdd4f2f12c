"""Small Gymnasium environments as people publish them: world.id=gym_games:NAME-v0, one oddity each."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces


class Plain(gymnasium.Env):
    """A bright square that moves by a pixel a step; `taken` are the actions."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(0, 255, (32, 64, 3), np.uint8)
    taken: list = []  # of the game that was made last

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.steps = render_mode, 0
        Plain.taken = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.picture(), {}

    def step(self, action):
        self.taken.append(action)
        self.steps += 1
        return self.picture(), 0.0, False, False, {}

    def picture(self) -> np.ndarray:
        picture = np.full((32, 64, 3), 40, np.uint8)
        picture[8:16, 8 + self.steps % 40 :][:, :8] = (200, 100, 50)
        return picture

    def render(self):
        return self.picture()


class Drawn(Plain):
    """It renders what the test says: `draw` makes it of the picture and the number of steps."""

    draw = staticmethod(lambda picture, steps: picture)

    def render(self):
        return Drawn.draw(self.picture(), self.steps)


class Crane(Plain):
    """Two motors, which know nothing of each other."""

    action_space = spaces.MultiDiscrete([3, 2])

    def step(self, action):
        seen, *rest = super().step(action)
        self.steps += int(action[0]) + int(action[1])
        return seen, *rest


class Ends(Plain):
    """Episodes of four steps, of whose end nothing is drawn."""

    def step(self, action):
        seen, reward, _, truncated, info = super().step(action)
        return seen, reward, self.steps == 4, truncated, info

    def render(self):
        return None if self.steps == 4 else self.picture()


class Fails(Plain):
    """It raises `error` in the method `where`, from the fifth step on."""

    where, error = "step", ValueError("the arm left its workspace")

    def fail(self, method: str) -> None:
        if method == Fails.where and (method == "__init__" or len(self.taken) >= 5):
            raise Fails.error

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.fail("__init__")

    def reset(self, *, seed=None, options=None):
        self.fail("reset")
        return super().reset(seed=seed)

    def step(self, action):
        self.fail("step")
        return super().step(action)

    def render(self):
        self.fail("render")
        return super().render()

    def close(self):
        self.fail("close")


class Moves(Plain):
    """Its actions are what the test says."""

    names: list = []

    def get_action_meanings(self):
        return self.names


class Pygame(Plain):
    """It takes pygame for its own: opens a display, reads all events, ends pygame."""

    def draw(self) -> np.ndarray:
        import pygame

        pygame.init()
        screen = pygame.display.set_mode((64, 32))
        assert pygame.display.get_surface() is screen
        pygame.surfarray.blit_array(screen, self.picture().swapaxes(0, 1))
        pygame.event.pump()
        pygame.event.get()
        pygame.display.flip()
        return pygame.surfarray.array3d(screen).swapaxes(0, 1)

    def quit(self) -> None:
        import pygame

        pygame.font.quit()
        pygame.display.quit()
        pygame.quit()

    def render(self):
        drawn = self.draw()
        assert np.array_equal(drawn, self.picture())
        self.quit()
        return drawn

    def close(self):
        self.quit()


for game in (Plain, Drawn, Crane, Ends, Fails, Moves, Pygame):
    gymnasium.register(f"{game.__name__}-v0", entry_point=game)
