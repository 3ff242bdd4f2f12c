"""The networks that a checkpoint's configs describe, made and loaded."""

from __future__ import annotations

from ..config import ModelConfig, WorldConfig
from .autoencoder import Autoencoder
from .checkpoint import Checkpoint
from .denoiser import Denoiser
from .state import StateModel
from .state_spec import StateSpec, features_width


def make_states(model: ModelConfig, world: WorldConfig) -> StateModel | None:
    """The predictor of a world's state with fresh weights; None for a world that tells none."""
    return StateModel(StateSpec.from_dict(model.state), len(world.keys)) if model.state else None


def make_denoiser(model: ModelConfig, world: WorldConfig) -> Denoiser:
    """The denoiser with fresh weights."""
    features = features_width(StateSpec.from_dict(model.state)) if model.state else 0
    return Denoiser(model.denoiser, len(world.keys), features, *model.autoencoder.latent_shape(world))


def load_autoencoder(checkpoint: Checkpoint) -> Autoencoder:
    """The autoencoder of a checkpoint with its weights."""
    return checkpoint.build("autoencoder", lambda: Autoencoder(checkpoint.model.autoencoder))


def load_states(checkpoint: Checkpoint) -> StateModel | None:
    """The state's predictor of a checkpoint with its weights; None where its world tells no state."""
    if not checkpoint.model.state:
        return None
    return checkpoint.build("states", lambda: make_states(checkpoint.model, checkpoint.world))


def load_denoiser(checkpoint: Checkpoint) -> Denoiser:
    """The denoiser of a checkpoint with its weights."""
    return checkpoint.build("denoiser", lambda: make_denoiser(checkpoint.model, checkpoint.world))
