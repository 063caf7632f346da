"""The conformance kit: what siv's own tests ask of every component, for plugin authors to ask of theirs.

    from siv_core.testing import check_component
    check_component(siv_mine.siv_components()[0])

Each check raises `AssertionError` with a sentence about what the contract says and what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from siv_core.component import Component
from siv_core.latents import Gaussian, means
from siv_core.nets import Priors, make_nets, set_stage, sources, tree_map
from siv_core.protocols import Batch, Networks, Objective, Spec, Stage
from siv_core.recipe import convert
from siv_core.recipe.build import network_problems
from siv_core.seeding import Seeded, Streams, normal, stream_seed
from siv_core.train.step import tensors_of

N = 4  # samples of a check
IMAGES = Spec(shape=(3, 32, 32), classes=5, factors={"one": 2, "two": 2})


def check_component(component: Component, config: Any = None, spec: Spec = IMAGES) -> None:
    """Check a component of any kind but `dataset` and `metric`, whose contracts need data: see `check_dataset`."""
    convert.describe(component.config)
    config = default_config(component) if config is None else config
    if component.kind == "network":
        check_network(build_seeded(component, config, spec), spec)
    elif component.kind == "reconstruction":
        check_reconstruction(build_seeded(component, config, spec), spec)
    elif component.kind == "prior":
        check_prior(build_seeded(component, config, 6, spec), 6, spec)
    elif component.kind == "objective":
        check_objective(component.build(config, spec, {"a": 3, "b": 2}), spec)


def default_config(component: Component) -> Any:
    """The config with every default; a component whose options have none is checked with a config that is given."""
    needed = [a.name for a in attrs.fields(component.config) if a.default is attrs.NOTHING]
    assert not needed, f"{component.kind} {component.name}: give a config, these options have no default: {needed}"
    return component.config()


def build_seeded(component: Component, *arguments: Any) -> Any:
    """Build under a seed, leaving the global random state alone."""
    with Seeded(0):
        return component.build(*arguments)


def example(spec: Spec, n: int = N) -> Tensor:
    """Data of this spec: uniform over its value range."""
    low, high = spec.value_range
    return low + (high - low) * torch.rand(n, *spec.shape, generator=torch.Generator().manual_seed(0))


def check_network(networks: Networks, spec: Spec, sizes: Sequence[int] = ()) -> None:
    """Shapes, groups, finite values and gradients, the same result twice, and no call of a global random function.

    `set_stage` and `begin` are called first, in this order, as when training begins. `sizes`: pixels a side of the stages that a
    network grows through, each fading in and faded in. Without them such a network, seen at the data's size alone, may leave
    parameters to other stages; else a gradient reaches every one.
    """
    wrong = next(network_problems(networks), None)
    assert wrong is None, wrong
    shapes: list[tuple[int, ...]] = [(spec.shape[0], size, size) for size in sizes]
    lacking = [
        f"{player}.{name}" for player, module in _players(networks) for name, p in module.named_parameters() if p.requires_grad
    ]
    for number, shape in enumerate(shapes or [spec.shape]):
        for fade in (torch.full((), 0.5), None) if number else (None,):
            reached = _check_stage(networks, attrs.evolve(spec, shape=shape), Stage(number, shape, fade))
            lacking = [name for name in lacking if name not in reached]
    grows = all(hasattr(module, "set_stage") for _, module in _players(networks))
    assert not lacking or (grows and not sizes), f"{lacking[0]}: no gradient reaches it"


def _players(networks: Networks) -> tuple[tuple[str, torch.nn.Module], ...]:
    return ("encoder", networks.encoder), ("decoder", networks.decoder)


def _check_stage(networks: Networks, spec: Spec, stage: Stage) -> set[str]:
    """The same at the shape of a stage: the names of the parameters that a gradient reaches."""
    x, labels = example(spec), torch.arange(N) % (spec.classes or 1) if spec.conditional else None
    state = torch.random.get_rng_state()
    set_stage(networks[:2], stage)
    nets = make_nets({"encoder": networks.encoder, "decoder": networks.decoder}, torch.sub)
    for network in networks[:2]:
        if hasattr(network, "begin"):
            with torch.no_grad():
                network.begin(stage, iter([Batch(x, labels)]), nets.encoder)  # type: ignore[operator]
    q = nets.encoder(x, labels)
    assert q.keys() == networks.groups.keys(), f"groups {list(networks.groups)} are declared, the encoder gives {list(q)}"
    for group, dim in networks.groups.items():
        assert q[group].mu.shape == q[group].logvar.shape == (N, dim), f"group {group}: mu and logvar must be [N, {dim}]"
    draw = getattr(networks.decoder, "draw", None)
    noise = draw(N, torch.Generator().manual_seed(0), "rec") if draw else None
    y = nets.decoder(means(q), labels, noise)
    assert y.shape == x.shape, f"the decoder gives {list(y.shape)} for data of {list(x.shape)}"
    again = nets.decoder(means(nets.encoder(x, labels)), labels, noise)
    assert torch.equal(y, again), "the same input gave another output: draw noise in `draw`, never in `forward`"
    assert torch.equal(state, torch.random.get_rng_state()), "a global random function was called"
    loss = y.square().sum() + sum(g.mu.square().sum() + g.logvar.square().sum() for g in q.values())
    reached = set()
    for player, module in _players(networks):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(named, gradients, strict=True):
            assert gradient is None or gradient.isfinite().all(), f"{player}.{name}: its gradient is not finite"
            reached |= {f"{player}.{name}"} if gradient is not None else set()
    return reached


def check_reconstruction(loss: Any, spec: Spec) -> None:
    """One finite number a sample, 0 for equal images, more for different ones, and the gradient of y."""
    if getattr(loss, "missing", lambda: None)():
        return  # its weights are not at hand
    getattr(loss, "prepare", lambda: None)()
    x, y = example(spec), example(spec, 2 * N)[N:].requires_grad_()
    value = loss(x, y)
    assert value.shape == (N,), f"a reconstruction loss gives [N], not {list(value.shape)}"
    assert value.isfinite().all(), "not finite"
    assert (value > loss(x, x)).all(), "different images must cost more than equal ones"
    assert torch.autograd.grad(value.sum(), y)[0].isfinite().all(), "the gradient of y is not finite"


def check_prior(prior: Any, dim: int, spec: Spec) -> None:
    """Samples and densities of the right shape, a KL that is the sampled one, and `detach` that stops gradients.

    `set_stage` and `begin` are called first, in this order, as when training begins.
    """

    def encode(x: Tensor, labels: Tensor | None = None) -> Gaussian:
        flat = x.flatten(1)[:, :dim]
        return Gaussian(flat, flat - 1)

    generator = torch.Generator().manual_seed(stream_seed(0, "test"))
    stage = Stage(0, spec.shape)
    set_stage([prior], stage)
    if hasattr(prior, "begin"):
        labels = torch.arange(64) % (spec.classes or 1) if spec.conditional else None
        with torch.no_grad():
            prior.begin(stage, iter([Batch(example(spec, 64), labels)]), encode)
    distribution = prior.realise(encode)
    draw = getattr(prior, "draw", None)
    noise = draw(512, generator) if draw else normal(512, dim, generator)
    z = distribution.sample(noise)
    assert z.shape == (512, dim), f"sample gives {list(z.shape)}, not [N, {dim}]"
    assert distribution.log_prob(z).shape == (512,), "log_prob gives [N]"
    if hasattr(distribution, "truncated"):
        at_mean, half, whole = (distribution.truncated(noise, psi) for psi in (0.0, 0.5, 1.0))
        assert torch.equal(whole, z), "truncated with psi = 1 is sample"
        assert torch.allclose(half, (at_mean + z) / 2, atol=1e-5), (
            "truncated with psi = 0.5 is half-way between a mean and sample"
        )
    q = encode(example(spec, 512))
    draw_kl = getattr(prior, "draw_kl", None)
    of_kl = draw_kl(512, generator) if draw_kl else None
    value = distribution.kl(q, of_kl)
    assert value.shape == (512,), "kl gives [N]"
    wide = distribution.kl(Gaussian(q.mu.double(), q.logvar.double()), tree_map(of_kl, Tensor.double))
    assert torch.allclose(wide.float(), value.float(), rtol=1e-2, atol=1e-2), (
        "kl of float64 posteriors, as models take it, differs"
    )
    if hasattr(prior, "logvar_bounds") and prior.logvar_bounds() is not None:
        low, high = prior.logvar_bounds()
        assert low.shape == high.shape == (dim,), "logvar_bounds gives two tensors [d]"
        assert (low <= high).all(), "a lower bound is above its upper one"
    if hasattr(distribution, "regulariser"):
        assert distribution.regulariser(q.mu, lambda x: x.mean(dim=0), q, of_kl).shape == (), "a regulariser is 0-dim"
    points = q.mu + torch.randn(q.mu.shape, generator=generator) * (0.5 * q.logvar).exp()
    log_q = torch.distributions.Normal(q.mu, (0.5 * q.logvar).exp()).log_prob(points).sum(dim=1)
    difference = (value - (log_q - distribution.log_prob(points))).detach()
    error = 6 * difference.std() / 512**0.5 + 1e-3
    assert difference.mean().abs() < error, f"kl is off by {difference.mean():.3g} nats from log q − log p of samples"
    assert not distribution.detach().log_prob(z.detach()).requires_grad, "after detach no gradient may reach the prior"


def check_objective(objective: Objective, spec: Spec) -> None:
    """Every phase gives a finite mean of [N] terms and a gradient for each player it updates, on a two-group toy model."""
    networks, priors = toy_networks(spec), Priors({"a": _toy_prior(), "b": _toy_prior()})
    noise = objective.draw(N, Streams(0, 0), sources(networks.groups, priors, networks.decoder))
    check_rows(noise, N)
    modules = {"encoder": networks.encoder, "decoder": networks.decoder, "prior": priors}
    shadows = {f"{shadow.of}@{shadow.name}": modules[shadow.of] for shadow in objective.shadows}
    nets = make_nets({**modules, **shadows}, lambda x, y: (x - y).square().flatten(1).sum(dim=1))
    carry: dict[str, Any] = {}
    coeffs = tensors_of(objective.coeffs, torch.device("cpu"))
    for phase in objective.phases:
        loss, terms, carry = phase.loss(nets, Batch(example(spec)), noise, coeffs, carry)
        assert loss.ndim == 0, f"phase {phase.name}: its loss is a 0-dim mean"
        assert loss.isfinite(), f"phase {phase.name}: its loss is not finite"
        assert terms, f"phase {phase.name}: gives no terms"
        for name, value in terms.items():
            assert value.shape == (N,), f"phase {phase.name}: term {name} is {list(value.shape)}, not [N]"
        for player in phase.updates:
            parameters = list(modules[player].parameters())
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if parameters else ()
            assert all(g is not None for g in gradients), f"phase {phase.name} updates {player}, which gets no gradient"
        assert not any(leaf.requires_grad for leaf in leaves(carry)), f"phase {phase.name}: what it carries is not detached"


def check_dataset(dataset: Any) -> None:
    """A data set that is at hand: both splits, their shapes, types and ranges; the same rows when asked again."""
    assert dataset.missing() is None, f"not at hand: {dataset.missing()}"
    dataset.prepare(lambda what, done, total: None)
    spec, seen = dataset.spec, []
    for split in ("train", "held_out"):
        rows = dataset.rows(split)
        assert len(rows), f"split {split} is empty"
        assert rows.x.dtype in (torch.uint8, torch.float32), f"rows are uint8 or float32, not {rows.x.dtype}"
        assert rows.x.shape[1] == spec.shape[0], f"rows have {rows.x.shape[1]} channels, the spec says {spec.shape[0]}"
        at = rows.at(torch.arange(len(rows)))
        seen.append(set(at.tolist()))
        if rows.factors is not None:
            assert rows.factors.shape == (len(rows.x), len(spec.factors)), "factors are [M, F], a column for each of the spec's"
            for column, (name, size) in enumerate(spec.factors.items()):
                assert rows.factors[:, column].max() < size, f"factor {name} goes beyond its {size} values"
        if rows.labels is not None and spec.classes:
            assert rows.labels.max() < spec.classes, f"labels go beyond the {spec.classes} classes"
        for side, table in rows.pyramid.items():
            assert table.shape[:2] == rows.x.shape[:2], f"pyramid[{side}] has other rows or channels than the table"
            assert table.shape[2:] == (side, side), f"pyramid[{side}] is {list(table.shape[2:])}, not [{side}, {side}]"
            assert table.dtype == rows.x.dtype, f"pyramid[{side}] is {table.dtype}, the table {rows.x.dtype}"
        check_draw(rows, spec)
    assert not seen[0] & seen[1], "an image is in both splits"
    assert dataset.fingerprint() == dataset.fingerprint() != "", "the fingerprint changes from call to call"


def check_draw(rows: Any, spec: Spec) -> None:
    """An endless split draws from its generator alone: the same samples from the same seed, of the table's shape and type."""
    if rows.draw is None:
        return
    state = torch.random.get_rng_state()
    first, again, other = (rows.draw(N, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.x.shape == (N, *rows.x.shape[1:]), f"draw gives {list(first.x.shape)}, a row is {list(rows.x.shape[1:])}"
    assert first.x.dtype == rows.x.dtype, f"draw gives {first.x.dtype}, the table is {rows.x.dtype}"
    assert torch.equal(first.x, again.x), "the same generator gave other samples"
    assert not torch.equal(first.x, other.x), "another seed gave the same samples"
    assert torch.equal(state, torch.random.get_rng_state()), "a global random function was called"
    assert not spec.classes or first.labels is not None, "the spec has classes, and what is drawn has no labels"


def check_rows(noise: Any, n: int) -> None:
    """Every tensor of a noise tree has one row a sample."""
    for leaf in leaves(noise):
        assert len(leaf) == n, f"noise of shape {list(leaf.shape)} does not have {n} rows"


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree."""
    found: list[Tensor] = []
    tree_map(tree, found.append)
    return found


class _ToyEncoder(torch.nn.Module):
    def __init__(self, inputs: int, groups: dict[str, int]) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleDict({group: torch.nn.Linear(inputs, 2 * dim) for group, dim in groups.items()})

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        return {group: Gaussian(*head(x.flatten(1)).tanh().chunk(2, dim=1)) for group, head in self.heads.items()}


class _ToyDecoder(torch.nn.Module):
    def __init__(self, shape: tuple[int, ...], groups: dict[str, int]) -> None:
        super().__init__()
        self.shape = shape
        self.linear = torch.nn.Linear(sum(groups.values()), int(torch.tensor(shape).prod()))

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: Any = None) -> Tensor:
        return self.linear(torch.cat(list(codes.values()), dim=1)).sigmoid().unflatten(1, self.shape)


def toy_networks(spec: Spec, groups: dict[str, int] | None = None, dtype: torch.dtype = torch.float32) -> Networks:
    """A small smooth model with any latent groups, for tests of objectives and trainers."""
    groups = groups or {"a": 3, "b": 2}
    with Seeded(0):
        inputs = int(torch.tensor(spec.shape).prod())
        return Networks(_ToyEncoder(inputs, groups).to(dtype), _ToyDecoder(spec.shape, groups).to(dtype), groups)


class _ToyPrior(torch.nn.Module):
    def realise(self, encode: Any) -> _ToyPrior:
        return self

    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return noise

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)

    def kl(self, q: Gaussian, noise: Any, labels: Tensor | None = None) -> Tensor:
        from siv_core.latents import kl_standard

        return kl_standard(q)

    def detach(self) -> _ToyPrior:
        return self


def _toy_prior() -> torch.nn.Module:
    return _ToyPrior()
