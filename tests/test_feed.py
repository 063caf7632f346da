"""From stored rows to batches: scaling, sizes, fading; where the data lies changes nothing."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from attrs import evolve

from siv_core.data import feed
from siv_core.data.ahead import Ahead
from siv_core.protocols import Rows, Spec
from siv_core.seeding import DataOrder, Streams

CPU = torch.device("cpu")
SPEC = Spec(shape=(3, 8, 8), classes=5)
GENERATOR = torch.Generator().manual_seed(0)
STORED = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
ROWS = Rows(STORED, labels=torch.arange(20) % 5, index=torch.arange(19, 3, -1))
CONTIGUOUS = torch.contiguous_format


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (-4.0, 4.0)])
def test_bytes_are_scaled_onto_the_value_range(value_range):
    low, high = value_range
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = feed.to_float(levels, Spec((1, 16, 16), value_range=value_range))
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == value_range
    assert np.allclose(x.flatten().numpy(), np.arange(256) / 255 * (high - low) + low, atol=1e-6)


def test_floats_stay_as_they_are():
    x = torch.randn(4, 2)
    assert feed.to_float(x, Spec((2,), kind="array", value_range=(-4.0, 4.0))) is x


def area(x, height, width):
    """Naive area means of [N, C, H, W]; H and W are multiples."""
    n, c, h, w = x.shape
    result = np.zeros((n, c, height, width))
    for i in range(height):
        for j in range(width):
            block = x[:, :, i * h // height : (i + 1) * h // height, j * w // width : (j + 1) * w // width]
            result[:, :, i, j] = block.mean(axis=(2, 3))
    return result


@pytest.mark.parametrize("size", [(4, 4), (2, 2), (1, 1), (8, 2), (8, 8)])
def test_smaller_sizes_are_area_means(size):
    x = feed.to_float(STORED, evolve(SPEC, fit="stretch"), (3, *size))
    assert np.allclose(x.numpy(), area(STORED.numpy() / 255, *size), atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "size", "part"),  # rows and columns of the image's centre that is left
    [
        ((8, 8), (8, 2), (slice(8), slice(3, 5))),
        ((8, 8), (2, 4), (slice(2, 6), slice(8))),
        ((4, 8), (2, 2), (slice(4), slice(2, 6))),
        ((8, 4), (4, 4), (slice(2, 6), slice(4))),
        ((4, 8), (2, 4), (slice(4), slice(8))),
    ],
)
def test_other_proportions_are_cut_to_their_centre(stored, size, part):
    x = torch.rand(2, 3, *stored, generator=torch.Generator().manual_seed(2))
    made = feed.to_float(x, evolve(SPEC, shape=(3, *size)))
    assert np.allclose(made.numpy(), area(x.numpy()[:, :, *part], *size), atol=1e-6)
    told = feed.fitting(*stored, *size, "crop")
    rows, columns = (range(n)[one] for n, one in zip(stored, part, strict=True))
    cut = (len(rows), len(columns)) != stored
    assert (f"its centre of {len(columns)} × {len(rows)}" in told) == cut
    assert told.endswith(f"resized to {size[1]} × {size[0]}")
    assert "stretched" not in told


def test_what_is_done_to_images_is_said():
    assert feed.fitting(8, 8, 8, 8, "crop") == feed.fitting(8, 8, 8, 8, "stretch") == ""
    assert feed.fitting(64, 128, 32, 32, "crop") == "128 × 64, its centre of 64 × 64 resized to 32 × 32"
    assert feed.fitting(64, 128, 32, 32, "stretch") == "128 × 64 stretched to 32 × 32"


def test_a_half_size_of_a_half_size_is_a_quarter():
    x = STORED.float() / 255
    twice = feed.to_float(feed.to_float(x, SPEC, (3, 4, 4)), SPEC, (3, 2, 2))
    assert torch.allclose(twice, feed.to_float(x, SPEC, (3, 2, 2)), atol=1e-6)


@pytest.mark.parametrize("fade", [0.0, 0.25, 1.0])
def test_a_fading_stage_blends_with_half_the_resolution(fade):
    x = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    half = area(x.numpy(), 2, 3).repeat(2, axis=2).repeat(2, axis=3)
    expected = fade * x.numpy() + (1 - fade) * half
    assert np.allclose(feed.blend(x, torch.tensor(fade)).numpy(), expected, atol=1e-6)


def test_a_fade_of_one_changes_no_bit():
    x = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(feed.blend(x, torch.ones(())), x)


def test_positions_are_those_of_the_split():
    batch = feed.Feed(ROWS, SPEC, CPU, "auto", conditional=True).batch(torch.tensor([0, 15, 3, 3]), SPEC.shape, CONTIGUOUS)
    rows = [19, 4, 16, 16]
    assert torch.equal(batch.x, STORED[rows].float() * (1 / 255))
    assert batch.labels.tolist() == [row % 5 for row in rows]
    without = feed.Feed(ROWS, SPEC, CPU, "auto").batch(torch.tensor([0]), SPEC.shape, CONTIGUOUS)
    assert without.labels is None


def test_batches_go_through_a_split_once():
    parts = list(feed.batches(ROWS, SPEC, 6))
    assert [len(part) for part in parts] == [6, 6, 4]
    assert torch.equal(torch.cat(parts), STORED[ROWS.index].float() * (1 / 255))
    assert torch.equal(feed.images(evolve(ROWS, index=None), torch.arange(20), SPEC), STORED.float() * (1 / 255))


@pytest.mark.parametrize("stored", ["uint8", "float", "memory-mapped"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 4, 4)])
def test_residency_never_changes_a_bit(tmp_path, stored, shape):
    x = STORED if stored == "uint8" else STORED.float() / 255
    if stored == "memory-mapped":
        mapped = np.memmap(tmp_path / "x", np.uint8, "w+", shape=tuple(STORED.shape))
        mapped[:] = STORED.numpy()
        x = torch.from_numpy(mapped)
    rows = evolve(ROWS, x=x)
    feeds = {place: feed.Feed(rows, SPEC, CPU, place, conditional=True) for place in ("device", "host", "auto")}
    assert [feeds[place].residency for place in ("device", "host", "auto")] == ["device", "host", "device"]
    assert feeds["host"].tables[0] is x
    assert feeds["device"].tables[0].data_ptr() != x.data_ptr()
    positions = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    batches = [one.batch(positions, shape, CONTIGUOUS) for one in feeds.values()]
    for batch in batches[1:]:
        assert torch.equal(batch.x, batches[0].x)
        assert torch.equal(batch.labels, batches[0].labels)
    before = x.clone()
    batches[1].x.zero_()
    assert torch.equal(x, before), "a batch shares memory with the data"


def test_the_memory_layout_is_the_one_asked_for():
    one = feed.Feed(ROWS, SPEC, CPU, "device")
    plain, last = (one.batch(torch.arange(4), SPEC.shape, layout) for layout in (CONTIGUOUS, torch.channels_last))
    assert plain.x.is_contiguous()
    assert last.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.x, last.x)


# -- fetched ahead ---------------------------------------------------------------------------------------------------------------


def steps_of(one, sizes=((3, 8, 8),) * 4 + ((3, 4, 4),) * 4, n=6, start=0):
    order = DataOrder(len(ROWS), 3)
    shares = [slice(0, n)] * 6 + [slice(2, 5)] * 2  # 8 × 6 images of 16: across three epochs
    return [
        one.next(order, start + n * step, n, share, Streams(3, step), shape, CONTIGUOUS)
        for step, (shape, share) in enumerate(zip(sizes, shares, strict=True))
    ]


@pytest.mark.parametrize("flips", [False, True])
def test_rows_fetched_ahead_are_those_of_the_step(flips):
    device, host = (feed.Feed(ROWS, SPEC, CPU, place, conditional=True, flips=flips) for place in ("device", "host"))
    for ours, theirs in zip(steps_of(host), steps_of(device), strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.labels, theirs.labels)
    again = steps_of(host, start=30)  # a step that was not looked forward to, as after a resume
    for ours, theirs in zip(again, steps_of(device, start=30), strict=True):
        assert torch.equal(ours.x, theirs.x)
    assert host.waited > 0
    assert device.waited == 0


def test_each_step_fetches_the_next_one_meanwhile(monkeypatch):
    host = feed.Feed(ROWS, SPEC, CPU, "host")
    fetched, fetch = [], host._fetched

    def fetching(positions, shape):
        fetched.append(threading.current_thread().name)
        return fetch(positions, shape)

    monkeypatch.setattr(host, "_fetched", fetching)
    steps_of(host, sizes=((3, 8, 8),) * 6 + ((3, 4, 4),) * 2)
    host.ahead._pool.shutdown()
    assert all(name.startswith("siv-rows") for name in fetched)
    assert len(fetched) == 1 + 8 + 1  # the first, one for each next step, and one more where the share and the size changed


def test_what_goes_wrong_in_the_thread_is_told_where_the_rows_are_asked_for(monkeypatch):
    host = feed.Feed(ROWS, SPEC, CPU, "host")
    monkeypatch.setattr(host, "_fetched", lambda positions, shape: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps_of(host)


@pytest.mark.parametrize(("reading", "computing"), [(0.06, 0.02), (0.02, 0.06)])
def test_the_time_that_data_are_waited_for(reading, computing):
    """A disk that takes so long for each step, beside a step that computes so long."""
    one, begun = Ahead(), time.monotonic()
    for step in range(12):
        one.get(step, lambda: time.sleep(reading))
        one.start(step + 1, lambda: time.sleep(reading))
        time.sleep(computing)
    whole = time.monotonic() - begun
    assert one.waited / whole == pytest.approx(max(0.0, (reading - computing) / reading), abs=0.05)
