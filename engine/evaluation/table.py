"""The ablation's table, made from the files of its rows: python -m engine.evaluation.table [FOLDER
[DOCUMENT]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..errors import UserError, run_program
from ..files import write_whole
from .variants import VARIANTS

BEGIN, END = "<!-- ablation -->", "<!-- /ablation -->"
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
COLUMNS = {
    "drift_2min_scripted": "drift, script",
    "drift_2min_random": "random",
    "drift_2min_idle": "idle",
    "motion_2min_random": "motion",
    "flicker_idle": "flicker",
    "drift_wall_ratio": "walls",
    "frechet": "Fréchet",
    "psnr_16": "PSNR@16",
    "psnr_64": "PSNR@64",
    "control": "control",
    "latency_first_frames": "first answer",
    "latency_half_frames": "half",
    "fps_p50": "fps",
}


def render(rows: list[dict]) -> str:
    """Rows (ablation.py) → Markdown: a table, and below it what was measured."""
    lines = [["", *COLUMNS.values()], ["---", *["---:"] * len(COLUMNS)]]
    rows = sorted(rows, key=_place)
    lines += [_line(_title(row), row["figures"]) for row in rows]
    if rows:  # the same in all rows of one size and seed
        true = {name: rows[0]["figures"].get(f"{name}_true") for name in COLUMNS}
        lines.append(_line("the true world under the same keys", true))
    else:
        lines.append(_line("*not measured yet*", {}))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    measured = sorted({(r["checkpoint"], r["seed"], r["precision"], r["machine"]) for r in rows})
    notes = [f"Checkpoint `{c}`, seed {s}, {p}, {m}." for c, s, p, m in measured]
    return "\n\n".join([table, *notes])


def _place(row: dict) -> tuple[bool, int, str]:
    """Sort key: variants in their own order, then rows of other checkpoints."""
    other = row["row"] != row["variant"]
    return other, list(VARIANTS).index(row["variant"]), row["row"]


def _title(row: dict) -> str:
    if row["row"] == row["variant"]:
        return VARIANTS[row["variant"]].title
    return row["row"].replace("_", " ")


def _line(title: str, figures: dict) -> list[str]:
    cells = (figures.get(name) for name in COLUMNS)
    return [title, *("–" if value is None else f"{value:.3g}" for value in cells)]


def write_table(folder: Path, document: Path) -> None:
    """Writes the table of the folder's rows between the two markers in a document. Raises UserError where the
    document has no markers, or a file is no row.
    """
    text = document.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{document} needs {BEGIN} and, behind it, {END}, each once.")
    rows = []
    for file in sorted(folder.glob("*.json")):
        try:
            rows.append(json.loads(file.read_text("utf-8")))
            render(rows[-1:])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no row of an ablation ({error}); delete it.") from error
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_whole(document, f"{before}{BEGIN}\n\n{render(rows)}\n\n{END}{after}")


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    given = [Path(argument) for argument in arguments]
    folder, document, *_ = given + [DOCS / "ablation", DOCS / "rolling-forcing.md"][len(given) :]
    write_table(folder, document)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("table", lambda: main(sys.argv[1:])))
