"""Clocks and time budgets of the benchmark, and the two ceilings of a machine: matrix products and copies."""

from __future__ import annotations

import gc
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

ROUNDS = 60  # most samples of each provider
SHORT = 1.0  # ms; shorter calls are timed as a CUDA graph, as otherwise launches would be measured
Call = Callable[[int], object]  # takes the number of the input set to run on


class Budget:
    """Seconds that some work may take, counted from now."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.seconds - self.spent()

    def part(self, seconds: float) -> Budget:
        """A budget for a part of the work, at most what is left."""
        return Budget(min(seconds, self.left()))


@dataclass(frozen=True)
class Timing:
    """Median of the samples in ms, the range from the 10th to the 90th percentile, and their number."""

    ms: float
    spread: float
    samples: int
    graph: bool


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """A context that raises TimeoutError after some seconds, once Python code runs; for the main thread
    only.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why(error: BaseException) -> str:
    """An exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sets_for(size: int, device: torch.device) -> int:
    """How many input sets of `size` bytes to use by turns, so that none is still in the L2 cache when used
    again.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(128, -(-3 * cache // max(size, 1))))


def interleaved(
    calls: dict[str, Call], device: torch.device, seconds: float, sets: int = 1, patience: float = 60.0
) -> dict[str, Timing | str]:
    """Times the calls by turns, one sample of each in a round → timing, or why there is none.

    Whatever drifts (clocks, heat, other load) affects all of them alike.
    """
    found: dict[str, Timing | str] = {}
    samplers: dict[str, tuple[Callable[[], float], bool]] = {}
    for name, call in calls.items():
        try:
            with limit(patience):
                samplers[name] = _sampler(call, sets, device)
        except Exception as error:  # a provider that fails is a row that says why
            found[name] = why(error)
            _clean(device)
    budget, samples = Budget(seconds), {name: [] for name in samplers}
    for number in range(ROUNDS):
        if number >= 3 and budget.left() <= 0:
            break
        for name in list(samplers):
            try:
                samples[name].append(samplers[name][0]())
            except Exception as error:
                found[name] = why(error)
                del samplers[name]
    for name, (_, graph) in samplers.items():
        found[name] = _summary(samples[name], graph)
    samplers.clear()  # graphs hold memory
    return {name: found[name] for name in calls}


def _summary(samples: list[float], graph: bool) -> Timing:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), tenths[-1] - tenths[0], len(samples), graph)


def _sampler(call: Call, sets: int, device: torch.device) -> tuple[Callable[[], float], bool]:
    """→ a function that returns one sample in ms, and whether it replays a CUDA graph."""
    call(0)  # compiles
    synchronize(device)
    if device.type != "cuda":
        return lambda: _host_sample(call), False
    clock = _DeviceClock(device)
    each = min(clock.sample(lambda: call(0), 1) for _ in range(3))
    count = max(1, min(256, round((2.0 if each < SHORT else 5.0) / max(each, 1e-3))))
    numbers = [i % sets for i in range(count if each >= SHORT else max(count, min(sets, 64)))]

    def loop() -> None:
        for number in numbers:
            call(number)

    replay = None
    if each < SHORT:
        with suppress(Exception):  # if it cannot be captured it is timed launch by launch
            replay = capture(loop)
    return lambda: clock.sample(replay or loop, len(numbers)), replay is not None


def _host_sample(call: Call) -> float:
    start = time.perf_counter()
    call(0)
    return 1000 * (time.perf_counter() - start)


class _DeviceClock:
    """Times work on a GPU by events, after a write that empties the L2 cache and hides the launches."""

    def __init__(self, device: torch.device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(size, 2**28), dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, work: Callable[[], object], count: int) -> float:
        """Milliseconds of one call, if `work` makes `count` of them."""
        self.flush.zero_()
        self.start.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / count


def capture(work: Callable[[], object]) -> Callable[[], None] | None:
    """`work` as the replay of a CUDA graph; None if it waits for the device, which a graph cannot do.

    That is tested before, as a failed capture leaves the random generator unusable.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(side):
        work()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return None
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ceilings(device: torch.device, seconds: float) -> dict[str, float]:
    """What this machine reaches: TFLOP/s of a matrix product, and TB/s of a copy, reads plus writes."""
    gpu = device.type == "cuda"
    side, size, dtype = (8192, 2**32, torch.bfloat16) if gpu else (512, 2**26, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # zeros would run faster
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda _: torch.mm(a, b), "copy": lambda _: target.copy_(source)}
    found = interleaved(calls, device, seconds)
    for timing in found.values():
        if isinstance(timing, str):
            raise RuntimeError(timing)
    return {
        "tflops": 2 * side**3 / found["product"].ms / 1e9,
        "tbytes": 2 * size / found["copy"].ms / 1e9,
    }
