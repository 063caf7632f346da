"""siv: train, measure and use introspective variational autoencoders.

The names here are what plugin authors and users of the Python interface need; each is imported when it is first asked for, so
that `siv --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers, which cannot follow the table below
    from siv_core.component import Component as Component
    from siv_core.component import PerGroup as PerGroup
    from siv_core.component import option as option
    from siv_core.component import per_group as per_group
    from siv_core.errors import UserError as UserError
    from siv_core.hookspecs import hookimpl as hookimpl
    from siv_core.latents import Codes as Codes
    from siv_core.latents import Gaussian as Gaussian
    from siv_core.latents import Posterior as Posterior
    from siv_core.latents import kl_standard as kl_standard
    from siv_core.losses import sampled_kl as sampled_kl
    from siv_core.model import Model as Model
    from siv_core.nets import full_precision as full_precision
    from siv_core.nets import with_labels as with_labels
    from siv_core.protocols import Batch as Batch
    from siv_core.protocols import Converted as Converted
    from siv_core.protocols import Dataset as Dataset
    from siv_core.protocols import Distribution as Distribution
    from siv_core.protocols import Measurement as Measurement
    from siv_core.protocols import Metric as Metric
    from siv_core.protocols import Networks as Networks
    from siv_core.protocols import Objective as Objective
    from siv_core.protocols import Phase as Phase
    from siv_core.protocols import Progress as Progress
    from siv_core.protocols import Rows as Rows
    from siv_core.protocols import Shadow as Shadow
    from siv_core.protocols import Spec as Spec
    from siv_core.protocols import Stage as Stage
    from siv_core.runs.opened import load as load
    from siv_core.runs.session import Run as Run
    from siv_core.runs.session import resume as resume
    from siv_core.runs.session import run as run
    from siv_core.runs.watchers import Silent as Silent

_HOME = {
    "siv_core.component": ("Component", "PerGroup", "option", "per_group"),
    "siv_core.errors": ("UserError",),
    "siv_core.hookspecs": ("hookimpl",),
    "siv_core.latents": ("Codes", "Gaussian", "Posterior", "kl_standard"),
    "siv_core.losses": ("sampled_kl",),
    "siv_core.model": ("Model",),
    "siv_core.nets": ("full_precision", "with_labels"),
    "siv_core.protocols": (
        "Batch",
        "Converted",
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
    "siv_core.runs.opened": ("load",),
    "siv_core.runs.session": ("Run", "resume", "run"),
    "siv_core.runs.watchers": ("Silent",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)  # noqa: PLE0605  (the list is made from the table above)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'siv_core' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
