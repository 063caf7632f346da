"""What the children of the tests' fork server find done: everything imported, and one picture drawn for matplotlib's caches."""

from __future__ import annotations

import gc
import os
import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import siv_plugins
import torch

import siv_core
from siv_core.use import pictures

_ours = [one.name for package in (siv_core, siv_plugins) for one in walk_packages(package.__path__, f"{package.__name__}.")]
for _name in (*_ours, "torch._dynamo", "sklearn.datasets", "h5py", "PIL.PngImagePlugin", "matplotlib.backends.backend_agg"):
    import_module(_name)

_folder_of_tests, _, _rest = os.environ.pop("PYTHONPATH").partition(os.pathsep)  # needed to find this file, and by nobody else
if _rest:
    os.environ["PYTHONPATH"] = _rest
torch.set_num_threads(1)
_terms = {"rec_real": 1.0, "kl_real": 1.0, "loss": 1.0, "gradient_norm": 1.0}
with tempfile.TemporaryDirectory() as _folder:
    _lines = [{"images_seen": seen, "phases": {"x": dict.fromkeys(_terms, 20.0 / seen)}} for seen in (100, 400)]
    pictures.curves(Path(_folder) / "curves.png", _lines)
gc.collect()
gc.freeze()  # children need not look through all this again
