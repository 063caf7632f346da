"""Plugins are loaded one by one: what is wrong with one is told and stops no other."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from siv_core.errors import UserError
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe.catalogue import load

ROOT = Path(__file__).parent.parent
THIRD_PARTY = Path(__file__).parent / "third_party"

HEAD = """
from attrs import frozen
from siv_core import Component, hookimpl

@frozen
class NoOptions:
    pass

def build(config, spec):
    return MARK
"""


def offering(*names: str, kind: str = "network", mark: str = "'made here'") -> str:
    """The source of a plugin with these components."""
    listed = ", ".join(f"Component({kind!r}, {name!r}, NoOptions, build, 'a test')" for name in names)
    return f"{HEAD.replace('MARK', mark)}\n@hookimpl\ndef siv_components():\n    return [{listed}]\n"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """`plugin(name, source)`: a real module and the entry point of a distribution that offers it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = []

    def make(name: str, source: str, dist: str = "other", entry: str = "", version: str = "1.0") -> EntryPoint:
        module = f"siv_test_{tmp_path.name}_{name}"
        (folder / f"{module}.py").write_text(source)
        made.append(module)
        return of_distribution(EntryPoint(entry or name, module, "siv"), dist, version)

    yield make
    for module in made:
        sys.modules.pop(module, None)


def of_distribution(point: EntryPoint, name: str, version: str) -> EntryPoint:
    vars(point)["dist"] = SimpleNamespace(name=name, version=version)
    return point


def reason(known: catalogues.Catalogue) -> str:
    [failure] = known.failures
    return failure.reason


def test_a_plugin_is_listed_with_its_owner(plugin):
    known = load([plugin("good", offering("net"), version="3.1")])
    assert known.failures == ()
    assert known.names("network") == ["net"]
    assert known.get("network", "net").build(None, None) == "made here"
    assert str(known.owner("network", "net")) == "plugin 'good' of other 3.1"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_of_this_name", ["ModuleNotFoundError", "nothing_of_this_name"]),
        ("1 / 0", ["ZeroDivisionError"]),
        ("raise SystemExit('bye')", ["SystemExit", "bye"]),
        ("def (", ["SyntaxError"]),
        ("x = 1", ["no function siv_components marked with siv_core.hookimpl"]),
        ("def siv_components():\n    return []", ["no function siv_components marked with siv_core.hookimpl"]),
        (HEAD + "@hookimpl\ndef siv_component():\n    return []", ["unknown hook", "siv_component"]),
        (HEAD + "@hookimpl\ndef siv_components():\n    return None", ["siv_components returned nothing"]),
        (HEAD + "@hookimpl\ndef siv_components():\n    return 3", ["TypeError"]),
        (HEAD + "@hookimpl\ndef siv_components():\n    return [3]", ["siv_components returned 3, which is no Component"]),
        (HEAD + "@hookimpl\ndef siv_components():\n    raise ValueError('no licence')", ["ValueError: no licence"]),
        (HEAD + "@hookimpl\ndef siv_components(catalogue):\n    return []", ["catalogue"]),
        (offering("net", kind="netwrok"), ["'net'", "unknown kind 'netwrok'", "did you mean 'network'"]),
        (offering("net", kind="zzzzzz"), ["unknown kind 'zzzzzz'", "known: dataset, metric, network"]),
        (offering("net").replace("NoOptions,", "dict,"), ["network 'net'", "no attrs class"]),
        (offering("net").replace("'net'", "['net']"), ["name", "['net']"]),
        (offering("net", kind="net").replace("'net', ", "None, "), ["kind"]),
    ],
)
def test_what_is_wrong_with_a_plugin_is_told_and_stops_no_other(plugin, source, words):
    bad, good = plugin("bad", source), plugin("good", offering("sound"), dist="zebra")
    known = load([bad, good])
    assert known.failures[0].owner.plugin == "bad"
    for word in words:
        assert word in reason(known)
    assert list(known.components) == [("network", "sound")]
    assert known.get("network", "sound").build(None, None) == "made here"


OWN_CONFIG = """
from attrs import field, frozen, Factory
from siv_core import Component, hookimpl, option

@frozen
class Own:
    FIELD

@hookimpl
def siv_components():
    return [Component('network', 'net', Own, lambda config, spec: None, 'a test')]
"""


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (
            "x: Nowhere = option(1, doc='d')",
            "has an annotation that cannot be resolved (NameError: name 'Nowhere' is not defined)",
        ),
        ("x: 'os.PathLike' = option(1, doc='d')", "has an annotation that cannot be resolved (NameError: name 'os'"),
        ("x = field(default=1)", "option 'x' of its config Own has no type"),
        (
            "x: list[int] = option([1], doc='d')",
            "option 'x' of its config Own has a mutable default, which all recipes would share",
        ),
        ("x: list[int] = field(default=[])", "has a mutable default"),
        ("x: dict[str, int] = field(default={})", "has a mutable default"),
        ("x: int", "option 'x' of its config Own has neither a default nor a doc that says what to give"),
        ("x: int = option(doc='')", "has neither a default nor a doc"),
        (
            "x: object = option(1, doc='d')",
            "option 'x' of its config Own has the type <class 'object'>, which no TOML value becomes",
        ),
        ("x: int = option(1, doc='d', ge=2)", "has a default that is not usable (ValueError: x: 1 is not >= 2)"),
        ("x: int = Factory(lambda: 1 / 0)", "has a default that is not usable (ZeroDivisionError"),
    ],
)
def test_a_broken_config_class_is_told_and_stops_no_other(plugin, field, words):
    source = OWN_CONFIG.replace("FIELD", field)
    if "Nowhere" in field:
        source = "from __future__ import annotations\n" + source
    known = load([plugin("bad", source), plugin("good", offering("sound"), dist="zebra")])
    assert list(known.components) == [("network", "sound")]
    assert reason(known).startswith("network 'net': ")
    assert words in reason(known)
    with pytest.raises(UserError, match=r"plugin 'bad' of other 1.0 is not usable: network 'net'"):
        known.get("network", "net")


def test_the_place_of_a_failed_import_is_told(plugin):
    known = load([plugin("bad", "x = 1\n\ny = {}['key']\n")])
    assert re.fullmatch(r"KeyError: 'key' \(.*_bad.py:3, in <module>\)", reason(known))


def test_a_slow_import_is_told(plugin, monkeypatch):
    monkeypatch.setattr(catalogues, "SLOW_SECONDS", 0.2)
    known = load([plugin("slow", "import time\ntime.sleep(0.3)\n" + offering("a")), plugin("quick", offering("b"))])
    [line] = known.slow
    assert re.fullmatch(r"plugin 'slow' of other 1.0 took 0\.\d s to import: every command waits .*SIV_DISABLE=slow\)", line)


def test_a_failed_import_keeps_its_traceback(plugin):
    known = load([plugin("bad", "import nothing_of_this_name")])
    assert "Traceback" in known.failures[0].details
    assert "import nothing_of_this_name" in known.failures[0].details


def test_one_bad_component_leaves_the_others_of_its_plugin(plugin):
    source = offering("fine").replace("return [", "return [3, ")
    known = load([plugin("mixed", source)])
    assert known.names("network") == ["fine"]
    assert "3, which is no Component" in reason(known)


@pytest.mark.parametrize("listed", ["as it is", "the other way round"])
def test_an_entry_point_name_stays_with_its_first_owner(plugin, listed):
    points = [plugin("one", offering("x"), "alpha", entry="same"), plugin("two", offering("y"), "beta", entry="same")]
    known = load(points if listed == "as it is" else points[::-1])
    assert known.names("network") == ["x"]
    assert known.failures[0].owner.distribution == "beta"
    assert reason(known) == "its name is taken by plugin 'same' of alpha 1.0"


def test_a_component_name_stays_with_its_first_owner(plugin):
    first = plugin("a", offering("net", mark="'first'"), "alpha")
    second = plugin("b", offering("net", "other", mark="'second'"), "beta")
    known = load([second, first])
    assert known.get("network", "net").build(None, None) == "first"
    assert known.get("network", "other").build(None, None) == "second"
    assert reason(known) == "network 'net' is taken by plugin 'a' of alpha 1.0"
    assert known.failures[0].names == ("net",)


def test_siv_itself_comes_before_every_third_party(plugin):
    mine = plugin("zzz", offering("net", mark="'siv'"), "siv")
    stranger = plugin("aaa", offering("net", mark="'stranger'"), "aardvark")
    assert load([stranger, mine]).get("network", "net").build(None, None) == "siv"


def test_the_same_name_under_two_kinds_is_no_clash(plugin):
    known = load([plugin("a", offering("net")), plugin("b", offering("net", kind="prior"))])
    assert known.failures == ()
    assert sorted(known.components) == [("network", "net"), ("prior", "net")]


def test_one_module_under_two_names_is_told(plugin):
    point = plugin("a", offering("net"))
    again = of_distribution(EntryPoint("b", point.value, "siv"), "other", "1.0")
    known = load([point, again])
    assert known.names("network") == ["net"]
    assert known.failures[0].owner.plugin == "b"


def test_siv_disable_leaves_plugins_out(plugin, monkeypatch):
    points = [plugin("one", offering("x")), plugin("two", "1 / 0"), plugin("three", offering("z"))]
    monkeypatch.setenv("SIV_DISABLE", "one,two")
    known = load(points)
    assert known.names("network") == ["z"]
    assert [(f.owner.plugin, f.reason) for f in known.failures] == [
        ("one", "left out by SIV_DISABLE"),
        ("two", "left out by SIV_DISABLE"),
    ]


def test_the_order_of_listing_changes_nothing(plugin):
    points = [plugin(f"p{i}", offering("shared", f"own{i}", mark=str(i)), f"dist{i % 3}") for i in range(6)]
    points += [plugin("broken", "1 / 0", "dist1"), plugin("again", offering("q"), "dist9", entry="p0")]

    def summary(known):
        owners = {key: (str(owner), c.build(None, None)) for key, (c, owner) in known.components.items()}
        return owners, [(str(f.owner), f.reason) for f in known.failures], [str(owner) for owner in known.owners]

    expected = summary(load(points))
    assert len(expected[1]) == 7
    for seed in range(5):
        shuffled = random.Random(seed).sample(points, len(points))
        assert summary(load(shuffled)) == expected


def test_get_says_what_there_is(plugin):
    known = load([plugin("a", offering("residual", "styled"))])
    with pytest.raises(UserError, match="no network is called 'resdual'; did you mean 'residual'"):
        known.get("network", "resdual")
    with pytest.raises(UserError, match="no network is called 'q'; known: residual, styled"):
        known.get("network", "q")


def test_get_quotes_the_failure_behind_a_missing_component(plugin):
    known = load([plugin("resnet", "import nothing_of_this_name"), plugin("a", offering("styled", kind="netwrok"))])
    with pytest.raises(UserError, match=r"plugin 'resnet' of other 1.0 is not usable: ModuleNotFoundError.*nothing_of_this_name"):
        known.get("network", "resnet")
    with pytest.raises(UserError, match=r"plugin 'a' of other 1.0 is not usable.*unknown kind 'netwrok'"):
        known.get("network", "styled")


# -- siv's own plugins -----------------------------------------------------------------------------------------------------------


def test_everything_that_siv_ships_is_usable(catalogue):
    assert [failure for failure in catalogue.failures if failure.owner.distribution == "siv"] == []


def test_entry_points_are_the_plugin_files_and_are_installed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["siv"]
    files = {path.stem: f"siv_plugins.{path.stem}" for path in (ROOT / "plugins").glob("[!_]*.py")}
    own = {name: f"siv_core.objectives.{name}" for name in ("vae", "soft_intro_vae", "intro_vae")}
    assert declared == {**own, **files}
    installed = {point.name: point.value for point in entry_points(group="siv") if point.dist and point.dist.name == "siv"}
    assert installed == declared, "the installed entry points are not those of pyproject.toml: repeat `pip install -e .`"


# -- real packages ---------------------------------------------------------------------------------------------------------------

PACKAGES = ("siv_blobs", "siv_broken", "siv_clash", "siv_clash_name", "siv_misspelt")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """All third-party packages, really built and installed into one folder."""
    folder, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for name in PACKAGES:
        shutil.copytree(THIRD_PARTY / name, folder / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    sources = [str(folder / name) for name in PACKAGES]
    done = subprocess.run([*command, "--target", str(target), *sources], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": str(target)}


@pytest.mark.slow
def test_installed_packages_are_listed_each_with_its_reason(installed, siv):
    done = siv("list-plugins", "--json", env=installed)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = {(entry["kind"], entry["name"]): entry["from"] for entry in report["components"]}
    assert found["network", "blobs"] == "siv-blobs 0.1.0"
    assert found["network", "mlp"].startswith("siv ")
    assert found["network", "fine"] == "siv-clash 0.2.0"
    assert found["dataset", "digits"].startswith("siv ")
    broken = {(entry["plugin"], entry["from"]): entry["reason"] for entry in report["broken"]}
    assert len(broken) == len(report["broken"]) == 4
    assert "a_package_that_is_not_installed" in broken["broken", "siv-broken 0.2.0"]
    assert broken["clash", "siv-clash 0.2.0"].startswith("network 'mlp' is taken by plugin 'mlp' of siv ")
    assert broken["digits", "siv-clash-name 0.2.0"].startswith("its name is taken by plugin 'digits' of siv ")
    assert "unknown hook 'siv_component'" in broken["misspelt", "siv-misspelt 0.2.0"]


@pytest.mark.slow
def test_an_installed_package_trains(installed, siv, tmp_path):
    recipe = tmp_path / "blobs.toml"
    assert siv("recipes", "copy", "siv-blobs/blobs", recipe, env=installed).returncode == 0
    assert recipe.read_bytes() == (THIRD_PARTY / "siv_blobs" / "siv_blobs_recipes" / "blobs.toml").read_bytes()
    done = siv("run", recipe, "--json", env=installed)
    assert done.returncode == 0, done.stderr
    run = Path(json.loads(done.stdout)["run"])
    manifest = json.loads((tmp_path / run / "manifest.json").read_text())
    assert manifest["plugins"]["network blobs"] == "plugin 'blobs' of siv-blobs 0.1.0"
    assert json.loads((tmp_path / run / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / run / "images" / "samples.png").exists()


@pytest.mark.slow
def test_a_recipe_that_needs_a_broken_package_is_told_why(installed, siv, tiny):
    done = siv("run", tiny, "--set", "network.name=broken", env=installed)
    assert done.returncode == 2
    assert "plugin 'broken' of siv-broken 0.2.0 is not usable: ModuleNotFoundError" in done.stderr
    assert "Traceback" not in done.stderr
