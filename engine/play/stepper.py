"""Stepper: plays frames at the world's rate in a thread of its own, beside the one with keys and screen."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .playthrough import Playthrough
from .schedule import Schedule

Read = Callable[[Playthrough], tuple[np.ndarray | None, list]]


@dataclass(frozen=True)
class View:
    """What there is to show after a frame; made by the playing thread, never changed."""

    frame: np.ndarray  # uint8 (h, w, 3)
    held: tuple[str, ...]  # actions that caused it
    rates: tuple[float, float, float]  # frames a second, p50 and p99 of a step in ms
    start: str
    recording: str  # directory, or empty
    slow: bool  # the recording's disk cannot keep up
    trouble: str  # what ended a recording
    back_s: float = 0.0  # how many seconds it is run backwards
    pressed: float = 0.0  # perf_counter of the first key event that this frame is the first to answer, or 0


class Stepper:
    """The playing thread. `view` is the newest frame, None while loading.

    `open` makes the playthrough, in the thread, as loading takes seconds; `read` is called right before a
    step for the newest keys and events; `notify` after it. The thread ends with `stop`, after `frames` frames
    (0: never), with a replay, or with an error.
    """

    def __init__(
        self, open: Callable[[], Playthrough], read: Read, notify: Callable[[], None], frames: int = 0
    ):
        self.view: View | None = None
        self.playthrough: Playthrough | None = None
        self.schedule: Schedule | None = None
        self.error: BaseException | None = None
        self.paused, self.finished = False, False
        self.rewinding = False  # whether frames run backwards; set by the thread that shows the window
        self._open, self._read, self._notify, self._frames = open, read, notify, frames
        self._commands: queue.SimpleQueue[Callable[[Playthrough], None]] = queue.SimpleQueue()
        self._leaving = False
        self._pressed = 0.0
        self._thread = threading.Thread(target=self._run, name="stepper", daemon=True)
        self._thread.start()

    def do(self, command: Callable[[Playthrough], None]) -> None:
        """Lets the playing thread call `command(playthrough)` between two frames, also in a pause."""
        self._commands.put(command)

    def pause(self, paused: bool) -> None:
        """Stops before the next frame, or goes on."""

        def switch(playthrough: Playthrough) -> None:
            self.paused = paused
            playthrough.timings.interrupt()

        self.do(switch)

    def stop(self) -> None:
        """Ends the game and waits until everything is written; an error of the thread is then in `error`."""
        self._leaving = True
        self.do(lambda playthrough: None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self.playthrough = self._open()
            try:
                self._play(self.playthrough)
            finally:
                self.playthrough.close()
        except BaseException as error:  # told by the thread that shows the window
            self.error = error
        self.finished = True
        self._notify()

    def _play(self, playthrough: Playthrough) -> None:
        self.schedule = Schedule(playthrough.game.fps)
        self._read(playthrough)  # what was typed while loading is not meant for the first frame
        self._show(playthrough)
        self.schedule.restart()  # nobody waited for the first frame's preparation
        while not self._leaving and not playthrough.over:
            try:
                # the queue is the alarm clock: it wakes at the due time, or for a command
                command = self._commands.get(timeout=None if self.paused else self.schedule.left())
            except queue.Empty:
                self.schedule.begin()
                if self.rewinding:
                    playthrough.rewind()
                    self._show(playthrough)
                    continue
                held, events = self._read(playthrough)
                waited = max((event["ago_ms"] for event in events if "ago_ms" in event), default=None)
                self._pressed = 0.0 if waited is None else time.perf_counter() - waited / 1000
                playthrough.advance(held, events)
                self._show(playthrough)
            else:
                command(playthrough)
                self._show(playthrough)
                self.schedule.restart()  # a reset takes longer than a step, and nobody waited for that step
            if self._frames and playthrough.timings.steps >= self._frames:
                break

    def _show(self, playthrough: Playthrough) -> None:
        """Hands the newest frame over, then does of the next one what can be done."""
        recorder = playthrough.recorder
        self.view = View(
            playthrough.frame,
            playthrough.game.action_space.decode(playthrough.action),
            playthrough.timings.recent(),
            playthrough.game.start,
            str(recorder.directory) if recorder else "",
            bool(recorder and recorder.slow),
            str(playthrough.trouble or ""),
            playthrough.back_s,
            self._pressed,
        )
        self._pressed = 0.0
        self._notify()
        playthrough.speculate()
