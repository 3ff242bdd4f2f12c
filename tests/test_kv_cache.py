"""The cache holds the sink for ever, the recent frames in turn, and takes no memory once it is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from engine.kv_cache import Context, KVCache, Written

LAYERS, HEADS, DIM, TOKENS, SINK, RECENT, WINDOW, BATCH = 2, 3, 4, 2, 2, 3, 2, 2


def make() -> KVCache:
    sizes = {"layers": LAYERS, "heads": HEADS, "head_dim": DIM, "tokens": TOKENS}
    return KVCache(
        **sizes, sink=SINK, recent=RECENT, window=WINDOW, batch=BATCH, device="cpu", dtype=torch.float32
    )


def keys(*frames: int, layer: int = 0) -> Tensor:
    """Keys (b, h, frames · tokens, d) in which a frame's number stands, and the layer's behind the comma."""
    numbers = torch.tensor(frames).repeat_interleave(TOKENS)
    return (numbers + layer / 10).float()[:, None].expand(BATCH, HEADS, -1, DIM).clone()


def filled(count: int = SINK + RECENT) -> KVCache:
    cache = make()
    for layer in range(LAYERS):
        k = keys(*range(count), layer=layer)
        cache.fill(layer, k, -k)
    return cache


def commit(cache: KVCache) -> None:
    frame = cache.frames
    cache.look(sink=False)
    for layer in range(LAYERS):
        k = keys(frame, layer=layer)
        cache.extend(layer, k, -k)
    cache.push()


def seen(cache: KVCache, layer: int, sink: bool, *own: int) -> list[float]:
    """The frames that a pass over the frames `own` sees, in the buffer's order."""
    cache.look(sink=sink)
    new = keys(*own, layer=layer)
    k, v = cache.extend(layer, new, -new)
    assert k.shape == v.shape == (BATCH, HEADS, k.shape[2], DIM) and torch.equal(v, -k)
    assert (k == k[:1, :1, :, :1]).all(), "one number all over a token"
    pairs = k[0, 0, :, 0].unflatten(0, (-1, TOKENS))
    assert (pairs == pairs[:, :1]).all(), "a frame's tokens stay together"
    return [round(float(x) - layer / 10, 4) for x in pairs[:, 0]]


@pytest.mark.parametrize("count", [SINK + RECENT, SINK + RECENT + 1, 11])
def test_fill_keeps_the_first_and_the_last(count):
    cache = filled(count)
    for layer in range(LAYERS):
        found = seen(cache, layer, True, 100)
        assert found[:SINK] == [0, 1] and found[-1] == 100
        assert sorted(found[SINK:-1]) == [count - 3, count - 2, count - 1]
    assert cache.frames == count


def test_fill_refuses_too_few_frames():
    with pytest.raises(ValueError, match="5 frames or more, not 4"):
        filled(SINK + RECENT - 1)


def test_ring_forgets_the_oldest_and_the_sink_stays():
    cache = filled()
    for _ in range(200):
        commit(cache)
        newest = cache.frames - 1
        for layer in range(LAYERS):
            found = seen(cache, layer, True, 1000, 1001)
            assert found[:SINK] == [0, 1] and found[-2:] == [1000, 1001]
            assert sorted(found[SINK:-2]) == [newest - 2, newest - 1, newest]
            without = seen(cache, layer, False, 1000)
            assert without == [*found[SINK:-2], 1000], "a commit does not see the sink"
            slots = [int(frame) % RECENT for frame in found[SINK:-2]]
            assert slots == [0, 1, 2], "a frame's place in the ring is its number modulo the ring"
    assert cache.frames == 205


def test_window_before_the_commit_leaves_no_trace():
    """Keys of unfinished frames lie behind the ring and are seen by their own pass only."""
    cache = filled()
    seen(cache, 0, True, 77, 78)
    assert seen(cache, 0, True, 5)[SINK:] == [3, 4, 2, 5]
    commit(cache)
    assert sorted(seen(cache, 0, False, 6)) == [3, 4, 5, 6]


def test_nothing_unwritten_is_seen():
    cache = make()
    cache.buffer.fill_(torch.nan)
    cache.anchor.fill_(torch.nan)
    for layer in range(LAYERS):
        k = keys(*range(SINK + RECENT), layer=layer)
        cache.fill(layer, k, -k)
    cache.place_sink(lambda k: k)
    for _ in range(5):
        assert all(frame == frame for frame in seen(cache, 1, True, 9, 10))
        commit(cache)
        assert all(frame == frame for frame in seen(cache, 1, False, 9))


def test_sink_is_placed_anew_from_where_it_was_made():
    cache = filled()
    for frames in (1, 50, 7):
        cache.place_sink(lambda k, frames=frames: k + frames)
        for layer in range(LAYERS):
            k, v = cache.extend(layer, keys(0), keys(0))
            assert torch.allclose(
                k[0, 0, : SINK * TOKENS : TOKENS, 0], torch.tensor([0.0, 1]) + frames + layer / 10
            )
            assert torch.allclose(v[0, 0, : SINK * TOKENS : TOKENS, 0], -torch.tensor([0.0, 1]) - layer / 10)
            assert sorted(k[0, 0, SINK * TOKENS : -TOKENS : TOKENS, 0].round().tolist()) == [2, 3, 4]


def test_reset_forgets_all():
    cache, fresh = filled(9), filled()
    commit(cache)
    seen(cache, 0, True, 50, 51)
    cache.reset()
    assert cache.frames == 0 and not cache.buffer.any()
    for layer in range(LAYERS):
        k = keys(*range(SINK + RECENT), layer=layer)
        cache.fill(layer, k, -k)
    for _ in range(4):
        commit(cache)
        commit(fresh)
        for layer in range(LAYERS):
            assert seen(cache, layer, True, 7, 8) == seen(fresh, layer, True, 7, 8)


def test_steps_take_no_memory():
    cache = filled()
    parts = [(keys(1000, layer=layer), layer) for layer in range(LAYERS)]
    place, size = cache.buffer.data_ptr(), cache.buffer.nbytes

    def step(number: int) -> None:
        cache.look(sink=number % 2 == 0)
        for k, layer in parts:
            own, _ = cache.extend(layer, k, k)
            assert own.untyped_storage().data_ptr() == place, "a view, not a copy"
        cache.push()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        for number in range(10):
            step(number)
    assert len(list(watch.events())) > 100
    assert not [event.name for event in watch.events() if event.cpu_memory_usage > 0]
    for number in range(200):
        step(number)
    assert (cache.buffer.data_ptr(), cache.buffer.nbytes) == (place, size)


def test_gradients_pass_and_leave_the_buffer_alone():
    cache = filled()
    new = keys(60, 61)
    k, v = (x.clone() for x in cache.extend(0, new, -new))
    cache.buffer[..., (SINK + RECENT) * TOKENS :, :] = 5.0
    before = cache.buffer.clone()
    learnt = new.clone().requires_grad_()
    k_grad, v_grad = cache.extend(0, learnt, -learnt)
    assert torch.equal(k_grad, k) and torch.equal(v_grad, v) and torch.equal(cache.buffer, before)
    cache.place_sink(lambda x: x + 1)  # the next step's writes must not spoil this one's backward pass
    (k_grad.sum() - v_grad.sum()).backward()
    assert (learnt.grad == 2).all()


def test_written_keeps_and_context_joins():
    written = Written()
    for layer in range(LAYERS):
        k, v = written.extend(layer, keys(0, 1, layer=layer), keys(2, 3, layer=layer))
        assert torch.equal(k, keys(0, 1, layer=layer)) and torch.equal(v, keys(2, 3, layer=layer))
    context = Context(written.layers, torch.zeros(BATCH, 2, 2, 3, 4), torch.zeros(BATCH, 4, 1))
    for layer in range(LAYERS):
        k, v = context.extend(layer, keys(4, layer=layer), keys(5, layer=layer))
        assert torch.equal(k, keys(0, 1, 4, layer=layer)) and torch.equal(v, keys(2, 3, 5, layer=layer))
    assert written.layers[0][0].shape[2] == 2 * TOKENS, "a context does not grow what it looks at"
