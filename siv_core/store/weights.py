"""Weight files of others: their digest is checked on the very bytes that are then loaded, and nothing else is unpickled."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from siv_core.errors import UserError


def read(path: Path, begins: str, remedy: str) -> tuple[bytes, str]:
    """A file's bytes and their sha256, which must begin with `begins` (publishers often give only the first digits)."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: is no file; {remedy}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if not sha256.startswith(begins):
        raise UserError(f"{path}: damaged, its sha256 {sha256} does not begin with {begins}; {remedy}")
    return data, sha256


def state_dict(data: bytes, path: Path) -> dict[str, Any]:
    """The tensors in a torch file whose bytes were checked; never runs code from it."""
    import torch

    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler lets through whatever it runs into
        raise UserError(f"{path}: cannot be read as weights ({error})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, it should be a state dict")
    return state
