"""`likelihood` against the exact likelihood of linear-Gaussian models, and what it says where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import toys
from attrs import evolve
from siv_plugins import likelihood as plugin
from siv_plugins import pixel_losses
from siv_plugins.standard_normal import StandardNormal
from torch import Tensor, nn

from siv_core import Gaussian, Model, Rows, Spec, UserError, losses
from siv_core.losses import Betas
from siv_core.nets import Priors

D, BETA = 5, 1.7  # numbers in a sample; the decoder is a Gaussian of variance 1/(2 BETA)
CPU = torch.device("cpu")
SPLITS = {"one group": {"z": 3}, "two groups": {"class": 2, "content": 1}}


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done < total


class Table:
    def __init__(self, x: Tensor, spec: Spec, train: Tensor | None = None, labels: Tensor | None = None) -> None:
        self.spec, self.tables = spec, {"held_out": Rows(x, labels), "train": Rows(x if train is None else train, labels)}

    def rows(self, split: str) -> Rows:
        return self.tables[split]


class PCA:
    """p(z) = N(0, I), p(x ∣ z) = N(W z + b, I/(2 BETA)) with orthogonal columns in W, so that the posterior is diagonal
    (Tipping & Bishop 1999, equation 6)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(D, 3, generator=generator, dtype=torch.float64)).Q
        self.w = directions * torch.tensor([2.0, 0.7, 1.3], dtype=torch.float64)
        self.b = torch.randn(D, generator=generator, dtype=torch.float64)
        self.variance = 1 / (2 * BETA)
        self.m = self.w.square().sum(dim=0) + self.variance  # diagonal of WᵀW + σ²I

    def draw(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        z, noise = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for dim in (3, D))
        return z @ self.w.T + self.b + noise * self.variance**0.5

    def log_prob(self, x: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.variance * torch.eye(D, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)

    def model(self, groups: dict[str, int], off: float = 0.0, loss: Callable[..., Tensor] = pixel_losses.mse) -> Model:
        """With the exact posterior as encoder; its means `off` by this much, and its deviations e^off times too large."""
        pca, sizes = self, list(groups.values())

        class Encoder(nn.Module):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
                mu = (x - pca.b) @ pca.w / pca.m + off
                logvar = (pca.variance / pca.m).log().expand_as(mu) + 2 * off
                parts = zip(mu.split(sizes, 1), logvar.split(sizes, 1), strict=True)
                return {group: Gaussian(*part) for group, part in zip(groups, parts, strict=True)}

        class Decoder(nn.Module):
            def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
                return torch.cat([codes[group] for group in groups], dim=1) @ pca.w.T + pca.b

        priors, spec = Priors({group: StandardNormal() for group in groups}), Spec((D,), kind="array")
        return Model(Encoder(), Decoder(), priors, spec, groups, None, CPU, loss, betas=Betas(BETA, dict.fromkeys(groups, 1.0)))


def measure(model: Model, data: Any, **options: Any) -> Any:
    config = plugin.LikelihoodConfig(**options)
    return plugin.build(config, model.spec, model.groups, model.translate).measure(model, data, quiet)


@pytest.mark.parametrize("groups", SPLITS.values(), ids=SPLITS)
def test_with_the_exact_posterior_every_draw_is_the_exact_likelihood(groups):
    pca = PCA()
    x = pca.draw(150)
    model, exact = pca.model(groups), pca.log_prob(x)
    rec, log_ratio = model.drawn(x, 4)
    weights = log_ratio - BETA * rec - losses.log_normaliser(2, BETA, D)
    assert weights.shape == (150, 4)
    torch.testing.assert_close(weights, exact[:, None].expand(-1, 4), rtol=0, atol=1e-10)
    found = measure(model, Table(x, model.spec)).values
    for name in ("elbo", "iwae"):
        assert found[name] == pytest.approx(float(exact.mean()), abs=1e-10)
        assert found[f"{name}.se"] == pytest.approx(float(np.std(exact.numpy(), ddof=1) / math.sqrt(150)), rel=1e-9)
    assert found["iwae.minus_elbo"] == pytest.approx(0, abs=1e-10)
    assert found["effective_draws"] == pytest.approx(5)
    assert "bits_per_dim" not in found  # of numbers that are no grey levels


@pytest.mark.parametrize("groups", SPLITS.values(), ids=SPLITS)
def test_with_a_wrong_encoder_the_bound_is_below_and_rises_with_the_draws(groups):
    pca = PCA()
    x = pca.draw(128)
    model, exact = pca.model(groups, off=0.4), float(pca.log_prob(x).mean())
    found = {draws: measure(model, Table(x, model.spec), draws=draws).values for draws in (1, 5, 25, 200)}
    assert found[1]["iwae"] == found[1]["elbo"]
    values = [found[draws]["iwae"] for draws in found]
    assert values == sorted(values)
    assert values[0] < values[1] - 0.1
    assert found[200]["iwae"] == pytest.approx(exact, abs=0.03)
    assert all(value < exact + 0.03 for value in values)
    assert 5 < found[25]["effective_draws"] < 22
    # the ELBO is short of ln p(x) by KL[q ‖ posterior], which is known of two Gaussians
    logvar = (pca.variance / pca.m).log()
    lost = 0.5 * (math.exp(0.8) - 1 - 0.8 + 0.4**2 / logvar.exp()).sum()
    rec, log_ratio = model.drawn(x, 200)
    short = pca.log_prob(x)[:, None] + losses.log_normaliser(2, BETA, D) + BETA * rec - log_ratio
    error = float(short.std()) / (128 * 200) ** 0.5
    assert float(short.mean()) == pytest.approx(float(lost), abs=4 * error)
    assert error < 0.03


def test_kl_is_told_by_group_and_in_one_group_once():
    pca = PCA()
    x = pca.draw(50)
    one, two = (measure(pca.model(groups), Table(x, Spec((D,), kind="array"))).values for groups in SPLITS.values())
    assert one["kl"] == pytest.approx(two["kl.class"] + two["kl.content"], rel=1e-9)
    assert "kl" not in two
    assert one["kl.se"] > 0


def test_the_best_variance_is_that_of_the_errors():
    pca = PCA()
    x, train = pca.draw(90), pca.draw(300)
    model = evolve(pca.model({"z": 3}), betas=Betas(0.05, {"z": 1.0}))
    found = measure(model, Table(x, model.spec, train))
    variance = found.protocol["decoder"]["fitted"]["variance"]
    assert found.protocol["decoder"]["own"] == {"family": "Gaussian", "beta": 0.05, "variance": pytest.approx(10)}
    # from the exact posterior the errors are those of the data's own noise, to the error of 300 · D of them
    assert variance == pytest.approx(pca.variance, rel=4 * (2 / (300 * D)) ** 0.5)
    assert found.values["fitted.elbo"] > found.values["elbo"] + 1
    values = {beta: measure(model, Table(train, model.spec), beta=beta, count=0).values["elbo"] for beta in (0.5, 1, 2)}
    best = measure(model, Table(train, model.spec), beta=1 / (2 * variance)).values["elbo"]
    assert best > max(values.values())


def test_what_a_density_without_codes_scores():
    pca = PCA()
    x, train = pca.draw(60), pca.draw(200)
    model = pca.model({"z": 3})
    found = measure(model, Table(x, model.spec, train)).values
    gaussian = torch.distributions.Normal(train.mean(dim=0), pca.variance**0.5)
    assert found["no_codes"] == pytest.approx(float(gaussian.log_prob(x).sum(dim=1).mean()), rel=1e-6)
    scale = (train - train.mean(dim=0)).square().mean() ** 0.5  # of all numbers alike
    best = torch.distributions.Normal(train.mean(dim=0), scale)
    assert found["fitted.no_codes"] == pytest.approx(float(best.log_prob(x).sum(dim=1).mean()), rel=1e-6)
    assert found["fitted.no_codes"] > found["no_codes"]
    assert found["fitted.no_codes"] < found["fitted.elbo"]


@pytest.mark.parametrize("power", [1, 2])
def test_normalisers_against_a_sum_over_a_grid(power):
    for beta in (0.3, 4.0):
        grid = np.linspace(-60, 60, 300_001)
        integral = np.exp(-beta * np.abs(grid) ** power).sum() * (grid[1] - grid[0])
        assert losses.log_normaliser(power, beta, 7) == pytest.approx(7 * math.log(integral), rel=1e-6)
        mean = (np.abs(grid) ** power * np.exp(-beta * np.abs(grid) ** power)).sum() * (grid[1] - grid[0]) / integral
        assert losses.best_beta(power, 7 * mean, 7) == pytest.approx(beta, rel=1e-4)


def test_an_l1_loss_is_a_laplace_distribution():
    pca = PCA()
    x = pca.draw(40)
    model = pca.model({"z": 3}, loss=pixel_losses.l1)
    found = measure(model, Table(x, model.spec))
    mean = torch.distributions.Laplace(x.mean(dim=0), 1 / BETA)
    assert found.values["no_codes"] == pytest.approx(float(mean.log_prob(x).sum(dim=1).mean()), rel=1e-6)
    assert found.protocol["decoder"]["own"] == {"family": "Laplace", "beta": BETA, "scale": 1 / BETA}


def test_a_loss_that_is_no_density_is_a_score_and_says_so():
    pca = PCA()
    x = pca.draw(40)
    model = pca.model({"z": 3}, loss=lambda x, y: pixel_losses.mse(x, y))  # nothing tells what it is
    found = measure(model, Table(x, model.spec)).values
    assert found["elbo"] == found["iwae"] == "exp(-r) of this reconstruction loss is no density of arrays with a known constant"
    with_constant = measure(pca.model({"z": 3}), Table(x, model.spec)).values
    constant = losses.log_normaliser(2, BETA, D)
    assert found["unnormalised.iwae"] == pytest.approx(with_constant["iwae"] + constant, rel=1e-9)
    assert "fitted.elbo" not in found


def test_no_beta_no_likelihood_but_the_fitted_one():
    pca = PCA()
    x = pca.draw(40)
    model = evolve(pca.model(SPLITS["two groups"]), betas=None)
    found = measure(model, Table(x, model.spec)).values
    assert found["elbo"] == found["iwae"] == plugin.NO_BETA
    assert isinstance(found["fitted.elbo"], float)
    given = measure(model, Table(x, model.spec), beta=BETA).values
    assert given["iwae"] == pytest.approx(float(pca.log_prob(x).mean()), abs=1e-10)
    unknown = evolve(model, reconstruction=lambda x, y: (x - y).abs().sum(dim=1))
    assert measure(unknown, Table(x, model.spec)).values["unnormalised.elbo"] == plugin.NO_BETA


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        ({"name": "vae", "beta_rec": 0.5, "beta_kl": 2.0}, 0.25),
        ({"name": "soft_intro_vae", "beta_rec": 3.0, "beta_kl": 0.5, "beta_neg": 8.0}, 6.0),
        ({"name": "intro_vae", "beta_rec": 0.5, "beta_kl": {"z": 4.0}, "margin": 5.0}, 0.125),
        ({"name": "vae", "beta_kl": 0.0}, None),
    ],
)
def test_a_model_knows_the_beta_of_its_objective(catalogue, tmp_path, objective, beta):
    trainer = toys.trainer(catalogue, tmp_path, toys.tree(objective=objective))
    assert trainer.model().decoder_beta == beta


def test_betas_that_differ_between_groups_are_no_model():
    assert Betas(1.0, {"a": 2.0, "b": 2.0}).decoder == 0.5
    assert Betas(1.0, {"a": 2.0, "b": 3.0}).decoder is None
    assert Betas(0.0, {"a": 2.0}).decoder is None
    assert Betas(1.0, {"a": 0.0}).decoder is None


# Images.


def image_model(spec: Spec, plus: float = 0.0, groups: int = 2) -> Model:
    class Encoder(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
            zero = x.new_zeros(len(x), groups)
            if labels is not None:
                zero = zero + labels[:, None]
            return {"z": Gaussian(zero, zero * 0)}

    class Decoder(nn.Module):
        def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
            shade = torch.zeros(len(codes["z"])) if labels is None else labels.float() / 4
            return shade[:, None, None, None].expand(-1, *spec.shape) + plus

    priors, betas = Priors({"z": StandardNormal()}), Betas(1.0, {"z": 1.0})
    return Model(Encoder(), Decoder(), priors, spec, {"z": groups}, None, CPU, pixel_losses.mse, betas=betas)


def test_bits_per_grey_level_of_a_decoder_that_is_known():
    """Codes that are the prior's say nothing: ln p(x) is the Gaussian's about black."""
    spec = Spec((1, 4, 4))
    x = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = image_model(spec)
    found = measure(model, Table(x, spec)).values
    exact = torch.distributions.Normal(0.0, 0.5**0.5).log_prob(x).flatten(1).sum(dim=1).double()
    assert found["elbo"] == found["iwae"] == pytest.approx(float(exact.mean()), rel=1e-6)
    naive = float((-exact / math.log(2) / 16).mean()) + math.log2(255)
    assert found["bits_per_dim"] == pytest.approx(naive, rel=1e-6)
    assert plugin.bits(0.0, spec) == pytest.approx(math.log2(255))  # uniform over white to black: 8 bits, nearly
    wide = Spec((1, 4, 4), value_range=(-1.0, 1.0))  # the density of 2x − 1 is half of it at each of 16 numbers
    assert plugin.bits(-16 * math.log(2), wide) == pytest.approx(math.log2(255))


def test_a_conditional_model_gets_its_labels():
    spec = Spec((1, 4, 4), classes=4, conditional=True)
    labels = torch.arange(20) % 4
    x = (labels.float() / 4)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    found = measure(image_model(spec), Table(x, spec, labels=labels)).values
    assert found["elbo"] < found["no_codes"]  # its KL is not for nothing: mu is the label
    assert measure(image_model(spec), Table(x, spec, labels=labels)).protocol["conditional"] is True
    assert found["fitted.elbo"] == "the training samples' mean r is 0"


def test_images_of_another_range_are_refused():
    spec = Spec((1, 4, 4))
    for scaled in (lambda x: x * 255, lambda x: 2 * x - 1, lambda x: x * math.nan):
        x = scaled(torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
        with pytest.raises(UserError, match=r"likelihood: images of train: go from .* value range is said to be \[0, 1\]"):
            measure(image_model(spec), Table(x, spec))


def test_what_is_not_finite_is_a_reason():
    spec = Spec((1, 4, 4))
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = measure(image_model(spec, plus=math.nan), Table(x, spec)).values
    assert found["elbo"] == found["iwae"] == found["effective_draws"] == found["bits_per_dim"] == plugin.NOT_FINITE
    assert found["fitted.elbo"] == "the training samples' mean r is nan"
    assert isinstance(found["kl"], float)


def test_the_seed_and_nothing_else_decides():
    pca = PCA()
    x = pca.draw(130)  # three parts
    model = pca.model({"z": 3}, off=0.3)
    first, again, other = (measure(model, Table(x, model.spec), seed=seed, count=100) for seed in (1, 1, 2))
    assert first == again
    assert first.values["elbo"] != other.values["elbo"]
    assert first.protocol["samples"] == 100
    assert first.protocol["of"] == 130
    assert json.loads(json.dumps(first.protocol)) == first.protocol


def test_a_decoder_with_noise_of_its_own_draws_it_for_each_code():
    spec = Spec((1, 4, 4))

    class Noisy(nn.Module):
        def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: Any = None) -> Tensor:
            return noise

        def draw(self, n: int, generator: torch.Generator, use: str) -> Tensor:
            return torch.rand(n, 1, 4, 4, generator=generator)

    rec, _ = evolve(image_model(spec), decoder=Noisy()).drawn(torch.zeros(3, 1, 4, 4), 4)
    assert len(rec.flatten().unique()) == 12


def test_priors_that_are_no_standard_normal(catalogue, tmp_path):
    """A mixture of the encoder's own: ln p(z) is the prior's, not the normal's."""
    trainer = toys.trainer(catalogue, tmp_path, toys.tree(prior={"name": "vamp", "components": 4}))
    found = measure(trainer.model(), trainer.built.dataset, count=40, train_count=40)
    assert all(isinstance(found.values[name], float) for name in ("elbo", "iwae", "kl", "fitted.bits_per_dim"))
    assert found.values["iwae"] >= found.values["elbo"]


def test_in_the_middle_of_a_training_and_after_it(siv, tmp_path):
    text = toys.SOFT.replace("beta_neg = 4.0", "beta_neg = 4.0\nbeta_rec = 2.0\nbeta_kl = 0.5")
    text += """
[train]
batch = 64
length = "4 steps"
tick = "2 steps"
conditional = true
[metrics.likelihood]
count = 60
every = "2 steps"
"""
    path = tmp_path / "some.toml"
    path.write_text(text)
    done = siv("run", path, "--run-dir", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line.get("metric") == "likelihood"]
    assert {line["name"] for line in mine} >= {"elbo", "elbo.se", "iwae", "iwae.se", "bits_per_dim", "fitted.iwae", "kl"}
    assert all("skipped" not in line for line in mine)
    assert len([line for line in mine if line["name"] == "iwae"]) >= 2
    own = mine[0]["protocol"]["decoder"]["own"]
    assert own == {"family": "Gaussian", "beta": 4.0, "variance": 0.125}
