"""Weights `style_soft_intro_vae`: checkpoints of Soft-IntroVAE's published style-based code, for the network `style`.

The layout is that of commit b6dbf16 of taldatech/soft-intro-vae-pytorch, whose writer is ALAE's: `models` holds state dicts
called discriminator (here the encoder), generator (the decoder), mapping_tl and mapping_fl, and averages of each with `_s`.
ALAE's own weights have an encoder without a posterior and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen
from torch import Tensor

from siv_core import Component, Converted, UserError, hookimpl

COARSEST, FUSED_FROM = 4, 128  # pixels a side of the network's first block, and of the first that doubles by itself


@frozen
class NoOptions:
    pass


NAMES = {  # of a tensor in the published code -> here; {k}: a block counted from the coarsest, {i}: a layer
    "encoder": {
        r"encode_block\.(?P<j>\d{1,2})\.conv_(?P<n>[12])\.weight": "blocks.{k}.{nth}.weight",
        r"encode_block\.(?P<j>\d{1,2})\.bias_(?P<n>[12])": "blocks.{k}.{nth}.bias",
        r"encode_block\.(?P<j>\d{1,2})\.style_(?P<n>[12])\.(?P<of>weight|bias)": "blocks.{k}.{nth}_style.{of}",
        r"from_rgb\.(?P<j>\d{1,2})\.from_rgb\.(?P<of>weight|bias)": "from_rgb.{k}.{of}",
    },
    "decoder": {
        r"const": "constant",
        r"decode_block\.(?P<k>\d{1,2})\.conv_1\.weight": "blocks.{k}.grow.weight",
        r"decode_block\.(?P<k>\d{1,2})\.conv_2\.weight": "blocks.{k}.keep.weight",
        r"decode_block\.(?P<k>\d{1,2})\.noise_weight_(?P<n>[12])": "blocks.{k}.layers.{i}.strength",
        r"decode_block\.(?P<k>\d{1,2})\.bias_(?P<n>[12])": "blocks.{k}.layers.{i}.bias",
        r"decode_block\.(?P<k>\d{1,2})\.style_(?P<n>[12])\.(?P<of>weight|bias)": "blocks.{k}.layers.{i}.style.{of}",
        r"to_rgb\.(?P<k>\d{1,2})\.to_rgb\.(?P<of>weight|bias)": "to_rgb.{k}.{of}",
    },
}
MAPPING = {r"map_blocks\.(?P<i>\d{1,2})\.fc\.(?P<of>weight|bias)": "mapping.layers.{i}.{of}"}
PARTS = {"encoder": ("discriminator", "mapping_tl"), "decoder": ("generator", "mapping_fl")}


def convert(state: Mapping[str, Any]) -> Converted:
    """Weights and averages of encoder and decoder, with the mappings that belong to them."""
    models = state.get("models")
    if not isinstance(models, dict):
        raise UserError(f"no checkpoint of style_soft_intro_vae: it has no 'models', but {', '.join(map(str, state))[:200]}")
    players: dict[str, dict[str, Tensor]] = {}
    for player, parts in PARTS.items():
        for ending, name in (("", player), ("_s", f"{player}@ema")):
            if all(isinstance(models.get(part + ending), dict) for part in parts):
                try:
                    players[name] = renamed(player, *(models[part + ending] for part in parts))
                except (IndexError, RuntimeError) as error:  # of tensors that are sparse or have too few dimensions
                    raise UserError(f"no checkpoint of style_soft_intro_vae: its {player}: {error}") from error
    for player in PARTS:  # what was published may have the averages alone
        if f"{player}@ema" in players:
            players.setdefault(player, players[f"{player}@ema"])
    if PARTS.keys() - players.keys():
        raise UserError(f"no checkpoint of style_soft_intro_vae: its models are {', '.join(map(str, models))[:200]}")
    return Converted(
        *sizes_of(players["encoder"], players["decoder"]), players, ("not taken: its mean style, optimisers and schedule",)
    )


def renamed(player: str, network: dict[str, Tensor], mapping: dict[str, Tensor]) -> dict[str, Tensor]:
    """A player's tensors under the names and in the shapes that the network has them in."""
    numbers = [match[1] for name in network if (match := re.fullmatch(r"(?:from|to)_rgb\.(\d{1,2})\..*", str(name)))]
    blocks = 1 + max(map(int, numbers), default=0)
    found: dict[str, Tensor] = {}
    for table, tensors in ((NAMES[player], network), (MAPPING, mapping)):
        for name, value in tensors.items():
            if str(name).endswith("blur.weight"):
                continue
            match, target = next(
                ((m, to) for pattern, to in table.items() if (m := re.fullmatch(pattern, str(name)))), (None, "")
            )
            if match is None or not isinstance(value, Tensor):
                raise UserError(f"no checkpoint of style_soft_intro_vae: '{name}' is none of its tensors")
            known = match.groupdict()
            k = int(known["k"]) if "k" in known else blocks - 1 - int(known.get("j", 0))
            n = int(known.get("n", 1))
            i = known.get("i", n - 1)
            if target.endswith("grow.weight") and COARSEST << k >= FUSED_FROM:
                value = value.transpose(0, 1)
            free = value.ndim == 4 and value.shape[0] == value.shape[2] == value.shape[3] == 1  # [1, C, 1, 1]
            key = target.format(k=k, i=i, nth=("first", "second")[n - 1], of=known.get("of"))
            found[key] = value.flatten() if free and not key.endswith(".weight") else value
    return found


def sizes_of(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The options and the images of these weights."""

    def layers(player: dict[str, Tensor]) -> int:
        return sum(bool(re.fullmatch(r"mapping\.layers\.\d+\.weight", name)) for name in player)

    needed = [(decoder, "to_rgb.0.weight"), (decoder, "mapping.layers.0.weight"), (encoder, "mapping.layers.0.weight")]
    needed += [(encoder, "blocks.0.second.weight")]
    if any(name not in player or player[name].ndim < 2 for player, name in needed):
        raise UserError("no checkpoint of style_soft_intro_vae: a mapping or a network of it is not whole")
    images = [value for k in range(64) if (value := decoder.get(f"to_rgb.{k}.weight")) is not None]
    if any(value.ndim != 4 for value in images):
        raise UserError("no checkpoint of style_soft_intro_vae: a to_rgb of it is no convolution")
    wide = [value.shape[1] for value in images]
    d, last = decoder["mapping.layers.0.weight"].shape[1], encoder[f"mapping.layers.{layers(encoder) - 1}.weight"]
    if last.shape[0] != 2 * d:
        raise UserError(
            f"its mapping_tl gives {last.shape[0]} numbers, a posterior has {2 * d}: an encoder of ALAE itself has none"
        )
    outputs = encoder["blocks.0.second.weight"].shape[0]
    config = {
        "start_channels": wide[-1],
        "max_channels": max(outputs, *wide),
        "z_dim": d,
        "encoder_mapping": layers(encoder),
        "decoder_mapping": layers(decoder),
        "published": True,
    }
    size = COARSEST << (len(wide) - 1)
    return config, (decoder["to_rgb.0.weight"].shape[0], size, size)


@frozen
class Format:
    network: str = "style"

    def convert(self, state: Mapping[str, Any]) -> Converted:
        return convert(state)


@hookimpl
def siv_components() -> list[Component]:
    summary = "checkpoints of the published style-based Soft-IntroVAE, for the network style with published = true"
    return [Component("weights", "style_soft_intro_vae", NoOptions, lambda config: Format(), summary, "arXiv:2012.13253")]
