"""Tests see the installed package, run on one thread, repeat from a seed, and report counts."""

from __future__ import annotations

import importlib
import os
import pkgutil
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by the ranks that tests start: the suite has as many
# workers as there are cores, and gloo ranks beside them. Nothing is fetched from a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Before anything imports Triton, which then runs its sources without a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

import moptrace
from _report import examples, record_examples, remarks
from gloo import Ranks, spare_imports
from meter import Meter
from triton_kernels import triton_interpreter as triton_interpreter

torch.set_num_threads(1)

# "python -m pytest" puts the root first, where bare "passes" and "kernels" would be found.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Hypothesis also draws the constants that it finds in the modules imported so far. With all of them
# here, a seed means the same examples whatever else a worker ran before, on every machine.
for module in pkgutil.walk_packages(moptrace.__path__, "moptrace."):
    if "triton" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)

# One example of the equivalence property is a model on several meshes and plans: seconds, not
# milliseconds, so there is no deadline. "make test-all" chooses the profile "all". Whatever chooses
# the examples is said: what a profile leaves out is inherited, and where the environment says CI
# Hypothesis inherits other things.
COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
    "derandomize": False,
    "database": None,
}
settings.register_profile("default", max_examples=150, **COMMON)
settings.register_profile("all", max_examples=3_000, **COMMON)
settings.load_profile("default")

LONGEST = (
    "test_any_step",
    "test_context_parallel",
    "test_equivalence",
    "test_examples",
    "test_parallel",
    "test_pipeline",
    "test_train_step",
    "test_whole_matrices",
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed: fixed by default, so that a failure is about the change under test.

    The profile "all" explores: it draws a new seed each time. Workers inherit the choice.
    """
    if config.getoption("--hypothesis-seed") is None:
        explore = config.getoption("--hypothesis-profile") == "all"
        config.option.hypothesis_seed = str(secrets.randbelow(2**32) if explore else 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first: one that goes last leaves the other workers idle meanwhile."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """Graphs are full of cycles: looking for garbage among all modules took a fifth of the time."""
    spare_imports()


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, hypothesis seed {config.getoption('--hypothesis-seed')}"


@pytest.fixture(scope="session", name="record_examples")
def record_examples_fixture() -> Callable[..., None]:
    """``record_examples(number, of="equivalence")``: counted in the closing lines."""
    return record_examples


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(4)(function, *arguments)``: run a function on each of four real gloo ranks."""
    pools: dict[int, Ranks] = {}

    def pool(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield pool
    for started in pools.values():
        started.stop()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends its counts to the session that started it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["examples"], output["remarks"] = dict(examples), list(remarks)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    output = getattr(node, "workeroutput", {})
    examples.update(output.get("examples", {}))
    remarks.extend(output.get("remarks", []))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    seed = config.getoption("--hypothesis-seed")
    for name, number in sorted(examples.items()):
        terminalreporter.write_line(
            f"{name}: {number} examples (model, mesh, plan); repeat with --hypothesis-seed={seed}"
        )
    for line in remarks:
        terminalreporter.write_line(line)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """What the simulator's collectives and rings are given is counted."""
    counting = Meter(moptrace.simulate._mean)
    monkeypatch.setattr(moptrace.simulate, "_mean", counting)
    monkeypatch.setattr(moptrace.simulate, "drive_together", counting.together)
    return counting
