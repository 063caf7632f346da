"""Objectives: a plain VAE and Soft-IntroVAE (IntroVAE is in `intro_vae`). Each is data (`Objective`) over pure functions.

Letters: r(a, b) reconstruction loss of b against a, K_g KL of latent group g, s scale, B_r beta_rec, B_k beta_kl, B_n beta_neg,
g gamma_r, m_g margin, [·]⁺ = max(0, ·), sg stop-gradient, ⟨·⟩ mean over the samples. x data, x_r = D(z) reconstruction,
x_p = D(z_p) sample of the prior; these are the F fakes x_f (or x_p alone is), and x_ff = D(E(x_f)).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core import latents, losses
from siv_core.component import Component, PerGroup, option, per_group
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.latents import Codes
from siv_core.protocols import KEEP_GRAPHS, Batch, Coeffs, Nets, Noise, Objective, Phase, Sources, Spec, Terms
from siv_core.seeding import Streams

REC, FAKE = "rec", "fake"  # x_r and x_p
Made = dict[str, Tensor]  # the two of a phase


def realise(nets: Nets, *, frozen: bool) -> dict[str, Any]:
    """The prior of this phase, {group: Distribution}; frozen: no gradient reaches it."""
    prior: dict[str, Any] = nets["prior"](nets["encoder"])
    return {group: p.detach() for group, p in prior.items()} if frozen else prior


def kl_terms(kind: str, kl: Mapping[str, Tensor]) -> Terms:
    """Named per-sample KLs: over all groups and, where there are several, of each."""
    named = {f"kl_{kind}": losses.total(kl)}
    if len(kl) > 1:
        named.update({f"kl_{kind}.{group}": value for group, value in kl.items()})
    return named


def encoder_phase_fakes(nets: Nets, batch: Batch, noise: Noise, z: Codes, carry: dict[str, Any]) -> tuple[Made, dict[str, Any]]:
    """x_r and x_p of the encoder's phase, and what the decoder's phase needs to have the same ones."""
    decoder_noise, keep = noise["decoder"], bool(carry.get(KEEP_GRAPHS))
    with torch.no_grad():  # neither the prior nor the decoder moves in this phase
        z_p = {g: p.sample(noise["prior"][g], batch.labels) for g, p in realise(nets, frozen=True).items()}
    x_r = nets["decoder"](z, batch.labels, decoder_noise["real"])
    with torch.set_grad_enabled(keep):
        x_p = nets["decoder"](z_p, batch.labels, decoder_noise["prior"])
    made = {REC: x_r, FAKE: x_p}
    return made, {"z": latents.detach(z), "z_p": z_p, **({"made": made} if keep else {})}


def decoder_phase_fakes(nets: Nets, batch: Batch, noise: Noise, carry: dict[str, Any], share_noise: bool) -> Made:
    """x_r and x_p with D's graph alone: those of the encoder's phase, in which D did not move, or of noise of their own."""
    if share_noise and "made" in carry:
        return dict(carry["made"])
    if share_noise:
        z, z_p = carry["z"], carry["z_p"]
    else:
        z = latents.detach(latents.sample(nets["encoder"](*batch), noise["posterior_again"]))
        prior = realise(nets, frozen=True)
        z_p = {group: p.sample(noise["prior_again"][group], batch.labels) for group, p in prior.items()}
    codes = {REC: (z, noise["decoder"]["real"]), FAKE: (z_p, noise["decoder"]["prior"])}
    return {name: nets["decoder"](own, batch.labels, drawn) for name, (own, drawn) in codes.items()}


def checked_fakes(fakes: tuple[str, ...]) -> tuple[str, ...]:
    """These fakes, of which the samples of the prior cannot be left out."""
    if FAKE not in fakes or len(set(fakes)) < len(fakes):
        raise UserError(f'objective.fakes: needs "{FAKE}" and may have "{REC}" beside it, each once, got {list(fakes)}')
    return fakes


def scale_of(scale: float, spec: Spec) -> float:
    """A recipe's `scale`, where 0 stands for 1/(C·H·W)."""
    return scale or 1.0 / spec.dims


# ------------------------------------------------------------------------------------------------------------------------------
# VAE (Kingma & Welling 2014), with the weights of beta-VAE.


@frozen
class VAEConfig:
    beta_rec: float = option(1.0, doc="weight of the reconstruction loss", ge=0)
    beta_kl: PerGroup = option(1.0, doc="weight of the KL, for all latent groups or a table", ge=0)
    scale: float = option(
        0.0, doc="s, multiplies the whole loss; 0: 1/(C·H·W), so that a warm-up hands over without a jump", ge=0
    )


def vae_loss(nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any]) -> tuple[Tensor, Terms, dict[str, Any]]:
    """E, D and the prior descend: s⟨ B_r r(x, x_r) + Σ_g B_k K_g(x) ⟩."""
    x, labels = batch
    prior = realise(nets, frozen=False)
    q = nets["encoder"](x, labels)
    x_r = nets["decoder"](latents.sample(q, noise["posterior"]), labels, noise["decoder"]["real"])
    rec, kl = nets["reconstruction"](x, x_r), losses.kl(q, prior, noise["kl"]["real"])
    loss = c["scale"] * (c["beta_rec"] * rec + losses.weighted(kl, c["beta_kl"]))
    return loss.mean(), {"rec_real": rec, **kl_terms("real", kl), "logvar_real": latents.largest_logvar(q)}, carry


def draw_vae(n: int, streams: Streams, sources: Sources) -> Noise:
    return {
        "posterior": sources.posterior(n, streams, "posterior"),
        "kl": {"real": sources.kl(n, streams, "kl.real")},
        "decoder": {"real": sources.decoder(n, streams, "decoder.real")},
    }


def build_vae(config: VAEConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    return Objective(
        phases=(Phase("vae", ("encoder", "decoder", "prior"), vae_loss),),
        draw=draw_vae,
        coeffs={
            "scale": scale_of(config.scale, spec),
            "beta_rec": config.beta_rec,
            "beta_kl": per_group(config.beta_kl, groups),
        },
    )


# ------------------------------------------------------------------------------------------------------------------------------
# Soft-IntroVAE (Daniel & Tamar 2021, arXiv:2012.13253), Algorithms 1 and 2.


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
        (REC, FAKE), doc="rec: reconstructions, fake: samples; both: Algorithm 2, fake alone: Algorithm 1", choices=(REC, FAKE)
    )
    stop_gradient: str = option(
        "official",
        doc="official: as the published code; paper: as Algorithm 2 says; full: no gradient into or through fakes' targets",
        choices=("official", "paper", "full"),
    )
    share_noise: bool = option(True, doc="both phases use the same prior noise and the same posterior sample")


def soft_encoder_loss(
    nets: Nets,
    batch: Batch,
    noise: Noise,
    c: Coeffs,
    carry: dict[str, Any],
    *,
    fakes: tuple[str, ...],
    stop_gradient: str,
    re_decoder: str = "decoder",
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """E descends: s⟨ B_r r(x, x_r) + Σ_g B_k K_g(x) ⟩ + 1/(Fα) Σ_f ⟨ exp(−α s [ B_r r(x_f, x_ff) + Σ_g B_n K_g(x_f) ]) ⟩.

    E's inputs x_f are detached but for "paper"; the target x_r is detached only by "full" (x_p does not depend on E).
    `re_decoder` makes x_ff.
    """
    x, labels = batch
    prior = realise(nets, frozen=True)
    q = nets["encoder"](x, labels)
    z = latents.sample(q, noise["posterior"])
    made, handed_on = encoder_phase_fakes(nets, batch, noise, z, carry)
    rec, kl = nets["reconstruction"](x, made[REC]), losses.kl(q, prior, noise["kl"]["real"])
    loss = c["scale"] * (c["beta_rec"] * rec + losses.weighted(kl, c["beta_kl"]))
    terms = {"rec_real": rec, **kl_terms("real", kl), "logvar_real": latents.largest_logvar(q)}
    for name in fakes:
        x_f, own = made[name], noise["encoder_phase"][name]
        x_in = x_f if stop_gradient == "paper" else x_f.detach()
        target = x_f.detach() if stop_gradient == "full" else x_f
        q_f = nets["encoder"](x_in, labels)
        x_ff = nets[re_decoder](latents.sample(q_f, own["codes"]), labels, own["decoder"])
        rec_f, kl_f = nets["reconstruction"](target, x_ff), losses.kl(q_f, prior, own["kl"])
        exp_elbo = torch.exp(-c["alpha"] * c["scale"] * (c["beta_rec"] * rec_f + losses.weighted(kl_f, c["beta_neg"])))
        loss = loss + exp_elbo / (len(fakes) * c["alpha"])
        terms.update({f"rec_{name}": rec_f, **kl_terms(name, kl_f), f"exp_elbo_{name}": exp_elbo})
    return loss.mean(), terms, handed_on


def soft_decoder_loss(
    nets: Nets,
    batch: Batch,
    noise: Noise,
    c: Coeffs,
    carry: dict[str, Any],
    *,
    fakes: tuple[str, ...],
    stop_gradient: str,
    share_noise: bool,
    re_decode: bool = True,
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """D descends: s⟨ B_r r(x, x_r) + γ/F Σ_f ( Σ_g B_k K_g(x_f) + g B_r r(x_f, x_ff) ) ⟩, with E as it is after its update.

    r(x_f, x_ff) is r(sg x_f, D(sg z_f)), but for "paper" r(x_f, sg D(z_f)); without `re_decode` (g = 0) it is not computed.
    """
    x, labels = batch
    prior = realise(nets, frozen=True)
    made = decoder_phase_fakes(nets, batch, noise, carry, share_noise)
    rec = nets["reconstruction"](x, made[REC])
    loss = c["beta_rec"] * rec
    terms: Terms = {"rec_real": rec}
    paper = stop_gradient == "paper"
    for name in fakes:
        x_f, own = made[name], noise["decoder_phase"][name]
        q_f = nets["encoder"](x_f, labels)
        kl_f = losses.kl(q_f, prior, own["kl"])
        fake = losses.weighted(kl_f, c["beta_kl"])
        if re_decode:
            z_f = latents.detach(latents.sample(q_f, own["codes"]))
            x_ff = nets["decoder"](z_f, labels, own["decoder"])
            rec_f = nets["reconstruction"](x_f, x_ff.detach()) if paper else nets["reconstruction"](x_f.detach(), x_ff)
            fake = fake + c["gamma_r"] * c["beta_rec"] * rec_f
            terms[f"rec_{name}"] = rec_f
        loss = loss + c["gamma"] / len(fakes) * fake
        terms.update(kl_terms(name, kl_f))
    return (c["scale"] * loss).mean(), terms, carry


def draw_introspective(
    n: int, streams: Streams, sources: Sources, *, fakes: tuple[str, ...], share_noise: bool, re_decode: bool = True
) -> Noise:
    """Every random number of a step of both phases; `re_decode`: fakes are not only encoded, but decoded again."""

    def re_encoding(phase: str, fake: str) -> Noise:
        name = f"{phase}.{fake}"
        own: Noise = {"kl": sources.kl(n, streams, f"kl.{name}")}
        if re_decode:
            own["codes"] = sources.posterior(n, streams, f"codes.{name}")
            own["decoder"] = sources.decoder(n, streams, f"decoder.{name}")
        return own

    noise = {
        "posterior": sources.posterior(n, streams, "posterior"),
        "prior": sources.prior(n, streams, "prior"),
        "kl": {"real": sources.kl(n, streams, "kl.real")},
        "decoder": {name: sources.decoder(n, streams, f"decoder.{name}") for name in ("real", "prior")},
        "encoder_phase": {fake: re_encoding("encoder_phase", fake) for fake in fakes},
        "decoder_phase": {fake: re_encoding("decoder_phase", fake) for fake in fakes},
    }
    if not share_noise:
        noise["posterior_again"] = sources.posterior(n, streams, "posterior_again")
        noise["prior_again"] = sources.prior(n, streams, "prior_again")
    return noise


def build_soft_intro_vae(config: SoftIntroVAEConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    fakes = checked_fakes(config.fakes)
    encoder_loss = partial(soft_encoder_loss, fakes=fakes, stop_gradient=config.stop_gradient)
    decoder_loss = partial(
        soft_decoder_loss,
        fakes=fakes,
        stop_gradient=config.stop_gradient,
        share_noise=config.share_noise,
        re_decode=config.gamma_r > 0,
    )
    return Objective(
        phases=(Phase("encoder", ("encoder",), encoder_loss), Phase("decoder", ("decoder",), decoder_loss)),
        draw=partial(draw_introspective, fakes=fakes, share_noise=config.share_noise),
        coeffs={
            "scale": scale_of(config.scale, spec),
            "alpha": config.alpha,
            "gamma": config.gamma,
            "gamma_r": config.gamma_r,
            "beta_rec": config.beta_rec,
            "beta_kl": per_group(config.beta_kl, groups),
            "beta_neg": per_group(config.beta_neg, groups),
        },
    )


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component("objective", "vae", VAEConfig, build_vae, "a VAE, also as the warm-up stage of another", "arXiv:1312.6114"),
        Component(
            "objective",
            "soft_intro_vae",
            SoftIntroVAEConfig,
            build_soft_intro_vae,
            "the encoder tells real from generated by a soft exponential of the ELBO (Algorithms 1 and 2)",
            "arXiv:2012.13253",
        ),
    ]
