"""All checks of the operations on this device, and their verdict, without which nothing is timed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from .. import reference
from .cases import HALVES, AttentionCase, TokenCase, attention_cases, token_cases
from .checks import check_attention, check_gradients, check_graph, check_residual, check_write
from .processes import Check, in_turn, side_by_side
from .timing import Budget


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def operations(device: torch.device):
    """The operations to check and to time: Triton's kernels on GPUs and in the interpreter, else the
    definitions, to try out the benchmark.
    """
    if device.type != "cuda" and not interpreted():
        return reference
    names = ("norm", "rope", "attention")
    norm, rope, attention = (importlib.import_module(f"..{name}", __package__) for name in names)
    return SimpleNamespace(
        gate_residual_norm_modulate=norm.gate_residual_norm_modulate,
        qknorm_rope=rope.qknorm_rope,
        qknorm_rope_write=rope.qknorm_rope_write,
        window_attention=attention.window_attention,
        attention=attention,
    )


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Types to check on a device: the interpreter cannot multiply bfloat16, and the definition itself is no
    more exact than its type.
    """
    if device.type == "cuda":
        return (*HALVES, torch.float32)
    return (torch.float32, torch.float16) if interpreted() else (torch.float32,)


def small_cases(dim: int) -> list[tuple[AttentionCase, tuple[str, ...]]]:
    """Small cases: the shipped model's pages and odd ones, with one and two groups, in a batch, and with many
    keys. With each, names of kernel configurations to check besides that of the tables.
    """
    rings = [(f"13 tokens, {n} pages", 13, ((13, n - 4), (52, n)), 1, ("5 parts",)) for n in (14, 9, 11)]
    others = [
        ("49 tokens, batch 2", 49, ((49, 3), (147, 7)), 2, ("plain",)),
        ("64 tokens, one group", 64, ((130, 5),), 1, ("TMA",)),
        ("256 tokens, many keys", 256, ((100, 12),), 1, ("2 parts", "TMA, 3 parts")),
    ]
    made = []
    for name, page, groups, batch, how in rings + others:
        made.append((AttentionCase(name, 4, dim, page, groups, batch), how))
    return made


def variant(ops, name: str):
    """The configuration of the attention kernel with this name; None for the definitions."""
    if not hasattr(ops, "attention"):
        return None
    how, *parts = name.split(", ") if "TMA" in name else ("plain", name)
    splits = int(parts[0][0]) if parts and parts[0][0].isdigit() else 1
    warps = 8 if how == "TMA" else 4
    rows = 64 if how == "plain" else 128
    return ops.attention.Config(rows, 64, warps, 2, splits, how == "TMA")


def chosen(ops, case: AttentionCase, dtype: torch.dtype, device: torch.device):
    """The configuration that the tables choose for this shape."""
    rows, pages = (max(x) for x in zip(*case.groups, strict=True))
    names = ops.attention.names(device)
    return ops.attention.pick(names, case.dim, dtype, rows, pages * case.page, case.page)


def checks(ops, device: torch.device) -> Iterator[Check]:
    """All checks: first of the shapes that are timed, then of small and odd ones."""
    gpu = device.type == "cuda"
    for dtype in dtypes(device):
        yield from _timed_shapes(ops, dtype, device)
    for dim in (64, 128, 32):
        for dtype in dtypes(device):
            for case, how in small_cases(dim)[: None if gpu else 1]:
                yield from _attention(ops, case, dtype, device, how)
            for together in (False, True):
                shape = (3, 49 if gpu else 5, 3) if together else (5, 13, 4)
                name = f"{shape[1]} tokens{' together' * together}, heads of {dim}"
                yield from _tokens(ops, TokenCase(name, *shape, dim, together, 1 + together), dtype, device)
        if gpu:
            yield from _graphs(ops, dim, device)


def _timed_shapes(ops, dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """Checks of the timed shapes; of the largest not in float32, which would take too long."""
    for case in attention_cases(device):
        if dtype in HALVES or case.flops < 1e11:
            run = _later(check_attention, ops, case, dtype, device, False)
            yield Check(f"window_attention, {case.name}, {_kind(dtype)}", run)
    for case in token_cases(device):
        yield from _tokens(ops, case, dtype, device, gradients=False)


def _attention(
    ops, case: AttentionCase, dtype: torch.dtype, device: torch.device, how: tuple[str, ...]
) -> Iterator[Check]:
    about = f"window_attention, {case.name}, heads of {case.dim}, {_kind(dtype)}"
    yield Check(about, _later(check_attention, ops, case, dtype, device, True))
    for name in how:
        if (config := variant(ops, name)) is not None:
            run = _later(check_attention, ops, case, dtype, device, True, config)
            yield Check(f"{about}, {name}", run, optional=True)


def _tokens(
    ops, case: TokenCase, dtype: torch.dtype, device: torch.device, gradients: bool = True
) -> Iterator[Check]:
    about = f"{case.name}, {_kind(dtype)}"
    yield Check(f"qknorm_rope_write, {about}", _later(check_write, ops, case, dtype, device))
    yield Check(f"gate_residual_norm_modulate, {about}", _later(check_residual, ops, case, dtype, device))
    for name in ("qknorm_rope", "gate_residual_norm_modulate") if gradients else ():
        run = _later(check_gradients, ops, name, case, dtype, device)
        yield Check(f"gradients of {name}, {about}", run)


def _graphs(ops, dim: int, device: torch.device) -> Iterator[Check]:
    tokens = TokenCase("graph", 5, 13, 4, dim)
    cases = small_cases(dim)
    yield Check(f"graph, heads of {dim}", _later(check_graph, ops, cases[0][0], tokens, device))
    for name in cases[4][1]:
        run = _later(check_graph, ops, cases[4][0], tokens, device, variant(ops, name))
        yield Check(f"graph, heads of {dim}, {name}", run, optional=True)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _later(function: Callable, *args) -> Callable[[], None]:
    return lambda: function(*args)


def run(device: torch.device, budget: Budget, workers: int) -> dict:
    """Runs all checks → the verdict: green if something was checked and nothing is wrong."""
    todo = list(checks(operations(device), device))
    found = side_by_side("gate", todo, device, budget, workers) if workers else []
    if not any(x["state"] == "right" for x in found):  # none wanted, or none could start
        found = in_turn(todo, budget, "gate")
    states = {
        state: [x for x in found if x["state"] == state] for state in ("right", "wrong", "refused", "left")
    }
    if not states["right"] and not states["wrong"]:
        states["wrong"] = [{"name": "everything", "why": "nothing was checked in time"}]
    return {
        "gate": "red" if states["wrong"] else "green",
        "checked": sum(x["state"] in ("right", "wrong") for x in found),
        "failures": [f"{x['name']}: {x.get('why', '')}" for x in states["wrong"]],
        "refused": [f"{x['name']}: {x.get('why', '')}" for x in states["refused"]],
        "left": [x["name"] for x in states["left"]],
    }
