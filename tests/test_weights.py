"""Weight files of others: no code in them is ever run, whatever they are called and however they are packed."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from siv_core.errors import UserError
from siv_core.store import weights


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)  # no Exception, so that nothing that catches those hides it


def saved(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"features.0.weight": torch.zeros(2), "bomb": Bomb()}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def in_tar() -> bytes:
    """The form of torch before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(1) + pickle.dumps(Bomb())
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


FORMS = {"zip": saved(zipped=True), "legacy": saved(zipped=False), "pickle": pickle.dumps(Bomb()), "tar": in_tar()}


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "zip", "tar"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_is_refused_unread(tmp_path, form, suffix):
    path = tmp_path / f"vgg16-397923af.{suffix}"
    path.write_bytes(FORMS[form])
    sha256 = hashlib.sha256(FORMS[form]).hexdigest()
    with pytest.raises(UserError, match=f"damaged, its sha256 {sha256} does not begin with 397923af; get it there"):
        weights.read(path, "397923af", "get it there")
    data, _ = weights.read(path, sha256[:8], "get it there")  # and where the digest is the right one
    with pytest.raises(UserError, match=f"vgg16-397923af.{suffix}: cannot be read as weights"):
        weights.state_dict(data, path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_half_a_file_is_told(cut):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(500)}, buffer)
    with pytest.raises(UserError, match=r"x.pth: cannot be read as weights"):
        weights.state_dict(buffer.getvalue()[:cut], Path("x.pth"))


def test_what_is_no_state_dict_is_told():
    buffer = io.BytesIO()
    torch.save([torch.zeros(2)], buffer)
    with pytest.raises(UserError, match=r"x.pth: holds a list, it should be a state dict"):
        weights.state_dict(buffer.getvalue(), Path("x.pth"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"x.pth: cannot be read \(No such file or directory\); get it there"):
        weights.read(tmp_path / "x.pth", "", "get it there")
    with pytest.raises(UserError, match=r"is no file; get it there"):
        weights.read(tmp_path, "", "get it there")
