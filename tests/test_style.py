"""The project's habits, checked by tools."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
SOURCES = sorted([*(ROOT / "siv_core").rglob("*.py"), *(ROOT / "plugins").glob("*.py")])
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    long = {node.name: n for node in functions(ast.parse(text)) if (n := node.end_lineno - node.lineno + 1) > LINES_OF_A_FUNCTION}
    assert long == {}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_modules_say_what_they_are_for(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


def test_rooms_say_who_lives_there_in_a_sentence():
    for path in (ROOT / "siv_core").glob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert len(tree.body) == 1, f"{path}: a docstring, and nothing else"
        assert 20 < len(ast.get_docstring(tree)) < 130


def test_the_import_contract_names_rooms():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = contracts[0]["layers"]
    assert len(layers) <= 12
    assert contracts[0]["exhaustive"]
    named = {name for layer in layers for name in re.split(r"[ |:]+", layer)}
    assert {path.name for path in (ROOT / "siv_core").iterdir() if (path / "__init__.py").exists()} <= named


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--check", "--no-cache", "siv_core", "plugins"],
        ["lint-imports", "--no-cache"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_lint(command):
    done = subprocess.run(
        [SCRIPTS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_types():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
