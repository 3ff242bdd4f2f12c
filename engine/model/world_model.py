"""Generator: the networks that make the next latents from keys. WorldModel: these and the autoencoder."""

from __future__ import annotations

from torch import nn

from .autoencoder import Autoencoder
from .denoiser import Denoiser
from .state import StateModel
from .state_reader import StateReader


class Generator(nn.Module):
    """The networks that make the next latents from keys: the denoiser; in a world with state, also the
    network that predicts it (`states`), and the one that reads it off latents (`reader`); else None.
    """

    def __init__(
        self, denoiser: Denoiser, states: StateModel | None = None, reader: StateReader | None = None
    ):
        super().__init__()
        self.denoiser, self.states, self.reader = denoiser, states, reader


class WorldModel(nn.Module):
    """All networks of a generated world."""

    def __init__(self, autoencoder: Autoencoder, generator: Generator):
        super().__init__()
        self.autoencoder, self.generator = autoencoder, generator

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names under which checkpoints know them."""
        generator = self.generator
        named = {"autoencoder": self.autoencoder, "states": generator.states}
        named |= {"reader": generator.reader, "denoiser": generator.denoiser}
        return {name: part for name, part in named.items() if part is not None}
