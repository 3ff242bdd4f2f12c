"""The benchmark's figures as JSON and as Markdown; tables in documents are made from committed JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
OPS = ("window_attention", "qknorm_rope_write", "gate_residual_norm_modulate")


def rounded(x):
    """x with all numbers in it rounded to four digits; None for infinity and NaN, which JSON lacks."""
    if isinstance(x, float):
        return float(f"{x:.4g}") if math.isfinite(x) else None
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list | tuple) else x


def last_line(result: dict) -> str:
    """The figures as one line of JSON, without what is in bench.json only."""
    names = ("op", "shape", "dtype", "provider", "ms", "spread", "share")
    rows = [{key: row[key] for key in names} for row in result.get("rows", ()) if "ms" in row]
    gate = {
        key: result[key]
        for key in ("gate", "checked", "failures", "device", "torch", "triton")
        if key in result
    }
    more = {key: result[key] for key in ("ceilings", "step", "skipped", "seconds") if key in result}
    rows = [] if result.get("gate") == "red" else rows
    gate["left"] = len(result.get("left", ()))
    return json.dumps(rounded({**gate, "rows": rows, **more}), separators=(",", ":"))


def markdown(result: dict) -> str:
    """One machine's tables."""
    parts = [f"**{result['device']}**, torch {result['torch']}, triton {result['triton']}, {_gate(result)}."]
    if result.get("gate") != "red":
        parts += [_ceilings(result), *_ops(result), _paper(result), _shipped(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gate(result: dict) -> str:
    if result["gate"] == "not run":
        return "operations not checked in this run"
    failures = "".join(f"; {failure}" for failure in result.get("failures", ()))
    left = len(result.get("left", ()))
    return f"gate {result['gate']}: {result['checked']} checks, {left} left for want of time{failures}"


def _ceilings(result: dict) -> str:
    found = result.get("ceilings")
    if not found:
        return ""
    product, copy = f"{found['tflops']:.4g} TFLOP/s", f"{found['tbytes']:.3g} TB/s"
    return f"Ceilings measured: {product} (matrix product), {copy} (copy, read and written)."


def _ops(result: dict) -> Iterable[str]:
    for op in OPS:
        rows = [row for row in result.get("rows", ()) if row["op"] == op]
        if not rows:
            continue
        unit, title = ("tflops", "TFLOP/s") if op == "window_attention" else ("gbytes", "GB/s")
        lines = []
        for row in rows:
            if "ms" not in row:
                lines.append((row["shape"], row["provider"], "–", "–", "–", f"skipped: {row['skipped']}"))
                continue
            figures = f"{row['ms']:.4g}", f"{row['spread']:.2g}", f"{row[unit]:.4g}", f"{row['share']:.0%}"
            lines.append((row["shape"], row["provider"], *figures))
        head = "shape", "provider", "ms", "spread", title, "of the ceiling"
        yield f"`{op}`, {rows[0]['dtype']}\n\n{_table(head, lines)}"


def _paper(result: dict) -> str:
    step = result.get("step", {}).get("paper", {})
    if not step.get("ms"):
        return ""
    lines = []
    for name, ms in step["ms"].items():
        rate, share = f"{step['tflops'][name]:.4g}", f"{step['share'][name]:.0%}"
        off = step["difference"].get(name)
        figures = f"{ms:.4g}", f"{step['spread'][name]:.2g}", rate, share, f"{off:.2g}"
        lines.append((name, *figures, *_times(step, name)))
    peers = [name for name in step["ms"] if name.startswith("peer")]
    head = "loop", "ms a step", "spread", "TFLOP/s", "of the ceiling", "differs by"
    skipped = "".join(f"\n\n{name} skipped: {said}" for name, said in step.get("skipped", {}).items())
    table = _table((*head, *(f"{peer} / this" for peer in peers)), lines)
    return f"The paper's step, {step['dtype']}\n\n{table}{skipped}"


def _times(step: dict, name: str) -> list[str]:
    peers = [peer for peer in step["ms"] if peer.startswith("peer")]
    return [f"{step['ms'][peer] / step['ms'][name]:.2f}" for peer in peers]


def _shipped(result: dict) -> str:
    step = result.get("step", {}).get("shipped", {})
    if not step.get("ms"):
        return ""
    lines = []
    for name, ms in step["ms"].items():
        ratio = f"{step['ratios'][name]:.2f}" if name in step["ratios"] else "–"
        lines.append((name, f"{ms:.4g}", f"{step['p99'][name]:.4g}", ratio))
    head = "step", "ms p50", "ms p99", "peer-style / this"
    return f"The shipped model's step\n\n{_table(head, lines)}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def with_tables(files: Sequence[Path], document: Path) -> str:
    """The document's text with the files' tables between its two markers."""
    text = document.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{document} needs {BEGIN} and, behind it, {END}, each once")
    made = [markdown(json.loads(file.read_text("utf-8"))) for file in sorted(files)]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n" + "\n".join(made) + f"\n{END}{after}"
