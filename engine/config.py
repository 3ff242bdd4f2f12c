"""Every config as a dataclass with defaults and checks; `load_config` alone knows Hydra."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from .bounds import Checked, count, number, share, short_seed
from .errors import UserError
from .options import build, lay, split_texts
from .shipped import shipped
from .stage_config import TRAINED, StageConfig, StagesConfig

POLICIES = ("keyboard", "explore", "scripted", "random", "taps", "idle", "spin", "walls")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8")
KERNELS = ("auto", "reference", "triton")
SLOWEST, FASTEST = 0.01, 1000  # frames a second
KEYS = 1024  # of a world, at most

STAGES = ("all", "collect", *TRAINED, "pack", "evaluate", "ablate", "precision")


@dataclass
class WorldConfig(Checked):
    """A true game: which simulator, how it is drawn, and which keys it has."""

    section = "world"

    name: str = "doom_gathering"
    kind: str = "doom"  # doom: a ViZDoom scenario · gym: any Gymnasium environment that renders RGB
    scenario: str = ""  # doom: file among those that ship with ViZDoom, without .cfg
    map: str = ""  # doom: map name where the scenario has several
    id: str = ""  # gym: environment id, also in the form module:Env-v0
    height: int = count(96, most=4096)
    width: int = count(128, most=4096)
    tics: int = count(2, most=1000)  # simulator steps per frame
    fps: float = number(17.5, least=0, most=FASTEST)  # frames a second; gym: 0 takes the environment's own
    episode_frames: int = count(1050)  # an episode ends here at the latest
    # action name → scancode names (SDL), in action order
    keys: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("doom", "gym"):
            raise UserError(f"world.kind must be doom or gym, not {self.kind!r}.")
        if set("/\\") & set(self.name):  # files are called by it
            raise UserError(f"world.name must be without slashes, not {self.name!r}.")
        if self.height % 32 or self.width % 32:
            raise UserError(f"A frame's sides must be multiples of 32, not {self.width}x{self.height}.")
        if self.fps < SLOWEST and not (self.fps == 0 and self.kind == "gym"):
            raise UserError(f"world.fps must be at least {SLOWEST}, or 0 for kind gym, not {self.fps}.")


@dataclass
class AutoencoderConfig(Checked):
    """Frames ↔ latents, each frame alone. Every width halves the resolution: three make a factor of 8."""

    section = "model.autoencoder"

    channels: int = count(8, most=4096)  # of the latents
    widths: list[int] = number([32, 64, 128], least=1, most=4096)  # from half a frame's resolution on
    depth: int = count(2, 0, 4096)  # residual layers at the coarsest level

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.widths) <= 8:
            raise UserError(f"model.autoencoder.widths must be one to eight widths, not {len(self.widths)}.")

    def latent_shape(self, world: WorldConfig) -> tuple[int, int, int]:
        """(channels, rows, columns) of one frame's latents."""
        factor = 2 ** len(self.widths)
        return self.channels, world.height // factor, world.width // factor


@dataclass
class DenoiserConfig(Checked):
    """The diffusion transformer over frame tokens and the geometry of its rolling window."""

    section = "model.denoiser"

    width: int = count(256, 4, 4096)
    layers: int = count(3, most=4096)
    head_dim: int = count(64, 4, 4096)
    mlp_ratio: int = count(4, most=64)
    patch: int = count(4, most=4096)  # latents per token side
    conv_width: int = count(64, most=4096)  # channels of the convolutions around the tokens
    conv_in_layers: int = count(2, 0, 4096)
    conv_out_layers: int = count(7, 0, 4096)
    field_channels: int = count(8, most=4096)  # of the input that keys and state draw by themselves
    scene_width: int = count(256, most=4096)  # of the network that knows what is to be seen where
    action_history: int = count(16, most=4096)  # frames whose keys a frame knows, its own included
    window_frames: int = count(3, most=4096)  # in flight
    context_frames: int = count(8, most=4096)  # finished ones remembered
    sink_frames: int = count(1, 0, 4096)  # first ones remembered for ever; 0: none
    ladder: list[float] = number([0.5, 0.8, 1.0], above=0, most=1)  # oldest to newest
    correction: float = share(0.9)  # level to which the leaving frame is sent back when keys change; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.head_dim or self.head_dim % 4:
            said = f"model.width {self.width} must be a multiple of head_dim {self.head_dim}"
            raise UserError(f"{said}, that of 4.")
        ladder = list(self.ladder)
        if len(ladder) != self.window_frames or sorted(set(ladder)) != ladder or ladder[-1:] != [1]:
            said = f"The ladder needs {self.window_frames} ascending levels that end at 1"
            raise UserError(f"{said}, not {ladder}.")

    @property
    def known_frames(self) -> int:
        """How many true frames a game begins with: all that its next frame knows of those before it."""
        return max(self.sink_frames + self.context_frames, self.action_history)


@dataclass
class StateConfig(Checked):
    """What a world tells of itself, as recordings have it (model/state_spec.py); empty: nothing."""

    section = "model.state"

    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    pictured: list[str] = field(default_factory=list)


@dataclass
class ModelConfig(Checked):
    """All that must be known to rebuild the networks; travels inside the checkpoint."""

    section = "model"

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    state: StateConfig = field(default_factory=StateConfig)


@dataclass
class TrainConfig(Checked):
    """`train.py`'s options."""

    stage: str = "denoiser"
    preset: str = "laptop"
    world: WorldConfig = field(default_factory=WorldConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    data: str = "runs/data"  # directory of recordings
    out: str = "runs/model"  # checkpoints, metrics and pictures
    checkpoint: str = ""  # evaluate: which one; empty takes out's newest
    weights: str = ""  # training: checkpoint whose weights a stage starts from; empty starts from nothing
    variants: list[str] = field(default_factory=list)  # ablate: which ones; empty: all
    row: str = ""  # ablate: what the row of another checkpoint is called
    routes: str = ""  # evaluate: file of routes; empty takes the one that ships for the world, or draws some
    state: bool = True  # evaluate: the network may use what it knows of the world's state
    unseen: bool = False  # evaluate without a simulator: all of data is new, not only what training held out
    quick: bool = False  # evaluate: games of a minute, under three minutes on two cores; ablate: fewer
    frames: int = count(200_000, 0)  # collect: how many; evaluate: frames per game
    workers: int = count(0, 0, 1024)  # collect: processes; 0 takes one per core
    lossless: bool = False  # collect: store pixels exactly
    starts: list[str] = field(default_factory=list)  # pack: where games start, DIR:FRAME of recordings
    again: bool = False  # train anew what was made from something else than what is there now; pack: replace
    seed: int = 0  # of any size or sign
    device: str = "auto"
    threads: int = count(0, 0, 1024)  # torch threads; 0 leaves torch's default
    precision: str = "auto"  # auto: whether bfloat16 pays here is measured · fp32 · bf16 · in play fp16, fp8
    kernels: str = "auto"  # auto: Triton on GPUs, definitions on CPUs · reference · triton
    max_minutes: float = number(0.0, least=0, most=1e6)  # 0 takes the stage's own
    steps: int = count(0, 0)  # 0 takes the stage's own
    log_every: int = count(20)
    save_minutes: float = number(3.0, least=0, most=1e6)
    picture_minutes: float = number(5.0, least=0, most=1e6)
    tensorboard: bool = False
    given: list[str] = field(default_factory=list)  # load_config's: the options of the command line, by name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise UserError(f"There is no stage {self.stage!r}; choose one of {', '.join(STAGES)}.")
        _check_arithmetic(self.precision, self.kernels)
        self.seed = short_seed(self.seed)
        if self.precision in ("fp16", "fp8") and self.stage in ("all", "collect", *TRAINED):
            raise UserError(f"precision={self.precision} is for play and evaluation; train in bf16.")

    def stage_config(self) -> StageConfig:
        """The stage's own config with the options given on the command line laid over it."""
        own: StageConfig = getattr(self.stages, self.stage)
        minutes = self.max_minutes or own.max_minutes
        if not minutes:
            raise UserError(f"preset={self.preset} has no stage {self.stage}; give it max_minutes=M.")
        return replace(own, max_minutes=minutes, steps=self.steps or own.steps)


@dataclass
class PlayConfig(Checked):
    """`play.py`'s options."""

    checkpoint: str = "assets/doom_gathering.safetensors"
    world: WorldConfig = field(default_factory=WorldConfig)  # of game=true; a dream's is in its checkpoint
    game: str = "dream"  # dream: the network · true: the simulator
    display: str = "auto"  # auto · window · headless
    policy: str = "keyboard"  # keyboard · one of POLICIES · directory of a recording
    start: str = ""  # of a dream: name of one that ships, DIR or DIR:FRAME of a recording, a picture
    frames: int = count(0, 0)  # stop after so many; 0: when the player leaves
    seed: int = 0  # of any size or sign
    record: str = ""  # directory of the one session to write
    video: str = ""  # mp4 file of what was seen
    out: str = "runs/played"  # for recordings and screenshots made with keys
    scale: int = count(6, most=64)  # window pixels per frame pixel at the start
    smooth: bool = True  # smooth or integer scaling
    hud: bool = True
    fullscreen: bool = False
    device: str = "auto"
    precision: str = "auto"  # auto measures whether bfloat16 pays on this device · fp32 · bf16 · fp16 · fp8
    kernels: str = "auto"  # auto: Triton on GPUs, definitions on CPUs · reference · triton
    graph: bool = True  # on GPUs: a step as one CUDA graph
    threads: int = count(2, 0, 1024)  # of as many cores as there are; more gain little; 0: torch decides

    def __post_init__(self) -> None:
        super().__post_init__()
        self.game = self.game.lower()
        if self.game not in ("dream", "true"):
            raise UserError(f"game must be dream or true, not {self.game!r}.")
        if self.display not in ("auto", "window", "headless"):
            raise UserError(f"display must be auto, window or headless, not {self.display!r}.")
        _check_arithmetic(self.precision, self.kernels)


def _check_arithmetic(precision: str, kernels: str) -> None:
    for name, value, known in (("precision", precision, PRECISIONS), ("kernels", kernels, KERNELS)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}.")


def _names(word: str, texts: Collection[str]) -> list[str]:
    """The full names of the options in a word of the command line, of which `texts` are texts:
    model={denoiser:{layers:5}} gives model.denoiser.layers.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def inside(name: str, value: Any) -> list[str]:
        if not isinstance(value, dict) or not value:
            return [name]
        return [found for key, part in value.items() for found in inside(f"{name}.{key}", part)]

    name = word.partition("=")[0]
    if name in texts:
        return [name.lstrip("+")]
    parsed = OverridesParser.create().parse_override(word)
    return inside(parsed.key_or_group, parsed.value())


def load_config(program: str, schema: type, words: list[str]) -> Any:
    """Composes configs/{program}.yaml with the command line's `name=value` into an instance of `schema`.

    Text is taken as it stands (options.py), all else is in Hydra's grammar. Hydra's compose call is used
    instead of its main decorator, so that a mistake is one sentence (UserError) and no output folder appears.
    Unknown keys and wrong types are refused.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = shipped("configs")
    ConfigStore.instance().store(name=f"{program}_schema", node=schema)
    texts, overrides = split_texts(schema, words, folder)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            values = OmegaConf.to_container(compose(program, overrides=overrides), resolve=True)
        given = [name for word in words for name in _names(word, texts)]
    except (HydraException, OmegaConfBaseException) as error:
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise UserError(f"The options {' '.join(overrides)!r} were not understood: {said}") from None
    made = build(schema, lay(texts, values))
    if hasattr(made, "given"):
        made.given = given
    return made
