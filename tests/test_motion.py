"""The first guess: nothing moves at first, flows move pictures by what they say, keys are learnt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.autoencoder import Autoencoder
from engine.config import AutoencoderConfig
from engine.motion import FLOW_UNIT, LOG_DOUBT, Bounded, Motion

KEYS, CHANNELS, AHEAD, MOMENTUM = 2, 2, 3, 2
ROWS, COLUMNS = 6, 12


def make(scramble: float = 0.0, **changes) -> Motion:
    torch.manual_seed(0)
    sizes = {"ahead": AHEAD, "momentum": MOMENTUM, "width": 16, "layers": 2, **changes}
    motion = Motion(KEYS, CHANNELS, **sizes)
    with torch.no_grad():
        for parameter in motion.parameters():
            parameter.add_(scramble * torch.randn_like(parameter))
    return motion


def given(batch: int = 3, t: int = AHEAD) -> tuple[Tensor, Tensor, Tensor]:
    """Last frames, their actions, the coming ones'."""
    held = (torch.rand(batch, MOMENTUM, KEYS) < 0.5).float()
    return torch.randn(batch, 2, CHANNELS, ROWS, COLUMNS), held, (torch.rand(batch, t, KEYS) < 0.5).float()


@pytest.mark.parametrize("t", [1, AHEAD])
def test_nothing_moves_at_first(t):
    last, held, actions = given(t=t)
    guess = make()(last, held, actions)
    assert guess.mean.dtype == torch.float32 and not guess.mean.requires_grad
    assert guess.doubt.shape == guess.mean.shape and guess.doubt.std() < 1e-6
    assert torch.allclose(guess.mean, last[:, 1:].expand(-1, t, -1, -1, -1), atol=1e-5)


@pytest.mark.parametrize("right, down", [(0, 0), (1, 0), (-2, 0), (0, 2), (3, -1)])
def test_a_flow_moves_the_picture_by_what_it_says(right, down):
    """It says where each place lies in the last picture, so what moves right is fetched from the left."""
    picture = torch.randn(2, CHANNELS, ROWS, COLUMNS)
    flow = torch.tensor([-2 * right / COLUMNS, -2 * down / ROWS]).expand(2, 3, 4, 5, 2)  # any coarseness
    moved = make().warp(picture, flow)
    y, x = (torch.arange(n) - by for n, by in ((ROWS, down), (COLUMNS, right)))
    expected = picture[..., y.clamp(0, ROWS - 1), :][..., x.clamp(0, COLUMNS - 1)]
    assert moved.shape == (2, 3, CHANNELS, ROWS, COLUMNS)
    assert torch.allclose(moved, expected[:, None].expand_as(moved), atol=1e-4)


def test_each_coming_frame_and_each_game_has_its_own_flow():
    picture = torch.randn(2, CHANNELS, ROWS, COLUMNS)
    flow = torch.zeros(2, 2, 3, 4, 2)
    flow[0, 1] = 0.5
    moved = make().warp(picture, flow)
    for b, t in ((0, 0), (1, 0), (1, 1)):
        assert torch.allclose(moved[b, t], picture[b], atol=1e-5)
    assert (moved[0, 1] - picture[0]).abs().max() > 0.1


@torch.no_grad()
def test_a_flow_is_read_off_keys_history_distance_and_both_frames():
    motion = make(scramble=0.3)
    last, held, actions = given()
    flow, doubt = motion.flow(last, held, actions)
    assert flow.shape == (3, AHEAD, ROWS, COLUMNS, 2) and doubt.shape == (3, AHEAD, CHANNELS, ROWS, COLUMNS)

    def changes(*other: Tensor) -> bool:
        return (motion.flow(*other)[0] - flow).abs().amax((2, 3, 4)).min().item() > 1e-4

    assert changes(last, held, 1 - actions) and changes(last, 1 - held, actions)
    assert changes(last + torch.tensor([1.0, 0.0])[:, None, None, None], held, actions), "the frame before"
    assert changes(last + torch.randn(3, 1, CHANNELS, ROWS, COLUMNS), held, actions)
    same, _ = motion.flow(last, held, actions[:, :1].expand(-1, AHEAD, -1))
    assert (same[:, 1:] - same[:, :1]).abs().amax((1, 2, 3, 4)).min() > 1e-4, "how far ahead it is"
    alone, _ = motion.flow(last[1:2], held[1:2], actions[1:2])
    assert torch.allclose(alone, flow[1:2], atol=1e-5), "games do not see each other"


def world(batch: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Waves that the first key moves right and the second left, by a column a frame; both hold them still."""
    keys = (torch.rand(batch, MOMENTUM + AHEAD, KEYS, generator=random) < 0.5).float()
    keys[:, MOMENTUM:] = keys[:, MOMENTUM : MOMENTUM + 1]
    start = torch.rand(batch, 1, generator=random) * COLUMNS
    place = start + (keys[..., 0] - keys[..., 1]).cumsum(1)
    phase = (torch.arange(COLUMNS) - place[..., None]) * (2 * torch.pi / COLUMNS)
    frames = torch.stack([phase.cos(), phase.sin()], 2)[:, :, :, None].expand(-1, -1, -1, ROWS, -1)
    now = MOMENTUM
    return frames[:, now - 2 : now], keys[:, :now], keys[:, now:], frames[:, now:]


def test_it_learns_what_keys_move():
    motion, random = make(), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(motion.parameters(), lr=3e-3)
    for _ in range(300):
        loss, logs = motion.loss(*world(16, random))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    last, held, actions, true = world(64, random)
    inside = (..., slice(3, -3))  # what comes in from outside nobody knows

    def error(keys: Tensor) -> float:
        return (motion(last, held, keys).mean - true)[inside].square().mean().item()

    still = (last[:, 1:] - true)[inside].square().mean().item()
    assert error(actions) < 0.2 * still, (error(actions), still)
    assert error(actions.flip(-1)) > 2 * still * (actions[:, 0, 0] != actions[:, 0, 1]).float().mean().item()
    assert set(logs) == {"next", "later", "still", "unlikely"} and all(
        value.ndim == 0 for value in logs.values()
    )


def test_it_doubts_what_comes_into_view():
    """Noise moves right by two columns and rests there: the left edge is new, the rest was in sight."""
    motion, random = make(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        motion.flow_out.bias.copy_(torch.tensor([-4 / COLUMNS / FLOW_UNIT, 0]))  # the flow is known
    optimiser = torch.optim.Adam([p for n, p in motion.named_parameters() if n.startswith("doubt")], lr=3e-3)
    keys = torch.ones(16, MOMENTUM, KEYS), torch.ones(16, AHEAD, KEYS)
    for _ in range(300):
        wide = torch.randn(16, 1, CHANNELS, ROWS, COLUMNS + 2, generator=random)
        last, true = wide[..., 2:].expand(-1, 2, -1, -1, -1), wide[..., :-2].expand(-1, AHEAD, -1, -1, -1)
        loss, _ = motion.loss(last, *keys, true)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    doubt = motion(last, *keys).doubt[:, 0].mean((0, 1, 2))  # of each column
    assert doubt[:2].min() > 0.6 and doubt[3:-1].max() < 0.3, doubt


@torch.no_grad()
def test_what_stands_still_stays_to_the_bit():
    """Through a picture and back latents become others; a thousand times, as other pictures."""
    autoencoder = Autoencoder(AutoencoderConfig(CHANNELS, [4, 4, 4], 1)).eval()
    motion = make(autoencoder=autoencoder)
    last, held, actions = given()
    assert (autoencoder.read(autoencoder.paint(last[:, 1])) - last[:, 1]).abs().max() > 0.1
    assert torch.equal(motion(last, held, actions).mean, last[:, 1:].expand(-1, AHEAD, -1, -1, -1))
    motion.flow_out.bias.copy_(torch.tensor([0, 2 * 1 / (8 * ROWS) / FLOW_UNIT]))  # one pixel
    moved = motion.latents(motion.warp(motion.picture(last[:, 1]), motion.flow(last, held, actions)[0])[:, 0])
    assert torch.allclose(motion(last, held, actions).mean[:, 0], moved, atol=1e-5)


def test_what_lies_beyond_a_bound_neither_runs_away_nor_stays():
    (least, most), logarithm = LOG_DOUBT, torch.nn.Parameter(torch.zeros(5))
    optimiser = torch.optim.Adam([logarithm], lr=0.05)
    for wish in (1, -1):  # down without end, then up
        for _ in range(400):
            optimiser.zero_grad()
            (wish * Bounded.apply(logarithm)).sum().backward()
            optimiser.step()
        made = Bounded.apply(logarithm)
        assert made.allclose(torch.full((5,), least if wish > 0 else most))
        assert least - 1 < logarithm.min() and logarithm.max() < most + 1, logarithm


def test_it_learns_how_little_to_doubt_where_nothing_moves():
    """The same flow of naught: what stays is soon trusted, what changes all the same is not."""
    found = []
    for change in (0.0, 1.0):
        torch.manual_seed(0)
        motion = make()
        optimiser = torch.optim.Adam([p for n, p in motion.named_parameters() if "flow" not in n], lr=2e-2)
        for _ in range(80):
            last, held, actions = given(16)
            true = last[:, 1:] + change * torch.randn(16, AHEAD, CHANNELS, ROWS, COLUMNS)
            with torch.enable_grad():
                motion.loss(last, held, actions, true)[0].backward()
            optimiser.step()
            optimiser.zero_grad()
        found.append((motion(*given(16)).doubt.mean().item(), motion.calm.sigmoid().max().item()))
    assert found[0][0] < 0.2 and found[0][1] < 0.3, found
    assert 0.7 < found[1][0] < 1.3, found


def test_pictures_are_moved_and_not_latents_where_there_is_an_autoencoder():
    autoencoder = Autoencoder(AutoencoderConfig(CHANNELS, [4, 4, 4], 1)).eval()
    motion = make(autoencoder=autoencoder)
    assert not [name for name in motion.state_dict() if "encoder" in name or "decoder" in name]
    assert len(list(motion.parameters())) == len(list(make().parameters())), "it trains on its own"
    with torch.no_grad():
        motion.flow_out.bias.copy_(torch.tensor([-2 * 5 / (8 * COLUMNS) / FLOW_UNIT, 0]))  # 5 pixels right
        last, held, actions = given(batch=2)
        picture = autoencoder.paint(last[:, 1])
        moved = torch.cat([picture[..., :1].expand(-1, -1, -1, 5), picture[..., :-5]], -1)
        assert torch.allclose(motion(last, held, actions).mean[:, 0], autoencoder.read(moved), atol=1e-3)
    motion.loss(*world(4, torch.Generator()))[0].backward()
    assert all(p.grad is None for p in autoencoder.parameters())
    assert motion.flow_out.weight.grad.abs().max() > 0
