"""HeldKeys: which physical keys are down, read once per frame so that no tap is lost."""

from __future__ import annotations

import threading
import time

import pygame

from ...config import UserError
from ...worlds.base import ActionSpace


def scancode_name(scancode: int) -> str:
    """SDL's name of a physical key ("W", "Left", "Left Ctrl"): the same on every keyboard layout."""
    return pygame.key.name(scancode | 1 << 30, use_compat=False)  # SDL's mark of a keycode that is a scancode


def check_bindings(space: ActionSpace) -> None:
    """Raises UserError for a binding that is the name of no key."""
    known = {scancode_name(scancode) for scancode in range(512)}
    for name, codes in zip(space.names, space.bindings, strict=True):
        for code in codes:
            if code not in known:
                raise UserError(
                    f"world.keys.{name} says {code!r}, which is no key; write W, Left, Space or Left Ctrl."
                )


class HeldKeys:
    """Pressed and released by the window's thread, read by the thread that plays; a lock between them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down: set[str] = set()
        self._tapped: set[str] = set()  # went down since the last read, though they may be up again
        self._events: list[tuple[str, bool, int]] = []

    def press(self, key: str) -> None:
        """A key, by its scancode's name, went down."""
        with self._lock:
            self._down.add(key)
            self._tapped.add(key)
            self._events.append((key, True, time.monotonic_ns()))

    def release(self, key: str) -> None:
        """A key went up; one whose going down was not seen is ignored."""
        with self._lock:
            if key in self._down:
                self._down.remove(key)
                self._events.append((key, False, time.monotonic_ns()))

    def release_all(self) -> None:
        """The window lost the keyboard: what happens to the keys from now on is not for us."""
        for key in tuple(self._down):
            self.release(key)

    def forget(self) -> None:
        """Taps that no frame has read yet are not meant for the next one: after a pause or while loading."""
        with self._lock:
            self._tapped.clear()
            self._events.clear()

    def read(self) -> tuple[set[str], list[dict]]:
        """Keys for the next frame (down now, or tapped since the last read) and the raw events in between."""
        now = time.monotonic_ns()
        with self._lock:
            held, self._tapped = self._down | self._tapped, set()
            events, self._events = self._events, []
        return held, [
            {"key": key, "down": down, "ago_ms": (now - at) // 10**4 / 100} for key, down, at in events
        ]


def actions_of(held: set[str], space: ActionSpace) -> list[str]:
    """Names of the actions that the held keys press; opposite ones are passed on as they are."""
    return [
        name for name, codes in zip(space.names, space.bindings, strict=True) if not held.isdisjoint(codes)
    ]
