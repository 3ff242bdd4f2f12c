"""Cached steps are the written-out definition; keys reach their frame; a game is its seed and its keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.kernels import qknorm_rope
from games import KEYS, SHAPE, SPEC, Game, close, make_denoiser, make_game, make_states, play
from torch import Tensor

import engine.rollout.rollout
from engine.model.condition import action_windows
from engine.model.denoiser import Denoiser
from engine.model.kv_cache import KVContext, KVRecorder
from engine.model.noise import add_noise, counter_noise, ramp
from engine.model.state import StateCarry, StateModel
from engine.model.state_spec import state_features
from engine.model.world_model import Generator
from engine.rollout.rollout import Rollout

WINDOW = 3


@torch.no_grad()
def memory(denoiser: Denoiser, latents: Tensor, condition: Tensor, first: int = 0) -> KVContext:
    """What a window after all these finished frames sees, from one pass; `first` is the first's number."""
    config, tokens, count = denoiser.config, denoiser.transformer.tokens, latents.shape[1]
    sink, ring = config.sink_frames, config.context_frames
    recorder, layers = KVRecorder(), []
    denoiser.commit(latents, condition, first, recorder)
    for k, v in recorder.layers:
        k, v = (x.unflatten(1, (count, tokens)) for x in (k, v))
        kept = denoiser.transformer.positions.shift(k[:, :sink], count - ring - sink)
        joined = torch.cat([kept, k[:, -ring:]], 1), torch.cat([v[:, :sink], v[:, -ring:]], 1)
        layers.append(tuple(x.flatten(1, 2) for x in joined))
    return KVContext(layers)


class Written:
    """DESIGN §3 with nothing kept but latents, keys and the start's states: all else is computed anew."""

    def __init__(self, denoiser: Denoiser, states: StateModel | None, game: Game):
        self.denoiser, self.states, self.game, self.config = denoiser, states, game, denoiser.config
        self.latents, self.actions = game.latents, game.before  # (b, t, ...) of finished frames

    def condition(self, actions: Tensor, features: Tensor, ahead: list[int]) -> Tensor:
        has = torch.full(features.shape[:2], float(self.states is not None))
        return self.denoiser.condition(actions, features, has, torch.tensor(ahead), torch.zeros_like(has))

    def true_states(self) -> tuple[StateCarry | None, Tensor | None]:
        """The carry of the last finished frame, and the states (b, t, s) of all of them."""
        if self.states is None:
            return None, None
        given = self.game.states.shape[1]
        carry, rows = self.states.begin(self.game.states, self.actions[:, :given]), [self.game.states]
        for action in self.actions[:, given:].unbind(1):
            carry = self.states.step(carry, action)
            rows.append(carry.state[:, None])
        return carry, torch.cat(rows, 1)

    def features(self, state: Tensor | None, previous: Tensor | None, shape: tuple[int, int]) -> Tensor:
        if state is None:
            return torch.zeros(*shape, 0)
        return state_features(self.states.scales, state, previous)

    def estimate(self, clean: Tensor, levels: Tensor, keys: Tensor) -> Tensor:
        """The window's frames (b, w, ...) noised to `levels` (w,) and denoised, all under the keys (b, k)."""
        (b, w), frame = clean.shape[:2], self.latents.shape[1]
        carry, states = self.true_states()
        held = F.pad(self.actions, (0, 0, self.config.action_history - 1, 0))
        before = states if states is None else torch.cat([states[:, :1], states[:, :-1]], 1)
        past = self.condition(held, self.features(states, before, (b, frame)), [0] * frame)
        bound = keys[:, None].expand(-1, w, -1)
        coming = None if carry is None else self.states.unroll(carry, bound)
        last = None if carry is None else carry.state[:, None].expand_as(coming)
        held = torch.cat([held, bound], 1)[:, -(self.config.action_history - 1 + w) :]
        condition = self.condition(held, self.features(coming, last, (b, w)), list(range(w)))
        noise = counter_noise(self.game.seed, frame, w, SHAPE)
        sigma = levels.expand(b, -1)
        noisy, seen = add_noise(clean, noise, sigma), memory(self.denoiser, self.latents, past)
        return self.denoiser(noisy, sigma, self.latents[:, -1:], condition, frame, seen)

    def play(self) -> Tensor:
        """→ emitted frames (frames, b, c, y, x)."""
        config, ladder, emitted = self.config, torch.tensor(self.config.ladder), []
        window, held = config.window_frames, self.actions[:, -1]
        clean, since = torch.zeros(len(held), window, *SHAPE), torch.full((len(held),), window)
        for filled in range(window - 1):
            clean = self.estimate(clean, ramp(ladder, filled), held)
        for action in self.game.played:
            clean = self.estimate(clean, ladder, held if config.correction else action)
            head, since = clean[:, :1], torch.where((action != held).any(-1), 0, since + 1)
            if config.correction:
                again = self.estimate(head, torch.tensor([config.correction]), action)
                head = torch.where((since < window - 1)[:, None, None, None, None], again, head)
            emitted.append(head[:, 0])
            self.latents = torch.cat([self.latents, head], 1)
            self.actions = torch.cat([self.actions, action[:, None]], 1)
            clean, held = torch.cat([clean[:, 1:], torch.zeros_like(head)], 1), action
        return torch.stack(emitted)


ONE = {"window_frames": 1, "ladder": [1.0], "correction": 0.0}


@torch.no_grad()
@pytest.mark.parametrize("told", [False, True], ids=["keys alone", "with states"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"correction": 0.0}, {"sink_frames": 2, "context_frames": 2}, {"sink_frames": 0}, ONE],
    ids=["plain", "no correction", "sink of two", "no sink", "window of one"],
)
def test_cached_steps_are_the_written_out_definition(changes, told):
    denoiser, states = make_denoiser(told, **changes), make_states() if told else None
    game = make_game(frames=8)
    made = play(Rollout(Generator(denoiser, states), 2), game)
    expected = Written(denoiser, states, game).play()
    assert made.std() > 0.3
    for step in range(8):
        assert close(made[step], expected[step], 3e-4), f"step {step}"


def test_action_windows_end_with_a_frame_s_own_keys():
    """The action with number t caused frame t; the frames' windows are t - 3 … t."""
    history, frames = 4, 5
    actions = torch.arange(-3.0, frames)[None, :, None] * torch.tensor([1.0, 100.0])
    windows = action_windows(actions, history)
    assert windows.shape == (1, frames, history * 2)
    for frame in range(frames):
        numbers = torch.arange(frame - 3.0, frame + 1)
        assert torch.equal(windows[0, frame], torch.stack([numbers, 100 * numbers], 1).flatten())
    assert torch.equal(action_windows(actions, 1)[0, :, 0], actions[0, :, 0])


@torch.no_grad()
def test_shifted_keys_are_keys_made_at_the_new_place():
    positions = make_denoiser().transformer.positions
    raw, weight = torch.randn(2, 7, 3 * 2 * 16), torch.randn(16)
    here = qknorm_rope(raw, weight, weight, *positions(4, 1))[1]
    for frame in (0, 5, 9, 1004, 100_004):
        there = qknorm_rope(raw, weight, weight, *positions(torch.tensor(frame), 1))[1]
        assert close(positions.shift(here, frame - 4), there, 1e-5)
        assert close(positions.shift(there, 4 - frame), here, 1e-5)
    assert not close(positions.shift(here, 1), here, 1e-2)


@torch.no_grad()
def test_only_relative_time_counts():
    denoiser, latents = make_denoiser(), make_game(start=9).latents
    condition = torch.randn(2, 9, denoiser.config.width)
    noisy, sigma = torch.randn(2, 3, *SHAPE), torch.tensor([[0.5, 0.8, 1.0]]).expand(2, 3)
    given = noisy, sigma, latents[:, -1:], condition[:, :3]
    made = [denoiser(*given, first + 9, memory(denoiser, latents, condition, first)) for first in (0, 1000)]
    assert close(*made)
    late = denoiser(*given, 10, memory(denoiser, latents, condition))
    assert not close(late, made[0], 1e-2), "a frame more in between is another thing"


@torch.no_grad()
@pytest.mark.parametrize("told", [False, True])
def test_a_commit_along_with_the_window_is_one_of_its_own(told):
    denoiser, states, game = make_denoiser(told), make_states() if told else None, make_game()
    both = [Rollout(Generator(denoiser, states), 2, folded=folded) for folded in (True, False)]
    assert close(*(play(rollout, game) for rollout in both))
    for rollout in both:
        rollout.predict(game.played[0])  # so that the last frame is committed, too
    kept, expected = (rollout.cache.buffer[:, :, :, : rollout.cache.ring] for rollout in both)
    assert kept.abs().amax((0, 1, 2, 4, 5, 6)).min() > 0.1 and close(kept, expected)


def test_gradient_path_gives_the_same_numbers():
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    learning, playing = Rollout(Generator(denoiser, states), 2), Rollout(Generator(denoiser, states), 2)
    for rollout in (learning, playing):
        rollout.reset(game.latents, game.before, game.seed, game.states)
    for action in game.played[:5]:
        made = learning.predict(action)
        with torch.no_grad():
            expected = playing.predict(action)
        assert made.requires_grad and not expected.requires_grad and close(made, expected)
        assert close(learning.advance(made, action), playing.advance(expected, action))
    made.square().sum().backward()  # after the commit has written into the cache
    assert all(p.grad is not None for p in denoiser.parameters())
    assert denoiser.transformer.layers[0].attention.qkv.weight.grad.abs().max() > 0
    assert denoiser.condition.mlp[0].weight.grad.abs().max() > 0


@torch.no_grad()
def test_step_is_advance_of_predict():
    """And so it is where the window was denoised before the keys were known, or the correction is at hand."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    expected, rollout = (
        play(Rollout(Generator(denoiser, states), 2), game),
        Rollout(Generator(denoiser, states), 2),
    )
    for way in range(3):
        rollout.reset(game.latents, game.before, game.seed, game.states)
        for number, action in enumerate(game.played):
            if way == 2 and number % 3:
                rollout.speculate()
                rollout.speculate()
                made = rollout.step(action)
            elif way == 2:
                made = rollout.step(action)
            else:
                clean = rollout.predict(rollout.assumed_action(action))
                again = rollout.correct(clean[:, :1], action) if way else None
                made = rollout.advance(clean, action, corrected=again)
            assert torch.equal(made, expected[number]), (way, number)
        rollout.speculate()  # the reset that follows forgets it


@torch.no_grad()
def test_a_change_costs_one_frame_s_pass_once_it_is_known():
    """All that a step does after `speculate`: nothing, or the leaving frame's own pass."""
    denoiser, game, passes = make_denoiser(), make_game(), []
    rollout = Rollout(Generator(denoiser), 2)
    rollout.reset(game.latents, game.before, game.seed)
    denoiser.transformer.register_forward_hook(lambda module, given, made: passes.append(given[0].shape[1]))
    new = 1 - rollout.held
    for held, again in [(rollout.held, 0), (new, 1), (new, 1), (new, 0)]:  # a frame in flight, too
        rollout.speculate()
        passes.clear()
        rollout.step(held)
        assert passes == [1] * again
    rollout.step(new)
    assert passes == [WINDOW + 1], "otherwise the window and the frame to be committed"


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("correction", [0.0, 0.9])
def test_a_key_changes_the_frame_it_was_held_for_and_none_before(correction, told):
    """The frame was begun under other keys, up to two steps earlier: it obeys all the same."""
    denoiser, game = make_denoiser(told, correction=correction), make_game()
    other = game.played.clone()
    other[6] = 1 - other[6]
    made, changed = (
        play(Rollout(Generator(denoiser, make_states() if told else None), 2), game._replace(played=played))
        for played in (game.played, other)
    )
    difference = (made - changed).abs().flatten(1).amax(1)
    assert (difference[:6] == 0).all() and (difference[6:] > 0.05).all()


@torch.no_grad()
def test_frames_in_flight_at_a_change_are_denoised_anew_under_the_true_keys():
    """What is shown for `window - 1` frames from a change on is made from the last finished frame and the new
    keys at a high level: of what the frame was before, only a tenth is left.
    """
    denoiser, game, seen = make_denoiser(), make_game(frames=8), []
    played = game.before[:, -1].expand(8, -1, -1).clone()
    played[3:] = 1 - played[3:]
    rollout = Rollout(Generator(denoiser), 2)
    rollout.reset(game.latents, game.before, game.seed)
    hook = denoiser.condition.register_forward_hook(
        lambda module, given, made: seen.append((given[0][:, -given[3].shape[0] :], given[3].tolist()))
    )
    for number, action in enumerate(played):
        seen.clear()
        rollout.step(action)
        shown = [keys[:, 0] for keys, ahead in seen if len(ahead) == 1]  # the correction
        assert len(shown) == (1 if number in (3, 4) else 0), number
        assert all(torch.equal(keys, action) for keys in shown)
        window, ahead = seen[0]
        early = played[number - 1] if number else game.before[:, -1]
        assert ahead == [0, 1, 2] and torch.equal(window, early[:, None].expand(-1, WINDOW, -1))
    hook.remove()


@torch.no_grad()
def test_only_finished_frames_move_the_state():
    """States of frames in flight are predicted anew in each pass; the carry goes by final keys alone."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    rollout = Rollout(Generator(denoiser, states), 2)
    rollout.reset(game.latents, game.before, game.seed, game.states)
    carry = states.begin(game.states, game.before)
    for number, action in enumerate(game.played):
        for kept, expected in zip(rollout.carry, carry, strict=True):
            assert close(kept, expected, 1e-3), number
        for keys in torch.eye(KEYS):
            rollout.predict(keys.expand(2, -1))  # whatever is tried leaves no trace
        rollout.advance(rollout.predict(rollout.held), action)
        carry = states.step(carry, action)
    assert (carry.state - game.states[:, -1]).abs().max() > 1


@torch.no_grad()
def test_what_is_tried_before_a_step_does_not_show():
    """predict for other keys, then the step: the same frames as without."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    expected, rollout = (
        play(Rollout(Generator(denoiser, states), 2), game),
        Rollout(Generator(denoiser, states), 2),
    )
    rollout.reset(game.latents, game.before, game.seed, game.states)
    for action, frame in zip(game.played, expected, strict=True):
        rollout.predict(1 - action)
        rollout.speculate()
        rollout.predict(1 - action)
        assert close(rollout.step(action), frame)


def test_a_frame_keeps_its_noise(monkeypatch):
    """Every pass over a frame, the correction's too, has the frame's own noise; no two frames share it."""
    drawn: dict[int, Tensor] = {}

    def watched(seed: Tensor, frame: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
        noise = counter_noise(seed, frame, count, shape)
        for place in range(count):
            assert torch.equal(noise[:, place], drawn.setdefault(int(frame) + place, noise[:, place]))
        return noise

    monkeypatch.setattr(engine.rollout.rollout, "counter_noise", watched)
    play(Rollout(Generator(make_denoiser()), 2), make_game(frames=20))
    assert len(drawn) == 22 and len({noise.sum().item() for noise in drawn.values()}) == 22


def test_a_game_is_its_seed_and_its_keys():
    """Bit for bit, in a fresh rollout or after another game in the same one."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    first = play(Rollout(Generator(denoiser, states), 2), game)
    rollout = Rollout(Generator(denoiser, states), 2)
    backwards = Game(*(x.flip(0) for x in game))
    play(rollout, backwards._replace(before=1 - game.before, played=1 - game.played, seed=game.seed + 3))
    torch.manual_seed(99)
    assert torch.equal(play(rollout, game), first)
    seeds = game.seed + torch.tensor([0, 1])
    other = play(rollout, game._replace(seed=seeds))
    assert close(other[:, 0], first[:, 0])
    assert (other[:, 1] - first[:, 1]).abs().flatten(1).amax(1).min() > 0.05


@pytest.mark.parametrize("told", [False, True])
def test_games_side_by_side_are_games_alone(told):
    denoiser, states, game = make_denoiser(told), make_states() if told else None, make_game()
    game.played[:, 0] = game.played[3, 0]  # game 0 holds its keys, game 1 does not
    both = play(Rollout(Generator(denoiser, states), 2), game)
    for one in range(2):
        part = slice(one, one + 1)
        alone = Game(
            game.latents[part], game.before[part], game.played[:, part], game.seed[part], game.states[part]
        )
        assert close(play(Rollout(Generator(denoiser, states), 1), alone), both[:, part])


def test_correction_touches_only_games_whose_keys_changed():
    game = make_game()
    game.played[:] = game.before[:, -1]
    game.played[5:, 0] = 1 - game.before[0, -1]  # game 0 changes its keys once, game 1 never
    plain, corrected = (
        play(Rollout(Generator(make_denoiser(correction=level)), 2), game) for level in (0.0, 0.9)
    )
    difference = (plain - corrected).abs().flatten(2).amax(2)  # (frames, b)
    assert difference[:, 1].max() < 1e-5 and (difference[:5, 0] == 0).all() and difference[5, 0] > 0.05


# starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1, 2])
@pytest.mark.parametrize("told", [False, True])
def test_a_short_start_is_filled_up_with_its_first_frame(given, told):
    denoiser, states, game = make_denoiser(told), make_states() if told else None, make_game(start=given)
    missing = Rollout(Generator(denoiser)).start_frames - given
    padded = torch.cat([game.latents[:, :1].expand(-1, missing, -1, -1, -1), game.latents], 1)
    idle = F.pad(game.before, (0, 0, missing, 0))  # no key is held in the frames that are made up
    made = play(Rollout(Generator(denoiser, states), 2), game)
    assert made.isfinite().all() and made.std() > 0.3
    if not told:
        assert torch.equal(
            made, play(Rollout(Generator(denoiser, states), 2), game._replace(latents=padded, before=idle))
        )
    else:
        assert not close(made, play(Rollout(Generator(denoiser, states), 2), game, told=False), 1e-2)


@pytest.mark.parametrize("unknown", ["none", "all", "one", "one number"])
def test_a_start_without_states_is_played_without(unknown):
    """NaN where nothing is known, even for one frame or number, is as good as nothing: of that game only."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    without = play(Rollout(Generator(denoiser, states), 2), game, told=False)
    known = play(Rollout(Generator(denoiser, states), 2), game)
    assert not close(known[:, 0], without[:, 0], 1e-2)
    told = game.states.clone()
    if unknown == "all":
        told[:] = torch.nan
    elif unknown == "one":
        told[1, 2] = torch.nan
    elif unknown == "one number":
        told[1, 0, 3] = torch.nan
    rollout = Rollout(Generator(denoiser, states), 2)
    made = play(rollout, game._replace(states=told))
    assert made.isfinite().all()
    expected = {"none": [1, 1], "all": [0, 0]}.get(unknown, [1, 0])
    assert rollout.has_state.tolist() == expected
    for one, has in enumerate(expected):
        assert close(made[:, one], (known if has else without)[:, one])


def test_a_game_without_states_is_not_steered_by_the_one_before():
    """Whatever the carry held: its room is the same, its content is gone."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    fresh = play(Rollout(Generator(denoiser, states), 2), game, told=False)
    rollout = Rollout(Generator(denoiser, states), 2)
    play(rollout, game)
    for kept in rollout.carry:
        kept.fill_(torch.nan)
    assert torch.equal(play(rollout, game, told=False), fresh)


def test_a_world_that_tells_nothing_is_a_game_without_state():
    """A denoiser that knows states plays the same without a predictor as with one that was told nothing."""
    denoiser, game = make_denoiser(True), make_game()
    assert close(
        play(Rollout(Generator(denoiser), 2), game),
        play(
            Rollout(Generator(denoiser, make_states()), 2),
            game._replace(states=torch.full((2, 4, len(SPEC)), torch.nan)),
        ),
    )


def test_a_long_start_is_used_whole():
    denoiser, game = make_denoiser(), make_game(start=20)
    made = play(Rollout(Generator(denoiser), 2), game)
    for place, counts in ((0, True), (5, False)):  # two layers of three frames each reach from 19 back to 11
        changed = game.latents.clone()
        changed[:, place] += 1
        other = play(Rollout(Generator(denoiser), 2), game._replace(latents=changed))
        assert close(other, made, 1e-2 if counts else 1e-4) is not counts


def test_an_emitted_frame_belongs_to_its_receiver():
    """Whatever is done with it does not reach the game."""
    denoiser, game = make_denoiser(), make_game()
    expected, rollout = play(Rollout(Generator(denoiser), 2), game), Rollout(Generator(denoiser), 2)
    rollout.reset(game.latents, game.before, game.seed)
    for action, frame in zip(game.played, expected, strict=True):
        made = rollout.step(action)
        assert torch.equal(made, frame)
        made.fill_(torch.nan)


@torch.no_grad()
def test_nothing_uninitialised_is_read():
    """All memory of a fresh rollout poisoned: the same game comes out."""
    denoiser, states, game = make_denoiser(True), make_states(), make_game()
    expected, rollout = (
        play(Rollout(Generator(denoiser, states), 2), game),
        Rollout(Generator(denoiser, states), 2),
    )
    cache = rollout.cache
    for memory in (cache.unrotated_sink, rollout.window.clean, rollout.last, rollout.condition):
        memory.fill_(torch.nan)
    for memory in (*rollout.carry, rollout.actions):
        memory.fill_(torch.nan)
    assert torch.equal(play(rollout, game), expected)


@pytest.mark.slow
def test_kernels_play_the_same_game():
    """Three steps, so that a ring of two wraps, through Triton's kernels and through the definitions."""
    pytest.importorskip("triton")
    from engine.kernels import use

    denoiser, game = make_denoiser(context_frames=1), make_game(batch=1, start=2, frames=3)
    with use("triton"):
        made = play(Rollout(Generator(denoiser), 1), game)
    with use("reference"):
        expected = play(Rollout(Generator(denoiser), 1), game)
    assert close(made, expected)


class TestWindow:
    """RollingWindow: the newest keys stand in all its positions, what it holds stays where it is."""

    def make(self):
        from engine.rollout.window import RollingWindow

        return RollingWindow(2, 4, SHAPE, torch.device("cpu"))

    def test_bind_shows_the_newest_keys_everywhere(self):
        keys = torch.randn(2, KEYS)
        shown = self.make().bind(keys)
        assert shown.shape == (2, 4, KEYS) and all(torch.equal(shown[:, k], keys) for k in range(4))

    def test_frames_move_up_and_stay_in_place(self):
        window, clean = self.make(), torch.randn(2, 4, *SHAPE, requires_grad=True)
        place = window.clean.data_ptr()
        window.update(clean * 1)
        assert torch.equal(window.clean, clean) and not window.clean.requires_grad
        window.roll()
        assert torch.equal(window.clean[:, :-1], clean[:, 1:])
        window.reset()
        assert not window.clean.any() and window.clean.data_ptr() == place
