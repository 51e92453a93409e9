"""Keep, compute again, or send to the host: the cheapest choice within a budget of bytes.

Every forward value with memory of its own is one of three from forward to backward: *kept*,
computed *again*, or *sent* to the host. The choice is an integer program. Its costs are seconds on
an assumed machine (``moptrace/costs.py``). Its rows say what is alive at some moment of the step,
as a function of the choice: a kept value from its definition to its last use; one that is sent
until its last use in forward, and from one layer ahead of its next use; a copy from the moment when
it is made, which is its first use or that of a copy that needs it. Values at the same place of like
layers share a choice.

The rows describe the step before it is changed, so each solution is applied and its peak predicted
anew (``moptrace/liveness.py``). Where that is over the budget, the moment of the peak becomes one
more row, or its row becomes tighter. What is returned is within the budget by that prediction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from torch import Tensor, fx

from moptrace import roles
from moptrace.activations import Activations, Phase, rows_of_dispatch
from moptrace.core import Level, Pass, Program
from moptrace.costs import Machine, operator_costs
from moptrace.errors import StepError
from moptrace.liveness import Peak, lifetimes, peak_memory, sizes_of_values
from moptrace.passes.offload import fetched_before, sent_to_host
from moptrace.passes.recompute import computed_again, dispatched
from moptrace.state import has_equal_shards

__all__ = ["fit_activations"]

ROUNDS = 24  # solutions that are tried; three or four are usual
CLOSE = 1.005  # of the least that the integer program believes in


def fit_activations(
    budget: int,
    *,
    machine: Machine | None = None,
    collectives: bool = False,
    groups: int = 4,
    then: Pass | None = None,
) -> Pass:
    """Bring the predicted peak of memory within ``budget`` bytes, at the least cost.

    The peak is that of ``peak_memory``: parameters, optimizer state and everything else included.
    If a pass is to change the result, ``then`` is that pass, and the peak is predicted for what it
    gives: collectives that start early take memory early. ``machine`` says how fast a rank is
    assumed to compute and to send. Like layers share their choices in at most ``groups`` groups of
    neighbours. What routing decides is decided once, and what ranks send each other is sent once,
    unless ``collectives``: then it may be sent again.

    Requires: a step; SciPy, which the extra ``fit`` installs. Ensures: the same operators on the
    same values. Raises StepError where no choice is within the budget: it says the least that was
    found to be possible, and what is alive then; and for ``collectives`` where ranks' shards differ
    in size, since their choices could.
    Source: Checkmate (arXiv 1910.02653), with like layers as one and sending as a third choice.
    """
    assumed = machine or Machine()

    def rewrite(program: Program) -> Program:
        if _peak(program, then).bytes <= budget:
            return program
        if collectives and not has_equal_shards(program):
            raise StepError(
                "fit_activations cannot send again what ranks send each other: their shards differ "
                "in size, so they could choose differently. Leave out collectives=True."
            )
        problem = _Problem(program, assumed, collectives, groups, then)
        found = problem.within(budget) or problem.least()
        if found.peak.bytes <= budget:
            return found.program.with_note(found.words(assumed))
        raise StepError(
            f"no choice of what to keep, to compute again and to send to the host brings the step "
            f"within {budget:,} bytes. The least that was found needs {found.peak}\n"
            "Give that much, or fewer tokens to a step: more micro-batches (accumulate=), more "
            "ranks for a sequence (Plan(cp=)), or chunks of tokens for experts "
            "(Plan(expert_tokens=))."
        )

    options = (("budget", budget), ("machine", assumed), ("collectives", collectives))
    options = (*options, ("groups", groups), ("then", str(then)))
    return Pass("fit_activations", rewrite, options, takes=(Level.STEP,), needs=("differentiate",))


# --- the values that there is a choice about ------------------------------------------------------


@dataclass(eq=False)
class _Value:
    """A forward value with memory of its own, and its uses as places in the unchanged step."""

    node: fx.Node
    layer: int
    bytes: int
    cost: float  # seconds to compute it again
    made: int
    last_forward: int
    first_backward: int | None  # None: backward does not need it
    last_backward: int | None
    operands: list[_Value] = field(default_factory=list["_Value"])
    users: list[_Value] = field(default_factory=list["_Value"])  # that may be computed again
    may_be_kept: bool = True
    may_be_again: bool = False
    fetched: int | None = None  # where it would come back from the host; None: it may not be sent
    copied: int | None = None  # the latest place where a copy of it is made
    until: int = -1  # the latest place where it is needed
    choice: int = -1


KEEP, AGAIN, SEND = range(3)


@dataclass
class _Found:
    """A choice, applied."""

    program: Program
    peak: Peak
    chosen: dict[int, list[_Value]]

    def words(self, machine: Machine) -> str:
        again, sent = self.chosen[AGAIN], self.chosen[SEND]
        seconds = sum(value.cost for value in again)
        return (
            f"fit_activations: a predicted peak of {self.peak.bytes:,} bytes; "
            f"{len(again)} values are computed again (about {seconds:.2g} s on {machine}), "
            f"{len(sent)} values of {sum(value.bytes for value in sent):,} bytes go to the host"
        )


class _Problem:
    """The integer program of one step."""

    def __init__(
        self,
        program: Program,
        machine: Machine,
        collectives: bool = False,
        groups: int = 1,
        then: Pass | None = None,
    ):
        self.program, self.machine, self.then = program, machine, then
        self.known = Activations(program)
        self.nodes = list(program.nodes)
        self.place = {node: at for at, node in enumerate(self.nodes)}
        self.sizes = sizes_of_values(program)
        self.costs = operator_costs(program, machine)
        self.phases = [list(self._values(phase, collectives)) for phase in self.known.phases]
        self.values = [value for own in self.phases for value in own]
        self.choices = self._share(groups)
        # At these places there are rows; the numbers of bytes by which they are too generous.
        self.names = {node.name: at for at, node in enumerate(self.nodes)}
        unchanged = _Found(program, _peak(program, then), {})
        fullest = max(range(len(self.nodes)), key=self.fixed.__getitem__)
        self.moments = {self.place_of(unchanged): 0, fullest: 0}

    def _values(self, phase: Phase, collectives: bool) -> Iterator[_Value]:
        root = self.known.root
        uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # of the value or a view of it
        for node, owner in root.items():
            uses[owner] += node.users
        inside = {*phase.forward, *phase.backward}
        made: dict[fx.Node, _Value] = {}
        for node in phase.forward:
            if root[node] is not node or any(user not in inside for user in uses[node]):
                continue
            backward = [self.place[x] for x in uses[node] if roles.role(x).backward]
            forward = [self.place[x] for x in uses[node] if not roles.role(x).backward]
            value = _Value(
                node,
                phase.layer_of[node],
                self.sizes[node],
                self.costs[node],
                self.place[node],
                max([self.place[node], *forward]),
                min(backward, default=None),
                max(backward, default=None),
                may_be_kept=not isinstance(roles.value(node), (list, tuple)),
                may_be_again=self.known.may_be_again(node, collectives),
            )
            if (back := self._fetched_before(node)) is not None:
                value.fetched = self.place[back]
            operands = dispatched(node) if rows_of_dispatch(node) else node.all_input_nodes
            value.operands = [made[root[x]] for x in operands if root[x] in made]
            made[node] = value
        for value in made.values():
            for operand in value.operands if value.may_be_again else ():
                operand.users.append(value)
        for value in reversed(made.values()):
            later = [user.copied for user in value.users if user.copied is not None]
            value.copied = max(later, default=None)
            if value.first_backward is not None:
                value.copied = value.first_backward
            value.until = max([value.last_backward or -1, *later])
        yield from made.values()

    def _fetched_before(self, node: fx.Node) -> fx.Node | None:
        x = roles.value(node)
        is_large = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0
        return fetched_before(self.known, node) if is_large else None

    def _share(self, groups: int) -> int:
        """Number the choices; values at the same place of like layers have the same one."""
        numbers: dict[Hashable, int] = {}
        for phase, own in zip(self.known.phases, self.phases, strict=True):
            for layer, members in groupby(own, key=lambda value: value.layer):
                values = list(members)
                likeness = tuple(map(_likeness, values))
                group = layer * groups // max(phase.layers, 1)
                for at, value in enumerate(values):
                    value.choice = numbers.setdefault((likeness, group, at), len(numbers))
        return len(numbers)

    @cached_property
    def fixed(self) -> list[int]:
        """The bytes at each place that are alive whatever is chosen."""
        changes = [0] * (len(self.nodes) + 1)
        chosen = {value.node for value in self.values}
        for node, final in lifetimes(self.program).items():
            if node not in chosen:
                changes[self.place[node]] += self.sizes[node]
                changes[self.place[final] + 1] -= self.sizes[node]
        return list(accumulate(changes))

    # --- solving ---

    def within(self, budget: int) -> _Found | None:
        """The cheapest choice whose predicted peak is within a budget, or None."""
        for _ in range(ROUNDS):
            solution = _Rows(self, budget).solve()
            if solution is None:
                return None
            found = self._applied(solution.chosen)
            if found.peak.bytes <= budget:
                return found
            self._learn(found, solution)
        return None

    def least(self) -> _Found:
        """The choice with the lowest peak that was found."""
        best: _Found | None = None
        self.moments = dict.fromkeys(self.moments, 0)
        for _ in range(ROUNDS):
            solution = _Rows(self, None).solve()
            assert solution is not None, "there is always the choice to keep what is kept"
            found = self._applied(solution.chosen)
            if best is None or found.peak.bytes < best.peak.bytes:
                best = found
            if best.peak.bytes <= CLOSE * max(solution.alive.values()):
                break
            self._learn(found, solution)
        assert best is not None
        return best

    def place_of(self, found: _Found) -> int:
        """The place of a peak: of a copy or a transfer, that of what it was made for."""
        program = self.then(found.program) if self.then else found.program
        node = next(n for n in program.nodes if n.name == found.peak.node)
        while node.name not in self.names:
            node = node.next
        return self.names[node.name]

    def _learn(self, found: _Found, solution: _Solution) -> None:
        """Write a row for the moment of a peak, or tighten it by what it did not foresee."""
        at, bytes_ = self.place_of(found), found.peak.bytes
        unforeseen = bytes_ - solution.alive.get(at, bytes_)
        self.moments[at] = self.moments.get(at, 0) + max(unforeseen, 0)

    def _applied(self, chosen: dict[int, list[_Value]]) -> _Found:
        again = {value.node for value in chosen[AGAIN]}
        names = {node.name for node, root in self.known.root.items() if root in again}
        program = computed_again(self.program, lambda node: node.name in names)
        sent = {value.node.name for value in chosen[SEND]}
        program = sent_to_host(program, sent) if sent else program
        return _Found(program, _peak(program, self.then), chosen)


def _peak(program: Program, then: Pass | None) -> Peak:
    return peak_memory(then(program) if then else program)


def _likeness(value: _Value) -> Hashable:
    wanted = value.first_backward is not None
    allowed = (value.may_be_kept, value.may_be_again, value.fetched is None)
    return (value.node.target, value.bytes, wanted, allowed)


@dataclass
class _Solution:
    """The values that are kept, computed again and sent; what the rows foresee at their places."""

    chosen: dict[int, list[_Value]]
    alive: dict[int, int]


class _Rows:
    """The variables and the rows, as ``scipy.optimize.milp`` takes them.

    Three variables for each choice, whether a copy has been made at some moment for some values,
    and, without a budget, the peak.
    """

    def __init__(self, problem: _Problem, budget: int | None):
        self.problem, self.budget = problem, budget
        self.variables = 3 * problem.choices
        self.upper = [0.0] * self.variables
        self.cost = [0.0] * self.variables
        self.entries: list[tuple[int, int, float]] = []
        self.limits: list[tuple[float, float]] = []
        self.scale = float(budget or peak_memory(problem.program).bytes)
        self.peak = self._variable(1.0) if budget is None else None
        self._choices()
        self.moments = {at: self._moment(at, slack) for at, slack in problem.moments.items()}

    def _variable(self, upper: float) -> int:
        self.variables += 1
        self.upper.append(upper)
        self.cost.append(0.0)
        return self.variables - 1

    def _row(self, terms: dict[int, float], low: float, high: float) -> None:
        self.entries += [(len(self.limits), at, x) for at, x in terms.items()]
        self.limits.append((low, high))

    def _choices(self) -> None:
        """What may be chosen, what it costs, and that a copy finds what it is made of."""
        wanted = [False] * self.problem.choices
        needs: set[tuple[int, int]] = set()
        for value in self.problem.values:
            at, wanted_here = 3 * value.choice, value.first_backward is not None
            wanted[value.choice] |= wanted_here
            allowed = (value.may_be_kept, value.may_be_again, value.fetched is not None)
            self.upper[at : at + 3] = map(float, allowed)
            host = 2 * value.bytes / self.problem.machine.host
            for kind, cost in zip((KEEP, AGAIN, SEND), (0.0, value.cost, host), strict=True):
                self.cost[at + kind] += cost + _NEARLY_NOTHING
            needs.update((value.choice, x.choice) for x in value.operands if value.may_be_again)
        for choice, is_wanted in enumerate(wanted):
            kinds = {3 * choice + kind: 1.0 for kind in (KEEP, AGAIN, SEND)}
            self._row(kinds, float(is_wanted), 1.0)
        for choice, operand in sorted(needs):
            there = {3 * operand + kind: 1.0 for kind in (KEEP, AGAIN, SEND)}
            self._row({3 * choice + AGAIN: -1.0, **there}, 0.0, _UNBOUNDED)

    def _moment(self, at: int, slack: int) -> dict[int, float]:
        """What is alive at one place: bytes for each variable, and those of -1 in any case."""
        alive: dict[int, float] = defaultdict(float)
        alive[-1] = float(self.problem.fixed[at] + slack)
        for values in self.problem.phases:
            copied = self._copied(values, at)
            for value in values:
                if value.made > at:
                    continue
                if at <= value.last_forward:
                    alive[-1] += value.bytes
                elif at <= value.until:
                    alive[3 * value.choice + KEEP] += value.bytes
                    if value in copied:
                        alive[copied[value]] += value.bytes
                    if value.fetched is not None and value.fetched <= at:
                        alive[3 * value.choice + SEND] += value.bytes
        terms = {v: x / self.scale for v, x in alive.items() if v >= 0}
        if self.peak is not None:
            terms[self.peak] = -1.0
        room = (self.budget or 0) - alive[-1]
        self._row(terms, -_UNBOUNDED, room / self.scale)
        return alive

    def _copied(self, values: list[_Value], at: int) -> dict[_Value, int]:
        """The variable that says whether a value's copy has been made at a moment."""
        found: dict[_Value, int] = {}
        for value in reversed(values):
            if not value.may_be_again or value.last_forward >= at:
                continue
            again = 3 * value.choice + AGAIN
            if value.first_backward is not None and value.first_backward <= at:
                found[value] = again
            elif made := {found[user] for user in value.users if user in found}:
                found[value] = self._variable(1.0)
                for user in made:  # who needs it has been copied, and it is not kept
                    self._row({found[value]: 1.0, again: -1.0, user: -1.0}, -1.0, _UNBOUNDED)
        return found

    def solve(self) -> _Solution | None:
        """The best choice, or None if no choice fulfils the rows."""
        optimize, sparse = _scipy()
        count = 3 * self.problem.choices
        cost = [x / (sum(self.cost) or 1.0) for x in self.cost]
        if self.peak is not None:
            cost = [1e-4 * x for x in cost]
            cost[self.peak] = 1.0
        rows, columns, numbers = zip(*self.entries, strict=True)
        matrix = sparse.csr_array(
            (numbers, (rows, columns)), shape=(len(self.limits), self.variables)
        )
        low, high = zip(*self.limits, strict=True)
        result = optimize.milp(
            cost,
            integrality=[1] * count + [0] * (self.variables - count),
            bounds=optimize.Bounds(0.0, self.upper),
            constraints=optimize.LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": 1e-3, "time_limit": 60.0},
        )
        if result.x is None:
            return None
        chosen: dict[int, list[_Value]] = {KEEP: [], AGAIN: [], SEND: []}
        for value in self.problem.values:
            for kind, own in chosen.items():
                if result.x[3 * value.choice + kind] > 0.5:
                    own.append(value)
        alive = {
            at: round(bytes_[-1] + sum(x * result.x[v] for v, x in bytes_.items() if v >= 0))
            for at, bytes_ in self.moments.items()
        }
        return _Solution(chosen, alive)


_UNBOUNDED = float("inf")
_NEARLY_NOTHING = 1e-12  # seconds: of two choices that cost the same, the one with fewer words


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as missing:
        raise StepError(
            "fit_activations solves an integer program with SciPy, which is not installed: "
            "pip install 'moptrace[fit]'"
        ) from missing
    return optimize, sparse
