"""What holds while a stage of training lasts, and what happens when it is entered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor

from siv_core.errors import PluginError, UserError
from siv_core.nets import encode_group, make_nets, parts, set_stage, sources, stage_of
from siv_core.protocols import Batch, Nets, Objective, Stage
from siv_core.recipe.forward import check_forward
from siv_core.recipe.options import Optim, Train
from siv_core.recipe.recipe import StagePlan
from siv_core.train import captured
from siv_core.train.compiled import CompiledPlay
from siv_core.train.players import changed, state_of, take_over
from siv_core.train.step import Played, play, tensors_of

if TYPE_CHECKING:
    from siv_core.train.trainer import Trainer

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of Intel's and AMD's processors, and of ARM's


@define
class ActiveStage:
    """What holds while a stage lasts."""

    stage: Stage
    plan: StagePlan
    objective: Objective
    nets: Nets
    coeffs: dict[str, Any]
    sources: Any
    told: list[Any]  # the modules that are told the stage
    play: Callable[..., Played]  # a phase, as it is, compiled or recorded

    def set_fade(self, fade: float) -> None:
        """In place: who was given the tensor sees it move. At 1 all are told that nothing fades any more."""
        if self.stage.fade is None:
            return
        if fade < 1:
            self.stage.fade.fill_(fade)
            return
        self.stage = self.stage._replace(fade=None)
        set_stage(self.told, self.stage)
        getattr(self.play, "forget", lambda: None)()


def enter(trainer: Trainer, number: int) -> ActiveStage:
    """Set everything that a stage may change; at its very first step optimisers may be reset, and `begin` is called."""
    built, device = trainer.built, trainer.device
    plan = trainer.schedule.plans[number]
    begins = trainer.counters.step == trainer.schedule.first(number)
    for name, player in trainer.players.items():
        optim: Optim = plan.optim.get(name, plan.optim[""])
        player.configure(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        if plan.reset_optimisers and begins:
            player.reset_optimiser()
    shape, objective, train = built.shape(plan), built.objective(plan), built.recipe.train
    modules: dict[str, Any] = {name: player.module for name, player in trainer.players.items()}
    shadows: dict[str, Any] = {follower.key: follower.module for follower in trainer.followers}
    stage = stage_of(number, shape, trainer.schedule.fade(number, trainer.counters.step), device)
    told = [*modules.values(), *shadows.values()]
    set_stage(told, stage)
    check_forward(built, modules, shape, device)
    if len(trainer.schedule.plans) > 1:
        trainer.observer.say(said(trainer, number, shape))
    if train.compile:
        trainer.observer.say("the first step of each phase waits for the compiler, a minute or more")
    if begins:
        begin(trainer, stage, plan.batch)
        find_peers(trainer, plan, shape)
    return ActiveStage(
        stage=stage,
        plan=plan,
        objective=objective,
        nets=make_nets(
            {**modules, **shadows},
            built.reconstruction,
            train.logvar_bound or None,
            autocast_of(train.precision, device),
            mean=no_mean if 0 < train.micro_batch < plan.batch else trainer.parallel.mean,
            keep_graphs=train.keep_graphs,
        ),
        coeffs=tensors_of(objective.coeffs, device),
        sources=sources(built.networks.groups, built.priors, built.networks.decoder),
        told=told,
        play=phase_of(train, device),
    )


def phase_of(train: Train, device: torch.device) -> Callable[..., Played]:
    """How phases of a stage are run."""
    inner: Callable[..., Played] = CompiledPlay() if train.compile else play
    if not train.graphs:
        return inner
    if lacking := captured.lacking(device):
        raise UserError(lacking)
    return captured.CapturedPlay(inner, captured.CUDARecorder())


def said(trainer: Trainer, number: int, shape: tuple[int, ...]) -> str:
    """What a person is told of a stage that is entered."""
    plan, schedule = trainer.schedule.plans[number], trainer.schedule
    size = f", {shape[1]} × {shape[2]} pixels" if len(shape) == 3 else ""
    fading = f", fading in over {plan.fade:.0%} of it" if plan.fade else ""
    steps = f"steps {schedule.first(number) + 1:,} to {schedule.ends[number]:,}"
    return f"stage {number + 1} of {len(schedule.plans)}: {plan.objective.name}{size}, batch {plan.batch}, {steps}{fading}"


def begin(trainer: Trainer, stage: Stage, batch: int) -> None:
    """Call `begin` of those who have it, encoder, decoder and the groups' priors in this order; see `protocols.Prior`."""

    def batches() -> Iterator[Batch]:
        there = len(trainer.feed.rows)
        for first in range(0, there, batch):  # each sample once
            yield trainer.feed.batch(trainer.order.take(first, min(batch, there - first)), stage.shape, trainer.layout)

    modules = {name: player.module for name, player in trainer.players.items()}
    bound = trainer.built.recipe.train.logvar_bound or None  # the priors' own bounds may be what is to be found here
    encode = make_nets({"encoder": modules["encoder"]}, trainer.built.reconstruction, bound).encoder
    for name, player in trainer.players.items():
        own = [(prefix, part) for prefix, part in parts(player.module).items() if hasattr(part, "begin")]
        if not own:
            continue
        before = {key: value.clone() for key, value in state_of(player.module).items()}
        for module in modules.values():
            module.eval()
        with torch.no_grad():
            for prefix, part in own:
                part.begin(stage, batches(), encode_group(encode, prefix.split(".")[1]) if prefix else encode)
        for module in modules.values():
            module.train()
        try:
            names = changed(before, player.module)
        except ValueError as error:
            raise PluginError(f"{trainer.built.owner(name)}: {error}") from error
        trainer.parallel.agree(state_of(player.module).values())
        take_over(names, player, [f for f in trainer.followers if f.rule.of == name])


def find_peers(trainer: Trainer, plan: StagePlan, shape: tuple[int, ...]) -> None:
    """Those that the stage's views ask for; all processes have the main one's."""
    groups = [group for group, names in plan.views.items() if "peer" in names]
    if not groups:
        return
    images = len(trainer.feed.rows)
    trainer.observer.say(f"looking for the peers of each image by its {' and '.join(groups)} code, among {images:,} images")
    encoder = trainer.players["encoder"].module.eval()
    bound = trainer.built.recipe.train.logvar_bound or None
    trainer.views.find(groups, make_nets({"encoder": encoder}, trainer.built.reconstruction, bound).encoder, shape)
    encoder.train()
    for group in groups:
        agreed = trainer.views.peers[group].to(trainer.device)
        trainer.parallel.agree([agreed])
        trainer.views.peers[group] = agreed.cpu()


def no_mean(x: Tensor) -> Tensor:
    """In place of a mean over the batch where that is cut: a piece knows nothing of the others."""
    reason = "the objective or a prior takes a mean over the whole batch, which a piece does not have"
    raise UserError(f"train.micro_batch: {reason}; leave it out")


def arithmetic(precision: str, device: torch.device) -> str:
    """`train.precision` with `auto` decided. A processor that has to emulate bf16 takes many times as long as in fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = torch.backends.mkldnn.is_available() and any(known.get(name) for name in BF16_INSTRUCTIONS)
    return "bf16" if native else "fp32"


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    bf16 = arithmetic(precision, device) == "bf16"
    return partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
