"""What a plan costs a model, from formulas: bytes moved and memory on one rank, without a program.

``estimate`` chooses the mechanisms of a plan for each site of a model (``sites.py``) as the passes
do, and puts its sizes into their formulas (``mechanisms.py``). A model is read once; after that, a
plan takes milliseconds.

Where the passes do something else, with a note, the numbers differ from what ``explain`` counts on
the graph; ``Explanation.formulas`` prints both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from rich import box
from rich.table import Table
from sympy import Symbol

from moptrace import mechanisms as of
from moptrace.collectives import COLLECTIVES
from moptrace.core import Program
from moptrace.errors import PlanError
from moptrace.mechanisms import MECHANISMS, Mechanism
from moptrace.passes.shard_parameters import storage
from moptrace.placement import Placement, Shard, chunk_sizes
from moptrace.plan import Plan
from moptrace.rings import ring_places
from moptrace.roles import Component
from moptrace.sites import Attention, Block, Change, Lookup, Model, Movement, Projection, Weight

__all__ = ["Cost", "Estimate", "estimate"]

Sizes: TypeAlias = dict[Symbol, float]
Use: TypeAlias = tuple[Mechanism, Sizes]

_INTEGER = torch.int64.itemsize
# What is the width of a value that a collective moves along ``tp``.
_WIDTHS = {"all_gather": of.H, "all_to_all": of.H, "reduce_scatter": of.O, "all_reduce": of.D}


@dataclass(frozen=True)
class Cost:
    """A mechanism at all of its sites: ``bytes`` by what they are of, as its expressions are."""

    mechanism: Mechanism
    sites: int
    bytes: Mapping[str, float]

    def sent(self, kind: str) -> float:
        """The bytes that a rank sends by one kind of collective."""
        return sum(self.bytes.get(f"{kind} {way}", 0) for way in ("forward", "backward"))


@dataclass(frozen=True)
class Estimate:
    """What a plan costs a model on one rank, mechanism by mechanism.

    ``counted`` are the bytes moved that ``explain`` counted on the graph, for comparison.
    """

    plan: Plan
    world_size: int
    costs: tuple[Cost, ...]
    counted: Mapping[str, int] | None = field(default=None)

    @cached_property
    def moved(self) -> Mapping[str, int]:
        """The bytes that a rank sends in a step, by kind of collective."""
        kinds = dict.fromkeys(sent.kind for m in MECHANISMS for sent in m.sent)
        found = {kind: round(sum(cost.sent(kind) for cost in self.costs)) for kind in kinds}
        return {kind: bytes_ for kind, bytes_ in found.items() if bytes_}

    @property
    def bytes_moved(self) -> int:
        """Bytes that a rank sends in a step, expected where routing or ids decide."""
        return sum(self.moved.values())

    @cached_property
    def worst_moved(self) -> Mapping[str, int]:
        """The same under the worst routing."""
        found: Counter[str] = Counter()
        for cost in self.costs:
            for sent in cost.mechanism.sent:
                worst = cost.bytes.get(f"{sent.kind} worst")
                found[sent.kind] += round(cost.sent(sent.kind) if worst is None else worst)
        return {kind: bytes_ for kind, bytes_ in found.items() if bytes_}

    @property
    def stored(self) -> int:
        """Bytes of parameters that the fullest rank stores."""
        return self._total("stored")

    @property
    def gradients(self) -> int:
        """Bytes of their gradients."""
        return self._total("gradients")

    @property
    def kept(self) -> int:
        """Bytes that collectives bring in forward and backward needs."""
        return self._total("kept")

    @property
    def made(self) -> int:
        """Bytes that operators make for backward, as many as the plan decides."""
        return self._total("made")

    @property
    def buffer(self) -> int:
        """Bytes of the largest value that a collective brings."""
        return round(max((cost.bytes.get("buffer", 0) for cost in self.costs), default=0))

    def of(self, mechanism: Mechanism) -> Cost:
        """The cost of a mechanism; KeyError if the plan does not choose it."""
        for cost in self.costs:
            if cost.mechanism is mechanism:
                return cost
        raise KeyError(mechanism.name)

    def _total(self, what: str) -> int:
        return round(sum(cost.bytes.get(what, 0) for cost in self.costs))

    def __str__(self) -> str:
        from moptrace.explain import printed

        meanings = (f"{symbol} = {of.SYMBOLS[symbol]}" for symbol in self._symbols())
        return "\n".join([printed(self._table()), printed(self._totals()), *meanings])

    def _symbols(self) -> list[Symbol]:
        used = {symbol for cost in self.costs for symbol in cost.mechanism.symbols}
        return [symbol for symbol in of.SYMBOLS if symbol in used]

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("mechanism, where the formula is from")
        table.add_column("of", no_wrap=True)
        table.add_column("formula")
        table.add_column("bytes", justify="right", no_wrap=True)
        for cost in self.costs:
            told = [f"{cost.mechanism.name}, x{cost.sites}", f"({cost.mechanism.source})"]
            for what, expression in cost.mechanism.expressions.items():
                if cost.bytes[what]:
                    first = told.pop(0) if told else ""
                    table.add_row(first, what, _spelled(expression), f"{cost.bytes[what]:,.0f}")
            table.add_row(*told)
            table.add_section()
        return table

    def _totals(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("together", "formulas", "under any routing", "counted on the graph"):
            table.add_column(name, justify="left" if name == "together" else "right")
        counted, worst = self.counted or {}, self.worst_moved
        for kind in dict.fromkeys((*self.moved, *counted)):
            seen = f"{counted.get(kind, 0):,}" if self.counted is not None else ""
            table.add_row(kind, f"{self.moved.get(kind, 0):,}", f"{worst.get(kind, 0):,}", seen)
        for name in ("stored", "gradients", "kept", "made", "buffer"):
            table.add_row(name, f"{getattr(self, name):,}", "", "")
        return table


def _spelled(expression: object) -> str:
    """
    >>> from sympy import Symbol, ceiling
    >>> _spelled(ceiling(Symbol("x")) ** 2)
    'ceil(x)**2'
    """
    return str(expression).replace("ceiling(", "ceil(")


def estimate(
    model: Model | Program,
    plan: Plan,
    world_size: int,
    masters: Mapping[str, torch.dtype] | None = None,
) -> Estimate:
    """What a resolved plan costs a model on each of so many ranks, from formulas.

    ``model`` is a program that was made from a canonical one, or the sites that were read of it:
    read once, they serve every plan. ``masters`` are the dtypes in which parameters are held, by
    the user's names, where these are not the ones in which the model computes. Raises PlanError for
    pipeline stages, which have no formulas yet.

    >>> from moptrace.testing import ModelSpec
    >>> from moptrace.passes.default import canonical
    >>> import torch, moptrace
    >>> ids = torch.zeros(4, 8, dtype=torch.int64)
    >>> batch = {"input_ids": ids, "labels": ids}
    >>> model = Model(canonical()(moptrace.trace(ModelSpec(experts=4).build(), batch)))
    >>> [estimate(model, Plan(ep=ep).resolve(4, [4]), 4).moved["all_gather"] for ep in (1, 2, 4)]
    [5280, 2976, 1824]
    """
    if plan.pp > 1:
        raise PlanError(
            f"there are no formulas of pipeline stages yet, and pp={plan.pp}: estimate a stage's "
            "ranks with pp=1, or count on the graph with explain()"
        )
    found = model if isinstance(model, Model) else Model(model)
    if plan.fold_router_weights:
        found = found.folded
    uses = _Chooser(found, plan, world_size, masters or {}).uses()
    together: Counter[tuple[Mechanism, frozenset[tuple[Symbol, float]]]] = Counter()
    for mechanism, sizes in uses:
        needed = ((symbol, sizes[symbol]) for symbol in mechanism.symbols)
        together[mechanism, frozenset(needed)] += 1
    costs = (_cost(mechanism, together) for mechanism in MECHANISMS)
    return Estimate(plan, world_size, tuple(cost for cost in costs if cost.sites))


def _cost(
    mechanism: Mechanism,
    uses: Mapping[tuple[Mechanism, frozenset[tuple[Symbol, float]]], int],
) -> Cost:
    """The bytes of a mechanism at all of its sites; of buffers the largest."""
    total: dict[str, float] = dict.fromkeys(mechanism.expressions, 0.0)
    sites = 0
    for (used, sizes), times in uses.items():
        if used is mechanism:
            sites += times
            for what, bytes_ in mechanism.at(dict(sizes)).items():
                more = total[what] + times * bytes_
                total[what] = max(total[what], bytes_) if what == "buffer" else more
    return Cost(mechanism, sites, total)


# --- which mechanisms a plan chooses --------------------------------------------------------------


class _Chooser:
    """The choices of one plan for one model."""

    def __init__(
        self, model: Model, plan: Plan, world_size: int, masters: Mapping[str, torch.dtype]
    ):
        assert plan.ep is not None and plan.vp is not None, "resolve the plan first"
        self.model, self.plan, self.world, self.masters = model, plan, world_size, masters
        self.layout = plan.layout(world_size)
        self.split = model.shared("tp", plan.tp)
        self.split_experts = model.shared("etp", plan.etp)
        self.parts = plan.cp * plan.tp  # of each sequence
        self.dp = world_size // self.parts
        self.projections = [p for p in model.projections if self._is_fused(p)]
        self.lookups = [lookup for lookup in model.lookups if self._is_fetched(lookup)]
        self.sizes: Sizes = {
            of.W: world_size, of.dp: self.dp, of.cp: plan.cp, of.tp: plan.tp,
            of.ep: plan.ep, of.etp: plan.etp, of.vp: plan.vp, of.i: _INTEGER,
        }  # fmt: skip

    def uses(self) -> Iterator[Use]:
        """Every mechanism at every site, with the sizes that its formulas need."""
        for weight in self.model.weights:
            yield from self._weight(weight)
        yield from map(self._movement, self.split.moved)
        if self.plan.cp > 1:
            for attention in self.model.attentions:
                yield self._attention(attention)
        for block in self.model.blocks:
            yield from self._block(block)
        for projection in self.model.projections:
            if projection not in self.projections:
                sizes: Sizes = {of.V: projection.words}
                yield self._use(of.LOGITS, projection.labels, projection.itemsize, sizes)
        if self.plan.vp != 1:
            yield from map(self._projection, self.projections)
            yield from (use for lookup in self.lookups for use in self._fetches(lookup))
        yield from self._changes()

    def _use(self, mechanism: Mechanism, tokens: float, itemsize: int, sizes: Sizes) -> Use:
        given: Sizes = {
            of.N: tokens, of.n: self._of_a_rank(tokens), of.b: itemsize, of.a: max(itemsize, 4),
        }  # fmt: skip
        return mechanism, self.sizes | given | sizes

    def _of_a_rank(self, tokens: float) -> float:
        """Of so many tokens in the batch, those of the rank that has most."""
        sequences = self.model.batch[0]
        if tokens % (sequences * self.parts):
            return math.ceil(tokens / self.world)
        return math.ceil(sequences / self.dp) * tokens / (sequences * self.parts)

    # --- weights ---

    def _weight(self, weight: Weight) -> Iterator[Use]:
        policy, asked = self.plan.mixed_precision, list(self._asked(weight))
        held = storage(weight.shape, asked, self.layout, self.plan.edp)
        used, added = weight.dtype, weight.dtype
        if used.is_floating_point:
            if weight.component == Component.ROUTER and policy.router_dtype:
                used = torch.promote_types(used, policy.router_dtype)
            added = policy.reduced_in(used)
        sizes = self.sizes | {
            of.w: used.itemsize * weight.used, of.r: added.itemsize,
            of.trained: weight.trained and weight.used, of.again: 0,
        }  # fmt: skip
        way = _Way.of(weight.shape, held)
        stored: Sizes = {of.s: self._stored(weight).itemsize, of.R: way.copies}
        for wanted in self._wanted(weight, asked, held):
            *steps, last = way.steps(wanted)
            exchanges = list(way.exchanges(wanted))
            last[of.again] = 0
            if weight.kept and last[of.G] > 1 and not exchanges:
                last[of.again] = 1 / self._taken(weight, asked, wanted)
            for step in (*steps, last):
                yield self._step(weight, sizes | stored | step)
                stored = {of.s: 0, of.R: 1}
            for ranks in exchanges:
                yield of.FUSED, sizes | last | {of.P: ranks, of.again: weight.kept}

    def _taken(
        self, weight: Weight, asked: Sequence[tuple[str, Shard]], wanted: Mapping[str, Shard]
    ) -> float:
        """Into how many shares a weight is cut only after it was gathered."""
        if self._is_of_words(weight):
            return 1
        ranks = math.prod(self.layout.size(axis) for axis in {axis for axis, _ in asked})
        return ranks / math.prod(self.layout.size(axis) for axis in wanted)

    def _step(self, weight: Weight, sizes: Sizes) -> Use:
        """One gather of a weight; of experts', where each rank then has some of them."""
        if weight.experts is None:
            return of.WEIGHTS, sizes
        experts = weight.shape[weight.experts]
        own = math.ceil(experts / self.sizes[of.ep])
        if sizes[of.y] % own:
            return of.WEIGHTS, sizes
        return of.EXPERT_WEIGHTS, sizes | {of.E: experts, of.y: sizes[of.y] / own}

    def _wanted(
        self, weight: Weight, asked: Sequence[tuple[str, Shard]], held: Placement
    ) -> Iterator[dict[str, Shard]]:
        """For each use the splits that it takes as they are, by axes of the stored weight.

        What is asked for in the words of another view is found by its ranks. Other blocks of the
        dimension that is split are taken of the whole.
        """
        wanted: dict[str, Shard] = {}
        for axis, kind in zip(held.view.axes, held.kinds, strict=True):
            for name, split in reversed(asked):
                if isinstance(kind, Shard) and self.layout.same_ranks(name, axis.name):
                    if split == kind or split.dim != kind.dim:
                        wanted[axis.name] = split
        if not self._is_of_words(weight):
            yield wanted
            return
        ring = {self._ring: Shard(0)}
        looks = [lookup for lookup in self.model.lookups if lookup.weight == weight.name]
        if any(lookup not in self.lookups for lookup in looks):
            yield {axis: split for axis, split in wanted.items() if axis not in ring}
        yield wanted | ring

    def _asked(self, weight: Weight) -> Iterator[tuple[str, Shard]]:
        """How the passes ask for a weight to be split, in their order."""
        if weight.experts is not None:
            yield "ep", Shard(weight.experts)
        for axis, shared in (("tp", self.split), ("etp", self.split_experts)):
            yield from ((axis, kind) for kind in shared.asked.get(weight.name, ()))
        if self._is_of_words(weight) and self.layout.vocabulary != self.layout.dense:
            yield self._ring, Shard(0)

    @property
    def _ring(self) -> str:
        """The axis over which words are split."""
        return self.layout.vocabulary.axes[-1].name

    def _is_of_words(self, weight: Weight) -> bool:
        """Whether the weight, or bias, of a fused projection or of a lookup that fetches rows."""
        names = {name for p in self.projections for name in (p.weight, p.bias)}
        return weight.name in names | {lookup.weight for lookup in self.lookups}

    def _stored(self, weight: Weight) -> torch.dtype:
        first, *others = (self.masters.get(fqn, weight.dtype) for fqn in weight.fqns)
        for other in others:
            first = torch.promote_types(first, other)
        return first

    # --- tokens ---

    def _movement(self, one: Movement) -> Use:
        tokens = math.prod(self.model.batch)
        width = one.bytes / tokens / one.itemsize
        sizes: Sizes = {of.H: 0, of.O: 0, of.D: 0, of.again: one.kept}
        sizes[_WIDTHS[one.collective]] = width
        mechanism = of.EXCHANGED if one.collective == "all_to_all" else of.TENSOR
        return self._use(mechanism, tokens, one.itemsize, sizes)

    def _attention(self, one: Attention) -> Use:
        cp, apart = self.plan.cp, self.plan.tp if self.split.heads else 1
        heads, groups = one.heads, one.groups
        enough = heads // apart % cp == 0 if apart > 1 else min(chunk_sizes(heads, (cp,))) > 0
        reach, moved = ring_places(one.length, cp, one.sight, one.fixed)
        if one.travels and self.plan.context != "gather":
            mechanism = of.ULYSSES if self.plan.context == "ulysses" and enough else of.RING
        else:
            mechanism = of.ULYSSES if enough and self.plan.context != "gather" else of.WHOLE
        ranks = cp * apart
        if mechanism is of.ULYSSES and (groups % ranks or heads % ranks):
            groups = heads
        sizes: Sizes = {
            of.h: heads, of.g: one.wide if mechanism is of.WHOLE else groups,
            of.d: one.query, of.e: one.value, of.j: reach, of.z: moved * cp / one.length,
        }  # fmt: skip
        return self._use(mechanism, one.sequences * one.length, one.itemsize, sizes)

    # --- experts ---

    def _block(self, block: Block) -> Iterator[Use]:
        plan, dropping = self.plan, self.plan.dropping
        gathered, added = self.split_experts.rows.get(block.name, (0, 0))
        tokens, ep, etp = block.tokens, self.sizes[of.ep], plan.etp if gathered else 1
        own = self._of_a_rank(tokens)
        chunks = math.ceil(own / plan.expert_tokens) if plan.expert_tokens else 1
        share, competing = 1.0, 1
        if dropping is not None:
            scopes = {"sub-sequence": 1, "sequence": self.parts, "batch": self.world}
            competing = scopes[dropping.over]
            of_group = tokens * competing // self.world
            capacity = dropping.capacity(of_group, block.choices, block.experts)
            share = block.experts * capacity / (of_group * block.choices)
            share = share if dropping.pad else min(1.0, share)
            self.sizes[of.C] = capacity
        gathers = plan.dispatcher == "all-gather" and plan.etp in (1, etp) and ep * etp > 1
        balance = plan.balance if ep > 1 and not gathers else None
        places = balance.places(chunk_sizes(block.experts, (int(ep),))) if balance else 0
        sizes: Sizes = {
            of.E: block.experts, of.k: block.choices, of.H: block.width, of.O: block.combined,
            of.F: block.sent, of.f: block.widest, of.Q: block.returned, of.q: block.needed,
             of.J: block.between, of.m: block.weighed,
            of.S: competing, of.K: chunks, of.rho: bool(plan.recompute_experts), of.sigma: share,
            of.scored: dropping is not None and dropping.by == "probability",
            of.places: places, of.guest: block.parameters / etp, of.etp: etp,
        }  # fmt: skip

        def use(mechanism: Mechanism) -> Use:
            return self._use(mechanism, tokens, block.itemsize, sizes)

        yield use(of.FUNCTION)
        if dropping is not None and block.first and competing > 1:
            yield use(of.COMPETING)
        if gathers:
            yield use(of.GATHERED)
            if block.first:
                yield use(of.CHOICES)
            return
        padded = dropping is not None and dropping.pad
        if balance is not None and block.first:
            yield use(of.BALANCED)
        if ep > 1:
            yield use(of.SLOTS if padded else of.EXPERTS)
        if etp > 1:
            beside = block.sent - block.widest
            rows: Sizes = {of.F: gathered, of.f: gathered - beside, of.Q: added}
            mechanism = of.HIDDEN_SLOTS if padded else of.HIDDEN
            yield self._use(mechanism, tokens, block.itemsize, sizes | rows)
        if plan.expert_tokens is not None:
            yield use(of.BOUND)

    # --- the vocabulary ---

    def _is_fused(self, projection: Projection) -> bool:
        return projection.logits_bytes >= self.plan.logits_bytes * self.world

    def _is_fetched(self, lookup: Lookup) -> bool:
        """Whether rows are fetched: less than the whole weight, and nothing else needs that."""
        small = lookup.words * lookup.width * lookup.itemsize < self.plan.embedding_bytes
        fused = {projection.weight for projection in self.projections}
        others = lookup.whole or (lookup.projected and lookup.weight not in fused)
        few = self.world > 1 and sum(lookup.ids) < self.world * lookup.words
        return few and not small and not others

    def _projection(self, one: Projection) -> Use:
        mechanism = (
            of.WORDS if one.tokens * self.sizes[of.vp] / self.world > one.words else of.TRAVELLERS
        )
        biased = mechanism is of.WORDS and one.bias is not None
        following = self.layout.sizes(one.words, self._ring)[1]
        sizes: Sizes = {of.V: one.words, of.v: following, of.H: one.width + biased}
        return self._use(mechanism, one.tokens, one.itemsize, sizes)

    def _fetches(self, one: Lookup) -> Iterator[Use]:
        sizes: Sizes = {of.V: one.words, of.H: one.width}
        return (self._use(of.LOOKUP, ids, one.itemsize, sizes) for ids in one.ids)

    # --- what no plan chooses ---

    def _changes(self) -> Iterator[Use]:
        """Along the sequences of a batch, and along the tokens of each; or once along both."""
        fused, dp = bool(self.projections), self.dp
        of_batch = self.model.along_batch(fused) if dp > 1 else ()
        of_each = self.model.along_sequences(fused) if self.parts > 1 else ()
        both = {change for change in of_batch if change in of_each and change.is_sum}
        axes = (self.parts,) if dp == 1 else (self.plan.cp, self.plan.tp)
        for change in of_batch:
            yield from self._change(change, (self.world,) if change in both else (dp,))
        for change in of_each:
            yield from self._change(change, axes) if change not in both else ()

    def _change(self, change: Change, axes: Sequence[int]) -> Iterator[Use]:
        row = COLLECTIVES[change.collective]
        forward = row.name.removesuffix("_invariant")
        backward = (row.transpose or "").removesuffix("_invariant")
        sizes: Sizes = {of.trained: change.trained and backward in ("all_reduce", "reduce_scatter")}
        if "all_reduce" in (forward, backward):
            for ranks in axes:
                summed = {of.P: ranks, of.A: change.bytes, of.summed: forward == "all_reduce"}
                yield of.SUMS, self.sizes | sizes | summed
        elif forward == "all_gather":
            whole = self._of_a_rank(change.bytes) * self.parts
            yield of.TOGETHER, self.sizes | sizes | {of.P: math.prod(axes), of.A: whole}


@dataclass(frozen=True)
class _Way:
    """How a stored weight becomes what a use takes: gathers, one axis after another.

    ``splits`` is the dimension that each axis splits, with its ranks; ``copies`` ranks hold the
    same.
    """

    shape: tuple[int, ...]
    splits: Mapping[str, tuple[int, int]]
    copies: int

    @classmethod
    def of(cls, shape: tuple[int, ...], held: Placement) -> _Way:
        pairs = list(zip(held.view.axes, held.kinds, strict=True))
        splits = {a.name: (k.dim, a.size) for a, k in pairs if isinstance(k, Shard)}
        copies = math.prod(a.size for a, kind in pairs if not isinstance(kind, Shard))
        return cls(shape, {name: split for name, split in splits.items() if split[1] > 1}, copies)

    def steps(self, wanted: Mapping[str, Shard]) -> Iterator[Sizes]:
        """The sizes of each gather, inner axes first; of one that gathers nothing, if none does."""
        left = dict(self.splits)
        gathered = [axis for axis in reversed(left) if axis not in wanted]
        for axis in gathered:
            dim, ranks = left.pop(axis)
            yield self._sizes(left, dim, ranks)
        if not gathered:
            yield self._sizes(left, -1, 1)

    def exchanges(self, wanted: Mapping[str, Shard]) -> Iterator[int]:
        """The ranks that exchange one split for another."""
        for axis, (dim, ranks) in self.splits.items():
            if axis in wanted and wanted[axis].dim != dim:
                yield ranks

    def _sizes(self, left: Mapping[str, tuple[int, int]], dim: int, ranks: int) -> Sizes:
        lengths = list(self.shape) or [1]
        for split, parts in left.values():
            lengths[split] = -(-lengths[split] // parts)
        length = lengths.pop(dim)
        return {of.x: length, of.y: math.prod(lengths), of.G: ranks}
