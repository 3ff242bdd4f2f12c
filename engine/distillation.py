"""Distillation: a student learns on its own history what a frozen teacher holds likely, told by a critic."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import StageConfig, UserError
from .denoiser import Denoiser, weighted_error
from .kv_cache import Context, Written
from .losses import compute_dtype, drawn
from .motion import Guess
from .rollout import Rollout
from .sampler import add_noise, jittered
from .window import bind

LEVELS = 0.02, 0.98  # least and most noise at which teacher and critic are asked


class Past(NamedTuple):
    """What games stand on: their first frames and the newest finished ones, with the actions that caused
    them; never with gradients.
    """

    sink: Tensor  # (b, sink, c, y, x)
    sink_actions: Tensor  # (b, sink, k)
    latents: Tensor  # (b, sink + recent, c, y, x)
    actions: Tensor  # (b, sink + recent, k)

    def then(self, head: Tensor, action: Tensor) -> Past:
        """One frame (b, c, y, x) later, that `action` (b, k) caused."""
        latents, actions = (
            torch.cat([old[:, 1:], new.detach()[:, None]], 1)
            for old, new in ((self.latents, head), (self.actions, action))
        )
        return self._replace(latents=latents, actions=actions)


class Clip(NamedTuple):
    """Frames that a student made in one pass, what it was told of them, and what they stand on."""

    made: Tensor  # (b, t, c, y, x)
    guess: Guess
    shown: Tensor  # (b, t, k)
    known: Tensor  # (b, t)
    past: Past


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


def merged(clips: list[Clip]) -> Clip:
    """All of them side by side: where a clip stands in its game does not matter."""
    made, guesses, shown, known, pasts = zip(*clips, strict=True)
    guess, past = Guess(*beside(guesses)), Past(*beside(pasts))
    return Clip(torch.cat(made), guess, torch.cat(shown), torch.cat(known), past)


def beside(several: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Tuples of tensors as one."""
    return [torch.cat(parts) for parts in zip(*several, strict=True)]


def recall(denoiser: Denoiser, past: Past) -> Context:
    """A past as one of the networks remembers it: sink and recent frames, committed as when a game starts
    there. The window stands behind it, at index sink + recent.
    """
    first, lately = Written(), Written()
    denoiser.commit(past.latents, past.actions, 0, lately)
    recent = denoiser.config.recent * denoiser.transformer.tokens
    layers = [(k[:, -recent:], v[:, -recent:]) for k, v in lately.layers]
    if past.sink.shape[1]:
        denoiser.commit(past.sink, past.sink_actions, 0, first)
        both = zip(first.layers, layers, strict=True)
        layers = [tuple(torch.cat(parts, 1) for parts in zip(*pair, strict=True)) for pair in both]
    return Context(layers, lately.last, lately.held)


def estimate(
    denoiser: Denoiser, clip: Clip, noisy: Tensor, sigma: Tensor, past: Context, blind: bool = False
) -> Tensor:
    """Clean estimates (b, t, c, y, x) of a noised clip; `blind`: without its keys."""
    dropped = torch.ones_like(sigma, dtype=torch.bool) if blind else None
    frame = clip.past.latents.shape[1]
    return denoiser(noisy, sigma, clip.shown, clip.known, frame, past, dropped, clip.guess)


def one_level(clip: Clip) -> tuple[Tensor, Tensor]:
    """Gaussian noise as the clip, and levels (b, t), the same in all frames of a clip."""
    low, high = LEVELS
    sigma = low + (high - low) * torch.rand(len(clip.made), 1, device=clip.made.device)
    return torch.randn_like(clip.made), sigma.expand(clip.made.shape[:2])


def matching_loss(
    teacher: Denoiser, critic: Denoiser, clip: Clip, guidance: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Moves a clip to where the teacher holds it likelier and the critic less likely: distribution matching
    (Yin et al., 2024), whose gradient is the difference of two scores at one noise level.

    What are scores here? A clip is noised in units of its guess's doubt d: noisy = (1 - σ) clip + σ d ε. A
    network's score there, with its clean estimate x̂, is -(noisy - (1 - σ) x̂) / (σ d)²: network and guess
    agree on the noisy clip, so two scores differ by (1 - σ) / (σ d)² times the difference of the estimates.
    The factor is positive and the same for both; as usual the one of the level is left out and the mean
    distance to the teacher's estimate is divided by. So is 1 / d²: it would have places that are all but
    known count most, while in latents a place counts by how far off it is, as in regression.

    Guidance adds what the keys change in the teacher's opinion. Without keys its guess is the frame before,
    doubted by 1, and noise is in that unit; its score per unit is then worth d² of a clean latent's, so where
    the guess leaves nothing open, nothing is exaggerated.
    """
    with torch.no_grad():
        noise, sigma = one_level(clip)
        noisy, past = add_noise(clip.made, clip.guess.doubt * noise, sigma), recall(teacher, clip.past)
        fake = estimate(critic, clip, noisy, sigma, recall(critic, clip.past))
        real = estimate(teacher, clip, noisy, sigma, past)
        if guidance:
            blind = estimate(teacher, clip, add_noise(clip.made, noise, sigma), sigma, past, blind=True)
            real = real + guidance * clip.guess.doubt.square().clamp_max(1) * (real - blind)
        pull = normalised(clip.made, real, fake)
        target = clip.made - pull
        apart = (fake - real).square().mean().sqrt() / (clip.made - real).square().mean().sqrt().clamp_min(
            1e-6
        )
    loss = 0.5 * (clip.made - target).square().mean()
    return loss, {"pull": pull.abs().mean(), "apart": apart}


def normalised(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The gradient (b, t, c, y, x): how the critic's estimates differ from the teacher's, in units of each
    clip's mean distance to the teacher's.
    """
    size = (made - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / size.clamp_min(1e-4))


def critic_loss(critic: Denoiser, clip: Clip) -> Tensor:
    """Flow matching on clips that a student made, none of which gets a gradient."""
    noise, sigma = one_level(clip)
    clean, guess = clip.made.detach(), clip.guess
    made = estimate(
        critic, clip, add_noise(clean, guess.doubt * noise, sigma), sigma, recall(critic, clip.past)
    )
    return weighted_error(made, clean, sigma, critic.config.spread).mean()


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
