"""Real ranks for tests: gloo processes that stay up and run one function after another.

``ranks(4)(function, *arguments)`` runs a module-level function on each of four ranks at once and
returns what each of them returned. Processes start when they are first used, and once per session
and number of ranks. A rank that fails fails the test with its traceback; a rank that waits for ever
does too, after ``LIMIT`` seconds. After either, the processes are replaced.
"""

from __future__ import annotations

import gc
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from models import FAMILIES

LIMIT = 120.0  # seconds that a function may take on all ranks
PRELOADED = [
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "moptrace.testing",
    # What torch imports when it traces for the first time: as many modules as all others.
    "torch._inductor.compiler_bisector",
    "torch._inductor.fx_passes.dedupe_symint_uses",
    "torch._inductor.sizevars",
    "torch.export._trace",
    "torch.fx.experimental.validator",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
]


class RankFailure(AssertionError):
    """A function failed, or did not end, on some rank."""


class Ranks:
    """Some gloo processes; call it with a function to run on each of them."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._folder = ""

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT
    ) -> list[Any]:
        """The results, by rank. Raises RankFailure; arguments and results are pickled."""
        if not self._members:
            self._start()
        for _, connection in self._members:
            connection.send_bytes(pickle.dumps((function, arguments)))
        deadline = time.monotonic() + limit
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank, (process, connection) in enumerate(self._members):
                if rank not in answers and connection.poll(0.002):
                    answers[rank] = _answer(process, connection)
            if any(not fine for fine, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 5)  # the others may wait for it
        failed = {rank: text for rank, (fine, text) in answers.items() if not fine}
        missing = set(range(self.world_size)) - set(answers)
        if failed or missing:
            if missing or any(text is None for text in failed.values()):
                self.stop()
            shown = [f"rank {rank}:\n{text}" for rank, text in sorted(failed.items())]
            shown += [f"rank {rank} did not end within the limit" for rank in sorted(missing)]
            raise RankFailure("\n".join(shown))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _start(self) -> None:
        # One process imports what all ranks need, and each rank is a fork of it: on its own, a rank
        # takes as long to import as to run most tests.
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.mkdtemp(prefix="ranks")
        store = Path(self._folder) / "store"
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, str(store), there), daemon=True
            )
            process.start()
            there.close()
            self._members.append((process, here))

    def stop(self) -> None:
        """End the processes; the next call starts new ones."""
        for process, connection in self._members:
            connection.close()  # an idle rank ends by itself
            process.join(timeout=0.2)
        for process, _ in self._members:
            if process.is_alive():
                process.kill()
            process.join()
        self._members.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def _answer(process: BaseProcess, connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join(timeout=1)
        return False, f"the process ended with exit code {process.exitcode}"


def spare_imports() -> None:
    """Look for cycles of garbage less often, and never among the objects that are there now."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    """What each process does: run functions until the test session closes the connection."""
    import torch
    import torch.distributed as dist

    spare_imports()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=LIMIT),
    )
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
            continue
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
