"""A Gaussian process that guesses a configuration's loss from what it does to weights.

The 1,050 fields of a configuration are not its inputs: their effect is. A level
costs a layer some squared error; the loss feels it by the layer's sensitivity.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel
from torch import Tensor

from lib.configuration import KINDS, LEVELS, Configuration, Layers, place
from lib.plans import level_errors
from lib.switchable import Switchable

DEPTHS = 6


NUMBERS = {level: i for i, level in enumerate(LEVELS)}


def numbers(plan: Configuration) -> Tensor:
    """(layers,) numbers of the plan's levels in LEVELS."""
    return torch.tensor([NUMBERS[level] for level in plan.levels])


def plan_of(layers: Layers, levels: Iterable[int]) -> Configuration:
    """The plan that has these `numbers`."""
    return Configuration(layers, tuple(LEVELS[i] for i in levels))


@dataclass(frozen=True)
class Features:
    """Inputs of the surrogate: the logarithm of the noise by kind, by depth and in all.

    A layer's noise at a level is sensitivity * squared error of the weights.
    The parts add up over layers, so a change of one layer costs one addition.

    Attributes:
        noise: (layers, 432) float64.
        cost: (layers, 432) float64, bits of a layer at a level over the weights of all.
        groups: (layers, features) 0 or 1: which sums a layer belongs to.
    """

    noise: Tensor
    cost: Tensor
    groups: Tensor

    @classmethod
    def of(cls, base: Switchable, sensitivity: Tensor) -> "Features":
        """Of a model, with the sensitivity of each of its layers."""
        places = [place(name) for name in base.layers.names]
        depth = 1 + max(block for block, _ in places)
        groups = torch.zeros(len(places), 1 + len(KINDS) + DEPTHS)
        for row, (block, kind) in zip(groups, places, strict=True):
            row[[0, 1 + KINDS.index(kind), 1 + len(KINDS) + block * DEPTHS // depth]] = 1
        sizes = torch.tensor(base.layers.sizes, dtype=torch.float64)
        bits = torch.tensor([level.bits_per_parameter for level in LEVELS], dtype=torch.float64)
        return cls((sensitivity[:, None] * level_errors(base, LEVELS)).double(),
                   bits * (sizes / sizes.sum())[:, None], groups[:, groups.any(0)].double())

    def sums(self, plans: Tensor) -> Tensor:
        """(n, layers) level numbers to (n, features) sums of noise."""
        return self.noise[torch.arange(len(self.noise)), plans] @ self.groups

    def bits(self, plans: Tensor) -> Tensor:
        """(n, layers) level numbers to (n,) bits a weight, exact."""
        return self.cost[torch.arange(len(self.cost)), plans].sum(1)


class Surrogate:
    """Gaussian process of the logarithm of the loss.

    Matern 5/2 on standardised features for what bends, a linear term for what
    goes on, white noise; the hyper-parameters are fitted from several starts.
    """

    def __init__(self, *, starts: int = 3, seed: int = 0) -> None:
        # A kernel of its own: one that two processes share is overwritten by the second.
        kernel = (ConstantKernel(1.0) * Matern(3.0, (0.1, 100.0), nu=2.5)
                  + ConstantKernel(1.0) * DotProduct(1.0, (0.01, 100.0))
                  + WhiteKernel(0.01, (1e-6, 1.0)))
        self.process = GaussianProcessRegressor(
            kernel, normalize_y=True, n_restarts_optimizer=starts - 1, random_state=seed)

    def fit(self, sums: Tensor, logs: Tensor) -> "Surrogate":
        """Fit on (n, features) sums of noise and (n,) logarithms of the loss."""
        inputs = sums.log()
        self.middle, self.scale = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
        with warnings.catch_warnings():
            # A hyper-parameter at its bound is an answer, too.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.process.fit(self._standard(sums), logs.double().numpy())
        return self

    def predict(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the logarithm of the loss, (n,) each, float64."""
        mean, spread = self.process.predict(self._standard(sums), return_std=True)
        return torch.from_numpy(mean), torch.from_numpy(spread)

    def _standard(self, sums: Tensor) -> np.ndarray:
        return ((sums.log() - self.middle) / self.scale).double().numpy()
