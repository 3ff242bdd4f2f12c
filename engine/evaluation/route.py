"""Route: the seed of an episode and the keys of a few seconds, to be played in the true and the generated
game.

A file of routes is a public benchmark: these seeds and keys give the same true frames everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from ..config import UserError
from ..files import write_whole

FORMAT = 1
SHIPPED = Path(__file__).parent / "routes"
NOTHING = "-"  # stands for no key
RETURN = "return_"  # prefix of kinds that lead back to the start: return_5, return_10 ... (seconds)


@dataclass(frozen=True)
class Route:
    """Keys from an episode's first frame on: `warmup` (n, k) for the true world only, then `actions` (t, k)
    for both. `end`: x, y and angle at the end in the true world, if it has them.
    """

    kind: str
    seed: int
    warmup: np.ndarray
    actions: np.ndarray
    end: tuple[float, ...] = field(default=())


def shipped_routes(world: str, keys: Iterable[str]) -> Path | None:
    """The shipped file of routes for a world that has all of its keys; None if there is none."""
    path = SHIPPED / f"{world}.json"
    if not path.is_file() or not set(json.loads(path.read_text("utf-8"))["keys"]) <= set(keys):
        return None
    return path


def written(actions: np.ndarray, keys: Iterable[str]) -> str:
    """Actions (t, k) as text: `forward:12 forward+turn_left:3 -:5`, the keys held and for how many frames."""
    names = list(keys)
    held = [[name for name, down in zip(names, action, strict=True) if down > 0.5] for action in actions]
    runs = ((kind, len(list(run))) for kind, run in groupby("+".join(some) or NOTHING for some in held))
    return " ".join(f"{kind}:{count}" for kind, count in runs)


def read(text: str, keys: Iterable[str]) -> np.ndarray:
    """The inverse of `written`: text → actions (t, k). Raises ValueError for any other text."""
    names, rows = list(keys), []
    for run in text.split():
        kind, _, count = run.rpartition(":")
        action = np.zeros(len(names), np.float32)
        for name in [] if kind == NOTHING else kind.split("+"):
            action[names.index(name)] = 1
        rows += [action] * int(count)
    return np.stack(rows) if rows else np.zeros((0, len(names)), np.float32)


def save_routes(path: Path, world: str, keys: Iterable[str], routes: list[Route], made: str) -> None:
    """Writes a file of routes, a line for each; `made`: the command that made them."""
    names = list(keys)
    lines = []
    for route in routes:
        line = {"kind": route.kind, "seed": route.seed}
        line |= {"warmup": written(route.warmup, names), "keys": written(route.actions, names)}
        lines.append(json.dumps(line | {"end": [round(value, 2) for value in route.end]}))
    head = json.dumps({"format": FORMAT, "world": world, "keys": names, "made": made})[1:-1]
    write_whole(path, "{" + head + ', "routes": [\n' + ",\n".join(lines) + "\n]}\n")


def load_routes(path: str | Path, world: str, keys: Iterable[str]) -> list[Route]:
    """Reads routes of a world with these keys. Raises UserError where the file is missing, damaged or of
    another world.
    """
    names = list(keys)
    try:
        kept = json.loads(Path(path).read_text("utf-8"))
        if kept["format"] != FORMAT:
            raise UserError(f"{path} has format {kept['format']}; this version reads {FORMAT}.")
        if kept["world"] != world:
            raise UserError(f"The routes in {path} are of {kept['world']}, and this network plays {world}.")
        routes = [
            Route(
                str(one["kind"]),
                int(one["seed"]),
                read(one["warmup"], names),
                read(one["keys"], names),
                tuple(map(float, one.get("end", ()))),
            )
            for one in kept["routes"]
        ]
    except OSError as error:
        raise UserError(f"The routes {path} could not be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{path} is no file of routes for the keys {', '.join(names)} ({error})"
        raise UserError(f"{said}; make one with python -m engine.evaluation.build_routes.") from None
    if not routes or any(len(route.actions) < 1 for route in routes):
        raise UserError(f"{path} holds no routes, or one without keys.")
    return routes
