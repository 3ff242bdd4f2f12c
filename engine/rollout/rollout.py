"""Rollout: the one forward path of the engine, for play, training and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.denoiser import Finished
from ..model.kv_cache import KVRecorder
from ..model.noise import add_noise, counter_noise, ramp
from ..model.state import StateCarry
from ..model.state_spec import state_features
from ..model.world_model import Generator
from .window import RollingWindow

Coming = tuple[Tensor, StateCarry | None]  # condition (b, 1, width) and state of the next frame


class Rollout:
    """Games played side by side in latent space: `reset` from given frames, then one finished frame a `step`.

    Noise is a function of (seed, frame index), so that seed and actions reproduce a game. A frame keeps its
    noise on its way through the window: fresh noise at each level would wash out texture (docs/log.md).

    The window can be denoised before the next keys are known, under the last ones (`speculate`). If the keys
    then change, the leaving frame is noised again to a high level and denoised alone under the true keys; so
    is every frame that was in flight at the change, when it leaves (why: docs/log.md).

    States are the network's own: those of frames in flight are predicted in every pass from the last finished
    frame's; only a finished frame's state, under its final keys, is kept.

    A finished frame is committed in the same pass as the next window (`folded`), or, with the same result, in
    a pass of its own, as in training, where no gradient may flow into it. No memory moves from step to step
    and the host alone decides a step's course, so that a step can be captured as a CUDA graph.
    """

    def __init__(
        self,
        generator: Generator,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        folded: bool = True,
        correction: float | None = None,
    ):
        """`correction`: level of corrections, 0: none; the config's unless given. `dtype`: the cache's."""
        denoiser, states, reader = generator.denoiser, generator.states, generator.reader
        self.denoiser, self.config, self.folded = denoiser, denoiser.config, folded
        self.correction = self.config.correction if correction is None else correction
        self.states, self.reader = states, reader
        self.read_indices = reader.seen if states and reader else []  # of the state, read off frames
        device, c = denoiser.ladder.device, self.config
        self.cache = denoiser.make_cache(batch, device, dtype)
        self.window = RollingWindow(batch, c.window_frames, denoiser.shape, device)
        self.ladder = denoiser.ladder.repeat(batch, 1)  # (b, w)
        self.one = torch.ones(batch, 1, device=device)
        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        # of the last finished frames
        self.actions = torch.zeros(batch, c.action_history, denoiser.keys, device=device)
        self.frames_since_change = torch.zeros(batch, dtype=torch.int64, device=device)
        self.last = torch.zeros(batch, 2, *denoiser.shape, device=device)  # the last two finished frames
        self.condition = torch.zeros(batch, 1, denoiser.condition.width, device=device)  # of the last one
        self.has_state = torch.zeros(batch, device=device)
        self.carry: StateCarry | None = None
        if states is not None:
            nothing = torch.zeros(batch, 1, len(states.spec), device=device)
            with torch.no_grad():
                carry = states.begin(nothing, self.actions[:, -1:])
            self.carry = StateCarry(*(part.clone() for part in carry))
        self._coming: Coming | None = None  # of the next frame, under the keys of the last pass
        self.pending = False  # whether the last finished frame is still to be committed, by the next pass
        self.speculated: tuple[Tensor, Coming] | None = None  # estimates made ahead, and their `_coming`

    def state(self) -> dict[str, Tensor]:
        """All that later steps depend on, by name, not copied; to be called without a speculated window."""
        parts = ("ladder", "seed", "actions", "frames_since_change", "last", "condition", "has_state")
        state = {name: getattr(self, name) for name in parts} | {"window": self.window.clean}
        state |= self.cache.state() | (self.carry._asdict() if self.carry else {})
        return state | {"pending": torch.tensor(self.pending)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from what `state` returned; KeyError or RuntimeError if other networks made it."""
        own = self.state()
        if own.keys() != state.keys():
            raise KeyError("games of other networks")
        for name, value in own.items():
            value.copy_(state[name])
        self.pending, self.speculated = bool(state["pending"]), None

    @property
    def start_frames(self) -> int:
        """How many frames a game starts from; with fewer, the first one is repeated."""
        return self.config.sink_frames + self.config.context_frames

    @property
    def held(self) -> Tensor:
        """The keys (b, k) of the last finished frame."""
        return self.actions[:, -1]

    @torch.no_grad()
    def reset(
        self,
        latents: Tensor,
        actions: Tensor,
        seed: Tensor,
        states: Tensor | None = None,
        ladder: Tensor | None = None,
    ) -> None:
        """Starts from finished frames (b, t, c, y, x), the actions that caused them (b, t, k) and their
        states (b, t, s), NaN or None where unknown; seed (b,) int64; ladder (b, w): noise levels of these
        games, the config's unless given.
        """
        self.ladder.copy_(self.denoiser.ladder if ladder is None else ladder)
        missing = max(0, self.start_frames - latents.shape[1])
        known = self._begin_states(states, actions, missing)
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        count, history = latents.shape[1], self.config.action_history
        idle = actions.new_zeros(len(actions), history - 1 + missing, actions.shape[2])
        actions = torch.cat([idle, actions], 1)  # (b, history - 1 + count, k)
        self.seed.copy_(seed)
        self.cache.reset()
        recorder, condition = KVRecorder(), self._history_condition(actions, known, count)
        self.denoiser.commit(latents, condition, 0, recorder)
        for layer, (k, v) in enumerate(recorder.layers):
            self.cache.prefill(layer, k, v)
        self.cache.finish_prefill(count)
        self.last.copy_(latents[:, -2:])
        self.condition.copy_(condition[:, -1:])
        self.actions.copy_(actions[:, -history:])
        self.pending, self.speculated = False, None
        self.place_sink()
        self.frames_since_change.fill_(self.config.window_frames)
        self.window.reset()
        for filled in range(self.config.window_frames - 1):
            sigma = ramp(self.denoiser.ladder, filled).expand_as(self.ladder)
            self.window.update(self.predict(self.held, sigma))

    @torch.no_grad()
    def step(self, action: Tensor, renoise: bool | None = None) -> Tensor:
        """Plays one frame under the keys (b, k) → the finished frame's latents (b, c, y, x). `renoise`:
        whether any game needs a correction; unless given, the device is asked, which makes the host wait.
        """
        if self.speculated is None:
            clean = self.predict(self.assumed_action(action))
        else:
            (clean, self._coming), self.speculated = self.speculated, None
        return self.advance(clean, action, renoise=renoise)

    @torch.no_grad()
    def speculate(self) -> None:
        """Denoises the next window under the last keys, while the next ones are not known."""
        if self.speculated is None and self.correction:
            self.speculated = self.predict(self.held), self._coming

    def assumed_action(self, action: Tensor) -> Tensor:
        """Keys (b, k) under which a step's window is denoised: the last ones; `action` if uncorrected."""
        return self.held.clone() if self.correction else action

    def predict(self, action: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Binds the keys (b, k), predicts states, adds noise of levels sigma (b, w), the ladder's unless
        given, and denoises → the window's clean estimates (b, w, c, y, x).
        """
        sigma = self.ladder if sigma is None else sigma
        condition = self.window_condition(self.window.bind(action))
        noise = counter_noise(self.seed, self.cache.frame, self.window.frames, self.denoiser.shape)
        return self.run_pass(add_noise(self.window.clean, noise, sigma), sigma, condition)

    def needs_renoise(self, action: Tensor) -> Tensor:
        """Keys (b, k) of the leaving frame → bool (b,): whether keys changed while it was in flight."""
        changed = (action != self.held).any(-1)
        since = torch.where(changed, 0, self.frames_since_change + 1)
        return changed | (since < self.config.window_frames - 1)

    def correct(self, head: Tensor, action: Tensor) -> Tensor:
        """The leaving frame's estimate (b, 1, c, y, x), noised again to level `correction` and denoised alone
        under its true keys (b, k) → its new estimate (b, 1, c, y, x).
        """
        condition = self.window_condition(action[:, None])
        noise = counter_noise(self.seed, self.cache.frame, 1, self.denoiser.shape)
        sigma = self.correction * self.one
        return self.run_pass(add_noise(head, noise, sigma), sigma, condition)

    @torch.no_grad()
    def advance(
        self, clean: Tensor, action: Tensor, renoise: bool | None = None, corrected: Tensor | None = None
    ) -> Tensor:
        """Finishes a step: corrects the leaving frame where needed and rolls the window. Takes the window's
        estimates (b, w, c, y, x), the true keys (b, k), and the result of `correct` if already computed
        → the finished frame's latents (b, c, y, x). `renoise`: as in `step`.
        """
        changed = (action != self.held).any(-1)
        back = self.needs_renoise(action)
        self.frames_since_change.copy_(torch.where(changed, 0, self.frames_since_change + 1))
        renoise = bool(back.any()) if renoise is None else renoise
        if self.correction and renoise:
            head = self.correct(clean[:, :1], action) if corrected is None else corrected.detach()
            head = torch.where(back[:, None, None, None, None], head, clean[:, :1])
            clean = torch.cat([head, clean[:, 1:]], 1)
        self.window.update(clean)
        head = self.window.clean[:, 0].clone()
        self._commit_alone()  # if no pass of this step has done it
        self._finish(head)
        self.actions.copy_(torch.cat([self.actions[:, 1:], action[:, None]], 1))
        self.place_sink()
        self.window.roll()
        return head

    def _finish(self, head: Tensor) -> None:
        """Makes the leaving frame (b, c, y, x) the last finished one. `_coming` holds its final condition and
        state, as the last pass was the one that made or corrected it.
        """
        condition, carry = self._coming
        self.condition.copy_(condition)
        for old, new in zip(self.carry or (), carry or (), strict=True):
            old.copy_(new)
        read = self.reader(head) if self.read_indices else None
        for i in self.read_indices:
            self.carry.state[:, i].copy_(read[:, i])
        self.last.copy_(torch.stack([self.last[:, 1], head], 1))
        self.cache.append()
        self.pending = True

    def run_pass(self, noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Denoises the window's first frames, and commits the pending one, in the same pass if allowed."""
        if torch.is_grad_enabled() or not self.folded:
            self._commit_alone()
        self.cache.plan_pass(noisy.shape[1], self.pending)
        pending = self._finished() if self.pending else None
        made = self.denoiser(noisy, sigma, self.last[:, 1:], condition, self.cache.frame, self.cache, pending)
        self.pending = False
        return made

    def _finished(self) -> Finished:
        return Finished(self.last[:, 1:], self.last[:, :1], self.condition)

    @torch.no_grad()
    def _commit_alone(self) -> None:
        if self.pending:
            self.denoiser.commit_pending(self._finished(), self.cache)
            self.pending = False

    def place_sink(self) -> None:
        """Moves the sink to the positions right before the ring."""
        shift, place = self.denoiser.transformer.positions.shift, self.cache.frame - self.start_frames
        self.cache.place_sink(lambda keys: shift(keys, place))

    def _begin_states(self, states: Tensor | None, actions: Tensor, missing: int) -> Tensor | None:
        """Sets `has_state` and `carry` from the start's states (b, t, s) and actions (b, t, k) → the states
        without gaps, the first one repeated `missing` more times (b, missing + t, s); None without states.
        """
        self._known = None
        self.has_state.zero_()
        for part in self.carry or ():  # also where unused: NaN of the last game times zero would be NaN
            part.zero_()
        if self.states is None or states is None:
            return None
        known = torch.isfinite(states).all(-1).all(-1)  # (b,)
        states = torch.where(known[:, None, None], states, self.states.scales.offset)
        self.has_state.copy_(known)
        for old, new in zip(self.carry, self.states.begin(states, actions), strict=True):
            old.copy_(new)
        return torch.cat([states[:, :1].expand(-1, missing, -1), states], 1)

    def _history_condition(self, actions: Tensor, states: Tensor | None, count: int) -> Tensor:
        """Actions (b, history - 1 + count, k), states (b, count, s) → conditions (b, count, d) of a start."""
        features = None
        if states is not None:
            previous = torch.cat([states[:, :1], states[:, :-1]], 1)
            features = state_features(self.states.scales, states, previous)
        ahead = torch.zeros(count, dtype=torch.int64, device=actions.device)
        return self.denoiser.condition(*self._inputs(actions, features, ahead))

    def window_condition(self, bound: Tensor) -> Tensor:
        """Keys (b, t, k) of the next t frames → their conditions (b, t, width)."""
        inputs, carry = self.window_inputs(bound)
        condition = self.denoiser.condition(*inputs)
        self._coming = condition[:, :1].detach(), carry
        return condition

    def window_inputs(self, bound: Tensor) -> tuple[tuple[Tensor, ...], StateCarry | None]:
        """Keys (b, t, k) of the next t frames → the ConditionEncoder's inputs for these, with predicted
        states, and the carry after the first of them.
        """
        count, features, carry = bound.shape[1], None, None
        if self.carry:
            with torch.no_grad():
                carry = self.states.step(self.carry, bound[:, 0])
                states = torch.cat([carry.state[:, None], self.states.unroll(carry, bound[:, 1:])], 1)
            features = state_features(self.states.scales, states, self.carry.state[:, None].expand_as(states))
        actions = torch.cat([self.actions[:, 1:], bound], 1)
        return self._inputs(actions, features, torch.arange(count, device=bound.device)), carry

    def _inputs(self, actions: Tensor, features: Tensor | None, ahead: Tensor) -> tuple[Tensor, ...]:
        shape = len(actions), len(ahead)
        if features is None:
            features = actions.new_zeros(*shape, self.denoiser.features)
        has_state = self.has_state[:, None].expand(shape)
        return actions, features, has_state, ahead, actions.new_zeros(shape)
