"""Charts of the report, as PNG files; drawn without a display."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DPI = 110


def _figure(width: float, height: float, rows: int, columns: int):
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_confusion(path: Path, table: np.ndarray, names: list[str]) -> None:
    """Draws counts (n, n): the given key in rows, the most similar one in columns."""
    side = 1.8 + 0.62 * len(names)
    figure, axes = _figure(side + 0.8, side, 1, 1)
    axis = axes[0, 0]
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for y, x in np.ndindex(table.shape):
        if table[y, x]:
            colour = "white" if share[y, x] > 0.55 else "black"
            axis.text(x, y, str(table[y, x]), ha="center", va="center", color=colour)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("most like the true picture of")
    axis.set_ylabel("key that was held")
    figure.savefig(path, dpi=DPI)


def draw_responses(path: Path, curves: dict[str, np.ndarray], own: str) -> None:
    """Draws responses to a key (t,), by the way of playing; the one named `own` is thick."""
    figure, axes = _figure(6, 4, 1, 1)
    axis = axes[0, 0]
    axis.axhline(1, color="black", linewidth=1, linestyle=":")
    for name, curve in curves.items():
        width = 3 if name == own else 1.5
        axis.plot(range(1, len(curve) + 1), curve, marker="o", linewidth=width, label=name)
    axis.set_xlabel("frames after the key changed")
    axis.set_ylabel("answer, share of the true one")
    axis.set_ylim(-0.1, 1.3)
    axis.legend()
    figure.savefig(path, dpi=DPI)


def draw_drift(path: Path, games: dict[str, dict[str, np.ndarray]], seconds: float) -> None:
    """Draws curves (segments,) by game and figure, a panel for each figure; a segment has `seconds`. Games
    whose names end in "true" are dashed, in the colour of the generated ones.
    """
    panels = {
        "nearest": "distance to the nearest true frames (features)",
        "sharpness": "sharpness, grey levels",
        "motion": "motion, grey levels a frame",
        "deviation": "deviation of colours, grey levels",
        "away": "wandered since the first segment, grey levels",
        "red": "mean red, grey levels",
    }
    figure, axes = _figure(14, 7.5, 2, 3)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(n.split()[0] for n in games))}
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for name, figures in games.items():
            true = name.endswith("true")
            values = figures[key]
            minutes = (np.arange(len(values)) + 0.5) * seconds / 60
            style = {"linestyle": "--", "linewidth": 0.8, "alpha": 0.6} if true else {"linewidth": 1.6}
            axis.plot(minutes, values, color=colours[name.split()[0]], label=name, **style)
        axis.set_title(title)
        axis.set_xlabel("minutes")
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=DPI)
