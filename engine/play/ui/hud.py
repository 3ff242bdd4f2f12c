"""HUD: what is drawn over the picture; it stays at the borders and leaves the picture's centre free."""

from __future__ import annotations

import pygame

from ...worlds.base import ActionSpace
from ..stepper import View
from .screen import AMBER, DARK, GREEN, GREY, PANEL, RED, WHITE, Screen

# What the window itself does, by scancode name; a world that binds one of these keys has it instead.
FUNCTIONS = (
    ("pause", ("Escape",), "pause, go on"),
    ("help", ("F1",), "this help"),
    ("hud", ("F2",), "figures on, off"),
    ("reset", ("F5", "Backspace"), "start again"),
    ("next", ("F6", "Tab"), "next start"),
    ("rewind", ("R",), "hold: backwards"),
    ("record", ("F9",), "record on, off"),
    ("quit", ("F10",), "leave"),
    ("fullscreen", ("F11",), "full screen"),
    ("screenshot", ("F12",), "screenshot"),
)


def functions_of(space: ActionSpace | None) -> dict[str, str]:
    """Scancode name → function, without the keys that the world has bound."""
    taken = {code for codes in space.bindings for code in codes} if space else set()
    return {key: name for name, keys, _ in FUNCTIONS for key in keys if key not in taken}


def draw_hud(screen: Screen, view: View, space: ActionSpace, recorded: float, latency: float) -> None:
    """Rate, step time and how long keys took to be seen, the keys as the engine sees them, and the recording
    light with its seconds.
    """
    em, (across, down) = screen.em, screen.surface.get_size()
    fps, p50, p99 = view.rates
    words = f"{fps:4.1f} fps    {p50:.0f} ms    p99 {p99:.0f} ms" if fps else "starting"
    words += f"    key {latency:.0f} ms" if latency else ""
    width, height = screen.text_size(words, 0.85)
    screen.panel(pygame.Rect(em // 2, em // 2, width + em, height + em // 2))
    screen.text(words, (em, em // 2 + em // 4), size=0.85)
    _draw_keys(screen, view, space, down)
    if view.recording:
        _draw_light(screen, recorded, view.slow, across)


def _draw_keys(screen: Screen, view: View, space: ActionSpace, down: int) -> None:
    em, left = screen.em, screen.em // 2
    for name in space.names:
        words = name.replace("_", " ")
        width, height = screen.text_size(words, 0.75)
        key = pygame.Rect(left, down - height - em, width + em * 3 // 4, height + em // 2)
        if name in view.held:
            pygame.draw.rect(screen.surface, GREEN, key, border_radius=em // 3)
        else:
            screen.panel(key)
        screen.text(words, key.center, DARK if name in view.held else GREY, "center", 0.75)
        left = key.right + em // 4


def _draw_light(screen: Screen, recorded: float, slow: bool, across: int) -> None:
    em = screen.em
    words = f"REC {int(recorded) // 60}:{int(recorded) % 60:02d}" + ("  disk is slow" if slow else "")
    width, height = screen.text_size(words, 0.85)
    panel = pygame.Rect(0, em // 2, width + em * 9 // 4, height + em // 2)
    panel.right = across - em // 2
    screen.panel(panel)
    pygame.draw.circle(screen.surface, RED, (panel.left + em, panel.centery), em * 0.36)
    screen.text(words, (panel.left + em * 7 // 4, panel.centery), AMBER if slow else WHITE, "midleft", 0.85)


def draw_banner(screen: Screen, words: str, at_top: bool = True) -> None:
    """One line in the middle of the upper border (a state) or above the keys (something that happened)."""
    em, (across, down) = screen.em, screen.surface.get_size()
    while len(words) > 9 and screen.text_size(words, 0.9)[0] > across - 3 * em:
        words = words[: max(8, len(words) * 9 // 10 - 1)] + "…"
    width, height = screen.text_size(words, 0.9)
    panel = pygame.Rect(0, 0, width + 2 * em, height + em)
    panel.midtop = (across // 2, em * 5 // 2) if at_top else (across // 2, down - height - em * 7 // 2)
    screen.panel(panel)
    screen.text(words, panel.center, anchor="center", size=0.9)


def draw_help(screen: Screen, title: str, space: ActionSpace) -> None:
    """The world's keys and the window's own, in a panel at the right border."""
    em, (across, down) = screen.em, screen.surface.get_size()
    rows = [
        (key_names(codes), name.replace("_", " "))
        for name, codes in zip(space.names, space.bindings, strict=True)
    ]
    known = functions_of(space)
    own = [(key_names(tuple(key for key in keys if key in known)), words) for _, keys, words in FUNCTIONS]
    step = min(em * 3 // 2, (down - 5 * em) // (len(rows) + len(own) + 3))  # many keys stand closer
    keys_width = max(screen.text_size(keys, 0.85)[0] for keys, _ in rows + own)
    words_width = max(screen.text_size(words, 0.85)[0] for _, words in rows + own)
    panel = pygame.Rect(
        0, 0, keys_width + words_width + 3 * em, step * (len(rows) + len(own) + 2) + 3 * em // 2
    )
    panel.midright = (across - em // 2, down // 2)
    surface = pygame.Surface(panel.size, pygame.SRCALPHA)
    pygame.draw.rect(surface, (*PANEL[:3], 215), surface.get_rect(), border_radius=em // 2)
    screen.surface.blit(surface, panel)
    top = panel.top + em * 3 // 4
    screen.text(title, (panel.left + em, top), AMBER)
    for group in (rows, own):
        top += step // 2 if group is own else 0
        for keys, words in group:
            top += step
            screen.text(keys, (panel.left + em, top), size=0.85)
            screen.text(words, (panel.left + 2 * em + keys_width, top), GREY, size=0.85)


def key_names(codes: tuple[str, ...]) -> str:
    """Scancode names as one label."""
    return "  ".join(codes) or "no key"


def draw_loading(screen: Screen, words: str, seconds: float) -> None:
    """The first picture of all: that something is coming, and for how long it has been."""
    screen.clear()
    middle = screen.surface.get_rect().center
    screen.text("Rollplay", (middle[0], middle[1] - 2 * screen.em), anchor="center", size=2.0)
    dots = "." * (int(seconds * 2) % 4)
    left = middle[0] - screen.text_size(words, 1.0)[0] // 2
    screen.text(words + dots, (left, middle[1] + screen.em), GREY)
