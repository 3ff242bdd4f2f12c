"""A step can be captured: the host decides nothing in it, and on a GPU the graph is the game."""

from __future__ import annotations

import pytest
import torch
from test_rollout import SHAPE, close, context, game, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from engine.rollout import Rollout
from engine.session import Player, Session
from engine.window import bind

READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select")  # wait for a device


class Watch(TorchDispatchMode):
    """Notes each operation with all that is no tensor: what a captured step would repeat for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        fixed = torch.utils._pytree.tree_map(lambda x: x.shape if isinstance(x, torch.Tensor) else x, args)
        self.seen.append((str(function), str(fixed)))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("stale", [False, True])
def test_every_step_is_the_same_to_the_host(stale):
    """The same operations with the same numbers, whichever frame it is, and nothing is read back. Frame, ring
    and lists move on the device, as a graph that is replayed has nobody to tell it.
    """
    pytest.importorskip("triton")
    from engine.kernels import use

    latents, before, played, seed = game(batch=1, frames=9)
    rollout, steps = Rollout(tiny(), 1), []
    rollout.reset(latents, before, seed)
    with use("triton"):  # the definition of attention reads lengths on the host
        rollout.step(played[0], stale)
        for action in played[1:]:
            with Watch() as watch:
                rollout.step(action, stale)
            steps.append(watch.seen)
    assert len(steps[0]) > 100
    assert all(step == steps[0] for step in steps[1:])
    assert not [name for name, _ in steps[0] if name.startswith(READS)]


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_model_can_be_traced_whole(kernels):
    """One graph without a break, through the definitions and through Triton's operations: training's
    `compile=true`, and whoever wants to look at it or carry it elsewhere.
    """
    pytest.importorskip("triton")
    from engine.kernels import use

    denoiser, (latents, actions, _, _) = tiny(), game(start=5)
    memory = context(denoiser, latents, actions)
    sigma = torch.tensor([[0.5, 0.8, 1.0]]).expand(2, 3)
    given = torch.randn(2, 3, *SHAPE), sigma, *bind(torch.eye(3).expand(2, 3, 3), 0), 5, memory
    with use(kernels):
        torch.compiler.reset()
        traced = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
        assert close(traced(*given), denoiser(*given))


@torch.no_grad()
def test_all_state_of_a_game_stays_where_it_is():
    latents, before, played, seed = game(batch=1)
    rollout = Rollout(tiny(), 1)
    rollout.reset(latents, before, seed)

    def places() -> dict[str, int]:
        owners = {"rollout": rollout, "cache": rollout.cache, "window": rollout.window}
        return {
            f"{name}.{key}": value.data_ptr()
            for name, owner in owners.items()
            for key, value in vars(owner).items()
            if isinstance(value, torch.Tensor)
        }

    first = places()
    for action in played:
        rollout.step(action)
    rollout.reset(latents, before, seed)
    assert places() == first and len(first) > 12


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_graph_is_the_eager_step(tiny_checkpoint, precision):
    """Two games under keys that change and keys that stay; the host waits for the picture only."""
    import numpy as np

    player = Player(tiny_checkpoint, "cuda", precision)
    sessions = [Session(player, graph=graph) for graph in (True, False)]
    random = np.random.default_rng(0)
    shape = (sessions[0].rollout.start_frames, player.world.height, player.world.width, 3)
    frames = random.integers(0, 256, shape).astype(np.uint8)
    for seed in range(2):
        for session in sessions:
            session.reset(seed, frames)
        for step in range(20):
            if step % 3 == 0:
                action = (random.random(len(player.world.keys)) < 0.5).astype(np.float32)
            made, expected = (session.step(action) for session in sessions)
            assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1, (seed, step)
    torch.cuda.set_sync_debug_mode("error")  # waiting for an event is allowed, for anything else is not
    try:
        for _ in range(5):
            sessions[0].step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
