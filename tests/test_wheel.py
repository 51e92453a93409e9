"""The wheel that users install holds every source file, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"moptrace": "moptrace", "passes": "moptrace/passes", "kernels": "moptrace/kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built offline from a copy: a build leaves files beside the sources that it reads."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def sources() -> set[str]:
    """The path in a wheel of each file of the three packages, subfolders included."""
    return {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in PACKAGES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources()


def test_the_wheel_installs_one_import_name(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("top_level.txt"))
    assert wheel.read(name).split() == [b"moptrace"]


def test_the_wheel_carries_its_licence_and_type_marker(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "moptrace/py.typed" in names
    (licence,) = (n for n in names if n.endswith("/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("use", ["import passes", "from kernels import routing"])
def test_the_bare_folder_names_refuse_to_be_used(use: str) -> None:
    result = subprocess.run([sys.executable, "-c", use], cwd=ROOT, capture_output=True, text=True)
    name = "passes" if "passes" in use else "kernels"
    assert f"ImportError: import moptrace.{name}, not {name}" in result.stderr
