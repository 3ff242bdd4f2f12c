"""Attention over pages in Triton, against the definition; without a GPU in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine.kernels import dispatch, reference
from torch import Tensor

pytest.importorskip("triton")
from engine.kernels import attention, libraries  # noqa: E402
from engine.kernels.attention import Config, window_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORST = {torch.float32: 1e-5, torch.float16: 1e-3}  # relative RMS
if DEVICE == "cuda":  # the interpreter multiplies no bfloat16
    WORST[torch.bfloat16] = 5e-3
PLAIN = Config(16, 16, warps=4, stages=1, splits=1)
TMA = replace(PLAIN, tma=True)

# rows of the groups, pages a group, tokens a page, heads, channels, lengths
CASES = {
    "one query": ((1,), 2, 3, 1, 32, None),
    "a page's middle": ((5,), 3, 13, 2, 32, (20,)),
    "commit and window": ((13, 5), 3, 13, 2, 64, (14, 39)),
    "two tiles of queries": ((17, 16), 2, 17, 1, 32, (34, 17)),
    "no rows in one": ((0, 4), 4, 3, 3, 16, (5, 12)),
    "three groups": ((1, 2, 3), 2, 5, 1, 16, (1, 10, 6)),
    "wide heads": ((13,), 2, 13, 3, 128, None),
    "nothing seen": ((2, 3), 1, 5, 1, 16, (0, 4)),
}


def given(rows, pages, n, h, d, lengths, dtype=torch.float32, slots=9, batch=2) -> list:
    """Arguments of window_attention: q inside a bigger tensor, keys and values a layer of a buffer, in each
    group's slots random ones, and NaN in those that nobody lists.
    """
    m = sum(rows)
    q = (
        torch.randn(batch, m, 3 * h * d, device=DEVICE)
        .to(dtype)[..., h * d : 2 * h * d]
        .unflatten(-1, (h, d))
    )
    buffer = torch.randn(3, 2, batch, slots, n, h, d, device=DEVICE).to(dtype)
    listed = torch.stack([torch.randperm(slots, device=DEVICE)[:pages] for _ in rows]).int()
    unlisted = sorted(set(range(slots)) - set(listed.flatten().tolist()))
    buffer[1, :, :, unlisted] = torch.nan
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return [q, *buffer[1], listed, rows, counts]


def definition(q, keys, values, *rest) -> Tensor:
    return reference.window_attention(q.double(), keys.double(), values.double(), *rest)


def off(made: Tensor, true: Tensor) -> float:
    """Root of the mean square difference, as a share of the true one's."""
    assert made.shape == true.shape and made.isfinite().all()
    return ((made.double() - true.double()).norm() / true.double().norm().clamp_min(1e-6)).item()


@pytest.fixture
def poisoned(monkeypatch):
    """Results and workspaces begin as NaN, so nothing can be left unwritten."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *x, **how: _poison(empty(*x, **how)))


def _poison(x: Tensor) -> Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", WORST)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_definition(case, dtype, poisoned):
    parts = given(*case, dtype)
    made = window_attention(*parts)
    assert made.dtype == dtype and made.is_contiguous()
    assert off(made, definition(*parts)) < WORST[dtype]


@pytest.mark.parametrize("dtype", WORST)
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_find_the_same(splits, dtype, poisoned):
    """Four parts of three tiles of keys at most: some parts are empty."""
    parts = given(*CASES["commit and window"], dtype)
    assert off(window_attention(*parts, replace(PLAIN, splits=splits)), definition(*parts)) < WORST[dtype]


@pytest.mark.parametrize("dtype", WORST)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("n, lengths", [(33, None), (33, (40, 66)), (16, (16, 7))])
def test_tiles_of_a_page_find_the_same(n, lengths, splits, dtype, poisoned):
    """The TMA way: 33 tokens a page are two tiles and a token, and what lies behind the page is NaN."""
    parts = given((5, 18), 2, n, 2, 32, lengths, dtype)
    assert off(window_attention(*parts, replace(TMA, splits=splits)), definition(*parts)) < WORST[dtype]


@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (64, 64)])
def test_other_tiles_find_the_same(shape):
    parts = given(*CASES["two tiles of queries"])
    assert off(window_attention(*parts, Config(*shape, 4, 1, 2)), definition(*parts)) < 1e-5


@pytest.mark.parametrize("config", [PLAIN, replace(TMA, block_n=32)])
def test_what_is_not_seen_does_not_matter(config):
    """Neither the numbers of pages beyond the length nor what lies in the rest of its last page."""
    q, keys, values, _, rows, _ = given((3, 4), 3, 33, 1, 16, None)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    pages = torch.tensor([[5, 2, 0], [7, 3, 0]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([20, 50], dtype=torch.int32, device=DEVICE)
    first = window_attention(q, keys, values, pages, rows, lengths, config)
    pages[:, 2] = pages[0, 1] = 10**6
    # Masked keys weigh exactly 0, but 0 · NaN is NaN: tiles by TMA come as they are.
    rest = 1e4 if config.tma else torch.nan
    for buffer in (keys, values):
        buffer[:, 5, 20:] = buffer[:, 3, 17:] = rest
        buffer[:, [0, 1, 2, 4, 6, 8]] = torch.nan
    assert torch.equal(first, window_attention(q, keys, values, pages, rows, lengths, config))


def test_the_order_of_pages_does_not_matter():
    q, keys, values, pages, rows, _ = given((5,), 4, 13, 2, 32, None)
    mixed = pages[:, [2, 0, 3, 1]].contiguous()
    made = [window_attention(q, keys, values, x, rows) for x in (pages, mixed)]
    assert off(*made) < 1e-6


def test_commits_do_not_see_the_window():
    """Not a bit of the first group changes with keys and values that only the second one sees."""
    q, keys, values, _, rows, _ = given((13, 5), 3, 13, 2, 32, None)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    pages = torch.tensor([[4, 2, 0], [2, 4, 7]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([26, 39], dtype=torch.int32, device=DEVICE)
    first = window_attention(q, keys, values, pages, rows, lengths)
    keys[:, 7], values[:, 7] = torch.randn_like(keys[:, 7]), torch.randn_like(values[:, 7])
    again = window_attention(q, keys, values, pages, rows, lengths)
    assert torch.equal(first[:, :13], again[:, :13])
    assert not torch.equal(first[:, 13:], again[:, 13:])


def test_the_definition_sees_differences_of_time_only():
    """Queries and keys turned on by the same angle find the same: a ring needs no new positions."""
    q, keys, values, pages, rows, _ = given((13, 5), 3, 13, 2, 32, None)
    q, keys, values = (x.double() for x in (q, keys, values))
    angle = 5 * torch.randn(16, dtype=torch.float64, device=DEVICE)
    turned = (reference.rotate(x, angle.cos(), angle.sin()) for x in (q, keys))
    later = reference.window_attention(*turned, values, pages, rows)
    assert off(later, reference.window_attention(q, keys, values, pages, rows)) < 1e-12


@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, splits=3)])
def test_the_same_input_gives_the_same_bits(config):
    parts = given(*CASES["commit and window"], torch.float16)
    first, *others = (window_attention(*parts, config) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_no_queries_are_answered_with_nothing():
    parts = given((0, 0), 2, 5, 1, 16, None)
    assert window_attention(*parts).shape == (2, 0, 1, 16)


def test_the_interpreter_takes_bfloat16_too():
    parts = given(*CASES["a page's middle"], torch.bfloat16)
    made = window_attention(*parts)
    assert made.dtype == torch.bfloat16 and off(made, definition(*parts)) < 5e-3


def test_torch_knows_the_operation():
    q, keys, values, pages, rows, lengths = given((2, 3), 2, 5, 1, 16, (3, 10), slots=3)
    parts = (q, keys.nan_to_num(), values.nan_to_num(), pages, list(rows))
    for counts, config in ((None, []), (lengths, [16, 16, 4, 1, 2, 0])):
        torch.library.opcheck(attention.fused, (*parts, counts, config))


def test_it_compiles_into_one_graph():
    parts = given(*CASES["a page's middle"])
    whole = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*parts), window_attention(*parts))


def test_gradients_are_refused_and_not_lost():
    q, *rest = given((2,), 1, 3, 1, 16, None)
    with pytest.raises(ValueError, match="take the definition"):
        window_attention(q.clone().requires_grad_(), *rest)
    with torch.no_grad():
        window_attention(q.clone().requires_grad_(), *rest)


def changed(number: int, change):
    """What replaces one of the arguments."""
    return lambda parts: [change(part) if i == number else part for i, part in enumerate(parts)]


@pytest.mark.parametrize(
    "change, said",
    [
        (changed(0, lambda q: q[..., :12]), "does not fit"),
        (
            lambda p: [p[0][..., :12], p[1][..., :12], p[2][..., :12], *p[3:]],
            "16, 32, 64, 128 channels, not 12",
        ),
        (changed(0, lambda q: q[0]), r"q must be \(b, m, h, d\)"),
        (changed(2, lambda v: v[:, :, :2]), r"q must be \(b, m, h, d\)"),
        (changed(0, lambda q: q[:1]), "does not fit"),
        (lambda p: [x.double() for x in p[:3]] + p[3:], "float16, bfloat16 or float32"),
        (changed(1, lambda k: k.half()), "must all be"),
        (changed(0, lambda q: q.repeat(1, 1, 1, 2)[..., ::2]), "side by side"),
        (changed(1, lambda k: k.transpose(2, 3).contiguous().transpose(2, 3)), "dense"),
        (changed(2, lambda v: v.repeat(1, 2, 1, 1, 1)[:, ::2]), "dense"),
        (changed(3, lambda pages: pages.long()), "pages must be int32"),
        (changed(3, lambda pages: pages[0]), "pages must be int32"),
        (changed(3, lambda pages: pages[:, :0]), "nothing to look at"),
        (changed(4, lambda rows: (2, 2)), "must sum up to the 5 queries"),
        (changed(4, lambda rows: (6, -1)), "must sum up to the 5 queries"),
        (changed(4, lambda rows: (5,)), "pages must be int32"),
        (changed(5, lambda lengths: lengths.long()), "lengths must be int32"),
        (changed(5, lambda lengths: lengths[:1]), "lengths must be int32"),
        (changed(3, lambda pages: pages.to("meta")), "pages is on meta"),
        (lambda p: [*p, TMA], "pages of 16 keys or more"),
    ],
)
def test_what_it_cannot_take_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        window_attention(*change(given((2, 3), 2, 5, 2, 16, (3, 10))))


def test_tma_needs_whole_16_bytes():
    q, *rest = given((2, 3), 2, 17, 2, 16, (3, 10), torch.float16)
    shifted = torch.zeros(q.numel() + 1, dtype=q.dtype, device=DEVICE)[1:].view(q.shape).copy_(q)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        window_attention(shifted, *rest, TMA)
    assert off(window_attention(shifted, *rest), definition(q, *rest)) < 1e-3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"block_m": 8}, "tiles must have"),
        ({"block_n": 48}, "tiles must have"),
        ({"splits": 17}, "1 to 16 parts"),
    ],
)
def test_how_it_cannot_be_cut(change, said):
    with pytest.raises(ValueError, match=said):
        replace(PLAIN, **change)


@pytest.mark.parametrize("table", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_every_shape_has_a_rule(table, dtype):
    for d in attention.HEAD_DIMS:
        for rows, keys, page in ((1, 7, 7), (52, 169, 13), (512, 1088, 64), (23400, 32760, 1560)):
            config = attention.pick(("no such GPU", table), d, dtype, rows, keys, page)
            assert config.block_n <= page or not config.tma
            assert config.block_m == 16 or rows > 16


def test_big_pages_are_read_by_tma_on_hopper():
    configs = [attention.pick(("sm_90",), 64, torch.bfloat16, 4096, 8192, page) for page in (64, 256)]
    assert [config.tma for config in configs] == [False, True]
    with pytest.raises(ValueError, match="no rule"):
        attention.pick(("no such GPU",), 64, torch.bfloat16, 1, 1, 1)


@pytest.mark.parametrize(
    "programs, tiles, parts",
    [
        (8, 3, range(1, 2)),  # the shipped network's window: a second launch costs more than it saves
        (156, 256, range(4, 17)),  # a frame of Wan: two waves, the second nearly empty
        (16, 256, range(8, 9)),  # one wave, once
        (1320, 256, range(1, 2)),  # ten full waves
    ],
)
def test_parts_fill_the_gpu(programs, tiles, parts):
    assert attention.fill(programs, tiles, 132) in parts


def test_a_library_over_pages_is_the_definition():
    q, keys, values, pages, rows, _ = given((3, 4), 2, 5, 3, 32, None)
    made = libraries.over_pages("sdpa", q, keys, values, pages, rows)
    assert torch.allclose(made, reference.window_attention(q, keys, values, pages, rows), atol=1e-5)


def test_tables_may_prefer_a_library(monkeypatch):
    """For many queries, and only where the host knows what is seen."""
    rule = {"head_dim": [32], "dtype": ["float32"], "rows": 4, "provider": "sdpa"}
    read = attention.read_table
    monkeypatch.setattr(attention, "read_table", lambda name: read(name) | {"libraries": [rule]})
    q, keys, values, pages, _, lengths = given((3, 4), 2, 5, 3, 32, (7, 9))
    assert libraries.preferred(q, (3, 4), None) == "sdpa"
    assert libraries.preferred(q, (3, 3), None) is None, "too few"
    assert libraries.preferred(q, (3, 4), lengths) is None
    assert libraries.preferred(q.half(), (3, 4), None) is None
    ran = []
    monkeypatch.setattr(libraries, "over_pages", lambda name, *given: ran.append(name))
    monkeypatch.setattr(dispatch, "takes_triton", lambda *x: True)
    dispatch.window_attention(q, keys, values, pages, (3, 4))
    assert ran == ["sdpa"]
    assert dispatch.window_attention(q, keys, values, pages, (4, 3), lengths).shape == q.shape
