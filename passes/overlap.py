"""Run other work between the start of a collective and the wait for its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import fx

from moptrace import roles
from moptrace.collectives import start, wait
from moptrace.core import Level, Pass, Program, copy_node
from moptrace.costs import products
from moptrace.errors import PassError
from moptrace.rings import ring, ring_backward
from moptrace.stages import receive, received

__all__ = ["overlap"]


def overlap(ahead: int = 1, prefetch: int = 2, cover: int = 2, reach: int = 24) -> Pass:
    """Start collectives early, wait for them late, and compute in between.

    Nodes keep their order but for this. A collective starts as soon as what it sends is there, and
    what leads to that from values at hand runs first. A wait goes right before the first node that
    needs the result; if ``cover`` heavy operators have not run since the start, those that come
    later and do not depend on it run first: the next chunk's experts, a shared expert, gradients of
    weights. Heavy operators are products of matrices, attention and whatever travels in a ring; an
    expert's function is as many as it has products.

    Memory is bounded by counts. Of one kind along one axis, ``ahead`` collectives and one more are
    on their way at most, so that a chunk's rows come while those of the chunk before are worked on.
    Of those that depend on the step's inputs alone, the gathers of parameters, ``prefetch`` are.
    Nothing runs before more than ``reach`` heavy operators that came before it, and nothing of
    backward in forward. What another pipeline stage sends is not taken before its turn, since that
    stage may wait for what comes in between. All decisions follow from the graph's structure, so
    ranks whose shards have different sizes decide alike, and their collectives run in one order.

    Requires: ``start_and_wait``. Ensures: the same operators on the same values. Raises PassError
    for a negative number.
    """
    numbers = {"ahead": ahead, "prefetch": prefetch, "cover": cover, "reach": reach}
    if negative := [f"{name}={number}" for name, number in numbers.items() if number < 0]:
        raise PassError(f"overlap counts collectives and operators, so not {', '.join(negative)}")

    def rewrite(program: Program) -> Program:
        order = _Schedule(program.graph, ahead, prefetch, cover, reach).order()
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in order:
            copies[node] = copy_node(graph, node, copies.__getitem__)
        return program.with_graph(graph)

    options = tuple(numbers.items())
    return Pass("overlap", rewrite, options, (Level.SCHEDULED,), needs=("start_and_wait",))


def _weight(node: fx.Node) -> int:
    """The heavy operators that a node stands for."""
    travels = ring(node.target) is not None or ring_backward(node.target) is not None
    return products(node) or int(travels)


class _Schedule:
    """A list schedule on a clock that counts heavy operators.

    One operator runs at a time, and beside it, along each axis, one collective, which takes
    ``cover`` ticks; the exchange of a few counts takes none of its own.
    """

    def __init__(self, graph: fx.Graph, ahead: int, prefetch: int, cover: int, reach: int):
        self.ahead, self.prefetch, self.cover, self.reach = ahead, prefetch, cover, reach
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        given = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        self.done = dict.fromkeys(given)  # in the new order
        # Waits have no place of their own: they go before whoever needs them.
        self.line = [n for n in graph.nodes if n not in self.done and n.target is not wait]
        self.at = 0  # in the line: all before it have run
        self.heavy = {node: weight for node in self.line if (weight := _weight(node))}
        self.clock = 0
        self.arrival: dict[fx.Node, int] = {}  # of what has started
        self.busy: dict[str, int] = defaultdict(int)  # until when each axis is
        self.flying: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)  # not waited for
        self.free = _free_starts(given, self.line)  # those that have not started
        self.fetched: set[fx.Node] = set()  # those that are not waited for

    def order(self) -> list[fx.Node]:
        """All nodes in their new order."""
        self._fetch()
        for place, node in enumerate(self.line):
            self.at = place
            if node in self.done or node in self.free:  # that starts when it is fetched, or needed
                continue
            if node in self.heavy:
                while self._launch():
                    pass
            self._await_operands(node)
            self._emit(node)
        return list(self.done)

    def _await_operands(self, node: fx.Node) -> None:
        """Wait for what the node needs, and do other work until that has arrived."""
        missing = [x for x in node.all_input_nodes if x not in self.done]
        starts = [x.all_input_nodes[0] for x in missing]
        for started in starts:
            if started in self.free:
                self._run(self._path(started) or ())
        arrives = max((self.arrival[x] for x in starts), default=0)
        while self.clock < arrives and (self._launch() or self._work()):
            pass
        for started in starts:
            self._wait(started)

    def _emit(self, node: fx.Node) -> None:
        if node in self.done:  # on the way to something else
            return
        if node.target is wait:
            self._wait(node.all_input_nodes[0])
            return
        if node.target is start:
            self._start(node)
        self.clock += self.heavy.get(node, 0)
        self.done[node] = None

    def _start(self, node: fx.Node) -> None:
        name, axis = kind = _kind(node)
        if node in self.free:
            self.free.remove(node)
            self.fetched.add(node)
        while len(self.flying[kind]) > self.ahead:
            self._wait(self.flying[kind][0])
        self.flying[kind].append(node)
        takes = 0 if name == "exchange_counts" else self.cover
        self.arrival[node] = self.busy[axis] = max(self.clock, self.busy[axis]) + takes

    def _wait(self, started: fx.Node) -> None:
        (waited,) = started.users
        if waited in self.done:
            return
        self.clock = max(self.clock, self.arrival[started])
        self.done[waited] = None
        self.flying[_kind(started)].remove(started)
        self.fetched.discard(started)
        self._fetch()

    # --- what runs before its turn ---

    def _fetch(self) -> None:
        """Start what depends on the inputs alone, while less than ``prefetch`` is on its way."""
        while self.free and len(self.fetched) < self.prefetch:
            for node in self._path(self.free[0]) or ():
                self._emit(node)

    def _launch(self) -> bool:
        """Start a collective to which nothing heavy leads; whether there was one."""
        for node in self._upcoming():
            if node.target is start and node not in self.free and not self._is_full(_kind(node)):
                path = self._path(node)
                if path is not None and self.heavy.keys().isdisjoint(path):
                    return self._run(path)
        return False

    def _work(self) -> bool:
        """Run a heavy operator that can run now, and what leads to it; whether there was one."""
        for node in self._upcoming():
            if node in self.heavy and (path := self._path(node)) is not None:
                return self._run(path)
        return False

    def _run(self, path: Iterable[fx.Node]) -> bool:
        for node in path:
            self._emit(node)
        return True

    def _is_full(self, kind: tuple[str, str]) -> bool:
        return len(self.flying[kind]) > self.ahead

    def _upcoming(self) -> Iterator[fx.Node]:
        """The nodes whose turn has not come, as far as the reach goes."""
        heavy = 0
        is_backward = roles.role(self.line[self.at]).backward
        for place in range(self.at, len(self.line) - 1):  # the last one is the output
            node = self.line[place]
            heavy += self.heavy.get(node, 0)
            if heavy > self.reach or roles.role(node).backward != is_backward:
                return
            if node not in self.done:
                yield node

    def _path(self, goal: fx.Node) -> list[fx.Node] | None:
        """What must run for the goal, in order; None if it takes what has not arrived."""
        found: set[fx.Node] = set()
        left = [goal]
        while left:
            node = left.pop()
            if node in found or node in self.done:
                continue
            if (node.target is start and node is not goal) or node.target is received:
                return None
            if node.target is wait:
                arrives = self.arrival.get(node.all_input_nodes[0])
                if arrives is None or arrives > self.clock:
                    return None
            found.add(node)
            left += node.all_input_nodes
        return sorted(found, key=self.place.__getitem__)


def _free_starts(given: Iterable[fx.Node], line: Iterable[fx.Node]) -> list[fx.Node]:
    """Collectives that depend on the inputs alone, so that all of them could start at once."""
    free = set(given)
    found: list[fx.Node] = []
    for node in line:
        if node.target is not receive and all(x in free for x in node.all_input_nodes):
            if node.target is start:
                found.append(node)
            else:
                free.add(node)
    return found


def _kind(started: fx.Node) -> tuple[str, str]:
    """The name and the axis of a collective."""
    name, *args = started.args
    return str(name), next(x for x in args if isinstance(x, str))
