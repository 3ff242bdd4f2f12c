"""Playthrough: one game being played, with its policy, its recording, its film and its figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import POLICIES, PlayConfig, UserError
from ..data.film import Film
from ..data.policies import Policy, make_policy
from ..data.recording import Recorder
from .game import Game
from .history import History, Life, Moment
from .replay import Beginning, Replay
from .timings import Timings


def check_policy(name: str) -> Replay | None:
    """The recording in the directory `name`; None for a policy's name; UserError where it is neither."""
    if name in POLICIES:
        return None
    if not Path(name).is_dir():
        raise UserError(
            f"There is no policy {name!r}; choose one of {', '.join(POLICIES)} or a recording's directory."
        )
    return Replay(name)


class Playthrough:
    """`advance` plays one frame and hands it to the recording and the film; all in the caller's thread.

    `frame` is the newest frame, `action` the keys that caused it, `trouble` what ended a recording early.
    """

    def __init__(self, config: PlayConfig, game: Game, replay: Replay | None = None) -> None:
        """Starts the first game. Raises UserError where the recording or the video cannot be written."""
        self.game, self.timings, self.trouble = game, Timings(), None
        self.policy, self.replay = self._make_policy(config, replay), replay
        self._age = 0  # frames since the last reset
        self._life = Life(0, "")  # what led to the frame that is shown
        self._ahead = 0.0  # seconds already spent on the next step
        self._history: History | None = None  # of a game that can be put back
        self.recorder: Recorder | None = None
        self._begin(config, replay.first() if replay else None)
        self._film = Film(config.video, *self.frame.shape[:2], game.fps) if config.video else None
        if config.record:
            try:
                self.record(config.record)
            except BaseException:
                if self._film:
                    self._film.discard()
                raise
        if self._film:
            self._film.add(self.frame)

    def _begin(self, config: PlayConfig, began: Beginning | None) -> None:
        """The first game; a replay's comes to where its recording began, which may have been in mid-game."""
        self.seed = config.seed or (began.seed if began else 0) or 0
        self.frame = self.game.reset(self.seed, config.start or (began.start if began else ""))
        self.action = np.zeros(len(self.game.action_space), np.float32)
        self._life = Life(self.seed, self.game.start)
        if snapshot := self.game.snapshot():
            size = sum(value.nbytes for value in snapshot.values())
            self._history = History(self.game.fps, self.frame.nbytes, size)
        self._remember()
        self._come_to(began.before if began and not config.start else ())

    def _come_to(self, before: Sequence[tuple[np.ndarray, int]]) -> None:
        """Holds these keys for so many frames each, unseen."""
        for action, frames in before:
            for _ in range(frames):
                if not self.game.done:  # as it was not, in the same game
                    self._step(action)
        if before and self._history:  # what was not seen is not gone back to
            self._history.moments.clear()
            self._remember(whole=True)

    def _make_policy(self, config: PlayConfig, replay: Replay | None) -> Policy | None:
        if replay:
            replay.fit(self.game)
            return replay
        return (
            None
            if config.policy == "keyboard"
            else make_policy(config.policy, self.game.action_space, config.seed, self.game.map_lines())
        )

    @property
    def over(self) -> bool:
        """A replay has come to its end."""
        return self.replay is not None and not self.replay.left

    def advance(self, held: np.ndarray | None = None, events: Sequence = ()) -> None:
        """Plays one frame with the held keys (k,), or the policy's where none is held.

        A finished episode starts anew. `events` are the raw key events since the last frame.
        """
        if self._history and self._history.back:
            self._branch()
        if self.replay and not self.over and (began := self.replay.reset_next()) is not None:
            return self.reset(began.seed, began.start, events, began.before)
        if self.game.done:
            return self.reset(events=events)
        action = np.zeros_like(self.action) if held is None else held
        if self.policy and not action.any() and not self.over:
            action = self.policy(self.game.state(), self.game.action_space)
        start = time.perf_counter() - self._ahead  # a step costs what was done of it before, too
        self._ahead = 0.0
        self._step(action)
        self._keep(events, reset=False)
        self.timings.add(start)

    def _step(self, action: np.ndarray) -> None:
        self.frame, self.action = self.game.step(action), action
        self._age += 1
        self._life.add(list(self.game.action_space.decode(action)))
        self._remember()

    def _remember(self, whole: bool = False) -> None:
        """Takes the frame that is shown into the history, with a snapshot every so often, or now."""
        if self._history:
            whole |= self._history.wants_snapshot(self._age)
            snapshot = self.game.snapshot() if whole else None
            self._history.add(Moment(self.frame, self.action, self._life, self._age, snapshot))

    @property
    def can_rewind(self) -> bool:
        """Whether this game can be put back: generated ones can."""
        return self._history is not None

    @property
    def back_s(self) -> float:
        """How many seconds the game has been run backwards."""
        return self._history.back / self.game.fps if self._history else 0.0

    def rewind(self) -> bool:
        """Shows the frame before the one that is shown → whether one was known. The next `advance` goes on
        from there.
        """
        moment = self._history.rewind() if self._history else None
        self.timings.interrupt()
        if moment is None:
            return False
        self.frame, self.action = moment.frame, moment.action
        if self._film:
            self._film.add(self.frame)
        return True

    def _branch(self) -> None:
        """Puts the game back to the frame that is shown: from the last snapshot before it, under the same
        keys, so bit for bit.
        """
        if self.replay:
            self.replay.go_back(self._history.back)
        first, *others = path = self._history.branch()
        self.game.restore(first.snapshot, first.life.start)
        for moment in others:
            self.game.step(moment.action)
        now = path[-1]
        self.seed, self._age, self._life = now.life.seed, now.age, now.life.until(now.age)
        now.life, self._ahead = self._life, 0.0
        if self.recorder:
            self._write(self._reset_event(), reset=True)

    def speculate(self) -> None:
        """Does what can be done of the next step before it is known which keys it is for."""
        if self._history and self._history.back:
            return
        start = time.perf_counter()
        self.game.speculate()
        self._ahead += time.perf_counter() - start

    def reset(
        self,
        seed: int | None = None,
        start: str = "",
        events: Sequence = (),
        before: Sequence[tuple[np.ndarray, int]] = (),
    ) -> None:
        """Starts the next game: with the next seed, from the chosen start, unless told otherwise. Keys held
        `before` lead on from there, unseen.
        """
        self.seed = self.seed + 1 if seed is None else seed
        self.frame = self.game.reset(self.seed, start)
        self.action = np.zeros_like(self.action)
        self._age, self._life, self._ahead = 0, Life(self.seed, self.game.start), 0.0
        self._remember()
        self._come_to(before)
        if before:
            self.action = np.zeros_like(self.action)
        self.timings.interrupt()
        self._keep([*events, *self._reset_event()], reset=True)

    def record(self, directory: str | Path) -> None:
        """Begins a recording with the frame that is shown now, and notes what led to it, so that it can be
        replayed. Raises UserError where it cannot write.
        """
        if self.back_s:
            self._branch()
        game = self.game
        about = {"names": game.action_space.names, "state_kinds": game.state_kinds}
        about |= {"precision": game.precision, "parent": self._parent()}
        self.recorder = Recorder(directory, game.world, game.source, self.seed, game.digest, **about)
        self._write(self._reset_event(), reset=True)

    def stop_recording(self) -> None:
        """Ends the recording, if there is one; what went wrong with it goes to `trouble`."""
        recorder, self.recorder = self.recorder, None
        if recorder:
            try:
                recorder.close()
            except UserError as error:
                self.trouble = self.trouble or error

    def close(self) -> None:
        """Closes recording, film and game. Raises UserError, after that, for what could not be written."""
        self.stop_recording()
        film, self._film = self._film, None
        try:
            if film:
                film.close()
        finally:
            self.game.close()
        if self.trouble:
            raise self.trouble

    def figures(self) -> dict[str, Any]:
        """What a program prints as its last line."""
        about = {"game": self.game.source, "world": self.game.world.name, "checkpoint": self.game.checkpoint}
        return {**self.timings.figures(self.game.fps), **about, "start": self.game.start, "seed": self.seed}

    def _reset_event(self) -> list[dict]:
        """What leads to the frame that is shown now, and where that was recorded before, if it was."""
        reset = {"seed": self.seed, "start": self.game.start}
        reset |= {"held": self._life.held} if self._life.held else {}
        return [{"reset": reset} | ({"parent": parent} if (parent := self._parent()) else {})]

    def _parent(self) -> dict[str, str | int] | None:
        """Where the frame that is shown was recorded before."""
        recorded = self._history.moments[-1].recorded if self._history else None
        return {"recording": recorded[0], "frame": recorded[1]} if recorded else None

    def _keep(self, events: Sequence, reset: bool) -> None:
        if self._film:
            self._film.add(self.frame)
        if self.recorder:
            self._write(events, reset)

    def _write(self, events: Sequence, reset: bool) -> None:
        """A recording that cannot go on ends here, what it holds stays readable; the game goes on."""
        try:
            # what caused a first frame is not known
            action = np.zeros_like(self.action) if reset else self.action
            state, number = self.game.state() or None, self.recorder.frames_added
            self.recorder.add(self.frame, action, reset=reset, events=events, state=state, rng=self._age)
            if self._history:
                self._history.moments[-1].recorded = self.recorder.directory.name, number
        except UserError as error:
            self.trouble = error
            self.stop_recording()
