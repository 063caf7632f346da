"""The command line as people meet it: real processes, exit codes, standard output and standard error."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import toys
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file
from toys import SMALL

import siv_core
from siv_core.data import datafile
from siv_core.errors import UserError
from siv_core.runs import check as inspect
from siv_core.runs import timing
from siv_core.store import checkpoint
from siv_core.store.rundir import RunDir
from siv_core.use import apply, evaluate, own_pictures

CORE = Path(siv_core.__file__).parent
ROOMS = [f"{room}.{path.stem}" for room in ("cli", "data") for path in sorted((CORE / room).glob("[a-z]*.py"))]
LIGHT = (*ROOMS, "component", "errors", "hookspecs", "recipe.recipe", "recipe.catalogue", "store.rundir", "store.memory")


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2 with these words on standard error, and no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory, siv_in):
    """A folder with the run of a small recipe in it, by the installed command; not to be changed but for its outputs."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(TINY)
    done = siv_in(folder, "run", "tiny.toml", "--device", "cpu", fresh=True)
    return SimpleNamespace(folder=folder, done=done, run=folder / "runs" / "00000-tiny")


# -- what needs no torch ---------------------------------------------------------------------------------------------------------


COMMANDS = ("run", "check", "list-plugins", "describe", "data")
COMMANDS += ("evaluate", "sample", "reconstruct", "interpolate", "translate", "encode")


def test_help_is_quick(siv):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        out = succeeded(siv("--help", fresh=True))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", out, re.MULTILINE), command


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_no_torch(module):
    others = () if module.startswith("data.") else ("numpy", "h5py", "matplotlib", "optuna")  # data files are numpy's
    heavy = ("torch", *others)
    code = f"import sys, siv_core.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", ["run", "check", "describe", "sample", "interpolate", "encode", "data", "data prepare"])
def test_every_command_has_help(siv, command):
    assert "Usage: siv " + command in succeeded(siv(*command.split(), "--help"))


def test_version(siv):
    from importlib.metadata import version

    assert succeeded(siv("--version", fresh=True)).strip() == f"siv, version {version('siv')}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu",), ["No such command 'rnu'"]),
        (("run",), ["give a RECIPE, or --resume RUN"]),
        (("run", "a.toml", "--resume", "b"), ["give a RECIPE, or --resume RUN"]),
        (("run", "--resume", "b", "--dry-run"), ["--resume takes recipe and profiles from the run"]),
        (("run", "a.toml", "--max-time", "8 minutes"), ["expected a time such as 8m, 90s or 1h30m"]),
        (("sample", "run", "-n", "0"), ["-n"]),
        (("sample", "run", "--seed", "-1"), ["--seed"]),
        (("list-plugins", "--kind", "netwrok"), ["no such kind; did you mean 'network'?"]),
        (("describe", "netwrok", "mlp"), ["'netwrok' is no kind; did you mean 'network'?"]),
    ],
)
def test_usage(siv, arguments, words):
    refused(siv(*arguments), *words)


# -- plugins, recipes ------------------------------------------------------------------------------------------------------------


def test_list_plugins(siv, catalogue):
    report = json.loads(succeeded(siv("list-plugins", "--json", fresh=True)))
    assert {(entry["kind"], entry["name"]) for entry in report["components"]} == catalogue.components.keys()
    table = succeeded(siv("list-plugins", "--kind", "network"))
    assert "mlp" in table
    assert "adain" in table
    assert "digits" not in table


def test_describe(siv):
    out = succeeded(siv("describe", "network", "mlp"))
    assert out.startswith("network mlp: fully connected")
    assert "plugin 'mlp' of siv" in out
    for word in ("hidden", "a list", "[256, 256, 256, 256]", ">= 1", "units of the hidden layers"):
        assert word in out


def test_check(siv, tiny):
    done = siv("check", tiny, "--json")
    report = json.loads(succeeded(done))
    assert report["data"] == {"name": "digits", "shape": [1, 8, 8], "value_range": [0.0, 1.0], "factors": {"digit": 10}}
    assert report["groups"] == {"z": 3}
    assert report["parameters"]["encoder"]["all"] == 64 * 16 + 16 + 16 * 6 + 6
    assert report["parameters"]["decoder"]["all"] == 3 * 16 + 16 + 16 * 64 + 64
    assert report["not_at_hand"] == []
    [stage] = report["stages"]
    assert (stage["length"], stage["batch"], stage["objective"]) == ("12 steps", 64, "soft_intro_vae")
    # forward passes of E: 3 with gradients of all weights, and 2 without; matrix products count 2 a multiply-add
    forward = 2 * 64 * (64 * 16 + 16 * 6)
    assert 5 * forward < stage["flops_per_step"] < 60 * forward
    assert not (tiny.parent / "runs").exists()


def test_dry_run(siv, tiny, catalogue):
    from siv_core.recipe.recipe import load

    printed = json.loads(succeeded(siv("run", tiny, "--dry-run", "--set", "train.batch=8")))
    assert printed == load(tiny, catalogue, sets=["train.batch=8"]).resolved()
    assert not (tiny.parent / "runs").exists()


def test_wrong_recipes(siv, tiny, tmp_path):
    refused(siv("run", "nowhere.toml"), "error: nowhere.toml: cannot be read (No such file or directory)")
    tiny.write_text(TINY.replace('"mlp"', '"mpl"').replace("batch", "bacth"))
    done = siv("run", tiny)
    refused(done, "network.name: no network is called 'mpl'; did you mean 'mlp'?", "train.bacth: unknown key")
    assert all(re.match(rf"error: {tiny}:\d+: ", line) for line in done.stderr.splitlines())
    tiny.write_text(TINY)
    refused(siv("run", tiny, "--set", "objective.beta_kl={ x = 1.0 }"), "objective.beta_kl: the groups are z, got x")
    assert not (tmp_path / "runs").exists()


# -- run -------------------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_does(trained):
    out = succeeded(trained.done)
    assert "run directory runs/00000-tiny" in out
    assert "training: 12 of 12 steps to go on cpu" in out
    assert "step 12 of 12  768 images" in out
    assert "finished at step 12, 768 images seen" in out
    assert "latent_probes" in out
    assert trained.done.stderr == ""


def test_a_run_directory_holds_everything(trained):
    run = trained.run
    assert sorted(path.name for path in trained.folder.joinpath("runs").iterdir()) == ["00000-tiny"]
    assert (run / "recipe.toml").read_bytes() == (trained.folder / "tiny.toml").read_bytes()
    formats = {name: json.loads((run / f"{name}.json").read_text())["format"] for name in ("resolved", "manifest", "status")}
    assert formats == {"resolved": 1, "manifest": 2, "status": 2}
    for name in ("stats", "metrics"):
        assert json.loads((run / f"{name}.jsonl").read_text().splitlines()[0]) == {"format": 2}
    assert "finished at step 12" in (run / "log.txt").read_text()
    for name in ("samples", "reconstructions", "curves", "preview_00000001"):
        with Image.open(run / "images" / f"{name}.png") as picture:
            assert min(picture.size) > 64
    assert checkpoint.steps(run / "checkpoints") == [8, 12]
    for step in ("00000008", "00000012"):
        assert checkpoint.problems(run / "checkpoints" / f"step_{step}") == []
        assert json.loads((run / "checkpoints" / f"step_{step}" / "state.json").read_text())["format"] == 1
    assert not list(run.rglob(".siv-tmp-*"))


def test_the_manifest_says_with_what(trained):
    manifest = json.loads((trained.run / "manifest.json").read_text())
    assert manifest["command"][1:] == ["run", "tiny.toml", "--device", "cpu"]
    assert (
        manifest["libraries"]["torch"] == torch.__version__.partition("+")[0]
        or manifest["libraries"]["torch"] == torch.__version__
    )
    assert manifest["plugins"]["network mlp"].startswith("plugin 'mlp' of siv ")
    assert manifest["data"]["name"] == "digits"
    assert len(manifest["data"]["fingerprint"]) == 64
    assert (manifest["recipe"], manifest["seed"], manifest["threads"], manifest["processes"]) == ("tiny", 0, 1, 1)
    assert manifest["parameters"] == {"encoder": 1142, "decoder": 1152, "prior": 0}


def test_statistics_and_metrics_are_lines(trained):
    run = RunDir.existing(trained.run)
    lines = run.read("stats")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["images_seen"] for line in lines] == [192, 384, 576, 768]
    assert {"rec_real", "kl_real", "exp_elbo_prior", "loss", "gradient_norm"} <= lines[0]["phases"]["encoder"].keys()
    metrics = run.read("metrics")
    assert metrics
    for line in metrics:
        assert line["metric"] == "latent_probes"
        assert ("value" in line) != ("skipped" in line)
        assert (line["checkpoint"], line["weights"], line["data"]["name"]) == ("step_00000012", "raw", "digits")
        assert line["protocol"]


def test_a_second_run_gets_the_next_number_and_the_same_weights(trained, siv_in):
    left = RunDir.create(trained.folder / "runs", "left")
    (left.path / "resolved.json").write_text(json.dumps(RunDir(trained.run).resolved()))
    left.status("stopped", step=4)
    done = siv_in(trained.folder, "run", "tiny.toml", "--device", "cpu", "--json", fresh=True)  # with another hash seed
    report = json.loads(succeeded(done))
    assert (report["run"], report["state"]) == ("runs/00002-tiny", "finished")
    assert "runs/00000-tiny is an unfinished" not in done.stderr
    assert report["metrics"] == RunDir(trained.folder / report["run"]).read("metrics")
    assert "step 12 of 12" in done.stderr
    assert "runs/00001-left is an unfinished run of the same recipe: `siv run --resume runs/00001-left` goes on" in done.stderr
    second = trained.folder / report["run"]
    for name in ("encoder", "decoder"):
        path = f"checkpoints/step_00000012/{name}.safetensors"
        assert (trained.run / path).read_bytes() == (second / path).read_bytes()


def test_a_run_is_stopped_in_time_and_continued(siv, tiny, tmp_path):
    run = tmp_path / "here"
    tiny.write_text(TINY.replace('"12 steps"', '"1000000 steps"').replace('"4 steps"', '"100000 steps"'))
    done = siv("run", tiny, "--run-dir", run, "--max-time", "1s", "--device", "cpu", "--json")
    assert json.loads(succeeded(done)) == {"run": str(run), "state": "stopped", "metrics": []}
    [step] = checkpoint.steps(run / "checkpoints")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", step)
    done = siv("run", "--resume", run, "--set", f"train.length={step + 5} steps", "--device", "cpu")
    assert "training: 5 of " in succeeded(done)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert checkpoint.steps(run / "checkpoints")[-1] == step + 5


def test_a_run_directory_that_cannot_be_used(siv, tiny, tmp_path, trained):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused(siv("run", tiny, "--run-dir", "mine"), "mine: holds files that are no siv run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    refused(siv("run", "--resume", "nowhere"), "nowhere: no run here (it has no resolved.json)")
    with RunDir(trained.run).locked():
        refused(siv("run", "--resume", trained.run), "another process is working on this run")


# -- use -------------------------------------------------------------------------------------------------------------------------


def test_sample(trained, siv_in, tmp_path):
    report = json.loads(succeeded(siv_in(trained.folder, "sample", trained.run, "-n", "5", "--seed", "3", "--json")))
    assert report["model"] == "step_00000012, raw weights"
    arrays, picture = (Path(name) for name in report["files"])
    assert (arrays.name, picture.name) == ("samples.safetensors", "samples.png")
    x = load_file(arrays)["samples"]
    assert x.shape == (5, 1, 8, 8)
    assert torch.equal(x, siv_core.load(trained.run, device="cpu").sample(5, seed=3))
    with Image.open(picture) as opened:
        assert opened.size == (2 * 66 + 2, 3 * 66 + 2)
    # nothing is overwritten, and another checkpoint is another model
    before = arrays.read_bytes(), picture.read_bytes()
    out = succeeded(siv_in(trained.folder, "sample", trained.run, "-n", "5", "--seed", "3", "--checkpoint", "8"))
    assert "samples-2.png" in out
    assert (arrays.read_bytes(), picture.read_bytes()) == before
    assert not torch.equal(load_file(arrays.with_name("samples-2.safetensors"))["samples"], x)


def pictures_of_all_kinds(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> size of real picture files; odd sizes and every mode people have."""
    rng = np.random.default_rng(0)
    made = {}
    for i, mode in enumerate(("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")):
        width, height = 8 + 3 * i, 31 - 2 * i
        if mode == "I;16":
            picture = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
        else:
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        name = f"{i}_{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        picture.save(folder / name)
        made[name] = (width, height)
    return made


def test_reconstruct_own_pictures(trained, siv_in, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    sizes = pictures_of_all_kinds(mine)
    (mine / "notes.txt").write_text("no picture")
    Image.new("L", (8, 8), 128).save(tmp_path / "exact.png")
    done = siv_in(trained.folder, "reconstruct", trained.run, mine, tmp_path / "exact.png", "--out", tmp_path / "out", "--json")
    report = json.loads(succeeded(done))
    arrays = load_file(tmp_path / "out" / "reconstructions.safetensors")
    assert arrays["x"].shape == arrays["y"].shape == (len(sizes) + 1, 1, 8, 8)
    assert torch.equal(arrays["x"][-1], torch.full((1, 8, 8), 128 * (1 / 255)))
    done_to = ["RGB converted to L", "put on white", "", "put on white", "P converted to L", "1 converted to L"]
    deep = np.asarray(Image.open(mine / "7_I16.png")).max()
    done_to += ["CMYK converted to L", f"16 bits reduced to 8: 65,535 is white, its highest value {deep:,}"]
    assert report["notes"][0] == f"{mine}: 8 pictures of it taken, not 1 file of another ending (notes.txt)"
    assert report["notes"][1:] == [
        f"{mine / name}: {change}{', ' if change else ''}{width} × {height}, its centre of {min(width, height)} ×"
        f" {min(width, height)} resized to 8 × 8"
        for change, (name, (width, height)) in zip(done_to, sorted(sizes.items()), strict=True)
    ]
    model = siv_core.load(trained.run, device="cpu")
    assert torch.allclose(arrays["y"], model.reconstruct(arrays["x"]), atol=1e-6)
    for x, name in zip(arrays["x"], sorted(sizes), strict=False):
        assert 0.2 < x.mean() < 0.8, f"{name} came out black or white"


def test_wrong_uses(trained, siv_in, tmp_path):
    def siv(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return siv_in(tmp_path, *arguments)

    refused(siv("translate", trained.run), "this model has the latent groups z: translating takes a class and a content group")
    refused(siv("sample", trained.run, "--checkpoint", "5"), "no checkpoint '5'; there are: 8, 12 and last")
    (tmp_path / "text.png").write_text("no picture")
    refused(siv("reconstruct", trained.run, "text.png", "nowhere.png"), "text.png: no picture", "nowhere.png: no picture")


def test_wrong_uses_from_python(trained, tmp_path):
    with pytest.raises(UserError, match="has no averaged weights"):
        siv_core.load(trained.run, weights="ema")
    model = siv_core.load(trained.run, device="cpu")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken: this folder cannot be made"):
        apply.sample(model, tmp_path / "taken", 1, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in this folder"):
        own_pictures.expand([tmp_path / "empty"])
    with pytest.raises(UserError, match="translating takes a class and a content group"):
        evaluate.translated_groups(model)
    with pytest.raises(UserError, match="--device tpu: expected auto, cpu, cuda or cuda:N"):
        siv_core.load(trained.run, device="tpu")


def test_evaluate_adds_lines(trained, siv_in):
    run = RunDir(trained.run)
    before = run.read("metrics")
    report = json.loads(succeeded(siv_in(trained.folder, "evaluate", trained.run, "--checkpoint", "8", "--json")))
    after = run.read("metrics")
    assert after == before + report["metrics"]
    assert {line["checkpoint"] for line in report["metrics"]} == {"step_00000008"}
    assert [line["name"] for line in report["metrics"]] == [line["name"] for line in before]


# -- data ------------------------------------------------------------------------------------------------------------------------


def test_data(siv, tmp_path, monkeypatch):
    data_root = tmp_path / "data"
    monkeypatch.setenv("SIV_DATA", str(data_root))
    report = json.loads(succeeded(siv("data", "ls", "--json")))
    assert report["root"] == str(data_root)
    states = {row["name"]: row["state"] for row in report["datasets"]}
    assert states["digits"] == "at hand, or made when it is needed"
    assert states["hdf5"] == "needs options; see `siv describe dataset hdf5`"
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 5, 5), dtype=np.uint8)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file.create_dataset("images", data=images, compression="gzip")
    assert "data hdf5 is ready: fingerprint " in succeeded(siv("data", "prepare", "hdf5", "--set", f"path={tmp_path / 'own.h5'}"))
    [made] = (data_root / "hdf5").glob("own-*.h5")
    report = json.loads(succeeded(siv("data", "check", made, "--json")))
    assert report["images"] == [12, 1, 5, 5]
    assert (datafile.read(made).images == images).all()
    assert 'images = "images", layout = "NCHW"' in succeeded(siv("data", "check", tmp_path / "own.h5"))
    (tmp_path / "half.h5").write_bytes((tmp_path / "own.h5").read_bytes()[:-9])
    refused(siv("data", "check", tmp_path / "half.h5"), "half.h5: cannot be read as an HDF5 file")
    refused(siv("data", "check", tmp_path / "nowhere"), "nowhere: there is no such file or folder")
    refused(siv("data", "prepare", "digtis"), "no dataset is called 'digtis'; did you mean 'digits'?")


def test_averaged_weights_are_used_where_the_run_kept_them(siv, tmp_path):
    (tmp_path / "tiny.toml").write_text(f'{TINY}\n[shadow]\nhalf_life = "100 images"\n')
    succeeded(siv("run", "tiny.toml", "--run-dir", "run", "--device", "cpu"))
    models = {}
    for weights in ("auto", "raw", "ema"):
        more = () if weights == "auto" else ("--weights", weights)
        models[weights] = json.loads(succeeded(siv("sample", "run", "-n", "1", "--json", *more)))["model"]
    assert models == {name: f"step_00000012, {used} weights" for name, used in (("auto", "ema"), ("raw", "raw"), ("ema", "ema"))}
    assert ": step_00000012, raw weights" in succeeded(siv("evaluate", "run", "--weights", "raw", "--device", "cpu"))


# -- what a run would cost -------------------------------------------------------------------------------------------------------

STAGED = f"""{SMALL}
[objective]
name = "vae"
[train]
batch = 64
[[stages]]
length = "3 epochs"
[[stages]]
length = "5 steps"
objective = {{ name = "soft_intro_vae" }}
"""


def measured(known, text, device="cpu"):
    return inspect.measure(toys.read(known, text), known, torch.device(device), lambda what, done, total: None)


def test_check_measures_each_stage(catalogue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "MEASURED_SECONDS", 0.1)
    found = measured(catalogue, STAGED)
    assert (found["device"], found["data"], found["threads"]) == ("cpu", "digits", 1)
    assert [(stage["objective"], stage["steps"]) for stage in found["stages"]] == [("vae", 66), ("soft_intro_vae", 5)]
    vae, soft = (stage["seconds_per_step"] for stage in found["stages"])
    assert min(vae, soft) > 0
    assert found["seconds"] == pytest.approx(66 * vae + 5 * soft)
    assert found["peak_bytes"] > 2**27
    assert list(tmp_path.iterdir()) == []  # no run, no statistics, no picture


def test_what_is_not_at_hand_is_measured_on_random_numbers(catalogue, monkeypatch):
    monkeypatch.setattr(timing, "MEASURED_SECONDS", 0.1)
    small = STAGED.replace('name = "digits"', 'name = "cars3d"\nsize = 32')
    found = measured(catalogue, small)
    assert found["data"] == "random numbers of the shape [3, 32, 32]"
    assert [stage["steps"] for stage in found["stages"]] == [None, 5]  # how many images an epoch has is not known
    assert found["seconds"] is None
    found = measured(catalogue, small + '[reconstruction]\nname = "vgg_perceptual"\n')
    assert list(found) == ["not_measured"]
    assert found["not_measured"].startswith("the weights of VGG-16 are not at hand")


def test_check_names_the_settings_that_are_faster_here(siv, tmp_path):
    (tmp_path / "r.toml").write_text(STAGED.replace("3 epochs", "3 steps"))
    said = succeeded(siv("check", "r.toml", "--measure", "--device", "cpu", seconds=120))
    assert "keep_graphs = true" in said
    assert 'precision = "bf16"' in said
    assert "compile" not in said.partition("`siv tune`")[0]


def test_the_device_goes_with_measuring(siv, tiny):
    refused(siv("check", tiny, "--device", "cpu"), "--device goes with --measure")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_measured_is_what_a_run_takes(siv, tmp_path):
    """Interleaved with real runs, since other work on the machine changes the speed of both: medians within a quarter.

    Of four pairs; where those are apart, as a machine busy with other things makes them, of up to twelve. The first pair are
    processes of their own, whose memory is theirs alone; the others are forks, which start sooner.
    """
    shipped = Path(__file__).parent.parent / "recipes" / "digits.toml"
    ratios, memory = [], []
    for i in range(12):
        measure = siv("check", shipped, "--measure", "--device", "cpu", "--json", seconds=200, fresh=i == 0)
        told = json.loads(succeeded(measure))["measured"]
        peak = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
        peak += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        command = [sys.executable, "-c", peak, sys.executable, str(Path(sys.executable).parent / "siv"), "run", str(shipped)]
        ticks = ["--set", "train.tick=10 steps"]  # on a busy machine, too, there is more than one
        more = [*ticks, "--run-dir", f"run{i}", "--max-time", "5s", "--device", "cpu", "--json"]
        if i == 0:
            done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=200)
            memory.append(told["peak_bytes"] / (1024 * int(done.stdout.split()[-1])))
        else:
            succeeded(siv("run", shipped, *more, seconds=200))
        lines = RunDir(tmp_path / f"run{i}").read("stats")
        seconds = (lines[-1]["wall"]["seconds"] - lines[0]["wall"]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])
        ratios.append(told["stages"][0]["seconds_per_step"] / seconds)
        if len(ratios) >= 4 and 0.75 < statistics.median(ratios) < 1.25:
            break
    assert 0.75 < statistics.median(ratios) < 1.25, ratios
    assert all(1 / 1.5 < ratio < 1.5 for ratio in memory), memory
