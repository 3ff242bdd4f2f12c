"""Loop: the window's thread. Reads events, hands commands to the Stepper, shows each frame as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pygame

from ...config import PlayConfig, UserError
from ...data.picture import save_picture
from ..playthrough import Playthrough
from ..stepper import Stepper, View
from ..timings import Latency, seconds_since_start
from .hud import draw_banner, draw_help, draw_hud, draw_loading, functions_of
from .keys import HeldKeys, actions_of, scancode_name
from .screen import Screen

POLL_MS = 8  # the longest that the loop sleeps; an event or a new frame wakes it at once
MESSAGE_SECONDS = 3.5
ENLARGED = 4  # screenshot pixels per frame pixel


class Loop:
    """A game in a window. `open` makes the playthrough; the playing thread calls it, the window being up."""

    def __init__(self, config: PlayConfig, open: Callable[[], Playthrough]) -> None:
        world = config.world
        self.screen = Screen(world.width, world.height, config.scale, config.smooth, config.fullscreen)
        self.config, self.keys = config, HeldKeys()
        self.hud, self.help, self.leaving = config.hud, False, False
        self.first_frame_s = 0.0
        self.latency = Latency()
        self._answered: View | None = None  # whose key has been counted
        self._began = time.perf_counter()
        self.message, self._message_until = "", 0.0
        self._recording, self._recording_since, self._trouble = "", 0.0, ""
        self._functions = functions_of(None)
        self._frame_event = pygame.event.custom_type()
        self._draw()  # before anything slow begins
        self.stepper = Stepper(open, self._read, self._wake, config.frames)

    def _read(self, playthrough: Playthrough) -> tuple[np.ndarray, list]:
        """Called by the playing thread right before a step."""
        held, events = self.keys.read()
        space = playthrough.game.action_space
        return space.encode(actions_of(held, space)), events

    def _wake(self) -> None:
        """Called by the playing thread after a frame; SDL's event queue may be filled from any thread."""
        if pygame.display.get_init():
            pygame.event.post(pygame.event.Event(self._frame_event))

    def run(self) -> Playthrough:
        """Until the player leaves or the game ends → the closed playthrough. Raises its thread's error."""
        try:
            while not (self.leaving or self.stepper.finished):
                event = pygame.event.wait(POLL_MS)
                changed = False
                while event.type != pygame.NOEVENT:
                    changed |= self._handle(event)
                    event = pygame.event.poll()
                if changed or self._message_ended() or self._drawn_is_old():
                    self._draw()
            if self.stepper.view is None and not self.stepper.finished:
                draw_banner(self.screen, "leaving as soon as the world is loaded")
                self.screen.flip()
        finally:
            self.stepper.stop()
            self.screen.close()
        if self.stepper.error:
            raise self.stepper.error
        return self.stepper.playthrough

    def _handle(self, event: pygame.event.Event) -> bool:
        """One event → whether the picture must be drawn anew."""
        if event.type == pygame.QUIT:
            self.leaving = True
        elif event.type == pygame.KEYDOWN:
            return self._press(scancode_name(event.scancode), with_alt=bool(event.mod & pygame.KMOD_ALT))
        elif event.type == pygame.KEYUP:
            key = scancode_name(event.scancode)
            self.keys.release(key)
            if self._functions.get(key) == "rewind":
                self.stepper.rewinding = False
        elif event.type == pygame.WINDOWFOCUSLOST:
            self.keys.release_all()
            self.stepper.rewinding = False
        elif event.type == self._frame_event:
            self.look()
            return True
        return event.type in (pygame.WINDOWEXPOSED, pygame.WINDOWSIZECHANGED)

    def _press(self, key: str, with_alt: bool) -> bool:
        function = self._functions.get(key)
        if function is None or with_alt:  # Alt+Tab and the like are the desktop's
            self.keys.press(key)
            return False
        if function in ("help", "hud"):
            setattr(self, function, not getattr(self, function))
        elif function == "quit":
            self.leaving = True
        elif function == "fullscreen":
            self.screen.toggle_fullscreen()
        elif self.stepper.view:  # the rest needs a game
            getattr(self, f"_{function}")()
        return True

    def look(self) -> None:
        """Takes note of what the newest frame brought."""
        view, playthrough = self.stepper.view, self.stepper.playthrough
        if view is None:
            return
        if not self.first_frame_s:
            self.first_frame_s = seconds_since_start()
            self._functions = functions_of(playthrough.game.action_space)
            pygame.display.set_caption(f"Rollplay: {playthrough.game.world.name}")
            self._say("F1 shows the keys")
        if view.recording != self._recording:
            self._say(f"recording into {view.recording}" if view.recording else "recording ended")
            self._recording, self._recording_since = view.recording, time.perf_counter()
        if view.trouble != self._trouble:
            self._trouble = view.trouble
            self._say(view.trouble)

    def _pause(self) -> None:
        self.keys.forget()
        self.stepper.pause(not self.stepper.paused)

    def _reset(self) -> None:
        self.stepper.do(Playthrough.reset)
        self._say("started again")

    def _next(self) -> None:
        def choose(playthrough: Playthrough) -> None:
            playthrough.game.choose_next()
            playthrough.reset()

        self.stepper.do(choose)
        self._say("next start")

    def _rewind(self) -> None:
        if self.stepper.playthrough.can_rewind:
            self.stepper.rewinding = True
        else:
            self._say("a true game cannot run backwards")

    def _record(self) -> None:
        directory = self._place("recording")

        def switch(playthrough: Playthrough) -> None:
            if playthrough.recorder:
                return playthrough.stop_recording()
            try:
                playthrough.record(directory)
            except UserError as error:
                playthrough.trouble = error

        self.stepper.do(switch)

    def _screenshot(self) -> None:
        path = self._place("picture").with_suffix(".png")
        try:
            save_picture(path, self.stepper.view.frame.repeat(ENLARGED, 0).repeat(ENLARGED, 1))
            self._say(f"saved {path}")
        except UserError as error:
            self._say(str(error))

    def _place(self, what: str) -> Path:
        world, now = self.stepper.playthrough.game.world.name, datetime.now()
        return Path(self.config.out) / f"{world}-{what}-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"

    def _say(self, words: str) -> None:
        self.message, self._message_until = words, time.perf_counter() + MESSAGE_SECONDS

    def _message_ended(self) -> bool:
        return bool(self.message) and time.perf_counter() > self._message_until

    def _drawn_is_old(self) -> bool:
        """While loading no frames wake the loop; drawing more often would only slow the loading."""
        return self.stepper.view is None and time.perf_counter() - self._drawn > 0.25

    def _draw(self) -> None:
        now = self._drawn = time.perf_counter()
        view = self.stepper.view if hasattr(self, "stepper") else None
        if self._message_ended():
            self.message = ""
        if view is None:
            draw_loading(self.screen, "the world is loading", now - self._began)
            return self.screen.flip()
        game = self.stepper.playthrough.game
        self.screen.show(view.frame)
        if self.hud:
            recorded = now - self._recording_since
            draw_hud(self.screen, view, game.action_space, recorded, self.latency.recent())
        if self.stepper.paused:
            draw_banner(self.screen, "paused — Escape goes on, F10 leaves")
        elif view.back_s:
            draw_banner(self.screen, f"{view.back_s:.1f} s back — let go, and it goes on from here")
        if self.message:
            draw_banner(self.screen, self.message, at_top=False)
        if self.help:
            draw_help(self.screen, game.world.name.replace("_", " "), game.action_space)
        self.screen.flip()
        if view is not self._answered:
            self._answered = view
            if view.pressed:
                self.latency.shown(view.pressed)
