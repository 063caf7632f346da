"""The conformance kit over everything there is, and the kit itself: each check fails on a component that is wrong."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import attrs
import h5py
import numpy as np
import pytest
import torch
import toys
from attrs import evolve, frozen
from torch import Tensor, nn

from siv_core import Gaussian, UserError, kl_standard, testing
from siv_core.component import Component, option
from siv_core.losses import sampled_kl
from siv_core.objectives import vae
from siv_core.protocols import Batch, Networks, Objective, Phase, Rows, Shadow, Spec
from siv_core.recipe import catalogue as catalogues
from siv_core.seeding import normal
from siv_core.testing import IMAGES, check_component, check_dataset, check_network, check_objective, check_prior

DIGITS = Spec(shape=(1, 8, 8), classes=10, factors={"digit": 10})
ARRAYS = Spec(shape=(2,), kind="array", value_range=(-4.0, 4.0))
SMALL_ADAIN = {
    "dims": {"class": 5, "content": 3},
    "encoder_channels": (4, 6, 8),
    "encoder_hidden": (12,),
    "decoder_channels": (8, 6),
    "output_channels": 5,
}
CONFIGS: dict[tuple[str, str], dict[str, Any]] = {("reconstruction", "vgg_perceptual"): {"weights": "random", "factor": 1.0}}
CHECKED = ("network", "reconstruction", "prior", "objective")
BUILT_IN = [key for key, (_, owner) in sorted(catalogues.load().components.items()) if owner.distribution == "siv"]


@pytest.mark.parametrize(("kind", "name"), [key for key in BUILT_IN if key[0] in CHECKED])
def test_every_component_with_its_defaults(catalogue, kind, name):
    component = catalogue.get(kind, name)
    check_component(component, component.config(**CONFIGS.get((kind, name), {})))


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_every_component_describes_itself(catalogue, kind, name):
    component = catalogue.get(kind, name)
    assert component.summary
    assert attrs.has(component.config)
    assert component.config.__setattr__ is not object.__setattr__, "config classes are frozen"
    for attribute in attrs.fields(component.config):
        assert attribute.metadata.get("doc"), f"option {attribute.name} has no sentence"


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (DIGITS, {}),
        (evolve(DIGITS, conditional=True), {"output": "sigmoid", "slope": 0.2}),
        (evolve(IMAGES, conditional=True, value_range=(-1.0, 1.0)), {"hidden": (7,), "output": "sigmoid"}),
        (ARRAYS, {"hidden": ()}),
    ],
)
def test_mlp(catalogue, spec, options):
    component = catalogue.get("network", "mlp")
    check_component(component, component.config(**options), spec)


def test_mlp_gives_its_labels_to_both_halves(catalogue):
    component = catalogue.get("network", "mlp")
    spec = evolve(DIGITS, conditional=True)
    encoder, decoder, *_ = testing.build_seeded(component, component.config(), spec)
    x, zero, one = testing.example(spec), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    assert not torch.equal(encoder(x, zero)["z"].mu, encoder(x, one)["z"].mu)
    assert not torch.equal(decoder({"z": torch.zeros(4, 2)}, zero), decoder({"z": torch.zeros(4, 2)}, one))
    with pytest.raises(ValueError, match="called without"):
        encoder(x)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (-4.0, 4.0)])
def test_a_sigmoid_maps_onto_the_value_range(catalogue, value_range):
    component = catalogue.get("network", "mlp")
    spec = evolve(DIGITS, value_range=value_range)
    decoder = testing.build_seeded(component, component.config(output="sigmoid"), spec).decoder
    x = decoder({"z": 1e6 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))})
    assert (x.min(), x.max()) == value_range


@pytest.mark.parametrize(
    ("spec", "options"),
    [(DIGITS, {}), (Spec(shape=(3, 64, 64)), {}), (Spec(shape=(3, 64, 32)), {"scale": "one_plus", "output": "linear"})],
)
def test_adain(catalogue, spec, options):
    component = catalogue.get("network", "adain")
    check_component(component, component.config(**SMALL_ADAIN, **options), spec)


@pytest.mark.parametrize("spec", [ARRAYS, evolve(DIGITS, conditional=True), Spec(shape=(3, 30, 30))])
def test_adain_says_what_does_not_fit(catalogue, spec):
    component = catalogue.get("network", "adain")
    with pytest.raises(UserError, match=r"adain|halved"):
        component.build(component.config(**SMALL_ADAIN), spec)


def test_the_package_that_others_are_to_copy(monkeypatch):
    folder = Path(__file__).parent / "third_party" / "siv_blobs"
    monkeypatch.syspath_prepend(str(folder))
    [component] = importlib.import_module("siv_blobs").siv_components()
    for spec in (IMAGES, DIGITS, Spec((2, 7, 5), value_range=(-1.0, 1.0))):
        check_component(component, spec=spec)
    with pytest.raises(UserError, match="network 'blobs' is for images"):
        component.build(component.config(), ARRAYS)
    assert len((folder / "siv_blobs.py").read_text().splitlines()) <= 60  # the guide shows all of it


@pytest.mark.parametrize("options", [{"preset": preset} for preset in ("lord", "normalised", "glann")])
@pytest.mark.parametrize("channels", [1, 3])
def test_vgg_perceptual(catalogue, options, channels):
    component = catalogue.get("reconstruction", "vgg_perceptual")
    spec = Spec(shape=(channels, 32, 32), value_range=(-1.0, 1.0))
    check_component(component, component.config(weights="random", factor=2.0, **options), spec)


@pytest.mark.parametrize(
    ("name", "naive"),
    [
        ("mse", lambda x, y: sum((a - b) ** 2 for a, b in zip(x, y, strict=True))),
        ("l1", lambda x, y: sum(abs(a - b) for a, b in zip(x, y, strict=True))),
        ("bce", lambda x, y: sum(-a * np.log(b) - (1 - a) * np.log(1 - b) for a, b in zip(x, y, strict=True))),
    ],
)
def test_pixel_losses_sum_over_pixels(catalogue, name, naive):
    component = catalogue.get("reconstruction", name)
    loss = component.build(component.config(), DIGITS)
    x, y = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [naive(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(x, y, strict=True)]
    assert loss(x, y).tolist() == pytest.approx(expected, rel=1e-12)


def test_bce_refuses_other_ranges(catalogue):
    component = catalogue.get("reconstruction", "bce")
    with pytest.raises(UserError, match=r"data in \[0, 1\], this data is in \[-1, 1\]"):
        component.build(component.config(), evolve(DIGITS, value_range=(-1.0, 1.0)))


# -- data sets -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"held_out": 1}, {"held_out": 1796}])
def test_digits(catalogue, options):
    component = catalogue.get("dataset", "digits")
    check_dataset(component.build(component.config(**options)))


def test_digits_are_those_of_scikit_learn(catalogue):
    from sklearn.datasets import load_digits

    component = catalogue.get("dataset", "digits")
    data, bunch = component.build(component.config()), load_digits()
    rows = [data.rows("train"), data.rows("held_out")]
    assert [len(r) for r in rows] == [1400, 397]
    assert sorted(torch.cat([r.index for r in rows]).tolist()) == list(range(1797))
    for r in rows:
        assert torch.equal(r.x[:, 0], torch.tensor(np.rint(bunch.images * 255 / 16), dtype=torch.uint8))
        assert r.labels.tolist() == r.factors[:, 0].tolist() == bunch.target.tolist()
    other = component.build(component.config(split_seed=1))
    assert not torch.equal(other.rows("held_out").index, rows[1].index)


def test_rendered_cars(catalogue):
    """Drawn once into the tests' data folder, which takes some seconds."""
    component = catalogue.get("dataset", "rendered_cars")
    data = component.build(component.config(size=32, held_out_models=5))
    check_dataset(data)
    rows = data.rows("held_out")
    assert len(rows) == 5 * 96
    assert len(rows.factors[rows.index, 0].unique()) == 5
    assert set(rows.factors[rows.index, 0].tolist()).isdisjoint(set(rows.factors[data.rows("train").index, 0].tolist()))


@pytest.mark.parametrize("kind", ["uint8 chunked and compressed", "float channels last", "grey"])
def test_hdf5(catalogue, tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 6, 5), dtype=np.uint8)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        layout = {"uint8 chunked and compressed": "NCHW", "float channels last": "NHWC", "grey": "NHW"}[kind]
        if layout == "NCHW":
            file.create_dataset("images", data=images, chunks=(3, 3, 6, 5), compression="gzip")
        elif layout == "NHWC":
            file["images"] = images.transpose(0, 2, 3, 1) / np.float32(255)
        else:
            file["images"] = images[:, 0]
        file["labels"] = np.arange(20) % 4
    component = catalogue.get("dataset", "hdf5")
    data = component.build(component.config(path=str(tmp_path / "own.h5"), layout=layout, held_out=0.25))
    check_dataset(data)
    assert data.spec.shape == ((1, 6, 5) if kind == "grey" else (3, 6, 5))
    assert data.spec.classes == 4
    assert len(data.rows("held_out")) == 5


# -- the kit fails on what is wrong: networks ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A sound encoder; each wrong one differs in one thing."""

    def __init__(self, spec: Spec = IMAGES, z_dim: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.dims, 2 * z_dim)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        return {"z": Gaussian(*self.linear(x.flatten(1)).chunk(2, dim=1))}


class Decoder(nn.Module):
    def __init__(self, spec: Spec = IMAGES, z_dim: int = 4) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(z_dim, spec.dims), spec.shape

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: Any = None) -> Tensor:
        return self.linear(codes["z"]).unflatten(1, self.shape)


class RandomEncoder(Encoder):
    def forward(self, x, labels=None):
        q = super().forward(x)["z"]
        return {"z": Gaussian(q.mu + torch.randn_like(q.mu), q.logvar)}


class IdlyRandomEncoder(Encoder):
    def forward(self, x, labels=None):
        torch.rand(1)
        return super().forward(x)


class OtherGroup(Encoder):
    def forward(self, x, labels=None):
        return {"y": super().forward(x)["z"]}


class ShortVariance(Encoder):
    def forward(self, x, labels=None):
        q = super().forward(x)["z"]
        return {"z": Gaussian(q.mu, q.logvar[:, :1])}


class Unused(Decoder):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)


class Flat(Decoder):
    def forward(self, codes, labels=None, noise=None):
        return self.linear(codes["z"])


class Infinite(Decoder):
    def forward(self, codes, labels=None, noise=None):
        return super().forward(codes) / (codes["z"] - codes["z"]).sum().abs()


def test_the_kit_takes_a_sound_network():
    check_network(Networks(Encoder(), Decoder(), {"z": 4}), IMAGES)


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        (lambda: Networks(RandomEncoder(), Decoder(), {"z": 4}), "the same input gave another output"),
        (lambda: Networks(IdlyRandomEncoder(), Decoder(), {"z": 4}), "a global random function was called"),
        (lambda: Networks(OtherGroup(), Decoder(), {"z": 4}), r"groups \['z'\] are declared, the encoder gives \['y'\]"),
        (lambda: Networks(ShortVariance(), Decoder(), {"z": 4}), r"mu and logvar must be \[N, 4\]"),
        (lambda: Networks(Encoder(), Decoder(), {"z": 5}), r"mu and logvar must be \[N, 5\]"),
        (lambda: Networks(Encoder(), Unused(), {"z": 4}), "decoder.idle.weight: no gradient reaches it"),
        (lambda: Networks(Encoder(), Flat(), {"z": 4}), "the decoder gives"),
        (lambda: Networks(Encoder(), Infinite(), {"z": 4}), "not finite|the same input gave another output"),
        (lambda: Networks(Encoder(), Decoder(), {"z": 4}, ("z", "content")), "expected two of its groups z"),
    ],
)
def test_the_kit_fails_on_a_wrong_network(networks, words):
    with pytest.raises(AssertionError, match=words):
        check_network(networks(), IMAGES)


# -- losses ----------------------------------------------------------------------------------------------------------------------


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).sum(dim=1)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x, y: squared(x, y).mean(), r"gives \[N\], not \[\]"),
        (lambda x, y: (x - y).square(), r"gives \[N\], not \[4, 3"),
        (lambda x, y: -squared(x, y), "must cost more"),
        (lambda x, y: squared(x, y) / 0, "not finite"),
        (lambda x, y: squared(x, y) + (y - y).sqrt().flatten(1).sum(dim=1), "the gradient of y is not finite"),
    ],
)
def test_the_kit_fails_on_a_wrong_loss(loss, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_reconstruction(loss, IMAGES)


# -- priors ----------------------------------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """N(b, I) with a learned b: sound."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((6,), 0.5))

    def realise(self, encode: Any) -> Shifted:
        return Shifted(self.b)


class Shifted:
    def __init__(self, b: Tensor) -> None:
        self.b = b

    def sample(self, noise, labels=None):
        return noise + self.b

    def log_prob(self, z, labels=None):
        return torch.distributions.Normal(self.b, 1.0).log_prob(z).sum(dim=1)

    def kl(self, q, noise):
        return kl_standard(Gaussian(q.mu - self.b, q.logvar))

    def detach(self):
        return type(self)(self.b.detach())


class WrongKL(Shifted):
    def kl(self, q, noise):
        return kl_standard(q)


class MeanKL(Shifted):
    def kl(self, q, noise):
        return super().kl(q, noise).mean()


class MeanLogProb(Shifted):
    def log_prob(self, z, labels=None):
        return super().log_prob(z).mean()


class WrongSample(Shifted):
    def sample(self, noise, labels=None):
        return super().sample(noise)[:, :3]


class NotDetached(Shifted):
    def detach(self):
        return self


class Sampled(Shifted):
    def kl(self, q, noise):
        return sampled_kl(self.log_prob, q, noise)


def prior_of(distribution: type[Shifted]) -> nn.Module:
    class Own(Prior):
        def realise(self, encode):
            return distribution(self.b)

    prior = Own()
    if distribution is Sampled:
        prior.draw_kl = lambda n, generator: normal(n * 8, 6, generator).view(n, 8, 6)
    return prior


@pytest.mark.parametrize("distribution", [Shifted, Sampled])
def test_the_kit_takes_a_sound_prior(distribution):
    check_prior(prior_of(distribution), 6, IMAGES)


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        (WrongKL, "kl is off by"),
        (MeanKL, r"kl gives \[N\]"),
        (MeanLogProb, r"log_prob gives \[N\]"),
        (WrongSample, r"sample gives \[512, 3\], not \[N, 6\]"),
        (NotDetached, "after detach no gradient"),
    ],
)
def test_the_kit_fails_on_a_wrong_prior(distribution, words):
    with pytest.raises(AssertionError, match=words):
        check_prior(prior_of(distribution), 6, IMAGES)


# -- objectives ------------------------------------------------------------------------------------------------------------------

VAE = vae.build_vae(vae.VAEConfig(), IMAGES, {"a": 3, "b": 2})


def changed(change: Any, updates: tuple[str, ...] = ("encoder", "decoder", "prior")) -> Objective:
    """The VAE with something else in place of (loss, terms, carry)."""

    def loss(nets, batch, noise, coeffs, carry):
        value, terms, carry = vae.vae_loss(nets, batch, noise, coeffs, carry)
        return change(value, terms, carry)

    return evolve(VAE, phases=(Phase("vae", updates, loss),))


def encoder_only(nets, batch, noise, coeffs, carry):
    q = nets.encoder(batch.x)
    kl = torch.stack([kl_standard(g) for g in q.values()]).sum(dim=0)
    return kl.mean(), {"kl": kl}, carry


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (
            lambda: changed(lambda loss, terms, carry: (loss, {k: v.mean() for k, v in terms.items()}, carry)),
            r"is \[\], not \[N\]",
        ),
        (lambda: changed(lambda loss, terms, carry: (terms["rec_real"], terms, carry)), "its loss is a 0-dim mean"),
        (lambda: changed(lambda loss, terms, carry: (loss / 0, terms, carry)), "its loss is not finite"),
        (lambda: changed(lambda loss, terms, carry: (loss, {}, carry)), "gives no terms"),
        (lambda: changed(lambda loss, terms, carry: (loss, terms, {"z": terms["kl_real"]})), "what it carries is not detached"),
        (
            lambda: evolve(VAE, phases=(Phase("p", ("encoder", "decoder"), encoder_only),)),
            "updates decoder, which gets no gradient",
        ),
        (lambda: evolve(VAE, draw=lambda n, streams, sources: {"x": torch.zeros(n + 1)}), "does not have 4 rows"),
    ],
)
def test_the_kit_fails_on_a_wrong_objective(objective, words):
    with pytest.raises(AssertionError, match=words):
        check_objective(objective(), IMAGES)


def test_the_kit_gives_an_objective_its_shadows():
    def loss(nets, batch, noise, coeffs, carry):
        nets.shadows["decoder@target"]({"a": torch.zeros(4, 3), "b": torch.zeros(4, 2)})
        return vae.vae_loss(nets, batch, noise, coeffs, carry)

    sound = evolve(VAE, phases=(Phase("p", ("encoder",), loss),))
    check_objective(evolve(sound, shadows=(Shadow("target", "decoder", copy_every_images=8),)), IMAGES)
    with pytest.raises(KeyError, match="decoder@target"):
        check_objective(sound, IMAGES)


# -- data sets -------------------------------------------------------------------------------------------------------------------


class Data:
    """Ten grey images, two of them held out: sound."""

    spec = Spec(shape=(1, 4, 4), classes=3, factors={"one": 3})
    splits: ClassVar = {"train": list(range(8)), "held_out": [8, 9]}
    dtype: Any = torch.uint8
    lacking: str | None = None
    calls = 0

    def missing(self):
        return self.lacking

    def prepare(self, progress):
        pass

    def rows(self, split):
        labels = torch.arange(10) % 3
        x = torch.zeros(10, 1, 4, 4, dtype=self.dtype)
        return Rows(x, labels=labels, factors=labels[:, None], index=torch.tensor(self.splits[split], dtype=torch.int64))

    def fingerprint(self):
        return "always the same"


class Restless(Data):
    def fingerprint(self):
        self.calls += 1
        return f"digest {self.calls}"


def data(**attributes: Any) -> Data:
    return type("Changed", (Data,), attributes)()


def test_the_kit_takes_a_sound_data_set():
    check_dataset(Data())


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (data(splits={"train": [0, 1, 2], "held_out": [2, 3]}), "an image is in both splits"),
        (data(splits={"train": [0, 1, 2], "held_out": []}), "split held_out is empty"),
        (data(lacking="fetch it"), "not at hand: fetch it"),
        (data(dtype=torch.int64), "uint8 or float32, not torch.int64"),
        (data(spec=evolve(Data.spec, shape=(3, 4, 4))), "rows have 1 channels, the spec says 3"),
        (data(spec=evolve(Data.spec, factors={"one": 2})), "factor one goes beyond its 2 values"),
        (data(spec=evolve(Data.spec, factors={"one": 3, "two": 3})), "a column for each"),
        (data(spec=evolve(Data.spec, classes=2)), "labels go beyond the 2 classes"),
        (data(fingerprint=lambda self: ""), "the fingerprint changes"),
        (Restless(), "the fingerprint changes"),
    ],
)
def test_the_kit_fails_on_a_wrong_data_set(dataset, words):
    with pytest.raises(AssertionError, match=words):
        check_dataset(dataset)


def endless(draw: Any) -> Any:
    """The sound data set with an endless training split."""

    def rows(self: Any, split: str) -> Rows:
        found = Data.rows(self, split)
        return evolve(found, draw=draw) if split == "train" else found

    return data(rows=rows)


def random_bytes(n: int, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.zeros(10, 1, 2, 2, dtype=torch.uint8), None),
        (torch.zeros(9, 1, 2, 2, dtype=torch.uint8), r"pyramid\[2\] has other rows or channels"),
        (torch.zeros(10, 1, 2, 3, dtype=torch.uint8), r"pyramid\[2\] is \[2, 3\], not \[2, 2\]"),
        (torch.zeros(10, 1, 2, 2), r"pyramid\[2\] is torch.float32, the table torch.uint8"),
    ],
)
def test_the_kit_looks_at_a_pyramid(table, words):
    dataset = data(rows=lambda self, split: evolve(Data.rows(self, split), pyramid={2: table}))
    if words is None:
        check_dataset(dataset)
        return
    with pytest.raises(AssertionError, match=words):
        check_dataset(dataset)


def test_the_kit_tells_a_growing_network_its_stage_and_begins_it(catalogue):
    from siv_core.testing import build_seeded

    component, _ = toys.with_toys(catalogue).components["network", "growing"]
    networks = build_seeded(component, component.config(), DIGITS)
    begun = []
    networks.decoder.begin = lambda stage, batches, encode: begun.append((stage.number, len(encode(next(batches).x)["z"].mu)))
    check_network(networks, DIGITS)
    assert [stage.shape for stage in networks.encoder.seen] == [(1, 8, 8)]
    assert begun == [(0, 4)]


def test_the_kit_takes_a_network_with_batch_norm():
    check_network(toys.normed(DIGITS), DIGITS)


def test_the_kit_takes_a_sound_endless_data_set():
    check_dataset(endless(lambda n, generator: Batch(random_bytes(n, generator), torch.zeros(n, dtype=torch.int64))))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda n, generator: Batch(random_bytes(n + 1, generator)), r"draw gives \[5, 1, 4, 4\]"),
        (lambda n, generator: Batch(random_bytes(n, generator).float()), r"draw gives torch.float32, the table is torch.uint8"),
        (lambda n, generator: Batch(random_bytes(n, None)), "the same generator gave other samples"),
        (lambda n, generator: Batch(torch.zeros(n, 1, 4, 4, dtype=torch.uint8)), "another seed gave the same samples"),
        (lambda n, generator: Batch(random_bytes(n, generator) + 0 * random_bytes(n, None)), "a global random function"),
        (lambda n, generator: Batch(random_bytes(n, generator)), "what is drawn has no labels"),
    ],
)
def test_the_kit_fails_on_a_wrong_draw(draw, words):
    with pytest.raises(AssertionError, match=words):
        check_dataset(endless(draw))


# -- config ----------------------------------------------------------------------------------------------------------------------


def test_a_component_whose_options_have_no_default_needs_a_config():
    @frozen
    class Needy:
        width: int = option(doc="how wide")

    component = Component("network", "needy", Needy, lambda config, spec: None, "a test")
    with pytest.raises(AssertionError, match=r"network needy: give a config, these options have no default: \['width'\]"):
        check_component(component)
