"""Screen: the window, its scaling, and the text and panels that are drawn over the picture."""

from __future__ import annotations

import os
import sys
from functools import lru_cache

import numpy as np
import pygame

from ...config import UserError
from .owner import Owner

BACKGROUND, PANEL = (14, 15, 18), (10, 11, 14, 165)
WHITE, GREY, DARK = (240, 241, 243), (158, 162, 170), (20, 21, 24)
GREEN, RED, AMBER = (126, 211, 121), (235, 72, 66), (245, 181, 66)
HIDDEN = ("dummy", "offscreen")  # SDL's drivers that nobody sees


def display_trouble() -> str:
    """Why no window can be opened here; empty where one can."""
    driver = os.environ.get("SDL_VIDEODRIVER", "")
    nothing = not driver and not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and nothing:
        return "neither DISPLAY nor WAYLAND_DISPLAY is set"
    try:
        pygame.display.init()
    except pygame.error as error:
        return str(error)
    return ""


def seen_by_somebody() -> bool:
    """The display that SDL opened is a real one."""
    return pygame.display.get_driver() not in HIDDEN


class Screen:
    """The window. `show` draws a frame, uint8 (h, w, 3), as large as it fits; text and panels go over it.

    Until `close`, pygame's display is that of the thread that opened it.
    """

    def __init__(self, width: int, height: int, scale: int, smooth: bool, fullscreen: bool) -> None:
        """Opens a window for frames of width x height pixels. Raises UserError where there is no display."""
        try:
            pygame.display.init()
            pygame.font.init()
            desktop = pygame.display.get_desktop_sizes()[0]
            fits = min(scale, int(desktop[0] * 0.9) // width, int(desktop[1] * 0.85) // height)
            self._size = (width * max(1, fits), height * max(1, fits))
            self.smooth, self.fullscreen = smooth, fullscreen
            self._open()
        except pygame.error as error:
            said = f"No window could be opened ({error})"
            raise UserError(f"{said}; start play.py on a desktop, or with display=headless.") from None
        pygame.display.set_caption("Rollplay")
        self._owner = Owner()

    def _open(self) -> None:
        if self.fullscreen:
            self.surface = pygame.display.set_mode((0, 0), pygame.FULLSCREEN)
        else:
            self.surface = pygame.display.set_mode(self._size, pygame.RESIZABLE)
        pygame.mouse.set_visible(not self.fullscreen)

    def toggle_fullscreen(self) -> None:
        """Between the whole screen and the window as it was."""
        if not self.fullscreen:
            self._size = self.surface.get_size()
        self.fullscreen = not self.fullscreen
        self._open()

    def clear(self) -> None:
        """Fills the window with the background."""
        self.surface = pygame.display.get_surface()  # a resize makes another one
        self.surface.fill(BACKGROUND)

    def show(self, frame: np.ndarray) -> None:
        """Draws the frame in the middle, as large as it fits; whole multiples only when not smooth."""
        self.clear()
        height, width = frame.shape[:2]
        across, down = self.surface.get_size()
        scale = min(across / width, down / height)
        if not self.smooth and scale >= 1:
            scale = int(scale)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = pygame.image.frombuffer(np.ascontiguousarray(frame), (width, height), "RGB").convert()
        enlarge = pygame.transform.smoothscale if self.smooth else pygame.transform.scale
        self.surface.blit(enlarge(picture, size), ((across - size[0]) // 2, (down - size[1]) // 2))

    def flip(self) -> None:
        """Shows what was drawn."""
        pygame.display.flip()

    @property
    def em(self) -> int:
        """Height of the text in pixels; grows with the window."""
        return max(13, min(30, min(self.surface.get_width() // 46, self.surface.get_height() // 34)))

    def panel(self, rectangle: pygame.Rect) -> None:
        """A translucent dark panel with round corners."""
        self.surface.blit(_panel(rectangle.size, self.em // 2), rectangle)

    def text(
        self, words: str, place: tuple[int, int], color=WHITE, anchor: str = "topleft", size: float = 1.0
    ):
        """Draws one line of text with its `anchor` at `place` → its rectangle."""
        picture = _text(words, round(self.em * size), color)
        rectangle = picture.get_rect(**{anchor: place})
        self.surface.blit(picture, rectangle)
        return rectangle

    def text_size(self, words: str, size: float = 1.0) -> tuple[int, int]:
        """Width and height of a line of text in pixels."""
        return _text(words, round(self.em * size), WHITE).get_size()

    def close(self) -> None:
        """Closes the window."""
        _text.cache_clear()
        _font.cache_clear()
        _panel.cache_clear()
        self._owner.release()
        pygame.quit()


@lru_cache(8)
def _font(size: int) -> pygame.font.Font:
    return pygame.font.Font(None, round(size * 1.35))  # pygame's own font, sized by line and not by letter


@lru_cache(256)
def _text(words: str, size: int, color: tuple[int, int, int]) -> pygame.Surface:
    return _font(size).render(words, True, color)


@lru_cache(32)
def _panel(size: tuple[int, int], radius: int) -> pygame.Surface:
    surface = pygame.Surface(size, pygame.SRCALPHA)
    pygame.draw.rect(surface, PANEL, surface.get_rect(), border_radius=radius)
    return surface
