"""A trained model: encode, decode, sample, reconstruct, interpolate, combine. No training code, no pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn

from siv_core import latents
from siv_core.latents import Codes, Posterior
from siv_core.players import Priors, make_nets, sources
from siv_core.protocols import Nets, Sources, Spec
from siv_core.seeding import Streams


@frozen(eq=False)
class Model:
    """Networks in evaluation mode. Images go in and come out as floats of `spec.value_range`, [N, *spec.shape]."""

    encoder: nn.Module
    decoder: nn.Module
    priors: Priors
    spec: Spec
    groups: dict[str, int]  # latent group -> dimensions
    translate: tuple[str, str] | None  # (class group, content group) where there are two such
    device: torch.device
    logvar_bound: float | None = None
    name: str = ""  # which checkpoint and weights these are

    @property
    def nets(self) -> Nets:
        modules = {"encoder": self.encoder, "decoder": self.decoder, "prior": self.priors}
        return make_nets(modules, torch.sub, self.logvar_bound)

    @contextmanager
    def _quiet(self) -> Iterator[Nets]:
        players = (self.encoder, self.decoder, self.priors)
        modes = [player.training for player in players]
        for player in players:
            player.eval()
        try:
            with torch.no_grad():
                yield self.nets
        finally:
            for player, mode in zip(players, modes, strict=True):
                player.train(mode)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Posterior:
        """The posterior of images: {group: (mu, logvar)}."""
        with self._quiet() as nets:
            q: Posterior = nets["encoder"](x.to(self.device), labels)
            return q

    def decode(self, codes: Codes, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """Images of codes; `seed` matters only to decoders with noise of their own."""
        with self._quiet() as nets:
            n = len(next(iter(codes.values())))
            noise = self._sources().decoder(n, Streams(seed, 0, self.device)("decoder"))
            x: Tensor = nets["decoder"](codes, labels, noise)
            return x

    def sample(self, n: int, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """n images of the prior; the same seed gives the same images."""
        with self._quiet() as nets:
            prior = nets["prior"](nets["encoder"])
            noise = self._sources().prior(n, Streams(seed, 0, self.device)("prior"))
            codes = {group: p.sample(noise[group], labels) for group, p in prior.items()}
        return self.decode(codes, labels, seed)

    def reconstruct(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """D of the posterior means of x."""
        return self.decode(latents.means(self.encode(x, labels)), labels)

    def interpolate(self, x: Tensor, y: Tensor, steps: int) -> Tensor:
        """Images [steps, N, …] on straight lines between the posterior means of x and y, ends included."""
        a, b = latents.means(self.encode(x)), latents.means(self.encode(y))
        ways = torch.linspace(0, 1, steps, device=self.device)
        return torch.stack([self.decode({group: torch.lerp(a[group], b[group], way) for group in a}) for way in ways])

    def combine(self, images: Mapping[str, Tensor]) -> Tensor:
        """Images whose code of each group is the posterior mean of `images[group]`; all have the same N."""
        return self.decode({group: self.encode(images[group])[group].mu for group in self.groups})

    def _sources(self) -> Sources:
        return sources(self.groups, self.priors, self.decoder)
