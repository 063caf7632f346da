"""A recipe's names become objects: the only place where that happens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from attrs import define, frozen
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from siv_core.errors import PluginError, SivError, UserError, near_miss
from siv_core.losses import Betas
from siv_core.model import Model
from siv_core.nets import Priors, lr_factors
from siv_core.protocols import Dataset, Measurement, Metric, Networks, Objective, Progress, Spec
from siv_core.recipe import fits
from siv_core.recipe.catalogue import Catalogue, blame, words
from siv_core.recipe.options import PLAYERS
from siv_core.recipe.recipe import Choice, Recipe, StagePlan
from siv_core.seeding import Seeded, stream_seed
from siv_core.store import memory

PROMISED = {  # what is asked of what a component builds, see protocols.py
    "network": ("encoder", "decoder", "groups", "translate", "batch_statistics"),
    "reconstruction": ("__call__",),
    "prior": ("realise", "parameters"),
    "dataset": ("missing", "prepare", "rows", "fingerprint"),
    "objective": ("phases", "draw", "coeffs", "shadows"),
    "metric": ("needs", "measure"),
    "weights": ("network", "convert"),
}


@frozen
class Unfit:
    """In the place of a metric that cannot be of the images of an early stage."""

    problems: Sequence[str]

    def needs(self) -> Iterable[str]:
        return ()

    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        raise UserError(self.problems)


@define
class Built:
    """What a recipe asks for, on the CPU, with the weights of the seed."""

    recipe: Recipe
    catalogue: Catalogue
    dataset: Dataset
    spec: Spec
    networks: Networks
    priors: Priors
    reconstruction: Callable[[Tensor, Tensor], Tensor]

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.networks.encoder, "decoder": self.networks.decoder, "prior": self.priors}

    def place(self, device: torch.device) -> dict[str, nn.Module]:
        """The players on the device, in the recipe's memory layout: another one rounds otherwise. The loss goes there too."""
        if isinstance(self.reconstruction, nn.Module):
            self.reconstruction.to(device)
        for module in self.modules.values():
            module.to(device)
            if self.recipe.train.channels_last:
                module.to(memory_format=torch.channels_last)
        return self.modules

    def objective(self, plan: StagePlan) -> Objective:
        self.shape(plan)
        built: Objective = self._build(plan.objective, self.spec, self.networks.groups)
        problems = [
            f"objective.{name}: the groups are {', '.join(self.networks.groups)}, got {', '.join(value) or 'none'}"
            for name, value in built.coeffs.items()
            if isinstance(value, dict) and value.keys() != self.networks.groups.keys()
        ]
        problems += self.unseen(plan, built)
        if built.prior_learns and not any(p.requires_grad for p in self.priors.parameters()):
            names = " and ".join(dict.fromkeys(choice.name for choice in self.recipe.prior.values()))
            problems.append(
                f"objective.prior: the prior '{names}' has nothing that learns: leave it fixed, or take another prior"
            )
        unknown = {player for phase in built.phases for player in phase.updates} - set(PLAYERS)
        problems += [f"objective {plan.objective.name}: there is no player '{player}'" for player in sorted(unknown)]
        if 0 < self.recipe.train.micro_batch < plan.batch:
            problems += [f"train.micro_batch: {reason}" for reason in self.uncut(plan, built)]
        if self.recipe.train.compile and self.recipe.train.keep_graphs:
            problems.append("train.compile: a compiled phase leaves no graph to the next one: set train.keep_graphs to false")
        if self.recipe.train.graphs:
            problems += [f"train.graphs: {reason}" for reason in self.unrecorded(plan)]
        if problems:
            raise UserError(problems)
        return built

    def unrecorded(self, plan: StagePlan) -> list[str]:
        """Why phases of this stage cannot be replayed."""
        reasons = []
        if self.recipe.train.keep_graphs:
            reasons.append("a recorded phase leaves no graph to the next one: set train.keep_graphs to false")
        if 0 < self.recipe.train.micro_batch < plan.batch:
            reasons.append("pieces of a batch would be written over each other: leave train.micro_batch out")
        return reasons

    def unseen(self, plan: StagePlan, objective: Objective) -> list[str]:
        """Why the views of this stage cannot be shown to the encoder."""
        if not plan.views:
            return []
        groups, problems = self.networks.groups, []
        asked = {name for names in plan.views.values() for name in names}
        if not objective.takes_views:
            problems.append(f"stages.views: objective '{plan.objective.name}' encodes the images alone; leave them out")
        problems += [
            f"stages.views.{group}: no such group{near_miss(group, groups)}" for group in plan.views if group not in groups
        ]
        if plan.fade:
            problems.append("stages.views: not in a stage that fades in: leave one of them out")
        if self.spec.kind != "image":
            problems.append(f"stages.views: are of images, this data has shape {list(self.spec.shape)}")
        if self.recipe.train.conditional and asked & {"peer", "same_label"}:
            problems.append("stages.views: another image has another label, which train.conditional gives: leave one of them out")
        return problems

    def uncut(self, plan: StagePlan, objective: Objective) -> list[str]:
        """Why this stage's batches cannot be cut into pieces."""
        reasons = []
        if objective.batch_statistic:
            reasons.append(f"the loss of {plan.objective.name} is no mean over samples and cannot be cut")
        if self.networks.batch_statistics:
            name = " and ".join(choice.name for choice in self.recipe.network)
            reasons.append(f"network '{name}' takes statistics of the whole batch, as batch norm does: pieces would have others")
        wanting = [group for group, prior in self.priors.groups.items() if getattr(prior, "batch_statistic", False)]
        reasons += [f"the prior of group '{group}' takes a mean over the whole batch" for group in wanting]
        return reasons

    def metrics(self, at: Spec | None = None) -> dict[str, Metric]:
        """Those of the recipe, for the data as they are or, `at` a size that a model has grown to, as it sees them: one that
        cannot be of these raises when it is to measure."""
        built: dict[str, Metric] = {}
        problems: list[str] = []
        for name, metric in self.recipe.metrics.items():
            choice = metric.choice
            try:
                built[name] = self._build(choice, at or self.spec, self.networks.groups, self.networks.translate)
            except UserError as error:
                if at is not None:
                    built[name] = Unfit(error.problems)
                    continue
                problems += [f"metrics.{name}: {line.removeprefix(f'metric {choice.name}: ')}" for line in error.problems]
        if problems:
            raise UserError(problems)
        return built

    def shape(self, plan: StagePlan) -> tuple[int, ...]:
        """Of a sample in this stage: the data's own, or square images of the stage's `data.size`."""
        if plan.size is None:
            return self.spec.shape
        if self.spec.kind != "image" or plan.size > min(self.spec.shape[1:]):
            raise UserError(f"data.size: {plan.size} does not fit data of shape {list(self.spec.shape)}")
        shape = (self.spec.shape[0], plan.size, plan.size)
        grows = all(hasattr(module, "set_stage") for module in (self.networks.encoder, self.networks.decoder))
        if shape != self.spec.shape and not grows:
            name = " and ".join(choice.name for choice in self.recipe.network)
            raise UserError(
                f"data.size: {plan.size} does not fit: network '{name}' is made for {list(self.spec.shape)} alone; other sizes"
                " take an encoder and a decoder with `set_stage`. Leave data.size out of the stages, or set it in [data] for all"
            )
        return shape

    def model(
        self, modules: Mapping[str, nn.Module], device: torch.device, name: str = "", plan: StagePlan | None = None
    ) -> Model:
        """This encoder, decoder and prior as they are, for use; samples have the shape of this stage, by default the data's."""
        priors = modules["prior"]
        assert isinstance(priors, Priors)
        return Model(
            encoder=modules["encoder"],
            decoder=modules["decoder"],
            priors=priors,
            spec=attrs.evolve(self.spec, shape=self.shape(plan)) if plan else self.spec,
            groups=self.networks.groups,
            translate=self.networks.translate,
            device=device,
            reconstruction=self.reconstruction,
            logvar_bound=self.recipe.train.logvar_bound or None,
            batch_statistics=(plan or self.recipe.stages[-1]).batch if self.networks.batch_statistics else 0,
            name=name,
            betas=self.betas(plan or self.recipe.stages[-1]),
        )

    def betas(self, plan: StagePlan) -> Betas | None:
        """The weights of this stage's ELBO, where its objective calls them `beta_rec` and `beta_kl`, as siv's do."""
        coeffs = self.objective(plan).coeffs
        rec, kl = coeffs.get("beta_rec"), coeffs.get("beta_kl")
        return Betas(float(rec), dict(kl)) if isinstance(rec, (int, float)) and isinstance(kl, Mapping) else None

    def owner(self, player: str) -> str:
        """The plugins that a player is from, for what is told of it."""
        choices = self.recipe.prior.values() if player == "prior" else (self.recipe.network[0 if player == "encoder" else -1],)
        return " or ".join(dict.fromkeys(str(self.catalogue.owner(choice.kind, choice.name)) for choice in choices))

    def _build(self, choice: Choice, *arguments: Any) -> Any:
        return component(self.catalogue, choice, *arguments)


def component(catalogue: Catalogue, choice: Choice, *arguments: Any) -> Any:
    """What a component builds; an error of its plugin is told with the plugin's name and the place."""
    found = catalogue.get(choice.kind, choice.name)
    what = f"{choice.kind} '{choice.name}'"
    owner = catalogue.owner(choice.kind, choice.name)
    try:
        built = found.build(choice.config, *arguments)
    except SivError:
        raise
    except Exception as error:
        if isinstance(error, (MemoryError, RuntimeError, OverflowError)) and re.search("allocate|overflow", str(error)):
            raise UserError(f"{what} asks for more memory than there can be; give it smaller sizes") from error
        error.add_note(f"while building {what}")
        raise (blame(error) or PluginError(f"{owner}: {words(error)}")) from error
    lacking = [name for name in PROMISED[choice.kind] if not hasattr(built, name)]
    if lacking:
        raise PluginError(f"{owner}: {what} built a {type(built).__name__}, which has no {', '.join(lacking)}")
    return built


def dataset(recipe: Recipe, catalogue: Catalogue) -> Dataset:
    """The data set, which may not be at hand yet."""
    built: Dataset = component(catalogue, recipe.data)
    return built


def build(recipe: Recipe, catalogue: Catalogue, data: Dataset, spec: Spec | None = None) -> Built:
    """Networks, priors and losses for this data; weights are not needed yet. Leaves the global random state as it was.

    `spec` stands in for the data's own where the data is not at hand.
    """
    spec = attrs.evolve(spec or data.spec, conditional=recipe.train.conditional)
    if spec.conditional and not spec.classes:
        raise UserError(f"train.conditional: data '{recipe.data.name}' has no labels")
    problems: list[str] = []
    if recipe.train.horizontal_flips and spec.kind != "image":
        problems.append(f"train.horizontal_flips: data '{recipe.data.name}' is no image")

    def attempt(function: Callable[..., Any], *arguments: Any, where: str = "") -> Any:
        """What it gives, or None once what is wrong was noted: everything wrong is told at once."""
        try:
            return function(*arguments)
        except UserError as error:
            problems.extend(f"{where}{line}" if line.startswith(("objective.", "data.")) else line for line in error.problems)
            return None

    weights = _weights_in_bytes(recipe, catalogue, spec)
    try:
        memory.need("network: its weights", weights, "fewer or narrower layers")
    except UserError as error:
        raise recipe.told([*problems, *error.problems]) from None
    with Seeded(stream_seed(recipe.train.seed, "init")):
        networks = attempt(_networks, recipe, catalogue, spec)
        priors = attempt(_priors, recipe, catalogue, networks.groups, spec) if networks else None
        reconstruction = attempt(component, catalogue, recipe.reconstruction, spec)
    if networks:
        built = Built(recipe, catalogue, data, spec, networks, priors or Priors({}), reconstruction)
        for i, plan in enumerate(recipe.stages):
            attempt(built.objective, plan, where=f"stages[{i}].")  # what does not fit is told now, not when the stage begins
        attempt(fits.stages, built, partial(_networks, recipe, catalogue, spec))
        attempt(fits.prior_stages, built)
        attempt(fits.normal_priors, built)
        attempt(built.metrics)
        for player, module in built.modules.items():
            try:
                lr_factors(module)
            except ValueError as error:
                raise PluginError(f"{built.owner(player)}: {player}: {error}") from error
    if problems:
        raise recipe.told(problems)
    return built


def _weights_in_bytes(recipe: Recipe, catalogue: Catalogue, spec: Spec) -> int:
    """What networks and priors will take, counted where nothing is computed; 0 of those whose building needs numbers."""
    try:
        with torch.device("meta"):
            networks = _networks(recipe, catalogue, spec)
            priors = _priors(recipe, catalogue, networks.groups, spec)
    except Exception:  # what is wrong shows again, and is told, when they are built; the count is all that is lost
        return 0
    return memory.size_of(networks.encoder, networks.decoder, priors)


def room(built: Built, *, on_cpu: bool) -> None:
    """A `UserError` where training takes more memory than there is even by the least count: a batch with its noise and, on the
    CPU, the weights four times, with their gradients and Adam's two moments."""
    weights = 4 * memory.size_of(*built.modules.values()) if on_cpu else 0
    row = built.spec.dims + 2 * sum(built.networks.groups.values())
    try:
        for plan in built.recipe.stages:
            memory.need(
                f"train.batch: training with {plan.batch:,}", weights + 4 * row * plan.batch, "a smaller batch or network"
            )
    except UserError as error:
        raise built.recipe.told(error.problems) from None


def _networks(recipe: Recipe, catalogue: Catalogue, spec: Spec) -> Networks:
    built: list[Networks] = [_network(catalogue, choice, spec) for choice in recipe.network]
    if len(built) == 1:
        return built[0]
    encoder, decoder = built
    if encoder.groups != decoder.groups:
        raise UserError(f"network: the encoder's groups {encoder.groups} are not the decoder's {decoder.groups}")
    return decoder._replace(encoder=encoder.encoder, batch_statistics=encoder.batch_statistics or decoder.batch_statistics)


def _network(catalogue: Catalogue, choice: Choice, spec: Spec) -> Networks:
    """What a network component builds, once it is what `Networks` promises."""
    built: Networks = component(catalogue, choice, spec)
    told = next(network_problems(built), None)
    if told:
        raise PluginError(f"{catalogue.owner('network', choice.name)}: network '{choice.name}': {told}")
    return built


def network_problems(built: Any) -> Iterator[str]:
    """What is wrong with `Networks` before anything was computed with them."""
    for player in ("encoder", "decoder"):
        if not isinstance(getattr(built, player), nn.Module):
            yield f"its {player} is a {type(getattr(built, player)).__name__}, expected an nn.Module"
    groups = built.groups
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, str) for group in groups):
        yield f"its groups are {groups!r}, expected {{name: dimensions}} of at least one latent group"
        return
    for group, dim in groups.items():
        if type(dim) is not int or dim < 1:
            yield f"its latent group '{group}' has {dim!r} dimensions, expected a whole number of at least 1"
    if built.translate is not None and not (len(built.translate) == 2 and set(built.translate) <= groups.keys()):
        yield f"translate is {built.translate!r}, expected two of its groups {', '.join(groups)}"
    norms = [module for player in (built.encoder, built.decoder) if isinstance(player, nn.Module) for module in player.modules()]
    if not getattr(built, "batch_statistics", False) and any(isinstance(module, _BatchNorm) for module in norms):
        yield "it has batch norm and does not say so: Networks(…, batch_statistics=True)"


def _priors(recipe: Recipe, catalogue: Catalogue, groups: dict[str, int], spec: Spec) -> Priors:
    unknown = [group for group in recipe.prior if group and group not in groups]
    if unknown:
        raise UserError(f"prior.{group}: the network has no such group{near_miss(group, groups)}" for group in unknown)
    choices = {group: recipe.prior.get(group, recipe.prior.get("")) for group in groups}
    return Priors({group: component(catalogue, choice, groups[group], spec) for group, choice in choices.items() if choice})


def demands(built: Built) -> list[str]:
    """What the networks, the pictures and the splits ask of the data and do not get, as far as it is known by now."""
    counts = getattr(built.dataset, "counts", None)
    if counts is None:
        return []
    there, name = counts(), built.recipe.data.name
    problems = [
        f"data: no image of '{name}' is in the split '{split}', of {sum(there.values())} in all; it takes one on"
        " either side at least"
        for split, count in there.items()
        if count < 1
    ]
    if not problems and built.networks.translate and there["held_out"] < 2:
        problems.append(
            "data: one image alone is held out, and translations are shown between two: hold out more (data.held_out), or give"
            " more images"
        )
    return problems


def missing(built: Built) -> list[str]:
    """What has to be at hand before training, and is not: a line each."""
    loss_missing = getattr(built.reconstruction, "missing", lambda: None)()
    return [line for line in (built.dataset.missing(), loss_missing) if line]
