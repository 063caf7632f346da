"""The flow as a prior: a density that integrates to 1, its inverse, and a player in a game whose code knows nothing of it."""

from __future__ import annotations

import pytest
import torch
import toys
from siv_plugins import flow
from siv_plugins.flow import FlowConfig

from siv_core import Gaussian, Spec, UserError, kl_standard
from siv_core.testing import build_seeded, check_prior

SPEC = Spec((1, 4, 4))


def moved(dim=2, couplings=4, seed=0, by=0.5):
    prior = build_seeded(flow.siv_components()[0], FlowConfig(couplings=couplings, hidden=(8,)), dim, SPEC)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return prior


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_keeps_the_contract(dim):
    check_prior(moved(dim), dim, Spec((1, 4, 4)))


def test_it_begins_as_the_normal_prior():
    prior = build_seeded(flow.siv_components()[0], FlowConfig(), 3, SPEC)
    q = Gaussian(torch.randn(4, 3), torch.randn(4, 3))
    eps = torch.randn(5, 3)
    assert torch.equal(prior.sample(eps).sort(dim=1).values, eps.sort(dim=1).values)  # halves change places, and nothing else
    noise = torch.randn(4, 4000, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.kl(q, noise), kl_standard(q), rtol=0.1, atol=0.15)


@pytest.mark.parametrize("couplings", [1, 2, 5])
def test_its_density_integrates_to_1(couplings):
    prior = moved(couplings=couplings, by=0.25).double()
    grid = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).reshape(-1, 2)
    with torch.no_grad():
        total = torch.cat([prior.log_prob(part).exp() for part in z.split(100_000)]).sum() * (grid[1] - grid[0]) ** 2
    assert float(total) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dim", [2, 5])
def test_the_density_is_that_of_the_samples(dim):
    """By the Jacobian of the map, which autograd tells."""
    prior = moved(dim).double()
    eps = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda e: prior.sample(e[None])[0], eps)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum()
    expected = normal - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(prior.log_prob(prior.sample(eps[None]))[0], expected)


def test_detached_it_is_the_same_and_gets_no_gradient():
    prior = moved()
    other = prior.detach()
    z = torch.randn(4, 2, requires_grad=True)
    torch.testing.assert_close(other.log_prob(z), prior.log_prob(z))
    value = other.log_prob(z).sum() + other.sample(torch.randn(4, 2)).sum()
    value.backward()
    assert z.grad is not None
    assert all(parameter.grad is None for parameter in prior.parameters())
    assert sorted(name for name, _ in prior.named_parameters()) == sorted(moved().state_dict())  # it is whole


def test_it_plays_as_the_third_player(catalogue, tmp_path):
    tree = toys.tree(
        prior={"name": "flow", "hidden": [8], "draws": 2},
        objective={"name": "soft_intro_vae", "beta_neg": 4.0, "prior": "decoder"},
        train={"batch": 16, "length": "3 steps", "tick": "1 steps", "preview": "1000 steps"},
    )
    t = toys.trainer(catalogue, tmp_path, tree, toys_too=False)
    before = toys.weights(t, "prior")
    assert t.run() == "finished"
    after = toys.weights(t, "prior")
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith(("layers.2.weight", "layers.2.bias")))
    assert t.model().sample(3).isfinite().all()


def test_one_dimension_has_no_halves():
    with pytest.raises(UserError, match="couples halves of a code, this group has 1 dimension"):
        flow.build(FlowConfig(), 1, SPEC)
