"""Losses and gradients against independent implementations that follow the papers' formulas step by step, in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import toys
from siv_plugins import adain, bootstrap, mlp
from torch import nn
from torch.distributions import Normal, kl_divergence

from siv_core.component import per_group
from siv_core.errors import UserError
from siv_core.nets import Priors, make_nets, sources
from siv_core.objectives.intro_vae import IntroVAEConfig, build_intro_vae
from siv_core.objectives.soft_intro_vae import SoftIntroVAEConfig, build_soft_intro_vae
from siv_core.objectives.vae import VAEConfig, build_vae
from siv_core.protocols import Batch, Shadow, Spec
from siv_core.seeding import Streams
from siv_core.testing import toy_networks
from siv_core.train.players import Follower
from siv_core.train.step import tensors_of

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


def play(objective, s, noise, between=None, shadows=None):
    """[(loss, {player: gradients})] of each phase; `between` runs after the first, as the encoder's update does."""
    nets = make_nets({"encoder": s.E, "decoder": s.D, "prior": s.priors, **(shadows or {})}, squared)
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


def naive_encoder_half(s, noise, b, form, scale, alpha, fakes=("rec", "prior"), target_decoder=None):
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
    for name in fakes:
        fake, own = {"rec": x_r, "prior": x_p}[name], noise["encoder_phase"][name]
        q_f = s.naive_E(fake if form == "paper" else fake.detach())
        x_ff = (target_decoder or s.naive_D)(naive_sample(q_f, own["codes"]))
        target = fake.detach() if form == "full" else fake
        kl_f = naive_kl(q_f)
        for i in range(N):
            elbo = -(b["beta_rec"] * squared(target, x_ff)[i] + sum(b["beta_neg"][g] * kl_f[g][i] for g in kl_f))
            total = total + torch.exp(alpha * scale * elbo) / alpha / len(fakes) / N
    total.backward()
    for p in s.naive_D.parameters():
        p.requires_grad_(True)
    return total, [p.grad.clone() for p in s.naive_E.parameters()], sg(z)


def naive_decoder_half(s, noise, b, form, scale, gamma, gamma_r, z, z_p, fakes=("rec", "prior")):
    """The decoder half, with the encoder as it is after its update."""
    s.naive_D.zero_grad()
    for p in s.naive_E.parameters():
        p.requires_grad_(False)
    x_r, x_p = s.naive_D(z), s.naive_D(z_p)
    total = scale * b["beta_rec"] * squared(s.x, x_r).mean()
    for name in fakes:
        fake, own = {"rec": x_r, "prior": x_p}[name], noise["decoder_phase"][name]
        q_f = s.naive_E(fake)
        z_f = naive_sample(q_f, own["codes"])
        paper = form == "paper"
        rec = squared(fake, s.naive_D(z_f).detach()) if paper else squared(fake.detach(), s.naive_D(sg(z_f)))
        kl_f = naive_kl(q_f)
        weighted_kl = sum(b["beta_kl"][g] * kl_f[g].mean() for g in kl_f)
        total = total + scale * gamma / len(fakes) * (weighted_kl + gamma_r * b["beta_rec"] * rec.mean())
    total.backward()
    return total, [p.grad.clone() for p in s.naive_D.parameters()]


def agree(ours, naive):
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-14)


ALGORITHMS = {1: ("prior",), 2: ("rec", "prior")}


def update_encoders(s):
    """A step of the encoder, ours and the naive one, between the phases."""
    with torch.no_grad():
        for module in (s.E, s.naive_E):
            for p in module.parameters():
                p += 0.05 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("form", ["official", "paper", "full"])
@pytest.mark.parametrize("groups", ["one", "two"])
def test_soft_intro_vae_is_algorithms_1_and_2(groups, form, share_noise, algorithm):
    s, fakes = setting(GROUPS[groups]), ALGORITHMS[algorithm]
    numbers = {"alpha": 1.7, "gamma": 0.8, "gamma_r": 0.25, "scale": 0.11}  # no round values: each must matter
    config = SoftIntroVAEConfig(**BETAS[groups], **numbers, stop_gradient=form, share_noise=share_noise, fakes=fakes)
    objective = build_soft_intro_vae(config, SPEC, s.groups)
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    b = {key: value if key == "beta_rec" else per_group(value, s.groups) for key, value in BETAS[groups].items()}
    (loss_e, grads_e), (loss_d, grads_d) = play(objective, s, noise, between=lambda: update_encoders(s))
    # the naive halves start from the weights before the update
    s.naive_E.load_state_dict(toy_networks(SPEC, s.groups, torch.float64).encoder.state_dict())
    naive_loss_e, naive_grads_e, z = naive_encoder_half(s, noise, b, form, numbers["scale"], numbers["alpha"], fakes)
    agree(loss_e, naive_loss_e)
    agree(list(grads_e["encoder"]), naive_grads_e)

    s.naive_E.load_state_dict(s.E.state_dict())
    z_p = noise["prior"]
    if not share_noise:
        with torch.no_grad():
            z, z_p = naive_sample(s.naive_E(s.x), noise["posterior_again"]), noise["prior_again"]
    naive_loss_d, naive_grads_d = naive_decoder_half(
        s, noise, b, form, numbers["scale"], numbers["gamma"], numbers["gamma_r"], z, z_p, fakes
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


# -- IntroVAE ------------------------------------------------------------------------------------------------------------------

# what the published forms differ in, written down a second time: (fakes, batch mean, factor of their sum, decoder's weight)
FORMS = {
    "table2": (("prior",), False, 1.0, "beta_neg"),
    "introvae": (("rec", "prior"), False, 1.0, "beta_neg"),
    "hhb072": (("rec", "prior"), True, 0.5, "beta_kl"),
}
# between the KLs of the samples and above their mean: the hinge of each sample and of the batch differ, and neither is silent
MARGINS = {"one": 0.334, "two": {"class": 0.07, "content": 0.186}}


@pytest.mark.parametrize("groups", ["one", "two"])
@pytest.mark.parametrize("preset", FORMS)
def test_intro_vae_is_each_published_form(preset, groups):
    s = setting(GROUPS[groups])
    fakes, batch_mean, factor, decoder_weight = FORMS[preset]
    config = IntroVAEConfig(**BETAS[groups], margin=MARGINS[groups], preset=preset, scale=0.9)
    objective = build_intro_vae(config, SPEC, s.groups)
    assert objective.batch_statistic == batch_mean
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    b = {key: value if key == "beta_rec" else per_group(value, s.groups) for key, value in BETAS[groups].items()}
    m = per_group(MARGINS[groups], s.groups)
    (loss_e, grads_e), (loss_d, grads_d) = play(objective, s, noise, between=lambda: update_encoders(s))

    s.naive_E.load_state_dict(toy_networks(SPEC, s.groups, torch.float64).encoder.state_dict())
    q = s.naive_E(s.x)
    z = naive_sample(q, noise["posterior"])
    x = {"rec": s.naive_D(z), "prior": s.naive_D(noise["prior"])}
    naive_e = b["beta_rec"] * squared(s.x, x["rec"]).mean() + sum(b["beta_kl"][g] * k.mean() for g, k in naive_kl(q).items())
    beyond = []
    for name in fakes:
        for g, k in naive_kl(s.naive_E(x[name].detach())).items():
            if batch_mean:
                naive_e = naive_e + factor * b["beta_neg"][g] * torch.relu(m[g] - k.mean())
            else:
                naive_e = naive_e + factor * b["beta_neg"][g] * sum(max(m[g] - k[i], k[i] * 0) for i in range(N)) / N
            assert k.mean() < m[g], "a margin that is met tests nothing"
            beyond.append(k.max() > m[g])
    assert any(beyond), "a margin above all samples: the hinges of each and of the batch are the same"
    naive_e = 0.9 * naive_e
    agree(loss_e, naive_e)
    agree(list(grads_e["encoder"]), list(torch.autograd.grad(naive_e, list(s.naive_E.parameters()))))

    s.naive_E.load_state_dict(s.E.state_dict())
    x = {"rec": s.naive_D(sg(z)), "prior": s.naive_D(noise["prior"])}
    naive_d = b["beta_rec"] * squared(s.x, x["rec"]).mean()
    for name in fakes:
        naive_d = naive_d + factor * sum(b[decoder_weight][g] * k.mean() for g, k in naive_kl(s.naive_E(x[name])).items())
    naive_d = 0.9 * naive_d
    agree(loss_d, naive_d)
    agree(list(grads_d["decoder"]), list(torch.autograd.grad(naive_d, list(s.naive_D.parameters()))))


@pytest.mark.parametrize("kind", ["sample", "batch"])
@pytest.mark.parametrize("groups", ["one", "two"])
def test_the_hinge_of_intro_vae_on_the_elbo(groups, kind):
    s = setting(GROUPS[groups])
    b = {**BETAS[groups], "beta_neg": 0.7}
    one = build_intro_vae(IntroVAEConfig(hinge_on="elbo"), SPEC, s.groups)
    noise = to_double(one.draw(N, Streams(1, 7), s.sources))
    betas = per_group(b["beta_kl"], s.groups)
    q = s.naive_E(s.x)
    z = naive_sample(q, noise["posterior"])
    x = {"rec": s.naive_D(z), "prior": s.naive_D(noise["prior"])}
    pushed, losses = [], []
    for name, fake in x.items():
        fake = fake.detach()
        q_f = s.naive_E(fake)
        again = s.naive_D(naive_sample(q_f, noise["encoder_phase"][name]["codes"]))
        losses.append(b["beta_rec"] * squared(fake, again) + sum(betas[g] * k for g, k in naive_kl(q_f).items()))
    margin = float(torch.stack(losses).detach().quantile(0.55))  # some are beyond it, none at its kink
    for loss in losses:
        each = torch.relu(margin - loss).mean() if kind == "sample" else torch.relu(margin - loss.mean())
        pushed.append(0.7 * each)
    objective = build_intro_vae(IntroVAEConfig(**b, margin=margin, scale=0.9, hinge=kind, hinge_on="elbo"), SPEC, s.groups)
    (loss_e, grads_e), (loss_d, _) = play(objective, s, noise)
    kl = sum(betas[g] * k.mean() for g, k in naive_kl(q).items())
    naive_e = 0.9 * (b["beta_rec"] * squared(s.x, x["rec"]).mean() + kl + sum(pushed))
    assert sum(pushed) > 0
    agree(loss_e, naive_e)
    agree(list(grads_e["encoder"]), list(torch.autograd.grad(naive_e, list(s.naive_E.parameters()))))
    # the decoder's half knows nothing of it
    plain = build_intro_vae(IntroVAEConfig(**b, scale=0.9, hinge=kind), SPEC, s.groups)
    assert torch.equal(loss_d, play(plain, s, noise)[1][0])
    for name in ("beta_neg", "margin"):
        with pytest.raises(UserError, match=f"objective.{name}: with hinge_on = 'elbo' there is one for all latent groups"):
            build_intro_vae(IntroVAEConfig(**{name: dict.fromkeys(s.groups, 1.0)}, hinge_on="elbo"), SPEC, s.groups)


def test_a_run_with_the_hinge_on_the_elbo(catalogue, tmp_path):
    objective = {"name": "intro_vae", "hinge_on": "elbo", "margin": 20.0}
    t = toys.trainer(catalogue, tmp_path, toys.tree(objective=objective))
    assert t.run() == "finished"
    [*_, line] = t.rundir.read("stats")
    assert {"hinge_rec", "hinge_prior", "rec_rec", "rec_prior"} <= line["phases"]["encoder"].keys()


def test_the_settings_of_intro_vae_override_its_preset():
    spelt = {"fakes": ("rec", "prior"), "hinge": "batch", "average": "mean", "decoder_weight": "beta_kl"}
    one, other = (
        build_intro_vae(c, SPEC, {"z": 2}) for c in (IntroVAEConfig(preset="hhb072"), IntroVAEConfig(preset="table2", **spelt))
    )
    assert one.phases[0].loss.keywords == other.phases[0].loss.keywords
    assert one.phases[1].loss.keywords == other.phases[1].loss.keywords
    assert one.coeffs == other.coeffs
    with pytest.raises(UserError, match=r'objective.fakes: needs "prior"'):
        build_intro_vae(IntroVAEConfig(fakes=("rec",)), SPEC, {"z": 2})


def gradients_of(objective, s):
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    return [torch.cat([g.flatten() for g in own]) for _, grads in play(objective, s, noise) for own in grads.values()]


def test_limits_are_what_the_formulas_say():
    s, b = setting(GROUPS["one"]), {"beta_rec": 0.7, "beta_kl": 0.3}
    vae = gradients_of(build_vae(VAEConfig(**b, scale=0.5), SPEC, s.groups), s)[0]
    no_margin = build_intro_vae(IntroVAEConfig(**b, beta_neg=5.0, margin=0.0, scale=0.5), SPEC, s.groups)
    no_hinge = build_intro_vae(IntroVAEConfig(**b, beta_neg=0.0, margin=9.0, scale=0.5), SPEC, s.groups)
    sharp = build_soft_intro_vae(SoftIntroVAEConfig(**b, beta_neg=5.0, alpha=1e4, scale=0.5), SPEC, s.groups)
    for objective in (no_margin, no_hinge, sharp):
        torch.testing.assert_close(gradients_of(objective, s)[0], vae, rtol=1e-10, atol=1e-12)
    # beta_neg → 0 leaves the exponential with the fakes' reconstruction alone, and a KL that is not pushed
    pushes = [
        gradients_of(build_soft_intro_vae(SoftIntroVAEConfig(**b, beta_neg=n, scale=0.5), SPEC, s.groups), s)[0]
        for n in (0.0, 1e-9, 1.0)
    ]
    torch.testing.assert_close(pushes[1], pushes[0], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(pushes[2], pushes[0], rtol=1e-3)
    assert not torch.allclose(pushes[0], vae, rtol=1e-3)
    # γ = 0: the decoder sees the reconstruction of data alone
    alone = gradients_of(build_soft_intro_vae(SoftIntroVAEConfig(**b, gamma=0.0, scale=0.5), SPEC, s.groups), s)[1]
    no_kl = {"beta_rec": 0.7, "beta_kl": 0.0, "beta_neg": 0.0}
    rec = gradients_of(build_intro_vae(IntroVAEConfig(**no_kl, scale=0.5), SPEC, s.groups), s)[1]
    torch.testing.assert_close(alone, rec, rtol=1e-10, atol=1e-12)


def test_gamma_r_as_published_moves_the_gradient_by_less_than_float32_resolves():
    s = setting(GROUPS["one"])
    without, published = (
        gradients_of(build_soft_intro_vae(SoftIntroVAEConfig(**BETAS["one"], gamma_r=g), SPEC, s.groups), s)[1]
        for g in (0.0, 1e-8)
    )
    assert 0 < (published - without).norm() / without.norm() < torch.finfo(torch.float32).eps / 2


# -- the bootstrap form ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["one", "two"])
def test_bootstrap_decodes_fakes_again_by_the_target(groups):
    s = setting(GROUPS[groups])
    target = copy.deepcopy(s.D).requires_grad_(False)
    with torch.no_grad():
        for p in target.parameters():
            p += 0.03
    config = bootstrap.BootstrapConfig(**BETAS[groups], gamma_r=0.6, gamma=0.8, alpha=1.7, scale=0.11)
    objective = bootstrap.build(config, SPEC, s.groups)
    noise = to_double(objective.draw(N, Streams(1, 7), s.sources))
    b = {key: value if key == "beta_rec" else per_group(value, s.groups) for key, value in BETAS[groups].items()}
    (loss_e, grads_e), (loss_d, grads_d) = play(objective, s, noise, lambda: update_encoders(s), {"decoder@target": target})

    s.naive_E.load_state_dict(toy_networks(SPEC, s.groups, torch.float64).encoder.state_dict())
    naive_e, naive_grads_e, z = naive_encoder_half(s, noise, b, "official", 0.11, 1.7, target_decoder=target)
    agree(loss_e, naive_e)
    agree(list(grads_e["encoder"]), naive_grads_e)

    s.naive_E.load_state_dict(s.E.state_dict())
    naive_d = 0.11 * b["beta_rec"] * squared(s.x, s.naive_D(z)).mean()
    for name, codes in (("rec", z), ("prior", noise["prior"])):
        fake = s.naive_D(codes)
        q = s.naive_E(fake)
        again = target(naive_sample(q, noise["decoder_phase"][name]["codes"]))
        kl = sum(b["beta_kl"][g] * k.mean() for g, k in naive_kl(q).items())
        naive_d = naive_d + 0.11 * 0.8 / 2 * (kl + 0.6 * b["beta_rec"] * squared(fake, again).mean())
    agree(loss_d, naive_d)
    agree(list(grads_d["decoder"]), list(torch.autograd.grad(naive_d, list(s.naive_D.parameters()))))


def test_the_target_is_the_decoder_at_first_and_a_copy_after_epochs_1_and_k_plus_1(catalogue, tmp_path):
    objective = {"name": "bootstrap_soft_intro_vae", "beta_neg": 4.0, "copy_epochs": 2}
    stages = [{"length": "2 steps", "objective": {"name": "vae"}}, {"length": "70 steps"}]
    tree = toys.tree(objective=objective, stages=stages, train={"batch": 64, "checkpoint": "1000 steps"})
    t = toys.trainer(catalogue, tmp_path, tree)
    [follower] = t.followers
    start, seen = toys.weights(t, "decoder"), []
    assert toys.same(follower.module.state_dict(), start)
    follow = follower.follow

    def watched(source, before, now):
        follow(source, before, now)
        seen.append(not toys.same(follower.module.state_dict(), seen_before[0]))
        seen_before[0] = {key: value.clone() for key, value in follower.module.state_dict().items()}

    seen_before = [start]
    t.followers[0] = SimpleNamespace(follow=watched, rule=follower.rule, key=follower.key, module=follower.module)
    assert t.run() == "finished"
    # 1,400 images an epoch, 64 a step: one epoch is over in step 22, three in step 66
    assert [step for step, copied in enumerate(seen, 1) if copied] == [22, 66]
    assert not toys.same(start, toys.weights(t, "decoder"))


@pytest.mark.parametrize(("first", "marks"), [(None, [4, 8, 12, 16]), (1, [1, 5, 9, 13, 17]), (10, [10, 14, 18])])
def test_a_shadow_is_copied_at_its_marks(first, marks):
    source = nn.Linear(1, 1)
    rule = Shadow("target", "decoder", copy_every_images=4, first_copy_images=first)
    follower = Follower(rule, copy.deepcopy(source))
    copied = []
    for images in range(1, 20):
        source.weight.data.fill_(images)
        follower.follow(source, images - 1, images)
        copied += [images] if follower.module.weight.item() == images else []
    assert copied == marks


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
    again = (config.beta_rec * terms["rec_real"] + kl) / SPEC.dims + (terms["exp_elbo_rec"] + terms["exp_elbo_prior"]) / 4
    torch.testing.assert_close(again.mean(), loss)
    torch.testing.assert_close(terms["kl_prior"], terms["kl_prior.class"] + terms["kl_prior.content"])


def test_the_loss_is_float32_under_bf16_networks():
    s = setting(GROUPS["one"])
    nets = make_nets(
        {"encoder": s.E.float(), "decoder": s.D.float()}, squared, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    q = nets.encoder(s.x.float())["z"]
    assert q.mu.dtype == q.logvar.dtype == torch.float32
    assert nets.decoder({"z": q.mu}).dtype == torch.float32
    assert make_nets({"encoder": s.naive_E}, squared).encoder(s.x)["z"].mu.dtype == torch.float64


@pytest.mark.parametrize("name", ["mlp", "adain"])
def test_heads_and_outputs_of_bf16_networks_are_not_rounded_to_bf16(name):
    spec = Spec(shape=(3, 16, 16))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mlp":
            nets = mlp.build(mlp.MLPConfig(hidden=(32,), output="sigmoid"), spec)
        else:
            small = {"encoder_channels": (8, 8), "encoder_hidden": (8,), "decoder_channels": (8, 8), "output_channels": 8}
            nets = adain.build(adain.AdaINConfig(**small, stem_kernel=0), spec)
        for own in nets.decoder.parameters():
            own.data *= 3  # so that pixels come near 0 and 1
        x = torch.rand(64, 3, 16, 16)
        codes = {group: torch.randn(64, d) for group, d in nets.groups.items()}
    with torch.autocast("cpu", torch.bfloat16):
        q, pixels = nets.encoder(x), nets.decoder(codes)
    for values in (*(part for gaussian in q.values() for part in gaussian), pixels):
        assert values.dtype == torch.float32
        assert (values != values.bfloat16().float()).float().mean() > 0.9
    assert (pixels == 1).float().mean() < 0.01


def test_log_variances_are_bounded_in_one_place():
    class Wild(nn.Module):
        def forward(self, x):
            return {"z": (x, x * 1e3)}

    q = make_nets({"encoder": Wild()}, squared, logvar_bound=20.0).encoder(torch.tensor([[-1.0, 1.0]]))["z"]
    assert q.logvar.tolist() == [pytest.approx([-20.98, 20.98])]  # ±(20 + 0.001 · 980)
    assert make_nets({"encoder": Wild()}, squared).encoder(torch.tensor([[1.0]]))["z"].logvar.item() == 1e3
