"""The examples run, and print what they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command: str) -> str:
    """What a Python command prints; it must end well and without a word on standard error."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=EXAMPLES,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_1_print_a_graph_shows_every_level() -> None:
    shown = run("1_print_a_graph.py")
    for words in ("captured program", "canonical program", "local program"):
        assert words in shown
    assert re.search(r"^\+ .*= dispatch\(", shown, re.MULTILINE)
    assert re.search(r"^- .*= einsum\(", shown, re.MULTILINE)
    assert "send_rows(" in shown
    assert "experts split over" in shown


def test_2_write_a_pass_proves_one_pass_and_refuses_two() -> None:
    shown = run("2_write_a_pass.py")
    assert re.search(r"^\+ .*= cat\(.*merge_products$", shown, re.MULTILINE)
    assert "eight ranks compute the same loss and the same gradients" in shown
    assert "the checker refuses a missing reduction" in shown
    assert "partial" in shown.split("6. ")[1]
    assert "the comparison refuses swapped halves" in shown
    assert "differ by more than 1e-10" in shown.split("7. ")[1]


def test_3_parallelize_a_model_is_the_model() -> None:
    shown = run("3_parallelize_a_model.py")
    steps = re.findall(r"loss (\S+)  one device (\S+)  gradients (\S+)", shown)
    assert len(steps) == 5
    assert all(ours == alone and float(apart) < 1e-10 for ours, alone, apart in steps)
    assert float(steps[-1][0]) < float(steps[0][0])
    assert float(re.findall(r"the weights differ by (\S+)", shown)[0]) < 1e-10
    assert "experts split over ep=2" in shown


@pytest.mark.slow  # test_train_goes_on_from_a_checkpoint takes the same way
def test_4_torchrun_hugging_face_goes_on_from_its_checkpoint() -> None:
    shown = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "4_torchrun_hugging_face.py",
    )
    before, after = shown.split("saved")[1].split("loaded")
    trained = re.findall(r"step [34]  loss \S+", before)
    assert len(trained) == 2
    assert trained == re.findall(r"step [34]  loss \S+", after)


def test_train_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    sizes = {"warmup": 2, "sequences": 4, "length": 32, "layers": 1, "hidden": 64, "experts": 4}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    options += ["--steps=4", "--expert-tokens=40", "--bf16", f"--save={tmp_path}", "--save-every=2"]

    def steps() -> list[str]:
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        shown = run(*ranks, "train.py", *options)
        return re.findall(r"^step +\d+  loss \S+  norm \S+  lr \S+", shown, re.MULTILINE)

    whole = steps()
    assert len(whole) == 4 and sorted(os.listdir(tmp_path)) == ["2", "4"]
    shutil.rmtree(tmp_path / "4")
    assert steps() == whole[2:]
