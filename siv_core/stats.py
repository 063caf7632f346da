"""Statistics that stay on the device until a tick: per-sample terms, losses, gradient norms and the first bad step."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from siv_core.errors import Diverged
from siv_core.parallel import Parallel
from siv_core.protocols import Terms


@define
class Stats:
    """Sums over samples since the last flush, one vector a phase: its terms in order, then `loss` and `gradient_norm`."""

    parallel: Parallel
    names: dict[str, list[str]] = field(factory=dict)  # phase -> names of the vector's entries
    sums: dict[str, Tensor] = field(factory=dict)  # float64 [len(names)]
    bad_step: dict[str, Tensor] = field(factory=dict)  # int64 [len(names)]: first step with a non-finite value, or -1
    samples: dict[str, int] = field(factory=dict)  # how many since the last flush

    @torch.no_grad()
    def add(self, phase: str, step: int, n: int, terms: list[Terms], loss: Tensor, gradient_norm: Tensor) -> None:
        """One phase of one step: the terms of this process's micro-batches and its share of the loss of `n` samples."""
        sums = [torch.stack(list(micro.values())).sum(dim=1) for micro in terms]
        means = reduce(torch.add, sums) / n
        vector = torch.cat([means, torch.stack([loss, gradient_norm / self.parallel.world])]).to(torch.float64)
        if self.names.get(phase) != [*terms[0], "loss", "gradient_norm"]:
            self.names[phase] = [*terms[0], "loss", "gradient_norm"]
            self.sums[phase] = torch.zeros_like(vector)
            self.bad_step[phase] = torch.full_like(vector, -1, dtype=torch.int64)
            self.samples[phase] = 0
        self.sums[phase] += vector * n
        bad = self.bad_step[phase]
        bad.masked_fill_((bad < 0) & ~torch.isfinite(vector), step)
        self.samples[phase] += n

    def check(self) -> None:
        """Raise `Diverged`, naming the first bad step, phase and term. Reads from the device."""
        found = []
        for phase, bad in self.bad_step.items():
            for name, step in zip(self.names[phase], bad.tolist(), strict=True):
                if step >= 0:
                    found.append((step, phase, name))
        anywhere = self.parallel.largest(int(bool(found)))  # asked in every process, so that all of them end
        if found:
            step = min(found)[0]
            where = ", ".join(f"{name} of phase '{phase}'" for s, phase, name in found if s == step)
            raise Diverged(f"no longer finite since step {step}: {where}")
        if anywhere:
            raise Diverged("no longer finite in another process, whose log says where")

    def flush(self) -> dict[str, dict[str, float]]:
        """{phase: {name: mean over the samples since the last flush}}; starts anew. Reads from the device once."""
        phases = [phase for phase in self.sums if self.samples[phase]]
        sums = [self.sums[phase].clone() for phase in phases]
        self.parallel.sum_(sums)
        values = torch.cat(sums).tolist() if sums else []
        result: dict[str, dict[str, float]] = {}
        for phase in phases:
            count = len(self.names[phase])
            own, values = values[:count], values[count:]
            means = [value / self.samples[phase] for value in own]
            result[phase] = dict(zip(self.names[phase], means, strict=True))
        self.sums, self.bad_step, self.names, self.samples = {}, {}, {}, {}
        return result

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON for a checkpoint between two ticks: the sums of all processes, which have to ask together."""
        sums = {phase: vector.clone() for phase, vector in self.sums.items()}
        self.parallel.sum_(list(sums.values()))
        return sums, {"names": self.names, "samples": self.samples}

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """What `state` gave; the main process goes on with all of it, the others from zero."""
        self.names, self.samples = data["names"], data["samples"]
        self.sums = {phase: sums if self.parallel.main else torch.zeros_like(sums) for phase, sums in tensors.items()}
        self.bad_step = {phase: torch.full_like(sums, -1, dtype=torch.int64) for phase, sums in tensors.items()}
