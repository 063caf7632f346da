"""`siv import`: checkpoints in the layout that the published style-based code writes, as runs of ours."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import pytest
import torch
from siv_plugins import style, style_weights
from siv_plugins.style import StyleConfig
from torch.nn import functional as F

import siv_core
from siv_core import Spec, Stage, UserError
from siv_core.testing import build_seeded

D, START, MOST = 6, 4, 8


def published(blocks, seed=0, d=D, start=START, most=MOST, posterior=2):
    """State dicts {discriminator, generator, mapping_tl, mapping_fl} as the published modules have them; conv_1 of a decoder's
    fused block is a transposed convolution, [inputs, outputs, 3, 3]."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    encoder, decoder = {}, {}
    for j in range(blocks):  # from the finest to the coarsest
        inputs, outputs = min(most, start << j), min(most, start << (j + 1))
        name = f"encode_block.{j}"
        encoder |= {f"from_rgb.{j}.from_rgb.weight": some(inputs, 3, 1, 1), f"from_rgb.{j}.from_rgb.bias": some(inputs)}
        encoder |= {f"{name}.conv_1.weight": some(inputs, inputs, 3, 3), f"{name}.bias_1": some(1, inputs, 1, 1)}
        encoder |= {f"{name}.conv_2.weight": some(outputs, inputs, 3, 3), f"{name}.bias_2": some(1, outputs, 1, 1)}
        encoder |= {f"{name}.blur.weight": some(inputs, 1, 3, 3)}
        for i, width in ((1, inputs), (2, outputs)):
            encoder |= {f"{name}.style_{i}.weight": some(d, 2 * width), f"{name}.style_{i}.bias": some(d)}
    decoder["const"] = some(1, min(most, start << (blocks - 1)), 4, 4)
    for k in range(blocks):  # from the coarsest to the finest
        outputs = min(most, start << (blocks - 1 - k))
        inputs = outputs if not k else min(most, start << (blocks - k))
        name = f"decode_block.{k}"
        if k:
            shape = (inputs, outputs) if 4 << k >= 128 else (outputs, inputs)
            decoder[f"{name}.conv_1.weight"] = some(*shape, 3, 3)
        decoder |= {f"{name}.blur.weight": some(outputs, 1, 3, 3), f"{name}.conv_2.weight": some(outputs, outputs, 3, 3)}
        for i in (1, 2):
            decoder |= {f"{name}.noise_weight_{i}": some(1, outputs, 1, 1), f"{name}.bias_{i}": some(1, outputs, 1, 1)}
            decoder |= {f"{name}.style_{i}.weight": some(2 * outputs, d), f"{name}.style_{i}.bias": some(2 * outputs)}
        decoder |= {f"to_rgb.{k}.to_rgb.weight": some(3, outputs, 1, 1), f"to_rgb.{k}.to_rgb.bias": some(3)}

    def mapping(*widths):
        layers = {}
        for i, (a, b) in enumerate(pairwise(widths)):
            layers |= {f"map_blocks.{i}.fc.weight": some(b, a), f"map_blocks.{i}.fc.bias": some(b)}
        return layers

    return {
        "discriminator": encoder,
        "generator": decoder,
        "mapping_tl": mapping(d, d, d, posterior * d),
        "mapping_fl": mapping(d, d, d),
    }


def checkpoint(blocks, *, averages=True, raw=True):
    models = published(blocks) if raw else {}
    if averages:
        models |= {f"{name}_s": state for name, state in published(blocks, seed=1).items()}
    return {
        "models": {**models, "dlatent_avg": {"buff": torch.zeros(2 * blocks, D)}},
        "auxiliary": {"scheduler": {"last_epoch": 3}},
    }


def test_every_tensor_comes_to_where_the_network_has_it():
    """By an own forward pass of the published layout: channel biases, flipped orders of blocks, transposed convolutions."""
    blocks = 6  # to 128 pixels: the last one is fused
    found = style_weights.convert(checkpoint(blocks))
    assert found.shape == (3, 128, 128)
    assert found.config == {
        "start_channels": START,
        "max_channels": MOST,
        "z_dim": D,
        "encoder_mapping": 3,
        "decoder_mapping": 2,
        "published": True,
    }
    networks = build_seeded(style.siv_components()[0], StyleConfig(**found.config), Spec(found.shape))
    networks.encoder.load_state_dict(found.players["encoder"])
    networks.decoder.load_state_dict(found.players["decoder"])
    theirs = published(blocks)

    # the decoder's finest convolution, applied as the published code does: transposed, its kernel summed over four places
    w = theirs["generator"][f"decode_block.{blocks - 1}.conv_1.weight"]
    wide = F.pad(w, (1, 1, 1, 1))
    wide = wide[:, :, 1:, 1:] + wide[:, :, :-1, 1:] + wide[:, :, 1:, :-1] + wide[:, :, :-1, :-1]
    x = torch.randn(2, w.shape[0], 5, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(networks.decoder.blocks[-1].grow(x), F.conv_transpose2d(x, wide, stride=2, padding=1))

    # the encoder's order is turned round, and from_rgb has two leaky ReLUs behind it
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    networks.encoder.set_stage(Stage(0, (3, 8, 8)))
    own = theirs["discriminator"]
    h = F.conv2d(2 * x - 1, own[f"from_rgb.{blocks - 2}.from_rgb.weight"], own[f"from_rgb.{blocks - 2}.from_rgb.bias"])
    h = F.leaky_relu(F.leaky_relu(h, 0.2), 0.2)
    styles = 0
    for j in (blocks - 2, blocks - 1):
        name = f"encode_block.{j}"
        h = F.leaky_relu(F.conv2d(h, own[f"{name}.conv_1.weight"], padding=1) + own[f"{name}.bias_1"], 0.2)
        for i in (1, 2):
            mean = h.mean(dim=(2, 3))
            std = ((h - mean[..., None, None]) ** 2).mean(dim=(2, 3)).sqrt()
            styles = styles + F.linear(
                torch.cat([mean, std], dim=1), own[f"{name}.style_{i}.weight"], own[f"{name}.style_{i}.bias"]
            )
            h = F.instance_norm(h, eps=1e-5)
            if i == 1:
                h = F.avg_pool2d(F.conv2d(style.blur(h), own[f"{name}.conv_2.weight"], padding=1), 2)
                h = F.leaky_relu(h + own[f"{name}.bias_2"], 0.2)
    for i in range(3):
        weight, bias = (theirs["mapping_tl"][f"map_blocks.{i}.fc.{of}"] for of in ("weight", "bias"))
        styles = F.leaky_relu(F.linear(styles, weight, bias), 0.2)
    q = networks.encoder(x)["z"]
    torch.testing.assert_close(torch.cat([q.mu, q.logvar], dim=1), styles)

    # the rest of the decoder: noise and biases by layer, to_rgb, the mapping
    own = theirs["generator"]
    for k, block in enumerate(networks.decoder.blocks):
        for i, layer in enumerate(block.layers):
            name = f"decode_block.{k}"
            assert torch.equal(layer.strength, own[f"{name}.noise_weight_{i + 1}"].flatten())
            assert torch.equal(layer.bias, own[f"{name}.bias_{i + 1}"].flatten())
            assert torch.equal(layer.style.weight, own[f"{name}.style_{i + 1}.weight"])
        assert torch.equal(block.keep.weight, own[f"{name}.conv_2.weight"])
        assert torch.equal(networks.decoder.to_rgb[k].weight, own[f"to_rgb.{k}.to_rgb.weight"])
        assert k in (0, blocks - 1) or torch.equal(block.grow.weight, own[f"{name}.conv_1.weight"])
    assert torch.equal(networks.decoder.constant, own["const"])
    z = torch.randn(4, D, generator=torch.Generator().manual_seed(4))
    w = z * torch.rsqrt((z**2).mean(dim=1, keepdim=True) + 1e-8)
    for i in range(2):
        weight, bias = (theirs["mapping_fl"][f"map_blocks.{i}.fc.{of}"] for of in ("weight", "bias"))
        w = F.leaky_relu(F.linear(w, weight, bias), 0.2)
    torch.testing.assert_close(networks.decoder.styles({"z": z})[:, 3], w)


RECIPE = """
format = 1
[data]
name = "image_folder"
path = "pictures"
size = 16
[network]
name = "style"
start_channels = 4
max_channels = 8
z_dim = 6
encoder_mapping = 3
decoder_mapping = 2
published = true
[objective]
name = "soft_intro_vae"
[train]
batch = 4
length = "2 steps"
[metrics.reconstruction]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    torch.save(checkpoint(3), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_was_imported_is_used_like_a_run(siv_in, file, tmp_path):
    words = ("import", "style_soft_intro_vae", "model.pth", "recipe.toml", "--run-dir", "run", "--sha256", digest(file))
    done = siv_in(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "not taken: its mean style, optimisers and schedule" in done.stdout + done.stderr
    assert "data 'image_folder' is not at hand" in done.stdout + done.stderr
    averages, raw = siv_core.load(tmp_path / "run"), siv_core.load(tmp_path / "run", weights="raw")
    assert "ema" in averages.name
    found = style_weights.convert(checkpoint(3))
    for model, ending in ((averages, "@ema"), (raw, "")):
        for name, module in (("encoder", model.encoder), ("decoder", model.decoder)):
            state = module.state_dict()
            assert all(torch.equal(state[key], value) for key, value in found.players[name + ending].items())
    assert averages.sample(3).shape == (3, 3, 16, 16)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["imported"]["sha256"] == digest(file)
    assert siv_in(tmp_path, "sample", "run", "-n", "4", "--truncation", "0.7").returncode == 0

    again = siv_in(tmp_path, *words)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    resumed = siv_in(tmp_path, "run", "--resume", "run")
    assert resumed.returncode == 2
    assert "was imported, there is no training to go on with" in resumed.stderr


def test_a_run_can_start_from_it(siv_in, file, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 100, 50)).save(tmp_path / f"pictures/{i}.png")
    sha = digest(file)
    done = siv_in(tmp_path, "import", "style_soft_intro_vae", "model.pth", "recipe.toml", "--run-dir", "run", "--sha256", sha)
    assert done.returncode == 0, done.stderr
    assert "not at hand" not in done.stdout + done.stderr
    measured = siv_in(tmp_path, "evaluate", "run", "--json")
    assert measured.returncode == 0, measured.stderr
    assert any(line["name"] == "mse" and "value" in line for line in json.loads(measured.stdout)["metrics"])
    more = siv_in(tmp_path, "run", "recipe.toml", "--set", "init.run=run", "--set", "optim.lr=1e-30", "--run-dir", "tuned")
    assert more.returncode == 0, more.stderr
    before, after = siv_core.load(tmp_path / "run", weights="raw"), siv_core.load(tmp_path / "tuned")
    assert all(torch.equal(a, b) for a, b in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True))


def test_averages_alone_are_enough():
    found = style_weights.convert(checkpoint(3, raw=False))
    assert found.players.keys() == {"encoder", "decoder", "encoder@ema", "decoder@ema"}
    assert style_weights.convert(checkpoint(3, averages=False)).players.keys() == {"encoder", "decoder"}


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def damaged(state, name, value):
    """One tensor of the decoder is another."""
    assert name in state["models"]["generator"]
    return {"models": {**state["models"], "generator": {**state["models"]["generator"], name: value}}}


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (None, [], "its sha256 is [0-9a-f]{64}: where that is what its publisher says, give --sha256"),
        (None, ["--sha256", "0" * 64], "damaged, its sha256 .* does not begin with 0000"),
        (None, ["--sha256", "12"], "--sha256 12: expected 64 digits"),
        (None, ["--set", "network.z_dim=8"], "network.z_dim: is 8, the weights have 6"),
        (None, ["--set", "network.published=false"], "--set network.published=true"),
        (None, ["--set", "data.size=32", "--set", "data.path=."], "the weights are for 3 × 16 × 16: set data.size"),
        (None, ["--set", "data.size=32", "--set", "data.path=elsewhere"], "data.size: 32, the weights are for 16: set data.size"),
        (None, ["--set", "network.name=mlp"], "network.name"),
        (lambda state: {"model": {}}, [], "it has no 'models', but model"),
        (lambda state: {"models": {"a": {}}}, [], "its models are a"),
        (lambda state: {"models": {**state["models"], "generator": {"const": 3}}}, [], "'const' is none of its tensors"),
        (
            lambda state: {"models": {**state["models"], "generator": {"other": torch.ones(2)}}},
            [],
            "'other' is none of its tensors",
        ),
        (lambda state: {"models": published(3, posterior=1)}, [], "a posterior has 12: an encoder of ALAE itself has none"),
        (lambda state: {"models": {**state["models"], "mapping_fl": {}}}, [], "no checkpoint of style_soft_intro_vae"),
        (lambda state: damaged(state, "to_rgb.1.to_rgb.weight", torch.ones(3)), [], "a to_rgb of it is no convolution"),
        (lambda state: damaged(state, "const", torch.eye(2)), [], r"has shape \[2, 2\], the network needs"),
        (lambda state: {"models": Hostile()}, [], "cannot be read as weights"),
        (lambda state: [1], [], "should be a state dict"),
    ],
)
def test_what_cannot_be_imported(siv_in, file, tmp_path, change, words, told):
    import re

    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    if change:
        torch.save(change(checkpoint(3)), file)
    if change or any("=" in word for word in words):
        words = [*words, "--sha256", digest(file)]
    done = siv_in(tmp_path, "import", "style_soft_intro_vae", "model.pth", "recipe.toml", "--run-dir", "run", *words)
    assert done.returncode == 2, done.stderr + done.stdout
    assert re.search(told, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_format_that_there_is_not(siv_in, file, tmp_path):
    done = siv_in(tmp_path, "import", "style_soft_intro", "model.pth", "recipe.toml", "--run-dir", "run")
    assert done.returncode == 2
    assert "no weights is called 'style_soft_intro'; did you mean 'style_soft_intro_vae'" in done.stderr


def test_tensors_that_do_not_fit_are_named():
    state = checkpoint(3)
    state["models"]["generator"]["decode_block.1.bias_1"] = torch.zeros(1, 3, 1, 1)
    found = style_weights.convert(state)
    networks = style.build(StyleConfig(**found.config), Spec(found.shape))
    from siv_core.store.checkpoint import restore_module

    with pytest.raises(UserError, match=r"tensor 'blocks\.1\.layers\.0\.bias' has shape \[3\], the network needs \[8\]"):
        restore_module(networks.decoder, found.players["decoder"], "model.pth")
