"""Training: one flat loop over steps, and a step over the phases of an objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import define, field
from torch import Tensor

from siv_core import checkpoint, memory
from siv_core.build import Built, check_forward
from siv_core.convert import Length
from siv_core.errors import Diverged, Stopped, UserError
from siv_core.feed import Feed, blend
from siv_core.health import Monitor, stage_at
from siv_core.parallel import Parallel
from siv_core.players import Follower, Player, encode_group, make_nets, rows_of, set_stage, slices, sources
from siv_core.protocols import KEEP_GRAPHS, Batch, Nets, Noise, Objective, Phase, Shadow, Stage
from siv_core.recipe import Optim, StagePlan
from siv_core.rundir import RunDir
from siv_core.seeding import DataOrder, Streams
from siv_core.stats import Stats


class Observer(Protocol):
    """Who watches a run: shows progress and says when to stop. Nothing it does changes what is computed."""

    def say(self, line: str) -> None: ...
    def stepped(self, step: int, steps: int, images_seen: int) -> None: ...
    def ticked(self, line: dict[str, Any]) -> None: ...
    def wrote(self, path: Path) -> None: ...
    def asked_to_stop(self) -> int:
        """A signal number, or 0."""


@define
class Counters:
    step: int = 0
    images_seen: int = 0
    checkpoints: int = 0
    tick_images: int = 0  # images_seen at the last tick


@define
class Trainer:
    """Everything a training run holds. `run` is the loop; `save` and `resume` are its inverse."""

    built: Built
    rundir: RunDir
    device: torch.device
    parallel: Parallel
    observer: Observer
    feed: Feed
    order: DataOrder
    players: dict[str, Player]
    followers: list[Follower]
    stats: Stats
    health: Monitor
    counters: Counters = field(factory=Counters)

    @classmethod
    def of(cls, built: Built, rundir: RunDir, device: torch.device, parallel: Parallel, observer: Observer) -> Trainer:
        """Prepared for step 0; the data and the reconstruction loss are at hand."""
        if device.type == "cpu":
            memory.keep_what_is_freed()
        train = built.recipe.train
        players = {name: Player.of(name, module.to(device).train()) for name, module in built.modules.items()}
        if train.channels_last:
            for player in players.values():
                player.module.to(memory_format=torch.channels_last)
        if isinstance(built.reconstruction, torch.nn.Module):
            built.reconstruction.to(device)
        feed = Feed(built.dataset.rows("train"), built.spec, device, train.residency, conditional=train.conditional)
        objectives = [built.objective(plan) for plan in built.recipe.stages]
        if parallel.world > 1 and any(objective.batch_statistic for objective in objectives):
            raise UserError("objective: its loss is no mean over samples and cannot be shared by several processes; use one")
        rules = [rule for objective in objectives for rule in objective.shadows]
        if built.recipe.shadow:
            shadow = built.recipe.shadow
            half_life = shadow.half_life.images(train.batch, len(feed.rows))
            rules += [Shadow("ema", of, half_life_images=half_life) for of in shadow.of if players[of].parameters]
        followers = [Follower.of(rule, players[rule.of], len(feed.rows)) for rule in dict.fromkeys(rules)]
        order = DataOrder(len(feed.rows), train.seed)
        stages = built.recipe.stages
        ends = stage_ends([(plan.length, plan.batch) for plan in stages], len(feed.rows))
        health = Monitor(stages, train, built.networks.groups, ends)
        return cls(built, rundir, device, parallel, observer, feed, order, players, followers, Stats(parallel), health)

    # -- the loop ----------------------------------------------------------------------------------------------------------------

    def run(self, max_seconds: float | None = None, preview: Callable[[str], None] = lambda name: None) -> str:
        """Train to the end of the last stage, or until `max_seconds` are over: "finished" or "stopped".

        Raises `Stopped` when asked to by a signal, after a checkpoint, and `Diverged` without one.
        """
        started, recipe, counters = time.monotonic(), self.built.recipe, self.counters
        ends = self.stage_ends()
        total = ends[-1]
        active: ActiveStage | None = None
        if counters.step == 0:
            self.start_priors()
        while counters.step < total:
            # The stage
            number = next(i for i, end in enumerate(ends) if counters.step < end)
            if active is None or active.number != number:
                first = ends[number - 1] if number else 0
                active = self.enter(number, first, ends[number] - first)
            active.set_fade(counters.step)

            # The step
            self.advance(active)
            self.observer.stepped(counters.step, total, counters.images_seen)

            # What is due. Only counters decide, but for the wish to stop: that ends a run, it does not change it.
            signum = self.parallel.largest(self.observer.asked_to_stop())
            late = max_seconds is not None and time.monotonic() - started >= max_seconds
            over = bool(signum or self.parallel.largest(int(late))) and counters.step < total
            if self.due(recipe.train.tick, active) or counters.step in ends:  # a mean over two stages would mix their terms
                self.tick(started)
            early = counters.step in (max(1, total // 100), max(1, total // 20))
            if self.due(recipe.train.preview, active) or early:
                preview(f"preview_{counters.step:08d}")
            if self.due(recipe.train.checkpoint, active) or counters.step == total or over:
                self.save()  # last: what was due at this step is not done again by a run that goes on from here
            if over and signum:
                raise Stopped(signum)
            if over:
                return "stopped"
        return "finished"

    def advance(self, active: ActiveStage) -> None:
        """One step, its count, and the shadows after it."""
        self.step(active)
        images_before = self.counters.images_seen
        self.counters.step += 1
        self.counters.images_seen += active.plan.batch
        for follower in self.followers:
            follower.follow(self.players[follower.rule.of].module, images_before, self.counters.images_seen)

    def step(self, active: ActiveStage) -> None:
        """One step: the same batch and noise for every phase, each phase moving its players alone."""
        plan, counters = active.plan, self.counters
        streams = Streams(self.built.recipe.train.seed, counters.step, self.device)
        share = self.parallel.share(plan.batch)
        if self.feed.endless:
            batch = self.feed.draw(plan.batch, share, streams, active.shape, self.memory_format)
        else:
            positions = self.order.take(counters.images_seen, plan.batch)[share]
            batch = self.feed.take(positions, active.shape, self.memory_format)
        if active.fading:
            batch = batch._replace(x=blend(batch.x, active.fade))
        noise = active.objective.draw(plan.batch, streams, active.sources)
        parts = micro_batches(batch, noise, share, plan.batch, self.built.recipe.train.micro_batch)
        carries: list[dict[str, Any]] = [{KEEP_GRAPHS: self.built.recipe.train.keep_graphs} for _ in parts]
        for phase in active.objective.phases:
            self.play(phase, active, parts, carries)

    def play(self, phase: Phase, active: ActiveStage, parts: list[tuple[Batch, Noise]], carries: list[dict[str, Any]]) -> None:
        """One phase: gradients for the players it updates and for them only, summed over micro-batches and processes."""
        players = [self.players[name] for name in phase.updates]
        parameters = [parameter for player in players for parameter in player.parameters]
        total: list[Tensor | None] = [None] * len(parameters)
        terms, shares = [], []
        keep = self.built.recipe.train.keep_graphs and phase is not active.objective.phases[-1]
        for i, (batch, noise) in enumerate(parts):
            loss, own, carries[i] = phase.loss(active.nets, batch, noise, active.coeffs, carries[i])
            share = loss * (len(batch.x) / active.plan.batch)
            gradients = torch.autograd.grad(share, parameters, allow_unused=True, retain_graph=keep)
            total = [_add(before, new) for before, new in zip(total, gradients, strict=True)]
            terms.append({name: term.detach() for name, term in own.items()})
            shares.append(share.detach())
        present = [gradient for gradient in total if gradient is not None]
        self.parallel.sum_(present)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))
        clip = self.built.recipe.train.clip_gradient
        if clip:
            torch._foreach_mul_(present, (clip / (norm + 1e-12)).clamp(max=1.0))
        self.stats.add(phase.name, self.counters.step, active.plan.batch, terms, sum(shares[1:], shares[0]), norm)
        for player in players:
            own_gradients, total = total[: len(player.parameters)], total[len(player.parameters) :]
            player.step(own_gradients)

    # -- stages ------------------------------------------------------------------------------------------------------------------

    def stage_ends(self) -> list[int]:
        """The step at which each stage is over."""
        return list(self.health.ends)

    def enter(self, number: int, first: int, steps: int) -> ActiveStage:
        """Set everything that a stage may change; the optimisers are reset only at its very first step."""
        plan = self.built.recipe.stages[number]
        for name, player in self.players.items():
            optim: Optim = plan.optim.get(name, plan.optim[""])
            player.configure(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
            if plan.reset_optimisers and self.counters.step == first:
                player.reset_optimiser()
        shape = self.built.shape(plan)
        fade_steps = math.ceil(plan.fade * steps)
        objective = self.built.objective(plan)
        modules: dict[str, Any] = {name: player.module for name, player in self.players.items()}
        modules.update({follower.key: follower.module for follower in self.followers})
        active = ActiveStage(
            number=number,
            plan=plan,
            objective=objective,
            shape=shape,
            first=first,
            fade_steps=fade_steps,
            fade=torch.ones((), device=self.device),
            nets=make_nets(modules, self.built.reconstruction, self.built.recipe.train.logvar_bound or None, autocast_of(self)),
            coeffs=tensors_of(objective.coeffs, self.device),
            sources=sources(self.built.networks.groups, self.built.priors, self.built.networks.decoder),
        )
        set_stage(modules.values(), Stage(number, shape, active.fade))
        check_forward(self.built, modules, shape, self.device)
        return active

    def start_priors(self) -> None:
        """Let priors that want to see data before the first step see some."""
        plan = self.built.recipe.stages[0]
        encode = make_nets({"encoder": self.players["encoder"].module}, torch.sub)["encoder"]
        for group, prior in self.built.priors.groups.items():
            start = getattr(prior, "start", None)
            if start:
                positions = (self.order.take(i * plan.batch, plan.batch) for i in range(len(self.feed.rows) // plan.batch or 1))
                batches = (self.feed.take(p, self.built.shape(plan), self.memory_format) for p in positions)
                with torch.no_grad():
                    start(batches, encode_group(encode, group))

    def standing(self) -> dict[str, Any]:
        """The stage that made the present state, and how far it has faded in, as JSON."""
        step, ends = self.counters.step, self.health.ends
        number = stage_at(ends, step)
        first = ends[number - 1] if number else 0
        fade_steps = math.ceil(self.built.recipe.stages[number].fade * (ends[number] - first))
        return {"number": number, "fade": min(1.0, (step - first) / fade_steps) if fade_steps else 1.0}

    # -- what is due -------------------------------------------------------------------------------------------------------------

    def due(self, every: Length, active: ActiveStage) -> bool:
        return self.counters.step % every.steps(active.plan.batch, len(self.feed.rows)) == 0

    def tick(self, started: float) -> None:
        """One line of statistics, and what it says of the run's health; ends the run if something is no longer finite."""
        self.stats.check()
        counters = self.counters
        phases = self.stats.flush()
        images = counters.images_seen - counters.tick_images
        counters.tick_images = counters.images_seen
        line = {"step": counters.step, "images_seen": counters.images_seen, "images": images, "phases": phases}
        line["wall"] = {"seconds": round(time.monotonic() - started, 3)}  # the only entry that differs from run to run
        if self.parallel.main:
            self.rundir.append("stats", line)
            self.observer.ticked(line)
            warnings = self.health.see(line)
            for warning in warnings:
                self.observer.say(warning)
            self.note(warnings)

    def note(self, warnings: list[str]) -> None:
        """Keep warnings in the log and the manifest."""
        for warning in warnings:
            self.rundir.log(warning)
        if warnings:
            self.rundir.write("manifest", {**self.rundir.manifest(), "warnings": self.health.told})

    def diverged(self, error: Diverged) -> Diverged:
        """The same failure with what is left of the run and what to try; noted like a warning."""
        good = checkpoint.steps(self.rundir.checkpoints)
        left = f"the checkpoint of step {good[-1]} in {self.rundir.checkpoints} is good" if good else "there is no checkpoint yet"
        text = f"{error}\nnothing of it was saved; {left}\n{self.health.not_finite(self.counters.step, str(error))}"
        if self.parallel.main:
            self.note([text])
        return Diverged(text)

    # -- checkpoints -------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of a state that is known to be finite."""
        self.stats.check()
        counters = self.counters
        counters.checkpoints += 1
        stats_tensors, stats_state = self.stats.state()
        if self.parallel.main:
            tensors: checkpoint.Tensors = {name: player.module.state_dict() for name, player in self.players.items()}
            tensors.update({follower.key: follower.module.state_dict() for follower in self.followers})
            for name, player in self.players.items():
                tensors[f"{name}.optimiser"] = checkpoint.optimiser_tensors(player.module, player.optimiser)
            tensors["stats"] = stats_tensors
            state = {
                "images_seen": counters.images_seen,
                "number": counters.checkpoints,
                "tick_images": counters.tick_images,
                "stage": self.standing(),
                "stats": stats_state,
                "offsets": self.rundir.offsets(),
                "resolved": self.built.recipe.resolved(),
            }
            path = checkpoint.save(self.rundir.checkpoints, counters.step, tensors, state)
            checkpoint.prune(self.rundir.checkpoints, self.built.recipe.train.keep_every, counters.step)
            self.observer.wrote(path)
        self.parallel.wait()

    def resume(self, path: Path) -> None:
        """Go back to a checkpoint, taking back whatever was written after it."""
        tensors, state = checkpoint.load(path)
        with checkpoint.fitting(path):
            for name, player in self.players.items():
                moments = f"{name}.optimiser"
                checkpoint.restore_module(player.module, checkpoint.part(tensors, name, path), f"{path}/{name}")
                own = checkpoint.part(tensors, moments, path)
                checkpoint.restore_optimiser(player.module, player.optimiser, own, f"{path}/{moments}")
            for follower in self.followers:
                key = follower.key
                checkpoint.restore_module(follower.module, checkpoint.part(tensors, key, path), f"{path}/{key}")
            sums = {phase: tensor.to(self.device) for phase, tensor in checkpoint.part(tensors, "stats", path).items()}
            self.stats.restore(sums, state["stats"], f"{path}/stats")
        self.counters = Counters(state["step"], state["images_seen"], state["number"], state["tick_images"])
        for line in self.rundir.read("stats"):
            if line["step"] <= self.counters.step:
                self.health.see(line)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.built.recipe.train.channels_last else torch.contiguous_format


@define
class ActiveStage:
    """What holds while a stage lasts."""

    number: int
    plan: StagePlan
    objective: Objective
    shape: tuple[int, ...]
    first: int
    fade_steps: int
    fade: Tensor
    nets: Nets
    coeffs: dict[str, Any]
    sources: Any
    fading: bool = False

    def set_fade(self, step: int) -> None:
        """(steps done + 1) / fade steps, in place: who was given the tensor sees it move."""
        was, self.fading = self.fading, step - self.first < self.fade_steps
        if self.fading:
            self.fade.fill_((step - self.first + 1) / self.fade_steps)
        elif was:
            self.fade.fill_(1.0)


def stage_ends(lengths: Iterable[tuple[Length, int]], epoch_images: int) -> list[int]:
    """The step at which each stage is over, from their (length, batch)."""
    return list(accumulate(length.steps(batch, epoch_images) for length, batch in lengths))


def micro_batches(batch: Batch, noise: Noise, share: slice, n: int, micro_batch: int) -> list[tuple[Batch, Noise]]:
    """This process's batch (rows `share` of n) and the noise of all n samples, cut into pieces that belong together."""
    pieces = list(slices(share, micro_batch))
    if pieces == [slice(0, n)]:
        return [(batch, noise)]
    local = [slice(piece.start - share.start, piece.stop - share.start) for piece in pieces]
    return [(rows_of(batch, mine), rows_of(noise, piece)) for mine, piece in zip(local, pieces, strict=True)]


def autocast_of(trainer: Trainer) -> Callable[[], AbstractContextManager[Any]]:
    if trainer.built.recipe.train.precision == "bf16":
        return partial(torch.autocast, trainer.device.type, torch.bfloat16)
    return nullcontext


def tensors_of(coeffs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Numbers as 0-dim float64 tensors (which leave the type of what they multiply alone), tables as tables of tensors."""

    def tensor_of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors_of(value, device)
        return torch.tensor(float(value), dtype=torch.float64, device=device)

    return {name: tensor_of(value) for name, value in coeffs.items()}


def _add(before: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if before is None else before if new is None else before + new
