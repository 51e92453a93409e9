"""How many ranks each component's parallelism takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moptrace.balance import Balance
from moptrace.dropping import Dropping
from moptrace.errors import PlanError
from moptrace.placement import Layout, Placement, Shard
from moptrace.precision import MixedPrecisionPolicy

__all__ = ["Plan"]

# Names of mesh dimensions, and the sizes of the plan that they set. Data parallel sizes follow.
_MESH_NAMES = ("tp", "cp", "pp", "ep", "etp", "vp", "dp_replicate")
_DATA_NAMES = ("dp", "dp_shard", "fsdp", "edp", "efsdp", "vdp", "world")
_AS_THE_MODEL_HAS_IT = MixedPrecisionPolicy()


@dataclass(frozen=True)
class Plan:
    """Sub-group sizes over the W ranks of the mesh; what is left over is data parallel.

    ``ep``: ranks that share the experts of a layer between them; by default the largest divisor of
    W / etp that no layer has fewer experts than, preferring one that divides the experts evenly.
    ``etp``: ranks that share the hidden units of each expert (expert tensor parallel).
    ``edp``: what the ranks with the same experts do with them, ``"shard"`` (gather before use) or
    ``"replicate"``.
    ``tp``: ranks that share the heads and hidden units of each layer (tensor parallel); outside of
    these, they share the tokens of each sequence.
    ``vp``: ranks that share the weight of the vocabulary; by default all.
    ``dp_replicate``: groups of ranks of which each holds all of the dense weights (HSDP); by
    default one.
    ``logits_bytes``: the largest logits that a rank holds whole; where its tokens have larger ones,
    the loss is taken from blocks of them, and the model's logits output is ``None`` in training
    unless ``keep_logits``.
    ``embedding_bytes``: the largest embedding weight that every rank gathers whole; of a larger one
    a rank fetches the rows of its tokens, from the ranks that have them.
    ``cp``: ranks that share the tokens of each sequence (context parallel), and ``context`` how
    attention reaches the others' tokens: ``"ulysses"``, ``"ring"`` or ``"gather"``.
    ``mixed_precision``: what parameters are cast to before they are gathered and used, what
    gradients are added up in, and what routers compute in; by default all as the model has it.
    ``dispatcher``: how tokens reach their experts: ``"all-to-all"`` sends each to those it chose,
    ``"all-gather"`` all of them to all ranks of a group of ``ep``, which take their experts' own.
    ``expert_tokens``: the most tokens that a rank sends to its experts at once; of more it makes
    chunks, so that no rank gets more than ep * etp * k rows for each of so many, whatever the
    router does. ``expert_chunks`` says which tokens a chunk has, ``"strided"`` or ``"contiguous"``.
    ``recompute_experts``: backward sends and computes each chunk's rows again instead of keeping
    them; by default where there are several chunks.
    ``fold_router_weights``: multiply each row with its router's weight before the last product of
    its expert rather than after it; backward then keeps none of the experts' results, which are
    ``k`` rows for each token.
    ``dropping``: a capacity for each expert, and what happens to the tokens beyond it; by default
    none, and no token is dropped.
    ``balance``: where some ranks of ``ep`` get many more rows than others, send rows and their
    experts' weights from these to those; by default each rank computes its own experts' rows.
    ``count_tokens``: count each expert's tokens in a buffer of the model, ``tokens_per_expert``.
    ``pp``: pipeline stages, of W / pp ranks each; all other sizes are those of a stage's ranks.
    ``pp_layers``: how many layers each stage has; by default stages take about as long as one
    another. ``micro_batches``: into how many a rank's sequences are divided, so that stages work at
    the same time; by default ``pp``. (A training step with ``accumulate=`` has as many of these
    each.) With stages the model returns the loss alone.

    >>> Plan(ep=2).resolve(world_size=4, experts=[8]).ep
    2
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    pp_layers: tuple[int, ...] | None = None
    micro_batches: int | None = None
    ep: int | None = None
    etp: int = 1
    vp: int | None = None
    dp_replicate: int = 1
    edp: str = "shard"
    context: str = "ulysses"
    logits_bytes: int = 64 << 20
    keep_logits: bool = False
    embedding_bytes: int = 64 << 20
    mixed_precision: MixedPrecisionPolicy = _AS_THE_MODEL_HAS_IT
    dispatcher: str = "all-to-all"
    expert_tokens: int | None = None
    expert_chunks: str = "strided"
    recompute_experts: bool | None = None
    fold_router_weights: bool = False
    dropping: Dropping | None = None
    balance: Balance | None = None
    count_tokens: bool = False

    def __str__(self) -> str:
        """The fields that are not the default.

        >>> print(Plan(tp=2, ep=4))
        Plan(tp=2, ep=4)
        """
        told = [(f.name, getattr(self, f.name)) for f in fields(self)]
        chosen = [f"{name}={value!r}" for name, value in told if value != getattr(Plan, name)]
        return f"Plan({', '.join(chosen)})"

    @property
    def divisions(self) -> int:
        """Into how many micro-batches a rank's batch is divided."""
        return self.pp if self.micro_batches is None else self.micro_batches

    def resolve(self, world_size: int, experts: list[int]) -> Plan:
        """Fill in the defaults for W ranks and layers with these numbers of experts.

        Raises PlanError, with the plans that would fit, where a size does not divide W.
        """
        ranks, rest = divmod(world_size, max(self.pp, 1))
        if rest or self.pp < 1:
            fitting = [f"Plan(pp={d})" for d in range(1, world_size + 1) if not world_size % d]
            raise PlanError(
                f"pp={self.pp} does not divide the {world_size} ranks of the mesh. "
                f"These would: {', '.join(fitting)}"
            )
        micro_batches = self.divisions
        if micro_batches < 1 or (self.pp == 1 and micro_batches > 1):
            raise PlanError(
                f"micro_batches={micro_batches} with pp={self.pp}: give 1 or more to a pipeline's "
                "stages; without any, train_step(accumulate=) divides a step"
            )
        if self.pp > 1 and self.keep_logits:
            raise PlanError(
                f"keep_logits=True with pp={self.pp}: stages return the loss alone; "
                "leave keep_logits=False, or pp=1"
            )
        of_stage = replace(self, pp=1, pp_layers=None, micro_batches=None)
        resolved = of_stage._resolve_stage(ranks, experts)
        return replace(resolved, pp=self.pp, pp_layers=self.pp_layers, micro_batches=micro_batches)

    def _resolve_stage(self, world_size: int, experts: list[int]) -> Plan:
        """The same for the ranks of one stage."""
        if self.edp not in ("shard", "replicate"):
            raise PlanError(f"edp is 'shard' or 'replicate', not {self.edp!r}")
        if self.dispatcher not in ("all-to-all", "all-gather"):
            raise PlanError(f"dispatcher is 'all-to-all' or 'all-gather', not {self.dispatcher!r}")
        if self.expert_chunks not in ("strided", "contiguous"):
            raise PlanError(
                f"expert_chunks is 'strided' or 'contiguous', not {self.expert_chunks!r}"
            )
        if self.expert_tokens is not None and self.expert_tokens < 1:
            raise PlanError(
                f"expert_tokens={self.expert_tokens} leaves no token to a chunk; give 1 or more, "
                "or None for all tokens at once"
            )
        if self.dropping and self.dropping.pad and self.expert_tokens is not None:
            raise PlanError(
                f"expert_tokens={self.expert_tokens} makes chunks, each of which would pad every "
                "expert's rows to its capacity; a capacity bounds a rank's rows already, so leave "
                "expert_tokens=None, or say pad=False"
            )
        self._check_balance()
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        for name in ("ep", "etp", "vp", "cp", "tp", "dp_replicate"):
            size = getattr(self, name)
            if size is not None and size not in divisors:
                fitting = ", ".join(f"Plan({name}={d})" for d in divisors)
                raise PlanError(
                    f"{name}={size} does not divide the {world_size} ranks of the mesh. "
                    f"These would: {fitting}"
                )
        for name in ("cp", "dp_replicate"):
            size, rest = getattr(self, name), world_size // self.tp
            if rest % size:
                raise PlanError(
                    f"tp={self.tp} leaves {rest} of the {world_size} ranks, and {name}={size} does "
                    f"not divide them; choose sizes with tp * {name} dividing {world_size}"
                )
        rest = world_size // self.etp
        if rest % (self.ep or 1):
            fitting = [f"Plan(ep={d}, etp={self.etp})" for d in divisors if rest % d == 0]
            raise PlanError(
                f"etp={self.etp} leaves {rest} of the {world_size} ranks, and ep={self.ep} does "
                f"not divide them: ep * etp must divide {world_size}. These would: "
                + ", ".join(fitting)
            )
        vp = self.vp or world_size
        if self.cp * self.tp > 1 and vp not in (own := (self.tp, self.cp * self.tp, world_size)):
            raise PlanError(
                f"vp={vp} does not go with tp={self.tp} and cp={self.cp}: ranks that share the "
                f"vocabulary are those that share sequences, or all. These would: "
                + ", ".join(f"Plan(vp={size})" for size in dict.fromkeys(own))
            )
        groups = [d for d in divisors if rest % d == 0]
        ep = self.ep if self.ep is not None else _default_ep(groups, experts)
        recompute = self.recompute_experts
        if recompute is None:
            recompute = self.expert_tokens is not None
        resolved = replace(self, ep=ep, vp=vp, recompute_experts=recompute)
        resolved._check_nesting(world_size)
        resolved._check_gathers(world_size)
        return resolved

    def _check_balance(self) -> None:
        """Ranks have different numbers of rows where these travel to their experts."""
        if self.balance is None:
            return
        if self.dispatcher == "all-gather":
            raise PlanError(
                "balance moves rows that are sent to their experts, and dispatcher='all-gather' "
                "sends none: say dispatcher='all-to-all', or balance=None"
            )
        if self.dropping and self.dropping.pad:
            raise PlanError(
                "with Dropping(pad=True) every expert has as many rows, so that there is nothing "
                "to balance: say pad=False, or balance=None"
            )

    def _check_gathers(self, world_size: int) -> None:
        """Tokens are gathered where groups of experts' ranks share sequences, or share none."""
        if self.dispatcher != "all-gather" or self._gathers(world_size):
            return
        shared = self.cp * self.tp
        sizes = [n for n in range(1, world_size // self.etp + 1) if not world_size % (n * self.etp)]
        fitting = [n for n in sizes if replace(self, ep=n)._gathers(world_size)]
        raise PlanError(
            f"dispatcher='all-gather' gathers tokens along ep={self.ep}, but {shared} ranks share "
            "each sequence, so that a group of ep has parts of sequences and of the batch at once. "
            f"With etp={self.etp} these would do: ep in {fitting}; or dispatcher='all-to-all'"
        )

    def _gathers(self, world_size: int) -> bool:
        layout = self.layout(world_size)
        kinds = [Shard(0, blocks=1 + (axis.name != "dp")) for axis in layout.tokens.axes]
        tokens = Placement(layout.tokens, tuple(kinds))
        return self.ep == 1 or tokens.expressed_in(layout.experts) is not None

    def _check_nesting(self, world_size: int) -> None:
        """Copies of weights that only some ranks share are stored where all views' groups nest."""
        if self.dp_replicate == 1 or self.vp == world_size:
            return
        layout = self.layout(world_size)
        borders = {low for low, _ in layout.storage.spans()}
        if all(low in borders for view in layout.views for low, _ in view.spans()):
            return
        groups = {"vp": self.vp, "ep * etp": (self.ep or 1) * self.etp, "tp": self.tp}
        told = ", ".join(f"{name}={size}" for name, size in groups.items() if size != 1)
        raise PlanError(
            f"dp_replicate={self.dp_replicate} leaves {world_size // self.dp_replicate} ranks to a "
            f"copy of the dense weights, which do not nest with {told}: of any two of these group "
            f"sizes one must divide the other. Or share the vocabulary among all: vp={world_size}"
        )

    def layout(self, world_size: int) -> Layout:
        """The views of a stage's ranks, of W in all, under a resolved plan."""
        assert self.ep is not None, "resolve the plan first"
        return Layout.of(
            world_size // self.pp,
            self.ep,
            self.cp,
            tp=self.tp,
            etp=self.etp,
            vp=self.vp,
            dp_replicate=self.dp_replicate,
        )

    @classmethod
    def from_mesh(cls, names: tuple[str, ...] | None, sizes: tuple[int, ...]) -> Plan:
        """The plan that the names of a mesh's dimensions ask for.

        >>> Plan.from_mesh(("dp_shard", "ep"), (2, 4)).ep
        4
        """
        asked: dict[str, int] = {}
        for name, size in zip(names or (), sizes, strict=False):
            if name in _MESH_NAMES:
                asked[name] = size
            elif name not in _DATA_NAMES:
                known = ", ".join((*_MESH_NAMES, *_DATA_NAMES))
                raise PlanError(
                    f"the mesh has a dimension named {name!r}, which says nothing to moptrace. "
                    f"Known names: {known}. Or give the mesh no names and pass plan=Plan(...)."
                )
        return cls(**asked)  # type: ignore[arg-type]

    def merged(self, mesh: Plan) -> Plan:
        """This plan with the sizes that the mesh sets; PlanError where they disagree."""
        changes: dict[str, object] = {}
        for entry in fields(self):
            mine, its = getattr(self, entry.name), getattr(mesh, entry.name)
            if its in (entry.default, mine):
                continue
            if mine != entry.default:
                raise PlanError(
                    f"the plan says {entry.name}={mine} but the mesh's dimension "
                    f"{entry.name!r} has size {its}; drop one of them"
                )
            changes[entry.name] = its
        return replace(self, **changes)  # type: ignore[arg-type]


def _default_ep(divisors: list[int], experts: list[int]) -> int:
    if not experts:
        return 1
    fewest = min(experts)
    fitting = [d for d in divisors if d <= fewest]
    even = [d for d in fitting if all(e % d == 0 for e in experts)]
    return max(even or fitting)
