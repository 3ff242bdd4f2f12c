"""WorldModel: all networks of a generated world as one module, and its part that plays, the Generator."""

from __future__ import annotations

from torch import nn

from .autoencoder import Autoencoder
from .denoiser import Denoiser
from .state import StateModel
from .state_reader import StateReader


class Generator(nn.Module):
    """What makes the next latents from keys: the denoiser, and for a world that tells its state the network
    that predicts it (`states`) and the one that reads it off latents (`reader`), None where there is none.
    """

    def __init__(
        self, denoiser: Denoiser, states: StateModel | None = None, reader: StateReader | None = None
    ):
        super().__init__()
        self.denoiser, self.states, self.reader = denoiser, states, reader


class WorldModel(nn.Module):
    """A generated world: frames to latents and back, and what makes the next latents from keys."""

    def __init__(self, autoencoder: Autoencoder, generator: Generator):
        super().__init__()
        self.autoencoder, self.generator = autoencoder, generator

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names under which checkpoints know them."""
        generator = self.generator
        named = {"autoencoder": self.autoencoder, "states": generator.states}
        named |= {"reader": generator.reader, "denoiser": generator.denoiser}
        return {name: part for name, part in named.items() if part is not None}
