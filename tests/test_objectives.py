"""Losses and gradients against independent implementations that follow the papers' formulas step by step, in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from siv_core.component import per_group
from siv_core.objectives import SoftIntroVAEConfig, VAEConfig, build_soft_intro_vae, build_vae
from siv_core.players import Priors, make_nets, sources
from siv_core.protocols import Batch, Spec
from siv_core.seeding import Streams
from siv_core.testing import toy_networks
from siv_core.trainer import tensors_of

SPEC = Spec(shape=(2, 3, 3))
N = 5
GROUPS = {"one": {"z": 4}, "two": {"class": 3, "content": 2}}
BETAS = {
    "one": {"beta_rec": 0.7, "beta_kl": 0.3, "beta_neg": 5.0},
    "two": {"beta_rec": 0.5, "beta_kl": {"class": 1.1, "content": 0.4}, "beta_neg": {"class": 7.0, "content": 11.0}},
}


def squared(x, y):
    return (x - y).square().flatten(1).sum(dim=1)


def setting(groups):
    """Two copies of the same float64 networks, data, and the sources of noise."""
    networks = toy_networks(SPEC, groups, torch.float64)
    priors = Priors({group: prior() for group in groups})
    x = torch.rand(N, *SPEC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(
        E=networks.encoder, D=networks.decoder, naive_E=copy.deepcopy(networks.encoder), naive_D=copy.deepcopy(networks.decoder),
        priors=priors, x=x, sources=sources(groups, priors, networks.decoder), groups=groups,
    )  # fmt: skip


def prior():
    from siv_core.testing import _ToyPrior

    return _ToyPrior()


def to_double(tree):
    if isinstance(tree, dict):
        return {key: to_double(value) for key, value in tree.items()}
    return None if tree is None else tree.double()


def play(objective, s, noise, between=None):
    """[(loss, {player: gradients})] of each phase; `between` runs after the first, as the encoder's update does."""
    nets = make_nets({"encoder": s.E, "decoder": s.D, "prior": s.priors}, squared)
    modules, carry, results = {"encoder": s.E, "decoder": s.D, "prior": s.priors}, {}, []
    for phase in objective.phases:
        coeffs = tensors_of(objective.coeffs, torch.device("cpu"))
        loss, _, carry = phase.loss(nets, Batch(s.x), noise, coeffs, carry)
        gradients = {
            name: torch.autograd.grad(loss, list(modules[name].parameters()), retain_graph=True)
            for name in phase.updates
            if list(modules[name].parameters())
        }
        results.append((loss, gradients))
        if between:
            between()
            between = None
    return results


def naive_kl(q):
    """{group: [N]} by torch.distributions."""
    return {
        g: kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(dim=1)
        for g, (mu, logvar) in q.items()
    }


def naive_sample(q, eps):
    return {g: Normal(mu, torch.exp(logvar / 2)).mean + torch.exp(logvar / 2) * eps[g] for g, (mu, logvar) in q.items()}


def sg(codes):
    return {g: z.detach() for g, z in codes.items()}


def naive_encoder_half(s, noise, b, form, scale, alpha):
    """The canonical step, encoder half, one sample at a time, with requires_grad switched as the published code does."""
    for p in s.naive_D.parameters():
        p.requires_grad_(False)
    q = s.naive_E(s.x)
    z = naive_sample(q, noise["posterior"])
    x_r, x_p = s.naive_D(z), s.naive_D(noise["prior"])
    kl = naive_kl(q)
    total = 0.0
    for i in range(N):
        elbo = b["beta_rec"] * squared(s.x, x_r)[i] + sum(b["beta_kl"][g] * kl[g][i] for g in kl)
        total = total + scale * elbo / N
    for name, fake in (("rec", x_r), ("fake", x_p)):
        own = noise["encoder_phase"][name]
        q_f = s.naive_E(fake if form == "paper" else fake.detach())
        x_ff = s.naive_D(naive_sample(q_f, own["codes"]))
        target = fake.detach() if form == "full" else fake
        kl_f = naive_kl(q_f)
        for i in range(N):
            elbo = -(b["beta_rec"] * squared(target, x_ff)[i] + sum(b["beta_neg"][g] * kl_f[g][i] for g in kl_f))
            total = total + 0.5 / alpha * torch.exp(alpha * scale * elbo) / N
    total.backward()
    for p in s.naive_D.parameters():
        p.requires_grad_(True)
    return total, [p.grad.clone() for p in s.naive_E.parameters()], sg(z)


def naive_decoder_half(s, noise, b, form, scale, gamma, gamma_r, z, z_p):
    """The decoder half, with the encoder as it is after its update."""
    s.naive_D.zero_grad()
    for p in s.naive_E.parameters():
        p.requires_grad_(False)
    x_r, x_p = s.naive_D(z), s.naive_D(z_p)
    total = scale * b["beta_rec"] * squared(s.x, x_r).mean()
    for name, fake in (("rec", x_r), ("fake", x_p)):
        own = noise["decoder_phase"][name]
        q_f = s.naive_E(fake)
        z_f = naive_sample(q_f, own["codes"])
        paper = form == "paper"
        rec = squared(fake, s.naive_D(z_f).detach()) if paper else squared(fake.detach(), s.naive_D(sg(z_f)))
        kl_f = naive_kl(q_f)
        weighted_kl = sum(b["beta_kl"][g] * kl_f[g].mean() for g in kl_f)
        total = total + scale * gamma * 0.5 * (weighted_kl + gamma_r * b["beta_rec"] * rec.mean())
    total.backward()
    return total, [p.grad.clone() for p in s.naive_D.parameters()]


def agree(ours, naive):
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("form", ["official", "paper", "full"])
@pytest.mark.parametrize("groups", ["one", "two"])
def test_soft_intro_vae_is_algorithm_2(groups, form, share_noise):
    s = setting(GROUPS[groups])
    numbers = {"alpha": 1.7, "gamma": 0.8, "gamma_r": 0.25, "scale": 0.11}  # no round values: each must matter
    config = SoftIntroVAEConfig(**BETAS[groups], **numbers, stop_gradient=form, share_noise=share_noise)
    objective = build_soft_intro_vae(config, SPEC, s.groups)
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    b = {key: value if key == "beta_rec" else per_group(value, s.groups) for key, value in BETAS[groups].items()}

    def update_encoders():
        with torch.no_grad():
            for module in (s.E, s.naive_E):
                for p in module.parameters():
                    p += 0.05 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p)

    (loss_e, grads_e), (loss_d, grads_d) = play(objective, s, noise, between=update_encoders)
    # the naive halves start from the weights before the update
    s.naive_E.load_state_dict(toy_networks(SPEC, s.groups, torch.float64).encoder.state_dict())
    naive_loss_e, naive_grads_e, z = naive_encoder_half(s, noise, b, form, numbers["scale"], numbers["alpha"])
    agree(loss_e, naive_loss_e)
    agree(list(grads_e["encoder"]), naive_grads_e)

    s.naive_E.load_state_dict(s.E.state_dict())
    z_p = noise["prior"]
    if not share_noise:
        with torch.no_grad():
            z, z_p = naive_sample(s.naive_E(s.x), noise["posterior_again"]), noise["prior_again"]
    naive_loss_d, naive_grads_d = naive_decoder_half(
        s, noise, b, form, numbers["scale"], numbers["gamma"], numbers["gamma_r"], z, z_p
    )
    agree(loss_d, naive_loss_d)
    agree(list(grads_d["decoder"]), naive_grads_d)


def test_the_three_stop_gradient_forms_differ():
    s = setting(GROUPS["one"])
    gradients = {}
    for form in ("official", "paper", "full"):
        objective = build_soft_intro_vae(SoftIntroVAEConfig(**BETAS["one"], gamma_r=0.5, stop_gradient=form), SPEC, s.groups)
        noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
        gradients[form] = [
            torch.cat([g.flatten() for g in own]) for _, grads in play(objective, s, noise) for own in grads.values()
        ]
    assert not torch.allclose(gradients["official"][0], gradients["full"][0])
    assert not torch.allclose(gradients["official"][0], gradients["paper"][0])
    assert not torch.allclose(gradients["official"][1], gradients["paper"][1])
    torch.testing.assert_close(gradients["official"][1], gradients["full"][1])


@pytest.mark.parametrize("groups", ["one", "two"])
def test_vae_is_the_weighted_elbo(groups):
    s = setting(GROUPS[groups])
    b = {key: value for key, value in BETAS[groups].items() if key != "beta_neg"}
    objective = build_vae(VAEConfig(**b, scale=0.3), SPEC, s.groups)
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    [(loss, grads)] = play(objective, s, noise)
    q = s.naive_E(s.x)
    kl = naive_kl(q)
    beta_kl = per_group(b["beta_kl"], s.groups)
    rec = squared(s.x, s.naive_D(naive_sample(q, noise["posterior"])))
    naive = 0.3 * (b["beta_rec"] * rec + sum(beta_kl[g] * kl[g] for g in kl)).mean()
    naive.backward()
    agree(loss, naive)
    agree(list(grads["encoder"]), [p.grad for p in s.naive_E.parameters()])
    agree(list(grads["decoder"]), [p.grad for p in s.naive_D.parameters()])


def test_scale_defaults_to_one_over_the_dimensions():
    for build, config in ((build_vae, VAEConfig()), (build_soft_intro_vae, SoftIntroVAEConfig())):
        assert build(config, SPEC, {"z": 2}).coeffs["scale"] == 1 / 18


def test_terms_are_what_was_summed():
    s = setting(GROUPS["two"])
    config = SoftIntroVAEConfig(**BETAS["two"])
    objective = build_soft_intro_vae(config, SPEC, s.groups)
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    nets = make_nets({"encoder": s.E, "decoder": s.D, "prior": s.priors}, squared)
    coeffs = tensors_of(objective.coeffs, torch.device("cpu"))
    loss, terms, _ = objective.phases[0].loss(nets, Batch(s.x), noise, coeffs, {})
    kl = sum(config.beta_kl[g] * terms[f"kl_real.{g}"] for g in s.groups)
    again = (config.beta_rec * terms["rec_real"] + kl) / SPEC.dims + (terms["exp_elbo_rec"] + terms["exp_elbo_fake"]) / 4
    torch.testing.assert_close(again.mean(), loss)
    torch.testing.assert_close(terms["kl_fake"], terms["kl_fake.class"] + terms["kl_fake.content"])


def test_the_loss_is_float32_under_bf16_networks():
    s = setting(GROUPS["one"])
    nets = make_nets(
        {"encoder": s.E.float(), "decoder": s.D.float()}, squared, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    q = nets["encoder"](s.x.float())["z"]
    assert q.mu.dtype == q.logvar.dtype == torch.float32
    assert nets["decoder"]({"z": q.mu}).dtype == torch.float32
    assert make_nets({"encoder": s.naive_E}, squared)["encoder"](s.x)["z"].mu.dtype == torch.float64


def test_log_variances_are_bounded_in_one_place():
    class Wild(nn.Module):
        def forward(self, x):
            return {"z": (x, x * 1e3)}

    q = make_nets({"encoder": Wild()}, squared, logvar_bound=20.0)["encoder"](torch.tensor([[-1.0, 1.0]]))["z"]
    assert q.logvar.tolist() == [[-20.0, 20.0]]
    assert make_nets({"encoder": Wild()}, squared)["encoder"](torch.tensor([[1.0]]))["z"].logvar.item() == 1e3
