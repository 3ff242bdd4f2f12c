"""The report: one Markdown page with the tables and pictures of all parts, and the figures as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import write_whole
from .section import Section

REPORT, FIGURES = "report.md", "figures.json"


def write_report(
    folder: Path, headline: str, sections: list[Section], figures: dict, shown: list[str]
) -> None:
    """Writes both files into the folder with the pictures; the page begins with the figures in `shown`."""
    lines = ["# Evaluation", "", headline, ""]
    lines += ["| figure | value |", "| --- | ---: |"]
    lines += [f"| {name} | {figures[name]} |" for name in shown]
    lines += ["", f"All figures: [{FIGURES}]({FIGURES})"]
    for section in sections:
        lines += ["", f"## {section.title}", "", *section.lines]
    write_whole(folder / REPORT, "\n".join(lines).rstrip() + "\n")
    write_whole(folder / FIGURES, json.dumps(figures, indent=1) + "\n")
