"""Reconstruction losses on values: `mse`, `l1`, `bce`. Each sums over C·H·W and returns one number a sample."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from siv_core import Component, Spec, UserError, hookimpl


@frozen
class NoOptions:
    pass


@frozen
class PowerLoss:
    """Σ |x − y|^power, [N]; no ½ and no mean, as in Soft-IntroVAE's code. Its `power` makes a likelihood of it: see
    `siv_core.losses.log_normaliser`."""

    power: int  # 2: a Gaussian's; 1: a Laplace distribution's

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        difference = x - y
        return (difference.square() if self.power == 2 else difference.abs()).flatten(1).sum(dim=1)


mse, l1 = PowerLoss(2), PowerLoss(1)


def bce(x: Tensor, y: Tensor) -> Tensor:
    """Σ −x log y − (1 − x) log(1 − y), [N]; y is a probability, logs are clamped at −100."""
    return F.binary_cross_entropy(y, x, reduction="none").flatten(1).sum(dim=1)


def build_bce(config: NoOptions, spec: Spec) -> Callable[[Tensor, Tensor], Tensor]:
    if spec.value_range != (0.0, 1.0):
        low, high = spec.value_range
        raise UserError(f"reconstruction 'bce' needs data in [0, 1], this data is in [{low:g}, {high:g}]: use mse or l1")
    return bce


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component("reconstruction", "mse", NoOptions, lambda config, spec: mse, "sum of squared differences"),
        Component("reconstruction", "l1", NoOptions, lambda config, spec: l1, "sum of absolute differences"),
        Component("reconstruction", "bce", NoOptions, build_bce, "sum of binary cross-entropies, for data and outputs in [0, 1]"),
    ]
