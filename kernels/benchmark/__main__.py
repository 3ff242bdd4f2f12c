"""One command that checks and measures the kernels on a GPU:

python -m engine.kernels.benchmark --budget 450 --out DIR

First all operations are checked; if one is wrong, nothing is timed. Then it measures the machine's ceilings,
each operation against libraries, the shipped model's step, and the paper's step against the reference's loop.
The last line printed is JSON; bench.json in DIR has more figures, and table.md the tables. `--device cpu`
runs all of it at toy size. `--tune` makes the GPU's table of kernel configurations, `--table FILES` the
tables of a document.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import UserError, run_program
from engine.files import write_whole

from ..dispatch import use
from . import endtoend, gate, optable, tuning
from .processes import share
from .report import last_line, markdown, rounded, with_tables
from .timing import Budget, ceilings, why

# the largest share of the remaining budget for each section
SHARES = {"gate": 0.25, "tune": 0.9, "ceilings": 0.04, "table": 0.3, "shipped": 0.08, "paper": 1.0}
TUNING = ("gate", "tune")
MEASURING = ("gate", "ceilings", "table", "shipped", "paper")
ROOT = Path(__file__).resolve().parents[2]
# the shipped model's step: kernels, whether it is one CUDA graph, whether the commit is in the window's pass
STEPS = {
    "graph": ("auto", True, True),
    "eager": ("auto", False, True),
    "peer-style": ("reference", False, False),
}
STOP = 5.0  # seconds: no section begins when less of the budget is left


def main(arguments: list[str] | None = None) -> int:
    """The program → its exit code."""
    return run_program("benchmark", lambda: _measure(parse(arguments)))


def _measure(options: argparse.Namespace) -> int:
    if options.table:
        try:
            text = with_tables(options.table, options.document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"No tables can be made of these files ({error})"
            raise UserError(f"{said}; give bench.json of this program.") from error
        write_whole(options.document, text)
        return 0
    device = options.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.share:
        kind, part = options.share
        todo = {"gate": gate.checks, "tune": tuning.checks}[kind](gate.operations(device), device)
        share(list(todo), *map(int, part.split("/")), options.budget, options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    result = bench(device, options)
    write_whole(options.out / "bench.json", json.dumps(rounded(result), indent=1) + "\n")
    write_whole(options.out / "table.md", markdown(result))
    print(last_line(result), flush=True)
    failed = options.tune and "tune" in result.get("skipped", {})
    return int(failed or result["gate"] == "red")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.benchmark", description=__doc__)
    parser.add_argument("--budget", type=_seconds, default=450.0, help="seconds that all of it may take")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for bench.json and table.md")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help=f"some of {','.join(SHARES)}; unchecked without gate")
    parser.add_argument("--tune", action="store_true", help="make this GPU's table of configurations")
    parser.add_argument("--workers", type=int, default=-1, help="processes that check; 0: this one")
    parser.add_argument("--table", type=Path, nargs="+", help="JSON files to make --document's tables of")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "kernels.md")
    parser.add_argument("--share", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - set(SHARES):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; choose of {', '.join(SHARES)}")
    if not options.only:
        options.only = list(TUNING if options.tune else MEASURING)
    if options.workers < 0:
        spare = (os.cpu_count() or 2) - 2
        options.workers = max(1, min(14, spare)) if options.device.type == "cuda" else 0
    return options


def _seconds(text: str) -> float:
    if not 0 <= (seconds := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time that something can take")
    return seconds


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from error
    return device


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def bench(device: torch.device, options: argparse.Namespace) -> dict:
    """Runs the wanted sections while there is time → their figures."""
    budget, result = Budget(options.budget), {"gate": "not run", "checked": 0, **about(device)}

    def section(name: str, work: Callable[[Budget], object]) -> object | None:
        part = budget.part(SHARES[name] * options.budget)
        if name not in options.only:
            return None
        if budget.left() <= min(STOP, 0.1 * options.budget):
            result.setdefault("skipped", {})[name] = "over the budget"
            return None
        say(f"{name}: {part.left():.0f} s at most, {budget.left():.0f} s left")
        try:
            return work(part)
        except Exception as error:  # other sections' figures are still of use
            result.setdefault("skipped", {})[name] = why(error)
            say(f"{name} failed: {why(error)}")
            return None

    result |= section("gate", lambda part: gate.run(device, part, options.workers)) or {}
    if result["gate"] == "red" or "gate" in result.get("skipped", {}):
        for failure in result.setdefault("failures", ["the gate itself failed"]):
            say(f"wrong: {failure}")
        return result | {"gate": "red", "seconds": budget.spent()}
    result["tuned"] = section(
        "tune", lambda part: tuning.tune(device, part, options.workers, options.out, say)
    )
    if found := section("ceilings", lambda part: ceilings(device, part.left() / 2)):
        result["ceilings"] = found
    best = result.get("ceilings", {"tflops": float("inf"), "tbytes": float("inf")})
    result["rows"] = section("table", lambda part: optable.table(device, part, best, say)) or []
    step = {"shipped": section("shipped", lambda part: shipped_step(device, part))}
    step["paper"] = section("paper", lambda part: endtoend.paper_step(device, part, best, say))
    result["step"] = {name: found for name, found in step.items() if found}
    return {name: value for name, value in result.items() if value is not None} | {"seconds": budget.spent()}


def about(device: torch.device) -> dict[str, str]:
    triton = "none"
    if importlib.util.find_spec("triton"):
        import triton as module

        triton = module.__version__
    found = {"device": "CPU", "torch": torch.__version__, "triton": triton}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return found | {"date": time.strftime("%Y-%m-%d")}


def shipped_step(device: torch.device, budget: Budget) -> dict:
    """Times the shipped model's step in the ways above, by turns: median and 99th percentile in ms."""
    import numpy as np

    from engine.rollout.player import Player
    from engine.rollout.rollout import Rollout  # late, as only this needs it
    from engine.rollout.session import Session

    gpu = device.type == "cuda"
    shipped = ROOT / "assets" / "doom_gathering.safetensors"
    player = Player(shipped, str(device))
    draw, world = np.random.default_rng(0), player.world
    frames = draw.integers(0, 256, (9, world.height, world.width, 3), np.uint8)
    keys = (draw.random((64, len(world.keys))) < 0.3).astype(np.float32).repeat(8, 0)  # held for 8 frames
    sessions = {}
    for name, (kernels, graph, folded) in STEPS.items():
        with use(kernels):
            rollout = functools.partial(Rollout, folded=folded)
            sessions[name] = Session(Player(shipped, str(device), rollout=rollout), graph)
            sessions[name].reset(0, frames)
    warm, times = 10 if gpu else 2, {name: [] for name in sessions}
    for number in range(warm + (400 if gpu else 10)):
        if budget.left() <= 0 and number > warm + 5:
            break
        for name, session in sessions.items():
            with use(STEPS[name][0]):
                start = time.perf_counter()
                session.step(keys[number % len(keys)])
                times[name].append(1000 * (time.perf_counter() - start))
    taken = {name: sorted(found[warm:]) for name, found in times.items()}
    ms = {name: statistics.median(found) for name, found in taken.items()}
    return {
        "ms": ms,
        "p99": {name: found[min(len(found) - 1, int(0.99 * len(found)))] for name, found in taken.items()},
        "ratios": {name: ms["peer-style"] / ms[name] for name in ms if name != "peer-style"},
        "samples": len(taken["graph"]),
        "precision": str(player.dtype),
    }


if __name__ == "__main__":
    sys.exit(main())
