"""A play session on disk: a directory with `session.json`, `actions.jsonl` and `frames.mkv`.

`Recorder` writes it, readable at any moment, also after `kill -9`; `Recording` reads it.
Alignment: `action[t]` is what was held while frame `t` was produced; it causes frame `t`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import __version__
from ..config import UserError, WorldConfig
from ..errors import reason
from ..files import NewFiles, replace_whole
from .schema import ACTIONS, FRAMES, HEADER, SCHEMA, known_kinds, read_header, read_lines
from .video import CODEC, EXACT, QUALITY, VideoWriter, count_frames, read_frames

LOGGER = logging.getLogger(__name__)


class Recorder:
    """Writes one session into `directory`. A thread of its own encodes the frames, and none is dropped.

    `slow` becomes True, and stays so, once `add` has had to wait for the writer. Raises UserError for a
    directory that holds a recording or cannot be written; after a write error (disk full) the next `add` or
    `close` raises it, and what was written before stays readable.
    """

    def __init__(
        self,
        directory: str | Path,
        world: WorldConfig,
        source: str,
        seed: int,
        checkpoint: str = "",
        lossless: bool = False,
        names: tuple[str, ...] | None = None,
        state_kinds: dict[str, str] | None = None,
        parent: dict | None = None,
        policies: dict[str, float] | None = None,
        precision: str = "",
    ) -> None:
        """`state_kinds`: the numbers of the frames' states, name → kind (worlds.base.STATE_KINDS). `parent`:
        where a branched session comes from, {"recording": digest or name, "frame": number}, or None.
        `policies`: which policies played, name → share of time; None for a person. `precision`: the one in
        which a network drew the frames.
        """
        self.directory = Path(directory)
        self.names = tuple(world.keys) if names is None else tuple(names)
        self.frames_written = 0  # frames on their way to the disk, in step with actions.jsonl
        self.slow = False
        self._shape = (world.height, world.width, 3)
        self.frames_added = 0  # taken by `add`
        self._error: BaseException | None = None
        self._told = self._closed = False
        self._header = {
            "schema": SCHEMA,
            "version": __version__,
            "world": world.name,
            "config": asdict(world),
            "names": list(self.names),
            "keymap": world.keys,
            "fps": world.fps,
            "height": world.height,
            "width": world.width,
            "state_kinds": dict(state_kinds or {}),
            "source": source,
            "parent": parent,
            "policies": policies,
            "checkpoint": checkpoint,
            "precision": precision,
            "seed": seed,
            "codec": {"name": CODEC, "lossless": lossless, **(EXACT if lossless else QUALITY)},
        }
        try:
            self._open()
        except OSError as error:
            raise UserError(f"Cannot record into {self.directory}: {reason(error)}; try another.") from error
        # Under half a second of frames: enough for a hiccup of the disk, and little is lost in a kill.
        self._queue: queue.Queue = queue.Queue(max(4, min(32, int(world.fps / 2))))
        self._start = time.monotonic_ns()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        names = [self.directory / name for name in (HEADER, ACTIONS, FRAMES)]
        if any(map(os.path.lexists, names)):
            raise UserError(f"{self.directory} already holds a recording; choose another directory.")
        begun = NewFiles(*names)
        try:
            replace_whole(self.directory / HEADER, json.dumps(self._header, indent=1) + "\n")
            self._lines = open(self.directory / ACTIONS, "xb", buffering=0)
            (height, width, _), lossless = self._shape, self._header["codec"]["lossless"]
            self._video = VideoWriter(self.directory / FRAMES, height, width, self._header["fps"], lossless)
        except BaseException:
            begun.remove()
            raise

    def add(
        self,
        frame: np.ndarray,
        action: Sequence[float] | np.ndarray,
        *,
        reset: bool = False,
        events: Sequence = (),
        state: dict | None = None,
        axes: dict[str, float] | None = None,
        rng: int = 0,
        t_ns: int | None = None,
    ) -> None:
        """Appends a copy of the frame, uint8 (h, w, 3), that `action`, multi-hot (k,), caused.

        `axes`: analogue inputs by name (sticks, mouse); `state`: the world's state by name; `events`: raw
        input events, as JSON values; `t_ns`: nanoseconds since the start, the clock's unless given. Raises
        ValueError for another shape, UserError after a write error.
        """
        if self._error or self._closed:
            self._raise()
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"a frame must be uint8 {self._shape}, not {frame.dtype} {frame.shape}")
        line = {
            "frame": self.frames_added,
            "t_ns": time.monotonic_ns() - self._start if t_ns is None else t_ns,
            "keys": [name for name, held in zip(self.names, action, strict=True) if held > 0.5],
            "axes": {name: float(value) for name, value in (axes or {}).items()},
            "events": list(events),
            "reset": bool(reset),
            "rng": int(rng),
        }
        if state is not None:
            line["state"] = state
        item = (frame.copy(), json.dumps(line, separators=(",", ":"), allow_nan=False).encode())
        self.frames_added += 1
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.slow = True
            self._queue.put(item)

    def close(self) -> None:
        """Writes what is left and closes the files; raises UserError if something was not written."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
        if self._error and not self._told:
            self._raise()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # otherwise the first error is the one to report
                raise

    def _raise(self) -> None:
        self._told = True
        if self._error is None:
            raise UserError(f"The recording in {self.directory} is closed.")
        message = f"Recording into {self.directory} stopped after {self.frames_written} frames"
        raise UserError(f"{message}: {reason(self._error)}.") from self._error

    def _work(self) -> None:
        """The writer thread; after an error it still empties the queue, so that `add` never hangs."""
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self.write(*item)
                except Exception as error:
                    self._error = error
        try:
            if self._error is None:
                self._video.finish()
        except Exception as error:
            self._error = error
        for file in (self._video, self._lines):
            try:
                file.close()
            except Exception as error:
                self._error = self._error or error

    def write(self, frame: np.ndarray, line: bytes) -> None:
        """Writes a frame, uint8 (h, w, 3), and its line with the frame's checksum; raises OSError."""
        checksum = self._video.write(self.frames_written, frame)
        line = line[:-1] + b',"crc":%d}\n' % checksum
        # Unbuffered write may be short on a full disk; the second attempt then raises the reason.
        while line:
            line = line[self._lines.write(line) :]
        self.frames_written += 1


class Recording:
    """Reads one recording. A truncated one has the frames of which both picture and line are complete.

    `header` (dict), `names` of the keys, `fps`, `actions` (n, k), `resets` (n,), `times` int64 (n,) in
    nanoseconds, `states` (list of dict or None), `state_kinds` (name → kind), `axes` (list of dict), `events`
    (list of lists), `parent` (dict or None), `damage` (a sentence or ""). Raises UserError where there is no
    recording, or a damaged one.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.header = read_header(self.directory)
        self.names = tuple(self.header["names"])
        self.fps = float(self.header["fps"])
        lines = read_lines(self.directory, self.names)
        checksums = [line.get("crc") for line in lines]
        size = self.header["height"], self.header["width"]
        whole, later = count_frames(self.directory / FRAMES, self.fps, checksums, size)
        if not whole and len(lines) > max(1, self.fps):
            # a session killed in its first second may have no frame; with more lines it is damaged
            raise UserError(f"{self.directory / FRAMES} cannot be read: it is missing or damaged.")
        self.damage = self._tell_damage(whole, later, len(lines))
        lines = lines[:whole]
        self.actions = np.zeros((len(lines), len(self.names)), np.float32)  # (n, k)
        columns = {name: column for column, name in enumerate(self.names)}
        for row, line in zip(self.actions, lines, strict=True):
            row[[columns[name] for name in line["keys"]]] = 1
        self.resets = np.array([line["reset"] for line in lines], bool)
        self.times = np.array([line["t_ns"] for line in lines], np.int64)
        self.events = [line["events"] for line in lines]
        self.states = [line.get("state") for line in lines]
        self.axes = [line.get("axes", {}) for line in lines]
        self.parent: dict | None = self.header["parent"]
        self.state_kinds: dict[str, str] = self.header["state_kinds"] or known_kinds(self.states)

    def __len__(self) -> int:
        return len(self.actions)

    def _tell_damage(self, whole: int, later: int, lines: int) -> str:
        """A sentence, also logged as a warning, if more is lost than by a kill; else ""."""
        lost = lines - whole
        if not later and lost <= max(1, self.fps):
            return ""
        after = f" ({later} of them are whole, after a hole)" if later else ""
        where = f"{lost} of {lines} frames, from frame {whole} on"
        damage = f"{self.directory / FRAMES} is damaged: {where}, are left out{after}."
        LOGGER.warning("%s", damage)
        return damage

    def episodes(self) -> list[tuple[int, int]]:
        """First frame, and the frame after the last, of every episode."""
        starts = [i for i, reset in enumerate(self.resets) if reset or i == 0]
        return list(zip(starts, starts[1:] + [len(self)], strict=True))

    def frames(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Decodes frames `start` to `stop` (exclusive) → uint8 (n, h, w, 3); damage raises UserError."""
        start, stop, _ = slice(start, stop).indices(len(self))
        frames = np.empty((max(0, stop - start), self.header["height"], self.header["width"], 3), np.uint8)
        if not len(frames):
            return frames
        pictures = itertools.islice(read_frames(self.directory / FRAMES, self.fps, start), len(frames))
        done = 0
        for done, picture in enumerate(pictures, 1):
            frames[done - 1] = picture.to_ndarray(format="rgb24")
        if done < len(frames):
            raise UserError(f"{self.directory / FRAMES} is damaged at frame {start + done}.")
        return frames

    def pick(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the frames with these ascending indices, uint8 (h, w, 3), decoding from the start once;
        damage raises UserError.
        """
        pictures = enumerate(read_frames(self.directory / FRAMES, self.fps))
        for number in wanted:
            picture = next((picture for i, picture in pictures if i == number), None)
            if picture is None:
                raise UserError(f"{self.directory / FRAMES} is damaged before frame {number}.")
            yield picture.to_ndarray(format="rgb24")
