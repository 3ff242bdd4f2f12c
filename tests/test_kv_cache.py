"""The cache holds the sink for ever, the recent frames in turn, and its state stays where it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config import DenoiserConfig
from engine.model.kv_cache import KVCache, KVContext, KVRecorder

LAYERS, HEADS, DIM, TOKENS, SINK, RECENT, WINDOW, BATCH = 2, 3, 4, 2, 2, 3, 2, 2


def make() -> KVCache:
    sizes = {"width": HEADS * DIM, "layers": LAYERS, "head_dim": DIM, "ladder": [0.5, 1.0]}
    frames = {"sink_frames": SINK, "context_frames": RECENT, "window_frames": WINDOW}
    config = DenoiserConfig(**sizes, **frames)
    return KVCache(config, TOKENS, BATCH, torch.device("cpu"), torch.float32)


def keys(*frames: int, layer: int = 0) -> Tensor:
    """Keys (b, frames · n, h, d) in which a frame's number stands, and the layer's behind the comma."""
    numbers = torch.tensor(frames).repeat_interleave(TOKENS)
    return (numbers + layer / 10).float()[:, None, None].expand(BATCH, -1, HEADS, DIM).clone()


def fill(cache: KVCache, count: int) -> KVCache:
    for layer in range(LAYERS):
        k = keys(*range(count), layer=layer)
        cache.prefill(layer, k, -k)
    cache.finish_prefill(count)
    return cache


def filled(count: int = SINK + RECENT) -> KVCache:
    return fill(make(), count)


@torch.no_grad()
def seen(cache: KVCache, layer: int, *own: int, pending: bool = True) -> list[list[int]]:
    """The frames that each group of a pass's rows sees, in the order of its pages. The pass writes the
    pending frame, if there is one, and those of the window, numbered `own`.
    """
    first = (int(cache.frame) - 1,) if pending else ()
    cache.plan_pass(len(own), pending)
    slots = cache.kv_slots(layer)
    assert len(slots.slots) == len(first) + len(own) and sum(slots.rows) == TOKENS * len(slots.slots)
    new = keys(*first, *own, layer=layer).unflatten(1, (-1, TOKENS))
    slots.keys[:, slots.slots.long()] = new
    slots.values[:, slots.slots.long()] = -new
    found = []
    for pages, length in zip(slots.pages, slots.lengths, strict=True):
        assert length % TOKENS == 0
        used = pages[: int(length) // TOKENS].long()
        k, v = slots.keys[:, used], slots.values[:, used]
        assert (k == k[:1, :, :1, :1, :1]).all() and torch.equal(v, -k), "one number all over a frame"
        found.append([round(float(x) - layer / 10) for x in k[0, :, 0, 0, 0]])
    return found


@pytest.mark.parametrize("count", [SINK + RECENT, SINK + RECENT + 1, 11])
def test_fill_keeps_the_first_and_the_last(count):
    cache = filled(count)
    for layer in range(LAYERS):
        (found,) = seen(cache, layer, 100, pending=False)
        assert found[RECENT:] == [0, 1, 100]
        assert sorted(found[:RECENT]) == [count - 3, count - 2, count - 1]
    assert cache.frame == count


def test_fill_refuses_too_few_frames():
    with pytest.raises(ValueError, match="5 frames or more, not 4"):
        filled(SINK + RECENT - 1)


def test_ring_forgets_the_oldest_and_the_sink_stays():
    """The committed frame still sees the oldest, which the window no longer does."""
    cache = filled()
    for newest in range(5, 205):
        cache.append()
        for layer in range(LAYERS):
            commit, window = seen(cache, layer, 1000, 1001)
            assert sorted(commit) == list(range(newest - RECENT, newest + 1)), "no sink, no window"
            assert sorted(window[:RECENT]) == list(range(newest - RECENT + 1, newest + 1))
            assert window[RECENT:] == [0, 1, 1000, 1001]
    assert cache.frame == 205


def test_a_frame_may_be_committed_alone():
    cache = filled()
    cache.append()
    (found,) = seen(cache, 0)
    assert sorted(found) == [2, 3, 4, 5]
    (found,) = seen(cache, 0, 77, pending=False)
    assert sorted(found[:RECENT]) == [3, 4, 5] and found[RECENT:] == [0, 1, 77]


def test_what_is_unfinished_leaves_no_trace():
    cache = filled()
    seen(cache, 0, 77, 78, pending=False)
    cache.append()
    commit, window = seen(cache, 0, 5, 6)
    assert sorted(commit) == [2, 3, 4, 5] and sorted(window) == [0, 1, 3, 4, 5, 5, 6]


def test_nothing_unwritten_is_seen():
    cache = make()
    cache.buffer.fill_(torch.nan)
    cache.unrotated_sink.fill_(torch.nan)
    fill(cache, SINK + RECENT)
    cache.place_sink(lambda k: k)
    for _ in range(5):
        cache.append()
        for layer in range(LAYERS):
            seen(cache, layer, 9, 10)  # would find that NaN is no number


def test_sink_is_placed_anew_from_where_it_was_made():
    cache = filled()
    for frames in (10, 50, 70):
        cache.place_sink(lambda k, frames=frames: k + frames)
        cache.plan_pass(1, pending=False)
        with torch.no_grad():
            for layer in range(LAYERS):
                slots = cache.kv_slots(layer)
                sink = slots.pages[0, RECENT : RECENT + SINK].long()
                k, v = slots.keys[:, sink], slots.values[:, sink]
                there = torch.tensor([0.0, 1]) + layer / 10
                assert torch.allclose(k[0, :, 0, 0, 0], there + frames)
                assert torch.allclose(v[0, :, 0, 0, 0], -there)


def test_reset_forgets_all():
    cache, fresh = filled(9), filled()
    cache.append()
    seen(cache, 0, 50, 51)
    cache.reset()
    assert cache.frame == 0
    assert not cache.buffer.any()
    fill(cache, SINK + RECENT)
    for _ in range(4):
        for game in (cache, fresh):
            game.append()
        for layer in range(LAYERS):
            assert seen(cache, layer, 7, 8) == seen(fresh, layer, 7, 8)


def test_all_state_stays_where_it_is():
    """A captured step would go on reading and writing the old places."""
    cache = filled()
    cache.append()
    places = {name: x.data_ptr() for name, x in vars(cache).items() if isinstance(x, Tensor)}
    assert len(places) >= 6
    for _ in range(20):
        cache.append()
        seen(cache, 0, 1, 2)
    cache.place_sink(lambda k: k + 1)
    fill(cache, 7)
    assert places == {name: x.data_ptr() for name, x in vars(cache).items() if isinstance(x, Tensor)}
    cache.plan_pass(2, pending=False)
    with torch.no_grad():
        slots = cache.kv_slots(1)
    assert slots.keys.data_ptr() == cache.buffer[1, 0].data_ptr(), "a view, not a copy"


def test_gradients_pass_and_leave_the_buffer_alone():
    cache = filled()
    cache.plan_pass(2, pending=False)
    assert cache.kv_slots(0) is None, "what is written in place has no gradients"
    before, new = cache.buffer.clone(), keys(60, 61).requires_grad_()
    k, v = cache.extend(0, new, -new)
    assert k.shape == (BATCH, (RECENT + SINK + 2) * TOKENS, HEADS, DIM) and torch.equal(v, -k)
    (found,) = seen(cache, 0, 60, 61, pending=False)
    assert [int(x) for x in k[0, ::TOKENS, 0, 0]] == found
    cache.buffer[:] = 5.0  # the next step's writes must not spoil this one's backward pass
    (k.sum() - v.sum()).backward()
    assert (new.grad == 2).all() and before.isfinite().all()


def test_recorder_keeps_and_context_joins():
    recorder = KVRecorder()
    for layer in range(LAYERS):
        assert recorder.kv_slots(layer) is None
        k, v = recorder.extend(layer, keys(0, 1, layer=layer), keys(2, 3, layer=layer))
        assert torch.equal(k, keys(0, 1, layer=layer)) and torch.equal(v, keys(2, 3, layer=layer))
    context = KVContext(recorder.layers)
    for layer in range(LAYERS):
        assert context.kv_slots(layer) is None
        k, v = context.extend(layer, keys(4, layer=layer), keys(5, layer=layer))
        assert torch.equal(k, keys(0, 1, 4, layer=layer)) and torch.equal(v, keys(2, 3, 5, layer=layer))
    assert recorder.layers[0][0].shape[1] == 2 * TOKENS, "a context does not grow what it looks at"


def test_without_a_sink_only_the_ring_is_seen():
    config = DenoiserConfig(
        width=HEADS * DIM, layers=LAYERS, head_dim=DIM, ladder=[0.5, 1.0], sink_frames=0,
        context_frames=RECENT, window_frames=WINDOW,
    )  # fmt: skip
    cache = fill(KVCache(config, TOKENS, BATCH, torch.device("cpu"), torch.float32), RECENT)
    cache.place_sink(torch.zeros_like)
    for newest in range(3, 12):
        cache.append()
        commit, window = seen(cache, 0, 50, 51)
        assert sorted(commit) == list(range(newest - RECENT, newest + 1))
        assert sorted(window[:RECENT]) == list(range(newest - RECENT + 1, newest + 1))
        assert window[RECENT:] == [50, 51]
