"""Distillation: a student learns on its own history what a frozen teacher holds likely, told by a critic."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import StageConfig, UserError
from .denoiser import Denoiser, weighted_error
from .losses import compute_dtype, drawn
from .matching import Clip, Past, critic_loss, matching_loss, merged
from .motion import Guess
from .rollout import Rollout
from .sampler import jittered
from .window import bind


class DistillLoss(nn.Module):
    """Distribution matching on the student's own games, as one module that data parallelism can wrap.

    Iterations take turns: `critic_turns` of them train the critic on what the student makes, the next one
    trains the student. In a critic's turn no student's pass has gradients, in the student's none of the
    critic's, so that either turn moves its own weights alone; the teacher's never move.

    Games are played by `Rollout`, as in play. In rolling games every window is rolled, and those of each
    `window`-th step, from a phase on that is drawn anew, are scored: they do not overlap, each frame is taken
    once, at the level it happens to have. In the other games the leaving frame is denoised alone under its
    true action, as play does when a key has changed, and the game goes on with that. Some iterations go on
    with long games, from where the last of these left them, until they are minutes old (`longest`): of their
    frames no true ones are known, but whether they are likely can be said. Nor are they where the keys change
    more often than they did in truth (`flip_share`), so that most of what is scored stands behind a change.

    A clip is scored behind its own past, under the actions that its student was told and with its guess, and
    by it alone: the past is neither counted nor does any gradient flow there, and a window's successors may
    have had other keys.
    """

    def __init__(self, student: Denoiser, teacher: Denoiser, critic: Denoiser, pace: StageConfig):
        super().__init__()
        if pace.unroll < student.config.window or pace.critic_turns < 0:
            said = f"stages.distill.unroll must be at least the window's {student.config.window} frames"
            raise UserError(f"{said}, and critic_turns not negative.")
        self.student, self.pace = student, pace
        self.teacher = teacher.requires_grad_(False)
        self.critic = critic
        self.rollout: Rollout | None = None
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64))  # iterations so far
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))  # frames of the long games, 0: none
        b, size = pace.batch, student.config
        for name, frames in (("sink", size.sink), ("latents", size.sink + size.recent)):
            self.register_buffer(f"long_{name}", torch.zeros(b, frames, *student.shape))
        for name, frames in (("sink_actions", size.sink), ("actions", size.sink + size.recent)):
            self.register_buffer(f"long_{name}", torch.zeros(b, frames, student.keys))

    @property
    def denoiser(self) -> Denoiser:
        """The one that plays."""
        return self.student

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # processes choose alike, as they wait for one another; by what is saved with the weights
        turn, choice = int(self.turns), random.Random(int(self.turns))
        self.turns += 1
        learns = turn % (self.pace.critic_turns + 1) == self.pace.critic_turns
        clips, errors = self.play(*batch, choice, learns)
        clip = merged(clips)
        if not learns:
            loss = critic_loss(self.critic, clip)
            return loss, {"critic": loss.detach()}
        loss, logs = matching_loss(self.teacher, self.critic, clip, self.pace.guidance)
        loss = self.pace.matching * loss
        if errors:
            error = torch.cat(errors).mean()
            loss, logs = loss + self.pace.regression * error, logs | {"error": error.detach()}
        return loss, logs

    def play(
        self, latents: Tensor, actions: Tensor, choice: random.Random, learns: bool
    ) -> tuple[list[Clip], list[Tensor]]:
        """Plays on from the segments' first frames → what is to be scored, with gradients if the student
        `learns`, and errors (b, t) of estimates made of noised true frames where these are known.
        """
        size = self.student.config
        far = choice.random() < self.pace.far_share and self.pace.far > 0
        lead = choice.randint(1, self.pace.far) if far else 0
        alone = size.correction > 0 and choice.random() < self.pace.alone_share
        phase = choice.randrange(size.window)
        flips = choice.random() < self.pace.flip_share
        flip = choice.randrange(size.window)  # steps from a change of keys to the next scored window
        rollout, past = self._begin(latents, actions, old=bool(far and self.age))
        start, held = rollout.start_frames, endless(actions, rollout.start_frames)
        for _ in range(lead):
            head = rollout.step(next(held))
            past = past.then(head, rollout.cache.held[:, -1])
        clips, errors = [], []
        for step in range(phase + 1 + (self.pace.unroll - 1 - phase) // size.window * size.window):
            if flips and (step + flip) % size.window == phase:
                actions = actions.roll(1, 0)  # other keys, which nobody held in truth
                held = endless(actions, start + step)
            action = next(held)  # up to the last step that is scored
            scored = step % size.window == phase
            gradient = scored and learns
            made, guess, own = drawn(rollout, action, alone, gradient)
            if scored:
                clips.append(self._clip(made, guess, past))
            if gradient and self.pace.regression and not lead and not flips:
                true = latents[:, start + step : start + step + made.shape[1]]
                errors.append(self._error(true, action, guess if alone else rollout.guess(action), alone))
            head = rollout.advance(own, action, stale=False if alone else None)
            past = past.then(head, rollout.cache.held[:, -1])
        if far:
            self._leave(past, lead + step + 1)
        return clips, errors

    def _begin(self, latents: Tensor, actions: Tensor, old: bool) -> tuple[Rollout, Past]:
        """Games at the segments' first frames, or, if `old`, the long ones where they were left: their newest
        frames are committed anew, as those of true games are, and a window is begun.
        """
        if self.rollout is None:
            self.rollout = Rollout(self.student, len(latents), compute_dtype(latents.device))
        rollout, sink = self.rollout, self.student.config.sink
        given = [x[:, : rollout.start_frames] for x in (latents, actions)]
        past = Past(latents[:, :sink], actions[:, :sink], *given)
        if old:
            past = Past(*(getattr(self, f"long_{name}").clone() for name in Past._fields))
            both = (past.sink, past.latents), (past.sink_actions, past.actions)
            given = [torch.cat([first, newest[:, sink:]], 1) for first, newest in both]
        rollout.reset(*given, torch.randint(2**31, (len(latents),)).to(latents.device))
        rollout.ladder = jittered(self.student.ladder.expand(len(latents), -1), self.pace.jitter)
        return rollout, past

    def _leave(self, past: Past, frames: int) -> None:
        """Keeps the long games, `frames` older, for the next iteration that goes on with them; those that are
        old enough, or no pictures any more, are begun anew there.
        """
        for name, value in past._asdict().items():
            getattr(self, f"long_{name}").copy_(value)
        self.age += frames
        if self.age >= self.pace.longest or not past.latents.isfinite().all():
            self.age.zero_()

    def _clip(self, made: Tensor, guess: Guess, past: Past) -> Clip:
        """What was made of the window's frames, or of the leaving one alone, whose action is certain."""
        window, t = self.rollout.window, made.shape[1]
        shown, known = bind(window.actions, window.commit_position)
        return Clip(made, guess, shown[:, :t], known[:, :t], past)

    def _error(self, true: Tensor, action: Tensor, guess: Guess, alone: bool) -> Tensor:
        """How far estimates made of noised true frames (b, t, c, y, x) are from these, (b, t)."""
        rollout, size = self.rollout, self.student.config
        made = rollout.correct(true, guess) if alone else rollout.predict(action, true, guess)
        sigma = size.correction * rollout.one if alone else rollout.ladder
        return weighted_error(made, true, sigma, size.spread)


def endless(actions: Tensor, start: int) -> Iterator[Tensor]:
    """Held keys (b, k) from a segment's frame `start` on, (b, t, k), and behind its end those of the next
    game's segment, from its first frame on.
    """
    while True:
        yield from actions[:, start:].unbind(1)
        actions, start = actions.roll(1, 0), 0


def shortened(made: Denoiser, student: Denoiser) -> Denoiser:
    """`student`, with the weights of a denoiser whose window is as long or longer.

    Weights do not depend on the window but for those by which the flow is told how far ahead a frame is.
    """
    window, longer = student.config.window, made.config.window - student.config.window
    if longer < 0:
        said = f"A window of {window} frames is longer than the {made.config.window} that its weights know"
        raise UserError(f"{said}; choose model.denoiser.window and ladder no longer than that.")
    state, told = made.state_dict(), "motion.told.0.weight"
    state[told] = state[told][:, : state[told].shape[1] - longer]
    student.load_state_dict(state)
    return student
