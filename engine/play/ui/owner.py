"""Owner: while the window is open, pygame's display, fonts and events belong to its thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pygame


class Owner:
    """Gymnasium environments draw with pygame, too, and know nothing of a window beside them: nearly all end
    pygame when they are closed, others resize the display or empty the queue of events. What they ask of it
    in the playing thread has no effect, but that they get a surface of their own to draw on.
    """

    def __init__(self) -> None:
        """pygame's display becomes that of the calling thread, until `release`."""
        self._thread = threading.get_ident()
        self._surface: pygame.Surface | None = None  # of the others
        self._replaced: list[tuple[ModuleType, str, Callable]] = []
        for module, names in (
            (pygame, "quit"),
            (pygame.font, "quit"),
            (pygame.display, "quit flip update set_caption set_icon set_gamma iconify toggle_fullscreen"),
            (pygame.event, "pump clear set_blocked set_allowed set_grab"),
            (pygame.mouse, "set_visible set_pos"),
        ):
            for name in names.split():
                self._replace(module, name, lambda *_, **__: None)
        self._replace(pygame.display, "set_mode", self._set_mode)
        self._replace(pygame.display, "get_surface", lambda: self._surface)
        self._replace(pygame.event, "get", lambda *_, **__: [])
        for name in ("poll", "wait"):
            self._replace(pygame.event, name, lambda *_, **__: pygame.event.Event(pygame.NOEVENT))

    def _replace(self, module: ModuleType, name: str, for_others: Callable) -> None:
        own = getattr(module, name, None)
        if own is None:  # another version of pygame
            return

        @functools.wraps(own)
        def call(*arguments: Any, **named: Any) -> Any:
            here = threading.get_ident() == self._thread or not self._replaced
            return (own if here else for_others)(*arguments, **named)

        setattr(module, name, call)
        self._replaced.append((module, name, own))

    def _set_mode(self, size: tuple[int, int] = (0, 0), *_: Any, **__: Any) -> pygame.Surface:
        self._surface = pygame.Surface(size if any(size) else pygame.display.get_desktop_sizes()[0])
        return self._surface

    def release(self) -> None:
        """pygame is everybody's again, as it was."""
        for module, name, own in self._replaced:
            setattr(module, name, own)
        self._replaced = []
