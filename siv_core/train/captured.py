"""A phase as a CUDA graph: recorded in the fourth step of a stage, then replayed, so that one call launches all its kernels.

A graph works on the same memory every time. What a phase is given is copied into tensors that stay, and what it gives lies where
the next replay of the same phase writes: gradients, statistics and what is carried on are used up before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from attrs import define, frozen
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from siv_core.errors import UserError
from siv_core.train.step import Played

WARM_UP = 3  # steps as they are: libraries choose their kernels and workspaces, which recording must not
REMEDY = "leave train.graphs out"

Run = Callable[[], Played]


class Recorder(Protocol):
    """How work on a device is recorded."""

    def warm(self, run: Run) -> Played:
        """Do it, as it will be recorded."""
        ...

    def record(self, run: Run) -> tuple[Played, Callable[[], Any]]:
        """Without doing it: what it will give, in tensors that stay, and a function that does it again."""
        ...


def lacking(device: torch.device) -> list[str]:
    """Why nothing can be recorded on this device, with the remedy."""
    return [] if device.type == "cuda" else [f"train.graphs: CUDA graphs need a CUDA device, this is '{device}': {REMEDY}"]


class CUDARecorder:
    """`torch.cuda.graph`; the graphs of a stage share their memory: they are replayed in the order of recording."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, run: Run) -> Played:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            played = run()
        torch.cuda.current_stream().wait_stream(self.stream)
        return played

    def record(self, run: Run) -> tuple[Played, Callable[[], Any]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            played = run()
        return played, graph.replay


@frozen
class Kind:
    """What has to be the same in a replay: another kind is another recording."""

    phase: str
    share: float
    tree: TreeSpec
    leaves: tuple[Any, ...]  # shape, type and layout of a tensor, or the thing itself


@define
class Recording:
    calls: int = 0
    buffers: list[Tensor] | None = None  # that the graph reads
    replay: Callable[[], Any] | None = None
    played: Played | None = None  # that it writes


class CapturedPlay:
    """`step.play`, or a compiled one, recorded; one for each stage."""

    def __init__(self, inner: Callable[..., Played], recorder: Recorder) -> None:
        self.inner, self.recorder = inner, recorder
        self.known: dict[Kind, Recording] = {}

    def forget(self) -> None:
        """What was recorded is no longer what the networks do."""
        self.known.clear()

    def __call__(
        self,
        phase: Any,
        parameters: Any,
        nets: Any,
        batch: Any,
        noise: Any,
        coeffs: Any,
        carry: dict[str, Any],
        share: float,
        keep: bool = False,
    ) -> Played:
        leaves, tree = tree_flatten((batch, noise, carry))

        def run(given: list[Any]) -> Played:
            batch, noise, carry = tree_unflatten(given, tree)
            return self.inner(phase, parameters, nets, batch, noise, coeffs, carry, share, keep)  # coeffs stay where they are

        kind = Kind(phase.name, share, tree, tuple(map(_about, leaves)))
        recording = self.known.setdefault(kind, Recording())
        recording.calls += 1
        if recording.calls <= WARM_UP:
            return self.recorder.warm(lambda: run(leaves))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if recording.replay is None or recording.buffers is None:
            recording.buffers = [tensor.detach().clone() for tensor in tensors]
            stay = iter(recording.buffers)
            static = [next(stay) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                recording.played, recording.replay = self.recorder.record(lambda: run(static))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # such as a number that is read back
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"train.graphs: phase '{phase.name}' cannot be recorded ({reason}): {REMEDY}") from error
        for buffer, tensor in zip(recording.buffers, tensors, strict=True):
            buffer.copy_(tensor.detach())
        recording.replay()
        assert recording.played
        return recording.played


def _about(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.stride(), leaf.device) if isinstance(leaf, Tensor) else leaf
