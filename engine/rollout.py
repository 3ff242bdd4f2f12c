"""Rollout: the one forward path of the engine, used by play, by training and by evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from .denoiser import Denoiser
from .kv_cache import Written
from .motion import Guess
from .sampler import add_noise, counter_noise, ramp
from .window import RollingWindow


class Rollout:
    """Games played side by side in latent space: `reset` from given frames, then one finished frame a `step`.

    Noise is a function of (seed, frame index), so a game is reproduced by its seed and its actions. A frame
    keeps its noise on its way through the window: noise drawn anew at each level would wash out the texture
    that the levels before have drawn (docs/log.md).

    The window is denoised ahead, under the keys held before, while nobody knows yet which come (`prepare`).
    When they are others, the leaving frame is sent back to a high level and denoised alone under the true
    ones before it is shown, and so are the frames that were in flight at the change, each as it leaves:
    denoised further, what they had become under the old keys would show (docs/log.md).

    A finished frame is committed along with the next window (`folded`), or in a pass of its own before it,
    as training does, whose gradients must not flow into it; the numbers are the same. All state stays where
    it is from step to step, and what decides a step's course is known to the host, so a step can be captured.
    """

    def __init__(
        self, denoiser: Denoiser, batch: int = 1, dtype: torch.dtype = torch.float32, folded: bool = True
    ):
        self.denoiser, self.config, self.folded = denoiser, denoiser.config, folded
        device = denoiser.ladder.device
        self.cache = denoiser.make_cache(batch, device, dtype)
        c = self.config
        self.window = RollingWindow(batch, c.window, denoiser.keys, denoiser.shape, c.commit_position, device)
        self.ladder = denoiser.ladder.expand(batch, -1)  # (b, w)
        self.one = torch.ones(batch, 1, device=device)
        self.level = torch.zeros(c.window, dtype=torch.int64, device=device)
        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.held = torch.zeros(batch, denoiser.keys, device=device)
        self.since = torch.zeros(batch, dtype=torch.int64, device=device)  # frames since the keys changed
        self.ahead: Tensor | None = None  # the window's estimates under `held`, where they are made already
        # the last finished frame in float pixels (b, 3, h, w); it is shown, and moved next
        self.picture: Tensor | None = None

    @property
    def start_frames(self) -> int:
        """How many frames a game needs to start from; fewer are filled up by repeating the first."""
        return self.config.sink + self.config.recent

    @torch.no_grad()
    def reset(self, latents: Tensor, actions: Tensor, seed: Tensor) -> None:
        """Starts from finished frames (b, t, c, y, x) and the actions that caused them (b, t, k); seed (b,)
        int64.
        """
        missing = max(0, self.start_frames - latents.shape[1])
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        actions = torch.cat([torch.zeros_like(actions[:, :1]).expand(-1, missing, -1), actions], 1)
        self.cache.reset()
        self.seed.copy_(seed)
        written = Written()
        self.denoiser.commit(latents, actions, 0, written)
        for layer, (k, v) in enumerate(written.layers):
            self.cache.fill(layer, k, v)
        self.cache.begin(latents.shape[1], written.last, written.held)
        self._place_sink()
        self._paint()
        self.held.copy_(actions[:, -1])
        self.since.fill_(self.config.window)
        self.ahead = None
        self.window.reset(self.held)
        guess = self.guess(self.held)
        for filled in range(self.config.window - 1):
            sigma = ramp(self.denoiser.ladder, filled).expand_as(self.ladder)
            self.window.update(self._denoise(self.held, sigma, guess=guess))

    @torch.no_grad()
    def step(self, action: Tensor, stale: bool | None = None) -> Tensor:
        """Holds the keys (b, k) for one frame → the finished frame's latents (b, c, y, x). `stale`: whether
        this frame is sent back, in any of the games; looked up on the device unless given.
        """
        clean = self.predict(self.told(action)) if self.ahead is None else self.ahead
        self.ahead = None
        return self.advance(clean, action, stale=stale)

    @torch.no_grad()
    def prepare(self) -> None:
        """Denoises the next window under the keys held now; to be called when there is time."""
        if self.ahead is None and self.config.correction:
            self.ahead = self.predict(self.held)

    def told(self, action: Tensor) -> Tensor:
        """The keys (b, k) under which the window is denoised before `action` is held: those of before, as
        `action` is not known yet; it itself where no correction could make up for that.
        """
        return self.held.clone() if self.config.correction else action

    def predict(self, action: Tensor, clean: Tensor | None = None, guess: Guess | None = None) -> Tensor:
        """Bind, noise, denoise: the window's clean estimates (b, w, c, y, x) under the newest keys (b, k).

        Training gives other contents (b, w, c, y, x) than the window's own to be noised, and the guess, which
        it needs twice.
        """
        return self._denoise(action, self.ladder, clean, guess)

    @torch.no_grad()
    def guess(self, action: Tensor) -> Guess:
        """The window's first guesses (b, w, c, y, x) under the newest keys (b, k)."""
        return self._guess(self.window.bind(action)[0])

    def _guess(self, shown: Tensor) -> Guess:
        return self.denoiser.guess(shown, self.cache, self.picture)

    @torch.no_grad()
    def advance(
        self, clean: Tensor, action: Tensor, guess: Guess | None = None, stale: bool | None = None
    ) -> Tensor:
        """Correct, emit and roll: takes a step's estimates, and the guess under `action` if at hand → the
        finished frame's latents (b, c, y, x).
        """
        changed = (action != self.held).any(-1)  # (b,)
        self.since.copy_(torch.where(changed, 0, self.since + 1))
        back = self.since < self.config.window - 1
        stale = bool(back.any()) if stale is None else stale
        shown, _ = self.window.bind(action)
        if self.config.correction and stale:
            guess = self._guess(shown[:, :1]) if guess is None else guess.part(slice(1))
            head = self.correct(clean[:, :1], guess)
            head = torch.where(back[:, None, None, None, None], head, clean[:, :1])
            clean = torch.cat([head, clean[:, 1:]], 1)
        self.held.copy_(action)
        self.window.update(clean)
        head = self.window.clean[:, 0].clone()
        self._commit_alone()  # where no window pass has done it
        self.cache.take(head, self.window.actions[:, 0])
        self._place_sink()
        self._paint()
        self.window.roll()
        return head

    def _denoise(
        self,
        action: Tensor,
        sigma: Tensor,
        clean: Tensor | None = None,
        guess: Guess | None = None,
    ) -> Tensor:
        shown, known = self.window.bind(action)
        noise = counter_noise(self.seed, self.cache.frame, self.level, self.denoiser.shape)
        guess = self.guess(action) if guess is None else guess
        noisy = add_noise(self.window.clean if clean is None else clean, guess.doubt * noise, sigma)
        return self._pass(noisy, sigma, shown, known, guess)

    def correct(self, head: Tensor, guess: Guess) -> Tensor:
        """The leaving frame (b, 1, c, y, x) sent back to a higher level and denoised alone under its true
        action.
        """
        noise = counter_noise(self.seed, self.cache.frame, self.level[:1], self.denoiser.shape)
        sigma = self.config.correction * self.one
        noisy, shown = add_noise(head, guess.doubt * noise, sigma), self.window.actions[:, :1]
        return self._pass(noisy, sigma, shown, self.one, guess)

    def _pass(self, noisy: Tensor, sigma: Tensor, shown: Tensor, known: Tensor, guess: Guess) -> Tensor:
        """The denoiser on some of the window's frames, and on the pending one."""
        if torch.is_grad_enabled() or not self.folded:
            self._commit_alone()
        self.cache.look(noisy.shape[1])
        made = self.denoiser(noisy, sigma, shown, known, self.cache.frame, self.cache, guess=guess)
        self.cache.pending = False
        return made

    @torch.no_grad()
    def _commit_alone(self) -> None:
        if self.cache.pending:
            self.denoiser.commit_pending(self.cache)

    def _place_sink(self) -> None:
        """Right before the ring, however long ago it was made."""
        place = self.cache.frame - self.start_frames
        self.cache.place_sink(lambda keys: self.denoiser.transformer.positions.shift(keys, place))

    def _paint(self) -> None:
        """The last finished frame as a picture, where the one before it was."""
        picture = self.denoiser.motion.picture(self.cache.last[:, 1])
        self.picture = picture if self.picture is None else self.picture.copy_(picture)
