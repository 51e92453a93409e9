"""What the command line prints, and how it refuses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from moptrace import demo
from moptrace.cli import app
from moptrace.errors import PlanError

MODELS = """
import torch
from torch import nn
from torch.nn import functional as F


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)

    def forward(self, input_ids, labels):
        logits = self.head(torch.relu(self.embed(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Pixels(Dense):
    def forward(self, pixels, labels):
        logits = self.head(pixels)
        return F.cross_entropy(logits, labels)


def dense():
    return Dense()


def pixels():
    batch = {"pixels": torch.empty(12, 8), "labels": torch.empty(12, dtype=torch.int64)}
    return Pixels(), batch


def number():
    return 3
"""


@pytest.fixture(name="run")
def run_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in a folder that has a file of models."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_inspect_explains_a_model_from_the_current_folder(run) -> None:
    result = run("inspect", "cli_models:dense", "--ranks", "4")
    assert result.exit_code == 0, result.output
    assert "vocab" in result.output and "data parallel dp=4" in result.output
    assert "total per rank" in result.output


@pytest.mark.parametrize("level", ["captured", "canonical", "placed", "local"])
def test_inspect_prints_the_graph_at_the_level_that_is_asked_for(run, level: str) -> None:
    result = run("inspect", "cli_models:dense", "--ranks", "2", "--graph", "--level", level)
    assert f"{level} program" in result.output
    assert ("reshard(" in result.output) == (level == "placed")


def test_inspect_takes_the_batch_that_the_function_gives(run) -> None:
    result = run("inspect", "cli_models:pixels", "--ranks", "2", "--graph", "--level", "captured")
    assert "f32[12, 8]" in result.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cli_models:dens", "no function 'dens'. Did you mean dense"),
        ("cli_models:number", "returned int; it must return a torch.nn.Module"),
        ("nowhere:model", "there is no module nowhere"),
        ("Qwen3MoConfig", "Did you mean Qwen3MoeConfig"),
        ("T5Config", "not the configuration of a causal language model"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_name(run, name: str, words: str) -> None:
    result = run("inspect", name)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_inspect_refuses_a_plan_that_does_not_divide_the_ranks(run) -> None:
    result = run("inspect", "cli_models:dense", "--ranks", "3", "--ep", "2")
    assert isinstance(result.exception, PlanError)


def test_inspect_reads_a_hugging_face_configuration_of_any_size(run) -> None:
    result = run("inspect", "OlmoeConfig", "--ranks", "4", "--length", "16")
    assert result.exit_code == 0, result.output
    assert "experts split over ep=4" in result.output


def test_the_demo_fails_when_the_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for difference, code in ((0.0, 0), (1e-3, 1), (float("nan"), 1)):
        monkeypatch.setattr(demo, "run", lambda *_, d=difference: d)
        assert CliRunner().invoke(app, ["demo"]).exit_code == code


def test_the_demo_trains_a_model_of_15_to_40_million_parameters_on_real_text() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in demo.model().parameters())
    assert 15e6 <= count <= 40e6
    settings = demo.Settings(steps=3)
    drawn = [batch["input_ids"] for batch in demo.batches(settings)]
    assert all(x.numel() == settings.tokens and int(x.max()) < 256 for x in drawn)
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))
    assert len(demo.text()) > 1_000_000


def test_the_demo_refuses_ranks_that_cannot_share_its_batch() -> None:
    with pytest.raises(Exception, match="cannot be shared by 3 ranks"):
        demo.run(ranks=3)


@pytest.mark.slow
def test_the_demo_has_the_same_losses_on_two_ranks() -> None:
    console = Console(width=120, record=True)
    assert demo.run(ranks=2, steps=3, console=console) <= demo.LIMIT
    shown = console.export_text()
    for words in ("rows(by token) -> rows(by expert)", "experts split over ep=2", "tokens/s"):
        assert words in shown
