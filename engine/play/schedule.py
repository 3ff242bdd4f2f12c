"""Schedule: when the next frame is due."""

from __future__ import annotations

import time


class Schedule:
    """Due times at a fixed rate, without drift. A missed slot is dropped, not made up for in a burst."""

    def __init__(self, fps: float) -> None:
        self.period = 1 / fps
        self.late = 0  # frames that began more than a tenth of a period after their due time
        self.dropped = 0  # slots in which no frame could begin
        self.restart()

    def restart(self) -> None:
        """The next frame is due now: after a pause, a reset or a start."""
        self._due = time.perf_counter()

    def left(self) -> float:
        """Seconds until the next frame is due, 0 when it is."""
        return max(0.0, self._due - time.perf_counter())

    def begin(self) -> None:
        """A frame begins now: counts how late it is and sets the next due time."""
        behind = (time.perf_counter() - self._due) / self.period  # in periods
        self.late += behind > 0.1
        self.dropped += int(behind)
        self._due += (1 + int(behind)) * self.period
