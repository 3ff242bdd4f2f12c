"""The stages of training: what each starts from and makes, and a config for each."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import UserError


@dataclass(frozen=True)
class Trained:
    """What a stage of training starts from and what it makes."""

    reads: tuple[str, ...] = ()  # the stages whose checkpoints it reads, as far as they are there
    makes: tuple[str, ...] = ()  # parts of ModelConfig; it takes the others as they were made


TRAINED = {  # in their order
    "autoencoder": Trained(makes=("autoencoder",)),
    "state": Trained(reads=("autoencoder",), makes=("state",)),
    "denoiser": Trained(reads=("state",), makes=("denoiser",)),
    "distill": Trained(reads=("denoiser",)),
    "decoder": Trained(reads=("distill",)),
}


@dataclass
class StageConfig:
    """What all stages have: how long they train and how they optimise."""

    steps: int = 100_000
    max_minutes: float = 30.0
    batch: int = 32  # per process
    accumulate: int = 1  # batches whose gradients are summed up before each step of the optimiser
    learning_rate: float = 1e-3
    warmup: int = 200  # steps
    decay_share: float = 0.3  # of the run, at its end, over which the learning rate falls to zero
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # AdamW's, for gradients and squares
    muon: bool = True  # for the matrices of the transformer's layers
    grad_clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulate) < 1 or not 0 <= self.max_minutes < float("inf"):
            raise UserError("A stage's steps, batch and accumulate are at least 1, max_minutes not negative.")


@dataclass
class AutoencoderStageConfig(StageConfig):
    """Frames to latents and back."""

    frames: int = 40_000  # pictures kept in memory
    crop: float = 1.0  # share of a frame's sides that is looked at
    latent_noise: float = 0.2  # most noise on latents that are decoded, so that near ones look alike
    squared_weight: float = 4.0  # of squared errors, beside absolute ones
    edge_weight: float = 0.1  # of errors of the differences of neighbouring pixels: texture and small things


@dataclass
class StateStageConfig(StageConfig):
    """The state from keys and off pictures, and the scene."""

    frames: int = 40_000  # pictures kept in memory
    unroll: int = 64  # frames that are foretold
    noise_share: float = 0.2  # of games that begin a little beside the truth, so that it learns to return
    noise: float = 0.3  # standard deviation of that, in large steps
    huber: float = 0.2  # errors beyond so many large steps count linearly
    read_weight: float = (
        0.1  # of what is learnt from pictures: it shall not decide where gradients are clipped
    )
    read_share: int = 2  # of so many pictures one is read: reading costs more than drawing


@dataclass
class DenoiserStageConfig(StageConfig):
    """Windows of true frames."""

    clip: int = 24  # frames in a training segment, at least
    memoryless: float = 0.0  # share of iterations whose windows see no frames before the last
    memory_games: int = 1_000_000  # games of a batch, at most, in the others, which cost more
    windows: int = 4  # laid over a segment
    single_share: float = 0.2  # of windows that are one frame at the level to which play sends frames back
    context_noise: float = 0.4  # most noise on the frames that windows are made from,
    context_noise_share: float = 0.6  # in this share of the games
    stateless: float = 0.1  # share of games whose state is kept from the network
    jitter: float = 0.1  # share by which levels of the ladder fall, at most
    lowest: float = 0.2  # share of the ladder's levels down to which is trained


@dataclass
class DistillStageConfig(DenoiserStageConfig):
    """The model's own games."""

    unroll: int = 1  # frames by which own games go on in an iteration
    game_frames: int = 96  # own frames of a game before it begins anew
    game_groups: int = 4  # groups of games of different ages
    teacher_forcing: float = 0.2  # share of iterations on true frames
    distribution: float = 1.0  # weight of the difference between teacher and critic
    coarse: int = 2  # latents a side whose averages are held against the true ones
    still: float = 0.005  # mean square change of latents under which a true frame stands still
    kept: float = 1.0  # weight of what an own game changes while the true one stands still
    stop: float = 0.5  # share of games that stand still to their end once the true one does


@dataclass
class DecoderStageConfig(StageConfig):
    """Crisp pictures, against a discriminator."""

    # long memories of a discriminator that has changed since: both learn less
    betas: list[float] = field(default_factory=lambda: [0.5, 0.95])
    frames: int = 40_000  # pictures kept in memory
    crop: float = 1.0  # share of a frame's sides that is looked at
    noise: float = 0.2  # most noise on the latents of true frames, as those of games are never perfect
    squared_weight: float = 2.0  # of squared errors, beside absolute ones
    discriminator: int = 32  # channels of the discriminator
    discriminator_rate: float = 2.0  # its learning rate, in those of the decoder
    adversarial: float = 1.0  # weight of what the discriminator says, both parts of it
    judge_weight: float = 0.06  # its verdict
    feature_weight: float = 0.1  # its features, matched
    adversarial_warmup: int = 300  # steps over which that weight rises


@dataclass
class StagesConfig:
    """One config a stage."""

    autoencoder: AutoencoderStageConfig = field(default_factory=AutoencoderStageConfig)
    state: StateStageConfig = field(default_factory=StateStageConfig)
    denoiser: DenoiserStageConfig = field(default_factory=DenoiserStageConfig)
    distill: DistillStageConfig = field(default_factory=DistillStageConfig)
    decoder: DecoderStageConfig = field(default_factory=DecoderStageConfig)
