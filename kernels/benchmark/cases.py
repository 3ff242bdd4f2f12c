"""Shapes that the benchmark checks and times the operations on, and random inputs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionCase:
    """Groups of queries over pages; `groups`: for each, how many queries it has, and how many pages it
    sees.
    """

    name: str
    heads: int
    dim: int
    page: int  # tokens
    groups: tuple[tuple[int, int], ...]
    batch: int = 1

    @property
    def flops(self) -> int:
        """Two products of 2 · queries · keys · channels each."""
        pairs = sum(rows * pages * self.page for rows, pages in self.groups)
        return 4 * self.batch * self.heads * self.dim * pairs

    @property
    def size(self) -> int:
        """Numbers in q, k, v and the result."""
        rows, pages = sum(rows for rows, _ in self.groups), max(pages for _, pages in self.groups)
        return 2 * self.batch * self.heads * self.dim * (rows + pages * self.page)


@dataclass(frozen=True)
class TokenCase:
    """Frames of tokens, as the two operations on single tokens take them."""

    name: str
    frames: int
    tokens: int  # a frame
    heads: int
    dim: int
    together: bool = False  # all heads normalised together, by their root mean square
    batch: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def size(self) -> int:
        """Numbers in one tensor over all tokens."""
        return self.batch * self.frames * self.tokens * self.width


# Wan2.1-1.3B under Rolling Forcing: 1560 tokens a frame, 15 frames of window, 3 of sink, 3 of recent context.
PAPER = 12, 128, 1560
ATTENTION = (
    AttentionCase("paper window", *PAPER, ((15 * 1560, 21),)),
    AttentionCase("paper commit", *PAPER, ((3 * 1560, 21),)),
    AttentionCase("paper commit + window", *PAPER, ((3 * 1560, 21), (15 * 1560, 21))),
    AttentionCase("paper short commit + window", *PAPER, ((3 * 1560, 6), (15 * 1560, 21))),
    AttentionCase("one frame 1560 x 32760", *PAPER, ((1560, 21),)),
    AttentionCase("one frame 985 x 62208", 9, 128, 1296, ((985, 48),)),  # NVIDIA publishes these two
    AttentionCase("one frame 2048 x 62208", 9, 128, 1296, ((2048, 48),)),
    AttentionCase("tiny A", 6, 64, 64, ((512, 17),)),
    AttentionCase("tiny B", 8, 64, 256, ((2048, 17),)),
    AttentionCase("tiny C", 4, 64, 64, ((256, 11),)),
    AttentionCase("shipped model", 4, 64, 13, ((13, 9), (52, 13))),
)
TOKENS = (
    TokenCase("paper", 18, 1560, 12, 128, together=True),
    TokenCase("tiny A", 8, 64, 6, 64),
    TokenCase("tiny B", 8, 256, 8, 64),
    TokenCase("shipped model", 5, 13, 4, 64),
)
TOY_ATTENTION = (
    AttentionCase("toy commit + window", 2, 32, 13, ((13, 3), (26, 4))),
    AttentionCase("toy one frame", 1, 64, 16, ((9, 9),)),
)
TOY_TOKENS = (TokenCase("toy", 3, 13, 4, 32), TokenCase("toy together", 2, 7, 3, 32, together=True))


def attention_cases(device: torch.device) -> tuple[AttentionCase, ...]:
    return ATTENTION if device.type == "cuda" else TOY_ATTENTION


def token_cases(device: torch.device) -> tuple[TokenCase, ...]:
    return TOKENS if device.type == "cuda" else TOY_TOKENS


@dataclass
class AttentionInput:
    """What window_attention takes (reference.py)."""

    q: Tensor
    keys: Tensor
    values: Tensor
    pages: Tensor
    rows: tuple[int, ...]
    lengths: Tensor | None

    def all(self) -> tuple:
        return self.q, self.keys, self.values, self.pages, self.rows, self.lengths


def attention_input(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, seed: int, loose: bool = False
) -> AttentionInput:
    """Random inputs. Each group sees the first slots, in an order of its own, so that libraries can compute
    the same from contiguous keys.

    `loose`: any slots in any order, others filled with large numbers, and lengths that end within a page.
    """
    draw = torch.Generator().manual_seed(seed)
    counts = [pages for _, pages in case.groups]
    slots = max(counts) + (3 if loose else 0)
    of_queries = case.batch, sum(rows for rows, _ in case.groups), case.heads, case.dim
    of_keys = case.batch, slots, case.page, case.heads, case.dim
    q, keys, values = (
        _normal(shape, dtype, device, seed + i) for i, shape in enumerate((of_queries, *2 * (of_keys,)))
    )
    keys *= 2  # sharper than uniform, so that a key that is missed or counted twice shows
    pages = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    lengths = torch.tensor([count * case.page for count in counts], dtype=torch.int32)
    for group, count in enumerate(counts):
        pages[group, :count] = torch.randperm(slots if loose else count, generator=draw)[:count]
        if loose:
            cut = torch.randint(0, case.page, (), generator=draw)
            lengths[group] -= int(cut)
    if loose:
        unseen = sorted(set(range(slots)) - {int(slot) for slot in pages.flatten()})
        for buffer in (keys, values):
            buffer[:, unseen] *= 30
    elif len(set(counts)) == 1:
        lengths = None
    rows = tuple(rows for rows, _ in case.groups)
    return AttentionInput(
        q, keys, values, pages.to(device), rows, None if lengths is None else lengths.to(device)
    )


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=draw, device=device, dtype=dtype)


@dataclass
class ProjectionInput:
    """What qknorm_rope_write takes (reference.py); keys and values are NaN."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    rms: bool

    def functional(self) -> tuple[Tensor, ...]:
        return self.qkv, self.q_weight, self.k_weight, self.cos, self.sin

    def all(self) -> tuple:
        return *self.functional(), self.keys, self.values, self.slots, self.rms


def projection_input(
    case: TokenCase, dtype: torch.dtype, device: torch.device, seed: int, spare: int = 3
) -> ProjectionInput:
    """Random inputs; frames are written to slots in random order, and `spare` slots stay unused."""
    count, draw = case.frames * case.tokens, torch.Generator().manual_seed(seed)
    qkv = _normal((case.batch, count, 3 * case.width), dtype, device, seed) + 0.5
    over = case.width if case.together else case.dim
    weights = (1 + 0.3 * _normal((over,), torch.float32, device, seed + i) for i in (1, 2))
    q_weight, k_weight = (weight.to(dtype) for weight in weights)
    angles = 3 * _normal((count, case.dim // 2), torch.float32, device, seed + 3)
    shape = case.batch, case.frames + spare, case.tokens, case.heads, case.dim
    keys, values = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    slots = torch.randperm(case.frames + spare, generator=draw)[: case.frames].to(device, torch.int32)
    return ProjectionInput(
        qkv, q_weight, k_weight, angles.cos(), angles.sin(), keys, values, slots, case.together
    )


def residual_input(case: TokenCase, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """Random arguments of gate_residual_norm_modulate; gate, scale and shift are parts of one tensor, as in a
    layer.
    """
    shape = case.batch, case.frames, case.tokens, case.width
    x, y = (_normal(shape, dtype, device, seed + i) + 0.5 for i in range(2))
    shared = _normal((case.batch, case.frames, 3 * case.width), dtype, device, seed + 2)
    return [x, y, *shared.chunk(3, -1)]
