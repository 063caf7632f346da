"""Objective `bootstrap_soft_intro_vae`: Soft-IntroVAE whose fakes are decoded again by a slowly following copy of the decoder.

From the published code (github.com/taldatech/soft-intro-vae-pytorch, soft_intro_vae_bootstrap; no paper describes it). Letters as
in `siv_core.objectives.introspective`; D⁻ is the target, a copy of D made at the end of epochs 1, k + 1, 2k + 1, …. Unlike there,
D⁻ begins as D and not at random, and a warm-up with the objective `vae` trains D itself. `stop_gradient` concerns the encoder's
phase alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from attrs import evolve, frozen
from torch import Tensor

from siv_core import Component, Objective, Phase, Shadow, Spec, UserError, hookimpl, latents, losses, option
from siv_core.objectives import introspective, soft_intro_vae
from siv_core.objectives.introspective import REC
from siv_core.objectives.soft_intro_vae import SoftIntroVAEConfig
from siv_core.protocols import Batch, Coeffs, Nets, Noise, Terms

TARGET = "target"


@frozen
class BootstrapConfig(SoftIntroVAEConfig):
    gamma_r: float = option(1.0, doc="g, weight of the fakes' reconstruction by the target in the decoder's loss", ge=0)
    copy_epochs: int = option(1, doc="k: the target is copied from the decoder at the end of epochs 1, k + 1, 2k + 1, …", ge=1)


def decoder_loss(
    nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any], *, fakes: tuple[str, ...], share_noise: bool
) -> tuple[Tensor, Terms, dict[str, Any]]:
    """D descends: s⟨ B_r r(x, x_rec) + γ/F Σ_f ( Σ_g B_k K_g(x_f) + g B_r r(x_f, D⁻(z_f)) ) ⟩, z_f ~ E(x_f), nothing detached.

    The gradient reaches D through the target x_f, and through E and D⁻ as well.
    """
    x, labels = batch  # [N, …], [N]
    prior = nets.prior(frozen=True)
    _, made = introspective.decoder_phase_fakes(nets, prior, batch, noise, carry, share_noise=share_noise)
    rec = nets.reconstruction(x, made[REC])  # [N]
    loss = c["beta_rec"] * rec
    terms: Terms = {"rec_real": rec}
    for name in fakes:
        x_f, own = made[name], noise["decoder_phase"][name]  # [N, …]
        q_f = nets.encoder(x_f, labels)  # {g: mu, logvar [N, d_g]}
        kl_f = losses.kl(q_f, prior, own["kl"], labels)  # {g: [N]}
        x_ff = nets.shadows[f"decoder@{TARGET}"](latents.sample(q_f, own["codes"]), labels, own["decoder"])  # [N, …]
        rec_f = nets.reconstruction(x_f, x_ff)  # [N]
        fake = losses.weighted(kl_f, c["beta_kl"]) + c["gamma_r"] * c["beta_rec"] * rec_f
        loss = loss + c["gamma"] / len(fakes) * fake
        terms.update({f"rec_{name}": rec_f, **losses.kl_terms(name, kl_f)})
    return (c["scale"] * loss).mean(), terms, carry


def build(config: BootstrapConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    if config.prior != "fixed":
        raise UserError("objective.prior: the bootstrap form moves no prior: leave it fixed, or take soft_intro_vae")
    base, fakes = soft_intro_vae.build_soft_intro_vae(config, spec, groups), config.fakes
    encoder = partial(
        soft_intro_vae.encoder_loss, fakes=fakes, stop_gradient=config.stop_gradient, re_decoder=f"decoder@{TARGET}"
    )
    decoder = partial(decoder_loss, fakes=fakes, share_noise=config.share_noise)
    return evolve(
        base,
        phases=(Phase("encoder", ("encoder",), encoder), Phase("decoder", ("decoder",), decoder)),
        shadows=(Shadow(TARGET, "decoder", copy_every_epochs=config.copy_epochs, first_copy_epochs=1),),
    )


@hookimpl
def siv_components() -> list[Component]:
    summary = "Soft-IntroVAE whose fakes are decoded again by a target that follows the decoder"
    return [Component("objective", "bootstrap_soft_intro_vae", BootstrapConfig, build, summary)]
