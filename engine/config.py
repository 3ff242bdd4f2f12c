"""Every config as a dataclass with defaults and checks; `load_config` alone knows Hydra."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

POLICIES = ("keyboard", "scripted", "random", "idle", "spin", "walls")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8")
KERNELS = ("auto", "reference", "triton")
TRAINED = ("autoencoder", "motion", "denoiser", "rollout", "distill")
STAGES = ("collect", *TRAINED, "evaluate", "ablate", "frontier", "precision")


class UserError(Exception):
    """Bad input. The message is one sentence that says what is wrong and what to do; programs print it and
    exit 2.
    """


@dataclass
class WorldConfig:
    """A true game: which simulator, how it is drawn, and which keys it has."""

    name: str = "doom_gathering"
    kind: str = "doom"  # doom: a ViZDoom scenario · gym: any Gymnasium environment that renders RGB
    scenario: str = ""  # doom: file among those that ship with ViZDoom, without .cfg
    map: str = ""  # doom: map name where the scenario has several
    id: str = ""  # gym: environment id, also in the form module:Env-v0
    height: int = 96
    width: int = 128
    tics: int = 2  # simulator steps per frame
    fps: float = 17.5  # frames a second that are real time
    episode_frames: int = 1050  # an episode ends here at the latest
    keys: dict[str, list[str]] = field(
        default_factory=dict
    )  # action name → scancode names (SDL), in action order

    def __post_init__(self) -> None:
        if self.kind not in ("doom", "gym"):
            raise UserError(f"world.kind must be doom or gym, not {self.kind!r}.")
        if self.height % 32 or self.width % 32:
            raise UserError(
                f"A frame must be a multiple of 32 on both sides, not {self.width}x{self.height}."
            )
        if self.tics < 1 or self.fps <= 0 or self.episode_frames < 1:
            raise UserError("world.tics, world.fps and world.episode_frames must be positive.")


@dataclass
class AutoencoderConfig:
    """Frames ↔ latents, each frame alone. Every width halves the resolution: three make a factor of 8."""

    channels: int = 8  # of the latents
    widths: list[int] = field(
        default_factory=lambda: [32, 64, 128]
    )  # from half resolution to that of the latents
    depth: int = 2  # residual layers at the coarsest level

    def latent_shape(self, world: WorldConfig) -> tuple[int, int, int]:
        """(channels, rows, columns) of one frame's latents."""
        factor = 2 ** len(self.widths)
        return self.channels, world.height // factor, world.width // factor


@dataclass
class DenoiserConfig:
    """The diffusion transformer over frame tokens and the geometry of its rolling window."""

    width: int = 256
    layers: int = 6
    head_dim: int = 64
    mlp_ratio: int = 4
    patch: int = 4  # latents per token side
    fine: int = 96  # channels of the convolutions around the tokens
    stem: int = 2  # convolution layers before the tokens
    head: int = 4  # convolution layers behind them
    motion: int = 64  # channels of the network that moves the last picture
    motion_layers: int = 4
    momentum: int = 4  # finished frames whose actions it knows
    spread: float = 0.5  # usual standard deviation of what the moved picture misses, latents having 1
    window: int = 4  # frames in flight
    recent: int = 8  # finished frames remembered
    sink: int = 1  # first frames remembered for ever; 0: none
    commit_position: int = 0  # window positions up to here show their own, final action
    ladder: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 1.0])  # oldest to newest
    correction: float = (
        0.9  # noise level to which the leaving frame is sent back after a key change; 0: never
    )

    def __post_init__(self) -> None:
        if self.head_dim < 4 or self.width % self.head_dim or self.head_dim % 4:
            raise UserError(
                f"model.width {self.width} must be a multiple of head_dim {self.head_dim}, that of 4."
            )
        if (
            len(self.ladder) != self.window
            or sorted(self.ladder) != list(self.ladder)
            or self.ladder[-1] != 1
        ):
            raise UserError(
                f"The ladder needs {self.window} ascending levels that end at 1, not {self.ladder}."
            )
        if self.momentum < 2 or self.spread <= 0:
            raise UserError("model.denoiser.momentum must be at least 2 and spread positive.")
        if not 0 <= self.commit_position < self.window or self.sink < 0 or self.recent < 1:
            said = "commit_position must lie in the window; recent must be at least 1"
            raise UserError(f"{said} and sink not negative.")


@dataclass
class ModelConfig:
    """All that must be known to rebuild the networks; travels inside the checkpoint."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)


@dataclass
class StageConfig:
    """One training stage's pace."""

    steps: int = 100_000
    max_minutes: float = 30.0
    batch: int = 32  # per process
    learning_rate: float = 1e-3
    warmup: int = 200  # steps
    decay_share: float = 0.3  # of the run, at its end, over which the learning rate falls to zero
    weight_decay: float = 0.01
    muon: bool = True  # for the matrices of the transformer's layers
    grad_clip: float = 1.0
    ema: float = 0.999
    clip: int = 15  # frames in a training segment
    windows: int = 4  # denoising windows laid over a segment
    unroll: int = 6  # stage rollout: steps that the model walks on its own frames
    lead: int = 0  # stage rollout: steps before these, in half of the games up to so many, not learnt from
    plain_share: float = 0.2  # stage rollout: share of iterations that stay plain
    adversarial: float = 0.5  # stage rollout: weight of the discriminator's judgement
    judge: int = 64  # stage rollout: channels of the discriminator
    critic_turns: int = 3  # stage distill: iterations for the critic before each one for the student
    matching: float = 1.0  # stage distill: weight of the distribution's gradient
    regression: float = 0.1  # stage distill: weight of the true frames; more of it obeys less
    guidance: float = 0.5  # stage distill: how far the teacher is pushed away from what it says without keys
    alone_share: float = (
        0.5  # stages rollout and distill: share of iterations with leaving frames denoised alone
    )
    far_share: float = 0.25  # stage distill: share of iterations in long games, which go on each time for
    far: int = 200  # up to so many frames before they are scored,
    longest: int = 10_500  # and are begun anew when they are so many frames old
    kept: float = 0.0  # stage distill: share of the weights it began with in those that are saved
    flip_share: float = 0.5  # stage distill: share of iterations with a change of keys by each scored window
    jitter: float = 0.1  # stages rollout and distill: share by which levels of the ladder fall, at most
    frames: int = 40_000  # stage autoencoder: frames kept in memory


@dataclass
class TrainConfig:
    """`train.py`'s options."""

    stage: str = "denoiser"
    preset: str = "laptop"
    world: WorldConfig = field(default_factory=WorldConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    data: str = "runs/data"  # directory of recordings
    out: str = "runs/model"  # checkpoints, metrics and pictures
    checkpoint: str = ""  # evaluate: which one; empty takes out's newest
    weights: str = ""  # training: checkpoint whose weights a stage starts from; empty starts from nothing
    teacher: str = ""  # distill: checkpoint of the teacher; empty takes out's denoiser, or else weights
    variants: list[str] = field(default_factory=list)  # ablate: which ones; empty: all
    row: str = ""  # ablate: what the row of another checkpoint is called
    unseen: bool = False  # evaluate: all of data is new to the network, not only what training held out
    quick: bool = False  # evaluate: games of a minute, under three minutes on two cores; ablate: of two
    frames: int = 200_000  # collect: how many; evaluate: frames per game
    workers: int = 0  # collect: processes; 0 takes one per core
    lossless: bool = False  # collect: store pixels exactly
    seed: int = 0
    device: str = "auto"
    threads: int = 0  # torch threads; 0 leaves torch's default
    precision: str = "auto"  # auto measures whether bfloat16 pays on this device · fp32 · bf16 · to play also
    # fp16 · fp8
    kernels: str = "auto"  # auto: Triton on GPUs, definitions on CPUs · reference · triton
    compile: bool = False
    max_minutes: float = 0.0  # 0 takes the stage's own
    steps: int = 0  # 0 takes the stage's own
    log_every: int = 20
    save_minutes: float = 3.0
    picture_minutes: float = 5.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(f"There is no stage {self.stage!r}; choose one of {', '.join(STAGES)}.")
        _check_arithmetic(self.precision, self.kernels)
        if self.precision in ("fp16", "fp8") and self.stage in ("collect", *TRAINED):
            raise UserError(f"precision={self.precision} is for play and evaluation; train in bf16.")

    def pace(self) -> StageConfig:
        """The stage's own pace with the options given on the command line laid over it."""
        pace = StageConfig(**asdict(self.stages.get(self.stage, StageConfig())))
        pace.max_minutes = self.max_minutes or pace.max_minutes
        pace.steps = self.steps or pace.steps
        return pace


@dataclass
class PlayConfig:
    """`play.py`'s options."""

    checkpoint: str = "assets/doom_gathering.safetensors"
    world: WorldConfig = field(
        default_factory=WorldConfig
    )  # game=true only; a dream's world is in its checkpoint
    game: str = "dream"  # dream: the network · true: the simulator
    display: str = "auto"  # auto · window · headless
    policy: str = "keyboard"  # keyboard · scripted · random · idle · spin · walls · directory of a recording
    start: str = (
        ""  # where a dream starts: a shipped start's name, DIR or DIR:FRAME of a recording, a picture
    )
    frames: int = 0  # stop after so many; 0: when the player leaves
    seed: int = 0
    record: str = ""  # directory of the one session to write
    video: str = ""  # mp4 file of what was seen
    out: str = "runs/played"  # for recordings and screenshots made with keys
    scale: int = 6  # window pixels per frame pixel at the start
    smooth: bool = True  # smooth or integer scaling
    hud: bool = True
    fullscreen: bool = False
    device: str = "auto"
    precision: str = "auto"  # auto measures whether bfloat16 pays on this device · fp32 · bf16 · fp16 · fp8
    kernels: str = "auto"  # auto: Triton on GPUs, definitions on CPUs · reference · triton
    graph: bool = True  # on GPUs: a step as one CUDA graph
    threads: int = 1  # two take twice as long for a step this small; 0: torch decides

    def __post_init__(self) -> None:
        self.game = self.game.lower()  # YAML reads true as a truth value, which comes here as "True"
        if self.game not in ("dream", "true"):
            raise UserError(f"game must be dream or true, not {self.game!r}.")
        if self.display not in ("auto", "window", "headless"):
            raise UserError(f"display must be auto, window or headless, not {self.display!r}.")
        if min(self.frames, self.seed, self.threads) < 0 or self.scale < 1:
            raise UserError("frames, seed and threads must not be negative, and scale at least 1.")
        _check_arithmetic(self.precision, self.kernels)


def _check_arithmetic(precision: str, kernels: str) -> None:
    for name, value, known in (("precision", precision, PRECISIONS), ("kernels", kernels, KERNELS)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}.")


def load_config(program: str, schema: type, overrides: list[str]) -> Any:
    """Composes configs/{program}.yaml with command-line overrides into an instance of `schema`.

    Hydra's compose call is used instead of its main decorator, so that a mistake is one sentence (UserError)
    and no output folder appears. Unknown keys and wrong types are refused.
    """
    from pathlib import Path

    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(__file__).resolve().parent.parent / "configs"
    ConfigStore.instance().store(name=f"{program}_schema", node=schema)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose(program, overrides=overrides)
        return OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        if isinstance(cause, UserError):
            raise cause from None
        said = " ".join(str(error).split())
        raise UserError(f"The options {' '.join(overrides)!r} were not understood: {said}") from None
