"""The report: one Markdown page with the tables and pictures of all parts, and the figures as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config import UserError
from .section import Section

REPORT, FIGURES = "report.md", "figures.json"


def write_report(
    folder: Path, headline: str, sections: list[Section], figures: dict, shown: list[str]
) -> None:
    """Writes both files into the folder, beside the pictures that are there; the page begins with the figures
    `shown`.
    """
    lines = ["# Evaluation", "", headline, ""]
    lines += ["| figure | value |", "| --- | ---: |"]
    lines += [f"| {name} | {figures[name]} |" for name in shown]
    lines += ["", f"All figures: [{FIGURES}]({FIGURES})"]
    for section in sections:
        lines += ["", f"## {section.title}", "", *section.lines]
    write(folder / REPORT, "\n".join(lines).rstrip() + "\n")
    write(folder / FIGURES, json.dumps(figures, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Writes a file beside and then renames it. Raises UserError where the disk is full or forbids it."""
    beside = path.with_suffix(".tmp")
    try:
        beside.write_text(text, "utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); free some space and run again."
        ) from error
