"""Makes a GPU's table: for each timed shape, the fastest of some configurations of the attention kernel.

Each configuration is first checked against the definition, in several processes, which also compile it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from .cases import AttentionCase, attention_cases, attention_input
from .checks import check_attention
from .gate import chosen, operations
from .processes import Check, in_turn, side_by_side
from .timing import Budget, Timing, interleaved, sets_for

DTYPE = torch.bfloat16  # float16 behaves the same and has the same rules
Key = tuple[
    int, int, int, int
]  # conditions of a rule: head dim, queries of the longest group, keys, tokens of a page


def key(case: AttentionCase) -> Key:
    rows, pages = (max(x) for x in zip(*case.groups, strict=True))
    return case.dim, rows, pages * case.page, case.page


def candidates(ops, case: AttentionCase, device: torch.device) -> list:
    """Configurations to try for this shape, including the present table's."""
    make, (dim, rows, _, page) = ops.attention.Config, key(case)
    deep = 2 if dim == 128 else 4
    tried = [make(128, 128, 8, deep, 0, True), make(128, 128, 8, deep), make(128, 64, 8, 3)]
    tried += [
        make(128, 64, 8, 3, 0, True),
        make(128, 64, 4, 3),
        make(64, 64, 4, 3),
        make(64, 64, 4, 3, 0, True),
    ]
    tried += [make(16, 64, 4, 3), make(32, 64, 4, 3), make(32, 32, 2, 3), make(64, 32, 4, 3)]
    if rows > 256:  # small tiles are for few queries
        tried = [config for config in tried if config.block_m >= 64]
    tried = [
        config for config in tried if config.block_m < 2 * rows and not (config.tma and config.block_n > page)
    ]
    own = chosen(ops, case, _dtype(device), device)
    return [own, *(config for config in tried if config != own)]


def trials(ops, device: torch.device) -> Iterator[tuple[AttentionCase, object, Check]]:
    for case in _cases(ops, device):
        for config in candidates(ops, case, device):
            run = _later(ops, case, device, config)
            yield case, config, Check(f"{case.name}, {config}", run, optional=True)


def checks(ops, device: torch.device) -> list[Check]:
    return [check for _, _, check in trials(ops, device)]


def tune(
    device: torch.device, budget: Budget, workers: int, folder: Path, say: Callable[[str], None]
) -> dict[str, str]:
    """Writes the device's table into kernels/tables and into `folder` → the configuration chosen for each
    shape.
    """
    ops = operations(device)
    if not hasattr(ops, "attention"):
        raise ValueError("the definitions cannot be cut; a GPU is needed, or TRITON_INTERPRET=1")
    todo = checks(ops, device)
    part = budget.part(0.6 * budget.left())
    found = side_by_side("tune", todo, device, part, workers) if workers else []
    if not any(x["state"] == "right" for x in found):
        found = in_turn(todo, part, "tune")
    right = {x["name"] for x in found if x["state"] == "right"}
    fit: dict[str, list] = {}
    for case, config, check in trials(ops, device):
        if check.name in right:
            fit.setdefault(case.name, []).append(config)
    best: dict[Key, dict[object, float]] = {}
    cases = [case for case in _cases(ops, device) if case.name in fit]
    for number, case in enumerate(cases):
        if budget.left() <= 0:
            break
        say(f"tune: {case.name}, {len(fit[case.name])} ways")
        times = measure(ops, case, fit[case.name], device, budget.left() / (len(cases) - number))
        sums = best.setdefault(key(case), {})
        for config, ms in times.items():
            sums[config] = sums.get(config, 0.0) + ms
    rules = [
        rule(asked, min(sums, key=sums.get)) for asked, sums in sorted(best.items(), key=_narrow) if sums
    ]
    name = ops.attention.names(device)[0].replace(" ", "_")
    text = render({"measured": True, "window_attention": rules})
    for where in (Path(__file__).parents[1] / "tables", folder):
        if device.type == "cuda" or where == folder:  # a trial run changes no table
            where.joinpath(f"{name}.json").write_text(text, "utf-8")
    for known in (ops.attention.read_table, ops.attention.pick):
        known.cache_clear()
    return {str(rule["rows"]) + " x " + str(rule["keys"]): str(rule["config"]) for rule in rules}


def measure(
    ops, case: AttentionCase, configs: list, device: torch.device, seconds: float
) -> dict[object, float]:
    dtype = _dtype(device)
    count = sets_for(case.size * dtype.itemsize, device)
    sets = [attention_input(case, dtype, device, 300 + i) for i in range(count)]
    calls = {str(config): _call(ops, sets, config) for config in configs}
    found = interleaved(calls, device, seconds / 2, count)
    by_name = {str(config): config for config in configs}
    return {by_name[name]: timing.ms for name, timing in found.items() if isinstance(timing, Timing)}


def _call(ops, sets: list, config) -> Callable[[int], object]:
    return lambda i: ops.window_attention(*sets[i].all(), config=config)


def _later(ops, case: AttentionCase, device: torch.device, config) -> Callable[[], None]:
    return lambda: check_attention(ops, case, _dtype(device), device, False, config)


def _cases(ops, device: torch.device) -> tuple[AttentionCase, ...]:
    return attention_cases(device)


def _dtype(device: torch.device) -> torch.dtype:
    return DTYPE if device.type == "cuda" else torch.float32


def _narrow(item: tuple[Key, dict]) -> tuple[int, ...]:
    """Sort key: rules for smaller shapes come first, as the first matching one is used."""
    dim, rows, keys, page = item[0]
    return dim, rows, keys, -page


def rule(asked: Key, config) -> dict:
    dim, rows, keys, page = asked
    plain = {name: value for name, value in asdict(config).items() if value}
    kinds = ["float16", "bfloat16"]
    return {"head_dim": [dim], "dtype": kinds, "rows": rows, "keys": keys, "page": page, "config": plain}


def render(table: dict) -> str:
    """The table as JSON, one rule a line."""
    lines = ",\n".join(f"    {json.dumps(rule)}" for rule in table["window_attention"])
    return f'{{\n  "measured": {json.dumps(table["measured"])},\n  "window_attention": [\n{lines}\n  ]\n}}\n'
