"""Plugins that misbehave once they are loaded: what they raise is told with name, version and place, and costs no other's work.

Loading is in test_catalogue.py. The distribution here is a real one as Python sees it: a module and its metadata in a folder.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from siv_core.cli.console import Screen
from siv_core.cli.main import cli
from siv_core.errors import PluginError, UserError
from siv_core.protocols import Measurement
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe import recipe
from siv_core.runs import check as inspect
from siv_core.runs import session
from siv_core.store.rundir import RunDir
from siv_core.use import evaluate

PLUGIN = """
import torch
from attrs import frozen
from siv_core import Component, Gaussian, Measurement, Networks, Rows, Spec, hookimpl, option

print("hello from a plugin")

@frozen
class Options:
    where: str = option("", doc="where it breaks")

class Encoder(torch.nn.Linear):
    def forward(self, x, labels=None):
        if self.where == "forward":
            raise RuntimeError("the encoder is tired")
        q = super().forward(x.flatten(1)).chunk(2, dim=1)
        forms = {"pair": q, "group": {"y": Gaussian(*q)}, "mu": {"z": q[0]}, "narrow": {"z": Gaussian(q[0][:, :1], q[1])}}
        return forms.get(self.where, {"z": Gaussian(*q)})

class Decoder(torch.nn.Linear):
    def forward(self, codes, labels=None, noise=None):
        if self.where == "torch":
            return torch.cat([codes["z"], codes["z"][:, :1, None]])  # torch itself refuses
        y = super().forward(codes["z"]).unflatten(1, (1, 8, 8))
        return {"half": y[..., :4], "sum": y.sum(), "none": None}.get(self.where, y)

def build_network(config, spec):
    if config.where == "build":
        return 1 / 0
    if config.where == "nothing":
        return None
    encoder, decoder = Encoder(64, 4), Decoder(2, 64)
    encoder.where = decoder.where = config.where
    return Networks(encoder, decoder, {"z": 2})

class Data:
    spec = Spec((1, 8, 8))
    def missing(self): return None
    def prepare(self, progress): pass
    def fingerprint(self): return "0"
    def rows(self, split):
        return {}["no such row"]

class Metric:
    def __init__(self, where): self.where = where
    def needs(self): return []
    def measure(self, model, data, progress):
        if self.where == "measure":
            raise ValueError("cannot count")
        return Measurement({"a": 0.5}, {})

@hookimpl
def siv_components():
    return [
        Component("network", "tired", Options, build_network, "breaks where it is told to"),
        Component("dataset", "rowless", Options, lambda config: Data(), "has no rows"),
        Component("metric", "sick", Options, lambda config, spec, groups, translate: Metric(config.where), "cannot measure"),
        Component("metric", "sane", Options, lambda config, spec, groups, translate: Metric(""), "measures"),
    ]
"""
RECIPE = """
format = 1
[data]
name = "digits"
[network]
name = "tired"
[objective]
name = "vae"
[train]
batch = 8
length = "2 steps"
tick = "1 steps"
"""
OWNER = "plugin 'tired' of siv-tired 0.3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an installed distribution in it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "siv_tired.py").write_text(PLUGIN)
    (folder / "siv_absent.py").write_text("import nothing_of_this_name\n")
    about = folder / "siv_tired-0.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: siv-tired\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text("[siv]\ntired = siv_tired\nabsent = siv_absent\n")
    return folder


@pytest.fixture
def installed(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    return folder


def place(text: str) -> int:
    """Line of PLUGIN with this text."""
    return next(i for i, line in enumerate(PLUGIN.splitlines(), 1) if text in line)


def fails(tmp_path, *sets, recipe=RECIPE):
    """The failure of a run, and what its log says."""
    (tmp_path / "recipe.toml").write_text(recipe)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        session.run(tmp_path / "recipe.toml", run_dir=tmp_path / "run", sets=sets, device="cpu")
    log = tmp_path / "run" / "log.txt"
    return raised.value, log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("sets", "words", "line", "function"),
    [
        ("network.where=forward", "RuntimeError: the encoder is tired", "raise RuntimeError", "forward"),
        ("network.where=torch", "RuntimeError: Tensors must have same number of dimensions", "torch.cat", "forward"),
        ('data={name="rowless"}', "KeyError: 'no such row'", "no such row", "rows"),
    ],
)
def test_an_exception_names_the_plugin_and_the_place(installed, tmp_path, sets, words, line, function):
    error, log = fails(tmp_path, sets)
    assert "Traceback" in log
    assert words in log
    told = catalogues.blame(error)
    assert str(told).startswith(f"{OWNER}: {words}")
    assert str(told).endswith(f" ({installed / 'siv_tired.py'}:{place(line)}, in {function})")
    assert told.exit_code == 1
    if (tmp_path / "run" / "status.json").exists():
        assert RunDir(tmp_path / "run").state() == "failed"


def test_an_exception_while_building_names_the_component_too(installed, tmp_path):
    error, _ = fails(tmp_path, "network.where=build")
    assert isinstance(error, PluginError)
    where = f"({installed / 'siv_tired.py'}:{place('1 / 0')}, in build_network)"
    assert str(error) == f"{OWNER}: ZeroDivisionError: division by zero; while building network 'tired' {where}"
    error, _ = fails(tmp_path, "network.where=nothing")
    assert (
        str(error)
        == f"{OWNER}: network 'tired' built a NoneType, which has no encoder, decoder, groups, translate, batch_statistics"
    )


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("pair", "the encoder gives ([N, 2], [N, 2]), expected {group: Gaussian(mu, logvar)} of z"),
        ("group", "the encoder gives groups y, expected {group: Gaussian(mu, logvar)} of z"),
        ("mu", "the encoder gives [N, 2] for group 'z', expected mu and logvar, both [N, 2]"),
        ("narrow", "the encoder gives ([N, 1], [N, 2]) for group 'z', expected mu and logvar, both [N, 2]"),
        ("half", "the decoder gives [N, 1, 8, 4], expected [N, 1, 8, 8], as data are"),
        ("sum", "the decoder gives a tensor of shape [], expected [N, 1, 8, 8], as data are"),
        ("none", "the decoder gives a NoneType, expected [N, 1, 8, 8], as data are"),
    ],
)
def test_what_networks_give_is_looked_at_before_the_first_step(installed, tmp_path, where, told):
    error, _ = fails(tmp_path, f"network.where={where}")
    assert str(error) == f"{OWNER}: network 'tired': {told}"
    read = recipe.load(tmp_path / "recipe.toml", catalogues.load(), (), [f"network.where={where}"])
    with pytest.raises(PluginError) as raised:
        inspect.check(read, catalogues.load())
    assert str(raised.value) == str(error)


def test_a_bug_of_siv_itself_is_no_plugins(installed):
    with pytest.raises(TypeError) as raised:
        session.Request(nothing=1)
    assert catalogues.blame(raised.value) is None


def test_a_metric_that_raises_loses_neither_the_others_nor_the_run(installed, tmp_path):
    (tmp_path / "recipe.toml").write_text(f'{RECIPE}[metrics.sick]\nwhere = "measure"\n[metrics.sane]\n')
    done = session.run(tmp_path / "recipe.toml", run_dir=tmp_path / "run", device="cpu")
    assert done.state == RunDir(done.path).state() == "finished"
    sick, sane = done.metrics()
    assert (sick["metric"], sick["name"]) == ("sick", "all")
    assert sick["skipped"].startswith(f"failed: {OWNER}: ValueError: cannot count (")
    assert (sane["metric"], sane["name"], sane["value"]) == ("sane", "a", 0.5)
    assert "metric sick failed\nTraceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (Measurement({"a": [1]}, {}), "failed: TypeError: float() argument must be"),
        (Measurement({"a": 1.0}, {"k": {1}}), "failed: TypeError: Object of type set is not JSON serializable"),
        (None, "failed: AttributeError: 'NoneType' object has no attribute 'protocol'"),
    ],
)
def test_a_metric_that_gives_no_measurement_is_skipped(measured, reason):
    metric = SimpleNamespace(measure=lambda model, data, progress: measured)
    log = []
    ([line], _) = evaluate.measure({"m": metric}, None, None, {"by": "run"}, None, log.append)
    assert line["skipped"].startswith(reason)
    assert line["by"] == "run"
    assert log[0].startswith("metric m failed\nTraceback")


def test_the_command_says_it_in_one_line(folder, siv, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    sets = ("--set", "network.where=forward", "--device", "cpu")
    done = siv("run", "recipe.toml", *sets, "--json", env={"PYTHONPATH": str(folder)})
    assert done.returncode == 1
    assert done.stdout == ""  # what the plugin prints does not end up in JSON
    assert "hello from a plugin" in done.stderr
    assert f"error: {OWNER}: RuntimeError: the encoder is tired (" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_traceback_is_shown_when_asked_for(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Screen, "listen", lambda self, at_once: None)  # signals are for processes
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for option in ([], ["--traceback"]):
        with pytest.raises(PluginError, match="division by zero"):
            cli([*option, "check", str(tmp_path / "recipe.toml"), "--set", "network.where=build"], standalone_mode=False)
        assert ("return 1 / 0" in capsys.readouterr().err) == bool(option)


def test_a_traceback_is_kept_for_list_plugins(installed, capsys):
    cli(["list-plugins", "--traceback", "absent"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.startswith("Traceback")
    assert "import nothing_of_this_name" in printed


def test_plugins_left_out_are_listed(installed, capsys, monkeypatch):
    monkeypatch.setenv("SIV_DISABLE", " tired , mpl")
    cli(["list-plugins", "--json"], standalone_mode=False)
    reasons = {entry["plugin"]: entry["reason"] for entry in json.loads(capsys.readouterr().out)["broken"]}
    assert reasons == {
        "absent": f"ModuleNotFoundError: No module named 'nothing_of_this_name' ({installed / 'siv_absent.py'}:1, in <module>)",
        "tired": "left out by SIV_DISABLE",
        "mpl": "SIV_DISABLE names it, there is none; did you mean 'mlp'?",
    }


def test_what_has_no_traceback_is_said(installed, monkeypatch):
    monkeypatch.setenv("SIV_DISABLE", "tired")
    known = catalogues.load()
    assert known.failure("tired").details == ""
    with pytest.raises(UserError, match="plugin 'mlp' is usable: it has no traceback"):
        known.failure("mlp")
    with pytest.raises(UserError, match=r"no plugin is called 'absnt'; did you mean 'absent'\?"):
        known.failure("absnt")


def test_a_recipe_is_told_of_plugins_left_out_that_may_have_its_component(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DISABLE", "pixel_losses")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with pytest.raises(
        UserError, match=r"no reconstruction is called 'mse'.*these plugins, which may have it, are not usable"
    ) as e:
        session.run(tmp_path / "recipe.toml", run_dir=tmp_path / "run", device="cpu")
    assert "plugin 'pixel_losses' of siv" in str(e.value)
    assert "(left out by SIV_DISABLE)" in str(e.value)
