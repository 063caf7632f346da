"""The documents say what is there: recipes load, commands parse, files and options exist. Nothing here is run."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import attrs
import click
import pytest

from siv_core.cli.main import cli
from siv_core.recipe import options, recipe
from siv_core.sweep import sweep

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


FILES = [(name, body) for name, text in TEXTS.items() for body in blocks(text, "toml") if re.search(r"^format = 1$", body, re.M)]
RECIPES = [(name, body) for name, body in FILES if "[network" in body]
SWEEPS = [(name, body) for name, body in FILES if (name, body) not in RECIPES]


@pytest.mark.parametrize(("page", "body"), RECIPES, ids=[page for page, _ in RECIPES])
def test_a_recipe_loads(tmp_path, catalogue, page, body):
    path = tmp_path / "recipe.toml"
    path.write_text(body)
    recipe.load(path, catalogue)


@pytest.mark.parametrize(("page", "body"), SWEEPS, ids=[page for page, _ in SWEEPS])
def test_a_sweep_loads(tmp_path, catalogue, page, body):
    """The recipe it varies is read where it is shipped."""
    path = tmp_path / "sweep.toml"
    path.write_text(body.replace('recipe = "', f'recipe = "{ROOT}/'))
    sweep.resolve(sweep.load(path), catalogue, cpu_only=False)


def test_there_are_files_to_load():
    assert "recipes.md" in dict(RECIPES)
    assert "sweeps.md" in dict(SWEEPS)


# -- commands --------------------------------------------------------------------------------------------------------------------


def command_lines(text: str) -> list[str]:
    """Everything that is to be typed: in shell blocks, indented, between backticks, and as the first comment of a recipe."""
    text = re.sub(r"\\\n *", "", text)  # a command over several lines
    shell = "\n".join(blocks(text, "sh"))
    indented = "\n".join(re.findall(r"^ {4,}(siv .*)$", text, re.M))
    spans = re.findall(r"`(siv [^`\n]+)`", FENCE.sub("", text))
    lines = [line for line in f"{shell}\n{indented}".splitlines() if line.startswith("siv ")]
    return [one for line in [*lines, *spans] for one in re.split(r"\s{2,}(?=siv )", line)]


def first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").partition("   ")[0]


def is_synopsis(line: str) -> bool:
    return bool(re.search(r"[\[|]", re.sub("'[^']*'", "", line)))


COMMANDS = [(name, line) for name, text in TEXTS.items() for line in command_lines(text)]
COMMANDS += [(path.name, first_comment(path)) for path in sorted((ROOT / "recipes").rglob("*.toml"))]
TYPED = [(page, line) for page, line in COMMANDS if not is_synopsis(line)]
SYNOPSES = [(page, line) for page, line in COMMANDS if is_synopsis(line)]


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that these words name, and the words after its name."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize(("page", "line"), TYPED)
def test_a_command_parses(page, line):
    command, words = find(shlex.split(line, comments=True)[1:])
    if not words or words == ["--help"]:  # it is only named
        return
    try:
        command.make_context(command.name, words)
    except click.ClickException as error:
        raise AssertionError(f"{page}: {line}: {error.format_message()}") from error


@pytest.mark.parametrize(("page", "line"), SYNOPSES)
def test_a_synopsis_names_options_that_exist(page, line):
    """`siv data ls|fetch RUN [--option VALUE]`: alternatives share their options."""
    names = [word.split("|") for word in re.match(r"siv((?: [a-z][a-z|-]*)+)", line)[1].split()]
    paths = [[]]
    for alternatives in names:
        paths = [[*path, one] for path in paths for one in alternatives]
    for path in paths:
        command, rest = find(path)
        assert rest == []
        known = {flag for parameter in command.params for flag in parameter.opts}
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", line)) <= known, f"{page}: siv {' '.join(path)}"


def test_there_are_commands_to_parse():
    for page in ("README.md", "architecture.md", "recipes.md", "run_directories.md", "writing_plugins.md", "measurements.md"):
        assert page in dict(COMMANDS), page
    assert len(SYNOPSES) > 5


def test_the_directories_that_readme_uses_are_those_it_made():
    lines = [line for line in command_lines(TEXTS["README.md"]) if not is_synopsis(line)]
    made = {directory for line in lines for directory in re.findall(r"--run-dir (\S+)", line)}
    used = {directory for line in lines for directory in re.findall(r"runs/\w+", line)}
    assert used == made == {"runs/digits", "runs/cars"}


def test_each_of_readmes_jobs_installs_by_itself():
    readme = TEXTS["README.md"]
    marked = readme[readme.index("<!-- test command -->") :].splitlines()
    assert marked[1] == "```sh", "CI takes the block right after the marker"
    whole = [body.splitlines() for body in blocks(readme, "sh") if "venv" in body]
    assert [lines[-1].split()[:2] for lines in whole] == [["siv", "run"], ["siv", "run"], ["python", "-m"]]
    for lines in whole:
        assert "venv" in lines[0]
        assert lines[1].startswith("pip install -e ")


# -- files and options -----------------------------------------------------------------------------------------------------------


def test_the_rooms_are_the_files():
    section = TEXTS["architecture.md"].partition("## Rooms")[2].partition("\n## ")[0]
    rooms = dict(re.findall(r"^\| (the root|`\w+/`)[^|]* \| (.*) \|$", section, re.M))
    named = {
        (room.strip("`/").replace("the root", "siv_core"), name)
        for room, row in rooms.items()
        for name in re.findall(r"`(\w+\.py)`", row)
    }
    there = {(path.parent.name, path.name) for path in (ROOT / "siv_core").rglob("*.py") if not path.name.startswith("__")}
    assert named == there


def test_three_clicks_from_the_readme_to_the_encoders_loss():
    """README, the architecture, the code with its formula; and beside it which gradients move."""
    assert "](docs/architecture.md)" in TEXTS["README.md"]
    links = re.findall(r"\[`(\w+)`\]\(\.\./(siv_core/\S+\.py)\)", TEXTS["architecture.md"])
    assert [name for name, _ in links] == ["encoder_half", "play"]
    for name, path in links:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(("page", "line"), TYPED)
def test_the_recipes_and_trials_of_a_command_exist(page, line):
    words = shlex.split(line, comments=True)
    shipped = [ROOT / word for word in words if word.startswith("recipes/")]
    assert [path for path in shipped if not path.exists()] == []
    patterns = [after for word, after in itertools.pairwise(words) if word == "--only"]
    if patterns and shipped:
        assert sweep.chosen(sweep.load(shipped[0]), patterns)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    folder = next(path.parent for path in PAGES if path.name == page)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[page])
    assert [link for link in links if "://" not in link and not (folder / link).exists()] == []


def test_the_options_of_train_are_all_named():
    section = TEXTS["recipes.md"].partition("## Options of `[train]`")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) == {option.name for option in attrs.fields(options.Train)}


def test_the_options_of_stages_and_init_exist():
    text = TEXTS["recipes.md"]
    stages = text.partition("## Stages")[2].partition("```")[0]
    known = {option.name for option in attrs.fields(options.StageOptions)} | {*recipe.STAGED, "train.batch", "data.size", "name"}
    assert set(re.findall(r"`([\w.]+)`", stages)) - {"train.length"} <= known
    init = text.partition("## Starting from another run")[2]
    assert set(re.findall(r"[`(](\w+)[`,)]", init)) <= {option.name for option in attrs.fields(options.Init)}
