"""Objective `soft_intro_vae` (Daniel & Tamar 2021, arXiv:2012.13253), Algorithms 1 and 2. Letters in `introspective`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core import latents, losses
from siv_core.component import Component, PerGroup, option, per_group
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.objectives import introspective
from siv_core.objectives.introspective import PRIOR, REC, Half, Realised
from siv_core.protocols import Batch, Coeffs, Nets, Noise, Objective, Phase, Spec, Terms

PLAYS_WITH = ("fixed", "decoder", "encoder")


@frozen
class SoftIntroVAEConfig:
    beta_rec: float = option(1.0, doc="B_r, weight of the reconstruction loss", ge=0)
    beta_kl: PerGroup = option(1.0, doc="B_k, weight of the KL of data (encoder) and of fakes (decoder), or a table", ge=0)
    beta_neg: PerGroup = option(
        256.0, doc="B_n, weight of the KL inside the exponential: the repulsion of fakes, or a table", ge=0
    )
    gamma_r: float = option(1e-8, doc="g, weight of the fakes' reconstruction in the decoder's loss; 0 leaves it out", ge=0)
    alpha: float = option(2.0, doc="of the exponential ELBO (equation 4)", gt=0)
    gamma: float = option(1.0, doc="weight of the fakes' ELBO in the decoder's loss (equation 4)", ge=0)
    scale: float = option(0.0, doc="s, multiplies every ELBO; 0: 1/(C·H·W)", ge=0)
    fakes: tuple[str, ...] = option(
        (REC, PRIOR),
        doc="rec: reconstructions, prior: samples of it; both: Algorithm 2, prior alone: Algorithm 1",
        choices=(REC, PRIOR),
    )
    stop_gradient: str = option(
        "official",
        doc="official: as the published code; paper: as Algorithm 2 says; full: no gradient into or through fakes' targets",
        choices=("official", "paper", "full"),
    )
    share_noise: bool = option(True, doc="both phases use the same prior noise and the same posterior sample")
    prior: str = option(
        "fixed", doc="whom the prior plays with, moved in the same phase: nobody, the decoder or the encoder", choices=PLAYS_WITH
    )
    prior_samples: bool = option(
        True, doc="with the decoder: what its KL of x_prior wants moves the prior too, through the codes"
    )


def encoder_half(
    nets: Nets,
    prior: Realised,
    batch: Batch,
    noise: Noise,
    c: Coeffs,
    *,
    fakes: tuple[str, ...],
    stop_gradient: str,
    re_decoder: str = "",
) -> Half:
    """E descends: s⟨ B_r r(x, x_rec) + Σ_g B_k K_g(x) ⟩ + 1/(Fα) Σ_f ⟨ exp(−α s [ B_r r(x_f, x_ff) + Σ_g B_n K_g(x_f) ]) ⟩.

    E's inputs x_f are detached but for "paper"; the target x_rec is detached only by "full" (x_prior does not depend on E).
    The shadow `re_decoder`, or D, makes x_ff. A prior's regulariser comes on top. A prior that learns does so from K_g(x) alone.
    """
    still = introspective.still(prior)
    x, labels = batch  # [N, …], [N]
    again = nets.shadows[re_decoder] if re_decoder else nets.decoder
    q = nets.posterior(batch, noise)  # {g: mu, logvar [N, d_g]}
    z, made, carry = introspective.encoder_phase_fakes(nets, prior, batch, noise, q)
    rec = nets.reconstruction(x, made[REC])  # [N]
    kl = losses.kl(q, prior, noise["kl"]["real"], labels)  # {g: [N]}
    loss = c["scale"] * (c["beta_rec"] * rec + losses.weighted(kl, c["beta_kl"]))  # [N]
    terms = introspective.real_terms(rec, kl, q)
    for name in fakes:
        x_f, own = made[name], noise["encoder_phase"][name]  # [N, …]
        x_in = x_f if stop_gradient == "paper" else x_f.detach()
        target = x_f.detach() if stop_gradient == "full" else x_f
        q_f = nets.encoder(x_in, labels)
        x_ff = again(latents.sample(q_f, own["codes"]), labels, own["decoder"])  # [N, …]
        rec_f = nets.reconstruction(target, x_ff)  # [N]
        kl_f = losses.kl(q_f, still, own["kl"], labels)  # {g: [N]}
        exp_elbo = torch.exp(-c["alpha"] * c["scale"] * (c["beta_rec"] * rec_f + losses.weighted(kl_f, c["beta_neg"])))  # [N]
        loss = loss + exp_elbo / (len(fakes) * c["alpha"])
        terms.update({f"rec_{name}": rec_f, **losses.kl_terms(name, kl_f), f"exp_elbo_{name}": exp_elbo})
    loss, terms = introspective.regularised(loss, terms, still, z, q, noise, c, nets)
    return Half(loss, terms, q, carry)


def decoder_half(
    nets: Nets,
    prior: Realised,
    batch: Batch,
    noise: Noise,
    c: Coeffs,
    carry: dict[str, Any],
    *,
    fakes: tuple[str, ...],
    stop_gradient: str,
    share_noise: bool,
    re_decode: bool = True,
    learns: bool = False,
    samples: bool = False,
) -> Half:
    """D descends: s⟨ B_r r(x, x_rec) + γ/F Σ_f ( Σ_g B_k K_g(x_f) + g B_r r(x_f, x_ff) ) ⟩, with E as it is after its update.

    r(x_f, x_ff) is r(sg x_f, D(sg z_f)), but for "paper" r(x_f, sg D(z_f)); without `re_decode` (g = 0) it is not computed.
    A prior that `learns` with D descends the same and s⟨ Σ_g B_k KL[sg q_g(z ∣ x) ‖ p_g] ⟩, with q of before E's update;
    K_g(x_f) is against sg p_g, so that it moves the prior by way of the codes of x_prior, if `samples`, and no other.
    """
    x, labels = batch  # [N, …], [N]
    q, made = introspective.decoder_phase_fakes(nets, prior, batch, noise, carry, share_noise=share_noise, frozen=not samples)
    still = introspective.still(prior)
    rec = nets.reconstruction(x, made[REC])  # [N]
    loss = c["beta_rec"] * rec
    terms: Terms = {"rec_real": rec}
    paper = stop_gradient == "paper"
    for name in fakes:
        x_f, own = made[name], noise["decoder_phase"][name]  # [N, …]
        q_f = nets.encoder(x_f, labels)  # {g: mu, logvar [N, d_g]}
        kl_f = losses.kl(q_f, still, own["kl"], labels)  # {g: [N]}
        fake = losses.weighted(kl_f, c["beta_kl"])  # [N]
        if re_decode:
            z_f = latents.detach(latents.sample(q_f, own["codes"]))
            x_ff = nets.decoder(z_f, labels, own["decoder"])  # [N, …]
            rec_f = nets.reconstruction(x_f, x_ff.detach()) if paper else nets.reconstruction(x_f.detach(), x_ff)
            fake = fake + c["gamma_r"] * c["beta_rec"] * rec_f
            terms[f"rec_{name}"] = rec_f
        loss = loss + c["gamma"] / len(fakes) * fake
        terms.update(losses.kl_terms(name, kl_f))
    if learns:
        before = carry.get("q", q)  # the encoder's phase is left out where it has nothing to learn
        kl = losses.kl(before, prior, noise["kl"]["real"], labels)  # {g: [N]}, nothing to D
        loss = loss + losses.weighted(kl, c["beta_kl"])
        terms.update(losses.kl_terms("fit", kl))
    return Half(c["scale"] * loss, terms, q, carry)


def encoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, learns: bool = False, **settings: Any
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """The mean of `encoder_half`; the prior is frozen unless it `learns` with E."""
    half = encoder_half(nets, nets.prior(frozen=not learns), batch, noise, c, **settings)
    return half.loss.mean(), half.terms, half.carry


def decoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, learns: bool = False, **settings: Any
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """The mean of `decoder_half`; the prior is frozen unless it `learns` with D."""
    half = decoder_half(nets, nets.prior(frozen=not learns), batch, noise, c, carry, learns=learns, **settings)
    return half.loss.mean(), half.terms, half.carry


def build_soft_intro_vae(config: SoftIntroVAEConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    fakes = introspective.checked_fakes(config.fakes)
    if config.prior == "decoder" and config.prior_samples and config.stop_gradient == "paper" and config.gamma_r:
        told = "a reconstruction would move the prior, whose samples are its target"
        remedy = 'take "official" or "full", gamma_r = 0 or prior_samples = false'
        raise UserError(f'objective.stop_gradient: "paper": {told}: {remedy}')
    if config.prior != "decoder" and not config.prior_samples:
        raise UserError(f'objective.prior_samples: with prior = "{config.prior}" codes move no prior: leave it out')
    common: dict[str, Any] = {"fakes": fakes, "stop_gradient": config.stop_gradient}
    with_encoder, with_decoder = (config.prior == player for player in ("encoder", "decoder"))
    encoder = partial(encoder_loss, **common, learns=with_encoder)
    how: dict[str, Any] = {"share_noise": config.share_noise, "re_decode": config.gamma_r > 0, "learns": with_decoder}
    decoder = partial(decoder_loss, **common, **how, samples=with_decoder and config.prior_samples)
    return Objective(
        phases=(
            Phase("encoder", ("encoder", "prior") if with_encoder else ("encoder",), encoder),
            Phase("decoder", ("decoder", "prior") if with_decoder else ("decoder",), decoder),
        ),
        draw=partial(introspective.draw, fakes=fakes, share_noise=config.share_noise),
        coeffs={
            "scale": losses.scale_of(config.scale, spec),
            "alpha": config.alpha,
            "gamma": config.gamma,
            "gamma_r": config.gamma_r,
            "beta_rec": config.beta_rec,
            "beta_kl": per_group(config.beta_kl, groups),
            "beta_neg": per_group(config.beta_neg, groups),
        },
        prior_learns=config.prior != "fixed",
        takes_views=True,
        regularises=True,
    )


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component(
            "objective",
            "soft_intro_vae",
            SoftIntroVAEConfig,
            build_soft_intro_vae,
            "the encoder tells real from generated by a soft exponential of the ELBO (Algorithms 1 and 2)",
            "arXiv:2012.13253",
        )
    ]
