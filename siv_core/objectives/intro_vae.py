"""Objective `intro_vae` (Huang et al. 2018, arXiv:1807.06358): a hard margin on the KL of fakes, in the three published forms.

Letters in `introspective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import frozen
from torch import Tensor

from siv_core import latents, losses
from siv_core.component import Component, PerGroup, option, per_group
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.objectives import introspective
from siv_core.objectives.introspective import PRIOR, REC, Half, Realised
from siv_core.protocols import Batch, Coeffs, Nets, Noise, Objective, Phase, Spec, Terms


@frozen
class Form:
    """What the published forms of IntroVAE differ in."""

    fakes: tuple[str, ...]
    hinge: str  # "sample": [m − K]⁺ of each sample; "batch": of the batch's mean K
    average: str  # over the fakes: "sum" or "mean"
    decoder_weight: str  # of the fakes' K in the decoder's loss: "beta_neg" or "beta_kl"
    hinge_on: str = "kl"  # or "elbo": [m − L]⁺ of the fakes' whole loss L = B_r r + Σ_g B_k K_g, their negative ELBO


PRESETS = {
    "table2": Form((PRIOR,), "sample", "sum", "beta_neg"),
    "introvae": Form((REC, PRIOR), "sample", "sum", "beta_neg"),
    "hhb072": Form((REC, PRIOR), "batch", "mean", "beta_kl"),
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
    fakes: tuple[str, ...] = option(
        (), doc="rec: reconstructions, prior: samples of it; empty: the preset's", choices=(REC, PRIOR)
    )
    hinge: str = option(
        "", doc="on the KL of each sample, or of the batch's mean; empty: the preset's", choices=("", "sample", "batch")
    )
    hinge_on: str = option(
        "kl",
        doc="kl: fakes are pushed by their KL; elbo: by B_r r + B_k K, their negative ELBO; beta_neg and margin are then of that",
        choices=("kl", "elbo"),
    )
    average: str = option("", doc="over the fakes; empty: the preset's", choices=("", "sum", "mean"))
    decoder_weight: str = option(
        "", doc="which beta weighs the fakes' KL for the decoder; empty: the preset's", choices=("", "beta_neg", "beta_kl")
    )
    share_noise: bool = option(True, doc="both phases use the same prior noise and the same posterior sample")


def hinge(kl: Mapping[str, Tensor], margin: Mapping[str, Tensor], weights: Mapping[str, Tensor], kind: str, nets: Nets) -> Tensor:
    """Σ_g B_n [m_g − K_g]⁺ as [N]; kind "batch" has ⟨K_g⟩ in place of each K_g. `kl` may be another energy."""
    own = {group: value if kind == "sample" else nets.mean(value).expand_as(value) for group, value in kl.items()}
    return losses.weighted({group: (margin[group] - value).clamp(min=0.0) for group, value in own.items()}, weights)


def encoder_half(nets: Nets, prior: Realised, batch: Batch, noise: Noise, c: Coeffs, *, form: Form) -> Half:
    """E descends: s⟨ B_r r(x, x_rec) + Σ_g B_k K_g(x) + w Σ_f Σ_g B_n [m_g − K_g(sg x_f)]⁺ ⟩, w = 1 or 1/F; a prior's regulariser
    comes on top. With the hinge on the ELBO, B_n [m − B_r r(sg x_f, D(z_f)) − Σ_g B_k K_g(sg x_f)]⁺, z_f ~ E(sg x_f), are summed.
    """
    x, labels = batch  # [N, …], [N]
    q = nets.posterior(batch, noise)  # {g: mu, logvar [N, d_g]}
    z, made, carry = introspective.encoder_phase_fakes(nets, prior, batch, noise, q)
    rec = nets.reconstruction(x, made[REC])  # [N]
    kl = losses.kl(q, prior, noise["kl"]["real"], labels)  # {g: [N]}
    loss = c["beta_rec"] * rec + losses.weighted(kl, c["beta_kl"])  # [N]
    terms = introspective.real_terms(rec, kl, q)
    for name in form.fakes:
        x_f, own = made[name].detach(), noise["encoder_phase"][name]
        q_f = nets.encoder(x_f, labels)  # {g: mu, logvar [N, d_g]}
        kl_f = losses.kl(q_f, prior, own["kl"], labels)  # {g: [N]}
        terms.update(losses.kl_terms(name, kl_f))
        if form.hinge_on == "elbo":
            rec_f = nets.reconstruction(x_f, nets.decoder(latents.sample(q_f, own["codes"]), labels, own["decoder"]))  # [N]
            energy = c["beta_rec"] * rec_f + losses.weighted(kl_f, c["beta_kl"])  # [N]
            pushed = hinge({"elbo": energy}, {"elbo": c["margin"]}, {"elbo": c["beta_neg"]}, form.hinge, nets)  # [N]
            terms[f"rec_{name}"] = rec_f
        else:
            pushed = hinge(kl_f, c["margin"], c["beta_neg"], form.hinge, nets)  # [N]
        loss = loss + c["average"] * pushed
        terms[f"hinge_{name}"] = pushed
    loss, terms = introspective.regularised(c["scale"] * loss, terms, prior, z, q, noise, c, nets)
    return Half(loss, terms, q, carry)


def decoder_half(
    nets: Nets,
    prior: Realised,
    batch: Batch,
    noise: Noise,
    c: Coeffs,
    carry: dict[str, Any],
    *,
    form: Form,
    share_noise: bool,
    frozen: bool = True,
) -> Half:
    """D descends: s⟨ B_r r(x, x_rec) + w Σ_f Σ_g B K_g(x_f) ⟩, B = B_n or B_k, with E as it is after its update.

    The published code steps E inside the graph that D's gradient then goes through, which today's PyTorch refuses: here the
    fakes are encoded again.
    """
    x, labels = batch  # [N, …], [N]
    q, made = introspective.decoder_phase_fakes(nets, prior, batch, noise, carry, share_noise=share_noise, frozen=frozen)
    rec = nets.reconstruction(x, made[REC])  # [N]
    loss = c["beta_rec"] * rec
    terms: Terms = {"rec_real": rec}
    for name in form.fakes:
        kl_f = losses.kl(nets.encoder(made[name], labels), prior, noise["decoder_phase"][name]["kl"], labels)  # {g: [N]}
        loss = loss + c["average"] * losses.weighted(kl_f, c["beta_fake"])
        terms.update(losses.kl_terms(name, kl_f))
    return Half(c["scale"] * loss, terms, q, carry)


def encoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, form: Form
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """The mean of `encoder_half` under a frozen prior."""
    half = encoder_half(nets, nets.prior(frozen=True), batch, noise, c, form=form)
    return half.loss.mean(), half.terms, half.carry


def decoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, form: Form, share_noise: bool
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """The mean of `decoder_half` under a frozen prior."""
    half = decoder_half(nets, nets.prior(frozen=True), batch, noise, c, carry, form=form, share_noise=share_noise)
    return half.loss.mean(), half.terms, half.carry


def build_intro_vae(config: IntroVAEConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    preset = PRESETS[config.preset]
    form = Form(
        introspective.checked_fakes(config.fakes or preset.fakes),
        config.hinge or preset.hinge,
        config.average or preset.average,
        config.decoder_weight or preset.decoder_weight,
        config.hinge_on,
    )
    on_elbo = form.hinge_on == "elbo"
    hinged = {name: getattr(config, name) for name in ("beta_neg", "margin")}
    for name, value in hinged.items():
        if on_elbo and isinstance(value, Mapping):
            raise UserError(f"objective.{name}: with hinge_on = 'elbo' there is one for all latent groups, a number")
    encoder = partial(encoder_loss, form=form)
    decoder = partial(decoder_loss, form=form, share_noise=config.share_noise)
    return Objective(
        phases=(Phase("encoder", ("encoder",), encoder), Phase("decoder", ("decoder",), decoder)),
        draw=partial(introspective.draw, fakes=form.fakes, share_noise=config.share_noise, re_decode=on_elbo),
        coeffs={
            "scale": losses.scale_of(config.scale, spec),
            "average": 1.0 if form.average == "sum" else 1.0 / len(form.fakes),
            "beta_rec": config.beta_rec,
            "beta_kl": per_group(config.beta_kl, groups),
            **(hinged if on_elbo else {name: per_group(value, groups) for name, value in hinged.items()}),
            "beta_fake": per_group(getattr(config, form.decoder_weight), groups),
        },
        batch_statistic=form.hinge == "batch",
        takes_views=True,
        regularises=True,
    )


@hookimpl
def siv_components() -> list[Component]:
    summary = "the encoder tells real from generated by a hard margin on the KL"
    return [Component("objective", "intro_vae", IntroVAEConfig, build_intro_vae, summary, "arXiv:1807.06358")]
