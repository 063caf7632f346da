"""A trained model: encode, decode, sample, reconstruct, interpolate, combine; likelihoods. No training code, no pickles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from siv_core import inputs, latents, losses
from siv_core.errors import UserError
from siv_core.latents import Codes, Gaussian, Posterior
from siv_core.losses import Betas
from siv_core.nets import Priors, make_nets, rows_of, slices, sources
from siv_core.protocols import Distribution, Nets, Sources, Spec
from siv_core.seeding import Streams, stream_seed

BATCH = 256  # images that the networks see at once
MEAN_OF = 4096  # samples of the prior whose mean style a truncation goes to


@frozen(eq=False)
class Model:
    """Networks in evaluation mode. Images go in and come out as floats of `spec.value_range`, [N, *spec.shape].

    The modules are those it was given: a training may go on with them. Nothing here changes a weight or a buffer of theirs.
    """

    encoder: nn.Module
    decoder: nn.Module
    priors: Priors
    spec: Spec
    groups: dict[str, int]  # latent group -> dimensions
    translate: tuple[str, str] | None  # (class group, content group) where there are two such
    device: torch.device
    reconstruction: Callable[[Tensor, Tensor], Tensor] | None = None  # the loss it was trained with, (x, y) -> [N]
    logvar_bound: float | None = None
    batch_statistics: int = 0  # samples of a batch whose statistics its networks took in training; 0: they took none
    name: str = ""  # which checkpoint and weights these are
    training: bool = False
    noise: bool = True  # False: decoders that have noise of their own get none, and nothing of what they show is random
    betas: Betas | None = None  # of the objective it was trained with; None where that tells none

    @property
    def decoder_beta(self) -> float | None:
        """`Betas.decoder` of the objective it was trained with; None where that is not known."""
        return self.betas.decoder if self.betas else None

    @property
    def nets(self) -> Nets:
        modules = {"encoder": self.encoder, "decoder": self.decoder, "prior": self.priors}
        return make_nets(modules, self.reconstruction or torch.sub, self.logvar_bound)

    def without_noise(self) -> Model:
        """The same model with a decoder that gets no noise of its own: nothing of what it shows is random."""
        if not hasattr(self.decoder, "draw"):
            raise UserError("noise: this model's decoder has none of its own: leave out --no-noise")
        return evolve(self, noise=False)

    def in_training_mode(self) -> Model:
        """Copies of its networks that take the statistics of the batch they see, at most `BATCH` images, as in training."""
        copies = copy.deepcopy(self.encoder), copy.deepcopy(self.decoder), copy.deepcopy(self.priors)
        for module in (part for network in copies for part in network.modules()):
            if hasattr(module, "alone"):  # it shares its statistics with other processes, which do not use this model
                module.alone()  # type: ignore[operator]
        return evolve(self, encoder=copies[0], decoder=copies[1], priors=copies[2], training=True)

    @contextmanager
    def _quiet(self) -> Iterator[Nets]:
        players = (self.encoder, self.decoder, self.priors)
        modes = [player.training for player in players]
        for player in players:
            player.train(self.training)
        try:
            with torch.no_grad():
                yield self.nets
        finally:
            for player, mode in zip(players, modes, strict=True):
                player.train(mode)

    @contextmanager
    def differentiable(self) -> Iterator[Nets]:
        """Its networks as objectives call them, in evaluation mode and with gradients of what is given to them; weights and
        buffers stay as they are."""
        with self._quiet() as nets, torch.enable_grad():
            yield nets

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Posterior:
        """The posterior of images: {group: (mu, logvar)}."""
        inputs.images(x, self.spec, self._dtype)
        inputs.labels(labels, len(x), self.spec)
        with self._quiet() as nets:
            parts: list[Posterior] = [
                nets.encoder(*(None if part is None else part.to(self.device) for part in rows_of((x, labels), rows)))
                for rows in _batches(len(x))
            ]
        return {group: Gaussian(*map(torch.cat, zip(*(q[group] for q in parts), strict=True))) for group in parts[0]}

    def decode(self, codes: Codes, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """Images of codes {group: [N, d]}; `seed` matters only to decoders with noise of their own.

        Of posteriors give `siv_core.latents.means(q)`, or use `reconstruct`.
        """
        return torch.cat(list(self._decoded(codes, labels, seed)))

    def _decoded(self, codes: Codes, labels: Tensor | None, seed: int, psi: float = 1.0) -> Iterator[Tensor]:
        """`BATCH` images at a time, each batch with noise of its own; with styles at the share psi of their way from the mean."""
        n = self._check_codes(codes, labels)
        inputs.count(seed, "seed", 0)
        tree = self._placed(codes, labels)
        if psi != 1:
            means = self._mean_styles(labels)
            decoder: Any = self.decoder
            yield from self._rendered(
                lambda rows: latents.truncated(decoder.styles(*rows_of(tree, rows)), means, psi, rows_of(labels, rows)), n, seed
            )
            return
        for number, rows in enumerate(_batches(n)):
            with self._quiet() as nets:
                images = nets.decoder(*rows_of(tree, rows), self._noise(rows, number, seed))
            yield images

    def _check_codes(self, codes: Codes, labels: Tensor | None) -> int:
        inputs.codes(codes, self.groups, self._dtype)
        n = len(next(iter(codes.values())))
        inputs.labels(labels, n, self.spec)
        return n

    def _placed(self, codes: Codes, labels: Tensor | None) -> tuple[Codes, Tensor | None]:
        given = {group: code.to(self.device) for group, code in codes.items()}
        return given, None if labels is None else labels.to(self.device)

    def _noise(self, rows: slice, number: int, seed: int) -> Any:
        if not self.noise:
            return None
        return self._sources().decoder(rows.stop - rows.start, Streams(seed, number, self.device), "decoder", "model")

    # -- of decoders with styles -------------------------------------------------------------------------------------------------

    @property
    def has_styles(self) -> bool:
        """Whether its decoder goes by way of styles: see `protocols.Decoder`."""
        return hasattr(self.decoder, "styles")

    def styles(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        """What the decoder's layers are given for codes {group: [N, d]}: [N, layers, d], coarse to fine."""
        n = self._check_codes(codes, labels)
        if not self.has_styles:
            raise UserError("styles: this model's decoder has none")
        decoder: Any = self.decoder
        tree = self._placed(codes, labels)
        with self._quiet():
            return torch.cat([decoder.styles(*rows_of(tree, rows)) for rows in _batches(n)])

    def sample_styles(self, n: int, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """Styles [n, layers, d] of the images of `sample`."""
        return self.styles(*self.sample_codes(n, seed, labels))

    def render(self, styles: Tensor, seed: int = 0) -> Tensor:
        """Images of styles [N, layers, d]; `decode` is `render` of `styles`."""
        return torch.cat(list(self._rendered(lambda rows: styles[rows].to(self.device), len(styles), seed)))

    def _rendered(self, styles: Callable[[slice], Tensor], n: int, seed: int) -> Iterator[Tensor]:
        decoder: Any = self.decoder
        for number, rows in enumerate(_batches(n)):
            with self._quiet():
                images = decoder.render(styles(rows), self._noise(rows, number, seed))
            yield images

    def truncated(self, styles: Tensor, psi: float, labels: Tensor | None = None) -> Tensor:
        """Styles whose coarse layers are at the share psi of their way from the mean style (Karras et al. 2019, section 3.2),
        that of 4,096 samples of the prior, of each label where there are some, by the weights as they are."""
        return latents.truncated(styles, self._mean_styles(labels), psi, labels)

    def _mean_styles(self, labels: Tensor | None) -> dict[int | None, Tensor]:
        """{label: mean styles [K, d] of the coarse layers, those that truncation is of}."""
        classes = [None] if labels is None else sorted(set(labels.tolist()))
        of = {label: None if label is None else torch.full((MEAN_OF,), label) for label in classes}
        coarse = self.decoder.truncated_layers
        return {label: self.sample_styles(MEAN_OF, 0, of[label]).mean(dim=0)[:coarse] for label in classes}

    def sample(self, n: int, seed: int = 0, labels: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """n images of the prior; the same seed gives the same images. A conditional model shows its classes in turn unless
        `labels` are given.

        `truncation`: each code at this share psi (0 … 1) of its way from the mean of its prior, psi · z of a standard normal one,
        or, of a decoder with styles, each style from their mean: fewer kinds of images, and more usual ones. A `UserError` where
        there are no styles and a prior offers none.
        """
        return torch.cat(list(self._sampled(n, seed, labels, truncation)))

    def sample_classes(self, n: int, seed: int = 0, classes: Sequence[int] | None = None, truncation: float = 1.0) -> Tensor:
        """[K, n, …]: n images of each class (all of them by default), of the same noise in every class: `sample` of one label
        and this seed."""
        inputs.count(n, "n", 0)
        if not self.spec.conditional:
            raise UserError("classes: this model takes none: it was trained without train.conditional")
        shown = range(self.spec.classes or 0) if classes is None else classes
        if not len(shown):
            raise UserError("classes: there is none, expected one at least")
        return torch.stack([self.sample(n, seed, torch.full((n,), label), truncation) for label in shown])

    def samples(
        self, n: int, batch: int = BATCH, seed: int = 0, labels: Tensor | None = None, truncation: float = 1.0
    ) -> Iterator[Tensor]:
        """The images of `sample`, `batch` at a time: the memory they take does not grow with n, but for the codes [n, d]."""
        inputs.count(batch, "batch", 1)
        waiting: list[Tensor] = []
        there = 0
        for images in self._sampled(n, seed, labels, truncation):
            waiting.append(images)
            there += len(images)
            if there >= batch:
                pieces = list(torch.cat(waiting).split(batch))
                there %= batch
                waiting = [pieces.pop()] if there else []
                yield from pieces
        if waiting:
            yield torch.cat(waiting)

    def _sampled(self, n: int, seed: int, labels: Tensor | None, psi: float) -> Iterator[Tensor]:
        of_codes, of_styles = (1.0, psi) if self.has_styles else (psi, 1.0)
        inputs.share(psi, "truncation")
        codes, of = self.sample_codes(n, seed, labels, of_codes)
        yield from self._decoded(codes, of, seed, of_styles)

    def prior(self) -> dict[str, Distribution]:
        """The priors as they stand, {group: Distribution}, without gradients."""
        with self._quiet() as nets:
            return nets.prior(frozen=True)

    def sample_codes(self, n: int, seed: int = 0, labels: Tensor | None = None, psi: float = 1.0) -> tuple[Codes, Tensor | None]:
        """Codes of the images of `sample`, and their labels where the model takes some."""
        inputs.count(n, "n", 0)
        inputs.count(seed, "seed", 0)
        inputs.share(psi, "truncation")
        if labels is None and self.spec.conditional and self.spec.classes:
            labels = torch.arange(n) % self.spec.classes
        inputs.labels(labels, n, self.spec)
        if labels is not None:
            labels = labels.to(self.device)
        with self._quiet() as nets:
            noise = self._sources().prior(n, Streams(seed, 0, self.device), "prior")
            priors = nets.prior(frozen=True)
            without = [group for group, p in priors.items() if psi != 1 and not hasattr(p, "truncated")]
            if without:
                raise UserError(f"truncation: the prior of {', '.join(without)} offers none; leave it at 1")
            if psi == 1:
                return {group: p.sample(noise[group], labels) for group, p in priors.items()}, labels
            return {group: p.truncated(noise[group], float(psi), labels) for group, p in priors.items()}, labels

    def reconstruct(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """D of the posterior means of x."""
        return self.decode(latents.means(self.encode(x, labels)), labels)

    def energy(self, x: Tensor, labels: Tensor | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What x costs at its posterior mean: ‖x − D(mu)‖², and the KL to the prior of all groups in nats; each [N], float64.

        Their sum is −ELBO with betas of 1, as the density plots and the 2-D metrics of Soft-IntroVAE take it. `seed` matters only
        to priors with a sampled KL.
        """
        q = self.encode(x, labels)
        rec = (x.to(self.device) - self.decode(latents.means(q), labels)).double().square().flatten(1).sum(dim=1)
        return rec, losses.total(self.kl(q, labels, seed))

    def kl(self, q: Posterior, labels: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
        """KL of posteriors to the prior of each group in nats: {group: [N]}, float64."""
        inputs.posterior(q, self.groups)
        inputs.count(seed, "seed", 0)
        wide = {group: Gaussian(mu.double(), logvar.double()) for group, (mu, logvar) in q.items()}  # exp(logvar) has room
        n = len(next(iter(q.values())).mu)
        if labels is not None:
            inputs.labels(labels, n, self.spec)
        with self._quiet() as nets:
            noise = self._sources().kl(n, Streams(seed, 0, self.device), "kl")
            return losses.kl(wide, nets.prior(frozen=True), noise, None if labels is None else labels.to(self.device))

    def log_weights(self, x: Tensor, draws: int, *, labels: Tensor | None = None, seed: int = 0, beta_rec: float = 1.0) -> Tensor:
        """ln w_m = ln p(x ∣ z_m) + ln p(z_m) − ln q(z_m ∣ x), z_m ~ q(z ∣ x): [N, draws], float64, on the CPU.

        −beta_rec · r(x, D(z)) stands for ln p(x ∣ z), up to the constant of its normalisation: logsumexp over the draws minus
        ln draws, plus that constant, is the importance-weighted bound of Burda et al. 2016 (arXiv:1509.00519, equation 8). A
        `UserError` where the reconstruction loss needs what is not at hand. `beta_rec` of the model's own objective is its
        `decoder_beta`, since here the KL has the weight 1.
        """
        rec, log_ratio = self.drawn(x, draws, labels=labels, seed=seed)
        return log_ratio - beta_rec * rec

    def drawn(self, x: Tensor, draws: int, *, labels: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What `log_weights` are made of: r(x, D(z_m)), and ln p(z_m) − ln q(z_m ∣ x) of all groups in nats; each [N, draws],
        float64, on the CPU."""
        inputs.count(draws, "draws", 1)
        inputs.count(seed, "seed", 0)
        inputs.images(x, self.spec, self._dtype)
        inputs.labels(labels, len(x), self.spec)
        loss = self.reconstruction
        lacking = getattr(loss, "missing", lambda: None)() if loss else "this model has no reconstruction loss"
        if loss is None or lacking:
            raise UserError(str(lacking))
        getattr(loss, "prepare", lambda: None)()
        x, labels = x.to(self.device), None if labels is None else labels.to(self.device)
        q, recs, ratios = self.encode(x, labels), [], []
        for m in range(draws):
            z = latents.sample(q, self._sources().posterior(len(x), Streams(seed, m, self.device), "log_weights"))
            y = self.decode(z, labels, stream_seed(seed, "log_weights", m))
            with self._quiet() as nets:
                recs.append(torch.cat([loss(x[rows], y[rows]) for rows in _batches(len(x))]).double().cpu())
                log_p = {group: p.log_prob(z[group], labels).double() for group, p in nets.prior(frozen=True).items()}
            log_q = {group: latents.log_prob(q[group], z[group]).double() for group in q}
            ratios.append((losses.total(log_p) - losses.total(log_q)).cpu())
        return torch.stack(recs, dim=1), torch.stack(ratios, dim=1)

    def interpolate(
        self,
        x: Tensor,
        y: Tensor,
        steps: int,
        labels: Tensor | None = None,
        path: str = "linear",
        y_labels: Tensor | None = None,
    ) -> Tensor:
        """Images [steps, N, …] between the posterior means of x and y, ends included, on straight lines, with the path
        "spherical" on great circles (see `siv_core.latents.slerp`), or with "styles" on straight lines between what the decoder's
        layers are given for them.

        Of a conditional model `labels` are those of all images. Where y is of other classes `y_labels` are those that it is
        encoded with, and the last images are then no reconstructions of y.
        """
        inputs.count(steps, "steps", 1)
        inputs.choice(path, "path", latents.PATHS)
        a = self._end(x, labels, labels, path)
        b = self._end(y, labels if y_labels is None else y_labels, labels, path)
        inputs.pair(x, y)
        ways = torch.linspace(0, 1, steps, device=self.device)
        return torch.stack([self._on(path, latents.between(a, b, way, path), labels) for way in ways])

    def _end(self, x: Tensor, labels: Tensor | None, shown_with: Tensor | None, path: str) -> Codes:
        """Where a path begins or ends: the posterior means of x or, on the path "styles", the styles of those."""
        codes = latents.means(self.encode(x, labels))
        return {path: self.styles(codes, shown_with)} if path == "styles" else codes

    def _on(self, path: str, place: Codes, labels: Tensor | None) -> Tensor:
        return self.render(place[path]) if path == "styles" else self.decode(place, labels)

    def blend(
        self, corners: Sequence[Tensor], steps: int = 7, labels: Sequence[Tensor] | None = None, path: str = "linear"
    ) -> Tensor:
        """Images [steps, steps, N, …] between the posterior means of four: top left, top right, bottom left and bottom right,
        each [N, …] (Soft-IntroVAE, section 9.4.2, has 7 × 7). Rows are ways from left to right, between the ways along the sides.

        On straight lines that is bilinear: the weights at (s down, t right) are (1 − s)(1 − t), (1 − s) t, s (1 − t) and s t.
        Of a conditional model `labels` are those of each corner; all images are decoded with those of the first.
        """
        inputs.count(steps, "steps", 1)
        inputs.choice(path, "path", latents.PATHS)
        for what, given in (("corners", corners), ("labels", labels)):
            if given is not None and len(given) != 4:
                raise UserError(f"{what}: there are {len(given)}, expected four: top left, top right, bottom left, bottom right")
        of = labels if labels is not None else [None] * 4
        a, b, c, d = (self._end(x, y, of[0], path) for x, y in zip(corners, of, strict=True))
        for corner in corners[1:]:
            inputs.pair(corners[0], corner)
        ways = torch.linspace(0, 1, steps, device=self.device)
        sides = [(latents.between(a, c, down, path), latents.between(b, d, down, path)) for down in ways]
        places = [latents.between(left, right, way, path) for left, right in sides for way in ways]
        return torch.stack([self._on(path, place, of[0]) for place in places]).unflatten(0, (steps, steps))

    def combine(self, images: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None = None) -> Tensor:
        """Images whose code of each group is the posterior mean of `images[group]`; all have the same N.

        Of a conditional model `labels[group]` are those of `images[group]`; the result has the labels of the class group, or
        of the first one.
        """
        given = labels or {}
        inputs.images_by_group(images, labels, self.groups, self.spec, self._dtype)
        codes = {group: self.encode(images[group], given.get(group))[group].mu for group in self.groups}
        return self.decode(codes, given.get(self.translate[0] if self.translate else next(iter(self.groups))))

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of its weights; None where it has none."""
        return next((weight.dtype for module in (self.encoder, self.decoder) for weight in module.parameters()), None)

    def _sources(self) -> Sources:
        return sources(self.groups, self.priors, self.decoder)


def _batches(n: int) -> Iterator[slice]:
    """Rows 0 … n − 1, `BATCH` at a time; one empty piece of none, so that shapes come out right."""
    return slices(slice(0, n), BATCH) if n else iter([slice(0, 0)])
