"""The stages of training: what each starts from and makes, and a config for each."""

from __future__ import annotations

from dataclasses import dataclass, field

from .bounds import Checked, count, number, share, weight
from .errors import UserError


@dataclass(frozen=True)
class Trained:
    """What a training stage starts from and what it makes."""

    reads: tuple[str, ...] = ()  # the stages whose checkpoints it reads, where they exist
    makes: tuple[str, ...] = ()  # the parts of ModelConfig it decides; the others are the checkpoint's


TRAINED = {  # in the order of training
    "autoencoder": Trained(makes=("autoencoder",)),
    "state": Trained(reads=("autoencoder",), makes=("state",)),
    "denoiser": Trained(reads=("state",), makes=("denoiser",)),
    "distill": Trained(reads=("denoiser",)),
    "decoder": Trained(reads=("distill",)),
}


@dataclass
class StageConfig(Checked):
    """Fields of every stage: how long it trains and how it optimises."""

    steps: int = count(100_000)
    max_minutes: float = number(30.0, least=0, most=1e6)
    batch: int = count(32, most=1 << 20)  # per process
    # batches whose mean gradient makes one step of the optimiser
    accumulate: int = count(1, most=1 << 20)
    learning_rate: float = number(1e-3, above=0, most=10)
    warmup: int = count(200, least=0)  # steps
    decay_share: float = share(0.3)  # last share of the run, in which the learning rate falls to zero
    weight_decay: float = number(0.01, least=0, most=10)
    betas: list[float] = number(
        [0.9, 0.98], least=0, below=1
    )  # AdamW's, of the gradients' mean and mean square
    muon: bool = True  # Muon instead of AdamW for the matrices of the transformer's layers
    grad_clip: float = number(1.0, above=0, most=1e9)
    ema: float = number(0.999, least=0, below=1)  # decay of the moving average of the weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise UserError(f"{self.section}.betas must be two numbers, not {self.betas}.")


@dataclass
class AutoencoderStageConfig(StageConfig):
    """Frames to latents and back."""

    section = "stages.autoencoder"

    frames: int = count(40_000)  # frames held in memory
    crop: float = number(1.0, above=0, most=1)  # side of the training crops, as a share of the frame's
    # highest standard deviation of noise on the latents before decoding: nearby latents then look alike
    latent_noise: float = number(0.2, least=0, most=10)
    squared_weight: float = weight(4.0)  # of the squared error, relative to the absolute error
    # of the error of differences between neighbouring pixels, which carry texture and small things
    edge_weight: float = weight(0.1)


@dataclass
class StateStageConfig(StageConfig):
    """Networks of the state: predicted from keys, read from frames, and drawn as a scene."""

    section = "stages.state"

    frames: int = count(40_000)  # frames held in memory
    unroll: int = count(64, most=4096)  # frames predicted in a row
    # share of games that begin slightly off the true position, so that the network learns to return
    noise_share: float = share(0.2)
    noise: float = number(0.3, least=0, most=10)  # standard deviation of that offset, in large steps
    huber: float = number(0.2, above=0, most=1e6)  # errors beyond this many large steps count linearly
    # of the losses on frames (reader and scene): small, so that they do not drive gradient clipping
    read_weight: float = weight(0.1)
    read_share: int = count(2, most=4096)  # the reader sees one in this many frames: it is the slower one


@dataclass
class DenoiserStageConfig(StageConfig):
    """The denoiser, on windows of recorded frames."""

    section = "stages.denoiser"

    clip: int = count(24, most=1 << 20)  # fewest frames of a training segment
    memoryless: float = share(0.0)  # share of iterations whose windows see only the frame before them
    memory_games: int = count(1_000_000)  # most games of a batch in all other iterations, which cost more
    windows: int = count(4, most=4096)  # drawn from each segment
    # share of windows of a single frame, at the level to which play sends a frame back
    single_share: float = share(0.2)
    context_noise: float = share(0.4)  # highest noise level of the frames that a window looks at
    context_noise_share: float = share(0.6)  # share of games with such noise
    stateless: float = share(0.1)  # share of games whose state is hidden from the network
    jitter: float = share(0.1)  # each noise level is lowered by a random share up to this one
    lowest: float = share(0.2)  # a third of the windows have all levels scaled down, at most to this share


@dataclass
class DistillStageConfig(DenoiserStageConfig):
    """Distillation on the model's own games."""

    section = "stages.distill"

    unroll: int = count(1, most=4096)  # frames that every game is played on by in an iteration
    game_frames: int = count(96, most=1 << 20)  # generated frames of a game before it restarts
    game_groups: int = count(4, most=4096)  # groups of games of different ages
    teacher_forcing: float = share(0.2)  # share of iterations on recorded frames
    distribution_weight: float = weight(1.0)  # of distribution matching: the critic's minus the teacher's
    coarse_size: int = count(2, most=4096)  # side of the patches of latents whose means must be the true ones
    still_threshold: float = weight(0.005)  # two true frames with a smaller mean squared difference are alike
    still_weight: float = weight(1.0)  # of changes in a generated game while the true game stands still
    stop_share: float = share(0.5)  # share of games that never move again once the true game stands still
    still_games: int = count(4, least=0, most=1 << 20)  # extra games that stand still for far longer
    still_frames: int = count(400, most=1 << 20)  # generated frames of these
    still_skip: int = count(
        3, least=0, most=1 << 20
    )  # frames of these that are played between two learnt ones
    # mean squared distance of a game that stands still from the frame it should show, above which it is lost:
    # it cannot return to that frame, and so is only trained to look plausible
    lost_threshold: float = number(0.5, above=0, most=1e6)


@dataclass
class DecoderStageConfig(StageConfig):
    """The decoder, trained on against a discriminator, for crisp frames."""

    section = "stages.decoder"

    # shorter averages than elsewhere: older gradients are those against another discriminator
    betas: list[float] = number([0.5, 0.95], least=0, below=1)
    frames: int = count(40_000)  # frames held in memory
    crop: float = number(1.0, above=0, most=1)  # side of the training crops, as a share of the frame's
    # highest standard deviation of noise on the true frames' latents, as those of games are never perfect
    noise: float = number(0.2, least=0, most=10)
    squared_weight: float = weight(2.0)  # of the squared error, relative to the absolute error
    discriminator_width: int = count(32, most=4096)  # channels of its first layer
    discriminator_rate: float = number(2.0, above=0, most=1e6)  # its learning rate / the decoder's
    gan_weight: float = weight(1.0)  # of the next two together
    adversarial_weight: float = weight(0.06)  # of the adversarial loss (hinge)
    feature_matching_weight: float = weight(0.1)  # of the distance between the discriminator's features
    gan_warmup: int = count(300)  # steps over which gan_weight rises from zero


@dataclass
class StagesConfig:
    """The config of each training stage."""

    autoencoder: AutoencoderStageConfig = field(default_factory=AutoencoderStageConfig)
    state: StateStageConfig = field(default_factory=StateStageConfig)
    denoiser: DenoiserStageConfig = field(default_factory=DenoiserStageConfig)
    distill: DistillStageConfig = field(default_factory=DistillStageConfig)
    decoder: DecoderStageConfig = field(default_factory=DecoderStageConfig)
