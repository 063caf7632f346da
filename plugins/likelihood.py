"""Metric `likelihood`: held-out ELBO and importance-weighted bound on ln p(x) (Burda et al. 2016), in nats a sample.

The decoder is the density that its objective makes of it: −ln p(x ∣ z) is β r(x, D(z)) plus a constant, β = beta_rec / beta_kl.
So for r = ‖x − D(z)‖² it is a Gaussian of variance beta_kl / (2 beta_rec) about D(z), and the constant is counted in. Since that
variance was set for training and not for this, `fitted.…` are the same with the one under which training samples are the
likeliest; with it models of different betas compare. Beside each stands the same density about the mean of the training
samples, which has no codes: a model whose codes are worth their nats is above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core import inputs, losses
from siv_core.component import Component, option
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Spec
from siv_core.seeding import stream_seed
from siv_core.use.evaluate import labels_of, mean_and_error, some

WHAT = "likelihood"
PART = 64  # samples between two signs of life
LEVELS = 255  # steps between black and white of stored images
FAMILY = {1: "Laplace", 2: "Gaussian"}  # by the power of the loss
NO_BETA = (
    "the objective has no one beta_rec / beta_kl (groups with different beta_kl have the ELBO of no model): set"
    " metrics.likelihood.beta"
)
NOT_FINITE = "it is not finite for some image"

Values = dict[str, float | str]


@frozen
class LikelihoodConfig:
    draws: int = option(5, doc="codes drawn for each sample, M of the importance-weighted bound", ge=1)
    count: int = option(0, doc="held-out samples, by a seeded choice; 0: all", ge=0)
    train_count: int = option(2000, doc="training samples that fit the decoder's variance and make the mean image", ge=2)
    beta: float = option(0.0, doc="of exp(-beta r(x, D(z))); 0: the objective's beta_rec / beta_kl", ge=0)
    seed: int = option(0, doc="of all draws and choices", ge=0)


@frozen(eq=False)
class Drawn:
    """Of each chosen sample of a split, float64 on the CPU."""

    rec: Tensor  # [N, M], r(x, D(z_m))
    log_ratio: Tensor  # [N, M], ln p(z_m) − ln q(z_m ∣ x)
    kl: dict[str, Tensor]  # group -> [N], nats
    no_codes: Tensor  # [N], r(x, mean training sample)


def elbo(log_weights: Tensor) -> Tensor:
    """[N] of ln w [N, M]: their mean over the draws."""
    return log_weights.mean(dim=1)


def effective(log_weights: Tensor) -> Tensor:
    """[N]: effective number of the M draws, 1 / Σ_m w̃_m² with weights w̃ that sum to 1 (Kong 1992)."""
    return 1 / log_weights.softmax(dim=1).square().sum(dim=1)


def bounds(drawn: Drawn, beta: float, constant: float, prefix: str) -> Values:
    """Of ln p(x ∣ z) = constant − beta r(x, D(z)), in nats a sample."""
    weights = drawn.log_ratio - beta * drawn.rec + constant
    return {
        **mean_and_error(f"{prefix}elbo", elbo(weights), NOT_FINITE),
        **mean_and_error(f"{prefix}iwae", losses.importance_weighted(weights), NOT_FINITE),
        **mean_and_error(f"{prefix}iwae.minus_elbo", losses.importance_weighted(weights) - elbo(weights), NOT_FINITE),
        f"{prefix}effective_draws": float(effective(weights).mean()) if weights.isfinite().all() else NOT_FINITE,
    }


def bits(nats: float | str, spec: Spec) -> float | str:
    """Bits a number of the density per grey level, of the natural log density of a whole image."""
    low, high = spec.value_range
    return nats if isinstance(nats, str) else -nats / (spec.dims * math.log(2)) - math.log2((high - low) / LEVELS)


@frozen
class Likelihood:
    config: LikelihoodConfig

    def needs(self) -> Iterable[str]:
        return ()

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        config, dims, power = self.config, model.spec.dims, getattr(model.reconstruction, "power", None)
        mean = self._mean(model, data, progress)
        held_out = self._drawn(model, data, "held_out", config.count, config.draws, mean, progress)
        beta = config.beta or model.decoder_beta
        values: Values = {}
        about: dict[str, Any] = {"beta": beta}
        if power is None:
            reason = f"exp(-r) of this reconstruction loss is no density of {model.spec.kind}s with a known constant"
            values.update({"elbo": reason, "iwae": reason})
            values.update(bounds(held_out, beta, 0.0, "unnormalised.") if beta else {"unnormalised.elbo": NO_BETA})
            if beta:
                values.update(mean_and_error("unnormalised.no_codes", -beta * held_out.no_codes, NOT_FINITE))
        else:
            train = self._drawn(model, data, "train", config.train_count, 1, mean, progress)
            rec, flat = (float(each.mean()) for each in (train.rec, train.no_codes))
            fitted, no_codes = (
                losses.best_beta(power, mean_r, dims) if math.isfinite(mean_r) and mean_r > 0 else None for mean_r in (rec, flat)
            )
            values.update(self._density(held_out, beta, beta, power, "", NO_BETA, model.spec))
            reason = f"the training samples' mean r is {rec:g}"
            values.update(self._density(held_out, fitted, no_codes, power, "fitted.", reason, model.spec))
            about.update(self._densities(power, {"own": beta, "fitted": fitted, "fitted.no_codes": no_codes}))
        for group, each in held_out.kl.items():
            values.update(mean_and_error(f"kl.{group}" if len(held_out.kl) > 1 else "kl", each, NOT_FINITE))
        return Measurement(values, {**about, **self._protocol(model, data, len(held_out.rec))})

    def _density(
        self, drawn: Drawn, beta: float | None, no_codes: float | None, power: int, prefix: str, reason: str, spec: Spec
    ) -> Values:
        """Values under the density of `beta`, and of the mean sample under that of `no_codes`."""
        if not beta:
            return {f"{prefix}elbo": reason, f"{prefix}iwae": reason}
        values = bounds(drawn, beta, -losses.log_normaliser(power, beta, spec.dims), prefix)
        if no_codes:
            constant = -losses.log_normaliser(power, no_codes, spec.dims)
            values.update(mean_and_error(f"{prefix}no_codes", constant - no_codes * drawn.no_codes, NOT_FINITE))
        if spec.kind == "image":
            values[f"{prefix}bits_per_dim"] = bits(values[f"{prefix}iwae"], spec)
        return values

    def _chosen(self, model: Model, data: Dataset, split: str, count: int) -> list[Tensor]:
        """Positions of a seeded choice of a split's samples, `PART` at a time."""
        rows = data.rows(split)
        if not len(rows):
            raise UserError(f"{WHAT}: the split '{split}' is empty")
        return list(some(data, split, count or len(rows), self.config.seed).split(PART))

    def _samples(self, model: Model, data: Dataset, split: str, at: Tensor) -> Tensor:
        x = feed.images(data.rows(split), at, model.spec, model.device)
        if model.spec.kind == "image":
            inputs.in_range(x, model.spec.value_range, f"{WHAT}: images of {split}")
        return x

    def _mean(self, model: Model, data: Dataset, progress: Progress) -> Tensor:
        parts = self._chosen(model, data, "train", self.config.train_count)
        total = torch.zeros(model.spec.shape, dtype=torch.float64)
        for number, at in enumerate(parts):
            progress(f"{WHAT}: mean training sample", number, len(parts))
            total += self._samples(model, data, "train", at).double().sum(dim=0).cpu()
        return total / sum(map(len, parts))

    def _drawn(self, model: Model, data: Dataset, split: str, count: int, draws: int, mean: Tensor, progress: Progress) -> Drawn:
        parts, found = self._chosen(model, data, split, count), []
        for number, at in enumerate(parts):
            progress(f"{WHAT}: {split}", number, len(parts))
            x, labels = self._samples(model, data, split, at), labels_of(data.rows(split), at, model)
            seed = stream_seed(self.config.seed, f"{WHAT}.{split}", number)
            rec, log_ratio = model.drawn(x, draws, labels=labels, seed=seed)
            assert model.reconstruction is not None
            no_codes = model.reconstruction(x, mean.to(x).expand_as(x)).double().cpu()
            kl = {group: each.cpu() for group, each in model.kl(model.encode(x, labels), labels, seed).items()}
            found.append(Drawn(rec, log_ratio, kl, no_codes))
        return Drawn(
            torch.cat([part.rec for part in found]),
            torch.cat([part.log_ratio for part in found]),
            {group: torch.cat([part.kl[group] for part in found]) for group in model.groups},
            torch.cat([part.no_codes for part in found]),
        )

    def _densities(self, power: int, betas: dict[str, float | None]) -> dict[str, Any]:
        """What p(x ∣ z) is with each of these betas."""
        told = {}
        for name, beta in betas.items():
            size = None if not beta else 1 / (2 * beta) if power == 2 else 1 / beta
            told[name] = {"family": FAMILY[power], "beta": beta, "variance" if power == 2 else "scale": size}
        return {"decoder": told, "fitted": "beta under which training samples are the likeliest, one code drawn for each"}

    def _protocol(self, model: Model, data: Dataset, samples: int) -> dict[str, Any]:
        config = self.config
        low, high = model.spec.value_range
        return {
            "split": "held_out",
            "samples": samples,
            "of": len(data.rows("held_out")),
            "train_samples": min(config.train_count, len(data.rows("train"))),
            "draws": config.draws,
            "seed": config.seed,
            "part": PART,
            "shape": list(model.spec.shape),
            "value_range": [low, high],
            "conditional": model.spec.conditional,
            "unit": "nats a sample, of a density over real numbers in the value range's units; higher is better; unnormalised:"
            " without the constant, to compare under the same loss alone",
            "elbo": "mean of ln p(x|z) + ln p(z) - ln q(z|x) over the draws; a lower bound of ln p(x)",
            "iwae": "ln of the mean of the draws' weights; a lower bound of ln p(x) in expectation, at least the elbo",
            "no_codes": "ln p(x) of the same density about the mean training sample; fitted.no_codes: with the best beta of that",
            "effective_draws": "1 / sum of squared normalised weights, of the draws",
            "bits_per_dim": f"-iwae / (C H W ln 2) - log2({high - low:g}/{LEVELS}): per grey level, nothing dequantised; no"
            " bound on the likelihood of the levels where the decoder is narrower than a level",
            "kl": "nats, by the prior's own kl",
            "se": "standard error of the mean over samples: their deviation over the root of their number",
        }


def build(config: LikelihoodConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    return Likelihood(config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "held-out ELBO and importance-weighted bound in nats, under the objective's decoder and under the best variance"
    return [Component("metric", "likelihood", LikelihoodConfig, build, summary, "arXiv:1509.00519")]
