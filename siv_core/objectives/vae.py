"""Objective `vae` (Kingma & Welling 2014), with the weights of beta-VAE; also a warm-up. Letters in `introspective`."""

from __future__ import annotations

from typing import Any

from attrs import frozen
from torch import Tensor

from siv_core import latents, losses
from siv_core.component import Component, PerGroup, option, per_group
from siv_core.hookspecs import hookimpl
from siv_core.protocols import Batch, Coeffs, Nets, Noise, Objective, Phase, Sources, Spec, Terms
from siv_core.seeding import Streams


@frozen
class VAEConfig:
    beta_rec: float = option(1.0, doc="weight of the reconstruction loss", ge=0)
    beta_kl: PerGroup = option(1.0, doc="weight of the KL, for all latent groups or a table", ge=0)
    scale: float = option(
        0.0, doc="s, multiplies the whole loss; 0: 1/(C·H·W), so that a warm-up hands over without a jump", ge=0
    )


def vae_loss(nets: Nets, batch: Batch, noise: Noise, c: Coeffs, carry: dict[str, Any]) -> tuple[Tensor, Terms, dict[str, Any]]:
    """E, D and the prior descend: s⟨ B_r r(x, x_rec) + Σ_g B_k K_g(x) ⟩."""
    x, labels = batch  # [N, …], [N]
    prior = nets.prior(frozen=False)
    q = nets.posterior(batch, noise)  # {g: mu, logvar [N, d_g]}
    x_rec = nets.decoder(latents.sample(q, noise["posterior"]), labels, noise["decoder"]["rec"])  # [N, …]
    rec = nets.reconstruction(x, x_rec)  # [N]
    kl = losses.kl(q, prior, noise["kl"]["real"], labels)  # {g: [N]}
    loss = c["scale"] * (c["beta_rec"] * rec + losses.weighted(kl, c["beta_kl"]))  # [N]
    terms = {"rec_real": rec, **losses.kl_terms("real", kl), "logvar_real": latents.largest_logvar(q)}
    return loss.mean(), terms, carry


def draw(n: int, streams: Streams, sources: Sources) -> Noise:
    return {
        "posterior": sources.posterior(n, streams, "posterior"),
        "kl": {"real": sources.kl(n, streams, "kl.real")},
        "decoder": {"rec": sources.decoder(n, streams, "decoder.rec", "rec")},
    }


def build_vae(config: VAEConfig, spec: Spec, groups: dict[str, int]) -> Objective:
    return Objective(
        phases=(Phase("vae", ("encoder", "decoder", "prior"), vae_loss),),
        draw=draw,
        coeffs={
            "scale": losses.scale_of(config.scale, spec),
            "beta_rec": config.beta_rec,
            "beta_kl": per_group(config.beta_kl, groups),
        },
        takes_views=True,
    )


@hookimpl
def siv_components() -> list[Component]:
    summary = "a VAE, also as the warm-up stage of another"
    return [Component("objective", "vae", VAEConfig, build_vae, summary, "arXiv:1312.6114")]
