"""A step can be captured: the host decides nothing in it, and on a GPU the graph is the game."""

from __future__ import annotations

import pytest
import torch
from games import SHAPE, close, make_denoiser, make_game, make_states, play
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model.kv_cache import KVContext
from engine.model.world_model import Generator
from engine.rollout.player import Player
from engine.rollout.rollout import Rollout
from engine.rollout.session import Session

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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("renoise", [False, True])
def test_every_step_is_the_same_to_the_host(renoise):
    """The same operations with the same numbers, whichever frame it is, and nothing is read back. Frame,
    ring, lists and state move on the device, as a graph that is replayed has nobody to tell it.
    """
    pytest.importorskip("triton")
    from engine.kernels import use

    game, steps = make_game(batch=1, start=2, frames=3), []
    rollout = Rollout(Generator(make_denoiser(True, layers=1, context_frames=1), make_states()), 1)
    rollout.reset(game.latents, game.before, game.seed, game.states)
    with use("triton"):  # the definition of attention reads lengths on the host
        rollout.step(game.played[0], renoise)
        for action in game.played[1:]:
            with Watch() as watch:
                rollout.step(action, renoise)
            steps.append(watch.seen)
    assert len(steps[0]) > 100
    assert steps[0] == steps[1]
    assert not [name for name, _ in steps[0] if name.startswith(READS)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_model_can_be_traced_whole(kernels):
    """One graph without a break, through the definitions and through Triton's operations, for whoever wants
    to look at it or carry it elsewhere.
    """
    pytest.importorskip("triton")
    from engine.kernels import use

    denoiser = make_denoiser(layers=1)
    config = denoiser.config
    past = torch.randn(2, 5 * denoiser.transformer.tokens, config.width // config.head_dim, config.head_dim)
    memory = KVContext([(past, past.flip(0))] * config.layers)
    sigma = torch.tensor([[0.5, 0.8, 1.0]]).expand(2, 3)
    condition = torch.randn(2, 3, config.width)
    given = torch.randn(2, 3, *SHAPE), sigma, torch.randn(2, 1, *SHAPE), condition, 5, memory
    with use(kernels):
        torch.compiler.reset()
        traced = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
        assert close(traced(*given), denoiser(*given))


@torch.no_grad()
def test_all_state_of_a_game_stays_where_it_is():
    game = make_game(batch=1)
    rollout = Rollout(Generator(make_denoiser(True), make_states()), 1)
    rollout.reset(game.latents, game.before, game.seed, game.states)

    def places() -> dict[str, tuple[int, int]]:
        owners = {"rollout": rollout, "cache": rollout.cache, "window": rollout.window}
        owners["carry"] = rollout.carry
        found = {}
        for name, owner in owners.items():
            values = owner._asdict() if name == "carry" else vars(owner)
            found |= {
                f"{name}.{key}": (value.data_ptr(), value.numel())
                for key, value in values.items()
                if isinstance(value, torch.Tensor) and not key.startswith("_")
            }
        return found

    first = places()
    for action in game.played:
        rollout.step(action)
    rollout.reset(game.latents, game.before, game.seed, None)
    play(rollout, game)
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
    states = [{"x": 10.0 * i, "y": 5.0, "angle": 30.0} for i in range(len(frames))]
    for seed in range(2):
        for session in sessions:
            session.reset(seed, frames, states=states)
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
