"""Recipes: what they mean, and what is said of wrong ones, all of it at once and with dotted keys."""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import toys
from attrs import fields, frozen
from hypothesis import given
from hypothesis import strategies as st

from siv_core.component import PerGroup, option
from siv_core.errors import UserError
from siv_core.recipe import build
from siv_core.recipe.convert import Length, describe, plain, structure
from siv_core.recipe.options import Train
from siv_core.recipe.overrides import lines_of, merge, overlay, paths, setting
from siv_core.recipe.recipe import Recipe, dataset_choice, differences, load, with_each_profile

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))

BASE = (
    toys.SOFT
    + """
[optim]
lr = 1e-3
[train]
batch = 64
length = "12 steps"
"""
)


@pytest.fixture
def read(catalogue, tmp_path):
    """`read(text, profiles, sets, cpu_only=…)`: the recipe in a real file."""

    def read(text: str, profiles: Any = (), sets: Any = (), cpu_only: bool = False) -> Recipe:
        path = tmp_path / "some.toml"
        path.write_text(text)
        return load(path, catalogue, profiles, sets, cpu_only=cpu_only)

    return read


@pytest.fixture
def problems(read):
    """What is said of a wrong recipe, without the file's name and line."""

    def problems(text: str, **more: Any) -> list[str]:
        with pytest.raises(UserError) as error:
            read(text, **more)
        told = [re.fullmatch(r".*some\.toml(?::\d+)?: (.*)|(--set .*)", line) for line in error.value.problems]
        assert all(told)
        return [match[1] or match[2] for match in told if match]

    return problems


def changed(line: str, table: str = "train") -> str:
    """BASE with a line more in a table."""
    return BASE.replace(f"[{table}]\n", f"[{table}]\n{line}\n")


# -- what a recipe means ---------------------------------------------------------------------------------------------------------


def test_a_recipe_with_every_default(read):
    recipe = read(BASE)
    assert recipe.name == "some"
    assert recipe.source.decode() == BASE
    assert (recipe.data.kind, recipe.data.name, recipe.data.config.held_out) == ("dataset", "digits", 397)
    assert [(choice.name, choice.config.hidden) for choice in recipe.network] == [("mlp", (16,))]
    assert recipe.reconstruction.name == "mse"
    assert {group: choice.name for group, choice in recipe.prior.items()} == {"": "standard_normal"}
    [stage] = recipe.stages
    assert (stage.length, stage.batch, stage.size, stage.fade) == (Length(12, "steps"), 64, None, 0.0)
    assert (stage.objective.name, stage.objective.config.beta_neg) == ("soft_intro_vae", 4.0)
    assert (stage.optim[""].lr, stage.optim[""].betas) == (1e-3, (0.9, 0.999))
    assert (recipe.shadow, recipe.metrics, recipe.init, recipe.profiles, recipe.sets) == (None, {}, None, (), ())


def test_resolved_is_json_with_every_default(read, catalogue):
    text = BASE + '[shadow]\n[metrics.latent_probes]\nclass_factor = "digit"\n[optim.decoder]\nlr = 0.5\n'
    resolved = read(text).resolved()
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    assert resolved["format"] == 1
    names = {field.name for field in fields(Train)}
    assert resolved["train"].keys() == names - {"length"}
    [stage] = resolved["stages"]
    assert stage["length"] == "12 steps"
    assert stage["optim"]["all"] == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert stage["optim"]["decoder"]["lr"] == 0.5
    for tree, (kind, name) in (
        (resolved["data"], ("dataset", "digits")),
        (resolved["network"], ("network", "mlp")),
        (stage["objective"], ("objective", "soft_intro_vae")),
        (resolved["metrics"]["latent_probes"], ("metric", "latent_probes")),
    ):
        options = {row["option"] for row in describe(catalogue.get(kind, name).config)}
        assert tree.keys() == options | {"name"}
    assert resolved["prior"] == {"all": {"name": "standard_normal"}}
    averaged = {"of": ["encoder", "decoder", "prior"], "half_life": "10000 images"}
    assert resolved["shadow"] == {**averaged, "warm_up": 0.0, "buffers": "copy"}


def test_encoder_and_decoder_of_two_components(read):
    halves = '[network]\nencoder = { name = "mlp", z_dim = 3 }\ndecoder = { name = "mlp", z_dim = 3, hidden = [4] }\n'
    recipe = read(BASE.replace('[network]\nname = "mlp"\nz_dim = 3\nhidden = [16]\n', halves))
    assert [choice.config.hidden for choice in recipe.network] == [(256,) * 4, (4,)]
    resolved = recipe.resolved()["network"]
    assert resolved["encoder"]["hidden"] == [256] * 4
    assert resolved["decoder"]["hidden"] == [4]


def test_priors_by_group(read):
    recipe = read(BASE + '[prior.z]\nname = "standard_normal"\n')
    assert sorted(recipe.prior) == ["", "z"]
    assert sorted(read(BASE + '[prior]\nname = "standard_normal"\n').prior) == [""]


def test_players_have_the_common_optimiser_settings_unless_they_say_otherwise(read):
    [stage] = read(changed("eps = 1e-3", "optim") + "[optim.encoder]\nlr = 0.25\n").stages
    assert (stage.optim["encoder"].lr, stage.optim["encoder"].eps) == (0.25, 1e-3)
    assert (stage.optim[""].lr, stage.optim[""].eps) == (1e-3, 1e-3)


# -- merging ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"t": {"a": 1, "b": {"c": 1, "d": 1}}}, {"t": {"b": {"d": 2}}}, {"t": {"a": 1, "b": {"c": 1, "d": 2}}}),
        ({"t": {"name": "x", "a": 1}}, {"t": {"b": 2}}, {"t": {"name": "x", "a": 1, "b": 2}}),
        ({"t": {"name": "x", "a": 1}}, {"t": {"name": "x", "b": 2}}, {"t": {"name": "x", "a": 1, "b": 2}}),
        ({"t": {"name": "x", "a": 1}}, {"t": {"name": "y", "b": 2}}, {"t": {"name": "y", "b": 2}}),
        ({"l": [1, 2, 3]}, {"l": [4]}, {"l": [4]}),
        ({"l": [{"a": 1}]}, {"l": [{"b": 1}]}, {"l": [{"b": 1}]}),
        ({"t": {"a": 1}}, {"t": 5}, {"t": 5}),
        ({"t": 5}, {"t": {"a": 1}}, {"t": {"a": 1}}),
    ],
)
def test_merge(base, over, merged):
    before = copy.deepcopy((base, over))
    result = merge(base, over)
    assert result == merged
    result.setdefault("t", {})
    assert (base, over) == before


def values() -> Any:
    return st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=2))


TREES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), values(), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.one_of(values(), inner), max_size=3),
    max_leaves=8,
)


@given(TREES, TREES, TREES)
def test_merging_without_names_and_conflicts_of_shape_is_associative(a, b, c):
    """(a < b) < c is a < (b < c), unless a table gives way to a value in between, which forgets what was below it."""

    def gives_way(x, y):
        shared = x.keys() & y.keys()
        return any(
            isinstance(x[k], dict) != isinstance(y[k], dict) or (isinstance(x[k], dict) and gives_way(x[k], y[k])) for k in shared
        )

    if not (gives_way(a, b) or gives_way(b, c) or gives_way(a, c)):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, {}) == merge({}, a) == a
    assert merge(a, a) == a


@given(TREES, TREES)
def test_what_is_on_top_is_there_in_full(base, over):
    def holds(tree, part):
        return all(
            holds(tree[k], v) if isinstance(v, dict) and isinstance(tree[k], dict) else tree[k] == v for k, v in part.items()
        )

    assert holds(merge(base, over), over)


# -- profiles and --set ----------------------------------------------------------------------------------------------------------

PROFILES = (
    BASE
    + """
[profiles.cpu.train]
batch = 8
[profiles.big.network]
hidden = [32, 32]
[profiles.big.train]
batch = 512
"""
)


@pytest.mark.parametrize(
    ("profiles", "cpu_only", "batch", "applied", "automatic"),
    [
        ((), False, 64, (), False),
        ((), True, 8, ("cpu",), True),
        (("none",), True, 64, (), False),
        (("cpu",), True, 8, ("cpu",), False),
        (("cpu",), False, 8, ("cpu",), False),
        (("big",), True, 512, ("cpu", "big"), True),
        (("big", "cpu"), True, 8, ("big", "cpu"), False),
        (("none", "big"), True, 512, ("big",), False),
    ],
)
def test_profiles(read, profiles, cpu_only, batch, applied, automatic):
    recipe = read(PROFILES, profiles, cpu_only=cpu_only)
    assert recipe.stages[0].batch == recipe.train.batch == batch
    assert (recipe.profiles, recipe.automatic_profile) == (applied, automatic)
    assert recipe.network[0].config.hidden == ((32, 32) if "big" in applied else (16,))


def test_a_recipe_without_a_cpu_profile_is_the_same_everywhere(read):
    assert read(BASE, cpu_only=True) == read(BASE)


def test_unknown_profiles_are_told_with_near_misses(problems):
    assert problems(PROFILES, profiles=("bgi",)) == ["no profile 'bgi'; did you mean 'big'?"]
    assert problems(PROFILES, profiles=("q",)) == ["no profile 'q'; known: big, cpu"]


@pytest.mark.parametrize("line", ["profiles = 3", "profiles = { cpu = 3 }", "profiles = [1]"])
def test_profiles_that_are_no_tables(problems, line):
    [problem] = problems(line + BASE, cpu_only=True)
    assert problem.startswith("profiles")
    assert "expected a table" in problem


def test_set_comes_last_and_takes_toml_values_or_strings(read):
    sets = [
        "train.batch=5",
        "train.precision=bf16",
        'train.length="3 epochs"',
        "network.hidden=[1, 2]",
        "objective.beta_kl = 0.25",
    ]
    recipe = read(PROFILES, ("big",), sets)
    assert (recipe.stages[0].batch, recipe.train.precision) == (5, "bf16")
    assert recipe.stages[0].length == Length(3, "epochs")
    assert recipe.network[0].config.hidden == (1, 2)
    assert recipe.stages[0].objective.config.beta_kl == 0.25
    assert recipe.sets == tuple(sets)
    assert read(BASE, sets=["train.length=3 epochs"]).stages[0].length == Length(3, "epochs")


def test_set_of_another_name_replaces_the_table(read):
    recipe = read(BASE, sets=["objective.name=vae"])
    assert "beta_neg" not in recipe.resolved()["stages"][0]["objective"]


@pytest.mark.parametrize("setting", ["train.batch", "=5", ""])
def test_set_without_key_or_value(read, setting):
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        read(BASE, sets=[setting])


@pytest.mark.parametrize(
    "setting", ["train=5", "train.batch.more=5", ".=3", "train.=3", "data=digits", "stages=3", "metrics=1", "format=2"]
)
def test_set_of_the_wrong_shape(problems, setting):
    assert problems(BASE, sets=[setting])


def test_a_data_set_outside_a_recipe(catalogue):
    choice = dataset_choice(catalogue, "digits", ("held_out=7",))
    assert choice.config.held_out == 7
    with pytest.raises(UserError, match=r"data.held_out: expected a whole number, got \"x\""):
        dataset_choice(catalogue, "digits", ("held_out=x",))


# -- stages ----------------------------------------------------------------------------------------------------------------------

STAGES = BASE.replace('length = "12 steps"\n', "")


def test_a_vae_warms_up(read):
    recipe = read(
        STAGES
        + """
[[stages]]
length = "2 epochs"
objective = { name = "vae", beta_kl = 0.5 }
[[stages]]
length = "30 steps"
optim = { lr = 2e-5, encoder = { lr = 1e-6 } }
train = { batch = 32 }
fade = 0.5
reset_optimisers = true
[[stages]]
length = "1k images"
objective = { beta_neg = 8.0 }
data = { size = 4 }
"""
    )
    first, second, third = recipe.stages
    assert [stage.objective.name for stage in recipe.stages] == ["vae", "soft_intro_vae", "soft_intro_vae"]
    assert (first.objective.config.beta_kl, first.batch, first.optim[""].lr, first.size) == (0.5, 64, 1e-3, None)
    assert (second.objective.config.beta_neg, second.batch, second.fade, second.reset_optimisers) == (4.0, 32, 0.5, True)
    assert (second.optim[""].lr, second.optim["encoder"].lr) == (2e-5, 1e-6)
    assert (third.objective.config.beta_neg, third.batch, third.optim[""].lr, third.size) == (8.0, 64, 1e-3, 4)
    assert third.length.steps(64, 1400) == 16


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        ("train = { lr = 1.0 }", "stages[0].train.lr"),
        ("train = { seed = 1 }", "stages[0].train.seed: a stage may change only train.batch"),
        ("data = { name = 'hdf5' }", "stages[0].data.name: unknown key"),
        ("data = { size = 0 }", "stages[0].data.size: must be >= 1, got 0"),
        ("network = { hidden = [1] }", "stages[0].network: unknown key"),
        ("objective = { name = 'vea' }", "stages[0].objective.name: no objective is called 'vea'; did you mean 'vae'?"),
        ("objective = { beta_nge = 1.0 }", "stages[0].objective.beta_nge: unknown key; did you mean 'beta_neg'?"),
        ("optim = { lr = -1.0 }", "stages[0].optim.lr: must be > 0, got -1.0"),
        ("optim = { encoder = { lr = '1' } }", 'stages[0].optim.encoder.lr: expected a number, got "1"'),
        ("train = { batch = 0 }", "stages[0].train.batch: must be >= 1, got 0"),
        ("fade = 1.5", "stages[0].fade: must be >= 0 and <= 1, got 1.5"),
        ("train = 3", "stages[0].train"),
    ],
)
def test_what_a_stage_may_not_do(problems, stage, problem):
    assert any(line.startswith(problem) for line in problems(STAGES + f'[[stages]]\nlength = "2 steps"\n{stage}\n'))


def test_lengths_stand_in_one_place(problems):
    told = 'train.length: give either a length such as "400 epochs" or [[stages]], which have theirs'
    assert problems(STAGES) == [told]
    assert problems(BASE + '[[stages]]\nlength = "2 steps"\n') == [told]
    [missing] = problems(STAGES + "[[stages]]\nfade = 0.5\n")
    assert missing.startswith("stages[0].length: missing (a length")


def test_stages_that_are_no_list_of_tables(problems):
    length = 'train.length: give either a length such as "400 epochs" or [[stages]], which have theirs'
    assert problems("stages = 3" + STAGES) == ["stages: expected a list of tables", length]
    assert any(line.startswith("stages[1]") for line in problems('stages = [{ length = "1 steps" }, 3]' + STAGES))


# -- lengths ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("400 epochs", 400, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("30000 steps", 30000, "steps"),
        ("1 step", 1, "steps"),
        ("8M images", 8_000_000, "images"),
        ("1.5k images", 1500, "images"),
        ("0.5 epochs", 0.5, "epochs"),
        ("  10   k  steps ", 10_000, "steps"),
    ],
)
def test_length(text, count, unit):
    assert Length.parse(text) == Length(count, unit)


@pytest.mark.parametrize(
    "text",
    ["", "400", "epochs", "-1 epochs", "4 hours", "1e3 steps", "8m images", "4 Epochs", "٤ steps x", "0 steps", "0.0k images"],
)
def test_no_length(text, problems):
    with pytest.raises(ValueError, match="expected a length such as"):
        Length.parse(text)
    [problem] = problems(BASE.replace("12 steps", text))
    assert problem.startswith("train.length: expected a length such as")


@pytest.mark.parametrize(
    ("text", "batch", "epoch", "steps"),
    [
        ("30 steps", 64, 1000, 30),
        ("1 epochs", 64, 128, 2),
        ("1 epochs", 64, 129, 3),
        ("3 epochs", 64, 100, 5),
        ("0.1 epochs", 64, 100, 1),
        ("1k images", 64, 7, 16),
        ("1 images", 64, 7, 1),
        ("64 images", 64, 7, 1),
        ("65 images", 64, 7, 2),
        ("0.3 epochs", 10, 100, 3),
        ("2.5 steps", 64, 7, 3),
    ],
)
def test_lengths_are_rounded_up_to_whole_steps(text, batch, epoch, steps):
    assert Length.parse(text).steps(batch, epoch) == steps


@given(st.integers(1, 10**9), st.sampled_from(["steps", "epochs", "images"]), st.sampled_from(["", "k", "M"]))
def test_a_length_reads_what_it_writes(count, unit, suffix):
    length = Length.parse(f"{count}{suffix} {unit}")
    assert Length.parse(str(length)) == length


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 10**6))
def test_a_length_is_never_cut_short(count, batch, epoch):
    for unit, images in (("steps", batch), ("epochs", epoch), ("images", 1)):
        steps = Length(count, unit).steps(batch, epoch)
        assert (steps - 1) * batch < count * images <= steps * batch


# -- strictness ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('batch = "12"', 'train.batch: expected a whole number, got "12"'),
        ("batch = true", "train.batch: expected a whole number, got true"),
        ("batch = 3.7", "train.batch: expected a whole number, got 3.7"),
        ("batch = 64.0", "train.batch: expected a whole number, got 64.0"),
        ("batch = [64]", "train.batch: expected a whole number, got [64]"),
        ("batch = 0", "train.batch: must be >= 1, got 0"),
        ("seed = 9223372036854775808", "train.seed: expected a whole number of at most 64 bits"),
        ("seed = 2020-01-01", "train.seed: expected a whole number, got 2020-01-01"),
        ("deterministic = 1", "train.deterministic: expected true or false, got 1"),
        ('deterministic = "yes"', 'train.deterministic: expected true or false, got "yes"'),
        ('logvar_bound = "20"', 'train.logvar_bound: expected a number, got "20"'),
        ("logvar_bound = true", "train.logvar_bound: expected a number, got true"),
        ("logvar_bound = nan", "train.logvar_bound: expected a finite number, got nan"),
        ("logvar_bound = inf", "train.logvar_bound: expected a finite number, got inf"),
        ("logvar_bound = -0.5", "train.logvar_bound: must be >= 0, got -0.5"),
        ("precision = 'fp23'", "train.precision: must be one of 'fp32', 'tf32', 'bf16', 'auto', got \"fp23\""),
        ("precision = 32", "train.precision: expected a string, got 32"),
        ("tick = 50", "train.tick: expected a string, got 50"),
        ('tick = "0 steps"', "train.tick: expected a length such as"),
        ("bacth = 64", "train.bacth: unknown key; did you mean 'batch'?"),
        (f"logvar_bound = 1{'0' * 400}", "train.logvar_bound: "),
        (f"keep_every = 1{'0' * 400}", "train.keep_every: "),
    ],
)
def test_values_are_taken_as_they_are_or_not_at_all(problems, line, problem):
    text = changed(line)
    if line.startswith("batch"):
        text = text.replace("batch = 64\n", "", 1) if line != "batch = 64" else text
    [told] = problems(text)
    assert told.startswith(problem)
    assert len(told) < 1000


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("hidden = 3", "network.hidden: expected a list, got 3"),
        ('hidden = "33"', 'network.hidden: expected a list, got "33"'),
        ('hidden = [3, "x"]', 'network.hidden[1]: expected a whole number, got "x"'),
        ("hidden = [3, 0]", "network.hidden: must be >= 1 and <= 65536, got [3, 0]"),
        ("hidden = [3, 4.0]", "network.hidden[1]: expected a whole number, got 4.0"),
    ],
)
def test_lists(problems, line, problem):
    assert problems(BASE.replace("hidden = [16]", line)) == [problem]


@pytest.mark.parametrize("betas", ["0.5", "[0.5]", "[0.5, 0.9, 0.99]", "[0.5, 1.0]", "[0.5, -0.1]", '["0.5", 0.9]'])
def test_pairs(problems, betas):
    [told] = problems(changed(f"betas = {betas}", "optim"))
    assert told.startswith("optim.betas")


def test_whole_numbers_are_numbers(read):
    assert read(changed("eps = 1", "optim")).stages[0].optim[""].eps == 1.0


def test_everything_wrong_is_told_at_once(problems):
    text = """
format = 2
[dta]
[data]
name = "digits"
held_out = 0
[network]
name = "mpl"
[objective]
name = "soft_intro_vae"
beta_neg = nan
[train]
batch = "64"
lenght = "12 steps"
[metrics.latent_probe]
"""
    told = problems(text)
    for start in (
        "format: this siv reads recipes with `format = 1`, got 2",
        "dta: unknown table; did you mean 'data'?",
        "data.held_out: must be >= 1 and <= 1796, got 0",
        "network.name: no network is called 'mpl'; did you mean 'mlp'?",
        "objective.beta_neg: expected a number or a table, got nan",
        "train.batch: expected a whole number",
        "train.lenght: unknown key; did you mean 'length'?",
        "metrics.latent_probe.name: no metric is called 'latent_probe'; did you mean 'latent_probes'?",
    ):
        assert any(line.startswith(start) for line in told), start
    assert len(told) == 8


def test_unknown_keys_are_told_in_a_fixed_order(problems):
    told = problems(changed("\n".join(f"{key} = 1" for key in ("zeta", "alpha", "mu", "kappa"))))
    assert [line.split(":")[0] for line in told] == ["train.alpha", "train.kappa", "train.mu", "train.zeta"]


@pytest.mark.parametrize("table", ["data", "network", "objective"])
def test_a_table_without_a_name_is_told_what_there_is(problems, table, catalogue):
    kind = {"data": "dataset"}.get(table, table)
    [told] = problems(BASE.replace(f'[{table}]\nname = "', f'[{table}]\nnane = "'))
    assert told == f'{table}: expected a table with `name = "…"`, one of: {", ".join(catalogue.names(kind))}'


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (b"", ": empty; `siv recipes copy digits` gives one to start from"),
        (b" \n\n", ": empty; `siv recipes copy digits`"),
        (b"format = 1\n[network\n", ":2: not TOML (Expected ']' at the end of a table declaration (at line 2, column 9))"),
        (b"a = 1\na = 2\n", ":2: not TOML (Cannot overwrite a value (at line 2, column 6))"),
        (b"\0\1\2", ":1: not TOML (Invalid statement (at line 1, column 1))"),
        (
            b'a = 1\npath = "C:\\Users\\me\\x.h5"\n',
            ":2: not TOML (Invalid hex value (at line 2, column 13)); in double quotes a backslash begins an escape: put a path"
            " with backslashes in single quotes, 'C:\\data\\x.h5'",
        ),
        (b"a = 'x\0'", ":1: not TOML (Found invalid character '\\x00'"),
        (BASE.encode("utf-16"), ": not TOML (UTF-16); a recipe is TOML, text in UTF-8; save it as that"),
        (BASE.encode("utf-8-sig"), ": not TOML (it starts with a byte order mark); save it as UTF-8 without one"),
        ("a = 1\n# caf\xe9".encode("latin-1"), ":2: not TOML (byte 0xe9 is no UTF-8); a recipe is TOML, text in UTF-8"),
        (bytes(range(128, 256)), ":1: not TOML (byte 0x80 is no UTF-8)"),
        (b"format = 1\n#" + b"x" * 10_000_000, ": 10,000,012 bytes; over 1 MB, this is no recipe"),
        (b"a = " + b"[" * 50_000, ": not TOML ("),
        (b"a = 1" + b"0" * 5_000, ": not TOML (Exceeds the limit"),
        (b"a" + b".a" * 100_000 + b" = 1", ": not TOML (a key of more than 50 parts)"),
        (b"a = " + b"{ a = " * 60 + b"1" + b" }" * 60, ": not TOML (nested more than 50 deep)"),
    ],
    ids=str,
)
def test_what_is_no_recipe(catalogue, tmp_path, source, told):
    path = tmp_path / "some.toml"
    path.write_bytes(source)
    with pytest.raises(UserError) as error:
        load(path, catalogue)
    assert str(error.value).startswith(f"{path}{told}")


def test_a_file_that_cannot_be_read(catalogue, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.toml: cannot be read \(No such file or directory\); `siv recipes ls` lists"):
        load(tmp_path / "nowhere.toml", catalogue)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        load(tmp_path, catalogue)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "a\0b.toml", catalogue)
    (tmp_path / "over.toml").symlink_to(tmp_path / "over.toml")
    with pytest.raises(UserError, match=r"over.toml: cannot be read \(Too many levels of symbolic links"):
        load(tmp_path / "over.toml", catalogue)
    os.mkfifo(tmp_path / "pipe.toml")
    for endless in (tmp_path / "pipe.toml", Path("/dev/zero")):
        with pytest.raises(UserError, match="no regular file; save the recipe as one"):
            load(endless, catalogue)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_a_file_of_somebody_else(catalogue, tmp_path):
    (tmp_path / "some.toml").write_text(BASE)
    (tmp_path / "some.toml").chmod(0)
    with pytest.raises(UserError, match=r"some.toml: cannot be read \(Permission denied"):
        load(tmp_path / "some.toml", catalogue)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BASE.replace("format = 1", ""), "format: missing; a recipe for this siv begins with `format = 1`"),
        (BASE.replace("format = 1", "format = true"), "format: this siv reads recipes with `format = 1`, got true"),
        (BASE.replace("12 steps", "9" * 20 + " steps"), "train.length: expected a length of at most 1e+15, got "),
        (changed('"a\\nb\\u001b[31m" = 1'), r"train.a\nb\x1b[31m: unknown key; known: "),
        (changed(f"{'x' * 5000} = 1"), "train.xxx"),
    ],
)
def test_other_mistakes(problems, text, told):
    [line] = problems(text)
    assert line.startswith(told)
    assert len(line) < 2100


def test_what_is_wrong_beside_an_unknown_profile_is_told_too(problems):
    assert problems(BASE.replace("12 steps", "12"), profiles=("fast",), sets=["nonsense"]) == [
        "--set nonsense: expected KEY=VALUE, such as --set train.batch=8",
        "no profile 'fast'; the recipe has none",
        'train.length: expected a length such as "400 epochs", "30000 steps" or "8M images", got "12"',
    ]


# -- numbers by group ------------------------------------------------------------------------------------------------------------


def objective_of(recipe, catalogue):
    data = build.dataset(recipe, catalogue)
    return build.build(recipe, catalogue, data).objective(recipe.stages[0])


def test_a_table_has_a_number_for_each_group(read, catalogue):
    assert objective_of(read(changed("beta_kl = { z = 0.5 }", "objective")), catalogue).coeffs["beta_kl"] == {"z": 0.5}
    assert objective_of(read(BASE), catalogue).coeffs["beta_neg"] == {"z": 4.0}


@pytest.mark.parametrize(("table", "got"), [("{ x = 0.5 }", "x"), ("{}", "none"), ("{ z = 0.5, content = 1.0 }", "z, content")])
def test_a_table_with_other_groups(read, catalogue, table, got):
    recipe = read(changed(f"beta_kl = {table}", "objective"))
    with pytest.raises(UserError) as error:
        objective_of(recipe, catalogue)
    assert error.value.problems == (f"{recipe.places.layers[0].place}:11: objective.beta_kl: the groups are z, got {got}",)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('{ z = "0.5" }', 'objective.beta_kl.z: expected a number, got "0.5"'),
        ("{ z = nan }", "objective.beta_kl.z: expected a finite number, got nan"),
        ("{ z = -1.0 }", "objective.beta_kl: must be >= 0, got { z = -1.0 }"),
        ('"0.5"', 'objective.beta_kl: expected a number or a table, got "0.5"'),
        ("[0.5]", "objective.beta_kl: expected a number or a table, got [0.5]"),
        ("nan", "objective.beta_kl: expected a number or a table, got nan"),
    ],
)
def test_a_table_with_other_values(problems, table, problem):
    assert problems(changed(f"beta_kl = {table}", "objective")) == [problem]


def test_priors_and_optimisers_of_unknown_owners(read, catalogue):
    recipe = read(BASE + '[prior.zz]\nname = "standard_normal"\n')
    with pytest.raises(UserError, match=r"some.toml:19: prior.zz: the network has no such group; did you mean 'z'"):
        objective_of(recipe, catalogue)
    told = "some.toml:19: optim.decode: no such player; did you mean 'decoder'?"
    with pytest.raises(UserError, match=re.escape(told)):
        read(BASE + "[optim.decode]\nlr = 1.0\n")
    for table in ("prior.all", 'prior.""'):
        with pytest.raises(UserError, match=r"prior.(all)?: no group; \[prior\] with a name is for all groups"):
            read(BASE + f'[{table}]\nname = "standard_normal"\n')


def test_halves_with_other_groups(read, catalogue):
    halves = '[network]\nencoder = { name = "mlp", z_dim = 3 }\ndecoder = { name = "mlp", z_dim = 4 }\n'
    recipe = read(BASE.replace('[network]\nname = "mlp"\nz_dim = 3\nhidden = [16]\n', halves))
    with pytest.raises(UserError, match=r"the encoder's groups {'z': 3} are not the decoder's {'z': 4}"):
        objective_of(recipe, catalogue)


def test_labels_need_a_data_set_with_labels(read, catalogue):
    assert objective_of(read(changed("conditional = true")), catalogue)
    text = changed("conditional = true").replace('name = "digits"', 'name = "rendered_cars"\nsize = 8')
    recipe = read(text)
    with pytest.raises(UserError, match=r"train.conditional: data 'rendered_cars' has no labels"):
        objective_of(recipe, catalogue)


# -- what may change between a run and its continuation --------------------------------------------------------------------------


def test_differences_ignore_what_may_change(read):
    old = read(BASE).resolved()
    free = [
        "train.tick=1 steps",
        "train.preview=1 steps",
        "train.checkpoint=1 steps",
        "train.keep_every=3",
        "train.residency=host",
    ]
    free += ["train.length=99 epochs", "metrics.latent_probes.class_factor=digit"]
    assert differences(old, read(BASE, sets=free).resolved()) == []


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["train.batch=32"], "stages[0].batch"),
        (["train.seed=1"], "train.seed"),
        (["train.precision=bf16"], "train.precision"),
        (["network.hidden=[16, 16]"], "network.hidden"),
        (["network.z_dim=4"], "network.z_dim"),
        (["objective.beta_neg=5.0"], "stages[0].objective.beta_neg"),
        (["optim.lr=1.0"], "stages[0].optim.all.lr"),
        (["optim.encoder.lr=1.0"], "stages[0].optim.encoder"),
        (["data.held_out=5"], "data.held_out"),
        (["reconstruction.name=l1"], "reconstruction.name"),
        (["shadow.half_life=5k images"], "shadow"),
        (["prior.z.name=standard_normal"], "prior.z"),
        (["init.run=elsewhere"], "init"),
    ],
)
def test_differences_find_the_rest(read, sets, key):
    found = differences(read(BASE).resolved(), read(BASE, sets=sets).resolved())
    assert any(line.startswith(f"{key}: the run has ") for line in found), found
    if sets == ["train.batch=32"]:
        assert [line.split(":")[0] for line in found] == ["stages[0].batch", "train.batch"]


def test_another_checkpoint_to_start_from_is_a_difference(read):
    start = BASE + '[init]\nrun = "elsewhere"\n'
    found = differences(read(start).resolved(), read(start, sets=['init.checkpoint="5"']).resolved())
    assert found == ["init.checkpoint: the run has 'last', the recipe '5'"]


def test_other_stages_are_a_difference(read):
    stages = STAGES + '[[stages]]\nlength = "2 steps"\n[[stages]]\nlength = "2 steps"\n'
    assert differences(read(BASE).resolved(), read(stages).resolved())
    assert differences(read(stages).resolved(), read(stages.replace("2 steps", "3 steps")).resolved()) == []


# -- options ---------------------------------------------------------------------------------------------------------------------


@frozen
class Inner:
    rate: float = option(0.5, doc="of the inner", le=1)


@frozen
class Everything:
    inner: Inner = option(Inner(), doc="options of its own")
    pair: tuple[float, float] = option((0.5, 0.9), doc="two numbers")
    needed: int = option(doc="has no default", ge=1, lt=10)
    number: float = option(1.0, doc="a number", gt=0)
    group: PerGroup = option(2.0, doc="a number or a table", ge=0)
    table: dict[str, int] = option({"a": 1}, doc="a table")
    choice: str = option("x", doc="one of two", choices=("x", "y"))
    length: Length = option(Length(8_000_000, "images"), doc="how long")


def test_describe():
    rows = {row["option"]: row for row in describe(Everything)}
    needed = rows["needed"]
    assert (needed["type"], needed["default"], needed["bounds"]) == ("a whole number", "required", ">= 1 and < 10")
    assert needed["meaning"] == "has no default"
    assert (rows["group"]["type"], rows["group"]["default"]) == ("a number or a table of numbers", 2.0)
    assert (rows["group"]["bounds"], rows["table"]["type"]) == (">= 0", "a table of whole numbers")
    assert (rows["pair"]["type"], rows["pair"]["default"]) == ("a list of 2 numbers", [0.5, 0.9])
    assert (rows["inner.rate"]["bounds"], rows["inner.rate"]["meaning"]) == ("<= 1", "of the inner")
    assert rows["table"]["default"] == {"a": 1}
    assert rows["choice"]["bounds"] == "one of 'x', 'y'"
    assert rows["length"]["default"] == "8000000 images"
    json.dumps(list(rows.values()), allow_nan=False)


def test_a_missing_option_is_told_with_what_it_is():
    problems: list[str] = []
    assert structure(Everything, {}, "some.where", problems) is None
    assert problems == ["some.where.needed: missing (a whole number: has no default)"]


@pytest.mark.parametrize(
    ("inner", "told"),
    [
        ({"raet": 1.0}, "some.inner.raet: unknown key; did you mean 'rate'?"),
        ({"rate": 2.0}, "some.inner.rate: must be <= 1, got 2.0"),
        (3, "some.inner: expected a table, got 3"),
        ({"rate": True}, "some.inner.rate: expected a number, got true"),
    ],
)
def test_options_of_a_config_class_inside_another_are_as_strict(inner, told):
    problems: list[str] = []
    assert structure(Everything, {"needed": 1, "inner": inner}, "some", problems) is None
    assert problems == [told]
    assert structure(Everything, {"needed": 1, "inner": {"rate": 0.25}}, "some", []).inner == Inner(rate=0.25)


def test_tables_of_defaults_are_not_shared():
    first, second = Everything(needed=1), Everything(needed=1)
    first.table["a"] = 7
    assert second.table == {"a": 1}


def test_bounds_hold_in_python_as_well():
    with pytest.raises(ValueError, match=r"number: 0.0 is not > 0"):
        Everything(needed=1, number=0.0)


def test_plain_is_what_json_gives_back():
    value = plain(Everything(needed=3))
    assert json.loads(json.dumps(value)) == value
    assert value["length"] == "8000000 images"


# -- the recipes that siv ships -


def test_recipes_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe(path, catalogue):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.split("  ")[0].strip() == f"# siv run recipes/{path.name}"
    profiles = list(tomllib.loads(path.read_text(encoding="utf-8")).get("profiles", {}))
    for chosen in ((), *((name,) for name in profiles)):
        recipe = load(path, catalogue, chosen)
        assert recipe.profiles == chosen
        assert json.dumps(recipe.resolved(), allow_nan=False)


def test_a_later_length_takes_the_place_of_stages_and_the_other_way_round():
    staged = {"train": {"batch": 8}, "stages": [{"length": "3 steps"}]}
    assert overlay(staged, {"train": {"length": "5 steps"}}) == {"train": {"batch": 8, "length": "5 steps"}}
    plain = {"train": {"batch": 8, "length": "5 steps"}}
    assert overlay(plain, {"stages": [{"length": "3 steps"}]}) == staged


# -- where a problem stands ------------------------------------------------------------------------------------------------------

PLACES = """format = 1
[data]
name = "digits"
held_out = 0
[network]
name = "mlp"
hidden = [
  16,
  "x",
]
[objective]
name = "soft_intro_vae"
beta_neg = nan
[train]
batch = 64
[[stages]]
length = "2 steps"
objective = { name = "vae", beta_kl = -1.0 }
[[stages]]
fade = 0.5
[profiles.cpu.data]
held_out = 0.5
"""


def told(read: Any, *arguments: Any, **more: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        read(*arguments, **more)
    return [line.rpartition("/")[2] for line in error.value.problems]


def test_a_problem_is_told_with_its_line(read):
    assert told(read, PLACES) == [
        "some.toml:4: data.held_out: must be >= 1 and <= 1796, got 0",
        'some.toml:7: network.hidden[1]: expected a whole number, got "x"',
        "some.toml:18: stages[0].objective.beta_kl: must be >= 0, got -1.0",
        "some.toml: stages[1].length: missing (a length: how long this stage lasts)",
        "some.toml:13: objective.beta_neg: expected a number or a table, got nan",
    ]


def test_a_problem_of_a_profile_or_of_set_is_told_there(read):
    lines = told(read, PLACES, ("cpu",), ["network.hidden=3", "train.bacth=8", "train={ seed = 'x' }"])
    assert lines[:4] == [
        "--set train.bacth=8: train.bacth: unknown key; did you mean 'batch'?",
        "--set train={ seed = 'x' }: train.seed: expected a whole number, got \"x\"",
        "some.toml:22: data.held_out: expected a whole number, got 0.5",
        "--set network.hidden=3: network.hidden: expected a list, got 3",
    ]


def test_what_is_not_in_use_is_read_too(catalogue, tmp_path):
    """Each mistake once, with the profile that it takes; nothing of a recipe that is right with each."""
    path = tmp_path / "some.toml"

    def found(text: str, *more: Any) -> list[str]:
        path.write_text(text)
        return [line.replace(str(path), "some.toml") for line in with_each_profile(path, catalogue, *more)]

    assert found(BASE) == found(BASE + "[profiles.cpu.train]\nbatch = 4\n[profiles.long]\n") == []
    plain = "[profiles.plain_vae.objective]\nname = 'vae'\nbeta_ke = 3\n[profiles.cpu.data]\nname = 'rendered_cars'\nsize = 8\n"
    lines = len(BASE.splitlines())
    assert found(BASE + plain) == [
        f"with profile 'plain_vae': some.toml:{lines + 3}: objective.beta_ke: unknown key; did you mean 'beta_kl'?"
    ]
    replaced = (BASE + plain.replace("beta_ke", "beta_kl")).replace('name = "digits"', 'name = "digits"\nheld_uot = 3')
    path.write_text(replaced)
    with pytest.raises(UserError, match="held_uot"):
        load(path, catalogue)
    assert load(path, catalogue, ("cpu",)).data.name == "rendered_cars"  # where it is not in use
    [line] = found(replaced, ("cpu",)) or found(replaced)
    assert line.endswith("data.held_uot: unknown key; did you mean 'held_out'?")
    soft = "[profiles.soft.objective]\nname = 'soft_intro_vae'\n[profiles.weak.objective]\nbeta_neg = 2.0\n"
    vae = BASE + plain.replace("beta_ke", "beta_kl") + "[profiles.weak.objective]\nbeta_neg = 2.0\n"
    assert found(vae) == found(vae, ("plain_vae",)) == []  # they do not go together, each is well alone
    assert found(soft_alone := BASE.replace("soft_intro_vae", "vae").replace("beta_neg", "beta_kl") + soft, ("soft",)) == []
    assert "with profile 'weak'" in found(soft_alone)[0]  # needs the other
    assert found(BASE + "[profiles]\nx = 3\n") == ["without a profile: some.toml:20: profiles.x: expected a table"]


def test_siv_check_reads_each_profile(siv, tmp_path):
    (tmp_path / "r.toml").write_text(BASE + "[profiles.long.train]\nlenght = '3 steps'\n")
    done = siv("check", "r.toml")
    assert done.returncode == 2
    assert "error: with profile 'long': r.toml:" in done.stderr
    assert "train.lenght: unknown key; did you mean 'length'?" in done.stderr
    done = siv("run", "r.toml", "--dry-run")
    assert done.returncode == 0, done.stderr
    (tmp_path / "r.toml").write_text(BASE + "[profiles.cars.data]\nname = 'rendered_cars'\nsize = 8\n")
    done = siv("check", "r.toml", "--set", "data.held_out=300")  # of the data in use alone
    assert done.returncode == 0, done.stderr


def test_a_problem_of_what_every_stage_shares_is_told_once(read):
    stages = STAGES + '[[stages]]\nlength = "2 steps"\n[[stages]]\nlength = "2 steps"\noptim = { lr = 0.0 }\n'
    text = stages.replace("beta_neg = 4.0", "beta_neg = -4.0").replace("lr = 1e-3", "lr = 'x'\n[optim.prior]\neps = 1.0")
    assert told(read, text) == [
        "some.toml:12: objective.beta_neg: must be >= 0, got -4.0",
        'some.toml:15: optim.lr: expected a number, got "x"',
        "some.toml:24: stages[1].optim.lr: must be > 0, got 0.0",
    ]


def test_no_line_is_said_of_a_key_that_was_left_behind(read):
    text = (
        BASE.replace('name = "digits"', 'name = "hdf5"\npath = "own.h5"')
        + '[profiles.x.data]\nname = "hdf5"\n[profiles.y.data]\nname = "toy"'
    )
    assert read(text, ("x",)).data.config.path == os.path.abspath("own.h5")
    assert told(read, text.replace('"hdf5"\npath', '"digits"\npath'), ("x",)) == [
        "some.toml: data.path: missing (a string: of the file)"
    ]


def test_a_stage_whose_objective_is_no_table(read):
    text = STAGES.replace("beta_neg = 4.0", "beta_neg = -4.0") + '[[stages]]\nlength = "2 steps"\nobjective = 3\n'
    assert told(read, text) == [
        "some.toml:20: stages[0].objective: expected a table",
        "some.toml:12: objective.beta_neg: must be >= 0, got -4.0",
    ]


def test_everything_that_does_not_fit_is_told_at_once_with_its_line(read, catalogue):
    text = changed("beta_kl = { q = 1.0 }", "objective") + '[prior.y]\nname = "standard_normal"\n[metrics.content_transfer]\n'
    text += "[[stages]]\nlength = '1 step'\n[[stages]]\nlength = '1 step'\nobjective = { beta_neg = {} }\n"
    recipe = read(text.replace('length = "12 steps"\n', ""))
    assert told(build.build, recipe, catalogue, build.dataset(recipe, catalogue)) == [
        "some.toml:19: prior.y: the network has no such group; known: z",
        "some.toml:11: objective.beta_kl: the groups are z, got q",
        "some.toml:26: stages[1].objective.beta_neg: the groups are z, got none",
        "some.toml:21: metrics.content_transfer: needs a network with a class and a content group, such as adain",
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_lines_of_a_shipped_recipe(path):
    text = path.read_text()
    lines = text.split("\n")
    found = lines_of(text)
    assert found.keys() == {keys for keys, _ in paths(tomllib.loads(text))}
    for keys, number in found.items():
        until = number if not lines[number - 1].endswith("[") else lines.index("]", number)  # a list over several lines
        assert str([key for key in keys if isinstance(key, str)][-1]) in "\n".join(lines[number - 1 : until])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a = 1\r\nb = 2\r\n", {("a",): 1, ("b",): 2}),
        ('a = """\nb = 1\n"""\nb = 2', {("a",): 1, ("b",): 4}),
        ("# c\n\n[x]\n[x.y]\nz.w = 1", {("x",): 3, ("x", "y"): 4, ("x", "y", "z"): 5, ("x", "y", "z", "w"): 5}),
        ("[[s]]\n[s.t]\n[[s.u]]\n[[s]]\na = [{ b = 1 },\n{ b = 2 }]", None),
        ("a = [" + "\n1," * 600 + "\n]\nb = 1", {}),  # longer than anything a person writes: nothing is said
    ],
)
def test_lines_of(text, lines):
    found = lines_of(text)
    if lines is None:
        assert found["s", 0, "u", 0], found["s", 1] == (3, 4)
        assert found["s", 1, "a", 1, "b"] == 5
    else:
        assert found == lines


@pytest.mark.parametrize(
    ("key", "path"), [("a.b", ("a", "b")), ('a."b.c"', ("a", "b.c")), ("'x y'", ("x y",)), (" a . b ", ("a", "b"))]
)
def test_the_key_of_a_setting_is_read_as_toml_reads_it(key, path):
    tree: Any = setting(f"{key}=5")
    for part in path:
        tree = tree[part]
    assert tree == 5


@pytest.mark.parametrize("key", ["stages[0].length", "a..b", ".a", "a.", "#a", "a b", "a\nb", "[a]", ".".join("a" * 60)])
def test_a_setting_of_no_key(key):
    with pytest.raises(UserError, match=r"expected a dotted key such as train.batch before the =; lists are given whole"):
        setting(f"{key}=5")


def test_what_follows_a_line_break_in_a_setting_is_not_lost(read):
    [line] = told(read, BASE, (), ["train.batch=3\nfoo=4"])
    assert line == r'--set train.batch=3\nfoo=4: train.batch: expected a whole number, got "3\nfoo=4"'
