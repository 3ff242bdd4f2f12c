"""Rollout: the one forward path of the engine, used by play, by training and by evaluation."""

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

    Noise is a function of (seed, frame index), so a game is reproduced by its seed and its actions. A frame
    keeps its noise on its way through the window: noise drawn anew at each level would wash out the texture
    that the levels before have drawn (docs/log.md).

    The window is denoised ahead, under the keys held before, while nobody knows yet which come (`speculate`).
    When they are others, the leaving frame is sent back to a high level and denoised alone under the true
    ones before it is shown, and so are the frames that were in flight at the change, each as it leaves:
    denoised further, what they had become under the old keys would show (docs/log.md).

    The state is the network's own: it is predicted for the frames in flight from the last finished frame's,
    anew in every pass, and only a finished frame's, under its final keys, is kept.

    A finished frame is committed along with the next window (`folded`), or in a pass of its own before it,
    as training does, whose gradients must not flow into it; the numbers are the same. All memory stays where
    it is from step to step, and what decides a step's course is known to the host, so a step can be captured.
    """

    def __init__(
        self,
        generator: Generator,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        folded: bool = True,
        correction: float | None = None,
    ):
        """`correction`: the level to which leaving frames are sent back, where not the config's. What keys do
        not decide is read off finished frames, as far as the generator's reader has been found to see it.
        """
        denoiser, states, reader = generator.denoiser, generator.states, generator.reader
        self.denoiser, self.config, self.folded = denoiser, denoiser.config, folded
        self.correction = self.config.correction if correction is None else correction
        self.states, self.reader = states, reader
        self.seen = reader.seen if states is not None and reader is not None else []
        device, c = denoiser.ladder.device, self.config
        self.cache = denoiser.make_cache(batch, device, dtype)
        self.window = RollingWindow(batch, c.window_frames, denoiser.shape, device)
        self.ladder = denoiser.ladder.repeat(batch, 1)  # (b, w)
        self.one = torch.ones(batch, 1, device=device)
        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.actions = torch.zeros(
            batch, c.action_history, denoiser.keys, device=device
        )  # of the last frames
        self.frames_since_change = torch.zeros(batch, dtype=torch.int64, device=device)
        self.last = torch.zeros(batch, 2, *denoiser.shape, device=device)  # the last two finished frames
        self.condition = torch.zeros(batch, 1, denoiser.condition.width, device=device)  # of it
        self.has_state = torch.zeros(batch, device=device)
        self.carry: StateCarry | None = None
        if states is not None:
            nothing = torch.zeros(batch, 1, len(states.spec), device=device)
            with torch.no_grad():
                carry = states.begin(nothing, self.actions[:, -1:])
            self.carry = StateCarry(*(part.clone() for part in carry))
        # condition and state of the next frame under the keys last told; final, once these are
        self._coming: Coming | None = None
        self.pending = False  # the last frame's keys and values are yet to be written, by the next pass
        # the window's estimates under the keys held before, where they are made already, and what comes then
        self.speculated: tuple[Tensor, Coming] | None = None

    def state(self) -> dict[str, Tensor]:
        """All that a game under way is, by name; to be called between two steps, before `speculate`."""
        parts = ("ladder", "seed", "actions", "frames_since_change", "last", "condition", "has_state")
        state = {name: getattr(self, name) for name in parts} | {"window": self.window.clean}
        state |= self.cache.state() | (self.carry._asdict() if self.carry else {})
        return state | {"pending": torch.tensor(self.pending)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state` was asked for; KeyError or RuntimeError where that was of other networks."""
        own = self.state()
        if own.keys() != state.keys():
            raise KeyError("games of other networks")
        for name, value in own.items():
            value.copy_(state[name])
        self.pending, self.speculated = bool(state["pending"]), None

    @property
    def start_frames(self) -> int:
        """How many frames a game needs to start from; fewer are filled up by repeating the first."""
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
        """Starts from finished frames (b, t, c, y, x), the actions that caused them (b, t, k), and their
        states (b, t, s), NaN or None where nothing is known; seed (b,) int64; ladder (b, w): the levels of
        this game, where not the config's.
        """
        self.ladder.copy_(self.denoiser.ladder if ladder is None else ladder)
        missing = max(0, self.start_frames - latents.shape[1])
        self._begin_states(states, actions, missing)
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        count, history = latents.shape[1], self.config.action_history
        idle = actions.new_zeros(len(actions), history - 1 + missing, actions.shape[2])
        actions = torch.cat([idle, actions], 1)  # (b, history - 1 + count, k)
        self.seed.copy_(seed)
        self.cache.reset()
        recorder, condition = KVRecorder(), self._history_condition(actions, count)
        self.denoiser.commit(latents, condition, 0, recorder)
        for layer, (k, v) in enumerate(recorder.layers):
            self.cache.prefill(layer, k, v)
        self.cache.finish_prefill(count)
        self.last.copy_(latents[:, -2:])
        self.condition.copy_(condition[:, -1:])
        self.actions.copy_(actions[:, -history:])
        self.pending, self.speculated = False, None
        self._place_sink()
        self.frames_since_change.fill_(self.config.window_frames)
        self.window.reset()
        for filled in range(self.config.window_frames - 1):
            sigma = ramp(self.denoiser.ladder, filled).expand_as(self.ladder)
            self.window.update(self._denoise(self.held, sigma))

    @torch.no_grad()
    def step(self, action: Tensor, renoise: bool | None = None) -> Tensor:
        """Holds the keys (b, k) for one frame → the finished frame's latents (b, c, y, x). `renoise`: whether
        this frame is sent back, in any of the games; looked up on the device unless given.
        """
        if self.speculated is None:
            clean = self.predict(self.assumed_action(action))
        else:
            (clean, self._coming), self.speculated = self.speculated, None
        return self.advance(clean, action, renoise=renoise)

    @torch.no_grad()
    def speculate(self) -> None:
        """Denoises the next window under the keys held now; to be called when there is time."""
        if self.speculated is None and self.correction:
            self.speculated = self.predict(self.held), self._coming

    def assumed_action(self, action: Tensor) -> Tensor:
        """The keys (b, k) under which the window is denoised before `action` is held: those of before, as
        `action` is not known yet; it itself where no correction could make up for that.
        """
        return self.held.clone() if self.correction else action

    def predict(self, action: Tensor) -> Tensor:
        """Bind, state, noise, denoise: the window's clean estimates (b, w, c, y, x) under the newest keys
        (b, k).
        """
        return self._denoise(action, self.ladder)

    def needs_renoise(self, action: Tensor) -> Tensor:
        """Which games (b,) send the leaving frame back where `action` (b, k) is held: the keys have changed
        while it was in flight.
        """
        changed = (action != self.held).any(-1)
        since = torch.where(changed, 0, self.frames_since_change + 1)
        return changed | (since < self.config.window_frames - 1)

    def correct(self, head: Tensor, action: Tensor) -> Tensor:
        """The leaving frame's estimate (b, 1, c, y, x) sent back to a higher level and denoised alone under
        its true keys (b, k).
        """
        condition = self.window_condition(action[:, None])
        noise = counter_noise(self.seed, self.cache.frame, 1, self.denoiser.shape)
        sigma = self.correction * self.one
        return self._pass(add_noise(head, noise, sigma), sigma, condition)

    @torch.no_grad()
    def advance(
        self, clean: Tensor, action: Tensor, renoise: bool | None = None, corrected: Tensor | None = None
    ) -> Tensor:
        """Correct, emit and roll: takes a step's estimates (b, w, c, y, x), and the `corrected` leaving frame
        (b, 1, c, y, x) if at hand → the finished frame's latents (b, c, y, x).
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
        self._commit_alone()  # where no window pass has done it
        self._finish(head)
        self.actions.copy_(torch.cat([self.actions[:, 1:], action[:, None]], 1))
        self._place_sink()
        self.window.roll()
        return head

    def _finish(self, head: Tensor) -> None:
        """The leaving frame (b, c, y, x) becomes the last finished one. The pass that made it, or sent it
        back, was the last one, and so has worked out its condition and state under its final keys.
        """
        condition, carry = self._coming
        self.condition.copy_(condition)
        for kept, new in zip(self.carry or (), carry or (), strict=True):
            kept.copy_(new)
        read = self.reader(head) if self.seen else None
        for i in self.seen:
            self.carry.state[:, i].copy_(read[:, i])
        self.last.copy_(torch.stack([self.last[:, 1], head], 1))
        self.cache.append()
        self.pending = True

    def _denoise(self, action: Tensor, sigma: Tensor) -> Tensor:
        condition = self.window_condition(self.window.bind(action))
        noise = counter_noise(self.seed, self.cache.frame, self.window.frames, self.denoiser.shape)
        return self._pass(add_noise(self.window.clean, noise, sigma), sigma, condition)

    def _pass(self, noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """The denoiser on some of the window's frames, and on the pending one."""
        if torch.is_grad_enabled() or not self.folded:
            self._commit_alone()
        self.cache.plan_pass(noisy.shape[1], self.pending)
        pending = self._pending() if self.pending else None
        made = self.denoiser(noisy, sigma, self.last[:, 1:], condition, self.cache.frame, self.cache, pending)
        self.pending = False
        return made

    def _pending(self) -> Finished:
        return Finished(self.last[:, 1:], self.last[:, :1], self.condition)

    @torch.no_grad()
    def _commit_alone(self) -> None:
        if self.pending:
            self.denoiser.commit_pending(self._pending(), self.cache)
            self.pending = False

    def _place_sink(self) -> None:
        """Right before the ring, however long ago it was made."""
        place = self.cache.frame - self.start_frames
        self.cache.place_sink(lambda keys: self.denoiser.transformer.positions.shift(keys, place))

    def _begin_states(self, states: Tensor | None, actions: Tensor, missing: int) -> None:
        """The states of the start's frames (b, t, s) and the predictor's memory of them."""
        self._known = None
        self.has_state.zero_()
        for kept in self.carry or ():  # nothing of the game before, not even what has no weight
            kept.zero_()
        if self.states is None or states is None:
            return
        known = torch.isfinite(states).all(-1).all(-1)  # (b,)
        states = torch.where(known[:, None, None], states, self.states.scales.offset)
        self.has_state.copy_(known)
        for kept, new in zip(self.carry, self.states.begin(states, actions), strict=True):
            kept.copy_(new)
        self._known = torch.cat([states[:, :1].expand(-1, missing, -1), states], 1)

    def _history_condition(self, actions: Tensor, count: int) -> Tensor:
        """Conditions (b, count, width) of the start's frames; actions (b, history - 1 + count, k)."""
        features = None
        if self._known is not None:
            previous = torch.cat([self._known[:, :1], self._known[:, :-1]], 1)
            features = state_features(self.states.scales, self._known, previous)
        ahead = torch.zeros(count, dtype=torch.int64, device=actions.device)
        return self.denoiser.condition(*self._inputs(actions, features, ahead))

    def window_condition(self, bound: Tensor) -> Tensor:
        """Conditions (b, t, width) of the frames behind the last finished one, under the keys (b, t, k)."""
        inputs, carry = self.window_inputs(bound)
        condition = self.denoiser.condition(*inputs)
        self._coming = condition[:, :1].detach(), carry
        return condition

    def window_inputs(self, bound: Tensor) -> tuple[tuple[Tensor, ...], StateCarry | None]:
        """What a `ConditionEncoder` is told of the frames behind the last finished one, under the keys
        (b, t, k), and the first one's state.
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
