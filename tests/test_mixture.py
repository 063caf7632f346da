"""Mixtures and VampPriors: densities, KLs, bounds, hand-over, responsibilities, and what moves them in a game of three."""

from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from pathlib import Path

import bench_prior
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from siv_plugins import mixture
from siv_plugins.mixture import Mixture, MixtureConfig, VampConfig, VampPrior, clipped

from siv_core import Batch, Gaussian, Spec, Stage, UserError, kl_standard, losses
from siv_core.objectives import soft_intro_vae, vae
from siv_core.testing import build_seeded, check_prior, toy_networks
from siv_core.train import stage

SPEC = Spec((1, 4, 4))


def spread(k=5, d=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mu = 2 * torch.randn(k, d, generator=generator, dtype=dtype)
    logvar = torch.randn(k, d, generator=generator, dtype=dtype)
    logits = torch.randn(k, generator=generator, dtype=dtype)
    return Mixture(Gaussian(mu, logvar), torch.log_softmax(logits, dim=0))


def torch_mixture(m):
    components = torch.distributions.Independent(torch.distributions.Normal(m.parts.mu, (0.5 * m.parts.logvar).exp()), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=m.log_weights), components)


def posterior(n=6, d=3, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(torch.randn(n, d, generator=generator, dtype=dtype), torch.randn(n, d, generator=generator, dtype=dtype) - 1)


def built(config, dim=3, spec=SPEC):
    component = {type(config): c for c in mixture.siv_components() if c.config is type(config)}[type(config)]
    return build_seeded(component, config, dim, spec)


# -- the distribution ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [0.0, 100.0])
def test_densities_and_shares_are_those_of_torch(far):
    m = spread()
    m = Mixture(Gaussian(m.parts.mu + far, m.parts.logvar), m.log_weights)
    z = far + 3 * torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = torch_mixture(m)
    torch.testing.assert_close(m.log_prob(z), other.log_prob(z))
    joint = other.mixture_distribution.logits + other.component_distribution.log_prob(z[:, None])
    torch.testing.assert_close(m.responsibilities(z), joint.softmax(dim=1))


def test_in_float32_little_is_lost_far_from_zero():
    m = spread(dtype=torch.float32)
    m = Mixture(Gaussian(m.parts.mu + 50, m.parts.logvar - 4), m.log_weights)
    z = 50 + torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    exact = Mixture(Gaussian(m.parts.mu.double(), m.parts.logvar.double()), m.log_weights.double()).log_prob(z.double())
    torch.testing.assert_close(m.log_prob(z).double(), exact, rtol=1e-5, atol=1e-3)


def test_samples_are_of_the_modes_by_their_weights():
    m = spread(k=3)
    n = 60_000
    generator = torch.Generator().manual_seed(0)
    noise = {
        "normal": torch.randn(n, 3, generator=generator, dtype=torch.float64),
        "which": torch.rand(n, generator=generator, dtype=torch.float64),
    }
    z = m.sample(noise)
    weights = m.log_weights.exp()
    torch.testing.assert_close(z.mean(dim=0), weights @ m.parts.mu, atol=0.05, rtol=0)
    second = weights @ (m.parts.logvar.exp() + m.parts.mu**2)
    torch.testing.assert_close((z**2).mean(dim=0), second, atol=0.3, rtol=0.03)
    shares = m.responsibilities(z).mean(dim=0)
    torch.testing.assert_close(shares, weights, atol=0.01, rtol=0)


@pytest.mark.parametrize("k", [2, 5])
def test_a_mode_without_weight_is_never_drawn(k):
    weights = torch.zeros(k)
    weights[1] = 1
    m = Mixture(Gaussian(torch.arange(k)[:, None].float() * 100, torch.zeros(k, 1)), weights.log())
    which = torch.cat([torch.rand(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1 - 6e-8])])
    z = m.sample({"normal": torch.zeros(len(which), 1), "which": which})
    assert (z == 100).all()
    assert m.log_prob(torch.tensor([[100.0], [3.0]])).isfinite().all()


@pytest.mark.parametrize("config", [MixtureConfig(modes=1, start="standard"), MixtureConfig(modes=1), MixtureConfig(modes=4)])
def test_keeps_the_contract(config):
    check_prior(built(config), 3, SPEC)


@pytest.mark.parametrize("config", [VampConfig(modes=4), VampConfig(modes=4, start="random", hand_over=1)])
def test_a_vamp_keeps_the_contract(config):
    check_prior(built(config), 3, SPEC)


# -- KL --------------------------------------------------------------------------------------------------------------------------


def test_one_mode_is_in_closed_form():
    m = spread(k=1)
    q = posterior()
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(q.mu, (0.5 * q.logvar).exp()), normal(m.parts.mu, (0.5 * m.parts.logvar).exp())
    ).sum(dim=1)
    torch.testing.assert_close(m.kl(q, None), exact)


def test_at_mean_0_and_variance_1_it_is_the_normal_prior_to_the_last_bit():
    prior = built(MixtureConfig(modes=1, start="standard"))
    q = posterior(dtype=torch.float32)
    m = prior.realise(None)
    assert torch.equal(m.kl(q, None), kl_standard(q))
    noise = prior.draw(5, torch.Generator().manual_seed(3))
    assert torch.equal(noise["normal"], torch.randn(5, 3, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(m.sample(noise), noise["normal"])
    assert not hasattr(prior, "draw_kl")


def test_a_sampled_kl_is_unbiased_against_the_closed_form():
    """Modes that are all alike are one Gaussian."""
    one = spread(k=1)
    alike = Mixture(Gaussian(one.parts.mu.expand(4, 3), one.parts.logvar.expand(4, 3)), torch.full((4,), -math.log(4)))
    q = posterior()
    noise = torch.randn(6, 20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = torch.stack([alike.kl(q, part) for part in noise.split(1000, dim=1)])
    error = each.std(dim=0) / len(each) ** 0.5
    assert ((each.mean(dim=0) - one.kl(q, None)).abs() < 4 * error + 1e-12).all()


def test_a_sampled_kl_is_unbiased_against_quadrature_in_the_plane():
    m, q = spread(d=2), posterior(n=3, d=2)
    grid = torch.linspace(-14, 14, 1401, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).reshape(-1, 2)
    area = float(grid[1] - grid[0]) ** 2
    log_q = torch.distributions.Normal(q.mu[:, None], (0.5 * q.logvar).exp()[:, None]).log_prob(z).sum(dim=2)
    exact = (log_q.exp() * (log_q - m.log_prob(z))).sum(dim=1) * area
    noise = torch.randn(3, 40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = torch.stack([m.kl(q, part) for part in noise.split(1000, dim=1)])
    assert ((each.mean(dim=0) - exact).abs() < 4 * each.std(dim=0) / len(each) ** 0.5).all()


def test_a_sampled_kl_takes_little_memory_and_is_the_naive_one():
    """K = 100, S = 100, batch 32, d = 128: the naive form makes 41 million numbers at a time."""
    q, parts, noise = bench_prior.inputs()
    few = noise[:, :3]
    naive, products = (bench_prior.once(form, q, parts, few) for form in (bench_prior.naive, bench_prior.products))
    torch.testing.assert_close(products[0], naive[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(products[1], naive[1], rtol=1e-3, atol=1e-3)
    script = Path(bench_prior.__file__)
    taken = {
        form: int(subprocess.run([sys.executable, script, "--peak", form], capture_output=True, text=True, check=True).stdout)
        for form in bench_prior.FORMS
    }
    assert taken["naive"] > 160e6
    assert taken["products"] < taken["naive"] / 4


# -- bounds ----------------------------------------------------------------------------------------------------------------------


def test_log_variances_are_held_softly():
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 0.0])
    at = torch.tensor([[-0.5, 0.0], [1.0, 3.0], [4.0, -7.0], [-2.0, 0.0]], requires_grad=True)
    held = clipped(at, low, high)
    width = 3 * math.log(2) / 10
    expected = torch.tensor([[-0.5, 0.0], [1 - width, 0.0], [1.0, 0.0], [-2 + width, 0.0]])
    torch.testing.assert_close(held, expected, atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(held[:, 0].sum(), at)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.987, 0.5, 4.5e-5, 0.5]), atol=1e-3, rtol=0)


@given(
    s=st.floats(-1e4, 1e4, width=32),
    low=st.floats(-20, 20, width=32),
    width=st.one_of(st.just(0.0), st.floats(2.0**-40, 40, width=32)),
)
def test_bounds_are_finite_at_any_value(s, low, width):
    at = torch.tensor([[s]], requires_grad=True)
    held = clipped(at, torch.tensor([low]), torch.tensor([low]) + width)
    (gradient,) = torch.autograd.grad(held.sum(), at)
    assert held.isfinite().all()
    assert gradient.isfinite().all()
    assert -1e-3 <= gradient.item() <= 1 + 1e-3
    assert low - 0.1 * width - 1e-2 <= held.item() <= low + 1.1 * width + 1e-2


def test_bounds_are_taken_where_their_stage_begins_and_kept():
    prior = built(MixtureConfig(modes=4, start="random", clip_stage=1))
    raw = prior.logvar.detach().clone()
    prior.set_stage(Stage(0, (1, 4, 4)))
    prior.begin(Stage(0, (1, 4, 4)), iter(()), None)
    assert torch.equal(prior.realise(None).parts.logvar, raw)
    prior.set_stage(Stage(1, (1, 4, 4)))
    prior.begin(Stage(1, (1, 4, 4)), iter(()), None)
    assert torch.equal(prior.bounds, torch.stack([raw.amin(dim=0), raw.amax(dim=0)]))
    with torch.no_grad():
        prior.logvar += 100
    held = prior.realise(None).parts.logvar
    torch.testing.assert_close(held, raw.amax(dim=0).expand_as(held))
    assert "bounds" in prior.state_dict()


# -- beginnings ------------------------------------------------------------------------------------------------------------------


def encode(x, labels=None):
    flat = x.flatten(1)[:, :3]
    return Gaussian(flat, flat - 1)


def batches(n=10, size=4):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, iter([Batch(part) for part in x.split(size)])


def test_modes_start_as_the_posteriors_of_the_first_images():
    """More modes than a batch has images."""
    prior = built(MixtureConfig(modes=9))
    x, given_batches = batches()
    with torch.no_grad():
        prior.begin(Stage(0, (1, 4, 4)), given_batches, encode)
    assert torch.equal(prior.mu, encode(x[:9]).mu)
    assert torch.equal(prior.logvar, encode(x[:9]).logvar)


def test_noise_is_around_the_mean_of_the_data_however_few_modes_or_many():
    x, _ = batches(40)
    for modes in (2, 100):
        prior = built(VampConfig(modes=modes, start="random"))
        prior.noise = torch.zeros_like(prior.noise)
        with torch.no_grad():
            prior.begin(Stage(0, (1, 4, 4)), batches(40)[1], encode)
        torch.testing.assert_close(prior.pseudo_inputs.detach(), x.mean(dim=0).expand(modes, 1, 4, 4))


def test_a_start_sees_each_image_once(catalogue, tmp_path):
    """The last batch is what is left; a batch larger than the data is the data."""
    for batch in (64, 5000):
        t = toys.trainer(catalogue, tmp_path, toys.tree(train={"batch": batch, "length": "1 steps"}))
        seen = []
        t.players["encoder"].module.begin = lambda stage, batches, encode, seen=seen: seen.extend(b.x for b in batches)
        stage.enter(t, 0)
        rows = t.feed.batch(torch.arange(1400), (1, 8, 8), torch.contiguous_format).x
        assert torch.equal(torch.cat(seen).flatten(1).sort(dim=0).values, rows.flatten(1).sort(dim=0).values)


def test_more_modes_than_images_are_told_before_anything_is_made(siv, tmp_path):
    (tmp_path / "r.toml").write_text(toys.SOFT + "[prior]\nname = 'mixture'\nmodes = 5000\n[train]\nlength = '1 steps'\n")
    done = siv("run", "r.toml", "--run-dir", "run")
    assert done.returncode == 2
    assert "prior.modes: 5000 do not start from 1400 training samples: give fewer" in done.stderr
    assert not (tmp_path / "run").exists()


def test_pseudo_inputs_do_not_grow(catalogue, tmp_path):
    """Images of the data's size in a stage of a smaller one, told before anything begins, with a hand-over or without."""
    network = {"name": "style", "start_channels": 4, "max_channels": 4, "z_dim": 3, "style_mixing": 0.0}
    small = [{"length": "1 steps", "objective": {"name": "vae"}, "data": {"size": 4}}, {"length": "1 steps"}]
    tree = toys.tree(network=network, prior={"name": "vamp", "modes": 3}, stages=small, train={"batch": 8})
    with pytest.raises(
        UserError, match=r"prior: its pseudo-inputs have the data's 8 pixels a side, stage 0 has 4: take a mixture"
    ):
        toys.trainer(catalogue, tmp_path, tree, toys_too=False)
    handed_over = [small[0], {**small[0], "data": {"size": 8}}, small[1]]
    prior = {"name": "vamp", "modes": 3, "hand_over": 1}
    toys.trainer(catalogue, tmp_path, {**tree, "prior": {**prior, "hand_over": 0}, "stages": small[1:]}, toys_too=False)
    with pytest.raises(UserError, match="stage 0 has 4"):
        toys.trainer(catalogue, tmp_path, {**tree, "prior": prior, "stages": handed_over}, toys_too=False)


def test_more_modes_than_images_are_refused():
    prior = built(MixtureConfig(modes=11))
    with pytest.raises(UserError, match=r"prior\.modes: 11 do not start from 10 training samples: give fewer"):
        prior.begin(Stage(0, (1, 4, 4)), batches()[1], encode)


def test_a_hand_over_leaves_the_density_as_it_was():
    """Weights included, which learn."""
    prior = built(VampConfig(modes=5, hand_over=2, learn_weights=True))
    _, given_batches = batches()
    with torch.no_grad():
        prior.begin(Stage(0, (1, 4, 4)), given_batches, encode)
        prior.logits.copy_(torch.randn(5, generator=torch.Generator().manual_seed(1)))
        prior.pseudo_inputs += 0.3
    prior.set_stage(Stage(1, (1, 4, 4)))
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
    before = prior.realise(encode).log_prob(z)
    prior.set_stage(Stage(2, (1, 4, 4)))
    with torch.no_grad():
        prior.begin(Stage(2, (1, 4, 4)), iter(()), encode)
    assert torch.equal(prior.realise(None).log_prob(z), before)  # and without an encoder


def test_pseudo_inputs_stay_in_the_range_and_keep_their_gradients():
    prior = built(VampConfig(modes=2))
    with torch.no_grad():
        prior.pseudo_inputs.fill_(1.5)
        prior.pseudo_inputs[1] = 0.0
    seen = []

    def look(x, labels=None):
        seen.append(x)
        return encode(x)

    prior.realise(look).log_prob(torch.zeros(4, 3)).sum().backward()
    assert seen[0].min() == 0
    assert seen[0].max() == 1
    assert (prior.pseudo_inputs.grad.flatten(1)[:, :3] != 0).all()


def test_conditional_pseudo_inputs_have_labels():
    spec = Spec((1, 4, 4), classes=3, conditional=True)
    prior = built(VampConfig(modes=4), spec=spec)
    given_labels = torch.tensor([2, 0, 1, 1])
    seen = []
    with torch.no_grad():
        prior.begin(Stage(0, (1, 4, 4)), iter([Batch(torch.rand(4, 1, 4, 4), given_labels)]), lambda x, labels: encode(x))
    prior.realise(lambda x, labels: (seen.append(labels), encode(x))[1])
    assert torch.equal(seen[0], given_labels)


# -- responsibilities ------------------------------------------------------------------------------------------------------------


def far_apart(k, responsibility=2.0):
    return Mixture(Gaussian(100 * torch.eye(k), torch.zeros(k, k)), torch.full((k,), -math.log(k)), responsibility)


@pytest.mark.parametrize("k", [2, 4])
def test_evenly_spread_codes_cost_least(k):
    m = far_apart(k)
    noise = torch.zeros(k, 7, k)

    def cost(mu):
        return float(m.regulariser(mu, lambda x: x.mean(dim=0), Gaussian(mu, torch.zeros_like(mu)), noise))

    assert cost(100 * torch.eye(k)) == pytest.approx(-2.0, abs=1e-5)  # h times −1
    assert cost(100 * torch.eye(k)[:1].expand(k, -1)) == pytest.approx(0.0, abs=1e-5)
    assert not hasattr(Mixture(m.parts, m.log_weights), "regulariser")


def test_it_is_the_published_formula_and_pulls_at_the_codes():
    m = spread()
    m = Mixture(m.parts, m.log_weights, 3.0)
    q = Gaussian(posterior().mu.requires_grad_(), posterior().logvar.requires_grad_())
    noise = torch.randn(6, 11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = m.regulariser(q.mu, lambda x: x.mean(dim=0), q, noise)
    z = q.mu[:, None] + noise * (0.5 * q.logvar).exp()[:, None]
    naive = torch.stack([torch.stack([m.responsibilities(one[None])[0] for one in row]).mean(dim=0) for row in z]).mean(dim=0)
    torch.testing.assert_close(value, 3.0 * (naive * (naive + 1e-8).log()).sum() / math.log(5))
    gradients = torch.autograd.grad(value, [q.mu, q.logvar])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# -- the third player ------------------------------------------------------------------------------------------------------------


def game(config, objective):
    """Networks with one group, a mixture that has three modes, and the phases' losses."""
    from siv_core.nets import Priors, make_nets, sources
    from siv_core.seeding import Streams
    from siv_core.train.step import tensors_of

    networks = toy_networks(SPEC, {"z": 3})
    prior = built(config)
    with torch.no_grad():
        prior.mu.copy_(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
        if isinstance(prior, VampPrior):
            prior.pseudo_inputs.copy_(torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)))
    priors = Priors({"z": prior})
    build = vae.build_vae if isinstance(objective, vae.VAEConfig) else soft_intro_vae.build_soft_intro_vae
    built_objective = build(objective, SPEC, {"z": 3})
    noise = built_objective.draw(4, Streams(0, 0), sources(networks.groups, priors, networks.decoder))
    nets = make_nets(
        {"encoder": networks.encoder, "decoder": networks.decoder, "prior": priors},
        lambda x, y: (x - y).square().flatten(1).sum(dim=1),
    )
    batch = Batch(torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    coeffs = tensors_of(built_objective.coeffs, torch.device("cpu"))
    return built_objective, networks, prior, nets, batch, noise, coeffs


def moved(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients]


LEARNING = MixtureConfig(modes=3, start="random", learn_weights=True, responsibility=1.0)


@pytest.mark.parametrize(
    ("settings", "encoder_phase", "decoder_phase"),
    [  # (means, log-variances, weights) of the prior in each phase
        ({}, (False, False, False), (False, False, False)),
        ({"prior": "decoder"}, (False, False, False), (True, True, True)),
        ({"prior": "decoder", "prior_samples": False}, (False, False, False), (True, True, True)),
        ({"prior": "encoder"}, (True, True, True), (False, False, False)),
    ],
)
@pytest.mark.parametrize("stop_gradient", ["official", "paper", "full"])
def test_who_moves_the_prior(settings, encoder_phase, decoder_phase, stop_gradient):
    if settings == {"prior": "decoder"} and stop_gradient == "paper":
        pytest.skip("refused: see test_what_does_not_fit_is_told_before_anything_begins")
    settings = {**settings, "stop_gradient": stop_gradient}
    objective, networks, prior, nets, batch, noise, c = game(
        LEARNING, soft_intro_vae.SoftIntroVAEConfig(beta_neg=2.0, **settings)
    )
    own, carry = [prior.mu, prior.logvar, prior.logits], {}
    for phase, expected in zip(objective.phases, (encoder_phase, decoder_phase), strict=True):
        assert ("prior" in phase.updates) == any(expected)
        loss, terms, carry = phase.loss(nets, batch, noise, c, carry)
        assert tuple(moved(loss, own)) == expected
        assert ("kl_fit" in terms) == (phase.name == "decoder" and settings.get("prior") == "decoder")
        player = networks.encoder if phase.name == "encoder" else networks.decoder
        assert all(moved(loss, list(player.parameters())))


def test_what_each_term_of_the_decoder_s_phase_moves():
    """The KL of data moves means, variances and weights; that of samples means and variances alone, through the codes; that of
    reconstructions and all reconstruction terms nothing of the prior; and the KL of data nothing of the decoder."""
    config = soft_intro_vae.SoftIntroVAEConfig(prior="decoder", beta_neg=2.0, gamma_r=1.0)
    _, networks, prior, nets, batch, noise, c = game(LEARNING, config)
    how = {"fakes": ("rec", "prior"), "stop_gradient": "official", "share_noise": True, "learns": True, "samples": True}
    _, _, carry = soft_intro_vae.encoder_loss(nets, batch, noise, c, {}, fakes=("rec", "prior"), stop_gradient="official")
    half = soft_intro_vae.decoder_half(nets, nets.prior(frozen=False), batch, noise, c, carry, **how)
    own, decoder = [prior.mu, prior.logvar, prior.logits], list(networks.decoder.parameters())
    table = {
        "kl_fit": ((True, True, True), False),
        "kl_prior": ((True, True, False), True),
        "kl_rec": ((False, False, False), True),
        "rec_real": ((False, False, False), True),
        "rec_rec": ((False, False, False), True),
        "rec_prior": ((False, False, False), True),
    }
    assert table.keys() <= half.terms.keys()
    for name, (of_prior, of_decoder) in table.items():
        term = half.terms[name].sum()
        assert tuple(moved(term, own)) == of_prior, name
        assert any(moved(term, decoder)) == of_decoder, name
    without = soft_intro_vae.decoder_half(nets, nets.prior(frozen=False), batch, noise, c, carry, **{**how, "samples": False})
    assert tuple(moved(without.terms["kl_prior"].sum(), own)) == (False, False, False)
    torch.testing.assert_close(without.loss, half.loss)


def test_the_warm_up_moves_the_prior_by_the_kl_alone():
    """Reconstruction moves nothing of the prior; the KL moves it and the encoder, not the decoder; a vamp's pseudo-inputs
    learn by way of the encoder."""
    for config in (LEARNING, VampConfig(modes=3, draws=3, learn_weights=True)):
        objective, networks, prior, nets, batch, noise, c = game(config, vae.VAEConfig())
        [phase] = objective.phases
        _, terms, _ = phase.loss(nets, batch, noise, c, {})
        own = [prior.pseudo_inputs, prior.logits] if isinstance(prior, VampPrior) else [prior.mu, prior.logvar, prior.logits]
        encoder, decoder = (list(module.parameters()) for module in networks[:2])
        assert not any(moved(terms["rec_real"].sum(), own))
        assert all(moved(terms["kl_real"].sum(), own))
        assert any(moved(terms["kl_real"].sum(), encoder))
        assert not any(moved(terms["kl_real"].sum(), decoder))


@pytest.mark.parametrize("share_noise", [True, False])
def test_the_prior_fits_the_posterior_of_before_the_encoder_s_update(share_noise):
    config = soft_intro_vae.SoftIntroVAEConfig(prior="decoder", beta_neg=2.0, share_noise=share_noise)
    objective, networks, _, nets, batch, noise, c = game(LEARNING, config)
    q = nets.posterior(batch, noise)
    expected = losses.kl(q, nets.prior(frozen=True), noise["kl"]["real"])["z"]
    _, _, carry = objective.phases[0].loss(nets, batch, noise, c, {})
    with torch.no_grad():
        for parameter in networks.encoder.parameters():
            parameter += 0.3
    _, terms, _ = objective.phases[1].loss(nets, batch, noise, c, carry)
    torch.testing.assert_close(terms["kl_fit"], expected)


def test_what_each_term_of_the_encoder_s_phase_moves():
    """Frozen, nothing; with the encoder, the KL of data alone: neither the exponentials nor the regulariser."""
    config = soft_intro_vae.SoftIntroVAEConfig(prior="encoder", beta_neg=2.0)
    _, networks, prior, nets, batch, noise, c = game(LEARNING, config)
    how = {"fakes": ("rec", "prior"), "stop_gradient": "official"}
    half = soft_intro_vae.encoder_half(nets, nets.prior(frozen=False), batch, noise, c, **how)
    own, encoder = [prior.mu, prior.logvar, prior.logits], list(networks.encoder.parameters())
    for name in ("rec_real", "exp_elbo_rec", "exp_elbo_prior", "kl_rec", "kl_prior", "regulariser"):
        assert tuple(moved(half.terms[name].sum(), own)) == (False, False, False), name
        assert any(moved(half.terms[name].sum(), encoder)), name
    assert tuple(moved(half.terms["kl_real"].sum(), own)) == (True, True, True)


GAME = [
    {"length": "3 steps", "objective": {"name": "vae"}},
    {"length": "4 steps"},
]


def trained(catalogue, folder, table, **objective):
    tree = toys.tree(
        prior=table,
        objective={"name": "soft_intro_vae", "beta_neg": 4.0, **objective},
        train={"batch": 16, "tick": "1 steps", "preview": "1000 steps"},
        stages=GAME,
    )
    t = toys.trainer(catalogue, folder, tree, toys_too=False)
    states = []
    while t.counters.step < t.schedule.total:
        number = t.schedule.next(t.counters.step)
        if t.active is None or t.active.stage.number != number:
            t.active = stage.enter(t, number)
        t.advance(t.active)
        states.append(toys.weights(t, "prior"))
    return t, states


@pytest.mark.parametrize("where", [("z",), ("class",), ("content",), ("class", "content")], ids="-".join)
def test_one_frozen_standard_mode_is_the_normal_prior_to_the_last_bit(catalogue, tmp_path, where):
    """Warm-up and game, in any latent group: others draw the noise that they draw beside a normal prior."""
    mode = {"name": "mixture", "modes": 1, "start": "standard", "learns": False}
    stages = [{"length": "2 steps", "objective": {"name": "vae"}}, {"length": "4 steps"}]
    train = {"batch": 16, "tick": "1 steps", "preview": "1000 steps"}
    tables = {"train": train, "stages": stages, **({} if where == ("z",) else tomllib.loads(toys.ADAIN))}
    plain = toys.trainer(catalogue, tmp_path / "a", toys.tree(**tables))
    other = toys.trainer(catalogue, tmp_path / "b", toys.tree(**tables, prior=dict.fromkeys(where, mode)))
    for t in (plain, other):
        assert t.run() == "finished"
    for player in ("encoder", "decoder"):
        assert toys.same(toys.weights(plain, player), toys.weights(other, player))
    lines = [[{**line, "wall": None} for line in t.rundir.read("stats")] for t in (plain, other)]
    assert lines[0] == lines[1]


def test_a_mixture_may_stay_as_it_starts(catalogue, tmp_path):
    prior = {"name": "mixture", "modes": 4, "draws": 5, "learns": False}
    t, states = trained(catalogue, tmp_path, prior)
    assert not t.players["prior"].parameters
    assert all(toys.same(states[0], later) for later in states[1:])
    assert states[0]["groups.z.mu"].abs().max() > 0  # from data
    with pytest.raises(UserError, match=r"objective\.prior: the prior 'mixture' has nothing that learns"):
        trained(catalogue, tmp_path, prior, prior="decoder")
    _, states = trained(catalogue, tmp_path / "vamp", {**prior, "name": "vamp", "hand_over": 1})
    assert torch.equal(states[0]["groups.z.pseudo_inputs"], states[-1]["groups.z.pseudo_inputs"])
    assert not torch.equal(states[2]["groups.z.mu"], states[3]["groups.z.mu"])  # handed over
    assert all(toys.same(states[3], later) for later in states[4:])


def test_a_fixed_prior_stays_as_the_warm_up_left_it(catalogue, tmp_path):
    prior = {"name": "vamp", "modes": 6, "hand_over": 1, "learn_weights": True, "draws": 5}
    _, states = trained(catalogue, tmp_path / "fixed", prior)
    key = "groups.z.logits"
    assert not torch.equal(states[0][key], states[2][key])  # it learns in the warm-up
    assert all(toys.same(states[3], later) for later in states[4:])
    _, learning = trained(catalogue, tmp_path / "decoder", prior, prior="decoder")
    assert not toys.same(learning[3], learning[6])
    pseudo = "groups.z.pseudo_inputs"
    assert not torch.equal(learning[0][pseudo], learning[2][pseudo])
    assert torch.equal(learning[3][pseudo], learning[6][pseudo])  # handed over
    assert not torch.equal(learning[3]["groups.z.mu"], learning[6]["groups.z.mu"])


def test_log_variances_have_a_rate_of_their_own(catalogue, tmp_path):
    prior = {"name": "mixture", "modes": 4, "start": "random", "draws": 5, "logvar_rate": 1e-6}
    _, states = trained(catalogue, tmp_path, prior, prior="decoder")
    assert (states[6]["groups.z.logvar"] - states[0]["groups.z.logvar"]).abs().max() < 1e-7
    assert (states[6]["groups.z.mu"] - states[0]["groups.z.mu"]).abs().max() > 1e-5


def test_each_latent_group_has_its_own(catalogue, tmp_path):
    tree = {
        "format": 1,
        "data": {"name": "digits"},
        **tomllib.loads(toys.ADAIN),
        "prior": {"class": {"name": "mixture", "modes": 3, "draws": 4}, "content": {"name": "standard_normal"}},
        "objective": {"name": "soft_intro_vae", "beta_neg": 4.0, "prior": "decoder"},
        "train": {"batch": 8, "length": "2 steps", "tick": "1 steps", "preview": "1000 steps"},
    }
    t = toys.trainer(catalogue, tmp_path, tree)
    before = toys.weights(t, "prior")
    assert t.run() == "finished"
    after = toys.weights(t, "prior")
    assert not torch.equal(before["groups.class.mu"], after["groups.class.mu"])
    assert not any(key.startswith("groups.content") for key in after)
    assert t.model().sample(3, truncation=0.5).shape == (3, 1, 8, 8)


# -- what does not fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "objective", "told"),
    [
        ({"modes": 0}, {}, "prior.modes: must be >= 1"),
        ({"modes": 3, "weights": [0.5, 0.5]}, {}, "prior.weights: there are 2 for 3 modes"),
        ({"modes": 2, "weights": [0.5, 0.6]}, {}, "prior.weights: their sum is 1.1, expected 1"),
        ({"modes": 2, "start": "standard"}, {}, "prior.start: standard is for one mode"),
        ({"modes": 1, "responsibility": 1.0}, {}, "prior.responsibility: one mode is never left alone"),
        ({"modes": 1, "learn_weights": True}, {}, "prior.learn_weights: one mode has the weight 1"),
        ({"learn_weights": True, "learns": False}, {}, "prior.learn_weights: nothing learns with learns = false"),
        ({}, {"name": "bootstrap_soft_intro_vae", "prior": "decoder"}, "objective.prior: the bootstrap form moves no prior"),
        ({}, {"prior": "decoder", "stop_gradient": "paper"}, 'objective.stop_gradient: "paper": a reconstruction would move'),
        ({}, {"prior_samples": False}, 'objective.prior_samples: with prior = "fixed" codes move no prior: leave it out'),
        ({}, {"prior": "encoder", "prior_samples": False}, 'objective.prior_samples: with prior = "encoder" codes move no'),
        ({"hand_over": 1}, {}, "prior.hand_over: unknown key"),
        ({"name": "vamp", "hand_over": 5}, {}, "prior.hand_over: is 5, the stages are 0 to 1"),
        ({"name": "vamp", "modes": 1}, {}, "a vamp of one pseudo-input is one Gaussian"),
        ({"name": "vamp", "hand_over": 2, "clip_stage": 1}, {}, "prior.clip_stage: 1 is before hand_over = 2"),
        ({"clip_stage": 1}, {}, "prior.clip_stage: no objective moves the prior from stage 1 on"),
        (
            {"name": "standard_normal"},
            {"prior": "decoder"},
            "objective.prior: the prior 'standard_normal' has nothing that learns",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_begins(catalogue, tmp_path, prior, objective, told):
    with pytest.raises(UserError) as caught:
        trained(catalogue, tmp_path, {"name": "mixture", **prior}, **objective)
    assert told in "\n".join(caught.value.problems), caught.value.problems


def test_a_price_that_nobody_pays_is_told(catalogue, tmp_path):
    priced = {"name": "mixture", "modes": 3, "responsibility": 1.0}
    with pytest.raises(UserError, match=r"prior\.responsibility: the encoder of an introspective objective pays it") as caught:
        toys.trainer(catalogue, tmp_path, toys.tree(objective={"name": "vae"}, prior=priced))
    assert len(caught.value.problems) == 1
    stages = [{"length": "1 steps", "objective": {"name": "vae"}}, {"length": "1 steps"}]
    for name in ("soft_intro_vae", "intro_vae", "bootstrap_soft_intro_vae"):  # each has an encoder that pays
        tree = toys.tree(objective={"name": name}, prior=priced, stages=stages, train={"batch": 8, "tick": "1 steps"})
        t = toys.trainer(catalogue, tmp_path / name, tree)
        assert t.run() == "finished"
        assert "regulariser" in t.rundir.read("stats")[-1]["phases"]["encoder"]


def test_what_is_wrong_with_the_objective_is_told_once(catalogue, tmp_path):
    """And not again by who looks whether it moves the prior."""
    with pytest.raises(UserError) as caught:
        trained(catalogue, tmp_path, {"name": "mixture", "clip_stage": 1}, beta_kl={"q": 1.0})
    assert len(caught.value.problems) == 1
    assert "objective.beta_kl: the groups are z, got q" in caught.value.problems[0]


def test_a_group_that_the_network_does_not_have(catalogue, tmp_path):
    with pytest.raises(UserError, match=r"prior\.content: the network has no such group"):
        toys.trainer(catalogue, tmp_path, toys.tree(prior={"content": {"name": "mixture"}}))


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3),
    logvar=st.floats(-30, 30, width=32),
    far=st.floats(-1e3, 1e3, width=32),
)
def test_nothing_is_ever_not_finite(logits, logvar, far):
    """Weights driven to 0, empty modes, codes far from all of them: value and gradients."""
    mu = torch.tensor([[0.0, 0.0], [1.0, -1.0], [far, far]], requires_grad=True)
    s, w = torch.full((3, 2), logvar, requires_grad=True), torch.tensor(logits, requires_grad=True)
    m = Mixture(Gaussian(mu, s), torch.log_softmax(w, dim=0), 1.0)
    q = Gaussian(torch.zeros(2, 2), torch.zeros(2, 2))
    noise = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    value = m.kl(q, noise).sum() + m.regulariser(q.mu, lambda x: x.mean(dim=0), q, noise)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, [mu, s, w]))
    which = {"normal": torch.randn(5, 2), "which": torch.rand(5)}
    assert m.sample(which).isfinite().all()
