"""Residual, gate, norm and modulation in Triton, against the definition; without a GPU in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.kernels import dispatch, reference
from torch import Tensor

triton = pytest.importorskip("triton")
from engine.kernels import norm  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORST = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative RMS
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 12), (1, 2, 17, 64), (2, 1, 13, 96), (1, 1, 33, 300)]


def given(shape: tuple[int, ...], dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    """x, y, and gate, scale and shift as they lie in a layer's modulation: side by side."""
    b, t, n, d = shape
    x, y = (torch.randn(shape, device=DEVICE) + 0.5 for _ in range(2))
    parts = torch.randn(b, t, 3 * d, device=DEVICE).to(dtype).chunk(3, -1)
    return [z.to(dtype).detach().requires_grad_(grad) for z in (x, y)] + [
        z.detach().requires_grad_(grad) for z in parts
    ]


def off(made: Tensor, true: Tensor) -> float:
    """Root of the mean square difference, as a share of the true one's."""
    assert made.shape == true.shape and made.isfinite().all()
    return ((made.double() - true.double()).norm() / true.double().norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("dtype", WORST)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape, dtype, monkeypatch):
    empty = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *x, **how: empty(*x, **how).fill_(float("nan"))
    )  # nothing is left unwritten
    parts = given(shape, dtype)
    made = norm.gate_residual_norm_modulate(*parts)
    true = reference.gate_residual_norm_modulate(*(x.double() for x in parts))
    for a, b in zip(made, true, strict=True):
        assert a.dtype == dtype
        assert off(a, b) < WORST[dtype]


def test_types_may_differ_as_under_autocast():
    """A residual in float32, what is added and the modulation in bfloat16."""
    x, *rest = given((2, 2, 5, 24), torch.bfloat16)
    parts = [x.float().requires_grad_(), *(part.requires_grad_() for part in rest)]
    made = norm.gate_residual_norm_modulate(*parts)
    true = reference.gate_residual_norm_modulate(*(part.double() for part in parts))
    assert all(a.dtype == torch.float32 and off(a, b) < 1e-5 for a, b in zip(made, true, strict=True))
    sum(a.square().sum() for a in made).backward()
    assert all(part.grad.dtype == part.dtype and part.grad.isfinite().all() for part in parts)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gradients_are_those_of_the_definition(shape):
    parts = given(shape, torch.float32, grad=True)
    double = [x.detach().double().requires_grad_() for x in parts]
    made = norm.gate_residual_norm_modulate(*parts)
    true = reference.gate_residual_norm_modulate(*double)
    up = [torch.randn(shape, device=DEVICE) for _ in made]
    torch.autograd.backward(made, up)
    torch.autograd.backward(true, [x.double() for x in up])
    for name, a, b in zip(("x", "y", "gate", "scale", "shift"), parts, double, strict=True):
        assert off(a.grad, b.grad) < 1e-5, name


def test_the_definition_has_right_gradients():
    parts = [torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), *(torch.randn(1, 2, 4) for _ in range(3))]
    parts = [x.double().requires_grad_() for x in parts]
    assert torch.autograd.gradcheck(reference.gate_residual_norm_modulate, parts)


def test_what_runs_can_be_chosen(monkeypatch):
    parts, ran = given((1, 2, 3, 8), torch.float32), []
    monkeypatch.setattr(norm, "gate_residual_norm_modulate", lambda *x: ran.append("triton"))
    monkeypatch.setattr(dispatch, "defined_gate", lambda *x: ran.append("reference"))
    for name in dispatch.CHOICES:
        with dispatch.use(name):
            dispatch.gate_residual_norm_modulate(*parts)
    assert ran == ["triton" if DEVICE == "cuda" else "reference", "reference", "triton"]
    with pytest.raises(ValueError, match="must be one of auto, reference, triton"), dispatch.use("fast"):
        pass


@pytest.mark.parametrize(
    "dtype, head_dim, taken", [("float32", 64, True), ("float64", 64, False), ("bfloat16", 24, False)]
)
def test_what_kernels_cannot_do_is_left_to_the_definitions(dtype, head_dim, taken):
    x = SimpleNamespace(is_cuda=True, dtype=getattr(torch, dtype))
    assert dispatch.takes_triton(x, head_dim) == taken
    with dispatch.use("triton"):
        assert dispatch.takes_triton(x, head_dim), "who asks for it is told why it cannot be"
    with dispatch.use("reference"):
        assert not dispatch.takes_triton(x, head_dim)


def test_one_result_alone_has_gradients_too():
    for which in (0, 1):
        parts = given((1, 2, 3, 8), torch.float32, grad=True)
        double = [x.detach().double().requires_grad_() for x in parts]
        norm.gate_residual_norm_modulate(*parts)[which].square().sum().backward()
        reference.gate_residual_norm_modulate(*double)[which].square().sum().backward()
        assert off(parts[1].grad, double[1].grad) < 1e-5


def test_torch_knows_the_operation():
    parts = given((1, 2, 3, 8), torch.float32, grad=True)
    torch.library.opcheck(norm.fused, parts)


def test_the_same_input_gives_the_same_bits():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        parts = given((1, 2, 40, 24), torch.float32, grad=True)
        sum(x.square().sum() for x in norm.gate_residual_norm_modulate(*parts)).backward()
        found.append([x.grad for x in parts])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p[:1] + [p[1][:, :1]] + p[2:], "must both be"),
        (lambda p: p[:2] + [p[2][..., :4]] + p[3:], "gate must be"),
        (lambda p: [p[0].double(), p[1].double()] + p[2:], "float16, bfloat16 or float32"),
        (lambda p: [p[0][:, :, :0], p[1][:, :, :0]] + p[2:], "must be some"),
    ],
)
def test_what_it_cannot_take_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        norm.gate_residual_norm_modulate(*change(given((1, 2, 3, 8), torch.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_it_compiles_for_gpus_without_spilling(arch):
    """To machine code by the wheel's compiler, in a process of its own: the interpreter replaces it here."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_gate.py")
    run = subprocess.run([sys.executable, program, str(arch)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
