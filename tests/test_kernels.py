"""Each reference operation against its formula, written out here in double precision."""

from __future__ import annotations

import pytest
import torch
from engine.kernels.reference import masked_attention, modulated_norm, qknorm_rope, rotate, window_attention
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
    made, expected = masked_attention(*parts.values(), mask), true_attention(*double.values(), mask)
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
        alone = masked_attention(q.requires_grad_(grad), k[:, :, kept], v[:, :, kept])
        assert torch.allclose(masked_attention(q, k, v, mask), alone, atol=1e-6)


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
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_qknorm_rope(dtype, whole, rms):
    """Each head normalised by itself, or all three together; with the mean taken out, or left in."""
    qkv, angle = 0.3 + randn(2, 7, 3 * 3 * 20, dtype=dtype), 5 * torch.randn(7, 10)
    weights = [randn(60 if whole else 20) for _ in range(2)]
    made = qknorm_rope(qkv, *weights, angle.cos(), angle.sin(), rms)
    parts = qkv.double().unflatten(-1, (3, 3, 20)).unbind(2)
    for x, out, weight in zip(parts, made, weights, strict=False):
        x = x.flatten(2) if whole else x
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        normal = (x * scale if rms else true_norm(x)) * weight.to(dtype).double()
        expected = true_rotate(normal.unflatten(2, (3, 20)) if whole else normal, angle[:, None])
        check(out, expected, dtype)
    assert torch.equal(made[2].double(), parts[2]), "values are as they were"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_window_attention(dtype):
    """Two groups of rows, each over its own pages, the second with a list that ends within a page."""
    q, keys, values = (randn(2, *size, 3, 12, dtype=dtype) for size in ((7,), (6, 5), (6, 5)))
    pages = torch.tensor([[4, 0, 2], [1, 5, 4]], dtype=torch.int32)
    made = window_attention(q, keys, values, pages, (3, 4), torch.tensor([15, 11], dtype=torch.int32))
    for rows, group, length in ((slice(3), 0, 15), (slice(3, 7), 1, 11)):
        k, v = (
            torch.stack([x[:, int(pages[group, i // 5]), i % 5] for i in range(length)], 2)
            for x in (keys, values)
        )  # (b, h, m, d)
        expected = true_attention(q[:, rows].transpose(1, 2), k, v, None)
        check(made[:, rows], expected.transpose(1, 2), dtype)


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
