"""What an applied model writes: arrays, a picture, and what is to be said of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save
from torch import Tensor

from siv_core.model import Model
from siv_core.store import files
from siv_core.use import pictures
from siv_core.use.pictures import Picture

Draw = Callable[[], Picture | None]


def write(
    folder: Path,
    name: str,
    model: Model,
    arrays: Mapping[str, Tensor],
    draw: Draw | None,
    notes: list[str],
    about: Mapping[str, Any] = MappingProxyType({}),
    beside: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """NAME.safetensors with the arrays, which `about` is written into, NAME.json with what stands `beside` them and NAME.png with
    the picture, where there are such; a name that is taken gets a number, nothing is overwritten."""
    tensors_at, beside_at, picture_at = files.free_names(folder, name, (".safetensors", ".json", ".png"))
    written = []
    if arrays:
        written.append(tensors_at)
        own = {"model": model.name, "value_range": model.spec.value_range, "noise": model.noise}
        head = json.dumps({**own, **about, "notes": notes})
        tensors = {key: value.detach().cpu().contiguous() for key, value in arrays.items()}
        files.write_bytes(tensors_at, save(tensors, {"about": head}))  # one key: the order of several is not fixed
    if beside is not None:
        written.append(beside_at)
        files.write_json(beside_at, files.finite_or_text({**beside, "tensors": tensors_at.name}))
    picture = draw() if draw else None
    if picture is not None:
        written.append(picture_at)
        pictures.save_png(picture_at, picture)
    held = {key: {"shape": list(value.shape), "type": str(value.dtype).removeprefix("torch.")} for key, value in arrays.items()}
    return {"files": [str(path) for path in written], "arrays": held, "notes": notes, "model": model.name}
