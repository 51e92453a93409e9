"""What the simulator's collectives put on the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from moptrace.collectives import Collective, _guests
from moptrace.placement import Layout
from moptrace.rings import Exchange, Start, drive_together

__all__ = ["ROWS", "Meter"]

ROWS = {"send_rows", "return_rows", "all_gather_rows", "reduce_scatter_rows"}


class Meter:
    """Counts what the simulator's collectives put on the wire, from the tensors that they get."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.world = 1
        self.groups: list[float] = []
        self.count = Counter[str]()
        self.bytes = Counter[str]()

    def __call__(
        self,
        row: Collective,
        layout: Layout,
        axis: str,
        beside: tuple[list[Tensor], ...],
        extra: tuple[Any, ...],
        parts: Sequence[Tensor],
    ) -> Any:
        results = self.run(row, layout, axis, beside, extra, parts)
        ranks = len(parts)
        kind = row.name.removesuffix("_invariant").removesuffix("_cast")
        if kind not in ("vary", "take_shard", "take_replicated", "place_shard", "count_once"):
            groups = layout.world_size // ranks
            self.count[kind] += 1 / groups
            moved = results if row.casts else parts  # a cast comes first
            sizes = [x.numel() * moved[0].element_size() for x in parts]
            out = [x.numel() * x.element_size() for x in results]
            sent = {
                "all_gather": (ranks - 1) * max(sizes),
                "reduce_scatter": (ranks - 1) * max(out),
                "all_reduce": -(-2 * (ranks - 1) * max(sizes) // ranks),
                "exchange_counts": (ranks - 1) * max(out) // ranks,
                "send_rows": sum(sizes) / ranks * (ranks - 1) / ranks,
                "return_rows": sum(sizes) / ranks * (ranks - 1) / ranks,
                "all_gather_rows": sum(sizes) / ranks * (ranks - 1),
                "reduce_scatter_rows": sum(out) / ranks * (ranks - 1),
                "all_to_all": (ranks - 1) * max(sizes) // ranks,
                "send_slots": (ranks - 1) * max(sizes) // ranks,
                "return_slots": (ranks - 1) * max(sizes) // ranks,
                "all_gather_slots": (ranks - 1) * max(sizes),
                "reduce_scatter_slots": (ranks - 1) * max(out),
                "send_experts": self._lent(row, beside, extra, parts) / ranks,
                "return_experts": self._lent(row, beside, extra, results) / ranks,
            }[kind]
            self.groups.append(sent)
            if (
                len(self.groups) == groups
            ):  # what the fullest sends; of rows, what they send on average
                rows = kind in ROWS
                self.bytes[kind] += sum(self.groups) / groups if rows else max(self.groups)
                self.groups.clear()
        return results

    def _lent(
        self,
        row: Collective,
        beside: tuple[list[Tensor], ...],
        extra: tuple[Any, ...],
        owned: Sequence[Tensor],
    ) -> int:
        """The bytes of all guests, of experts that ranks own as many of as they own weights."""
        if not row.lends_experts:
            return 0
        places = extra[0]
        guests = sum(len(g) for g in _guests(beside[0][0], [len(x) for x in owned], places))
        return guests * owned[0][:1].numel() * owned[0].element_size()

    def together(self, journeys: Sequence[Any]) -> list[Any]:
        """Run the coroutines of a ring, and count what the first rank of each sends."""
        rings = self.world // len(journeys)
        return drive_together([self._counted(journeys[0], rings), *journeys[1:]])

    def _counted(self, journey: Any, rings: int) -> Generator[Any, Any, Any]:
        answer: Any = None
        while True:
            try:
                request = journey.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(request, Start):
                sent = sum(x.numel() * x.element_size() for x in request.send)
                self.bytes["ring"] += sent / rings
            elif isinstance(request, Exchange):
                rows = sum(request.out) - request.out[0]
                sent = rows * request.send[:1].numel() * request.send.element_size()
                self.bytes["ring"] += sent / rings
            answer = yield request
