"""What introspective objectives share: the fakes x_rec and x_prior of a step, its noise, and what a half of it hands on.

Letters of all objectives: r(a, b) reconstruction loss of b against a, K_g KL of latent group g, s scale, B_r beta_rec,
B_k beta_kl, B_n beta_neg, g gamma_r, m_g margin, [·]⁺ = max(0, ·), sg stop-gradient, ⟨·⟩ mean over the samples. x data,
x_rec = D(z) reconstruction, x_prior = D(z_prior) sample of the prior; these are the F fakes x_f (or x_prior alone is), and
x_ff = D(E(x_f)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siv_core import latents, losses
from siv_core.errors import UserError
from siv_core.latents import Codes, Posterior
from siv_core.protocols import Batch, Coeffs, Distribution, Nets, Noise, Sources, Terms
from siv_core.seeding import Streams

REC, PRIOR = "rec", "prior"  # x_rec and x_prior
Fakes = dict[str, Tensor]  # the two of a phase, [N, …]
Realised = Mapping[str, Distribution]  # group -> the prior of this phase, frozen or not

# The ends of the streams' names. A stream is seeded by its name, and figures were published when x_prior was called the fake
STREAMS = {REC: "rec", PRIOR: "fake"}


class Half(NamedTuple):
    """The encoder's or the decoder's half of a step, before the mean over the samples."""

    loss: Tensor  # [N]
    terms: Terms
    q: Posterior  # of the data; with gradient in the encoder's half, in the decoder's that of z
    carry: dict[str, Any]


def sample_prior(prior: Realised, noise: Noise, labels: Tensor | None) -> Codes:
    """z_prior {group: [N, d_g]}; with gradient to a prior that is not frozen."""
    return {group: p.sample(noise[group], labels) for group, p in prior.items()}


def encoder_phase_fakes(
    nets: Nets, prior: Realised, batch: Batch, noise: Noise, q: Posterior
) -> tuple[Codes, Fakes, dict[str, Any]]:
    """z ~ q, x_rec and x_prior of the encoder's phase, and what the decoder's phase needs to have the same ones."""
    labels, decoder_noise = batch.labels, noise["decoder"]
    z = latents.sample(q, noise["posterior"])  # {g: [N, d_g]}
    with torch.no_grad():
        z_prior = sample_prior(prior, noise["prior"], labels)  # {g: [N, d_g]}
    x_rec = nets.decoder(z, labels, decoder_noise[REC])  # [N, …]
    with torch.set_grad_enabled(nets.keep_graphs):  # D does not move in this phase
        x_prior = nets.decoder(z_prior, labels, decoder_noise[PRIOR])  # [N, …]
    fakes = {REC: x_rec, PRIOR: x_prior}
    carry = {"q": latents.detach_posterior(q), "z": latents.detach(z), "z_prior": z_prior}
    return z, fakes, {**carry, "fakes": fakes} if nets.keep_graphs else carry


def decoder_phase_fakes(
    nets: Nets, prior: Realised, batch: Batch, noise: Noise, carry: dict[str, Any], *, share_noise: bool, frozen: bool = True
) -> tuple[Posterior, Fakes]:
    """q of the data, and x_rec and x_prior with D's graph alone: those of the encoder's phase, in which D did not move, or of
    noise of their own. Where the prior is not `frozen`, x_prior has its graph too."""
    labels, decoder_noise = batch.labels, noise["decoder"]
    handed_on = bool(carry) and share_noise  # nothing is where the encoder has nothing to learn: its phase is left out
    q = carry["q"] if handed_on else latents.detach_posterior(nets.posterior(batch, noise))
    kept = carry.get("fakes", {}) if handed_on else {}
    if kept and frozen:
        return q, dict(kept)
    suffix = "" if share_noise else "_again"
    z = carry["z"] if handed_on else latents.sample(q, noise[f"posterior{suffix}"])
    z_prior = carry["z_prior"] if handed_on and frozen else sample_prior(prior, noise[f"prior{suffix}"], labels)
    x_rec = kept[REC] if kept else nets.decoder(z, labels, decoder_noise[REC])  # [N, …]
    return q, {REC: x_rec, PRIOR: nets.decoder(z_prior, labels, decoder_noise[PRIOR])}


def real_terms(rec: Tensor, kl: Mapping[str, Tensor], q: Posterior) -> Terms:
    """What is told of the data in an encoder's phase."""
    return {"rec_real": rec, **losses.kl_terms("real", kl), "logvar_real": latents.largest_logvar(q)}


def still(prior: Realised) -> dict[str, Distribution]:
    """The same priors without a gradient to them."""
    return {group: p.detach() for group, p in prior.items()}


def regularised(
    loss: Tensor, terms: Terms, prior: Realised, z: Codes, q: Posterior, noise: Noise, c: Coeffs, nets: Nets
) -> tuple[Tensor, Terms]:
    """With s Σ_g R_g(z) on top, where priors ask for it of the encoder; they come detached, since none moves for it."""
    asked = losses.regulariser(prior, z, q, noise["kl"]["real"], nets.mean)
    if asked is None:
        return loss, terms
    return loss + c["scale"] * asked, {**terms, "regulariser": asked.expand(len(loss))}


def checked_fakes(fakes: tuple[str, ...]) -> tuple[str, ...]:
    """These fakes, of which the samples of the prior cannot be left out."""
    if PRIOR not in fakes or len(set(fakes)) < len(fakes):
        raise UserError(f'objective.fakes: needs "{PRIOR}" and may have "{REC}" beside it, each once, got {list(fakes)}')
    return fakes


def draw(
    n: int, streams: Streams, sources: Sources, *, fakes: tuple[str, ...], share_noise: bool, re_decode: bool = True
) -> Noise:
    """Every random number of a step of both phases; `re_decode`: fakes are not only encoded, but decoded again."""

    def re_encoding(phase: str, fake: str) -> Noise:
        name = f"{phase}.{STREAMS[fake]}"
        own: Noise = {"kl": sources.kl(n, streams, f"kl.{name}")}
        if re_decode:
            own["codes"] = sources.posterior(n, streams, f"codes.{name}")
            own["decoder"] = sources.decoder(n, streams, f"decoder.{name}", "again")
        return own

    noise = {
        "posterior": sources.posterior(n, streams, "posterior"),
        "prior": sources.prior(n, streams, "prior"),
        "kl": {"real": sources.kl(n, streams, "kl.real")},
        "decoder": {use: sources.decoder(n, streams, f"decoder.{use}", use) for use in (REC, PRIOR)},
        "encoder_phase": {fake: re_encoding("encoder_phase", fake) for fake in fakes},
        "decoder_phase": {fake: re_encoding("decoder_phase", fake) for fake in fakes},
    }
    if not share_noise:
        noise["posterior_again"] = sources.posterior(n, streams, "posterior_again")
        noise["prior_again"] = sources.prior(n, streams, "prior_again")
    return noise
