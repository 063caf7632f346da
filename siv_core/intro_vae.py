"""IntroVAE (Huang et al. 2018, arXiv:1807.06358): a hard margin on the KL of fakes, in the three forms that were published.

Letters as in `objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import frozen
from torch import Tensor

from siv_core import latents, losses, objectives
from siv_core.component import Component, PerGroup, option, per_group
from siv_core.hookspecs import hookimpl
from siv_core.objectives import FAKE, REC
from siv_core.protocols import Batch, Coeffs, Nets, Noise, Objective, Phase, Spec, Terms


@frozen
class Form:
    """What the published forms of IntroVAE differ in."""

    fakes: tuple[str, ...]
    hinge: str  # "sample": [m − K]⁺ of each sample; "batch": of the batch's mean K
    average: str  # over the fakes: "sum" or "mean"
    decoder_weight: str  # of the fakes' K in the decoder's loss: "beta_neg" or "beta_kl"


PRESETS = {
    "table2": Form((FAKE,), "sample", "sum", "beta_neg"),
    "introvae": Form((REC, FAKE), "sample", "sum", "beta_neg"),
    "hhb072": Form((REC, FAKE), "batch", "mean", "beta_kl"),
}


@frozen
class IntroVAEConfig:
    preset: str = option(
        "introvae",
        doc="introvae: the paper's (its α is beta_neg, its β is 2 beta_rec, beta_kl 1); table2: as in Soft-IntroVAE's 2-D"
        " comparison (section 9.1.1); hhb072: the published PyTorch code's",
        choices=tuple(PRESETS),
    )
    beta_rec: float = option(0.25, doc="B_r, weight of the reconstruction loss", ge=0)
    beta_kl: PerGroup = option(1.0, doc="B_k, weight of the KL of data (encoder), or a table", ge=0)
    beta_neg: PerGroup = option(0.25, doc="B_n, weight of the hinge on the KL of fakes, or a table", ge=0)
    margin: PerGroup = option(10.0, doc="m: fakes are pushed away until their KL is this, in nats; or a table", ge=0)
    scale: float = option(1.0, doc="s, multiplies the losses; 0: 1/(C·H·W)", ge=0)
    fakes: tuple[str, ...] = option((), doc="rec: reconstructions, fake: samples; empty: the preset's", choices=(REC, FAKE))
    hinge: str = option(
        "", doc="on the KL of each sample, or of the batch's mean; empty: the preset's", choices=("", "sample", "batch")
    )
    average: str = option("", doc="over the fakes; empty: the preset's", choices=("", "sum", "mean"))
    decoder_weight: str = option(
        "", doc="which beta weighs the fakes' KL for the decoder; empty: the preset's", choices=("", "beta_neg", "beta_kl")
    )
    share_noise: bool = option(True, doc="both phases use the same prior noise and the same posterior sample")


def hinge(kl: Mapping[str, Tensor], margin: Mapping[str, Tensor], weights: Mapping[str, Tensor], kind: str) -> Tensor:
    """Σ_g B_n [m_g − K_g]⁺ as [N]; kind "batch" has ⟨K_g⟩ in place of each K_g."""
    own = {group: value if kind == "sample" else value.mean().expand_as(value) for group, value in kl.items()}
    return losses.weighted({group: (margin[group] - value).clamp(min=0.0) for group, value in own.items()}, weights)


def intro_encoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, form: Form
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """E descends: s⟨ B_r r(x, x_r) + Σ_g B_k K_g(x) + w Σ_f Σ_g B_n [m_g − K_g(sg x_f)]⁺ ⟩, w = 1 or 1/F."""
    x, labels = batch
    prior = objectives.realise(nets, frozen=True)
    q = nets["encoder"](x, labels)
    z = latents.sample(q, noise["posterior"])
    made, handed_on = objectives.encoder_phase_fakes(nets, batch, noise, z, carry)
    rec, kl = nets["reconstruction"](x, made[REC]), losses.kl(q, prior, noise["kl"]["real"])
    loss = c["beta_rec"] * rec + losses.weighted(kl, c["beta_kl"])
    terms = {"rec_real": rec, **objectives.kl_terms("real", kl), "logvar_real": latents.largest_logvar(q)}
    for name in form.fakes:
        kl_f = losses.kl(nets["encoder"](made[name].detach(), labels), prior, noise["encoder_phase"][name]["kl"])
        pushed = hinge(kl_f, c["margin"], c["beta_neg"], form.hinge)
        loss = loss + c["average"] * pushed
        terms.update({**objectives.kl_terms(name, kl_f), f"hinge_{name}": pushed})
    return (c["scale"] * loss).mean(), terms, handed_on


def intro_decoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, form: Form, share_noise: bool
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """D descends: s⟨ B_r r(x, x_r) + w Σ_f Σ_g B K_g(x_f) ⟩, B = B_n or B_k, with E as it is after its update.

    The published code steps E inside the graph that D's gradient then goes through, which today's PyTorch refuses: here the
    fakes are encoded again.
    """
    x, labels = batch
    prior = objectives.realise(nets, frozen=True)
    made = objectives.decoder_phase_fakes(nets, batch, noise, carry, share_noise)
    rec = nets["reconstruction"](x, made[REC])
    loss = c["beta_rec"] * rec
    terms: Terms = {"rec_real": rec}
    for name in form.fakes:
        kl_f = losses.kl(nets["encoder"](made[name], labels), prior, noise["decoder_phase"][name]["kl"])
        loss = loss + c["average"] * losses.weighted(kl_f, c[form.decoder_weight])
        terms.update(objectives.kl_terms(name, kl_f))
    return (c["scale"] * loss).mean(), terms, carry


def build_intro_vae(config: IntroVAEConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    preset = PRESETS[config.preset]
    form = Form(
        objectives.checked_fakes(config.fakes or preset.fakes),
        config.hinge or preset.hinge,
        config.average or preset.average,
        config.decoder_weight or preset.decoder_weight,
    )
    encoder_loss = partial(intro_encoder_loss, form=form)
    decoder_loss = partial(intro_decoder_loss, form=form, share_noise=config.share_noise)
    return Objective(
        phases=(Phase("encoder", ("encoder",), encoder_loss), Phase("decoder", ("decoder",), decoder_loss)),
        draw=partial(objectives.draw_introspective, fakes=form.fakes, share_noise=config.share_noise, re_decode=False),
        coeffs={
            "scale": objectives.scale_of(config.scale, spec),
            "average": 1.0 if form.average == "sum" else 1.0 / len(form.fakes),
            "beta_rec": config.beta_rec,
            "beta_kl": per_group(config.beta_kl, groups),
            "beta_neg": per_group(config.beta_neg, groups),
            "margin": per_group(config.margin, groups),
        },
        batch_statistic=form.hinge == "batch",
    )


@hookimpl
def siv_components() -> list[Component]:
    summary = "the encoder tells real from generated by a hard margin on the KL"
    return [Component("objective", "intro_vae", IntroVAEConfig, build_intro_vae, summary, "arXiv:1807.06358")]
