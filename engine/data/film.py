"""Film: writes frames to an mp4 that every player and browser shows, or to an animated .webp."""

from __future__ import annotations

import queue
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..errors import UserError, reason
from ..files import NewFiles
from .video import url_of

SCALE = 3  # video pixels per frame pixel: small frames would be blurred by players that enlarge them
AHEAD = 64  # frames that may wait for the encoder


class Film:
    """Appends frames, uint8 (h, w, 3), enlarged, to a new video: H.264 in mp4, or animated .webp. A thread of
    its own encodes them, and none is dropped.

    Raises UserError for a file that exists or cannot be written, at once or from the next `add` or `close`.
    """

    def __init__(self, path: str | Path, height: int, width: int, fps: float) -> None:
        self.path = Path(path)
        self._error: BaseException | None = None
        self._size = (height * SCALE, width * SCALE)
        try:
            self._begun = NewFiles(self.path)
        except OSError as error:
            raise self._user_error(error) from None
        try:
            # the format is named, so that any file name will do; the index goes to the front for browsers
            moving = {"format": "webp", "options": {"loop": "0"}}
            mp4 = {"format": "mp4", "options": {"movflags": "+faststart"}}
            kind = moving if self.path.suffix == ".webp" else mp4
            self._file = av.open(url_of(self.path), "w", **kind)
        except (OSError, av.FFmpegError) as error:
            self._begun.remove()
            raise self._user_error(error) from None
        rate = Fraction(fps).limit_denominator(1001)
        codec, options = ("libx264", {"preset": "ultrafast", "crf": "18"})
        if self.path.suffix == ".webp":
            codec, options = ("libwebp_anim", {"quality": "70"})
        self._stream = self._file.add_stream(codec, rate=rate, options=options)
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"  # the only one that all browsers show
        self._stream.codec_context.thread_count = 1  # the network needs the cores
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(AHEAD)
        self._thread = threading.Thread(target=self._work, name="film", daemon=True)
        self._thread.start()

    def add(self, frame: np.ndarray) -> None:
        """Appends a copy of the frame, uint8 (h, w, 3)."""
        if self._error:
            raise self._user_error(self._error)
        self._queue.put(frame.copy())

    def close(self) -> None:
        """Encodes all waiting frames and closes the file. Raises UserError if something was not written."""
        self._queue.put(None)
        self._thread.join()
        if self._error:
            raise self._user_error(self._error)

    def discard(self) -> None:
        """Ends the film and removes its file."""
        self._queue.put(None)
        self._thread.join()
        self._begun.remove()

    def _user_error(self, error: BaseException) -> UserError:
        if isinstance(error, FileExistsError) and error.filename == str(self.path):
            said = f"The video {self.path} is there already"
            return UserError(f"{said}; choose another place with video=FILE.mp4.")
        said = f"The video {self.path} could not be written ({reason(error)})"
        return UserError(f"{said}; choose another place with video=FILE.mp4.")

    def _work(self) -> None:
        """The encoder's thread; after an error it still empties the queue, so that `add` never hangs."""
        while (frame := self._queue.get()) is not None:
            if self._error is None:
                try:
                    large = frame.repeat(SCALE, 0).repeat(SCALE, 1)
                    self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
                except (OSError, av.FFmpegError) as error:
                    self._error = error
        try:
            if self._error is None:
                self._file.mux(self._stream.encode(None))
            self._file.close()
        except (OSError, av.FFmpegError) as error:
            self._error = self._error or error
