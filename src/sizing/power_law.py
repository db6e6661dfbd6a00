"""The power law of loss against compute, fitted to a few runs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from src.common.errors import UserError


class Law(NamedTuple):
    """`loss = floor + scale * flops ** -exponent`."""

    floor: float
    scale: float
    exponent: float

    def loss(self, flops: Any) -> Any:
        """The loss of a number of FLOPs, or of an array of them."""
        return self.floor + self.scale * flops ** -self.exponent


def fit(flops: Sequence[float], losses: Sequence[float]) -> Law:
    """Fits the law of Henighan et al. 2020 (https://arxiv.org/abs/2010.14701) to the losses of compute-optimal runs.

    Tries 1000 floors from 0 to the lowest loss. For each, fits a line to the logarithms of FLOPs and of loss above the
    floor, and keeps the law nearest to the losses. Three constants need three points, and more to predict anything.
    """
    x, y = np.log(flops), np.asarray(losses)

    def law(floor: float) -> tuple[float, Law]:
        slope, intercept = np.polyfit(x, np.log(y - floor), 1)
        error = np.square(np.log(floor + np.exp(intercept + slope * x)) - np.log(y)).sum()
        return float(error), Law(float(floor), float(np.exp(intercept)), -float(slope))

    return min(map(law, np.linspace(0, y.min(), 1000, endpoint=False)))[1]


def flops_for(loss: float, flops: Sequence[float], losses: Sequence[float]) -> float:
    """The FLOPs that reach a loss, on the line through the two nearest of these runs, in logarithms.

    Runs whose loss a cheaper run has reached do not count. Raises UserError where fewer than two are left.
    """
    best: list[tuple[float, float]] = []  # logarithms of loss and FLOPs; the loss falls
    for x, y in sorted(zip(flops, losses)):
        if not best or math.log(y) < best[0][0]:
            best.insert(0, (math.log(y), math.log(x)))
    if len(best) < 2:
        raise UserError('--recipes: no larger run has a lower loss, so FLOPs cannot be compared; train longer: '
                        '--tokens_per_parameter')
    x, y = np.array(best).T
    i = int(np.clip(np.searchsorted(x, math.log(loss)), 1, len(x) - 1))
    return float(np.exp(y[i - 1] + (math.log(loss) - x[i - 1]) * (y[i] - y[i - 1]) / (x[i] - x[i - 1])))
