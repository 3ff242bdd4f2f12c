"""Runs checks in turn or in several processes, and collects their outcomes.

Several processes compile in parallel, into Triton's cache; and a kernel that crashes its process is a failed
check, not the end of the benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .checks import Wrong
from .timing import Budget, limit, why

PATIENCE = 60.0  # seconds that one check may take
Outcome = dict[str, str]  # name, state (right, wrong, refused, left) and why


@dataclass(frozen=True)
class Check:
    """A check; `run` raises if it fails. An `optional` one may be refused by device or compiler (TMA), but
    must not be wrong.
    """

    name: str
    run: Callable[[], None]
    optional: bool = False


def outcomes(todo: Iterable[Check], budget: Budget, began: Callable[[str], None]) -> Iterator[Outcome]:
    """Runs checks in turn while there is time → yields their outcomes."""
    for check in todo:
        if budget.left() <= 0:
            yield {"name": check.name, "state": "left"}
            continue
        began(check.name)
        try:
            with limit(min(PATIENCE, budget.left() + 5)):
                check.run()
            yield {"name": check.name, "state": "right"}
        except TimeoutError as error:
            yield {"name": check.name, "state": "left", "why": why(error)}
        except Exception as error:
            refused = check.optional and not isinstance(error, Wrong)
            yield {"name": check.name, "state": "refused" if refused else "wrong", "why": why(error)}


def in_turn(todo: Iterable[Check], budget: Budget, title: str) -> list[Outcome]:
    """Runs checks in this process, and shows on a terminal which one is running."""

    def say(name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{title}: {name}", end="", file=sys.stderr, flush=True)

    found = list(outcomes(todo, budget, say))
    say(f"{len(found)} checks done\n")
    return found


def share(todo: list[Check], part: int, parts: int, seconds: float, file: Path) -> None:
    """Runs one process's share of the checks, and writes each outcome as a line of `file`."""
    with file.open("w") as out:

        def note(what: Outcome) -> None:
            out.write(json.dumps(what) + "\n")
            out.flush()

        for found in outcomes(
            todo[part::parts], Budget(seconds), lambda name: note({"name": name, "state": "began"})
        ):
            note(found)


def side_by_side(
    kind: str, todo: list[Check], device: torch.device, budget: Budget, workers: int
) -> list[Outcome]:
    """Runs checks in several processes, each of which makes the same list (`kind` names it) and runs its
    share.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.jsonl" for part in range(workers)]
        started = [
            _start(kind, device, f"{i}/{workers}", budget.left(), file) for i, file in enumerate(files)
        ]
        while any(process.poll() is None for process in started) and budget.left() > -10:
            time.sleep(0.2)
        broken = [process.poll() not in (None, 0) for process in started]  # others are still running, or done
        for process in started:
            process.kill()
            process.wait()
        found = []
        for part in range(workers):
            found += read_outcomes(files[part], [check.name for check in todo[part::workers]], broken[part])
    return found


def _start(kind: str, device: torch.device, part: str, seconds: float, file: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", __package__, "--device", str(device)]
    command += ["--share", kind, part, "--budget", str(seconds), "--out", str(file)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(x for x in (os.getcwd(), *sys.path) if x))
    with file.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def read_outcomes(file: Path, names: list[str], broken: bool) -> list[Outcome]:
    """A process's outcomes. If it crashed, the check that it had begun is wrong, and later ones are left."""
    found = {name: {"name": name, "state": "left"} for name in names}
    log = file.with_suffix(".log")
    said = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line for line in reversed(said) if line.strip()), "")[:120]
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.endswith("}"):  # the last one may be cut
            found[json.loads(line)["name"]] = json.loads(line)
    for name, what in found.items():
        if what["state"] == "began" or (broken and what == {"name": name, "state": "left"}):
            state = {"state": "wrong", "why": f"its process broke: {last}"} if broken else {"state": "left"}
            found[name] = {"name": name, **state}
    return list(found.values())
