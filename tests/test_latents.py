"""Latent Gaussians and their KL against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from siv_core import latents
from siv_core.latents import Gaussian, kl_standard
from siv_core.losses import entropy, kl, sampled_kl, weighted


def posterior(n: int = 7, d: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = torch.randn(2, n, d, dtype=dtype, generator=generator)
    return Gaussian(2 * mu, 1.5 * logvar)


def as_torch(q: Gaussian) -> Independent:
    return Independent(Normal(q.mu, (0.5 * q.logvar).exp()), 1)


def standard(d: int) -> Independent:
    return Independent(Normal(torch.zeros(d, dtype=torch.float64), 1.0), 1)


def test_kl_to_the_standard_normal():
    q = posterior()
    assert torch.allclose(kl_standard(q), kl_divergence(as_torch(q), standard(5)), rtol=1e-12)
    assert kl_standard(q).shape == (7,)


def test_known_answers():
    zero = torch.zeros(1, 3)
    assert kl_standard(Gaussian(zero, zero)).item() == 0
    assert kl_standard(Gaussian(zero + 2, zero)).item() == pytest.approx(3 * 2)  # ½ μ² a dimension
    assert kl_standard(Gaussian(zero, zero + math.log(4))).item() == pytest.approx(3 * 0.5 * (4 - 1 - math.log(4)))


def test_entropy():
    q = posterior()
    assert torch.allclose(entropy(q), as_torch(q).entropy(), rtol=1e-6)


def test_the_precision_of_the_input_is_kept():
    for dtype in (torch.float32, torch.float64):
        q = posterior(dtype=dtype)
        assert kl_standard(q).dtype == entropy(q).dtype == dtype
    q = posterior()
    assert torch.allclose(entropy(q), as_torch(q).entropy(), rtol=1e-13, atol=0)


def test_samples_have_the_moments_they_should():
    q = {"a": posterior(1, 3), "b": posterior(1, 2, seed=1)}
    many = {g: Gaussian(*(t.expand(200_000, -1) for t in gaussian)) for g, gaussian in q.items()}
    generator = torch.Generator().manual_seed(0)
    noise = {g: torch.randn(200_000, gaussian.mu.shape[1], dtype=torch.float64, generator=generator) for g, gaussian in q.items()}
    for group, z in latents.sample(many, noise).items():
        sigma = (0.5 * q[group].logvar[0]).exp()
        assert torch.allclose(z.mean(dim=0), q[group].mu[0], atol=5 * sigma.max().item() / 200_000**0.5)
        assert torch.allclose(z.std(dim=0), sigma, rtol=0.01)


def test_a_sample_is_mu_plus_sigma_eps():
    q = {"z": Gaussian(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, math.log(9.0)]]))}
    assert torch.allclose(latents.sample(q, {"z": torch.tensor([[1.0, -1.0]])})["z"], torch.tensor([[2.0, -1.0]]))
    assert latents.means(q)["z"] is q["z"].mu


def test_the_bound_on_log_variances():
    logvar = torch.tensor([[-100.0, -19.0, 0.3, 19.0, 100.0]], requires_grad=True)
    q = {"z": Gaussian(torch.zeros(1, 5), logvar)}
    bounded = latents.bound_logvar(q, 20.0)["z"]
    assert bounded.logvar.tolist() == [pytest.approx([-20.08, -19.0, 0.3, 19.0, 20.08])]
    assert latents.bound_logvar(q, None) is q
    kl_standard(bounded).sum().backward()
    slopes = (1e-3, 1.0, 1.0, 1.0, 1e-3)
    expected = [slope * 0.5 * (math.exp(v) - 1) for slope, v in zip(slopes, bounded.logvar[0].tolist(), strict=True)]
    assert logvar.grad[0].tolist() == pytest.approx(expected)


def test_within_the_bound_nothing_is_changed_to_the_last_bit():
    logvar = (20 * (2 * torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) - 1)).requires_grad_()
    loose = torch.tensor([-20.0] * 3), torch.tensor([20.0] * 3)
    free = {"z": Gaussian(torch.zeros(1000, 3), logvar)}
    [expected] = torch.autograd.grad(kl_standard(free["z"]).sum(), logvar)
    for q in (latents.bound_logvar(free, 20.0), latents.bound_groups(free, {"z": loose})):
        assert torch.equal(q["z"].logvar, logvar)
        assert torch.equal(torch.autograd.grad(kl_standard(q["z"]).sum(), logvar)[0], expected)


@pytest.mark.parametrize("start", [-40.0, 40.0])
def test_log_variances_beyond_their_bound_come_back(start):
    logvar = torch.full((3, 1), start, requires_grad=True)
    optimiser = torch.optim.Adam([logvar], lr=0.1)
    for _ in range(1000):
        optimiser.zero_grad()
        kl_standard(latents.bound_logvar({"z": Gaussian(torch.zeros(3, 1), logvar)}, 20.0)["z"]).sum().backward()
        optimiser.step()
    assert logvar.abs().max() < 19  # inside again, where a clamp would have left them at the start


def test_the_bound_of_stacked_runs_is_that_of_each():
    logvar = torch.tensor([[[-30.0, 1.0], [30.0, 2.0]], [[0.5, 40.0], [-40.0, 3.0]]], requires_grad=True)  # [R, N, d]
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 1.5])

    def bounded(own):
        return latents.bound_groups({"z": Gaussian(torch.zeros_like(own), own)}, {"z": (low, high)})["z"].logvar

    def loss(own):
        return bounded(own).square().sum()

    stacked = torch.func.vmap(loss)(logvar)
    [gradient] = torch.autograd.grad(stacked.sum(), logvar)
    for run, own in zip(gradient, logvar.detach(), strict=True):
        own.requires_grad_()
        assert torch.equal(torch.autograd.grad(loss(own), own)[0], run)
    values = [[-2 - 28e-3, 1.0], [2 + 28e-3, 1.5 + 0.5e-3]]
    slopes = [[1e-3, 1.0], [1e-3, 1e-3]]
    expected = [[2 * v * slope for v, slope in zip(*pair, strict=True)] for pair in zip(values, slopes, strict=True)]
    assert gradient[0].tolist() == [pytest.approx(row) for row in expected]


def test_detach():
    mu, logvar = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    q = latents.detach_posterior({"z": Gaussian(mu, logvar)})
    assert not q["z"].mu.requires_grad
    assert not q["z"].logvar.requires_grad
    assert not latents.detach({"z": mu + 1})["z"].requires_grad


@pytest.mark.parametrize("draws", [1, 64])
def test_the_sampled_kl_has_the_closed_form_as_its_mean(draws):
    q = posterior(2000, 3)
    q = Gaussian(*(t[:1].expand(2000, -1) for t in q))
    noise = torch.randn(2000, draws, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = sampled_kl(standard(3).log_prob, q, noise)
    assert values.shape == (2000,)
    error = values.std() / 2000**0.5
    assert abs(values.mean() - kl_standard(q)[0]) < 4 * error
    assert error < 2 / (2000 * draws) ** 0.5 * q.mu.square().sum().sqrt() + 0.2


def test_the_sampled_kl_takes_each_row_for_itself():
    q, p = posterior(), as_torch(posterior(seed=3))
    noise = torch.randn(7, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def log_prob(z):
        assert z.shape == (28, 5)
        return torch.distributions.Normal(0.3, 1.2).log_prob(z).sum(dim=1)

    values = sampled_kl(log_prob, q, noise)
    for i in range(7):
        points = q.mu[i] + noise[i] * (0.5 * q.logvar[i]).exp()
        cross = -torch.stack([Normal(0.3, 1.2).log_prob(z).sum() for z in points]).mean()
        assert torch.allclose(values[i], cross - as_torch(Gaussian(q.mu[i : i + 1], q.logvar[i : i + 1])).entropy()[0])
    assert p.event_shape == (5,)


def test_kl_by_group_and_its_weighted_sum():
    class Prior:
        def __init__(self, shift):
            self.shift = shift

        def kl(self, q, noise, labels):
            return kl_standard(Gaussian(q.mu - self.shift, q.logvar)) + (0 if noise is None else noise)

    q = {"a": posterior(), "b": posterior(seed=1)}
    values = kl(q, {"a": Prior(0.0), "b": Prior(1.0)}, {"b": torch.arange(7)})
    assert torch.allclose(values["a"], kl_standard(q["a"]))
    assert torch.allclose(values["b"], kl_standard(Gaussian(q["b"].mu - 1, q["b"].logvar)) + torch.arange(7))
    total = weighted(values, {"a": torch.tensor(2.0), "b": torch.tensor(3.0)})
    assert torch.allclose(total, 2 * values["a"] + 3 * values["b"])
