"""The residual network: published sizes, an independent forward pass, labels, norms, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from siv_plugins import residual_cnn
from siv_plugins.residual_cnn import ResidualCNNConfig
from torch.nn import functional as F

from siv_core import Spec, UserError
from siv_core.component import Component
from siv_core.testing import build_seeded, check_network

PUBLISHED = {  # channels, image, z, parameters of encoder and decoder, as the published code counts them
    "cifar10": ((64, 128, 256), (3, 32, 32), 128, 3_382_848, 2_382_531),
    "mnist": ((64, 128), (1, 28, 28), 32, 928_512, 697_025),
    "monsters128": ((64, 128, 256, 512, 512), (3, 128, 128), 128, 16_364_096, 13_073_091),
    "celeb256": ((64, 128, 256, 512, 512, 512), (3, 256, 256), 256, 23_182_144, 18_842_307),
    "celeb1024": ((16, 32, 64, 128, 256, 512, 512, 512), (3, 1024, 1024), 512, 27_445_328, 20_903_859),
}


def component() -> Component:
    return residual_cnn.siv_components()[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    channels, shape, z_dim, encoder, decoder = PUBLISHED[name]
    with torch.device("meta"):
        networks = residual_cnn.build(ResidualCNNConfig(channels=channels, z_dim=z_dim, norm="batch"), Spec(shape))
    assert [sum(p.numel() for p in net.parameters()) for net in networks[:2]] == [encoder, decoder]
    assert networks.batch_statistics


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_the_contract_holds_with_every_norm(norm, conditional, output):
    spec = Spec((2, 16, 24), classes=5, conditional=conditional, value_range=(-1.0, 1.0))
    config = ResidualCNNConfig(channels=(8, 16), z_dim=6, norm=norm, norm_groups=4, output=output)
    networks = build_seeded(component(), config, spec)
    for network in networks[:2]:
        network.eval()  # a batch norm in training mode gives other results for the same input
    check_network(networks, spec)
    if output == "sigmoid":
        y = networks.decoder({"z": 100 * torch.randn(4, 6)}, torch.arange(4) if conditional else None)
        assert y.abs().max() <= 1
        assert y.min() < -0.5 < 0.5 < y.max()


def naive_block(w, name, x, slope, norm):
    h = F.leaky_relu(
        norm(F.conv2d(x, w[f"{name}.first.weight"], w.get(f"{name}.first.bias"), padding=1), f"{name}.first_norm"), slope
    )
    h = norm(F.conv2d(h, w[f"{name}.second.weight"], w.get(f"{name}.second.bias"), padding=1), f"{name}.second_norm")
    skip = w.get(f"{name}.skip.weight")
    return F.leaky_relu(h + (x if skip is None else F.conv2d(x, skip)), slope)


def naive_norm(kind, w, groups):
    """Norms written out: in training mode for batch norm."""

    def norm(x, name):
        if kind == "none":
            return x
        n, c, height, width = x.shape
        cells = x.reshape(n, groups, -1) if kind == "group" else x.transpose(0, 1).reshape(1, c, -1)
        mean, var = cells.mean(-1, keepdim=True), cells.var(-1, unbiased=False, keepdim=True)
        unit = (cells - mean) / torch.sqrt(var + 1e-5)
        unit = unit.reshape(n, c, height, width) if kind == "group" else unit.reshape(c, n, height, width).transpose(0, 1)
        return unit * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    return norm


def halved(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


@pytest.mark.parametrize("kind", ["batch", "group", "none"])
@pytest.mark.parametrize("conditional", [False, True])
def test_both_networks_against_an_independent_pass(kind, conditional):
    spec = Spec((3, 16, 8), classes=4, conditional=conditional)
    config = ResidualCNNConfig(channels=(8, 8, 16), z_dim=5, norm=kind, norm_groups=4)
    encoder, decoder, *_ = build_seeded(component(), config, spec)
    encoder.double(), decoder.double()
    generator = torch.Generator().manual_seed(1)
    for network in (encoder, decoder):
        for parameter in network.parameters():  # norms and biases begin as 1 and 0, which would hide them
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.rand(6, *spec.shape, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 3, 2]) if conditional else None
    one_hot = F.one_hot(labels, 4).double() if conditional else x.new_zeros(6, 0)

    w = dict(encoder.named_parameters())
    norm = naive_norm(kind, w, 4)
    h = halved(F.leaky_relu(norm(F.conv2d(x, w["stem.weight"], w.get("stem.bias"), padding=2), "stem_norm"), 0.2))
    for name in ("blocks.0", "blocks.1"):
        h = halved(naive_block(w, name, h, 0.2, norm))
    h = torch.cat([naive_block(w, "last", h, 0.2, norm).reshape(6, -1), one_hot], 1) @ w["head.weight"].T + w["head.bias"]
    q = encoder(x, labels)["z"]
    torch.testing.assert_close(torch.cat(q, dim=1), h, rtol=1e-9, atol=1e-11)

    w = dict(decoder.named_parameters())
    norm = naive_norm(kind, w, 4)
    z = torch.cat([q.mu, one_hot], 1)
    h = torch.relu(z @ w["first.weight"].T + w["first.bias"]).reshape(6, 16, 2, 1)
    for name in ("blocks.0", "blocks.1", "blocks.2"):
        h = naive_block(w, name, h, 0.2, norm).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = F.conv2d(naive_block(w, "last", h, 0.2, norm), w["image.weight"], w["image.bias"], padding=2)
    torch.testing.assert_close(decoder({"z": q.mu}, labels), h, rtol=1e-9, atol=1e-11)


def test_labels_change_what_is_encoded_and_shown():
    spec = Spec((1, 8, 8), classes=3, conditional=True)
    networks = build_seeded(component(), ResidualCNNConfig(channels=(8,), z_dim=4), spec)
    x, z = torch.rand(3, 1, 8, 8), torch.randn(3, 4)
    a, b = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    assert (networks.encoder(x, a)["z"].mu - networks.encoder(x, b)["z"].mu).abs().min(dim=1).values.gt(0).all()
    assert (networks.decoder({"z": z}, a) - networks.decoder({"z": z}, b)).flatten(1).abs().max(dim=1).values.gt(1e-3).all()
    with pytest.raises(ValueError, match="was called without"):
        networks.encoder(x)


def test_heads_and_pixels_are_float32_under_autocast():
    networks = build_seeded(component(), ResidualCNNConfig(channels=(8,), z_dim=4), Spec((1, 8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        q = networks.encoder(torch.rand(2, 1, 8, 8))["z"]
        y = networks.decoder({"z": q.mu})
    assert {q.mu.dtype, q.logvar.dtype, y.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("spec", "config", "told"),
    [
        (Spec((2,), kind="array"), {}, "use mlp"),
        (Spec((3, 28, 28)), {"channels": (8, 8, 8)}, "28x28 cannot be halved 3 times"),
        (Spec((3, 32, 32)), {"channels": ()}, "one number of channels at least"),
        (Spec((3, 32, 32)), {"channels": (12, 16), "norm_groups": 8}, "12 channels cannot be parted into 8"),
    ],
)
def test_what_does_not_fit_is_told(spec, config, told):
    with pytest.raises(UserError, match=told):
        residual_cnn.build(ResidualCNNConfig(**config), spec)


def test_uneven_groups_matter_only_to_group_norm():
    networks = residual_cnn.build(ResidualCNNConfig(channels=(12,), norm="none", norm_groups=8), Spec((1, 8, 8)))
    assert not any(isinstance(module, torch.nn.GroupNorm) for network in networks[:2] for module in network.modules())
    assert networks.decoder({"z": networks.encoder(torch.rand(2, 1, 8, 8))["z"].mu}).shape == (2, 1, 8, 8)
