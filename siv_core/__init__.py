"""siv: train, measure and use introspective variational autoencoders.

The names here are what plugin authors and users of the Python interface need; each is imported when it is first asked for, so
that `siv --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siv_core.component import Component, PerGroup, option, per_group
    from siv_core.errors import UserError
    from siv_core.hookspecs import hookimpl
    from siv_core.latents import Codes, Gaussian, Posterior, kl_standard
    from siv_core.losses import sampled_kl
    from siv_core.model import Model
    from siv_core.protocols import (
        Batch,
        Dataset,
        Distribution,
        Measurement,
        Metric,
        Networks,
        Objective,
        Phase,
        Progress,
        Rows,
        Shadow,
        Spec,
        Stage,
    )
    from siv_core.session import Run, load, run

_HOME = {
    "siv_core.component": ("Component", "PerGroup", "option", "per_group"),
    "siv_core.errors": ("UserError",),
    "siv_core.hookspecs": ("hookimpl",),
    "siv_core.latents": ("Codes", "Gaussian", "Posterior", "kl_standard"),
    "siv_core.losses": ("sampled_kl",),
    "siv_core.model": ("Model",),
    "siv_core.protocols": (
        "Batch",
        "Dataset",
        "Distribution",
        "Measurement",
        "Metric",
        "Networks",
        "Objective",
        "Phase",
        "Progress",
        "Rows",
        "Shadow",
        "Spec",
        "Stage",
    ),
    "siv_core.session": ("Run", "load", "run"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)  # noqa: PLE0605  (the list is made from the table above)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'siv_core' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
