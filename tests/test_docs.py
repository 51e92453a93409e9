"""What the documentation shows runs, and what it names exists."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import moptrace
import moptrace.kernels
import moptrace.passes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (moptrace, moptrace.passes, moptrace.kernels)
MODULES = sorted(
    {package.__name__ for package in PACKAGES}
    | {
        f"{package.__name__}.{found.name}"
        for package in PACKAGES
        for found in pkgutil.iter_modules(package.__path__)
    }
)
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").glob("*.md")],
    key=lambda page: page.relative_to(ROOT).parts,
)
page_parameter = pytest.mark.parametrize(
    "page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES]
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


@page_parameter
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


@page_parameter
def test_named_files_exist(page: Path) -> None:
    folders = r"(?:moptrace|passes|kernels|tests|examples|benchmarks|docs|\.ci)"
    named = re.findall(rf"(?<![\w./-]){folders}/[\w./-]*\w", page.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


@page_parameter
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@page_parameter
def test_named_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


def test_the_readme_lists_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text()
    files = [
        f"{folder}/{file.name}"
        for folder in ("moptrace", "passes", "kernels")
        for file in sorted((ROOT / folder).glob("*.py"))
        if file.name != "__init__.py"
    ]
    assert [file for file in files if file not in readme] == []


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    machine_path = re.compile(r"(?<![\w.:/<>-])/(?:work|tmp|root|opt|home/\w+)/")
    found = {
        name: match.group()
        for name in listed.split("\0")
        if name and (ROOT / name).is_file()
        if (match := machine_path.search((ROOT / name).read_text(errors="replace")))
    }
    assert found == {}
