"""A sampled KL to a mixture by products of matrices against the naive form, interleaved: `just bench-prior`.

K = 100 modes, S = 100 draws, batch 32, d = 128: the sizes of CIFAR-10 in "Prior Learning in Introspective VAEs". The naive form
has [S·B, K, d] in memory. `--peak naive|products` prints the bytes that a value with its gradients adds to the peak.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from siv_plugins.mixture import Mixture

from siv_core.latents import Gaussian
from siv_core.losses import sampled_kl

K, S, B, D = 100, 100, 32, 128


def inputs():
    generator = torch.Generator().manual_seed(0)
    q = Gaussian(torch.randn(B, D, generator=generator).requires_grad_(), torch.randn(B, D, generator=generator).requires_grad_())
    mu, logvar = torch.randn(K, D, generator=generator).requires_grad_(), torch.randn(K, D, generator=generator).requires_grad_()
    return q, Gaussian(mu, logvar), torch.randn(B, S, D, generator=generator)


def naive(q, parts, noise):
    mu, logvar = parts

    def log_prob(z):
        each = -0.5 * ((z[:, None] - mu).square() / logvar.exp() + logvar + math.log(2 * math.pi)).sum(dim=2)
        return torch.logsumexp(each, dim=1) - math.log(K)

    return sampled_kl(log_prob, q, noise)


def products(q, parts, noise):
    return Mixture(parts, torch.full((K,), -math.log(K))).kl(q, noise)


FORMS = {"naive": naive, "products": products}


def once(form, q, parts, noise):
    value = form(q, parts, noise)
    return value, torch.autograd.grad(value.sum(), [*q, *parts])


def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", choices=FORMS)
    asked = parser.parse_args().peak
    torch.set_num_threads(1)
    q, parts, noise = inputs()
    if asked:
        small = Gaussian(q.mu[:1], q.logvar[:1])
        once(FORMS[asked], Gaussian(*(x.detach().requires_grad_() for x in small)), parts, noise[:1, :1])  # what is loaded once
        before = peak()
        once(FORMS[asked], q, parts, noise)
        print(peak() - before)
        return
    times = {name: [] for name in FORMS}
    for _ in range(5):
        for name, form in FORMS.items():
            started = time.perf_counter()
            once(form, q, parts, noise)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in medians.items()), end="; ")
    print(f"products take {medians['products'] / medians['naive']:.3f} of the naive form's time")


if __name__ == "__main__":
    main()
