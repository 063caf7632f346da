"""Statistics that stay on the device until a tick: per-sample terms, losses, gradient norms and the first bad step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from siv_core.errors import Diverged, UserError
from siv_core.train.parallel import Parallel

RECENT = 64  # steps whose values wait to be added at once: a vector a step is cheap, adding it to sums at once is not


@define
class Stats:
    """Sums over samples since the last flush, one vector a phase: its terms in order, then `loss` and `gradient_norm`."""

    parallel: Parallel
    device: torch.device = field(factory=lambda: torch.device("cpu"))  # of what is restored
    names: dict[str, list[str]] = field(factory=dict)  # phase -> names of the vector's entries
    sums: dict[str, Tensor] = field(factory=dict)  # float64 [len(names)]
    bad_step: dict[str, Tensor] = field(factory=dict)  # int64 [len(names)]: first step with a non-finite value, or -1
    bad_means: dict[str, Tensor] = field(factory=dict)  # float64 [len(names)]: what the first of these steps gave
    samples: dict[str, int] = field(factory=dict)  # how many since the last flush
    recent: dict[str, list[tuple[int, int, Tensor]]] = field(factory=dict)  # (step, samples, vector) that wait to be added

    @torch.no_grad()
    def add(self, phase: str, step: int, n: int, terms: Sequence[str], row: Tensor, gradient_norm: Tensor) -> None:
        """One phase of one step of `n` samples: this process's row [T + 1] of sums over its samples and its share of the loss."""
        if self.names.get(phase) != [*terms, "loss", "gradient_norm"]:
            self.names[phase] = [*terms, "loss", "gradient_norm"]
            self.sums[phase] = torch.zeros(len(self.names[phase]), dtype=torch.float64, device=row.device)
            self._watch(phase)
            self.samples[phase], self.recent[phase] = 0, []
        self.recent[phase].append((step, n, torch.cat([row, gradient_norm[None]])))
        self.samples[phase] += n
        if len(self.recent[phase]) == RECENT:
            self.add_recent()

    @torch.no_grad()
    def add_recent(self) -> None:
        """Add what waits, in its order: when this happens does not change a bit of the sums."""
        for phase, recent in self.recent.items():
            if not recent:
                continue
            steps, n, vectors = zip(*recent, strict=True)
            rows = torch.stack(vectors).to(torch.float64)  # [steps, len(names)]
            counts = torch.tensor(n, device=rows.device)
            rows[:, -2] *= counts  # the loss is a mean over the samples
            rows[:, -1] *= counts / self.parallel.world  # and every process has the whole norm
            for row in rows:
                self.sums[phase] += row
            last = torch.iinfo(torch.int64).max
            wrong = ~torch.isfinite(rows)
            at = torch.tensor(steps, device=rows.device)[:, None].where(wrong, last).amin(dim=0)
            bad, means = self.bad_step[phase], self.bad_means[phase]
            position = wrong.any(dim=1).to(torch.int8).argmax(dim=0, keepdim=True)  # of the first bad step among these
            there = (rows.index_select(0, position) / counts.index_select(0, position)).squeeze(0)
            means.copy_(means.where((bad >= 0).any(), there))
            bad.copy_(bad.where((bad >= 0) | (at == last), at))
            recent.clear()

    def check(self) -> None:
        """Raise `Diverged`, naming the first bad step, phase and term. Reads from the device."""
        self.add_recent()
        found = []
        for phase, bad in self.bad_step.items():
            for name, step in zip(self.names[phase], bad.tolist(), strict=True):
                if step >= 0:
                    found.append((step, phase, name))
        anywhere = self.parallel.largest(int(bool(found)))  # asked in every process, so that all of them end
        if found:
            step = min(found)[0]
            phase, name = next((phase, name) for s, phase, name in found if s == step)  # the others follow from the first
            means = zip(self.names[phase], (self.bad_means[phase] * self.parallel.world).tolist(), strict=True)
            values = ", ".join(f"{term} {value:.4g}" for term, value in means)
            raise Diverged(f"no longer finite since step {step}: {name} of phase '{phase}' (this step's means: {values})")
        if anywhere:
            raise Diverged("no longer finite in another process, whose log says where")

    def flush(self) -> dict[str, dict[str, float]]:
        """{phase: {name: mean over the samples since the last flush}}; starts anew. Reads from the device once."""
        self.add_recent()
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
        self.sums, self.bad_step, self.bad_means, self.names, self.samples, self.recent = {}, {}, {}, {}, {}, {}
        return result

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON for a checkpoint between two ticks: the sums of all processes, which have to ask together."""
        self.add_recent()
        sums = {phase: vector.clone() for phase, vector in self.sums.items()}
        self.parallel.sum_(list(sums.values()))
        return sums, {"names": self.names, "samples": self.samples}

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> None:
        """What `kept` gave; the main process goes on with all of it, the others from zero."""
        needed = {phase: (torch.float64, (len(names),)) for phase, names in data["names"].items()}
        if {phase: (sums.dtype, tuple(sums.shape)) for phase, sums in tensors.items()} != needed:
            raise UserError(f"{where}: these sums are not those that state.json names")
        self.names, self.samples = data["names"], data["samples"]
        on_device = {phase: sums.to(self.device) for phase, sums in tensors.items()}
        self.sums = {phase: sums if self.parallel.main else torch.zeros_like(sums) for phase, sums in on_device.items()}
        self.recent = {phase: [] for phase in tensors}
        for phase in tensors:
            self._watch(phase)

    def _watch(self, phase: str) -> None:
        self.bad_step[phase] = torch.full_like(self.sums[phase], -1, dtype=torch.int64)
        self.bad_means[phase] = torch.full_like(self.sums[phase], torch.nan)
