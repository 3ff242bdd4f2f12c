"""The paper's step end to end: the emulated reference loop and ours, compared first and then timed by
turns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from .checks import rel_rms
from .gate import operations
from .libraries import Attend, library
from .ourloop import OurLoop
from .paper import TOY, Shape, Weights
from .peerloop import PeerLoop
from .timing import Budget, synchronize, why

STEPS = 3  # steps whose results are compared before timing
ROUNDS = 8
WARM = 2
AGREE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative RMS
WRONG = 2.5  # times AGREE: a loop that is farther off is wrong, and not timed


def variants(device: torch.device) -> dict[str, tuple[str, str, int]]:
    """Name → whose loop, its attention, and how many clean frames a committed block sees (0: as in the
    reference).
    """
    if device.type != "cuda":
        own = {"ours own": ("ours", "triton", 0), "ours own short": ("ours", "triton", 6)}
        return {"peer sdpa": ("peer", "sdpa", 0), **own, "ours sdpa": ("ours", "sdpa", 0)}
    return {
        "peer varlen": ("peer", "varlen", 0),  # FlashAttention 2, as the reference calls it
        "peer flash": ("peer", "flash", 0),  # the same by way of SDPA, where that cannot run
        "peer cudnn": ("peer", "cudnn", 0),
        "ours triton": ("ours", "triton", 0),
        "ours cudnn": ("ours", "cudnn", 0),
        "ours triton short": ("ours", "triton", 6),
        "ours cudnn short": ("ours", "cudnn", 6),
    }


def paper_step(
    device: torch.device, budget: Budget, ceiling: dict[str, float], say: Callable[[str], None]
) -> dict:
    """Times, rates, ratios and differences of the variants, or the reason why one cannot run."""
    gpu = device.type == "cuda"
    shape, dtype = (Shape(), torch.bfloat16) if gpu else (TOY, torch.float32)
    _clean(device)
    weights = Weights(shape, dtype, device)
    peer = PeerLoop(weights)
    found: dict = {
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "skipped": {},
        "graph": {},
    }
    loops: dict[str, Loop] = {}
    for name, (whose, attention, kept) in variants(device).items():
        if budget.left() <= 0:
            found["skipped"][name] = "over the time of this section"
        elif name == "peer flash" and "peer varlen" in loops:
            found["skipped"][name] = "the same algorithm as varlen"
        if name in found["skipped"]:
            continue
        say(f"paper: {name}")
        try:
            if whose == "peer":
                loops[name] = Peer(peer, library(attention))
            else:
                loops[name] = OurLoop(weights, operations(device), attention, kept)
            _warm(loops[name], weights)
            if gpu and whose == "ours":
                found["graph"][name] = _captured(loops[name])
        except Exception as error:
            loops.pop(name, None)
            found["skipped"][name] = why(error)
            _clean(device)
    found["difference"] = _compare(loops, weights, dtype, found["skipped"])
    same = [value for name, value in found["difference"].items() if not name.endswith("short")]
    found["agree"] = all(value <= AGREE[dtype] for value in same)
    say("paper: timing")
    samples = _race(loops, weights, device, budget)
    return found | _figures(samples, device, shape, ceiling)


class Peer:
    """The reference's loop with a given attention; all share one loop, whose cache has 7 GB."""

    def __init__(self, loop: PeerLoop, attend: Attend):
        self.loop, self.attend = loop, attend

    def start(self) -> None:
        self.loop.attend = self.attend
        self.loop.start()

    def step(self, noise: torch.Tensor) -> torch.Tensor:
        self.loop.attend = self.attend
        return self.loop.step(noise)


Loop = Peer | OurLoop


def _warm(loop: Loop, weights: Weights) -> None:
    loop.start()
    noise = weights.noise()
    for _ in range(WARM):
        loop.step(next(noise))
    synchronize(weights.device)


def _captured(loop: OurLoop) -> bool | str:
    """Captures the loop's step as one CUDA graph → True, or the reason why not; then it is timed launch by
    launch.
    """
    try:
        return loop.capture()
    except Exception as error:
        loop.replay = None
        return why(error)


def _compare(
    loops: dict[str, Loop], weights: Weights, dtype: torch.dtype, skipped: dict[str, str]
) -> dict[str, float]:
    """Relative RMS difference of each loop from the first, in the worst of some steps with the same noise.
    Loops that should agree and do not are removed; one with a shorter memory of committed blocks is another
    model.
    """
    made: dict[str, list[torch.Tensor]] = {}
    for name, loop in list(loops.items()):
        noise = weights.noise()
        try:
            loop.start()
            made[name] = [loop.step(next(noise)).clone() for _ in range(STEPS)]
        except Exception as error:
            skipped[name] = why(error)
            del loops[name]
    true = next(iter(made.values()), [])
    found = {name: max(map(rel_rms, outs, true)) for name, outs in made.items()}
    for name, difference in found.items():
        if not difference <= (1.0 if name.endswith("short") else WRONG * AGREE[dtype]):
            skipped[name] = f"its frames differ by {difference:.2g}"
            del loops[name]
    return found


def _race(
    loops: dict[str, Loop], weights: Weights, device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Milliseconds of single steps from call to result, one of each loop by turns."""
    samples: dict[str, list[float]] = {name: [] for name in loops}
    noise = weights.noise()
    for number in range(WARM + ROUNDS):
        if number > WARM and budget.left() <= 0:
            break
        given = next(noise)
        for name, loop in loops.items():
            synchronize(device)
            start = time.perf_counter()
            loop.step(given)
            synchronize(device)
            if number >= WARM:
                samples[name].append(1000 * (time.perf_counter() - start))
    return {name: times for name, times in samples.items() if times}


def _figures(
    samples: dict[str, list[float]], device: torch.device, shape: Shape, ceiling: dict[str, float]
) -> dict:
    known = variants(device)
    ms = {name: statistics.median(times) for name, times in samples.items()}
    tflops = {}
    for name in ms:
        kept = known[name][2] or shape.kept
        tflops[name] = replace(shape, kept=kept).flops() / ms[name] / 1e9
    peers = [name for name in ms if known[name][0] == "peer"]
    ours = [name for name in ms if known[name][0] == "ours"]
    return {
        "ms": ms,
        "spread": {name: max(times) - min(times) for name, times in samples.items()},
        "samples": {name: len(times) for name, times in samples.items()},
        "tflops": tflops,
        "share": {name: rate / ceiling["tflops"] for name, rate in tflops.items()},
        "ratios": {f"{a} / {b}": ms[a] / ms[b] for a in peers for b in ours},
        "best": min((name for name in ours if not known[name][2]), key=ms.__getitem__, default=None),
        "tflop": shape.flops() / 1e12,
    }


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
