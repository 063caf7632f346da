"""A phase through torch.compile: what `step.play` does with its networks as one program, forward and backward.

Equal to the phase as it is up to rounding. The first step of a stage waits for the compiler, a minute or so a phase.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch

from siv_core.errors import UserError
from siv_core.train.step import Played, play

REMEDY = "leave train.compile out"
SHAPES = 32  # programs of one phase at most: pieces of other sizes, a stage that has faded in


def lacking(device: torch.device) -> list[str]:
    """Why nothing can be compiled for this device, with the remedy."""
    from torch._inductor import cpp_builder, exc

    try:
        if device.type == "cpu":  # for CUDA torch brings its own
            cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return [f"train.compile: takes a C++ compiler on a CPU and finds none: install g++ (or set CXX), or {REMEDY}"]
    return []


class CompiledPlay:
    """`step.play`, compiled anew for each stage: what was made for an earlier one goes with it."""

    def __init__(self) -> None:
        import torch._dynamo  # takes seconds to import, so only where it is asked for

        own = FunctionType(play.__code__.replace(), play.__globals__)  # programs are kept by code object
        own.__defaults__ = play.__defaults__
        self._play = torch.compile(own, fullgraph=True, dynamic=False)

    def __call__(self, phase: Any, *arguments: Any) -> Played:
        with _told(phase.name), torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=SHAPES):
            return self._play(phase, *arguments)


@contextlib.contextmanager
def _told(phase: str) -> Iterator[None]:
    """What the compiler says in its own words, as a problem of the recipe's with its remedy."""
    import torch._dynamo.exc

    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"train.compile: phase '{phase}' cannot be compiled ({reason.strip()}): {REMEDY}") from error
