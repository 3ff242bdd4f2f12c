"""Two evaluations side by side, in Markdown: python -m engine.evaluation.compare BEFORE.json AFTER.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..errors import UserError, run_program
from .drift import POLICIES
from .fidelity import HORIZONS
from .section import STATELESS

FPS = 17.5  # assumed if the figures lack the world's rate
ROWS = {
    **{f"PSNR after {h}": f"psnr_{h}" for h in HORIZONS},
    **{f"PSNR after {h}, without state": f"psnr_{h}{STATELESS}" for h in HORIZONS},
    **{f"sharpness after {h}": f"sharpness_{h}" for h in HORIZONS},
    **{f"finest octave after {h}": f"octave1_{h}" for h in HORIZONS},
    **{f"high-pass correlation after {h}": f"highpass_{h}" for h in HORIZONS[:2]},
    "Fréchet distance": "frechet",
    "idle flicker, grey levels a frame": "flicker_idle",
    "control": "control control_low control_high",
    "first answer, frames": "latency_first_frames",
    "half answer, frames": "latency_half_frames",
    **{
        f"{m} min, {p}: nearest-true distance last/first (motion)": f"drift_{m}min_{p} motion_{m}min_{p}"
        for m in (2, 10)
        for p in POLICIES
    },
    "views filled by a wall, generated/true": "wall_ratio",
    "the same in long games": "drift_wall_ratio",
    **{f"coming back after {s} s, PSNR": f"return_psnr_{s}" for s in (5, 10, 20)},
    **{f"coming back after {s} s, without state": f"return_psnr_{s}{STATELESS}" for s in (5, 10, 20)},
    "collapses": "collapses",
    "× real time": "real_time",
}


def cell(figures: dict, names: str) -> str:
    """The text of a table's cell: a figure, and in brackets its interval or further figures."""
    figures = {"real_time": figures["fps_p50"] / FPS if "fps_p50" in figures else None} | figures
    found = [f"{figures[name]:.3g}" for name in names.split() if figures.get(name) is not None]
    value, *beside = found or ["–"]
    return f"{value} ({' to '.join(beside)})" if beside else value


def compare(before: dict, after: dict) -> str:
    """Two sets of figures of stage=evaluate → a Markdown table, without rows that neither has."""
    lines = ["| | before | after |", "| --- | ---: | ---: |"]
    for title, names in ROWS.items():
        pair = [cell(figures, names) for figures in (before, after)]
        lines += [f"| {title} | {' | '.join(pair)} |"] if set(pair) != {"–"} else []
    return "\n".join(lines)


def read(path: Path) -> dict:
    """The figures in a file written by stage=evaluate. Raises UserError for any other file."""
    try:
        figures = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; give the figures.json of stage=evaluate.") from error
    if not isinstance(figures, dict):
        raise UserError(f"{path} holds no figures; give the figures.json of stage=evaluate.")
    for name in {name for names in (*ROWS.values(), "fps_p50") for name in names.split()}:
        if not isinstance(figures.get(name, 0.0), int | float | None):
            raise UserError(f"{path} is damaged: its {name} is no number.")
    return figures


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    if len(arguments) != 2:
        raise UserError(
            "Give two files of figures: python -m engine.evaluation.compare BEFORE.json AFTER.json"
        )
    print(compare(*(read(Path(name)) for name in arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("compare", lambda: main(sys.argv[1:])))
