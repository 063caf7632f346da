"""Prior `flow`: affine couplings between halves of the code (RealNVP, Dinh et al. 2017, arXiv:1605.08803), a player like another.

    z = f_L(… f_1(ε)), ε ~ N(0, I);  f_l: halves (a, b) to (b · e^{s_l(a)} + t_l(a), a);  ln p(z) = ln N(ε; 0, I) − Σ_l Σ s_l(a)

It begins as N(0, I). Its KL is sampled: the exact entropy of q and the cross-entropy of `draws` codes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Generator, Tensor, nn

from siv_core import Component, Gaussian, Spec, UserError, hookimpl, option, sampled_kl


@frozen
class FlowConfig:
    couplings: int = option(4, doc="L, an even number leaves no half as it was", ge=1, le=256)
    hidden: tuple[int, ...] = option((64, 64), doc="units of the perceptron of each coupling", ge=1, le=65536)
    draws: int = option(8, doc="S, codes an image that the KL is sampled with", ge=1, le=65536)
    most: float = option(2.0, doc="the largest |s|: a coupling stretches by no more than e to this", gt=0, le=10)


class Coupling(nn.Module):
    """s and t [N, d − h] of one half a [N, h]; 0 at first."""

    def __init__(self, given: int, moved: int, hidden: tuple[int, ...], most: float) -> None:
        super().__init__()
        widths = (given, *hidden)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        last = nn.Linear(widths[-1], 2 * moved)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.layers, self.most = nn.Sequential(*layers, last), most

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.layers(a).chunk(2, dim=1)
        return self.most * torch.tanh(s / self.most), t


class Flow(nn.Module):
    """Its own `Distribution`: the couplings hold all that it is."""

    def __init__(self, config: FlowConfig, dim: int) -> None:
        super().__init__()
        self.dim, self.draws = dim, config.draws
        sizes = [(dim - dim // 2, dim // 2)]  # of a and b, which change places
        for _ in range(config.couplings - 1):
            a, b = sizes[-1]
            sizes.append((b, a))
        self.couplings = nn.ModuleList(Coupling(a, b, config.hidden, config.most) for a, b in sizes)
        self.given = [a for a, _ in sizes]

    def realise(self, encode: Callable[..., Gaussian]) -> Flow:
        return self

    def draw_kl(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.draws, self.dim, generator=generator, device=generator.device)

    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        z = noise
        for coupling, h in zip(self.couplings, self.given, strict=True):
            a, b = z[:, :h], z[:, h:]
            s, t = coupling(a)
            z = torch.cat([b * torch.exp(s) + t, a], dim=1)
        return z

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        z = z.to(self.couplings[0].layers[0].weight.dtype)  # type: ignore[union-attr, index]
        stretched = z.new_zeros(len(z))
        for coupling, h in zip(reversed(self.couplings), reversed(self.given), strict=True):
            b, a = z[:, : self.dim - h], z[:, self.dim - h :]
            s, t = coupling(a)
            z = torch.cat([a, (b - t) * torch.exp(-s)], dim=1)
            stretched = stretched + s.sum(dim=1)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1) - stretched

    def kl(self, q: Gaussian, noise: Any, labels: Tensor | None = None) -> Tensor:
        return sampled_kl(self.log_prob, q, noise)

    def detach(self) -> Flow:
        """The same weights in memory, without gradients to them."""
        other = copy.copy(self)
        other._modules = {"couplings": detached(self.couplings)}
        return other


def detached(module: nn.Module) -> nn.Module:
    """The module over the same tensors, of which none takes a gradient."""
    other = copy.copy(module)
    other._parameters = {name: None if p is None else p.detach() for name, p in module._parameters.items()}  # type: ignore[misc]
    other._modules = {name: None if part is None else detached(part) for name, part in module._modules.items()}
    return other


def build(config: FlowConfig, dim: int, spec: Spec) -> Flow:
    if dim < 2:
        raise UserError(f"prior flow: couples halves of a code, this group has {dim} dimension: take standard_normal or mixture")
    return Flow(config, dim)


@hookimpl
def siv_components() -> list[Component]:
    summary = "normalising flow of affine couplings, which begins as N(0, I)"
    return [Component("prior", "flow", FlowConfig, build, summary, "arXiv:1605.08803")]
