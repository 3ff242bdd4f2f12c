"""Checks of each operation against its definition in double precision.

Outputs are filled with NaN before, so that unwritten numbers are found; the same input must give the same
bits; a replayed CUDA graph must give the eager result, also with other page lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import reference
from .cases import (
    AttentionCase,
    AttentionInput,
    TokenCase,
    attention_input,
    projection_input,
    residual_input,
)

WORST = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # root mean square, relative
SAMPLED = 128  # queries of a long group that are checked
REPEATS = 3


class Wrong(Exception):
    """A result that is not what the definition says."""


@contextmanager
def poisoned() -> Iterator[None]:
    """A context in which uninitialised tensors are filled with NaN."""
    made = {(torch, "empty"): torch.empty, (torch, "empty_like"): torch.empty_like}
    made |= {(Tensor, "new_empty"): Tensor.new_empty}

    def filling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args, **kwargs) -> Tensor:
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

        return fill

    for (owner, name), function in made.items():
        setattr(owner, name, filling(function))
    try:
        yield
    finally:
        for (owner, name), function in made.items():
            if owner is Tensor:
                delattr(Tensor, name)  # it is inherited
            else:
                setattr(owner, name, function)


def rel_rms(made: Tensor, true: Tensor) -> float:
    """Root mean square difference, relative to the root mean square of the true result."""
    return ((made.double() - true.double()).norm() / true.double().norm().clamp_min(1e-6)).item()


def compare(name: str, made: Tensor, true: Tensor, worst: float) -> None:
    if made.shape != true.shape:
        raise Wrong(f"{name} is {tuple(made.shape)} and should be {tuple(true.shape)}")
    missing = int((~made.isfinite()).sum())
    if missing:
        raise Wrong(f"{name}: {missing} of {made.numel()} numbers are not finite")
    found = rel_rms(made, true)
    if not found <= worst:
        raise Wrong(f"{name} is off by {found:.2g}, more than {worst:.2g}")


def check_attention(
    ops, case: AttentionCase, dtype: torch.dtype, device: torch.device, loose: bool, config=None
) -> None:
    given = attention_input(case, dtype, device, 7, loose)
    more = {} if config is None else {"config": config}
    with poisoned():
        made = ops.window_attention(*given.all(), **more)
    if made.dtype != dtype:
        raise Wrong(f"the result is {made.dtype}")
    rows, counts = sampled(given.rows, device)
    compare("attention", made[:, rows], attention_truth(given, rows, counts), WORST[dtype])
    if not made.isfinite().all():
        raise Wrong("a query that was not sampled has a result that is not finite")
    for _ in range(REPEATS):
        same("attention", made, ops.window_attention(*given.all(), **more))


def sampled(rows: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """→ indices of the queries to check, with the first and last of each group, and how many of each
    group.
    """
    found, start = [], 0
    for count in rows:
        few = torch.linspace(0, max(count - 1, 0), min(count, SAMPLED), dtype=torch.float64)
        found.append(start + few.round().long())
        start += count
    return torch.cat(found).to(device), tuple(len(x) for x in found)


def attention_truth(given: AttentionInput, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    wide = (x.double() for x in (given.q[:, rows], given.keys, given.values))
    return reference.window_attention(*wide, given.pages, counts, given.lengths)


def same(name: str, first: Tensor, again: Tensor) -> None:
    if not torch.equal(first, again):
        raise Wrong(f"{name}: the same input gave other bits")


def check_write(ops, case: TokenCase, dtype: torch.dtype, device: torch.device) -> None:
    given = projection_input(case, dtype, device, 11)
    with poisoned():
        q = ops.qknorm_rope_write(*given.all())
    wide = [x.double() for x in (given.qkv, given.q_weight, given.k_weight, given.cos, given.sin)]
    true = reference.qknorm_rope(*wide, given.rms)
    compare("q", q, true[0], WORST[dtype])
    slots = given.slots.long()
    for name, buffer, x in (("k", given.keys, true[1]), ("v", given.values, true[2])):
        compare(name, buffer[:, slots].flatten(1, 2), x, WORST[dtype])
        others = torch.ones(buffer.shape[1], dtype=torch.bool, device=device)
        others[slots] = False
        if not buffer[:, others].isnan().all():
            raise Wrong(f"{name} was written to a slot that is none of the pass's")
    for _ in range(REPEATS):
        keys, values = given.keys.clone(), given.values.clone()
        same("q", q, ops.qknorm_rope_write(*given.all()))
        same("k", keys[:, slots], given.keys[:, slots])
        same("v", values[:, slots], given.values[:, slots])


def check_residual(ops, case: TokenCase, dtype: torch.dtype, device: torch.device) -> None:
    given = residual_input(case, dtype, device, 13)
    with poisoned():
        made = ops.gate_residual_norm_modulate(*given)
    true = reference.gate_residual_norm_modulate(*(x.double() for x in given))
    for name, a, b in zip(("sum", "norm"), made, true, strict=True):
        compare(name, a, b, WORST[dtype])
    for _ in range(REPEATS):
        for name, a, b in zip(("sum", "norm"), made, ops.gate_residual_norm_modulate(*given), strict=True):
            same(name, a, b)


def check_gradients(ops, name: str, case: TokenCase, dtype: torch.dtype, device: torch.device) -> None:
    """Checks gradients of an operation on tokens against the definition's; they may be off by twice as much
    as results.
    """
    if name == "qknorm_rope":
        given = projection_input(case, dtype, device, 17)
        inputs, fixed = [given.qkv, given.q_weight, given.k_weight], (given.cos, given.sin, given.rms)
    else:
        inputs, fixed = residual_input(case, dtype, device, 17), ()
    found = []
    for function, kind in ((getattr(ops, name), dtype), (getattr(reference, name), torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, *fixed)
        pull = [torch.sin(torch.arange(x.numel(), device=device)).view(x.shape).to(dtype) for x in out]
        torch.autograd.backward(out, [x.to(kind) for x in pull])
        found.append([x.grad for x in leaves])
    for number, (a, b) in enumerate(zip(*found, strict=True)):
        compare(f"gradient {number}", a, b, 2 * WORST[dtype])


def check_graph(ops, case: AttentionCase, tokens: TokenCase, device: torch.device, config=None) -> None:
    """All three operations in one graph, replayed on other pages than it was captured with."""
    dtype, more = torch.bfloat16, {} if config is None else {"config": config}
    given, other = (attention_input(case, dtype, device, seed, loose=True) for seed in (19, 23))
    projection, residual = (
        projection_input(tokens, dtype, device, 19),
        residual_input(tokens, dtype, device, 19),
    )

    def work() -> tuple[Tensor, ...]:
        q = ops.qknorm_rope_write(*projection.all())
        return q, *ops.gate_residual_norm_modulate(*residual), ops.window_attention(*given.all(), **more)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    for source in (given, other):
        for name in ("q", "keys", "values", "pages", "lengths"):
            getattr(given, name).copy_(getattr(source, name))
        for x in made:
            x.fill_(float("nan"))
        graph.replay()
        for number, (a, b) in enumerate(zip(made, work(), strict=True)):
            same(f"result {number} of the graph", b, a)
