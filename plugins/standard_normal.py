"""Prior `standard_normal`: N(0, I), without parameters and with a KL in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from siv_core import Component, Gaussian, Spec, hookimpl, kl_standard


@frozen
class NoOptions:
    pass


class StandardNormal(nn.Module):
    """Its own `Distribution`: the same in every phase."""

    def realise(self, encode: Callable[[Tensor], Gaussian]) -> StandardNormal:
        return self

    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return noise

    def truncated(self, noise: Tensor, psi: float, labels: Tensor | None = None) -> Tensor:
        return psi * noise

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)

    def kl(self, q: Gaussian, noise: Any, labels: Tensor | None = None) -> Tensor:
        return kl_standard(q)

    def detach(self) -> StandardNormal:
        return self


def build(config: NoOptions, dim: int, spec: Spec) -> StandardNormal:
    return StandardNormal()


@hookimpl
def siv_components() -> list[Component]:
    return [Component("prior", "standard_normal", NoOptions, build, "N(0, I), fixed")]
