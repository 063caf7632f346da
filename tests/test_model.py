"""A model in use: what it shares with a training, images in bounded memory, likelihoods with known answers."""

from __future__ import annotations

import gc
import json
import math

import numpy as np
import pytest
import torch
import toys
from torch import nn

from siv_core.errors import Stopped, UserError
from siv_core.latents import Gaussian
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Measurement, Spec
from siv_core.runs import session, watchers
from siv_core.store.checkpoint import Checkpoint
from siv_core.testing import _ToyPrior
from siv_core.train.trainer import Trainer
from siv_core.use import pictures

CPU = torch.device("cpu")


def test_a_model_of_a_training_is_its_modules(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree(shadow={}))
    assert t.run() == "finished"
    raw, ema = t.model("raw"), t.model("auto")
    assert raw.encoder is t.players["encoder"].module
    averages = {follower.key: follower.module for follower in t.followers}
    assert ema.encoder is averages["encoder@ema"]
    assert ema.decoder is averages["decoder@ema"]
    assert ema.priors is t.players["prior"].module  # has nothing to average
    assert (raw.name, ema.name) == ("step_00000004, raw weights", "step_00000004, ema weights")
    before = {name: toys.weights(t, name) for name in t.players}
    x = torch.rand(3, 1, 8, 8)
    ema.sample(3), ema.reconstruct(x), ema.energy(x), ema.log_weights(x, 2)
    assert all(toys.same(before[name], toys.weights(t, name)) for name in t.players)
    assert all(player.module.training for player in t.players.values())
    assert not torch.equal(raw.sample(3), ema.sample(3))


def linear_model(dim: int = 2, data: int = 3) -> tuple[Model, torch.Tensor, torch.Tensor]:
    """p(z) = N(0, I), p(x ∣ z) = N(W z + b, ½ I), and an encoder that is not its posterior."""
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(data, dim, generator=generator), torch.randn(data, generator=generator)

    class E(nn.Module):
        def forward(self, x, labels=None):
            return {"z": Gaussian((x - b) @ w / 4, torch.full((len(x), dim), -0.5))}

    class D(nn.Module):
        def forward(self, codes, labels=None, noise=None):
            return codes["z"] @ w.T + b

    def squared(x, y):
        return (x - y).square().sum(dim=1)

    spec = Spec((data,), kind="array")
    return Model(E(), D(), Priors({"z": _ToyPrior()}), spec, {"z": dim}, None, CPU, squared), w, b


def test_importance_weights_give_the_likelihood_of_a_linear_model():
    model, w, b = linear_model()
    x = b + torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    covariance = w @ w.T + 0.5 * torch.eye(3)  # exp(−‖x − D(z)‖²) is a Gaussian of variance ½
    exact = torch.distributions.MultivariateNormal(b.double(), covariance.double()).log_prob(x.double())
    constant = -1.5 * math.log(math.pi)
    draws = 2000
    weights = model.log_weights(x, draws) + constant
    assert weights.shape == (5, draws)
    assert weights.dtype == torch.float64
    bound = torch.logsumexp(weights, dim=1) - math.log(draws)
    shares = weights.softmax(dim=1)
    error = (shares.square().sum(dim=1)).sqrt()  # one over the root of the effective number of draws
    assert ((bound - exact).abs() < 5 * error).all(), (bound, exact, error)
    assert (weights.mean(dim=1) < exact - 0.1).all()  # one draw at a time is the ELBO, which the encoder's error costs
    # the betas of an objective: a decoder of variance 1/(2 beta_rec)
    covariance = w @ w.T + torch.eye(3)
    exact = torch.distributions.MultivariateNormal(b.double(), covariance.double()).log_prob(x.double())
    weights = model.log_weights(x, draws, beta_rec=0.5) - 1.5 * math.log(2 * math.pi)
    bound, error = torch.logsumexp(weights, dim=1) - math.log(draws), weights.softmax(dim=1).square().sum(dim=1).sqrt()
    assert ((bound - exact).abs() < 5 * error).all()


def test_a_reconstruction_loss_that_is_not_at_hand_is_told():
    model, _, _ = linear_model()

    class Absent:
        def missing(self):
            return "download its weights"

        def __call__(self, x, y):
            raise AssertionError

    from attrs import evolve

    with pytest.raises(UserError, match="download its weights"):
        evolve(model, reconstruction=Absent()).log_weights(torch.zeros(1, 3), 1)


@pytest.mark.parametrize(("n", "batch"), [(0, 10), (5, 10), (700, 256), (700, 100), (700, 1000), (512, 256), (513, 64)])
def test_samples_in_pieces_are_those_of_one_call(catalogue, tmp_path, n, batch):
    model = toys.trainer(catalogue, tmp_path, toys.tree()).model()
    pieces = list(model.samples(n, batch, seed=3))
    assert torch.equal(torch.cat(pieces), model.sample(n, seed=3))
    assert [len(piece) for piece in pieces] == [batch] * (n // batch) + ([n % batch] if n % batch or not n else [])
    assert not any(piece.requires_grad for piece in pieces)


def test_many_samples_are_never_there_at_once():
    side = 64

    class D(nn.Module):
        alive = 0
        most = 0

        def forward(self, codes, labels=None, noise=None):
            import weakref

            x = codes["z"].new_zeros(len(codes["z"]), 1, side, side) + noise
            D.alive += len(x)
            D.most = max(D.most, D.alive)
            weakref.finalize(x, self.gone, len(x))
            return x

        def gone(self, n):
            D.alive -= n

        def draw(self, n, generator, use):
            return torch.randn(n, 1, side, side, generator=generator)

    decoder = D()
    model = Model(nn.Identity(), decoder, Priors({"z": _ToyPrior()}), Spec((1, side, side)), {"z": 2}, None, CPU, torch.sub)
    total, first = 0, []
    for images in model.samples(5000, 200):
        total += len(images)
        first.append(images[0].clone())
    assert total == 5000
    assert D.most < 1024
    assert len({float(image.sum()) for image in first}) == len(first)  # each batch has noise of its own


def test_a_conditional_model_translates_and_combines(catalogue, tmp_path):
    """Two groups and labels: an image is decoded with the label of its class image."""
    from siv_core.protocols import Batch
    from siv_core.use.evaluate import translation

    class E(nn.Module):
        def forward(self, x, labels):
            return {g: Gaussian(labels[:, None].float(), torch.zeros(len(x), 1)) for g in ("class", "content")}

    class D(nn.Module):
        def forward(self, codes, labels, noise=None):
            return (100 * labels[:, None] + 10 * codes["class"] + codes["content"])[:, :, None, None].expand(-1, 1, 2, 2)

    spec = Spec((1, 2, 2), classes=10, conditional=True)
    priors = Priors({"class": _ToyPrior(), "content": _ToyPrior()})
    model = Model(E(), D(), priors, spec, {"class": 1, "content": 1}, ("class", "content"), CPU, torch.sub)
    x = torch.zeros(2, 1, 2, 2)
    classes, contents = torch.tensor([1, 2]), torch.tensor([3, 4])
    cells = translation(model, Batch(x, classes), Batch(x, contents)).cells[:, 0, 0, 0]
    assert cells.tolist() == [113, 114, 223, 224]
    made = model.combine({"class": x, "content": x}, {"class": classes, "content": contents})
    assert made[:, 0, 0, 0].tolist() == [113, 224]
    with pytest.raises(UserError, match="takes a label for each image"):
        model.combine({"class": x, "content": x})


# -- metrics in the middle of training -------------------------------------------------------------------------------------------

RECIPE = (
    toys.SOFT
    + """
[shadow]
half_life = "200 images"
[train]
batch = 64
length = "12 steps"
tick = "3 steps"
preview = "5 steps"
checkpoint = "4 steps"
keep_every = 1
"""
)


@pytest.fixture(autouse=True)
def blank_curves(monkeypatch):
    """Drawing them takes longer than all the rest of these runs, and is not what is tried here."""
    blank = np.full((4, 4, 3), 255, np.uint8)
    monkeypatch.setattr(pictures, "curves", lambda path, lines, stages: pictures.save_png(path, blank))


PROBES = '[metrics.latent_probes]\nclass_factor = "digit"\n'


def ran(folder, text, name, **more):
    (folder / f"{name}.toml").write_text(text)
    said = []

    class Listener(watchers.Silent):
        def say(self, line):
            said.append(line)

    return session.run(folder / f"{name}.toml", run_dir=folder / name, device="cpu", watcher=Listener(), **more).path, said


def lines_of(run, name="metrics"):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()][1:]


def test_a_metric_in_the_middle_changes_no_bit_and_has_its_lines(tmp_path):
    plain, _ = ran(tmp_path, RECIPE + PROBES, "plain")
    watched, said = ran(tmp_path, RECIPE + PROBES + 'every = "320 images"\n', "watched")
    for step in (4, 8, 12):
        states = [json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())["files"] for run in (plain, watched)]
        assert states[0] == states[1]
    lines = [{key: value for key, value in line.items() if key not in ("wall", "by", "checkpoint")} for line in lines_of(watched)]
    own = [line for line in lines_of(watched) if line["by"] == "training"]
    assert sorted({line["step"] for line in own}) == [5, 10]
    assert all(line["weights"] == "ema" and line["checkpoint"] is None and line["wall"]["seconds"] >= 0 for line in own)
    end = [{key: value for key, value in line.items() if key not in ("wall", "by", "checkpoint")} for line in lines_of(plain)]
    assert [line for line in lines if line["step"] == 12] == end
    told = [line for line in said if "measured in" in line]
    assert len(told) == 2
    assert told[0].startswith("step 5: latent_probes measured in ")


def test_a_metric_in_the_middle_is_that_of_the_checkpoint(tmp_path, siv):
    run, _ = ran(tmp_path, RECIPE + PROBES + 'every = "4 steps"\n', "run")
    during = {line["name"]: line["value"] for line in lines_of(run) if line["step"] == 8}
    done = siv("evaluate", run, "--checkpoint", "8", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert {line["name"]: line["value"] for line in json.loads(done.stdout)["metrics"]} == during


def test_a_stopped_run_measures_what_is_due_once(tmp_path):
    text = RECIPE + PROBES + 'every = "2 steps"\n'
    whole, _ = ran(tmp_path, text, "whole")
    parts, _ = ran(tmp_path, text, "parts", max_seconds=1e-9)  # after the first step
    assert json.loads((parts / "status.json").read_text())["state"] == "stopped"
    ran(tmp_path, text, "parts")
    strip = lambda run: [{k: v for k, v in line.items() if k != "wall"} for line in lines_of(run)]  # noqa: E731
    assert strip(parts) == strip(whole)


class Impatient(watchers.Silent):
    """Asks for an end while the first metric is taken, as a signal does, and again wherever progress is shown."""

    def __init__(self):
        self.signum = 0

    def progress(self, what, done, total):
        if what.startswith("latent probes"):
            self.signum = 15
        if self.signum:
            raise Stopped(self.signum)

    def asked_to_stop(self):
        return self.signum


def test_a_stop_during_a_metric_waits_for_its_end_and_a_checkpoint(tmp_path):
    text = RECIPE.replace('"4 steps"', '"100 steps"') + PROBES + 'every = "3 steps"\n'
    whole, _ = ran(tmp_path, text, "whole")
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(Stopped):
        session.run(tmp_path / "r.toml", run_dir=tmp_path / "stopped", device="cpu", watcher=Impatient())
    stopped = tmp_path / "stopped"
    assert [line["step"] for line in lines_of(stopped)] == [3] * len(lines_of(stopped))
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_00000004"]  # the wish is seen at the next step
    session.resume(stopped, device="cpu")
    ours, theirs = ([{**line, "wall": None} for line in lines_of(run)] for run in (stopped, whole))
    assert ours == theirs


def test_the_run_that_was_started_from_does_not_stay_in_memory(tmp_path, monkeypatch):
    first, _ = ran(tmp_path, RECIPE, "first")
    held = []

    def watched(self, *arguments):
        held.append([one for one in gc.get_objects() if type(one) is Checkpoint])
        return loop(self, *arguments)

    loop = Trainer.loop
    monkeypatch.setattr(Trainer, "loop", watched)
    ran(tmp_path, RECIPE + f'[init]\nrun = "{first}"\n', "second")
    assert held == [[]]


def test_a_metric_that_cannot_draw_costs_its_picture_alone(tmp_path, monkeypatch):
    from siv_plugins import density2d

    def draw(self, models, data, seed, count):
        raise RuntimeError("no ink")

    monkeypatch.setattr(density2d.Density2D, "draw", draw)
    monkeypatch.setattr(density2d, "GRID", 20)
    monkeypatch.setattr(density2d, "DATA_POINTS", 100)
    text = """
format = 1
[data]
name = "toy2d"
[network]
name = "mlp"
hidden = [8]
[objective]
name = "vae"
[train]
batch = 32
length = "4 steps"
preview = "2 steps"
[metrics.density2d]
redraws = 2
clean_samples = 1000
"""
    run, _ = ran(tmp_path, text, "run")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert lines_of(run)
    assert "no ink" in (run / "log.txt").read_text()
    assert not list(run.glob("images/preview*"))


def test_every_is_read_and_checked(tmp_path, siv):
    (tmp_path / "r.toml").write_text(RECIPE + PROBES + 'every = "often"\n')
    done = siv("check", "r.toml")
    assert done.returncode == 2
    assert "metrics.latent_probes.every: expected a length" in done.stderr
    (tmp_path / "r.toml").write_text(RECIPE + PROBES + 'every = "2 epochs"\n')
    done = siv("run", "r.toml", "--dry-run")
    assert json.loads(done.stdout)["metrics"]["latent_probes"]["every"] == "2 epochs"


def test_pictures_of_a_metric_are_kept(tmp_path, catalogue, monkeypatch, siv):
    from PIL import Image
    from siv_plugins import latent_probes

    picture = np.full((4, 6, 3), 7, np.uint8)
    monkeypatch.setattr(
        latent_probes.LatentProbes, "measure", lambda self, model, data, progress: Measurement({"x": 1.0}, {}, {"shown": picture})
    )
    run, _ = ran(tmp_path, RECIPE + PROBES + 'every = "6 steps"\n', "run")
    for name in ("latent_probes_shown", "latent_probes_shown_00000006"):
        assert np.array_equal(np.asarray(Image.open(run / f"images/{name}.png")), picture)
    from siv_core.runs import opened, record

    one = opened.open_run(run, "last", "auto", "cpu")
    for expected in ("latent_probes_shown.png", "latent_probes_shown-2.png"):
        about = record.measured_as(one.built, one.model, "evaluate", one.step)
        record.append_metrics(one.built, one.built.metrics(), one.model, one.run_dir, about, watchers.Silent(), None)
        assert (run / "outputs" / expected).exists()
