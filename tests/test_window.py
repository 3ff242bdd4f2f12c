"""Late binding: which frames of the window obey which keys, and what is known of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.window import RollingWindow, bind

WINDOW, KEYS, SHAPE = 4, 3, (2, 3, 4)


def held(number: int, batch: int = 2) -> Tensor:
    """Keys (b, k) that carry a number, another one for each game."""
    return torch.full((batch, KEYS), float(number)) + torch.arange(batch)[:, None] / 2


def make(commit_position: int) -> RollingWindow:
    return RollingWindow(2, WINDOW, KEYS, SHAPE, commit_position, torch.device("cpu"))


@pytest.mark.parametrize("commit_position", [0, 1, 2])
def test_bind_shows_final_actions_then_the_newest(commit_position):
    actions = torch.stack([held(i) for i in range(WINDOW)], 1)
    shown, known = bind(actions, commit_position)
    assert shown.shape == (2, WINDOW, KEYS) and known.shape == (2, WINDOW) and known.dtype == actions.dtype
    for k in range(WINDOW):
        assert torch.equal(shown[:, k], held(min(k, commit_position)))
        assert (known[:, k] == (k <= commit_position)).all()


def test_bind_of_fewer_frames_than_the_commit_position():
    shown, known = bind(held(5)[:, None], 2)
    assert torch.equal(shown, held(5)[:, None]) and (known == 1).all()


@pytest.mark.parametrize("commit_position", [0, 1, 2])
def test_a_key_reaches_the_commit_position_first(commit_position):
    """Keys number i are bound in step i; the frame that leaves in step i obeys those of step i - c."""
    window = make(commit_position)
    window.reset(held(-1))
    for step in range(12):
        shown, known = window.bind(held(step))
        for k in range(WINDOW):
            expected = step - commit_position + min(k, commit_position)
            assert torch.equal(shown[:, k], held(max(expected, -1)))
        assert known.tolist() == [[float(k <= commit_position) for k in range(WINDOW)]] * 2
        assert torch.equal(window.actions[:, 0], shown[:, 0]), "committed is what was shown"
        window.roll()


@pytest.mark.parametrize("commit_position", [0, 1, 2])
def test_binding_twice_in_a_step_keeps_the_last_keys(commit_position):
    """A frame before the commit position is final: keys revised within a step do not reach it."""
    window = make(commit_position)
    window.reset(held(0))
    window.bind(held(1))
    shown, _ = window.bind(held(2))
    for k in range(WINDOW):
        assert torch.equal(shown[:, k], held(2 if k >= commit_position else 0))


def test_roll_moves_frames_and_actions_by_one():
    window = make(1)
    clean = torch.randn(2, WINDOW, *SHAPE)
    window.reset(held(3))
    window.bind(held(4))
    window.update(clean)
    actions = window.actions.clone()
    window.roll()
    assert torch.equal(window.clean[:, :-1], clean[:, 1:])
    assert torch.equal(window.actions[:, :-1], actions[:, 1:])


def test_update_copies_without_gradient():
    window = make(0)
    clean = torch.randn(2, WINDOW, *SHAPE, requires_grad=True)
    window.update(clean * 1)
    assert torch.equal(window.clean, clean) and not window.clean.requires_grad
    kept = window.clean.clone()
    clean.detach().zero_()
    assert torch.equal(window.clean, kept)


def test_reset_empties_the_window():
    window = make(1)
    window.update(torch.randn(2, WINDOW, *SHAPE))
    window.bind(held(9))
    window.reset(held(2))
    assert not window.clean.any()
    assert torch.equal(window.actions, held(2)[:, None].expand(-1, WINDOW, -1))


def test_buffers_are_fixed():
    window = make(1)
    places = window.clean.data_ptr(), window.actions.data_ptr()
    for step in range(20):
        window.bind(held(step))
        window.update(torch.randn(2, WINDOW, *SHAPE))
        window.roll()
    window.reset(held(0))
    assert (window.clean.data_ptr(), window.actions.data_ptr()) == places
