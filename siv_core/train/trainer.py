"""Training: one flat loop over steps, and a step over the phases of an objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

import torch
from attrs import define, field
from torch import Tensor

from siv_core.data import pyramid
from siv_core.data.feed import Feed, blend
from siv_core.errors import Diverged, PluginError, Stopped, UserError
from siv_core.model import Model
from siv_core.nets import set_stage, stage_of
from siv_core.protocols import Batch, Noise, Phase, Shadow
from siv_core.recipe.build import Built
from siv_core.recipe.convert import Length
from siv_core.seeding import DataOrder, Streams
from siv_core.store import checkpoint, memory
from siv_core.store.checkpoint import Checkpoint
from siv_core.store.rundir import RunDir
from siv_core.train import captured, stage
from siv_core.train.health import Monitor
from siv_core.train.observer import Observer
from siv_core.train.parallel import Parallel, share_statistics
from siv_core.train.players import Follower, Kept, Player, Weights
from siv_core.train.schedule import Schedule
from siv_core.train.stage import ActiveStage
from siv_core.train.stats import Stats
from siv_core.train.step import added, clipped, micro_batches
from siv_core.train.views import Views

T = TypeVar("T")
Training = Generator["Trainer", None, T]  # yields where a step is to be done, and ends with a T

ASK_EVERY = 10  # steps between two times that several processes agree on whether to stop


def driven(training: Training[T]) -> T:
    """A training by itself, step by step; what goes wrong in a step is raised where the training waits for it."""
    try:
        trainer = next(training)
        while True:
            assert trainer.active
            try:
                trainer.step(trainer.active)
            except BaseException as error:
                trainer = training.throw(error)
            else:
                trainer = next(training)
    except StopIteration as end:
        return end.value


@define
class Counters:
    step: int = 0
    images_seen: int = 0
    checkpoints: int = 0
    tick_images: int = 0  # images_seen at the last tick
    ticked: float = 0.0  # when that was, by the clock; 0: not in this process
    waited: float = 0.0  # seconds for data, until then


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
    views: Views
    schedule: Schedule
    players: dict[str, Player]
    followers: list[Follower]
    stats: Stats
    health: Monitor
    kept: dict[str, Kept]  # name -> what a checkpoint saves and restores; new state of a training is registered here
    counters: Counters = field(factory=Counters)
    active: ActiveStage | None = None

    @classmethod
    def of(cls, built: Built, rundir: RunDir, device: torch.device, parallel: Parallel, observer: Observer) -> Trainer:
        """Prepared for step 0; the data and the reconstruction loss are at hand."""
        if device.type == "cpu":
            memory.keep_what_is_freed()
        train, stages = built.recipe.train, built.recipe.stages
        if built.networks.batch_statistics and parallel.world > 1 and not sum(map(share_statistics, built.networks[:2])):
            raise UserError(
                "network: its statistics of a batch are no batch norm's and cannot be shared by several processes; use one"
            )
        statistics = [reason for plan in stages for reason in built.uncut(plan, built.objective(plan))]
        if train.graphs and parallel.world > 1 and statistics:
            raise UserError(f"train.graphs: {statistics[0]}, over several processes: {captured.REMEDY}")
        players = {name: Player.of(name, module.train()) for name, module in built.place(device).items()}
        sides = [built.shape(plan)[-1] for plan in stages if plan.size]
        rows = pyramid.with_sizes(built.dataset.rows("train"), built.dataset.fingerprint, sides, observer.progress)
        feed = Feed(rows, built.spec, device, train.residency, conditional=train.conditional, flips=train.horizontal_flips)
        rules = [rule for plan in stages for rule in built.objective(plan).shadows]
        if built.recipe.shadow:
            shadow = built.recipe.shadow
            batches = {plan.batch for plan in stages}
            if shadow.half_life.unit == "steps" and len(batches) > 1:
                told = " and ".join(map(str, sorted(batches)))
                raise UserError(f"shadow.half_life: in steps, and the stages have batches of {told}: say it in images or epochs")
            half_life = shadow.half_life.images(stages[0].batch, len(rows))
            rule = partial(Shadow, "ema", half_life_images=half_life, warm_up=shadow.warm_up)
            averaged = [name for name in shadow.of if players[name].parameters]
            rules += [rule(of=name, average_buffers=shadow.buffers == "average") for name in averaged]
        followers = [Follower.of(rule, players[rule.of], len(rows)) for rule in dict.fromkeys(rules)]
        schedule, stats = Schedule.of(stages, len(rows)), Stats(parallel, device)
        kept: dict[str, Kept] = {name: Weights(player.module) for name, player in players.items()}
        kept.update({f"{name}.optimiser": player for name, player in players.items()})
        kept.update({follower.key: Weights(follower.module) for follower in followers})
        kept["stats"] = stats
        health, order = Monitor(schedule, train, built.networks.groups), DataOrder(len(rows), train.seed)
        views = Views.of(feed, order, train, stages)
        kept.update({"views": views} if views.kept_for else {})
        return cls(
            built, rundir, device, parallel, observer, feed, order, views, schedule, players, followers, stats, health, kept
        )

    # -- the loop ----------------------------------------------------------------------------------------------------------------

    def run(
        self,
        max_seconds: float | None = None,
        preview: Callable[[str], None] = lambda name: None,
        measure: Callable[[list[str]], None] = lambda names: None,
    ) -> str:
        """Train to the end of the last stage, or until `max_seconds` are over: "finished" or "stopped"."""
        return driven(self.loop(max_seconds, preview, measure))

    def loop(
        self, max_seconds: float | None, preview: Callable[[str], None], measure: Callable[[list[str]], None]
    ) -> Training[str]:
        """Training, as what there is to do before and after each step; who drives it does the step when this yields.

        `preview` draws a picture of this name, `measure` takes the metrics of these names. Raises `Stopped` when asked to by a
        signal, after a checkpoint, and `Diverged` without one.
        """
        started, train, counters, total = time.monotonic(), self.built.recipe.train, self.counters, self.schedule.total
        cadences = {name: plan.every for name, plan in self.built.recipe.metrics.items() if plan.every}
        while counters.step < total:
            # The stage
            number = self.schedule.next(counters.step)
            if self.active is None or self.active.stage.number != number:
                self.active = stage.enter(self, number)
            active = self.active

            # The step
            yield self
            self.count(active)
            self.observer.stepped(counters.step, total, counters.images_seen)

            # What is due. Only counters decide, but for the wish to stop: that ends a run, it does not change it.
            over, signum = self.wish(started, max_seconds) if counters.step < total else (False, 0)
            ended = counters.step in self.schedule.ends  # a mean over two stages would mix their terms
            if ended or self.due(train.tick, active):
                self.tick(started)
            early = counters.step in (max(1, total // 100), max(1, total // 20))
            if self.due(train.preview, active) or early or (ended and counters.step < total):
                preview(f"preview_{counters.step:08d}")
            names = [name for name, every in cadences.items() if self.due(every, active) and counters.step < total]
            if names:
                measure(names)
            if self.due(train.checkpoint, active) or counters.step == total or over:
                self.save()  # last: what was due at this step is not done again by a run that goes on from here
            if over and signum:
                raise Stopped(signum)
            if over:
                return "stopped"
        return "finished"

    def wish(self, started: float, max_seconds: float | None) -> tuple[bool, int]:
        """Whether the run is to end here, and the signal that asked for it, or 0; all processes come to the same."""
        if self.parallel.world > 1 and self.counters.step % ASK_EVERY:
            return False, 0
        late = max_seconds is not None and time.monotonic() - started >= max_seconds
        wish = self.parallel.largest(2 * self.observer.asked_to_stop() + late)
        return wish > 0, wish // 2

    def advance(self, active: ActiveStage) -> None:
        """One step, its count, and the shadows after it."""
        self.step(active)
        self.count(active)

    def count(self, active: ActiveStage) -> None:
        """A step was done: its count, and the shadows after it."""
        images_before = self.counters.images_seen
        self.counters.step += 1
        self.counters.images_seen += active.plan.batch
        for follower in self.followers:
            follower.follow(self.players[follower.rule.of].module, images_before, self.counters.images_seen)

    def step(self, active: ActiveStage) -> None:
        """One step: the same batch and noise for every phase, each phase moving its players alone."""
        n = active.plan.batch
        batch, noise = self.drawn(active)
        pieces = micro_batches(batch, noise, self.parallel.share(n), n, self.built.recipe.train.micro_batch)
        carries: list[dict[str, Any]] = [{} for _ in pieces]
        for phase in active.objective.phases:
            self.play(phase, active, pieces, carries)

    def drawn(self, active: ActiveStage) -> tuple[Batch, Noise]:
        """This process's batch of the step to come, x [share, …], and the noise of all n samples, a tree of tensors [n, …]."""
        n, counters = active.plan.batch, self.counters
        active.set_fade(self.schedule.fade(active.stage.number, counters.step))
        streams = Streams(self.built.recipe.train.seed, counters.step, self.device)
        share = self.parallel.share(n)
        shape, fade = active.stage.shape, active.stage.fade
        batch = self.feed.next(self.order, counters.images_seen, n, share, streams, shape, self.layout)
        if fade is not None:
            batch = batch._replace(x=blend(batch.x, fade))
        noise = active.objective.draw(n, streams, active.sources)
        if active.plan.views:
            noise = {**noise, "views": self.views.draw(active.plan.views, batch.x, counters.images_seen, n, share, streams)}
        return batch, noise

    def play(self, phase: Phase, active: ActiveStage, pieces: list[tuple[Batch, Noise]], carries: list[dict[str, Any]]) -> None:
        """One phase: gradients for the players it updates and for them only, summed over micro-batches and processes."""
        parameters = [parameter for name in phase.updates for parameter in self.players[name].parameters]
        if not parameters:
            return
        n, keep = active.plan.batch, active.nets.keep_graphs and phase is not active.objective.phases[-1]
        played = []
        for i, (batch, noise) in enumerate(pieces):
            share = len(batch.x) / n
            played.append(active.play(phase, parameters, active.nets, batch, noise, active.coeffs, carries[i], share, keep))
            carries[i] = played[-1].carry
        gradients, row = added(played)
        self.move(phase, active, gradients, row, played[0].names)

    def move(
        self, phase: Phase, active: ActiveStage, gradients: list[Tensor | None], row: Tensor, names: tuple[str, ...]
    ) -> None:
        """Move the players of the phase along these gradients, in the order of their parameters, and count its statistics."""
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            owner = self.built.catalogue.owner("objective", active.plan.objective.name)
            raise PluginError(
                f"{owner}: phase '{phase.name}' has no gradient for {' and '.join(phase.updates)}, which it updates"
            )
        self.parallel.sum_(present)
        norm = clipped(present, self.built.recipe.train.clip_gradient)
        self.stats.add(phase.name, self.counters.step, active.plan.batch, names, row, norm)
        for player in (self.players[name] for name in phase.updates):
            own, gradients = gradients[: len(player.parameters)], gradients[len(player.parameters) :]
            player.step(own)

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
        now = time.monotonic()
        waiting = (self.feed.waited - counters.waited) / max(now - (counters.ticked or started), 1e-9)
        counters.waited, counters.ticked = self.feed.waited, now
        # the only entry that differs from run to run
        line["wall"] = {"seconds": round(now - started, 3), "waiting_for_data": round(waiting, 3)}
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

    # -- the present state -------------------------------------------------------------------------------------------------------

    def standing(self) -> dict[str, Any]:
        """The stage that made the present state, and how far it has faded in, as JSON."""
        number = self.schedule.made(self.counters.step)
        return {"number": number, "fade": self.schedule.fade(number, self.counters.step - 1)}

    def model(self, weights: str = "raw") -> Model:
        """The networks as they stand, or their averages ("ema"; "auto": where there are some), as they are: nothing is copied."""
        averages = {f.rule.of: f.module for f in self.followers if f.rule.name == "ema"} if weights != "raw" else {}
        modules = {name: averages.get(name, player.module) for name, player in self.players.items()}
        standing = self.standing()
        plan = self.schedule.plans[standing["number"]]
        if self.active is None:  # as after the resume of a run that is trained to its end
            set_stage(modules.values(), stage_of(**standing, shape=self.built.shape(plan), device=self.device))
        name = f"step_{self.counters.step:08d}, {'ema' if averages else 'raw'} weights"
        return self.built.model(modules, self.device, name, plan)

    def save(self) -> None:
        """A checkpoint of a state that is known to be finite."""
        self.stats.check()
        counters = self.counters
        counters.checkpoints += 1
        for module in [*(player.module for player in self.players.values()), *(follower.module for follower in self.followers)]:
            self.parallel.agree(module.buffers())
        kept = {name: one.kept() for name, one in self.kept.items()}
        if self.parallel.main:
            state = {
                "images_seen": counters.images_seen,
                "number": counters.checkpoints,
                "tick_images": counters.tick_images,
                "stage": self.standing(),
                **{name: data for name, (_, data) in kept.items() if data},
                "offsets": self.rundir.offsets(),
                "resolved": self.built.recipe.resolved(),
            }
            tensors = {name: own for name, (own, _) in kept.items()}
            path = checkpoint.save(self.rundir.checkpoints, counters.step, tensors, state)
            checkpoint.prune(self.rundir.checkpoints, self.built.recipe.train.keep_every, counters.step)
            self.observer.wrote(path)
        self.parallel.wait()

    def resume(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint, taking back whatever was written after it."""
        with saved.fitting():
            for name, one in self.kept.items():
                one.restore(saved.part(name), saved.state.get(name, {}), f"{saved.path}/{name}")
        state = saved.state
        self.counters = Counters(state["step"], state["images_seen"], state["number"], state["tick_images"])
        for line in self.rundir.read("stats"):
            if line["step"] <= self.counters.step:
                self.health.see(line)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.built.recipe.train.channels_last else torch.contiguous_format
