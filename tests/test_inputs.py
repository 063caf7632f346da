"""What people give a model from Python: one sentence for each thing that is wrong, and nothing repaired in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from siv_core.errors import UserError
from siv_core.latents import Gaussian, means
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Spec
from siv_core.testing import _ToyPrior, toy_networks

SPEC = Spec((3, 4, 6), classes=5)
NETS = toy_networks(SPEC)
PRIORS = Priors({group: _ToyPrior() for group in NETS.groups})
MODEL = Model(
    NETS.encoder,
    NETS.decoder,
    PRIORS,
    SPEC,
    NETS.groups,
    ("a", "b"),
    torch.device("cpu"),
    lambda x, y: (x - y).square().flatten(1).sum(1),
)
CONDITIONAL = evolve(MODEL, spec=evolve(SPEC, conditional=True))
X = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
CODES = means(MODEL.encode(X))

TAKES_IMAGES: dict[str, Callable[[Model, Any], Any]] = {
    "encode": lambda model, x: model.encode(x),
    "reconstruct": lambda model, x: model.reconstruct(x),
    "energy": lambda model, x: model.energy(x),
    "log_weights": lambda model, x: model.log_weights(x, 2),
    "interpolate, first": lambda model, x: model.interpolate(x, X, 3),
    "interpolate, second": lambda model, x: model.interpolate(X, x, 3),
    "blend": lambda model, x: model.blend([X, X, x, X], 2),
    "combine": lambda model, x: model.combine({"a": x, "b": X}),
}

BAD_IMAGES = {
    "numpy": (X.numpy(), r"is a numpy.ndarray, expected a torch.Tensor: give torch.from_numpy\("),
    "a list": (X.tolist(), r"is a list, expected a torch.Tensor"),
    "nothing": (None, r"is a NoneType, expected a torch.Tensor"),
    "bytes": ((X * 255).to(torch.uint8), r"is uint8, expected floats in \[0, 1\]; 0 … 255 become those by .*\.float\(\) / 255"),
    "whole numbers": (X.long(), r"is int64, expected floats in \[0, 1\]"),
    "doubles": (X.double(), r"is float64, the model's weights are float32: give .*\.to\(torch.float32\)"),
    "halves": (X.half(), r"is float16, the model's weights are float32"),
    "one alone": (X[0], r"has the shape \[3, 4, 6\], expected \[N, 3, 4, 6\]; of one alone give .*\[None\]"),
    "channels last": (X.permute(0, 2, 3, 1), r"its channels stand last: give .*\.permute\(0, 3, 1, 2\)"),
    "turned": (
        X.transpose(2, 3),
        r"has the shape \[2, 3, 6, 4\], expected \[N, 3, 4, 6\]; other sizes and channels are not fitted",
    ),
    "flat": (X.flatten(1), r"has the shape \[2, 72\], expected \[N, 3, 4, 6\]"),
    "one channel": (X[:, :1], r"has the shape \[2, 1, 4, 6\]"),
    "0 … 255": (X * 255, r"goes from .* to 25\d.*, images of this model are floats in \[0, 1\]"),
    "not a number": (torch.where(X > 0.9, torch.nan, X), r"has values that are not finite"),
    "infinite": (torch.where(X > 0.9, torch.inf, X), r"has values that are not finite"),
}


@pytest.mark.parametrize("method", TAKES_IMAGES)
@pytest.mark.parametrize("how", BAD_IMAGES)
def test_images_of_another_kind(method, how):
    given, words = BAD_IMAGES[how]
    with pytest.raises(UserError, match=words) as caught:
        TAKES_IMAGES[method](MODEL, given)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("method", TAKES_IMAGES)
def test_images_as_they_should_be(method):
    def sizes(made: Any) -> list[tuple[int, ...]]:
        parts = list(made.values()) if isinstance(made, dict) else made
        return [sizes(part) if isinstance(part, tuple) else tuple(part.shape) for part in parts]

    expected = sizes(TAKES_IMAGES[method](MODEL, X))
    assert expected
    assert sizes(TAKES_IMAGES[method](MODEL, 1.5 * X - 0.2)) == expected  # a little beyond the range, as what decoders give


def test_none_at_all_are_taken():
    assert MODEL.encode(X[:0])["a"].mu.shape == (0, NETS.groups["a"])
    assert MODEL.sample(0).shape == (0, 3, 4, 6)


def test_a_grey_image_without_its_axis():
    spec = Spec((1, 4, 6))
    nets = toy_networks(spec)
    with pytest.raises(UserError, match=r"the axis of its one channel is missing: give x\[:, None\]"):
        evolve(MODEL, encoder=nets.encoder, spec=spec).encode(torch.rand(2, 4, 6))


def test_other_value_ranges_are_told_how_to_come_to():
    signed = evolve(MODEL, spec=evolve(SPEC, value_range=(-1.0, 1.0)))
    with pytest.raises(UserError, match=r"expected floats in \[-1, 1\]; .* by x.float\(\) / 255 \* 2 \+ -1"):
        signed.encode((X * 255).to(torch.uint8))
    with pytest.raises(UserError, match=r"images of this model are floats in \[-1, 1\]"):
        signed.encode(X * 255)


def test_arrays_have_no_range():
    spec = Spec((4,), kind="array")
    nets = toy_networks(spec)
    model = evolve(MODEL, encoder=nets.encoder, decoder=nets.decoder, spec=spec)
    assert model.encode(1000 * torch.randn(3, 4))["a"].mu.shape == (3, NETS.groups["a"])
    with pytest.raises(UserError, match=r"has the shape \[3, 5\], expected \[N, 4\]"):
        model.encode(torch.zeros(3, 5))


BAD_CODES = {
    "a posterior": (MODEL.encode(X), r"codes\['a'\]: is a posterior \(mu, logvar\), expected a code: give its mu"),
    "a tensor": (CODES["a"], r"codes: is a Tensor, expected \{group: tensor \[N, d\]\} of the groups a, b"),
    "a group less": ({"a": CODES["a"]}, r"codes: lacks b"),
    "a group more": ({**CODES, "aa": CODES["a"]}, r"codes: there is no group 'aa'; did you mean 'a'"),
    "another N": (
        {"a": CODES["a"], "b": CODES["b"][:1]},
        r"codes\['a'\] has 2 rows; codes\['b'\] has 1 rows: all must have as many",
    ),
    "another d": ({"a": CODES["b"], "b": CODES["b"]}, r"codes\['a'\]: has the shape \[2, 2\], expected \[N, 3\]"),
    "one alone": (
        {group: z[0] for group, z in CODES.items()},
        r"has the shape \[3\], expected \[N, 3\]; of one alone give codes\['a'\]\[None\]",
    ),
    "numpy": ({group: z.numpy() for group, z in CODES.items()}, r"codes\['a'\]: is a numpy.ndarray"),
    "whole numbers": ({group: z.long() for group, z in CODES.items()}, r"codes\['a'\]: is int64, expected floats"),
    "doubles": ({group: z.double() for group, z in CODES.items()}, r"codes\['a'\]: is float64, the model's weights are float32"),
}


def test_decode_takes_what_means_makes_of_encode():
    assert torch.equal(MODEL.decode(means(MODEL.encode(X))), MODEL.reconstruct(X))


BAD_POSTERIORS = {
    "codes": (CODES, r"q\['a'\]: is a code, expected a posterior \(mu, logvar\), as encode gives it"),
    "a group less": ({"b": MODEL.encode(X)["b"]}, r"q: lacks a"),
    "three parts": ({group: (*pair, pair[0]) for group, pair in MODEL.encode(X).items()}, r"q\['a'\]: is a tuple"),
    "another N": (
        {group: Gaussian(mu, logvar[:1]) for group, (mu, logvar) in MODEL.encode(X).items()},
        r"q\['a'\].mu has 2 rows; q\['a'\].logvar has 1 rows",
    ),
}


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        *(pytest.param("decode", *bad, id=f"codes, {how}") for how, bad in BAD_CODES.items()),
        *(pytest.param("kl", *bad, id=f"posteriors, {how}") for how, bad in BAD_POSTERIORS.items()),
    ],
)
def test_codes_and_posteriors_of_another_kind(method, given, words):
    with pytest.raises(UserError, match=words):
        getattr(MODEL, method)(given)


def test_what_does_not_fit_together():
    with pytest.raises(UserError, match=r"x has 2 rows; y has 1 rows: all must have as many"):
        MODEL.interpolate(X, X[:1], 3)
    with pytest.raises(UserError, match=r"images\['a'\] has 1 rows; images\['b'\] has 2 rows"):
        MODEL.combine({"a": X[:1], "b": X})
    with pytest.raises(UserError, match=r"images: lacks b"):
        MODEL.combine({"a": X})
    with pytest.raises(UserError, match=r"images: there is no group 'c'"):
        MODEL.combine({"a": X, "b": X, "c": X})
    with pytest.raises(UserError, match=r"labels: there is no group 'c'"):
        CONDITIONAL.combine(
            {"a": X, "b": X}, {"a": torch.zeros(2).long(), "b": torch.zeros(2).long(), "c": torch.zeros(2).long()}
        )


LABELS: dict[str, Callable[[Model, Any], Any]] = {
    "encode": lambda model, labels: model.encode(X, labels),
    "decode": lambda model, labels: model.decode(CODES, labels),
    "sample": lambda model, labels: model.sample(2, labels=labels),
    "samples": lambda model, labels: list(model.samples(2, labels=labels)),
    "reconstruct": lambda model, labels: model.reconstruct(X, labels),
    "energy": lambda model, labels: model.energy(X, labels),
    "log_weights": lambda model, labels: model.log_weights(X, 2, labels=labels),
    "interpolate": lambda model, labels: model.interpolate(X, X, 2, labels),
    "blend": lambda model, labels: model.blend([X] * 4, 2, None if labels is None else [labels] * 4),
}
BAD_LABELS = {
    "a list": ([0, 1], r"labels: is a list, expected a torch.Tensor"),
    "numpy": (np.array([0, 1]), r"labels: is a numpy.ndarray, expected a torch.Tensor: give torch.from_numpy\(labels\)"),
    "floats": (torch.zeros(2), r"labels: is float32, expected int64: class numbers"),
    "one-hot": (torch.eye(5)[:2].long(), r"labels: has the shape \[2, 5\], expected \[2\]"),
    "too few": (torch.zeros(1).long(), r"labels: has the shape \[1\], expected \[2\]"),
    "no class": (torch.tensor([0, 5]), r"labels: goes from 0 to 5, the classes are 0 … 4"),
    "negative": (torch.tensor([-1, 0]), r"labels: goes from -1 to 0, the classes are 0 … 4"),
}


@pytest.mark.parametrize("method", LABELS)
@pytest.mark.parametrize("how", BAD_LABELS)
def test_labels_of_another_kind(method, how):
    given, words = BAD_LABELS[how]
    with pytest.raises(UserError, match=words):
        LABELS[method](CONDITIONAL, given)


@pytest.mark.parametrize("method", LABELS)
def test_labels_are_for_conditional_models(method):
    with pytest.raises(UserError, match=r"labels: this model takes none"):
        LABELS[method](MODEL, torch.tensor([0, 1]))
    if not method.startswith("sample"):  # which show the classes in turn
        with pytest.raises(UserError, match=r"takes a label for each image, and was given none"):
            LABELS[method](CONDITIONAL, None)


COUNTS: dict[str, Callable[[Any], Any]] = {
    "n": lambda value: MODEL.sample(value),
    "seed": lambda value: MODEL.sample(2, seed=value),
    "batch": lambda value: list(MODEL.samples(2, batch=value)),
    "draws": lambda value: MODEL.log_weights(X, value),
    "steps": lambda value: MODEL.interpolate(X, X, value),
}


@pytest.mark.parametrize("what", COUNTS)
@pytest.mark.parametrize("value", [-1, 1.5, "3", True, None])
def test_counts(what, value):
    with pytest.raises(UserError, match=rf"{what}: is .*, expected a whole number of at least [01]"):
        COUNTS[what](value)
