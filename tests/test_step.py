"""One phase as one function: compiled whole, without a gradient, without players; and what priors may ask of it."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch._dynamo
import toys
from attrs import evolve

from siv_core.errors import PluginError, UserError
from siv_core.latents import Gaussian
from siv_core.nets import lr_factors, make_nets
from siv_core.protocols import Phase
from siv_core.seeding import Streams
from siv_core.train import stage
from siv_core.train.step import play


def prepared(trainer):
    """The first stage with its batch, noise and phases' parameters."""
    active = stage.enter(trainer, 0)
    n = active.plan.batch
    batch = trainer.feed.batch(torch.arange(n), active.stage.shape, torch.contiguous_format)
    noise = active.objective.draw(n, Streams(0, 0), active.sources)
    return active, batch, noise, {
        phase.name: [p for name in phase.updates for p in trainer.players[name].parameters] for phase in active.objective.phases
    }  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "prior"),
    [("vae", "vamp"), ("soft_intro_vae", "standard_normal"), ("intro_vae", "standard_normal"), ("three_players", "vamp")],
)
def test_a_phase_compiles_as_one_graph_and_gives_the_same(catalogue, tmp_path, objective, prior):
    t = toys.trainer(catalogue, tmp_path, toys.tree(objective={"name": objective}, prior={"name": prior}))
    active, batch, noise, parameters = prepared(t)
    torch._dynamo.reset()
    # what torch asks for where a gradient is taken inside of what is compiled
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(play, fullgraph=True, backend="aot_eager")  # fullgraph: a graph break is an error
        carries = {}, {}
        for phase in active.objective.phases:
            eager, other = (
                one(phase, parameters[phase.name], active.nets, batch, noise, active.coeffs, carry, 0.5)
                for one, carry in zip((play, compiled), carries, strict=True)
            )
            assert other.names == eager.names
            torch.testing.assert_close(other.row, eager.row)
            torch.testing.assert_close(other.gradients, eager.gradients)
            carries = eager.carry, other.carry


def test_a_phase_without_parameters_is_left_out(catalogue, tmp_path):
    objective = {"name": "own_phase", "beta_neg": 4.0}
    fixed = toys.trainer(catalogue, tmp_path / "fixed", toys.tree(objective=objective))
    assert fixed.run() == "finished"
    assert [list(line["phases"]) for line in fixed.rundir.read("stats")] == [["encoder", "decoder"]] * 2
    learned = toys.trainer(catalogue, tmp_path / "learned", toys.tree(objective=objective, prior={"name": "flow"}))
    before = toys.weights(learned, "prior")
    assert learned.run() == "finished"
    assert [list(line["phases"]) for line in learned.rundir.read("stats")] == [["encoder", "prior", "decoder"]] * 2
    assert not toys.same(before, toys.weights(learned, "prior"))


@pytest.mark.parametrize("attached", [True, False])
def test_a_phase_that_gives_no_gradient_is_told_with_its_plugin(catalogue, tmp_path, attached):
    t = toys.trainer(catalogue, tmp_path, toys.tree())

    def loss(nets, batch, noise, coeffs, carry):
        value = nets.encoder(batch.x)["z"].mu.square().sum(dim=1)
        return (value if attached else value.detach()).mean(), {"value": value}, carry

    active = stage.enter(t, 0)
    t.active = evolve(active, objective=evolve(active.objective, phases=(Phase("lost", ("decoder",), loss),)))
    with pytest.raises(PluginError, match=r"plugin 'soft_intro_vae' of siv .*: phase 'lost' has no gradient for decoder"):
        t.advance(t.active)


# -- priors ----------------------------------------------------------------------------------------------------------------------


class Counting(toys.Vamp):
    def realise(self, encode):
        self.realised = getattr(self, "realised", 0) + 1
        return super().realise(encode)


@pytest.mark.parametrize("objective", ["vae", "soft_intro_vae", "intro_vae", "bootstrap_soft_intro_vae"])
@pytest.mark.parametrize("share_noise", [True, False])
def test_a_prior_is_realised_once_a_phase(catalogue, tmp_path, objective, share_noise):
    options = {"name": objective, **({} if objective == "vae" else {"share_noise": share_noise})}
    t = toys.trainer(catalogue, tmp_path, toys.tree(objective=options, prior={"name": "vamp"}))
    prior = t.built.priors.groups["z"]
    prior.__class__ = Counting
    active = stage.enter(t, 0)
    t.step(active)
    assert prior.realised == len(active.objective.phases)


class Labelled(torch.nn.Module):
    """p(z ∣ y) = N(y, I): its KL tells whether it was given the labels."""

    def realise(self, encode):
        return self

    def detach(self):
        return self

    def sample(self, noise, labels=None):
        return noise + labels[:, None]

    def log_prob(self, z, labels=None):
        return -0.5 * ((z - labels[:, None]).square() + math.log(2 * math.pi)).sum(dim=1)

    def kl(self, q, noise, labels=None):
        return -0.5 * (1 + q.logvar - (q.mu - labels[:, None]).square() - q.logvar.exp()).sum(dim=1)


@pytest.mark.parametrize("objective", ["vae", "soft_intro_vae", "intro_vae", "bootstrap_soft_intro_vae"])
def test_every_objective_gives_the_prior_its_labels(catalogue, tmp_path, objective):
    train = {"batch": 64, "length": "2 steps", "conditional": True}
    t = toys.trainer(catalogue, tmp_path, toys.tree(objective={"name": objective}, train=train))
    t.built.priors.groups["z"] = Labelled()
    active, batch, noise, _ = prepared(t)
    q = active.nets.encoder(*batch)["z"]
    expected = -0.5 * (1 + q.logvar - (q.mu - batch.labels[:, None]).square() - q.logvar.exp()).sum(dim=1)
    _, terms, _ = active.objective.phases[0].loss(active.nets, batch, noise, active.coeffs, {})
    torch.testing.assert_close(terms["kl_real"], expected)
    t.step(active)  # and no term of the others lacks them
    model = t.model()
    _, kl = model.energy(batch.x, batch.labels)
    torch.testing.assert_close(kl, t.model().kl(model.encode(*batch), batch.labels)["z"])
    assert not torch.equal(kl, model.energy(batch.x, batch.labels.flip(0))[1])


class Pulling(torch.nn.Module):
    """The standard normal that asks of the codes to be small."""

    def __init__(self, batch_statistic=False):
        super().__init__()
        self.batch_statistic = batch_statistic

    def realise(self, encode):
        return self

    def detach(self):
        return self

    def sample(self, noise, labels=None):
        return noise

    def log_prob(self, z, labels=None):
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)

    def kl(self, q, noise, labels=None):
        return -0.5 * (1 + q.logvar - q.mu.square() - q.logvar.exp()).sum(dim=1)

    def regulariser(self, z, mean, q, noise):
        return mean(z.square().sum(dim=1, keepdim=True)).sum()


@pytest.mark.parametrize("objective", ["soft_intro_vae", "intro_vae"])
def test_a_regulariser_is_paid_by_the_encoder_alone(catalogue, tmp_path, objective):
    t = toys.trainer(catalogue, tmp_path, toys.tree(objective={"name": objective, "scale": 0.5}))
    active, batch, noise, parameters = prepared(t)
    plain = play(active.objective.phases[0], parameters["encoder"], active.nets, batch, noise, active.coeffs, {}, 1.0)
    t.built.priors.groups["z"] = Pulling()
    active = stage.enter(t, 0)
    pulled = play(active.objective.phases[0], parameters["encoder"], active.nets, batch, noise, active.coeffs, {}, 1.0)
    q = active.nets.encoder(batch.x)["z"]
    z = q.mu + noise["posterior"]["z"] * (0.5 * q.logvar).exp()
    asked = z.square().sum(dim=1).mean()
    assert pulled.names[-1] == "regulariser"
    torch.testing.assert_close(pulled.row[-2] / len(batch.x), asked)
    torch.testing.assert_close(pulled.row[-1], plain.row[-1] + 0.5 * asked)
    extra = torch.autograd.grad(0.5 * asked, parameters["encoder"])
    for with_it, without, more in zip(pulled.gradients, plain.gradients, extra, strict=True):
        torch.testing.assert_close(with_it, without + more, rtol=1e-4, atol=1e-6)
    decoder = play(active.objective.phases[1], parameters["decoder"], active.nets, batch, noise, active.coeffs, pulled.carry, 1.0)
    assert "regulariser" not in decoder.names


def test_a_mean_over_the_batch_is_not_cut(catalogue, tmp_path):
    train = {"batch": 64, "micro_batch": 16, "length": "2 steps"}
    with pytest.raises(UserError, match=r"train\.micro_batch: the prior of group 'z' takes a mean over the whole batch"):
        toys.trainer(catalogue, tmp_path, toys.tree(prior={"name": "hand_over"}, train=train))


def test_a_mean_that_nobody_declared_is_not_cut_either(catalogue, tmp_path):
    train = {"batch": 64, "micro_batch": 16, "length": "2 steps"}
    t = toys.trainer(catalogue, tmp_path, toys.tree(train=train))
    t.built.priors.groups["z"] = Pulling()
    with pytest.raises(UserError, match=r"train\.micro_batch: the objective or a prior takes a mean over the whole batch"):
        t.run()


@pytest.mark.parametrize("objective", ["soft_intro_vae", "intro_vae", "bootstrap_soft_intro_vae"])
@pytest.mark.parametrize("keep_graphs", [False, True])
def test_an_encoder_that_learns_nothing_leaves_the_decoder_its_fakes(catalogue, tmp_path, objective, keep_graphs):
    """Its phase is left out, so nothing is carried: the decoder's phase makes x_rec and x_prior of the same noise."""
    ends = {}
    for frozen in (False, True):
        train = {"batch": 64, "length": "2 steps", "keep_graphs": keep_graphs}
        options = {"objective": {"name": objective}, "optim": {"encoder": {"lr": 1e-30}}}  # played, its phase moves nothing
        t = toys.trainer(catalogue, tmp_path / str(frozen), toys.tree(**options, train=train))
        if frozen:
            t.players["encoder"].parameters, t.players["encoder"].optimiser = [], None
        assert t.run() == "finished"
        ends[frozen] = toys.weights(t, "decoder")
    torch.testing.assert_close(ends[True], ends[False])


def test_rates_of_parts_of_a_network(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree(optim={"lr": 0.01}))
    module = copy.deepcopy(t.players["decoder"].module)
    module.lr_factors = lambda: {"body.0": 0.1}
    from siv_core.train.players import Player

    player = Player.of("decoder", module)
    player.configure(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in player.optimiser.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in module.named_parameters()}
    assert {name for name, rate in named.items() if rate == pytest.approx(0.001)} == {"body.0.weight", "body.0.bias"}
    assert {name for name, rate in named.items() if rate == 0.01} == {"body.2.weight", "body.2.bias"}
    before = [p.clone() for p in player.parameters]
    player.step([torch.ones_like(p) for p in player.parameters])  # Adam's first step is the rate itself
    for (name, now), was in zip(module.named_parameters(), before, strict=True):
        torch.testing.assert_close(was - now, torch.full_like(now, named[name]), rtol=1e-3, atol=1e-6)
    module.lr_factors = lambda: {"body.0.bias": 0.5, "body": 0.1}  # the longer name holds
    factors = lr_factors(module)
    assert (factors["body.0.bias"], factors["body.0.weight"]) == (0.5, 0.1)


def test_rates_of_what_is_not_there_are_told_with_the_plugin(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(toys.Vamp, "lr_factors", lambda self: {"means": 0.1}, raising=False)
    with pytest.raises(PluginError, match=r"plugin 'toys' of tests 0: prior: lr_factors: there is no parameter 'means'"):
        toys.trainer(catalogue, tmp_path, toys.tree(prior={"name": "vamp"}))


def test_bounds_of_a_group_are_kept_where_encoders_are_wrapped():
    class Bounded(torch.nn.Module):
        def logvar_bounds(self):
            return torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.5])

    from siv_core.nets import Priors

    priors = Priors({"a": Bounded(), "b": torch.nn.Identity()})
    logvar = torch.tensor([[-3.0, -3.0], [3.0, 3.0], [0.5, 0.25]])
    nets = make_nets({"encoder": lambda x: {g: Gaussian(x, logvar) for g in "ab"}, "prior": priors}, torch.sub, 2.0)
    q = nets.encoder(torch.zeros(3, 2))
    expected = {"a": [[-1.0, 0.0], [1.0, 0.5], [0.5, 0.25]], "b": [[-2.0, -2.0], [2.0, 2.0], [0.5, 0.25]]}
    for group, rows in expected.items():
        assert q[group].logvar.tolist() == [pytest.approx(row, abs=0.003) for row in rows]  # slope 0.001 beyond
        assert q[group].logvar[2].tolist() == rows[2]


# -- the decoder's noise ---------------------------------------------------------------------------------------------------------


def test_a_decoder_knows_what_it_draws_for(catalogue, tmp_path):
    uses: dict[str, list[str]] = {"vae": [], "soft_intro_vae": []}
    for name, seen in uses.items():
        t = toys.trainer(catalogue, tmp_path / name, toys.tree(objective={"name": name}))

        def draw(n, generator, use, seen=seen):
            seen.append(use)
            return torch.randn(n, 1, generator=generator)

        decoder = t.players["decoder"].module
        decoder.draw = draw
        decoder.forward = partial(lambda forward, codes, labels=None, noise=None: forward(codes) + 0 * noise[:, :, None, None],
                                  decoder.forward)  # fmt: skip
        active = stage.enter(t, 0)
        seen.clear()
        t.step(active)
        assert seen == {"vae": ["rec"], "soft_intro_vae": ["rec", "prior", *["again"] * 4]}[name]
        seen.clear()
        t.model().sample(2)
        assert seen == ["model"]
