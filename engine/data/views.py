"""Prints the share of recorded views that a wall fills, as JSON: `python -m engine.data.views DIR`."""

from __future__ import annotations

import json
import sys

from ..config import WorldConfig
from ..errors import run_program
from ..worlds import make_world
from .find import find_recordings
from .recording import Recording
from .sight import wall_share


def measure(folder: str) -> dict[str, dict[str, float]]:
    """For each world in the recordings below `folder`: the number of frames, and the share whose view a wall
    fills, None for a world without a map. Raises UserError where nothing is recorded, or the world cannot be
    opened, as its walls are known to it alone.
    """
    states: dict[str, list] = {}
    configs: dict[str, dict] = {}
    for directory in find_recordings(folder):
        recording = Recording(directory)
        world = recording.header["config"].get("id") or recording.header["world"]
        states.setdefault(world, []).extend(recording.states)
        configs[world] = recording.header["config"]
    found = {}
    for name, recorded in states.items():
        known = {
            key: value for key, value in configs[name].items() if key in WorldConfig.__dataclass_fields__
        }
        world = make_world(WorldConfig(**known))
        share = wall_share(recorded, world.map_lines())
        world.close()
        found[name] = {"frames": len(recorded), "wall_views": None if share is None else round(share, 4)}
    return found


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    print(json.dumps(measure(arguments[0] if arguments else "runs/data")))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("views", lambda: main(sys.argv[1:])))
