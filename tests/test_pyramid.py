"""Large data sets at the smaller sizes of networks that grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toys

from siv_core.data import pyramid
from siv_core.data.feed import Feed
from siv_core.errors import UserError
from siv_core.protocols import Rows, Spec


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(pyramid, "LARGE", 1000)
    monkeypatch.setattr(pyramid, "BLOCK_BYTES", 1000)  # several blocks
    return tmp_path / "data"


def rows(n=20, side=8, **more):
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Rows(x, index=torch.arange(1, n, 2), **more)


def nothing(what, done, total):
    pass


def test_each_size_is_the_means_of_the_images_as_they_are_stored():
    given = rows()
    seen = []
    made = pyramid.with_sizes(given, lambda: "digest", [2, 4, 8, 4], lambda *told: seen.append(told))
    assert made.pyramid.keys() == {2, 4}
    for side, table in made.pyramid.items():
        k = 8 // side
        means = given.x.numpy().reshape(20, 3, side, k, side, k).astype(float).mean(axis=(3, 5))
        assert table.dtype == torch.uint8
        assert np.abs(table.numpy() - means).max() <= 0.5
        assert not np.array_equal(table.numpy(), means.astype(np.uint8))  # rounded, not cut off
    assert len(made) == 10
    assert torch.equal(made.index, given.index)
    assert {what for what, _, _ in seen} >= {f"preparing {pyramid.path_of('digest', side).name}" for side in (2, 4)}


def test_a_stage_trains_on_them():
    made = pyramid.with_sizes(rows(), lambda: "digest", [4], nothing)
    feed = Feed(made, Spec((3, 8, 8)), torch.device("cpu"), "host")
    batch = feed.batch(torch.arange(3), (3, 4, 4), torch.contiguous_format)
    torch.testing.assert_close(batch.x, made.pyramid[4][[1, 3, 5]].float() / 255)


def test_they_are_made_once(monkeypatch):
    pyramid.with_sizes(rows(), lambda: "digest", [4], nothing)
    monkeypatch.setattr("siv_core.data.datafile.write", lambda *args, **more: pytest.fail("made again"))
    pyramid.with_sizes(rows(), lambda: "digest", [4], nothing)


def test_another_set_has_others():
    a = pyramid.with_sizes(rows(), lambda: "a", [4], nothing).pyramid[4]
    darker = Rows(rows().x // 2)
    b = pyramid.with_sizes(darker, lambda: "b", [4], nothing).pyramid[4]
    assert not torch.equal(a, b)


def test_interrupted_they_go_on_where_they_stopped():
    class Interrupted(Exception): ...

    def stop(what, done, total):
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        pyramid.with_sizes(rows(), lambda: "digest", [4], stop)
    assert not pyramid.path_of("digest", 4).exists()
    begun = []
    pyramid.with_sizes(rows(), lambda: "digest", [4], lambda what, done, total: begun.append(done))
    assert begun[0] >= 3


def test_a_damaged_one_is_named():
    path = pyramid.path_of("digest", 4)
    pyramid.with_sizes(rows(), lambda: "digest", [4], nothing)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"_4\.h5"):
        pyramid.with_sizes(rows(), lambda: "digest", [4], nothing)


@pytest.mark.parametrize(
    "given",
    [
        rows(n=5, side=2),  # small: means are taken when they are asked for
        Rows(torch.rand(20, 3, 8, 8)),
        Rows(torch.zeros(20, 3, 8, 16, dtype=torch.uint8)),
        rows(draw=lambda n, generator: None),
    ],
    ids=["small", "floats", "no squares", "endless"],
)
def test_what_is_left_alone(given, root):
    assert pyramid.with_sizes(given, lambda: pytest.fail("asked"), [1, 4], nothing) is given
    assert not root.exists()


def test_a_run_makes_those_of_its_stages(catalogue, tmp_path, root):
    stages = [{"length": "2 steps", "data": {"size": 4}}, {"length": "2 steps"}]
    recipe = toys.tree(network={"name": "growing"}, stages=stages, train={"batch": 8, "tick": "1 steps", "preview": "99 steps"})
    t = toys.trainer(catalogue, tmp_path / "run", recipe)
    assert t.built.dataset.rows("train").x.numel() > 1000
    assert [path.name.split("_")[1] for path in (root / "pyramids").glob("*.h5")] == ["4.h5"]
    assert t.run() == "finished"
