"""Norm, rotation and writing to slots in Triton, against the definition; without a GPU in the interpreter."""

from __future__ import annotations

import pytest
import torch
from engine.kernels import reference
from torch import Tensor

triton = pytest.importorskip("triton")
from engine.kernels import rope  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative RMS; the interpreter cuts bfloat16 off instead of rounding it
WORST = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 8e-3}
# (b, frames, tokens a frame, heads, channels a head)
SHAPES = [(1, 1, 1, 1, 8), (2, 3, 5, 3, 16), (1, 2, 13, 4, 64), (2, 1, 7, 12, 32), (1, 1, 3, 5, 128)]


def given(
    shape: tuple[int, ...], dtype: torch.dtype, whole: bool = False, grad: bool = False
) -> list[Tensor]:
    """qkv as it comes from a projection, weights for each head or for all together, cosines and sines."""
    b, t, n, h, d = shape
    qkv = torch.randn(b, t * n, 3 * h * d, device=DEVICE) + 0.3
    weights = [torch.rand(h * d if whole else d, device=DEVICE) + 0.5 for _ in range(2)]
    angle = 7 * torch.randn(t * n, d // 2, device=DEVICE)
    parts = [x.to(dtype).requires_grad_(grad) for x in (qkv, *weights)]
    return [*parts, angle.cos(), angle.sin()]


def off(made: Tensor, true: Tensor) -> float:
    """Root of the mean square difference, as a share of the true one's."""
    assert made.shape == true.shape and made.isfinite().all()
    return ((made.double() - true.double()).norm() / true.double().norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("dtype", WORST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("whole, rms", [(False, False), (True, True), (False, True), (True, False)])
def test_it_is_the_definition(shape, dtype, whole, rms, monkeypatch):
    empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: int, **how) -> Tensor:
        made = empty(x, *size, **how)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)  # nothing is left unwritten
    parts = given(shape, dtype, whole)
    made = rope.qknorm_rope(*parts, rms)
    true = reference.qknorm_rope(*(x.double() for x in parts), rms)
    for name, a, b in zip("qkv", made, true, strict=True):
        assert a.dtype == dtype
        assert off(a, b) < WORST[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_keys_and_values_go_to_their_slots_only(shape, dtype):
    """Into a layer's part of a bigger buffer, slots in any order, all others untouched."""
    b, t, n, h, d = shape
    parts, layers = given(shape, dtype), 3
    buffer = torch.full((layers, 2, b, t + 4, n, h, d), 7.0, device=DEVICE, dtype=dtype)
    slots = torch.randperm(t + 4, device=DEVICE)[:t].int()
    q = rope.qknorm_rope_write(*parts, buffer[1, 0], buffer[1, 1], slots)
    true = reference.qknorm_rope(*(x.double() for x in parts))
    assert off(q, true[0]) < WORST[dtype]
    for which in range(2):
        written = buffer[1, which].index_select(1, slots).flatten(1, 2)
        assert off(written, true[1 + which]) < WORST[dtype]
        buffer[1, which].index_fill_(1, slots.long(), 7.0)
    assert torch.equal(buffer, torch.full_like(buffer, 7.0))


def test_the_definition_writes_what_it_returns():
    b, t, n, h, d = SHAPES[1]
    parts = given(SHAPES[1], torch.float32)
    keys, values = (torch.zeros(b, 9, n, h, d, device=DEVICE) for _ in range(2))
    slots = torch.tensor([8, 2, 5], dtype=torch.int32, device=DEVICE)
    q = reference.qknorm_rope_write(*parts, keys, values, slots)
    true = reference.qknorm_rope(*parts)
    assert torch.equal(q, true[0])
    assert torch.equal(keys[:, slots.long()].flatten(1, 2), true[1])
    assert torch.equal(values[:, slots.long()].flatten(1, 2), true[2])


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("whole, rms", [(False, False), (True, True)])
def test_gradients_are_those_of_the_definition(shape, whole, rms):
    parts = given(shape, torch.float32, whole, grad=True)
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in parts]
    made, true = rope.qknorm_rope(*parts, rms), reference.qknorm_rope(*double, rms)
    up = [torch.randn(x.shape, device=DEVICE) for x in made]
    torch.autograd.backward(made, up)
    torch.autograd.backward(true, [x.double() for x in up])
    for name, a, b in zip(("qkv", "q_weight", "k_weight"), parts, double, strict=False):
        assert off(a.grad, b.grad) < 1e-5, name


@pytest.mark.parametrize("whole, rms", [(False, False), (True, True)])
def test_the_definition_has_right_gradients(whole, rms):
    parts = [x.detach().double() for x in given((1, 2, 2, 2, 8), torch.float32, whole)]
    parts = [x.requires_grad_() for x in parts[:3]] + parts[3:]
    assert torch.autograd.gradcheck(lambda *x: reference.qknorm_rope(*x, rms), parts)


@pytest.mark.slow
def test_torch_knows_the_operations():
    parts = given((1, 2, 3, 2, 8), torch.float32, grad=True)
    torch.library.opcheck(rope.fused, (*parts, False))
    keys, values = (torch.zeros(1, 4, 3, 2, 8, device=DEVICE) for _ in range(2))
    slots = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    plain = [x.detach() for x in parts]
    torch.library.opcheck(rope.fused_write, (*plain, keys, values, slots, False))


@pytest.mark.slow
def test_the_same_input_gives_the_same_bits():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        parts = given((2, 3, 13, 3, 16), torch.float32, grad=True)
        sum(x.square().sum() for x in rope.qknorm_rope(*parts)).backward()
        found.append([x.grad for x in parts[:3]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: [p[0].double(), *p[1:]], "float16, bfloat16 or float32"),
        (lambda p: [p[0][..., :-1], *p[1:]], "qkv must be"),
        (lambda p: [p[0][:0], *p[1:]], "not empty"),
        (lambda p: [p[0], p[1][:3], *p[2:]], "weights must both be"),
        (lambda p: [*p[:3], p[3].double(), p[4]], "float32"),
        (lambda p: [*p[:3], p[3][:, :3], p[4][:, :3]], "heads must have"),
    ],
)
def test_what_it_cannot_take_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        rope.qknorm_rope(*change(given((1, 2, 3, 2, 8), torch.float32)))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda k, v, s: (k, v, s.long()), "int32"),
        (lambda k, v, s: (k, v, s[:1]), "do not take 6 tokens"),
        (lambda k, v, s: (k[..., ::2], v, s), "keys must be"),
        (lambda k, v, s: (k.transpose(1, 2).contiguous().transpose(1, 2), v, s), "densely"),
        (lambda k, v, s: (k, v.half(), s), "of one shape and type"),
    ],
)
def test_buffers_it_cannot_write_to_are_refused(change, said):
    keys, values = (torch.zeros(1, 4, 3, 2, 8, device=DEVICE) for _ in range(2))
    slots = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=said):
        rope.qknorm_rope_write(*given((1, 2, 3, 2, 8), torch.float32), *change(keys, values, slots))


def test_gradients_are_never_lost_silently():
    keys, values = (torch.zeros(1, 4, 3, 2, 8, device=DEVICE) for _ in range(2))
    slots = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    parts = given((1, 2, 3, 2, 8), torch.float32, grad=True)
    with pytest.raises(ValueError, match="has no gradients"):
        rope.qknorm_rope_write(*parts, keys, values, slots)
    with torch.no_grad():
        rope.qknorm_rope_write(*parts, keys, values, slots)
