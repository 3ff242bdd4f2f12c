"""How many of the recorded views a wall fills: `python -m engine.data.views DIR`; one line of JSON."""

from __future__ import annotations

import json
import sys

from ..config import WorldConfig
from ..errors import run_program
from ..worlds import make_world
from .recording import Recording, find_recordings
from .sight import wall_share


def measure(folder: str) -> dict[str, dict[str, float]]:
    """The recordings below `folder` → for each world its frames and the share of them that see only wall.

    The share is None for a world without a map. Raises UserError where nothing is recorded, or the world
    cannot be opened, which alone knows its walls.
    """
    states: dict[str, list] = {}
    configs: dict[str, dict] = {}
    for directory in find_recordings(folder):
        recording = Recording(directory)
        world = recording.header["config"].get("id") or recording.header["world"]
        states.setdefault(world, []).extend(recording.states)
        configs[world] = recording.header["config"]
    found = {}
    for name, told in states.items():
        known = {
            key: value for key, value in configs[name].items() if key in WorldConfig.__dataclass_fields__
        }
        world = make_world(WorldConfig(**known))
        share = wall_share(told, world.map_lines())
        world.close()
        found[name] = {"frames": len(told), "wall_views": None if share is None else round(share, 4)}
    return found


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    print(json.dumps(measure(arguments[0] if arguments else "runs/data")))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("views", lambda: main(sys.argv[1:])))
