"""Randomness: the mix against another implementation, streams, and one endless order of the data."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siv_core.latents import Gaussian
from siv_core.nets import rows_of, slices, tree_map
from siv_core.seeding import DataOrder, Streams, mix32, normal, stream_seed
from siv_core.testing import leaves


def murmur3_32(data: bytes, seed: int) -> int:
    """MurmurHash3_x86_32 after Appleby's description, for whole blocks of four bytes."""

    def rotate(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) % 2**32

    h = seed
    for (block,) in struct.iter_unpack("<I", data):
        h ^= rotate(block * 0xCC9E2D51 % 2**32, 15) * 0x1B873593 % 2**32
        h = (rotate(h, 13) * 5 + 0xE6546B64) % 2**32
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ (h >> shift)) * factor % 2**32
    return h


@pytest.mark.parametrize(
    ("data", "seed", "published"),
    [
        (b"", 0, 0x00000000),
        (b"", 1, 0x514E28B7),
        (b"", 0xFFFFFFFF, 0x81F16F39),
        (b"\xff\xff\xff\xff", 0, 0x76293B50),
        (b"\x21\x43\x65\x87", 0, 0xF55B516B),
        (b"\x21\x43\x65\x87", 0x5082EDEE, 0x2362F9DE),
        (b"\0\0\0\0", 0, 0x2362F9DE),
        (b"aaaa", 0x9747B28C, 0x5A97808A),
    ],
)
def test_our_other_implementation_gives_the_published_values(data, seed, published):
    assert murmur3_32(data, seed) == published


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_the_mix_is_murmur3_of_64_bit_words(words):
    assert mix32(*words) == murmur3_32(b"".join(word.to_bytes(8, "little") for word in words), 0x9747B28C)


def test_the_mix_never_changes():
    """Runs of long ago are repeated by these."""
    known = [0xEBB6C228, 0x2E1D9BD8, 0x24E81313, 0x5373BF12, 0xC73C6D73, 0x59ACD8A0]
    assert [mix32(), mix32(0), mix32(1), mix32(0, 1), mix32(2**32), mix32(1, 2, 3)] == known


def test_seeds_differ_by_every_part():
    seeds = {
        stream_seed(seed, stream, step)
        for seed in (0, 1, 2**32, 2**62) for stream in ("prior", "posterior", "kl") for step in (0, 1, 2**32)
    }  # fmt: skip
    assert len(seeds) == 4 * 3 * 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_streams_start_afresh_and_differ():
    streams = Streams(seed=3, step=5)
    assert torch.equal(normal(4, 2, streams("prior")), normal(4, 2, streams("prior")))
    assert torch.equal(normal(4, 2, streams("prior")), normal(4, 2, Streams(3, 5)("prior")))
    drawn = [normal(1000, 1, s("x")) for s in (Streams(3, 5), Streams(3, 6), Streams(4, 5))] + [normal(1000, 1, streams("y"))]
    for i, a in enumerate(drawn):
        assert abs(a.mean()) < 0.15
        assert abs(a.std() - 1) < 0.1
        for b in drawn[:i]:
            assert abs((a * b).mean()) < 0.15


def test_drawing_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    normal(4, 2, Streams(0, 0)("x"))
    DataOrder(10, 0).take(0, 25)
    assert torch.equal(before, torch.random.get_rng_state())


@given(st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    taken = DataOrder(size, seed).take(epoch * size, size)
    assert sorted(taken.tolist()) == list(range(size))


@given(st.integers(1, 30), st.integers(0, 100), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_taking_does_not_depend_on_the_cuts(size, start, counts):
    order, at, parts = DataOrder(size, 1), start, []
    for count in counts:
        part = order.take(at, count)
        assert len(part) == count  # no short batch
        parts.append(part)
        at += count
    assert torch.equal(torch.cat(parts), DataOrder(size, 1).take(start, sum(counts)))
    # a run that begins in the middle sees the same
    assert torch.equal(parts[-1], DataOrder(size, 1).take(at - counts[-1], counts[-1]))


def test_epochs_and_seeds_differ():
    order = DataOrder(1000, 0)
    first, second, other = order.take(0, 1000), order.take(1000, 1000), DataOrder(1000, 1).take(0, 1000)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert (first - torch.arange(1000)).abs().float().mean() > 200  # about a third of the size when it is well mixed


@given(st.integers(1, 100), st.integers(0, 40))
def test_slices_cover_a_batch_once(n, micro):
    pieces = list(slices(slice(3, 3 + n), micro))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(3, 3 + n))
    assert all(piece.stop - piece.start <= (micro or n) for piece in pieces)


def test_rows_of_a_tree():
    x = torch.arange(6)
    tree = {"a": x, "b": ({"c": 10 * x}, None), "d": 3}
    cut = rows_of(tree, slice(2, 4))
    assert cut["a"].tolist() == [2, 3]
    assert cut["b"][0]["c"].tolist() == [20, 30]
    assert (cut["b"][1], cut["d"]) == (None, 3)


def test_a_tree_keeps_its_tuples_and_their_names():
    x = torch.zeros(2, 3)
    tree = {"a": (Gaussian(x, x), [x], None), "b": Gaussian(x, (x, x))}
    there = tree_map(tree, lambda tensor: tensor.to("meta"))
    assert type(there["a"][0]) is Gaussian
    assert there["b"].logvar[1].device.type == "meta"
    assert there["a"][1] is tree["a"][1]
    assert [leaf.device.type for leaf in leaves(there)] == ["meta"] * 5
