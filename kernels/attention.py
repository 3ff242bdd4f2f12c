"""window_attention in Triton: groups of queries attend to pages of a layer's buffers (definition:
reference.py).

One launch computes all groups. Each tile of queries belongs to one group, whose pages and number of keys are
read on the device, so that one CUDA graph can play every step. Keys are loaded one by one, so that small
pages waste nothing, or by the tensor memory accelerator (TMA), a tile of one page at a time. If there are too
few tiles of queries to fill the GPU, keys are split into parts, whose results a second kernel merges. The
softmax is computed as in FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import DTYPES, HEAD_DIMS

MOST_SPLITS = 16
LOG2_E = 1.4426950408889634  # exponentials are computed to base 2
MERGED = 16  # rows of the result that one program merges


@dataclass(frozen=True)
class Config:
    """Parameters of the kernel: queries and keys of a tile, warps, pipeline stages, parts into which keys are
    split (0: as many as fill the GPU), and whether to load by TMA. Raises ValueError for others than the
    kernel has.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int = 0
    tma: bool = False

    def __post_init__(self) -> None:
        if not {self.block_m, self.block_n} <= {16, 32, 64, 128, 256}:
            raise ValueError(f"tiles must have 16, 32, 64, 128 or 256 queries and keys, not {self}")
        if not 0 <= self.splits <= MOST_SPLITS:
            raise ValueError(f"there can be 1 to {MOST_SPLITS} parts, 0 to choose, not {self.splits}")


@triton.jit
def find_rows(tile, ROWS, BLOCK_M: tl.constexpr):
    """→ the group that all queries of a tile belong to, the tile's first row, the end of the group's rows."""
    group, start, end, row, first = 0, 0, 0, 0, 0  # row, first: first row and first tile of group i
    for i in tl.static_range(len(ROWS)):
        tiles = (ROWS[i] + BLOCK_M - 1) // BLOCK_M
        here = (tile >= first) & (tile < first + tiles)
        group = tl.where(here, i, group)
        start = tl.where(here, row + (tile - first) * BLOCK_M, start)
        end = tl.where(here, row + ROWS[i], end)
        row += ROWS[i]
        first += tiles
    return group, start, end


@triton.jit
def forward_kernel(
    Q, KEYS, VALUES, PAGES, LENGTHS, OUT, LSE, ROWS,
    m, slots, pages, stride_qb, stride_qm, stride_qh, stride_kb, stride_vb, scale,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Q (b, m, HEADS, D); KEYS, VALUES (b, slots, PAGE, HEADS, D); PAGES (g, pages); LENGTHS (g,) or None;
    ROWS g ints; OUT (SPLITS, b, m, HEADS, D); LSE (SPLITS, b, m, HEADS), the base 2 logarithm of each sum of
    exponentials, None without splits. `scale` includes log2(e).
    """
    head, split = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    b = tl.program_id(2).to(tl.int64)
    group, start, end = find_rows(tl.program_id(0), ROWS, BLOCK_M)
    row = start + tl.arange(0, BLOCK_M)
    at_n, at_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    inside = (row < end)[:, None]
    count = pages * PAGE
    if LENGTHS is not None:
        count = tl.minimum(tl.load(LENGTHS + group), count)
    KEYS += b * stride_kb
    VALUES += b * stride_vb
    Q += b * stride_qb + head * stride_qh
    WIDE: tl.constexpr = HEADS * D
    if TMA:
        # pages are a dimension, so that a page's last tile is filled up with zeros, not with the next page
        of_k = tl.make_tensor_descriptor(KEYS, [slots, PAGE, WIDE], [PAGE * WIDE, WIDE, 1], [1, BLOCK_N, D])
        of_v = tl.make_tensor_descriptor(VALUES, [slots, PAGE, WIDE], [PAGE * WIDE, WIDE, 1], [1, BLOCK_N, D])
        TILES: tl.constexpr = (PAGE + BLOCK_N - 1) // BLOCK_N  # of a page
        tiles = count // PAGE * TILES + (count % PAGE + BLOCK_N - 1) // BLOCK_N
        of_q = tl.make_tensor_descriptor(Q, [m, D], [stride_qm, 1], [BLOCK_M, D])
        q = of_q.load([start, 0])
    else:
        tiles = (count + BLOCK_N - 1) // BLOCK_N
        q = tl.load(Q + row[:, None] * stride_qm + at_d[None, :], mask=inside, other=0.0)
    share = (tiles + SPLITS - 1) // SPLITS
    first = split * share

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the highest score so far
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, D], tl.float32)
    for tile in tl.range(first, tl.minimum(first + share, tiles)):
        if TMA:
            number, inner = tile // TILES, tile % TILES * BLOCK_N
            page = tl.load(PAGES + group * pages + number)
            k = of_k.load([page, inner, head * D]).reshape(BLOCK_N, D)
            v = of_v.load([page, inner, head * D]).reshape(BLOCK_N, D)
            seen = inner + at_n < tl.minimum(PAGE, count - number * PAGE)
        else:
            key = tile * BLOCK_N + at_n
            seen = key < count
            page = tl.load(PAGES + group * pages + key // PAGE, mask=seen, other=0)
            where = (page * PAGE + key % PAGE)[:, None] * WIDE + head * D + at_d[None, :]
            k = tl.load(KEYS + where, mask=seen[:, None], other=0.0)  # (BLOCK_N, D)
            v = tl.load(VALUES + where, mask=seen[:, None], other=0.0)
        score = tl.dot(q, k.T, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))  # finite, as each tile has a key within the length
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        top = higher

    total = tl.where(total > 0, total, 1.0)  # without any key the result is zero, as in the definition
    out = out / total[:, None]
    place = ((split * tl.num_programs(2) + b) * m + row) * HEADS + head
    tl.store(OUT + place[:, None] * D + at_d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
    if LSE is not None:
        tl.store(LSE + place, top + tl.log2(total), mask=row < end)


@triton.jit
def merge_kernel(
    PARTS, LSE, OUT, rows,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PARTS (SPLITS, rows, D) and LSE (SPLITS, rows) → OUT (rows, D), the sum of the parts weighted by their
    shares of all exponentials. The order is fixed, so that the same input gives the same bits.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    at = tl.arange(0, D)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(LSE + i * rows + row, mask=inside, other=0.0))
    top = tl.where(top == float("-inf"), 0.0, top)  # no part has a key
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, D], tl.float32)
    for i in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(LSE + i * rows + row, mask=inside, other=0.0) - top)
        place = (i * rows + row)[:, None] * D + at[None, :]
        out += weight[:, None] * tl.load(PARTS + place, mask=inside[:, None], other=0.0)
        total += weight
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(OUT + row[:, None] * D + at[None, :], out.to(OUT.dtype.element_ty), mask=inside[:, None])


@torch.library.custom_op("rollplay::window_attention", mutates_args=())
def fused(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor,
    rows: list[int], lengths: Tensor | None, config: list[int],
) -> Tensor:  # fmt: skip
    """As window_attention; `config`: the fields of a Config, or empty, so that the tables choose one."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # Triton's interpreter cannot multiply it
        return fused(q.float(), keys.float(), values.float(), pages, rows, lengths, config).to(q.dtype)
    b, m, h, d = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    page, lengths = keys.shape[2], None if lengths is None else lengths.contiguous()
    seen = pages.shape[1] * page
    at = (at * x.itemsize for x in (q, keys, values) for at in x.stride()[:-1])
    fast = 0 if any(x % 16 for x in (*at, q.data_ptr(), keys.data_ptr(), values.data_ptr())) else page
    how = Config(*config) if config else pick(names(q.device), d, q.dtype, max(rows), seen, fast)
    if how.tma and fast < how.block_n:
        raise ValueError(f"TMA needs pages of {how.block_n} keys or more, and all at multiples of 16 bytes")
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    tiles = sum(triton.cdiv(count, how.block_m) for count in rows)
    splits = how.splits or count_splits(tiles * h * b, triton.cdiv(seen, how.block_n), processors)
    parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device) if splits > 1 else out
    lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=q.device) if splits > 1 else None
    if how.tma:  # Triton makes the descriptors in device memory
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=q.device))
    forward_kernel[tiles, h * splits, b](
        q, keys, values, pages.contiguous(), lengths, parts, lse, tuple(rows),
        m, keys.shape[1], pages.shape[1], *q.stride()[:3], keys.stride(0), values.stride(0), LOG2_E * d**-0.5,
        HEADS=h, D=d, PAGE=page, BLOCK_M=how.block_m, BLOCK_N=how.block_n, SPLITS=splits, TMA=bool(how.tma),
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if splits > 1:
        count = b * m * h
        grid = (triton.cdiv(count, MERGED),)
        merge_kernel[grid](parts, lse, out, count, D=d, SPLITS=splits, BLOCK=MERGED, num_warps=4)
    return out


@fused.register_fake
def _(q, keys, values, pages, rows, lengths, config):
    return q.new_empty(q.shape)


def window_attention(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor,
    rows: Sequence[int], lengths: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """window_attention of reference.py, without gradients; `config`: chosen by the tables unless given. Page
    numbers are not checked, and those beyond `lengths` are not read. With TMA, keys and values in a listed
    page beyond `lengths` must be finite. Raises ValueError as `check` does.
    """
    check(q, keys, values, pages, rows, lengths)
    cut = map(int, astuple(config)) if config else ()
    return fused(q, keys, values, pages, list(rows), lengths, list(cut))


def check(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor,
    rows: Sequence[int], lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError for inputs that the kernel cannot take."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values)):
        raise ValueError("no gradients here: take the definition, reference.window_attention, to train")
    if q.ndim != 4 or keys.ndim != 5 or values.shape != keys.shape:
        shapes = tuple(q.shape), tuple(keys.shape), tuple(values.shape)
        raise ValueError(f"q must be (b, m, h, d), keys and values (b, s, n, h, d), not {shapes}")
    b, m, h, d = q.shape
    if (keys.shape[0], *keys.shape[3:]) != (b, h, d) or not keys[:1].numel():
        raise ValueError(f"q {tuple(q.shape)} does not fit keys and values {tuple(keys.shape)}")
    if d not in HEAD_DIMS:
        raise ValueError(f"heads must have {', '.join(map(str, HEAD_DIMS))} channels, not {d}")
    if q.dtype not in DTYPES or not q.dtype == keys.dtype == values.dtype:
        kinds = q.dtype, keys.dtype, values.dtype
        raise ValueError(f"q, keys and values must all be float16, bfloat16 or float32, not {kinds}")
    if sum(rows) != m or min(rows, default=0) < 0:
        raise ValueError(f"rows {tuple(rows)} must sum up to the {m} queries")
    if pages.ndim != 2 or pages.dtype != torch.int32 or pages.shape[0] != len(rows):
        raise ValueError(f"pages must be int32 ({len(rows)}, p), not {pages.dtype} {tuple(pages.shape)}")
    if not pages.shape[1]:
        raise ValueError("nothing to look at: the lists of pages are empty")
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != (len(rows),)):
        raise ValueError(f"lengths must be int32 ({len(rows)},), not {lengths.dtype} {tuple(lengths.shape)}")
    for name, x in (("keys", keys), ("values", values), ("pages", pages), ("lengths", lengths)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}")
    if q.stride(3) != 1:
        raise ValueError(f"the channels of q must lie side by side; its strides are {q.stride()}")
    if not keys[:1].is_contiguous() or not values[:1].is_contiguous():
        strides = keys.stride(), values.stride()
        raise ValueError(f"keys and values must be dense in (s, n, h, d); their strides are {strides}")
    if max(keys[:1].numel(), m * q.stride(1)) >= 2**31:
        raise ValueError("2**31 elements or more in one element of the batch: the kernel counts in int32")


@functools.cache
def pick(tables: tuple, head_dim: int, dtype: torch.dtype, rows: int, keys: int, page: int) -> Config:
    """The config of the first matching rule in the `tables` (names of files, such as sm_90). `rows`: queries
    of the longest group. Raises ValueError without a match.
    """
    case = {"head_dim": head_dim, "dtype": str(dtype).removeprefix("torch.")}
    for rule in (rule for name in tables for rule in read_table(name)["window_attention"]):
        same = all(value in rule.get(key, [value]) for key, value in case.items())
        short = rows <= rule.get("rows", rows) and keys <= rule.get("keys", keys)
        if same and short and page >= rule.get("page", 0):
            return Config(**rule["config"])
    raise ValueError(f"no rule for {case}, {rows} queries, {keys} keys and pages of {page} in {tables}")


@functools.cache
def read_table(name: str) -> dict:
    """The content of kernels/tables/NAME.json; a table without rules if there is no such file."""
    path = Path(__file__).with_name("tables") / f"{name.replace(' ', '_')}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"window_attention": []}


@functools.cache
def names(device: torch.device) -> tuple[str, ...]:
    """Names of the tables for a device, the most specific first. Consumer Blackwell GPUs use sm_80's, as
    their tensor cores and shared memory are like Ampere's.
    """
    if device.type != "cuda":
        return ("cpu",)
    made = torch.cuda.get_device_properties(device)
    return made.name, {9: "sm_90", 10: "sm_100"}.get(made.major, "sm_80")


@functools.cache
def count_splits(programs: int, tiles: int, processors: int) -> int:
    """Into how many parts to split each program's tiles of keys, so that all processors are busy. Estimated
    time of a wave: a part's tiles, and two more for loading queries and for writing and merging; the second
    launch costs four. Of equally fast ones the smallest number.
    """
    parts = range(1, min(MOST_SPLITS, tiles) + 1)
    cdiv = triton.cdiv
    return min(parts, key=lambda n: cdiv(programs * n, processors) * (cdiv(tiles, n) + 2) + 4 * (n > 1))
