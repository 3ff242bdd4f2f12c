"""Each reference operation against its formula, written out here in double precision."""

from __future__ import annotations

import pytest
import torch
from engine.kernels.reference import attention, modulated_norm, qk_norm_rope, rotate
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def check(made: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`made` has the wanted type and lies within the type's tolerance of the double precision `expected`."""
    assert made.dtype == dtype and made.shape == expected.shape
    error = (made.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def true_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.double()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def true_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    x = x.double()
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def true_rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, turned by angle i."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angle.double())
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trained", ["q k v", "k v", ""])
def test_attention_and_its_gradients(dtype, masked, trained):
    """Queries that need a gradient take the written-out branch, others the fused one; both are right."""
    parts = {name: randn(2, 3, size, 12, dtype=dtype) for name, size in [("q", 5), ("k", 7), ("v", 7)]}
    mask = torch.where(torch.rand(5, 7) < 0.4, -torch.inf, 0.0).to(dtype) if masked else None
    if masked:
        mask[:, 2] = 0  # every query sees something
    double = {name: x.double().requires_grad_() for name, x in parts.items()}
    for name in trained.split():
        parts[name].requires_grad_()
    made, expected = attention(*parts.values(), mask), true_attention(*double.values(), mask)
    check(made, expected, dtype)
    if trained:
        upstream = randn(*made.shape)
        (made.float() * upstream).sum().backward()
        (expected * upstream).sum().backward()
    for name in trained.split():
        check(parts[name].grad, double[name].grad, dtype)


def test_a_masked_key_has_no_influence():
    q, k, v = randn(1, 1, 3, 8), randn(1, 1, 4, 8), randn(1, 1, 4, 8)
    mask = torch.zeros(3, 4)
    mask[:, 1] = -torch.inf
    kept = [0, 2, 3]
    for grad in (False, True):
        alone = attention(q.requires_grad_(grad), k[:, :, kept], v[:, :, kept])
        assert torch.allclose(attention(q, k, v, mask), alone, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_modulated_norm(dtype):
    x = 3 + 2 * randn(2, 3, 5, 18, dtype=dtype)
    scale, shift = randn(2, 3, 18, dtype=dtype), randn(2, 3, 18, dtype=dtype)
    expected = true_norm(x) * (1 + scale.double()[:, :, None]) + shift.double()[:, :, None]
    check(modulated_norm(x, scale, shift), expected, dtype)


def test_modulated_norm_gradients():
    parts = [randn(2, 3, 5, 18), randn(2, 3, 18), randn(2, 3, 18)]
    double = [x.double().requires_grad_() for x in parts]
    for x in parts:
        x.requires_grad_()
    upstream = randn(2, 3, 5, 18)
    (modulated_norm(*parts) * upstream).sum().backward()
    (upstream * (true_norm(double[0]) * (1 + double[1][:, :, None]) + double[2][:, :, None])).sum().backward()
    for x, d in zip(parts, double, strict=True):
        check(x.grad, d.grad, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_qk_norm_rope(dtype):
    x, weight = randn(2, 7, 3, 20, dtype=dtype), randn(20)
    angle = 5 * torch.randn(7, 10)
    expected = true_rotate(true_norm(x) * weight.to(dtype).double(), angle[:, None])
    check(qk_norm_rope(x, weight, angle.cos(), angle.sin()), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotate(dtype):
    x, angle = randn(2, 5, 14, dtype=dtype), 5 * torch.randn(5, 7)
    check(rotate(x, angle.cos(), angle.sin()), true_rotate(x, angle), dtype)


def test_rotation_is_orthogonal_and_composes():
    x, y = randn(9, 14).double(), randn(9, 14).double()
    a, b = torch.randn(7).double(), torch.randn(7).double()

    def turn(z: Tensor, angle: Tensor) -> Tensor:
        return rotate(z, angle.cos(), angle.sin())

    assert torch.allclose(turn(x, a) @ turn(y, a).T, x @ y.T)
    assert torch.allclose(turn(turn(x, a), b), turn(x, a + b))
    assert torch.allclose(turn(turn(x, a), -a), x)
    assert torch.allclose(turn(x, a + b) @ turn(y, b).T, turn(x, a) @ y.T), "only the difference counts"
    assert not torch.allclose(turn(x, a), x)
