"""Times of each operation and of the same in libraries and compilers, as rows of one table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch

from .. import reference
from .cases import (
    AttentionCase,
    AttentionInput,
    TokenCase,
    attention_cases,
    attention_input,
    projection_input,
    residual_input,
    token_cases,
)
from .checks import rel_rms
from .gate import operations
from .libraries import NAMES, library
from .timing import Budget, Call, Timing, interleaved, limit, sets_for, why

AGREE = 2e-2  # relative RMS between providers in half types; one that differs more is not timed
PATIENCE = 30.0  # seconds that compiling a provider for one shape may take
# cases for FlexAttention, which compiles long for each
FLEX = ("paper window", "one frame 1560 x 32760", "tiny B")


def table(
    device: torch.device, budget: Budget, ceiling: dict[str, float], say: Callable[[str], None]
) -> list[dict]:
    """All rows; a row without a time says why."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work: list[tuple[str, str, Callable[[float], Iterator[dict]]]] = []
    for case in attention_cases(device):
        work.append(("window_attention", case.name, _bind(attention_rows, case, dtype, device, ceiling)))
    for case in token_cases(device):
        for op in ("qknorm_rope_write", "gate_residual_norm_modulate"):
            work.append((op, case.name, _bind(token_rows, op, case, dtype, device, ceiling)))
    rows: list[dict] = []
    for number, (op, shape, measure) in enumerate(work):
        about = {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        if budget.left() <= 0:
            rows.append({**about, "provider": "all", "skipped": "over the time of this section"})
            continue
        say(f"table: {op}, {shape}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # backends explain at length why they cannot run
            try:
                rows += [{**about, **row} for row in measure(budget.left() / (len(work) - number))]
            except Exception as error:
                rows.append({**about, "provider": "all", "skipped": why(error)})
    return rows


def _bind(function: Callable, *args) -> Callable[[float], Iterator[dict]]:
    return lambda seconds: function(*args, seconds)


def attention_rows(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, ceiling: dict[str, float], seconds: float
) -> Iterator[dict]:
    """Rows of attention: TFLOP/s, and as a share of what a matrix product reaches."""
    count = sets_for(case.size * dtype.itemsize, device)
    sets = [attention_input(case, dtype, device, 100 + i) for i in range(count)]
    calls = attention_calls(sets, case, device)
    found: dict[str, Timing | str] = unfit(calls, sets[0])
    if case.name not in FLEX:
        found["flex"] = "compiled for a few shapes only"
    timed = {name: call for name, call in calls.items() if name not in found}
    found |= interleaved(timed, device, seconds / 2, count)
    for name in (*calls, *(set(found) - set(calls))):
        yield row(name, found[name], case.flops / 1e9, "tflops", ceiling["tflops"])


def attention_calls(sets: list[AttentionInput], case: AttentionCase, device: torch.device) -> dict[str, Call]:
    """Name of a provider → a call to time. Libraries are called once for each group, with contiguous keys."""
    ops = operations(device)
    own = "triton" if hasattr(ops, "attention") else "definition"
    calls: dict[str, Call] = {own: lambda i: ops.window_attention(*sets[i].all())}
    names = [name for name in NAMES if name != "flex" or case.name in FLEX]
    for name in names if device.type == "cuda" else [*names, "sdpa"]:
        calls[name] = _library_call(name, sets)
    return calls


def _library_call(name: str, sets: list[AttentionInput]) -> Call:
    attend = None
    parts = []
    for given in sets:
        q = given.q.split(given.rows, 1)
        full = given.pages.shape[1] * given.keys.shape[2]
        lengths = given.lengths.tolist() if given.lengths is not None else [full] * len(q)
        seen = [[x.flatten(1, 2)[:, :length] for x in (given.keys, given.values)] for length in lengths]
        parts.append([(queries, *buffers) for queries, buffers in zip(q, seen, strict=True)])

    def call(i: int) -> list[torch.Tensor]:
        nonlocal attend
        attend = attend or library(name)
        return [attend(*part) for part in parts[i]]

    return call


def unfit(calls: dict[str, Call], given: AttentionInput) -> dict[str, str]:
    """Providers that cannot be timed → why: they raise, compile for too long, or differ from the first one's
    result.
    """
    first, found = None, {}
    for name, call in calls.items():
        try:
            with limit(PATIENCE):
                made = call(0)
        except Exception as error:
            found[name] = why(error)
            continue
        made = made if isinstance(made, torch.Tensor) else torch.cat(made, 1)
        first = made if first is None else first
        if not rel_rms(made, first) <= AGREE:
            found[name] = f"its result differs by {rel_rms(made, first):.2g}"
    return found


def token_rows(
    op: str,
    case: TokenCase,
    dtype: torch.dtype,
    device: torch.device,
    ceiling: dict[str, float],
    seconds: float,
) -> Iterator[dict]:
    """Rows of operations on tokens: GB/s of what must be read and written, and as a share of what a copy
    reaches.
    """
    moved = (6 if op == "qknorm_rope_write" else 4) * case.size * dtype.itemsize
    count = sets_for(moved, device)
    make = projection_input if op == "qknorm_rope_write" else residual_input
    inputs = [make(case, dtype, device, 200 + i) for i in range(count)]
    sets = [x if isinstance(x, list) else x.all() for x in inputs]
    ops, defined = operations(device), getattr(reference, op)
    calls: dict[str, Call] = {}
    if hasattr(ops, "attention"):
        calls["triton"] = lambda i: getattr(ops, op)(*sets[i])
    calls["definition"] = lambda i: defined(*sets[i])
    if device.type == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(defined, dynamic=False)
        calls["definition, compiled"] = lambda i: compiled(*sets[i])
    for name, timing in interleaved(calls, device, seconds / 2, count).items():
        yield row(name, timing, moved / 1e6, "gbytes", 1e3 * ceiling["tbytes"])


def row(provider: str, timing: Timing | str, work: float, unit: str, ceiling: float) -> dict:
    """A row; `work`: GFLOP for a rate in TFLOP/s, MB for one in GB/s."""
    if isinstance(timing, str):
        return {"provider": provider, "skipped": timing}
    rate = work / timing.ms
    measured = {"ms": timing.ms, "spread": timing.spread, unit: rate, "share": rate / ceiling}
    return {"provider": provider, **measured, "samples": timing.samples, "graph": timing.graph}
