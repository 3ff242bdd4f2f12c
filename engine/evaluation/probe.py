"""WallProbe: decides from a picture whether a wall fills the view; fitted and tested on true frames."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .features import features

STEPS, DECAY = 60, 1e-3  # optimiser steps and weight decay of the fit, which is convex
FOLD = 4  # every fourth stretch of the true frames is for testing
STRETCH = 32  # consecutive frames in a stretch, as neighbours are alike


class WallProbe:
    """A logistic regression on the features of features.py. It is fitted on blurred copies of the frames,
    too, so that a soft picture of a room does not count as wall.
    """

    def __init__(self, frames: np.ndarray, walls: np.ndarray):
        """Fits it to true frames, uint8 (n, h, w, 3), in the order they were played, and whether a wall fills
        each, bool (n,).
        """
        tests = np.arange(len(frames)) // STRETCH % FOLD == FOLD - 1
        self._fit(frames[~tests], walls[~tests])
        said, true = self.fills(frames[tests]), walls[tests]
        both = [float((said[true == kind] == kind).mean()) for kind in (False, True) if (true == kind).any()]
        self.accuracy = float(np.mean(both)) if both else 0.0  # on the test frames, mean of both kinds
        self.share = float(walls.mean())  # of the true frames

    def _fit(self, frames: np.ndarray, walls: np.ndarray) -> None:
        points = features(np.concatenate([frames, _blurred(frames)]))
        kinds = torch.from_numpy(np.tile(walls, 2)).double()
        self.mean, self.deviation = points.mean(0), points.std(0).clamp_min(1e-6)
        inputs = (points - self.mean) / self.deviation
        self.weights = torch.zeros(points.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        share = kinds.mean().clamp(0.02, 0.98)
        weight = torch.where(kinds > 0.5, 0.5 / share, 0.5 / (1 - share))  # both kinds get the same weight
        optimiser = torch.optim.LBFGS([self.weights], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            scores = inputs @ self.weights[1:] + self.weights[0]
            loss = F.binary_cross_entropy_with_logits(scores, kinds, weight)
            loss = loss + DECAY * self.weights[1:].square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weights = self.weights.detach()

    def of(self, points: Tensor) -> np.ndarray:
        """Features (n, d) → whether a wall fills the picture, bool (n,)."""
        scores = (points - self.mean) / self.deviation @ self.weights[1:] + self.weights[0]
        return (scores > 0).numpy()

    def fills(self, frames: np.ndarray) -> np.ndarray:
        """Pictures uint8 (n, h, w, 3) → whether a wall fills each, bool (n,)."""
        return self.of(features(frames))


def _blurred(frames: np.ndarray) -> np.ndarray:
    """Pictures uint8 (n, h, w, 3), halved in resolution and enlarged again."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return soft.round().byte().permute(0, 2, 3, 1).numpy()
