"""The recipe campaign: recipes made from the schema, mutations of every shipped one, and wrong command lines.

Whatever a file holds, it either gives a recipe that can be written out and read again, or problems of one line each: never
another exception, a hang or a file. SIV_CAMPAIGN_RECIPES sets how many are tried, `just campaign` those of a release.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import signal
import sys
import tomllib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_origin

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siv_core.cli import main as cli
from siv_core.component import Bounds
from siv_core.errors import UserError
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe.convert import Length
from siv_core.recipe.options import Cadence, Init, Optim, ShadowOptions, StageOptions, Train
from siv_core.recipe.recipe import Recipe, load, parse
from siv_core.recipe.resolved import load as load_resolved
from siv_core.recipe.resolved import tree_of
from siv_core.store import memory

COUNT = int(os.environ.get("SIV_CAMPAIGN_RECIPES", "300"))
KNOWN = catalogues.load()
SHIPPED = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))}
SEEN: Counter[str] = Counter()  # what the examples of a test came to
GROUPS = st.sampled_from(["z", "class", "content", "clas", "all", ""])


def campaign(share: float) -> Any:
    """So much of all examples; the same ones each time at the size of every day, others in a campaign."""
    return settings(
        max_examples=max(1, round(share * COUNT)),
        deadline=timedelta(seconds=20),
        derandomize=COUNT <= 300,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder to be in, where nothing but the recipe may ever be; and a machine with little memory."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(memory, "free", lambda device="cpu": 300_000_000)
        yield folder


@pytest.fixture(autouse=True)
def both_ways(capsys):
    """A loader that took everything, or nothing, would pass every example: each test must have seen recipes and problems."""
    SEEN.clear()
    yield
    if sum(SEEN.values()) >= 30:
        assert SEEN["recipe"] > 0, SEEN
    if sum(SEEN.values()) >= 60:  # of few right recipes it may be that none has a problem
        assert SEEN["told"] > 0, SEEN
    with capsys.disabled():
        print(f" {dict(SEEN)}", end=" ")


# -- what must hold --------------------------------------------------------------------------------------------------------------


def read(source: bytes, profiles: tuple[str, ...] = (), sets: tuple[str, ...] = ()) -> Recipe | None:
    """The recipe in these bytes, or None where problems were told in order."""
    Path("some.toml").write_bytes(source)
    try:
        recipe = load(Path("some.toml"), KNOWN, profiles, sets)
    except UserError as error:
        check_problems(error.problems)
        SEEN["told"] += 1
        return None
    finally:
        assert os.listdir() == ["some.toml"]
    SEEN["recipe"] += 1
    resolved = recipe.resolved()
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    assert parse(tree_of(resolved), Path("some.toml"), source, KNOWN, (), (), False).resolved() == resolved
    manifest = {"format": 2, "recipe": recipe.name, "profiles": recipe.profiles, "automatic_profile": recipe.automatic_profile}
    assert load_resolved(Path("resolved.json"), resolved, manifest, KNOWN).resolved() == resolved  # what a run is built from
    return recipe


def check_problems(problems: tuple[str, ...]) -> None:
    assert problems
    for line in problems:
        assert line.startswith(("some.toml:", "--set "))
        assert line.isprintable()
        assert len(line) < 2100


def siv(*arguments: str) -> int:
    """The exit code of the command in this process; 2 comes with lines on standard error, and there is no other failure."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["siv", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert code in (0, 2), (code, err.getvalue())
    if code == 0:
        json.loads(out.getvalue())
    else:
        assert err.getvalue().startswith(("error: ", "Usage: "))
        assert "Traceback" not in err.getvalue()
    assert os.listdir() in ([], ["some.toml"])
    SEEN["told" if code else "recipe"] += 1
    return code


# -- recipes from the schema -----------------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    ["", " ", "é", "名前", "\u202e", "a.b", "a: b", "[0]", "\x00", "\n", "\x1b[31m", "🚗", "'", '"', "x" * 3000]
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3.7, 1e308, 5e-324, -0.0, 2**31, 2**53, 2**63 - 1, 2**63, 10**400, float("nan"), float("inf")]
)
WRONG = st.recursive(
    st.one_of(
        ODD,
        NUMBERS,
        st.booleans(),
        st.sampled_from(["12", "false", "nan", datetime.date(2020, 1, 1)]),
        st.integers(),
        st.floats(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(ODD, GROUPS, st.just("name")), inner, max_size=3)
    ),
    max_leaves=6,
)


def right(kind: Any, bounds: Bounds) -> Any:
    """Values of this type within these bounds, of a size that builds."""
    if bounds.choices is not None and get_origin(kind) is None:
        return st.sampled_from(bounds.choices)
    low = bounds.ge if bounds.ge is not None else bounds.gt if bounds.gt is not None else -10
    high = bounds.le if bounds.le is not None else bounds.lt if bounds.lt is not None else low + 40
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(int(low) + (bounds.gt is not None), max(int(low) + 1, min(int(high) - (bounds.lt is not None), 40)))
    if kind is float:
        return st.floats(low, high, exclude_min=bounds.gt is not None, exclude_max=bounds.lt is not None)
    if kind is Length:
        return st.builds(
            "{}{} {}".format,
            st.integers(1, 999),
            st.sampled_from(["", "k", ".5M"]),
            st.sampled_from(["step", "epochs", "images"]),
        )
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        many = {"min_size": len(rest) + 1, "max_size": len(rest) + 1} if Ellipsis not in rest else {"min_size": 1, "max_size": 3}
        return st.lists(right(inner, bounds), **many)
    if get_origin(kind) is dict:
        return st.fixed_dictionaries({}, optional={key: right(get_args(kind)[1], bounds) for key in ("z", "class", "content")})
    if get_args(kind):
        return st.one_of(*(right(member, bounds) for member in get_args(kind) if member is not type(None)))
    return st.one_of(st.sampled_from(["digit", "model", "images", "last", "runs/00000-a"]), ODD)


def one_in(share: float) -> Any:
    """True in this share of cases; from the middle of the range, since hypothesis likes its ends."""
    return st.integers(0, 999).map(lambda n: 500 <= n < 500 + 1000 * share)


@st.composite
def options(draw: Any, cls: type, more: dict[str, Any] | None = None, wrong: float = 0.03) -> dict[str, Any]:
    """A table for a config class: about half of its options, now and then a wrong value or key."""
    attrs.resolve_types(cls)
    table = dict(more or {})
    for attribute in attrs.fields(cls):
        if attribute.default is attrs.NOTHING or draw(st.integers(0, 2)) == 0:
            valid = right(attribute.type, attribute.metadata.get("bounds", Bounds()))
            table[attribute.name] = draw(WRONG if draw(one_in(wrong)) else valid)
    if draw(one_in(wrong)):
        table[draw(st.one_of(ODD, st.sampled_from([a.name[:-1] + "x" for a in attrs.fields(cls)] or ["x"])))] = draw(WRONG)
    return table


@st.composite
def component(draw: Any, kind: str, wrong: float = 0.03) -> dict[str, Any]:
    name = draw(st.sampled_from(KNOWN.names(kind)))
    return draw(options(KNOWN.get(kind, name).config, {"name": name}, wrong))


@st.composite
def trees(draw: Any, wrong: float = 0.03) -> dict[str, Any]:
    """A recipe from the config classes of all components."""
    some = st.integers(0, 3).map(lambda n: n == 0)
    tree = {"format": 1, "data": draw(component("dataset", wrong)), "network": draw(component("network", wrong))}
    if draw(some):
        tree["network"] = {half: draw(component("network", wrong)) for half in ("encoder", "decoder")}
    tree["objective"] = draw(component("objective", wrong))
    tree["train"] = draw(options(Train, wrong=wrong))
    tree["train"].pop("length", None)
    if draw(some):
        stage = st.one_of(options(StageOptions, wrong=wrong), options(StageOptions, {"objective": {"name": "vae"}}, wrong))
        tree["stages"] = draw(st.lists(stage, min_size=1, max_size=3))
    else:
        tree["train"]["length"] = draw(right(Length, Bounds()))
    parts = {
        "reconstruction": component("reconstruction", wrong),
        "prior": component("prior", wrong),
        "optim": options(Optim, wrong=wrong),
    }
    parts.update(shadow=options(ShadowOptions, wrong=wrong), init=options(Init, wrong=wrong))
    for key, strategy in parts.items():
        if draw(some):
            tree[key] = draw(strategy)
    if draw(some):
        tree["optim"] = {
            **tree.get("optim", {}),
            draw(st.sampled_from(["encoder", "decoder", "prior", "decodr", ""])): draw(options(Optim)),
        }
    if draw(some):
        chosen = draw(st.lists(component("metric", wrong), max_size=2))
        tree["metrics"] = {choice["name"]: {**choice, **draw(options(Cadence, wrong=wrong))} for choice in chosen}
    if draw(one_in(wrong)):
        tree[draw(st.sampled_from([*tree, "trian", "priors", ""]))] = draw(WRONG)
    return tree


def toml(value: Any) -> str:
    """A value in TOML; tables inline."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return hex(value) if isinstance(value, int) and value > 10**40 else str(value)


def written(tree: dict[str, Any]) -> bytes:
    return "\n".join(f"{toml(key)} = {toml(value)}" for key, value in tree.items()).encode()


@campaign(0.35)
@given(trees())
def test_recipes_from_the_schema(tree):
    read(written(tree))


@campaign(0.1)
@given(trees(wrong=0.0))
def test_right_recipes_from_the_schema(tree):
    read(written(tree))


# -- mutations of the shipped recipes --------------------------------------------------------------------------------------------

VALUES = [
    b"12",
    b'"12"',
    b"false",
    b"3.7",
    b"nan",
    b"-inf",
    b"[]",
    b"{}",
    b'""',
    b"1e999",
    b"0x7fffffffffffffff",
    b"{ z = 1 }",
    b"= =",
    b"#",
]


@st.composite
def texts(draw: Any) -> bytes:
    """A shipped recipe with a few changes that know nothing of TOML, or only of its lines."""
    source = bytearray(draw(st.sampled_from(list(SHIPPED.values()))))
    for _ in range(draw(st.integers(1, 4))):
        lines = source.split(b"\n")
        at, other = (draw(st.integers(0, max(0, len(lines) - 1))) for _ in range(2))
        change = draw(st.sampled_from(["flip", "insert", "cut", "drop", "double", "swap", "value", "join", "return"]))
        if change in ("flip", "insert", "cut") and source:
            byte = draw(st.integers(0, len(source) - 1))
            if change == "flip":
                source[byte] ^= 1 << draw(st.integers(0, 7))
            elif change == "insert":
                source[byte:byte] = draw(st.one_of(st.binary(max_size=4), st.text(max_size=4).map(str.encode)))
            else:
                del source[byte : byte + draw(st.integers(1, 200))]
            continue
        if change == "drop":
            del lines[at]
        elif change == "double":
            lines.insert(other, lines[at])
        elif change == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif change == "value":
            lines[at] = lines[at].partition(b"=")[0] + b"= " + draw(st.sampled_from(VALUES))
        elif change == "join":
            lines[at : at + 2] = [b"".join(lines[at : at + 2])]
        else:
            lines[at] += b"\r"
        source = bytearray(b"\n".join(lines))
    return bytes(source)


PROFILES = {(): 4, ("cpu",): 2, ("rendered",): 1, ("cpu", "plain_vae"): 1, ("none",): 1}
SOME_PROFILES = st.sampled_from([profiles for profiles, weight in PROFILES.items() for _ in range(weight)])


@campaign(0.25)
@given(texts(), SOME_PROFILES)
def test_mutated_texts(source, profiles):
    read(source, profiles)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


@st.composite
def changed_trees(draw: Any) -> dict[str, Any]:
    """A shipped recipe with a few keys renamed, values exchanged, dropped, nested or moved."""
    tree: dict[str, Any] = tomllib.loads(draw(st.sampled_from(list(SHIPPED.values()))).decode())
    for _ in range(draw(st.integers(1, 3))):
        found = places(tree)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        table: Any = tree
        for key in path:
            table = table[key]
        change = draw(st.sampled_from(["value", "value", "rename", "drop", "nest", "move"]))
        if change == "value":
            table[last] = draw(WRONG)
        elif change == "nest":
            for _ in range(draw(st.sampled_from([1, 2, 45, 60, 200]))):
                table[last] = draw(st.sampled_from([{"name": table[last]}, [table[last]]]))
        elif isinstance(table, dict):
            value = table.pop(last)
            if change == "rename":
                table[draw(st.one_of(st.just(f"{last}s"), st.just(last[1:]), ODD))] = value
            elif change == "move":
                tree[last] = value
    return tree


@campaign(0.15)
@given(changed_trees(), SOME_PROFILES)
def test_mutated_trees(tree, profiles):
    read(written(tree), profiles)


# -- the command line ------------------------------------------------------------------------------------------------------------

KEYS = st.one_of(
    st.sampled_from(
        ["train.batch", "train.length", "objective.beta_kl", "network", "stages", "optim.lr", "metrics.latent_probes.k"]
    ),
    st.sampled_from(
        [
            "format",
            "data.name",
            "profiles.cpu",
            "stages[0].length",
            "a..b",
            "",
            "prior.z.name",
            '"train".batch',
            ".".join("a" * 99),
        ]
    ),
    ODD,
    st.text(max_size=8),
)
SETTINGS = st.one_of(st.builds("{}={}".format, KEYS, st.one_of(WRONG.map(toml), st.text(max_size=8), st.just("8"))), KEYS)


@campaign(0.12)
@given(
    st.sampled_from(list(SHIPPED.values())),
    st.lists(st.one_of(st.sampled_from(["cpu", "none", "rendered", "cpus"]), ODD), max_size=2),
    st.lists(SETTINGS, max_size=3),
)
def test_profiles_and_settings(source, profiles, sets):
    read(source, tuple(profiles), tuple(sets))


@campaign(0.02)
@given(trees(wrong=0.002), st.sampled_from([("check", "--json"), ("check", "--json"), ("run", "--dry-run")]))
def test_the_command_on_recipes_from_the_schema(tree, command):
    """Networks are built here: what asks for more than there is must be told."""
    Path("some.toml").write_bytes(written(tree))
    siv(command[0], "some.toml", command[1])


LARGE = st.sampled_from([8, 64, 4096, 65536, 2**40, 2**63 - 1])


@campaign(0.01)
@given(LARGE, LARGE, LARGE)
def test_the_command_on_large_recipes(z_dim, hidden, batch):
    Path("some.toml").write_bytes(SHIPPED["digits.toml"])
    sets = (f"network.z_dim={z_dim}", f"network.hidden=[{hidden}, {hidden}]", f"train.batch={batch}")
    code = siv("check", "some.toml", "--json", *(part for given in sets for part in ("--set", given)))
    assert code == 2 or (max(z_dim, hidden) <= 65536 and batch <= 65536)
