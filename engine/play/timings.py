"""How long steps take (fps), how soon a key is answered, and the figures that a program prints at its end."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from itertools import islice
from pathlib import Path

import numpy as np

try:
    import resource
except ImportError:  # Windows
    resource = None

# steps of which times are kept: nineteen minutes; older ones are forgotten, memory does not grow
KEPT = 20_000
IMPORTED = time.perf_counter()


class Timings:
    """Times of steps and the gaps between them, for the HUD and for the last line."""

    def __init__(self) -> None:
        self.steps = 0
        self._took: deque[float] = deque(maxlen=KEPT)  # ms
        self._gaps: deque[float] = deque(maxlen=KEPT)  # ms between the ends of steps
        self._last = 0.0
        self._played = 0.0  # seconds, without pauses

    def add(self, start: float) -> None:
        """A step that began at `start` (perf_counter) has just ended."""
        now = time.perf_counter()
        self.steps += 1
        self._took.append(1000 * (now - start))
        if self._last:
            self._gaps.append(1000 * (now - self._last))
        self._played += now - (self._last or start)
        self._last = now

    def interrupt(self) -> None:
        """A pause or a reset: the gap to the next step says nothing about the rate."""
        self._last = 0.0

    def recent(self, steps: int = 90) -> tuple[float, float, float]:
        """(frames a second, p50 and p99 of a step in ms) over the last steps; zeros before the first."""
        took, gaps = (list(islice(reversed(times), steps)) for times in (self._took, self._gaps))
        if not gaps:
            return 0.0, 0.0, 0.0
        return 1000 / float(np.median(gaps)), *map(float, np.percentile(took, (50, 99)))

    def figures(self, fps: float) -> dict[str, float | int | None]:
        """Figures for the last line: rates in frames a second, times in ms, memory in MB."""
        p50, p99 = np.percentile(self._took, (50, 99)) if self._took else (0.0, 0.0)
        rate = self.steps / self._played if self._played else 0.0
        first, last = (list(islice(times, 100)) for times in (self._took, reversed(self._took)))
        return {
            "frames": self.steps,
            "fps_p50": round(1000 / float(np.median(self._gaps)), 2) if self._gaps else 0.0,
            "step_ms_p50": round(float(p50), 2),
            "step_ms_p99": round(float(p99), 2),
            "step_ms_first": round(float(np.median(first or [0.0])), 2),  # of the first hundred (kept) steps
            "step_ms_last": round(float(np.median(last or [0.0])), 2),
            "real_time_ratio": round(rate / fps, 3),
            "rss_mb": peak_memory_mb(),
        }


class Latency:
    """How long pictures took to answer: from a key's event until the first picture made under it is shown."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=KEPT)  # ms

    def shown(self, pressed: float) -> None:
        """The picture that answers a key pressed at `pressed` (perf_counter) has just been shown."""
        self._took.append(1000 * (time.perf_counter() - pressed))

    def recent(self, keys: int = 20) -> float:
        """Median over the last keys, in ms; 0 before the first."""
        took = list(islice(reversed(self._took), keys))
        return float(np.median(took)) if took else 0.0

    def figures(self) -> dict[str, float]:
        """Figures for the last line, in ms; none where no key was pressed."""
        if not self._took:
            return {}
        p50, p99 = np.percentile(self._took, (50, 99))
        return {"key_to_picture_ms_p50": round(float(p50), 1), "key_to_picture_ms_p99": round(float(p99), 1)}


def seconds_since_start() -> float:
    """Since this process was started; without /proc, since this module was imported.

    A shell that ends in the program (`bash -c "... && python play.py"`) becomes it, and counts.
    """
    since_import = time.perf_counter() - IMPORTED
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot
        return max(since_import, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return since_import


def peak_memory_mb() -> float | None:
    """The most memory that this process has held, in MB; None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return round(peak * unit / 1e6, 1)
