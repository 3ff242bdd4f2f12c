"""The Triton kernels of rope.py. A program has some heads of one token, or all if they are normalised
together.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalised(X, WEIGHT, head, pair, inside, eps, D: tl.constexpr, OVER: tl.constexpr, RMS: tl.constexpr):
    """One token's q or k, X (h · d,), normalised: both halves of its heads (H, HALF), float32, and 1 /
    standard deviation.

    OVER: how many numbers are normalised together: D, those of a head, or all.
    """
    at = head * D + pair
    a = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        mean = tl.sum(a, 1)[:, None] * 0.0
    else:
        mean = tl.sum(a + b, 1)[:, None]
        if OVER != D:
            mean = mean * 0.0 + tl.sum(mean)
        mean = mean / OVER
    a = tl.where(inside, a - mean, 0.0)
    b = tl.where(inside, b - mean, 0.0)
    square = tl.sum(a * a + b * b, 1)[:, None]
    if OVER != D:
        square = square * 0.0 + tl.sum(square)
    rstd = 1 / tl.sqrt(square / OVER + eps)
    place = at % OVER
    u = tl.load(WEIGHT + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(WEIGHT + place + D // 2, mask=inside, other=0.0).to(tl.float32)
    return a * rstd, b * rstd, u, w, rstd


@triton.jit
def forward_kernel(
    QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, SLOTS, Q, K, V,
    tokens, page, stride_batch, stride_token, stride_k, stride_v, eps,
    heads: tl.constexpr, D: tl.constexpr, OVER: tl.constexpr, RMS: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """QKV rows (3 h d) at strides; COS, SIN (tokens, D / 2); Q (b, tokens, h d) contiguous; K, V (b, s, page,
    h d) with contiguous slots, `stride_k` and `stride_v` a game. Token i of a game goes to place i % page of
    slot SLOTS[i // page].
    """
    token, group, game = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = group * H + tl.arange(0, H)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < D // 2)
    at = head * D + pair
    cos = tl.load(COS + token * (D // 2) + pair, mask=pair < D // 2, other=0.0)
    sin = tl.load(SIN + token * (D // 2) + pair, mask=pair < D // 2, other=0.0)
    row = QKV + game * stride_batch + token.to(tl.int64) * stride_token
    a, b, u, w, _ = normalised(row, Q_WEIGHT, head, pair, inside, eps, D, OVER, RMS)
    a, b = a * u, b * w
    out = Q + (game * tokens + token) * (heads * D) + at
    kind = Q.dtype.element_ty
    tl.store(out, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(out + D // 2, (a * sin + b * cos).to(kind), mask=inside)
    slot = tl.load(SLOTS + token // page).to(tl.int64) * page + token % page
    a, b, u, w, _ = normalised(row + heads * D, K_WEIGHT, head, pair, inside, eps, D, OVER, RMS)
    a, b = a * u, b * w
    out = K + game * stride_k + slot * (heads * D) + at
    kind = K.dtype.element_ty
    tl.store(out, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(out + D // 2, (a * sin + b * cos).to(kind), mask=inside)
    a = tl.load(row + 2 * heads * D + at, mask=inside)
    b = tl.load(row + 2 * heads * D + at + D // 2, mask=inside)
    out = V + game * stride_v + slot * (heads * D) + at
    tl.store(out, a.to(kind), mask=inside)
    tl.store(out + D // 2, b.to(kind), mask=inside)


@triton.jit
def turned_back(
    X, WEIGHT, GRAD, OUT, head, pair, inside, cos, sin, eps, sum_u, sum_w,
    D: tl.constexpr, OVER: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one token's q or k, X (h · d,), to OUT, and adds those of the weights to the
    sums.
    """
    at = head * D + pair
    p = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
    q = tl.load(GRAD + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    p, q = p * cos + q * sin, q * cos - p * sin  # the inverse rotation
    a, b, u, w, rstd = normalised(X, WEIGHT, head, pair, inside, eps, D, OVER, RMS)
    sum_u += p * a
    sum_w += q * b
    p, q = p * u, q * w
    along = tl.sum(p * a + q * b, 1)[:, None]
    mean = tl.sum(p + q, 1)[:, None]
    if OVER != D:
        along = along * 0.0 + tl.sum(along)
        mean = mean * 0.0 + tl.sum(mean)
    if RMS:
        mean = mean * 0.0
    kind = OUT.dtype.element_ty
    tl.store(OUT + at, (rstd * (p - mean / OVER - a * along / OVER)).to(kind), mask=inside)
    tl.store(OUT + at + D // 2, (rstd * (q - mean / OVER - b * along / OVER)).to(kind), mask=inside)
    return sum_u, sum_w


@triton.jit
def backward_kernel(
    QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, D_Q, D_K, D_V, D_QKV, D_WEIGHTS,
    tokens, stride_batch, stride_token, eps,
    heads: tl.constexpr, D: tl.constexpr, OVER: tl.constexpr, RMS: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of CHUNK tokens; those of the weights summed over these, (games, chunks, 2, h d) float32. No
    atomics: the same input gives the same bits. D_Q, D_K, D_V (b, tokens, h d) and D_QKV contiguous.
    """
    chunk, group, game = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = group * H + tl.arange(0, H)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    fits = (head < heads) & (pair < D // 2)
    at, wide = head * D + pair, heads * D
    q_u = tl.zeros([H, HALF], tl.float32)
    q_w = tl.zeros([H, HALF], tl.float32)
    k_u = tl.zeros([H, HALF], tl.float32)
    k_w = tl.zeros([H, HALF], tl.float32)
    for i in range(CHUNK):
        token = chunk * CHUNK + i
        inside = fits & (token < tokens)
        some = (pair < D // 2) & (token < tokens)
        cos = tl.load(COS + token * (D // 2) + pair, mask=some, other=0.0)
        sin = tl.load(SIN + token * (D // 2) + pair, mask=some, other=0.0)
        row = QKV + game * stride_batch + token.to(tl.int64) * stride_token
        back = (game * tokens + token) * wide
        out = D_QKV + 3 * back
        q_u, q_w = turned_back(
            row, Q_WEIGHT, D_Q + back, out, head, pair, inside, cos, sin, eps, q_u, q_w, D, OVER, RMS
        )
        k_u, k_w = turned_back(
            row + wide, K_WEIGHT, D_K + back, out + wide, head, pair, inside, cos, sin, eps, k_u, k_w,
            D, OVER, RMS,
        )  # fmt: skip
        for half in tl.static_range(2):
            x = tl.load(D_V + back + at + half * (D // 2), mask=inside, other=0.0)
            tl.store(out + 2 * wide + at + half * (D // 2), x.to(D_QKV.dtype.element_ty), mask=inside)
    place = D_WEIGHTS + (game * tl.num_programs(0) + chunk) * 2 * wide + at
    tl.store(place, q_u, mask=fits)
    tl.store(place + D // 2, q_w, mask=fits)
    tl.store(place + wide, k_u, mask=fits)
    tl.store(place + wide + D // 2, k_w, mask=fits)
