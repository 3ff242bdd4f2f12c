"""The stages of training: what each starts from and makes, and a config for each."""

from __future__ import annotations

from dataclasses import dataclass, field

from .bounds import Checked, count, number, share, weight
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
class StageConfig(Checked):
    """What all stages have: how long they train and how they optimise."""

    steps: int = count(100_000)
    max_minutes: float = number(30.0, least=0, most=1e6)
    batch: int = count(32, most=1 << 20)  # per process
    # batches whose gradients are summed up before each step of the optimiser
    accumulate: int = count(1, most=1 << 20)
    learning_rate: float = number(1e-3, above=0, most=10)
    warmup: int = count(200, least=0)  # steps
    decay_share: float = share(0.3)  # of the run, at its end, over which the learning rate falls to zero
    weight_decay: float = number(0.01, least=0, most=10)
    betas: list[float] = number([0.9, 0.98], least=0, below=1)  # AdamW's, for gradients and squares
    muon: bool = True  # for the matrices of the transformer's layers
    grad_clip: float = number(1.0, above=0, most=1e9)
    ema: float = number(0.999, least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise UserError(f"{self.section}.betas must be two numbers, not {self.betas}.")


@dataclass
class AutoencoderStageConfig(StageConfig):
    """Frames to latents and back."""

    section = "stages.autoencoder"

    frames: int = count(40_000)  # pictures kept in memory
    crop: float = number(1.0, above=0, most=1)  # share of a frame's sides that is looked at
    # most noise on latents that are decoded, so that near ones look alike
    latent_noise: float = number(0.2, least=0, most=10)
    squared_weight: float = weight(4.0)  # of squared errors, beside absolute ones
    # of errors of the differences of neighbouring pixels: texture and small things
    edge_weight: float = weight(0.1)


@dataclass
class StateStageConfig(StageConfig):
    """The state from keys and off pictures, and the scene."""

    section = "stages.state"

    frames: int = count(40_000)  # pictures kept in memory
    unroll: int = count(64, most=4096)  # frames that are foretold
    # of games that begin a little beside the truth, so that it learns to return
    noise_share: float = share(0.2)
    noise: float = number(0.3, least=0, most=10)  # standard deviation of that, in large steps
    huber: float = number(0.2, above=0, most=1e6)  # errors beyond so many large steps count linearly
    # of what is learnt from pictures: it shall not decide where gradients are clipped
    read_weight: float = weight(0.1)
    read_share: int = count(2, most=4096)  # of so many pictures one is read: reading costs more than drawing


@dataclass
class DenoiserStageConfig(StageConfig):
    """Windows of true frames."""

    section = "stages.denoiser"

    clip: int = count(24, most=1 << 20)  # frames in a training segment, at least
    memoryless: float = share(0.0)  # share of iterations whose windows see no frames before the last
    memory_games: int = count(1_000_000)  # games of a batch, at most, in the others, which cost more
    windows: int = count(4, most=4096)  # laid over a segment
    # of windows that are one frame at the level to which play sends frames back
    single_share: float = share(0.2)
    context_noise: float = share(0.4)  # most noise on the frames that windows are made from,
    context_noise_share: float = share(0.6)  # in this share of the games
    stateless: float = share(0.1)  # share of games whose state is kept from the network
    jitter: float = share(0.1)  # share by which levels of the ladder fall, at most
    lowest: float = share(0.2)  # share of the ladder's levels down to which is trained


@dataclass
class DistillStageConfig(DenoiserStageConfig):
    """The model's own games."""

    section = "stages.distill"

    unroll: int = count(1, most=4096)  # frames by which own games go on in an iteration
    game_frames: int = count(96, most=1 << 20)  # own frames of a game before it begins anew
    game_groups: int = count(4, most=4096)  # groups of games of different ages
    teacher_forcing: float = share(0.2)  # share of iterations on true frames
    distribution: float = weight(1.0)  # weight of the difference between teacher and critic
    coarse: int = count(2, most=4096)  # latents a side whose averages are held against the true ones
    still: float = weight(0.005)  # mean square change of latents under which a true frame stands still
    kept: float = weight(1.0)  # weight of what an own game changes while the true one stands still
    stop: float = share(0.5)  # share of games that stand still to their end once the true one does
    still_games: int = count(4, least=0, most=1 << 20)  # beside these, games that stand still far longer
    still_frames: int = count(400, most=1 << 20)  # own frames of such a game
    still_skip: int = count(3, least=0, most=1 << 20)  # of them between two that are learnt from
    # mean square of latents by which a game that stands still has left its picture: from there on it is
    # asked to be plausible, as there is nothing left that it could return to
    lost: float = number(0.5, above=0, most=1e6)


@dataclass
class DecoderStageConfig(StageConfig):
    """Crisp pictures, against a discriminator."""

    section = "stages.decoder"

    # long memories of a discriminator that has changed since: both learn less
    betas: list[float] = number([0.5, 0.95], least=0, below=1)
    frames: int = count(40_000)  # pictures kept in memory
    crop: float = number(1.0, above=0, most=1)  # share of a frame's sides that is looked at
    # most noise on the latents of true frames, as those of games are never perfect
    noise: float = number(0.2, least=0, most=10)
    squared_weight: float = weight(2.0)  # of squared errors, beside absolute ones
    discriminator: int = count(32, most=4096)  # channels of the discriminator
    discriminator_rate: float = number(2.0, above=0, most=1e6)  # its learning rate, in those of the decoder
    adversarial: float = weight(1.0)  # weight of what the discriminator says, both parts of it
    judge_weight: float = weight(0.06)  # its verdict
    feature_weight: float = weight(0.1)  # its features, matched
    adversarial_warmup: int = count(300)  # steps over which that weight rises


@dataclass
class StagesConfig:
    """One config a stage."""

    autoencoder: AutoencoderStageConfig = field(default_factory=AutoencoderStageConfig)
    state: StateStageConfig = field(default_factory=StateStageConfig)
    denoiser: DenoiserStageConfig = field(default_factory=DenoiserStageConfig)
    distill: DistillStageConfig = field(default_factory=DistillStageConfig)
    decoder: DecoderStageConfig = field(default_factory=DecoderStageConfig)
