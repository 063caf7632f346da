"""The style-based network: published sizes, an independent forward pass, growing, equalised rates, noise, mixing, truncation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import toys
from attrs import evolve
from PIL import Image
from safetensors.torch import load_file
from siv_plugins import style
from siv_plugins.style import Convolution, Linear, StyleConfig
from torch import nn
from torch.nn import functional as F

from siv_core import Model, Spec, Stage, UserError
from siv_core.data import feed
from siv_core.model import BATCH, MEAN_OF
from siv_core.nets import Priors, set_stage
from siv_core.runs import opened
from siv_core.seeding import Streams
from siv_core.store.rundir import RunDir
from siv_core.testing import build_seeded, check_network
from siv_core.train import stage as stages
from siv_core.train.players import Player
from siv_core.train.step import play
from siv_core.use import evaluate, mixing

SMALL = StyleConfig(start_channels=4, max_channels=8, z_dim=6, encoder_mapping=2, decoder_mapping=3)
SPEC = Spec((3, 16, 16))
LEVELS = 3


def seeded(config=SMALL, spec=SPEC, seed=0):
    """Networks whose biases and strengths of noise are not 0 either."""
    networks = build_seeded(style.siv_components()[0], config, spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in networks[:2]:
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return networks


def at(networks, size, fade=None):
    set_stage(networks[:2], Stage(1, (3, size, size), None if fade is None else torch.tensor(fade)))


def noise(networks, n, use="model", seed=0):
    return networks.decoder.draw(n, torch.Generator().manual_seed(seed), use)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_published_256_pixels():
    networks = style.build(StyleConfig(), Spec((3, 256, 256)))
    encoder, decoder = networks[:2]
    assert parameters(encoder.mapping) == 1_050_624
    assert parameters(decoder.mapping) == 2_101_248
    assert parameters(encoder) - parameters(encoder.mapping) == 26_789_952
    assert parameters(decoder) - parameters(decoder.mapping) == 23_984_981


@pytest.mark.parametrize("levels", range(1, 10))
def test_every_size_from_three_numbers(levels):
    size = 4 << (levels - 1)
    with torch.device("meta"):
        encoder, decoder = style.build(StyleConfig(start_channels=16, max_channels=512), Spec((3, size, size)))[:2]
    wide = [min(512, 16 << k) for k in reversed(range(levels))]
    assert [layer.in_channels for layer in decoder.to_rgb] == wide
    assert [layer.out_channels for layer in encoder.from_rgb] == wide
    assert [block.fused for block in decoder.blocks] == [4 << k >= 128 for k in range(levels)]


@pytest.mark.parametrize(
    "config",
    [SMALL, evolve(SMALL, published=True), evolve(SMALL, noise=False, style_mixing=0.0)],
    ids=["plain", "published", "bare"],
)
@pytest.mark.parametrize("spec", [SPEC, Spec((1, 8, 8), classes=3, conditional=True)], ids=["16 px", "labels"])
def test_keeps_the_contract(config, spec):
    networks = build_seeded(style.siv_components()[0], config, spec)
    check_network(networks, spec)
    check_network(networks, spec, [4, 8, 16][: spec.shape[1] // 8 + 1])


# -- an independent forward pass -------------------------------------------------------------------------------------------------

KERNEL = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([1.0, 2.0, 1.0]) / 16


def blurred(x):
    return torch.cat([F.conv2d(c, KERNEL[None, None].to(x), padding=1) for c in x.split(1, dim=1)], dim=1)


def standardised(x, eps):
    mean = x.mean(dim=(2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=(2, 3), keepdim=True)
    return (x - mean) / (var + eps).sqrt(), mean.flatten(1), var.flatten(1)


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def naive_encoder(encoder, x, level):
    x = 2 * x - 1
    layer = encoder.from_rgb[level]
    h = leaky(F.conv2d(x, layer.weight, layer.bias))
    w = 0
    for k in range(level, -1, -1):
        block = encoder.blocks[k]
        h = leaky(F.conv2d(h, block.first.weight, block.first.bias, padding=1))
        h, mean, var = standardised(h, 1e-5)
        w = w + torch.cat([mean, (var + 1e-8).sqrt()], dim=1) @ block.first_style.weight.T + block.first_style.bias
        h = F.conv2d(blurred(h), block.second.weight, padding=1)
        h = (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
        h = leaky(h + block.second.bias[:, None, None])
        h, mean, var = standardised(h, 1e-5)
        w = w + torch.cat([mean, (var + 1e-8).sqrt()], dim=1) @ block.second_style.weight.T + block.second_style.bias
    hidden, last = encoder.mapping.layers
    return (leaky(w @ hidden.weight.T + hidden.bias) @ last.weight.T + last.bias).chunk(2, dim=1)


def naive_decoder(decoder, styles, planes, level):
    h = decoder.constant.expand(len(styles), -1, -1, -1)
    for k in range(level + 1):
        block = decoder.blocks[k]
        for i, layer in enumerate(block.layers):
            if i or k:
                convolution = block.keep if i else block.grow
                if not i:
                    h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = F.conv2d(h, convolution.weight, padding=1)
            if k and not i:
                h = blurred(h)
            h = h + layer.strength[None, :, None, None] * planes[2 * k + i] + layer.bias[None, :, None, None]
            h = standardised(leaky(h), 1e-8)[0]
            scale, offset = (styles[:, 2 * k + i] @ layer.style.weight.T + layer.style.bias).chunk(2, dim=1)
            h = h * (1 + scale[:, :, None, None]) + offset[:, :, None, None]
    layer = decoder.to_rgb[level]
    return 0.5 + 0.5 * (F.conv2d(h, layer.weight, layer.bias))


@pytest.mark.parametrize("level", range(LEVELS))
def test_an_independent_forward_pass(level):
    networks = seeded()
    for module in networks[:2]:
        module.double()
    at(networks, 4 << level)
    x = torch.rand(5, 3, 4 << level, 4 << level, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mu, logvar = naive_encoder(networks.encoder, x, level)
    q = networks.encoder(x)["z"]
    torch.testing.assert_close(q.mu, mu)
    torch.testing.assert_close(q.logvar, logvar)

    z = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    w = z / ((z**2).mean(dim=1, keepdim=True) + 1e-8).sqrt()
    for layer in networks.decoder.mapping.layers:
        w = leaky(w @ layer.weight.T + layer.bias)
    styles = networks.decoder.styles({"z": z})
    assert styles.shape == (5, 2 * LEVELS, 6)
    torch.testing.assert_close(styles, w[:, None].expand_as(styles))
    planes = tuple(plane.double() for plane in noise(networks, 5)["planes"])
    assert [plane.shape[-1] for plane in planes] == [4 << (i // 2) for i in range(2 * level + 2)]
    shown = networks.decoder({"z": z}, None, {"planes": planes})
    torch.testing.assert_close(shown, naive_decoder(networks.decoder, styles, planes, level))
    torch.testing.assert_close(networks.decoder.render(styles, {"planes": planes}), shown)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_a_blur_is_its_kernel(size):
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(style.blur(x), blurred(x))


def test_fused_convolutions_are_those_around_a_doubling_and_a_halving():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    half = Convolution(3, 5, 3, scale=0.5).double()
    nn.init.normal_(half.bias, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(half(x), F.avg_pool2d(F.conv2d(x, half.weight, half.bias, padding=1), 2))
    twice = Convolution(3, 5, 3, bias=False, scale=2).double()
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(twice(x), F.conv2d(doubled, twice.weight.flip(2, 3), padding=1))


# -- growing ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16])
def test_faded_in_it_is_the_bare_network_and_before_that_the_stage_before_it(size):
    """Both to the last bit."""
    networks = seeded()
    generator = torch.Generator().manual_seed(3)
    x, z = torch.rand(4, 3, size, size, generator=generator), torch.randn(4, 6, generator=generator)
    at(networks, size)
    planes = noise(networks, 4)
    bare = networks.decoder({"z": z}, None, planes), *networks.encoder(x)["z"]
    at(networks, size, 1.0)
    faded = networks.decoder({"z": z}, None, planes), *networks.encoder(x)["z"]
    assert all(torch.equal(a, b) for a, b in zip(bare, faded, strict=True))
    at(networks, size // 2)
    coarse = {"planes": planes["planes"][:-2]}
    before = networks.decoder({"z": z}, None, coarse), *networks.encoder(F.avg_pool2d(x, 2))["z"]
    at(networks, size, 0.0)
    new = networks.decoder({"z": z}, None, planes), *networks.encoder(x)["z"]
    assert torch.equal(new[0], before[0].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(new[1], before[1])
    assert torch.equal(new[2], before[2])
    at(networks, size, 0.4)
    between = networks.decoder({"z": z}, None, planes)
    torch.testing.assert_close(between, torch.lerp(new[0], bare[0], 0.4))


GROWING = toys.tree(
    network={
        "name": "style",
        "start_channels": 4,
        "max_channels": 8,
        "z_dim": 6,
        "encoder_mapping": 2,
        "decoder_mapping": 2,
    },
    train={"batch": 8, "tick": "2 steps", "preview": "1000 steps"},
    stages=[{"length": "2 steps", "data": {"size": 4}}, {"length": "6 steps", "fade": 0.5}],
)


@pytest.mark.parametrize("step", [0, 2, 5, 7])
def test_what_a_stage_uses_learns_and_nothing_else(catalogue, tmp_path, step):
    """In each phase the parameters of its players that the stage has a use for, old ways out and in while they fade."""
    t = toys.trainer(catalogue, tmp_path, GROWING)
    with torch.no_grad():
        for player in t.players.values():
            for i, parameter in enumerate(player.parameters):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    t.counters.step = step
    active = stages.enter(t, t.schedule.next(step))
    active.set_fade(t.schedule.fade(active.stage.number, step))
    fading = step in (2, 3)  # at step 4 it has faded in
    level = 0 if step < 2 else 1
    used = {f"from_rgb.{level}", f"to_rgb.{level}", "mapping", "constant", *(f"blocks.{k}" for k in range(level + 1))}
    used |= {"from_rgb.0", "to_rgb.0"} if fading else set()
    batch = t.feed.batch(torch.arange(8), active.stage.shape, torch.contiguous_format)
    drawn = active.objective.draw(8, Streams(0, step), active.sources)
    carry = {}
    for phase in active.objective.phases:
        moved = [p for name in phase.updates for p in t.players[name].parameters]
        played = play(phase, moved, active.nets, batch, drawn, active.coeffs, carry, 1.0)
        carry = played.carry
        names = [name for player in phase.updates for name, _ in t.players[player].module.named_parameters()]
        for name, gradient in zip(names, played.gradients, strict=True):
            learns = any(name.startswith(f"{part}.") or name == part for part in used)
            assert (gradient is not None) == learns, name
            assert not learns or gradient.abs().sum() > 0, name


def test_what_does_not_learn_stays_as_it_was_made(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, GROWING)
    before = {name: toys.weights(t, name) for name in ("encoder", "decoder")}
    t.active = stages.enter(t, 0)
    for _ in range(2):
        t.advance(t.active)
    for player in ("encoder", "decoder"):
        now = toys.weights(t, player)
        finer = [name for name in now if name.startswith(("blocks.1.", "from_rgb.1.", "to_rgb.1."))]
        assert finer
        assert all(torch.equal(now[name], before[player][name]) for name in finer)
        assert not any(torch.equal(now[name], before[player][name]) for name in now if name.startswith("mapping."))


# -- equalised learning rates ----------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """What StyleGAN computes: weights of variance 1, multiplied with their constant each time they are used."""

    def __init__(self, layer):
        super().__init__()
        factors = layer.rates
        self.weight = nn.Parameter(layer.weight.detach() / factors["weight"])
        self.bias = nn.Parameter(layer.bias.detach() / factors["bias"])
        self.constants = factors

    def forward(self, x):
        weight, bias = self.weight * self.constants["weight"], self.bias * self.constants["bias"]
        return F.conv2d(x, weight, bias, padding=1) if weight.ndim == 4 else F.linear(x, weight, bias)


@pytest.mark.parametrize("kind", ["linear", "mapping", "convolution", "to_rgb"])
def test_equalised_rates_are_those_of_explicit_scaling(kind):
    """Ten steps of Adam, whose step has the size of the rate whatever the gradient's: so the factor stands on the rate."""
    torch.manual_seed(0)
    layer = {
        "linear": lambda: Linear(5, 4),
        "mapping": lambda: Linear(5, 4, rate=0.1),
        "convolution": lambda: Convolution(5, 4, 3),
        "to_rgb": lambda: Convolution(5, 4, 3, gain=0.03),
    }[kind]().double()
    explicit = Scaled(layer)
    wrapped = nn.Sequential(layer)
    wrapped.lr_factors = lambda: style.equalised(wrapped)
    players = [Player.of("a", wrapped), Player.of("b", explicit)]
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64) if isinstance(layer, Convolution) else torch.randn(6, 5, dtype=torch.float64)
    for player in players:
        player.configure(lr=0.01, betas=(0.0, 0.99), eps=0.0, weight_decay=0.0)
    for step in range(10):
        for player in players:
            loss = ((player.module(x) - math.sin(step)) ** 4).sum()
            player.step(list(torch.autograd.grad(loss, player.parameters)))
    torch.testing.assert_close(layer.weight, explicit.weight * layer.rates["weight"])
    torch.testing.assert_close(layer.bias, explicit.bias * layer.rates["bias"])


def test_rates_and_weights_of_each_kind_of_layer():
    """The published table: convolutions √2/√fan-in, mappings a tenth of that, styles of the decoder 1/√d, to_rgb 0.03/√C."""
    networks = style.build(StyleConfig(start_channels=16, max_channels=64, z_dim=64), Spec((3, 16, 16)))
    encoder, decoder = (module.lr_factors() for module in networks[:2])
    assert encoder["blocks.1.first.weight"] == pytest.approx(math.sqrt(2 / (32 * 9)))
    assert encoder["blocks.1.first_style.weight"] == pytest.approx(math.sqrt(2 / 64))
    assert encoder["mapping.layers.0.weight"] == pytest.approx(0.1 * math.sqrt(2 / 64))
    assert encoder["mapping.layers.0.bias"] == pytest.approx(0.1)
    assert encoder["from_rgb.0.weight"] == pytest.approx(math.sqrt(2 / 3))
    assert decoder["blocks.1.grow.weight"] == pytest.approx(math.sqrt(2 / (64 * 9)))
    assert decoder["blocks.0.layers.0.style.weight"] == pytest.approx(1 / math.sqrt(64))
    assert decoder["to_rgb.2.weight"] == pytest.approx(0.03 / math.sqrt(16))
    free = {name for name, _ in networks.decoder.named_parameters()} - decoder.keys()
    assert all(name == "constant" or name.endswith((".strength", ".bias")) for name in free)
    for module, factors in zip(networks[:2], (encoder, decoder), strict=True):
        for name, parameter in module.named_parameters():
            if name.endswith(".weight") and parameter.numel() >= 1024:
                rate = 0.1 if name.startswith("mapping.") else 1.0
                assert float(parameter.detach().std()) == pytest.approx(factors[name] / rate, rel=0.15), name


# -- noise and mixing ------------------------------------------------------------------------------------------------------------


def test_only_samples_of_the_prior_are_mixed_and_nine_of_ten():
    networks = seeded()
    at(networks, 8)
    for use in ("rec", "again", "model"):
        assert noise(networks, 4, use).keys() == {"planes"}
    drawn = noise(networks, 4000, "prior")
    first = drawn["from"]
    assert first.min() == 1
    assert first.max() == 4  # layers of this stage: there the other z has no layer to hold in
    mixed = (first < 4).float().mean().item()
    assert mixed == pytest.approx(0.9 * 3 / 4, abs=0.03)  # a cut behind the last layer mixes nothing, as published


def test_the_other_style_holds_from_its_layer_on():
    networks = seeded()
    drawn = noise(networks, 5, "prior")
    drawn["from"] = torch.tensor([1, 2, 3, 5, 6])
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    shown = networks.decoder({"z": z}, None, drawn)
    a, b = networks.decoder.styles({"z": z}), networks.decoder.styles({"z": drawn["z"]})
    for i, first in enumerate(drawn["from"].tolist()):
        styles = torch.cat([a[i : i + 1, :first], b[i : i + 1, first:]], dim=1)
        planes = {"planes": tuple(plane[i : i + 1] for plane in drawn["planes"])}
        torch.testing.assert_close(shown[i : i + 1], networks.decoder.render(styles, planes))
    plain = networks.decoder({"z": z}, None, {"planes": drawn["planes"]})
    assert torch.equal(shown[4], plain[4])
    assert not torch.allclose(shown[0], plain[0])


def test_only_the_direction_of_z_is_seen():
    networks = seeded()
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(networks.decoder.styles({"z": z}), networks.decoder.styles({"z": 3 * z}))


# -- a model of it ---------------------------------------------------------------------------------------------------------------


def model(config=SMALL, spec=SPEC, **options):
    from siv_plugins import standard_normal

    networks = seeded(config, spec)
    prior = build_seeded(standard_normal.siv_components()[0], standard_normal.siv_components()[0].config(), config.z_dim, spec)
    return Model(
        networks.encoder, networks.decoder, Priors({"z": prior}), spec, networks.groups, None, torch.device("cpu"), **options
    )


def test_a_model_shows_what_its_styles_show():
    m = model()
    z = {"z": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}
    assert torch.equal(m.decode(z, seed=4), m.render(m.styles(z), seed=4))
    assert not torch.equal(m.decode(z, seed=4), m.decode(z, seed=5))


def test_without_noise_nothing_is_random():
    m = evolve(model(), noise=False)
    z = {"z": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}
    assert torch.equal(m.decode(z, seed=4), m.decode(z, seed=5))
    assert torch.equal(m.decode(z), m.decoder.render(m.styles(z)))
    assert torch.equal(m.render(m.styles(z), seed=1), m.render(m.styles(z), seed=2))


@pytest.mark.parametrize("layers", [0, 2])
def test_a_truncation_moves_coarse_styles_to_their_mean(layers):
    m = evolve(model(evolve(SMALL, truncated_layers=layers)), noise=False)
    moved = slice(0, layers or 2 * LEVELS)
    z = {"z": torch.randn(20_000, 6, generator=torch.Generator().manual_seed(9))}
    mean = m.styles(z).mean(dim=0)
    one = {"z": z["z"][:7]}
    for psi in (0.0, 0.3):
        styles = m.truncated(m.styles(one), psi)
        torch.testing.assert_close(styles[:, moved], torch.lerp(mean, m.styles(one), psi)[:, moved], atol=0.1, rtol=0)
        assert torch.equal(styles[:, moved.stop :], m.styles(one)[:, moved.stop :])
    assert torch.equal(m.sample(3, truncation=1.0), m.sample(3))
    still = m.sample(4, truncation=0.0)
    assert torch.equal(still[0], still[1]) == (layers == 0)  # all the same where no layer is left alone


def test_truncated_samples_take_no_more_memory_than_others(monkeypatch):
    """A batch's styles are made when its images are: of 5 batches the first is there before the second is begun."""
    m = model(evolve(SMALL, truncated_layers=4))
    whole, styles, rows = m.sample(5 * BATCH, seed=3, truncation=0.5), m.decoder.styles, []
    monkeypatch.setattr(m.decoder, "styles", lambda z, labels=None: rows.append(len(z["z"])) or styles(z, labels))
    pieces = m.samples(5 * BATCH, BATCH, 3, truncation=0.5)
    first = next(pieces)
    assert sum(rows) == MEAN_OF + BATCH
    assert torch.equal(torch.cat([first, *pieces]), whole)
    assert sum(rows) == MEAN_OF + 5 * BATCH


def test_a_truncation_goes_to_the_mean_of_the_image_s_own_class():
    m = model(evolve(SMALL, truncated_layers=0), Spec((3, 8, 8), classes=3, conditional=True), noise=False)
    labels = torch.tensor([2, 0, 1, 2])
    shown = m.sample(4, labels=labels, truncation=0.0)
    assert torch.equal(shown[0], shown[3])
    assert not torch.allclose(shown[0], shown[1])
    torch.testing.assert_close(shown[1:2], m.sample(1, labels=torch.tensor([0]), truncation=0.0))


def test_the_mean_style_is_that_of_the_weights_as_they_are():
    """Of an average its own, of the raw weights theirs: there is no buffer that could lag behind."""
    m = evolve(model(), noise=False)
    before = m.sample(1, truncation=0.0)
    with torch.no_grad():
        m.decoder.mapping.layers[-1].bias += 1
    z = {"z": torch.randn(20_000, 6, generator=torch.Generator().manual_seed(9))}
    still = m.truncated(m.styles({"z": z["z"][:1]}), 0.0)
    torch.testing.assert_close(still[0], m.styles(z).mean(dim=0), atol=0.1, rtol=0)
    assert not torch.allclose(m.sample(1, truncation=0.0), before)


def test_straight_ways_between_styles():
    m = evolve(model(), noise=False)
    generator = torch.Generator().manual_seed(5)
    x, y, u, v = (torch.rand(2, 3, 16, 16, generator=generator) for _ in range(4))
    shown = m.interpolate(x, y, 3, path="styles")
    ends = [m.styles({"z": m.encode(image)["z"].mu}) for image in (x, y, u, v)]
    torch.testing.assert_close(shown[0], m.reconstruct(x))
    torch.testing.assert_close(shown[1], m.render((ends[0] + ends[1]) / 2))
    torch.testing.assert_close(m.blend([x, y, u, v], 3, path="styles")[1, 1], m.render(sum(ends) / 4))
    assert not torch.allclose(shown[1], m.interpolate(x, y, 3)[1])


# -- mixing ----------------------------------------------------------------------------------------------------------------------


def test_a_mixing_has_the_styles_of_the_left_in_its_layers_and_of_the_top_in_the_others():
    m = evolve(model(), noise=False)
    top, left = m.sample_styles(4, seed=1), m.sample_styles(2, seed=2)
    cells = mixing.mixed(m, top, left, [range(4), range(4, 6), range(6)], seed=0)
    assert cells.shape == (3, 2, 4, 3, 16, 16)
    for row in range(2):
        for column in range(4):
            parts = left[row : row + 1], top[column : column + 1]
            coarse = m.render(torch.cat([parts[0][:, :4], parts[1][:, 4:]], dim=1))[0]
            middle = m.render(torch.cat([parts[1][:, :4], parts[0][:, 4:]], dim=1))[0]
            torch.testing.assert_close(cells[0, row, column], coarse)
            torch.testing.assert_close(cells[1, row, column], middle)
            torch.testing.assert_close(cells[2, row, column], m.render(left)[row])


def test_named_layers_are_those_in_use():
    assert mixing.named(14) == {"coarse": range(4), "middle": range(4, 8), "fine": range(8, 14)}
    assert mixing.named(6) == {"coarse": range(4), "middle": range(4, 6)}
    assert mixing.parsed("fine", 14) == range(8, 14)
    assert mixing.parsed("3", 6) == range(3, 4)
    assert mixing.parsed("0-5", 6) == range(6)
    m = model()
    m.decoder.set_stage(Stage(0, (3, 8, 8)))
    assert mixing.layers(m) == 4


@pytest.mark.parametrize("text", ["fine", "6", "3-6", "4-2", "-1", "1-", "", "all", "1,2"])
def test_layers_that_there_are_not(text):
    with pytest.raises(UserError, match="this model has 6 layers: expected coarse, middle or layers 0 to 5 such as 0-3"):
        mixing.parsed(text, 6)


def test_styles_of_a_decoder_that_has_none(catalogue, tmp_path):
    m = toys.trainer(catalogue, tmp_path, toys.tree()).model()
    with pytest.raises(UserError, match="has no styles to mix"):
        mixing.layers(m)
    with pytest.raises(UserError, match="decoder has none"):
        m.styles({"z": torch.zeros(2, 3)})
    with pytest.raises(UserError, match="decoder has none of its own"):
        m.without_noise()


@pytest.fixture(scope="module")
def run(siv_in, tmp_path_factory):
    """A style network that has grown from 4 to 8 pixels."""
    folder = tmp_path_factory.mktemp("style")
    network = "name = 'style'\nstart_channels = 4\nmax_channels = 8\nz_dim = 6\nencoder_mapping = 2\ndecoder_mapping = 2\n"
    (folder / "recipe.toml").write_text(
        f"format = 1\n[data]\nname = 'digits'\n[network]\n{network}[objective]\nname = 'soft_intro_vae'\n[shadow]\n[train]\n"
        "batch = 8\ntick = '2 steps'\ncheckpoint = '2 steps'\nkeep_every = 1\n[metrics.nearest]\ncount = 60\nevery = '2 steps'\n"
        "[[stages]]\nlength = '2 steps'\ndata = {size = 4}\n"
        "[[stages]]\nlength = '4 steps'\nfade = 0.5\n"
    )
    done = siv_in(folder, "run", "recipe.toml", "--run-dir", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_pictures_of_a_run(run):
    there = {path.name for path in (run / "images").glob("*.png")}
    assert {"samples.png", "reconstructions.png", "style_mixing.png", "curves.png", "preview_00000002.png"} <= there


def test_an_early_stage_is_measured_at_its_size(siv_in, run):
    """Of the checkpoint at 4 pixels: data and samples alike, and the nearest images are those of a naive search there."""
    metrics = ["latent_probes.class_factor='digit'", "fd_classifier={count=100, epochs=1}"]
    sets = [word for metric in metrics for word in ("--set", f"metrics.{metric}")]
    done = siv_in(run.parent, "evaluate", "run", "--checkpoint", "2", *sets, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)["metrics"]
    assert not [line for line in lines if line["name"] == "all"]  # where a metric cannot be taken
    in_training = [line for line in RunDir(run).read("metrics") if line["by"] == "training" and line["step"] == 2]
    for metric, lines_of in (("nearest", lines), ("fd_classifier", lines), ("nearest", in_training)):
        assert {str(line["protocol"]["shape"]) for line in lines_of if line["metric"] == metric} == {"[1, 4, 4]"}
    assert {line["name"] for line in lines if line["metric"] == "latent_probes"} >= {"knn.z.digit", "linear.z.digit"}

    data = opened.open_run(run, "last", "auto", "cpu").built.dataset
    positions = {"train": torch.arange(len(data.rows("train"))), "held_out": evaluate.some(data, "held_out", 60, 0)}
    train, chosen = (F.avg_pool2d(feed.images(data.rows(split), at, data.spec), 2) for split, at in positions.items())
    nearest = torch.cdist(chosen.flatten(1), train.flatten(1)).min(dim=1).values / 4
    found = [line["value"] for line in (*lines, *in_training) if line["name"] == "held_out.rmse"]
    assert found == pytest.approx([float(nearest.mean())] * 2, abs=2e-3)  # pictures are bytes


def test_what_a_run_is_put_to(siv_in, run):
    def arrays(*words):
        done = siv_in(run.parent, *words, "--json", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        path = next(Path(path) for path in told["files"] if path.endswith(".safetensors"))
        assert any(path.endswith(".png") for path in told["files"])
        return load_file(run.parent / path), told

    plain, _ = arrays("sample", "run", "-n", "4")
    moved, _ = arrays("sample", "run", "-n", "4", "--truncation", "0.5")
    assert not torch.equal(plain["samples"], moved["samples"])
    mixed, told = arrays("sample", "run", "--mix", "coarse", "--mix", "0", "-n", "5", "--no-noise")
    assert mixed["cells"].shape == (2, 3, 5, 1, 8, 8)
    assert told["notes"] == ["top: samples of the prior", "left: samples of the prior"]
    torch.testing.assert_close(mixed["cells"][0], mixed["left"][:, None].expand(-1, 5, -1, -1, -1))  # all four layers in use
    square, _ = arrays("interpolate", "run", "--corners", "--path", "styles", "--steps", "3")
    assert square["images"].shape == (3, 3, 1, 8, 8)
    pairs, _ = arrays("reconstruct", "run", "--collage", "--no-noise")
    again, _ = arrays("reconstruct", "run", "--no-noise")
    assert torch.equal(pairs["y"], again["y"])


def test_pictures_of_ones_own_are_mixed(siv_in, run):
    for name, value in (("a", 10), ("b", 200)):
        Image.new("L", (8, 8), value).save(run.parent / f"{name}.png")
    done = siv_in(
        run.parent, "sample", "run", "--mix", "0-1", "--take", "left=a.png,b.png", "-n", "3", "--json", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    made = load_file(run.parent / next(path for path in told["files"] if path.endswith(".safetensors")))
    assert made["left"].flatten(1).mean(dim=1).tolist() == pytest.approx([10 / 255, 200 / 255])
    assert made["cells"].shape == (1, 2, 3, 1, 8, 8)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mix", "fine"], "this model has 4 layers: expected coarse or layers 0 to 3"),
        (["--mix", "coarse", "--take", "right=a.png"], "--take right: expected top or left"),
        (["--take", "top=a.png"], "--take goes with --mix"),
        (["--mix", "coarse", "--truncation", "0.5"], "--mix draws a matrix of its own"),
        (["--mix", "coarse", "--take", "top=a.png", "-n", "3"], "-n is of samples along the top, where --take has pictures"),
    ],
)
def test_what_cannot_be_mixed(siv_in, run, words, told):
    done = siv_in(run.parent, "sample", "run", *words, "--device", "cpu")
    assert done.returncode == 2
    assert told in done.stderr


def test_pictures_without_labels_are_not_mixed_by_a_model_that_encodes_with_them(tmp_path):
    conditional = model(spec=Spec((3, 16, 16), classes=4, conditional=True))
    given = {"left": (torch.zeros(2, 3, 16, 16), [])}
    with pytest.raises(UserError, match=r"--take left=…: this model encodes by label, and pictures here have none"):
        mixing.mix(conditional, tmp_path, ["coarse"], given, 2, 0)


# -- what does not fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec((3, 24, 24)), "for squares of 4, 8, 16, 32, … pixels a side, not for 24 × 24: set data.size"),
        (Spec((3, 16, 8)), "not for 16 × 8"),
        (Spec((1, 2, 2)), "not for 2 × 2"),
        (Spec((2,), kind="array"), "is for images"),
    ],
)
def test_data_that_do_not_fit(spec, words):
    with pytest.raises(UserError, match=words):
        style.build(SMALL, spec)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 6, 6), (3, 8, 4), (3, 2, 2)])
def test_stages_that_do_not_fit(shape):
    networks = style.build(SMALL, SPEC)
    with pytest.raises(UserError, match="has blocks for 4, 8, 16 pixels a side, not for"):
        networks.encoder.set_stage(Stage(0, shape))


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([4, 6], ["stages[1].data.size: network 'style' has blocks for 4, 8 pixels a side, not for 6 × 6"]),
        ([8, 4], ["stages[1].data.size: 4 after 8: networks grow, so sizes do too"]),
        ([None, 4], ["stages[1].data.size: 4 after 8: networks grow, so sizes do too"]),
        ([4, 16], ["stages[1].data.size: 16 does not fit data of shape [1, 8, 8]"]),
        ([2, 3], ["stages[0].data.size: network 'style' has blocks", "stages[1].data.size: network 'style' has blocks"]),
    ],
)
def test_stages_are_looked_at_before_anything_begins(catalogue, tmp_path, sizes, told):
    tables = [{"length": "2 steps", **({"data": {"size": size}} if size else {})} for size in sizes]
    with pytest.raises(UserError) as caught:
        toys.trainer(catalogue, tmp_path, {**GROWING, "stages": tables})
    assert len(caught.value.problems) == len(told)
    assert all(line in problem for line, problem in zip(told, caught.value.problems, strict=True))


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        (
            [{"data": {"size": 4}, "fade": 0.5}, {}],
            "stages[0].fade: what fades in is twice the size of the stage before it, this one is 4 × 4",
        ),
        (
            [{}, {"fade": 0.5}],
            "stages[1].fade: what fades in is twice the size of the stage before it, this one is 8 × 8 after 8 × 8",
        ),
        (
            [{"fade": 0.5}, {}],
            "stages[0].fade: what fades in is twice the size of the stage before it, this one is 8 × 8 after nothing",
        ),
    ],
)
def test_only_what_is_twice_as_large_fades_in(catalogue, tmp_path, tables, told):
    stages = [{"length": "2 steps", **one} for one in tables]
    with pytest.raises(UserError) as caught:
        toys.trainer(catalogue, tmp_path, {**GROWING, "stages": stages})
    assert any(told in problem for problem in caught.value.problems)


@pytest.mark.parametrize("data", [{"name": "digits"}, {"name": "toy2d"}])
def test_a_network_that_does_not_grow_fades_nothing_in(catalogue, tmp_path, data):
    stages = [{"length": "2 steps"}, {"length": "2 steps", "fade": 0.5}]
    with pytest.raises(UserError, match=r"stages\[1\]\.fade: network 'mlp' does not grow: leave it out"):
        toys.trainer(catalogue, tmp_path, toys.tree(data=data, stages=stages, train={"batch": 8}))


def test_styles_are_mixed_with_a_normal_prior_alone(catalogue, tmp_path):
    mixture = {"name": "mixture", "modes": 2}
    with pytest.raises(UserError, match=r"network\.style_mixing: takes codes of N\(0, I\), the prior of 'z' is another one"):
        toys.trainer(catalogue, tmp_path, {**GROWING, "prior": mixture}, toys_too=False)
    network = {**GROWING["network"], "style_mixing": 0.0}
    toys.trainer(catalogue, tmp_path, {**GROWING, "prior": mixture, "network": network}, toys_too=False)


def test_a_fade_mixes_what_autocast_leaves_wide_and_what_it_makes_narrow(monkeypatch):
    """On CUDA norms come out of autocast in float32 and convolutions in bfloat16; on a CPU both are bfloat16."""
    norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *arguments, **named: norm(x.float(), *arguments, **named))
    networks = seeded()
    at(networks, 16, 0.3)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        q = networks.encoder(x)["z"]
        y = networks.decoder({"z": q.mu}, noise=noise(networks, 2))
    assert torch.isfinite(y).all()


# The released configurations' epochs a size, to their released epochs of 230 and 270; LSUN's in images, by CelebA-HQ's 29,000
LENGTHS = {
    "celeba_hq_256_style": ("epochs", [1, 29, 30, 30, 30, 30, 30, 50]),
    "ffhq_256_style": ("epochs", [1, 15, 16, 16, 16, 16, 16, 174]),
    "lsun_bedroom_128_style": ("images", [29_000, 870_000, 870_000, 870_000, 870_000, 870_000, 5_000_000]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_shipped_recipes_grow_to_their_size(catalogue, name):
    """Every profile: the published batches, sizes from 4 to the data's, beta_neg by size; networks of the published widths."""
    from siv_core.recipe import build, recipe

    batches = {
        "none": [512, 256, 128, 64, 32, 32, 16],
        "one_device": [128, 128, 128, 32, 16, 8, 4],
        "two_devices": [128, 128, 128, 64, 32, 16, 8],
        "eight_devices": [512, 256, 128, 64, 32, 32, 32],
    }
    for profile, expected in batches.items():
        read = recipe.load(RECIPES / f"{name}.toml", catalogue, (profile,), ())
        size = 128 if "lsun" in name else 256
        levels = [4 << k for k in range(7) if 4 << k <= size]
        assert [plan.size for plan in read.stages] == [4, *levels]
        assert [plan.batch for plan in read.stages] == [expected[0], *expected[: len(levels)]]
        assert read.stages[0].objective.name == "vae"
        negative = [plan.objective.config.beta_neg for plan in read.stages[1:]]
        assert negative == [2048, 2048, 2048, 1024, 512, 512, 512][: len(levels)]
        assert [plan.fade > 0 for plan in read.stages] == [False, False, *[True] * (len(levels) - 1)]
        assert all(plan.reset_optimisers == (plan.fade > 0) for plan in read.stages)
        unit, lengths = LENGTHS[name]
        assert {plan.length.unit for plan in read.stages} == {unit}
        assert [plan.length.count for plan in read.stages] == lengths
        rates = [plan.optim[""].lr for plan in read.stages]
        assert rates == [0.0015] * (len(levels)) + [0.002 if "ffhq" in name else 0.0015]
        assert all(one.betas == (0.0, 0.99) for plan in read.stages for one in plan.optim.values())
        assert {plan.objective.config.beta_rec for plan in read.stages} == {0.4 if "ffhq" in name else 0.2}
        assert {plan.objective.config.beta_kl for plan in read.stages} == {0.2}
        assert {plan.objective.config.scale for plan in read.stages} == {5e-6}
        assert read.shadow.half_life.count == 10_000
        assert read.shadow.of == ("encoder", "decoder")
        assert read.train.horizontal_flips
        assert read.train.precision == "bf16"
        with torch.device("meta"):
            networks = build.component(catalogue, read.network[0], Spec((3, size, size)))
        assert [layer.in_channels for layer in networks.decoder.to_rgb] == [512, 512, 512, 512, 256, 128, 64][: len(levels)]
        for i, plan in enumerate(read.stages):
            set_stage(networks[:2], Stage(i, (3, plan.size, plan.size)))


@pytest.mark.slow
def test_steps_at_256_pixels_fit_on_a_cpu(catalogue, monkeypatch):
    """The trainer's own: the shipped recipe at published widths, batch 2, Soft-IntroVAE while the last size fades in, Adam and
    averages with it. Every weight that is in use has moved, by both players, and what it takes is what the weights foretell."""
    from siv_core.recipe import build, recipe
    from siv_core.runs import timing

    monkeypatch.setattr(timing, "RANDOM_IMAGES", 8)
    last = "{ length = '2 steps', fade = 1.0, reset_optimisers = true, data = { size = 256 }, train = { batch = 2 } }"
    stages = f"stages=[{{ length = '1 steps', data = {{ size = 128 }}, train = {{ batch = 2 }} }}, {last}]"
    read = recipe.load(RECIPES / "ffhq_256_style.toml", catalogue, (), (stages, "train.precision=fp32"))
    built = build.build(read, catalogue, None, Spec((3, 256, 256)))
    built.dataset = timing.RandomData(built.spec)
    weights = 4 * (26_789_952 + 23_984_981 + 1_050_624 + 2_101_248)
    taken = timing.Memory.of(torch.device("cpu"))
    trainer = timing.trainer_of(built, torch.device("cpu"))
    before = {name: toys.weights(trainer, name) for name in ("encoder", "decoder")}
    active = timing.enter(trainer, 1)
    seconds = timing.timed(trainer, active, 1)
    trainer.stats.check()
    for (name, old), colours in zip(before.items(), ("from_rgb", "to_rgb"), strict=True):
        new = toys.weights(trainer, name)
        still = {key for key in old if torch.equal(old[key], new[key])}
        assert still == {f"{colours}.{level}.{of}" for level in range(5) for of in ("weight", "bias")}  # of 4 to 64 pixels
    peak = taken.taken()
    assert peak is None or 4 * weights < peak < 6 << 30  # two averages, gradients, moments; well below a common machine's 8 GiB
    print(f"a step of 2: {seconds:.1f} s; {(peak or 0) / 2**30:.2f} GiB")
