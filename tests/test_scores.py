"""Scores with known answers: linear-Gaussian models, whose likelihood, ELBO and regret have closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import nn

from siv_core.errors import UserError
from siv_core.latents import Gaussian
from siv_core.losses import Betas
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Spec
from siv_core.testing import _ToyPrior
from siv_core.use import scores
from siv_core.use.scores import Settings, score

CPU = torch.device("cpu")
W = torch.tensor([[1.5, 0.0], [0.0, 0.8], [0.0, 0.6], [0.9, 0.0]], dtype=torch.float64)  # its columns are orthogonal:
B = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)  # the exact posterior is a diagonal Gaussian
PRECISION = 1 + 2 * W.square().sum(dim=0)  # of the posterior, p(x ∣ z) = N(W z + b, ½ I)
CONSTANT = 2 * math.log(math.pi)  # of that likelihood, which scores leave out


class Decoder(nn.Module):
    def forward(self, codes: Any, labels: Any = None, noise: Any = None) -> torch.Tensor:
        return codes["z"] @ W.T + B


class Encoder(nn.Module):
    """The exact posterior, with its mean moved and its log-variance changed."""

    def __init__(self, move: float, change: float) -> None:
        super().__init__()
        self.move, self.change = move, change

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, Gaussian]:
        mu = 2 * (x - B) @ W / PRECISION
        return {"z": Gaussian(mu + self.move, (-PRECISION.log() + self.change).expand_as(mu))}


def squared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().sum(dim=1)


def linear(move: float = 0.0, change: float = 0.0, betas: Betas | None = None) -> Model:
    spec, prior = Spec((4,), kind="array"), Priors({"z": _ToyPrior()})
    return Model(Encoder(move, change), Decoder(), prior, spec, {"z": 2}, None, CPU, squared, betas=betas)


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def likelihood(x: torch.Tensor = X, variance: float = 0.5) -> torch.Tensor:
    covariance = W @ W.T + variance * torch.eye(4, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(B, covariance).log_prob(x)


def gap(move: float, change: float) -> float:
    """KL[q ‖ exact posterior]."""
    return float(0.5 * (math.exp(change) - 1 - change + move**2 * PRECISION).sum())


@pytest.mark.parametrize("draws", [1, 5])
def test_with_the_exact_posterior_iwae_is_the_likelihood(draws):
    """Every importance weight is p(x) then."""
    found = score(linear(), X, ["iwae"], Settings(draws=draws))["iwae"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, -likelihood() - CONSTANT, rtol=0, atol=1e-10)


def noise(draws: int) -> torch.Tensor:
    """The z of the scores' draws before they are moved and scaled, [M, 1, 2]."""
    return torch.stack([scores._noise(linear(), 0, m)["posterior"]["z"].double() for m in range(draws)])


def energy(q: Gaussian, eps: torch.Tensor) -> torch.Tensor:
    """The negative ELBO [N] over these draws [M, 1, 2], all at once."""
    z = q.mu + (0.5 * q.logvar).exp() * eps
    rec = (X - z @ W.T - B).square().sum(dim=2).mean(dim=0)
    return rec + 0.5 * (q.logvar.exp() + q.mu.square() - 1 - q.logvar).sum(dim=1)


def test_more_draws_come_closer_from_above():
    one, many = (score(linear(0.3, 0.4), X, ["iwae"], Settings(draws=m))["iwae"].mean() for m in (1, 500))
    exact = (-likelihood() - CONSTANT).mean()
    assert float(many - exact) == pytest.approx(0, abs=0.1)
    assert abs(float(one - exact)) > 0.2


@pytest.mark.parametrize(("move", "change"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.8), (-0.3, -0.7)])
def test_the_elbo_is_the_likelihood_less_the_gap(move, change):
    """By its draws as they are, and within four errors of what it is with all of them."""
    found = score(linear(move, change), X, ["elbo", "kl", "reconstruction"], Settings(draws=3))
    q, many = Encoder(move, change)(X)["z"], torch.randn(100_000, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(found["elbo"], energy(q, noise(3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(energy(q, many), -likelihood() - CONSTANT + gap(move, change), rtol=0, atol=0.04)
    assert torch.equal(found["reconstruction"], squared(X, q.mu @ W.T + B))
    kl = 0.5 * (q.logvar.exp() + q.mu.square() - 1 - q.logvar).sum(dim=1)
    torch.testing.assert_close(found["kl"], kl)


def test_an_exact_encoder_has_no_regret():
    found = score(linear(), X, ["likelihood_regret"], Settings())["likelihood_regret"]
    assert found.abs().max() < 0.05, found  # what the last steps' own draws leave


@pytest.mark.parametrize(("move", "change"), [(1.0, 0.0), (0.0, 1.5), (-0.8, -1.5)])
def test_the_regret_is_the_gap_of_an_encoder_that_is_off(move, change):
    """The gap over the draws that it is taken with, and the closed form within what these few draws leave open."""
    found = score(linear(move, change), X, ["likelihood_regret"], Settings(draws=100, steps=200))["likelihood_regret"]
    q, exact = Encoder(move, change)(X)["z"], Encoder(0.0, 0.0)(X)["z"]
    pairs = torch.cat([noise(100), -noise(100)])
    pairs = pairs / pairs.std(dim=0, correction=0)
    torch.testing.assert_close(found, energy(q, pairs) - energy(exact, pairs), rtol=0.03, atol=0.03)
    assert float(found.mean()) == pytest.approx(gap(move, change), rel=0.05)
    assert gap(move, change) > 1


def test_a_score_depends_on_its_image_alone():
    """Neither on the batch, nor on the order, nor on the other images."""
    model, settings = linear(0.4, 0.5), Settings(draws=3, steps=20)
    whole = score(model, X, scores.NAMES, settings)
    order = [4, 0, 6]
    for name, value in score(model, X[order], scores.NAMES, settings).items():
        torch.testing.assert_close(value, whole[name][order], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(score(model, X[3:4], [name], settings)[name], whole[name][3:4], rtol=1e-12, atol=1e-12)
    other = score(model, X, scores.NAMES, evolve(settings, seed=1))
    assert {name for name in scores.NAMES if torch.equal(whole[name], other[name])} == {"kl", "reconstruction"}


def test_the_objectives_betas():
    """−ELBO = 0.5 r + 2 K; its likelihood has the variance B_k / (2 B_r) = 2."""
    own = linear(betas=Betas(0.5, {"z": 2.0}))
    settings = Settings(draws=400)
    found, one = score(own, X, ["elbo", "iwae"], settings), score(own, X, ["elbo"], evolve(settings, betas="one"))
    parts = score(own, X, ["elbo", "kl"], evolve(settings, betas="one"))
    rec = parts["elbo"] - parts["kl"]
    torch.testing.assert_close(found["elbo"], 0.5 * rec + 2 * parts["kl"])
    assert torch.equal(one["elbo"], score(linear(), X, ["elbo"], settings)["elbo"])
    torch.testing.assert_close(found["iwae"], -likelihood(variance=2.0) - 2 * math.log(4 * math.pi), rtol=0, atol=0.5)
    assert scores.protocol(own, ["elbo"], settings)["betas"] == {"of": "the objective", "beta_rec": 0.5, "beta_kl": {"z": 2.0}}
    assert scores.protocol(linear(), ["elbo"], settings)["betas"]["of"] == "ones"


def test_no_likelihood_of_weights_that_differ():
    model = evolve(linear(), groups={"z": 2, "y": 1}, betas=Betas(1.0, {"z": 1.0, "y": 2.0}))
    assert "iwae: the latent groups' weights" in str(scores.lacking(model, "iwae", Settings()))
    assert scores.lacking(model, "iwae", Settings(betas="one")) is None
    assert scores.lacking(evolve(model, betas=Betas(1.0, {"z": 0.0, "y": 0.0})), "iwae", Settings())
    with pytest.raises(UserError, match="differ"):
        score(model, X, ["iwae"], Settings())


def test_a_model_without_a_loss_has_the_kl_alone():
    model = evolve(linear(), reconstruction=None)
    assert scores.lacking(model, "kl", Settings()) is None
    assert [scores.lacking(model, name, Settings()) is None for name in scores.NAMES] == [False, True, False, False, False]
    with pytest.raises(UserError, match="elbo: this model has no reconstruction loss"):
        score(model, X, ["elbo"], Settings())


def test_nothing_of_the_model_changes(catalogue, tmp_path):
    import toys

    t = toys.trainer(catalogue, tmp_path, toys.tree())
    before, model = {name: toys.weights(t, name) for name in t.players}, t.model()
    score(model, torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), scores.NAMES, Settings(steps=3))
    assert all(toys.same(before[name], toys.weights(t, name)) for name in t.players)
    assert all(player.module.training for player in t.players.values())
    assert not any(p.grad is not None for player in t.players.values() for p in player.module.parameters())
    assert model.betas == Betas(1.0, {"z": 1.0})


def test_a_conditional_model_takes_the_likeliest_label():
    """Class c has its images around c in every pixel: whatever label an image has, it is scored as what it looks like."""

    class E(nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Gaussian]:
            return {"z": Gaussian(torch.zeros(len(x), 1).double(), torch.zeros(len(x), 1).double())}

    class D(nn.Module):
        def forward(self, codes: Any, labels: torch.Tensor, noise: Any = None) -> torch.Tensor:
            return labels[:, None].double().expand(-1, 4)

    spec = Spec((4,), kind="array", classes=3, conditional=True)
    model = Model(E(), D(), Priors({"z": _ToyPrior()}), spec, {"z": 1}, None, CPU, squared)
    x = torch.tensor([0.1, 2.1, 0.9, 5.0], dtype=torch.float64)[:, None].expand(-1, 4)
    found = score(model, x, ["elbo", "reconstruction"], Settings())
    expected = 4 * torch.tensor([0.1, 0.1, 0.1, 3.0], dtype=torch.float64).square()
    torch.testing.assert_close(found["elbo"], expected)
    torch.testing.assert_close(found["reconstruction"], expected)
    assert "lowest negative ELBO" in scores.protocol(model, ["elbo"], Settings())["labels"]
