"""Makes the networks that a model's config describes, and loads them from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict

from ..config import ModelConfig, UserError, WorldConfig
from .autoencoder import Autoencoder
from .checkpoint import Checkpoint
from .denoiser import Denoiser
from .scene import SceneModel
from .state import StateModel
from .state_reader import StateReader
from .state_spec import StateSpec, features_width, scene_columns
from .world_model import Generator, WorldModel

# most numbers in the KV cache of one game (8 GiB). No weight's shape depends on the context's length, so a
# damaged header could ask for any
REMEMBERED = 2**31
COMPARED = 2**29  # most pairs of tokens in the attention over a game's start (2 GiB)


def spec_of(model: ModelConfig) -> StateSpec | None:
    """The numbers of the world's state; None without one."""
    return StateSpec.from_dict(asdict(model.state)) if model.state.names else None


def make_states(model: ModelConfig, world: WorldConfig) -> StateModel | None:
    """The state's predictor with fresh weights; None for a world without state."""
    spec = spec_of(model)
    return StateModel(spec, len(world.keys)) if spec else None


def make_reader(model: ModelConfig, world: WorldConfig) -> StateReader | None:
    """The reader (latents → state) with fresh weights; None for a world without state."""
    spec = spec_of(model)
    return StateReader(*model.autoencoder.latent_shape(world), spec) if spec else None


def make_denoiser(model: ModelConfig, world: WorldConfig) -> Denoiser:
    """The denoiser with fresh weights."""
    spec = spec_of(model)
    features = features_width(spec) if spec else 0
    shape, known_by = model.autoencoder.latent_shape(world), scene_columns(spec) if spec else ()
    return Denoiser(model.denoiser, len(world.keys), features, *shape, known_by)


def make_scene(model: ModelConfig, world: WorldConfig) -> SceneModel | None:
    """The scene (state → latents) with fresh weights; None for a world whose state does not determine one."""
    spec = spec_of(model)
    columns = scene_columns(spec) if spec else ()
    if not columns:
        return None
    return SceneModel(columns, *model.autoencoder.latent_shape(world), model.denoiser.scene_width)


def load_autoencoder(checkpoint: Checkpoint) -> Autoencoder:
    """The autoencoder of a checkpoint. Raises UserError as Checkpoint.build does."""
    return checkpoint.build("autoencoder", lambda: Autoencoder(checkpoint.model.autoencoder))


def load_states(checkpoint: Checkpoint) -> StateModel | None:
    """The state's predictor of a checkpoint; None for a world without state. UserError as
    Checkpoint.build.
    """
    if spec_of(checkpoint.model) is None:
        return None
    return checkpoint.build("states", lambda: make_states(checkpoint.model, checkpoint.world))


def load_reader(checkpoint: Checkpoint) -> StateReader | None:
    """The reader of a checkpoint; None where it has none. Raises UserError as Checkpoint.build does."""
    if "reader" not in checkpoint.modules:
        return None
    return checkpoint.build("reader", lambda: make_reader(checkpoint.model, checkpoint.world))


def load_scene(checkpoint: Checkpoint) -> SceneModel | None:
    """The scene of a checkpoint, a network of its own or part of the denoiser; None where there is neither.
    Raises UserError as Checkpoint.build does.
    """
    if "scene" in checkpoint.modules:
        return checkpoint.build("scene", lambda: make_scene(checkpoint.model, checkpoint.world))
    return load_denoiser(checkpoint).condition.scene if "denoiser" in checkpoint.modules else None


def load_denoiser(checkpoint: Checkpoint) -> Denoiser:
    """The denoiser of a checkpoint. Raises UserError as Checkpoint.build does, and for an impossible
    context.
    """
    denoiser = checkpoint.build("denoiser", lambda: make_denoiser(checkpoint.model, checkpoint.world))
    c = denoiser.config
    frames = c.context_frames + c.sink_frames + c.window_frames
    keys = frames * denoiser.transformer.tokens
    if 2 * c.layers * keys * c.width > REMEMBERED or keys**2 > COMPARED:
        said = f"The network in {checkpoint.path} would remember {frames} frames of a game"
        raise UserError(f"{said}, which fit into no memory; its header is damaged: copy it again.")
    return denoiser


def load_generator(checkpoint: Checkpoint, state: bool = True) -> Generator:
    """The generator of a checkpoint; with `state` False as for a world without state."""
    denoiser = load_denoiser(checkpoint)
    return (
        Generator(denoiser, load_states(checkpoint), load_reader(checkpoint))
        if state
        else Generator(denoiser)
    )


def load_world_model(checkpoint: Checkpoint, state: bool = True) -> WorldModel:
    """All networks of a checkpoint needed for play; with `state` False as for a world without state."""
    return WorldModel(load_autoencoder(checkpoint), load_generator(checkpoint, state))
