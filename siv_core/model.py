"""A trained model: encode, decode, sample, reconstruct, interpolate, combine. No training code, no pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn

from siv_core import latents, losses
from siv_core.errors import UserError
from siv_core.latents import Codes, Gaussian, Posterior
from siv_core.players import Priors, make_nets, rows_of, slices, sources
from siv_core.protocols import Nets, Sources, Spec
from siv_core.seeding import Streams

BATCH = 256  # images that the networks see at once


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
        self._check(labels)
        with self._quiet() as nets:
            parts: list[Posterior] = [
                nets["encoder"](*(None if part is None else part.to(self.device) for part in rows_of((x, labels), rows)))
                for rows in _batches(len(x))
            ]
        return {group: Gaussian(*map(torch.cat, zip(*(q[group] for q in parts), strict=True))) for group in parts[0]}

    def decode(self, codes: Codes, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """Images of codes; `seed` matters only to decoders with noise of their own."""
        self._check(labels)
        n = len(next(iter(codes.values())))
        given = {group: code.to(self.device) for group, code in codes.items()}
        with self._quiet() as nets:
            noise = self._sources().decoder(n, Streams(seed, 0, self.device), "decoder")
            tree = (given, None if labels is None else labels.to(self.device), noise)
            return torch.cat([nets["decoder"](*rows_of(tree, rows)) for rows in _batches(n)])

    def sample(self, n: int, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """n images of the prior; the same seed gives the same images. A conditional model shows its classes in turn unless
        `labels` are given."""
        if labels is None and self.spec.conditional and self.spec.classes:
            labels = torch.arange(n) % self.spec.classes
        if labels is not None:
            labels = labels.to(self.device)
        with self._quiet() as nets:
            prior = nets["prior"](nets["encoder"])
            noise = self._sources().prior(n, Streams(seed, 0, self.device), "prior")
            codes = {group: p.sample(noise[group], labels) for group, p in prior.items()}
        return self.decode(codes, labels, seed)

    def reconstruct(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """D of the posterior means of x."""
        return self.decode(latents.means(self.encode(x, labels)), labels)

    def energy(self, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What x costs at its posterior mean: ‖x − D(mu)‖², and the KL to the prior of all groups in nats; each [N], float64.

        Their sum is −ELBO with betas of 1, as the density plots and the 2-D metrics of Soft-IntroVAE take it. `seed` matters only
        to priors with a sampled KL.
        """
        q = self.encode(x)
        rec = (x.to(self.device) - self.decode(latents.means(q))).double().square().flatten(1).sum(dim=1)
        wide = {group: Gaussian(mu.double(), logvar.double()) for group, (mu, logvar) in q.items()}  # exp(logvar) has room
        with self._quiet() as nets:
            noise = self._sources().kl(len(x), Streams(seed, 0, self.device), "kl")
            kl = losses.kl(wide, nets["prior"](nets["encoder"]), noise)
        return rec, losses.total(kl)

    def interpolate(self, x: Tensor, y: Tensor, steps: int, labels: Tensor | None = None) -> Tensor:
        """Images [steps, N, …] on straight lines between the posterior means of x and y, ends included."""
        a, b = latents.means(self.encode(x, labels)), latents.means(self.encode(y, labels))
        ways = torch.linspace(0, 1, steps, device=self.device)
        lines = [{group: torch.lerp(a[group], b[group], way) for group in a} for way in ways]
        return torch.stack([self.decode(codes, labels) for codes in lines])

    def combine(self, images: Mapping[str, Tensor]) -> Tensor:
        """Images whose code of each group is the posterior mean of `images[group]`; all have the same N."""
        return self.decode({group: self.encode(images[group])[group].mu for group in self.groups})

    def _check(self, labels: Tensor | None) -> None:
        if self.spec.conditional and labels is None:
            raise UserError("this model was trained with train.conditional: it takes a label for each image, and was given none")

    def _sources(self) -> Sources:
        return sources(self.groups, self.priors, self.decoder)


def _batches(n: int) -> Iterator[slice]:
    """Rows 0 … n − 1, `BATCH` at a time; one empty piece of none, so that shapes come out right."""
    return slices(slice(0, n), BATCH) if n else iter([slice(0, 0)])
