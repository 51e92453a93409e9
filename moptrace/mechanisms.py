"""What every mechanism that a plan can choose costs, as formulas in the symbols of ``SYMBOLS``.

A ``Mechanism`` is one value of the table ``MECHANISMS``: the bytes that a rank sends in a step,
forward and backward, by collective, and the memory that it takes. ``formulas.py`` says which of
them a plan chooses for a model, and what that makes in numbers.

*Sent* are the bytes of the fullest rank, counted as ``explain`` counts them: each collective as a
ring, or directly. Where routing or ids decide, they are those expected if all experts and all ids
are as likely, and ``worst`` are those of a step that no routing exceeds.

*Stored* are the slices of parameters that a rank has between steps, and ``gradients`` theirs.
``kept`` is what collectives have brought in forward and backward needs, and ``made`` what operators
make for it where the plan decides how much. ``buffer`` is the largest value that a collective
brings, before small ones are packed together. What is kept on one device as well, such as the
operands of a norm, is no cost of a mechanism.

Of uneven slices the longest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from sympy import Max, Piecewise, Symbol, ceiling

__all__ = ["MECHANISMS", "SYMBOLS", "Mechanism", "Sent"]

# --- symbols --------------------------------------------------------------------------------------

SYMBOLS: dict[Symbol, str] = {}


def _symbol(name: str, meaning: str) -> Any:
    symbol = Symbol(name, nonnegative=True)
    SYMBOLS[symbol] = meaning
    return symbol


# of the plan
W = _symbol("W", "ranks")
dp = _symbol("dp", "ranks that share the sequences of a batch: W/(cp*tp)")
cp = _symbol("cp", "ranks that share the tokens of a sequence, at full width")
tp = _symbol("tp", "ranks that share heads and hidden units, and tokens outside of these")
ep = _symbol("ep", "ranks that share the experts of a layer")
etp = _symbol("etp", "ranks that share the hidden units of an expert")
vp = _symbol("vp", "ranks that share the words of a vocabulary")
K = _symbol("K", "chunks of tokens that go to their experts one after another: ceil(n/c)")
rho = _symbol("rho", "1 where backward sends the rows of experts again, else 0")
C = _symbol("C", "rows that an expert keeps of a rank's tokens: its capacity")
sigma = _symbol("sigma", "share of the rows that a capacity leaves, min(1, E*C/(n*k)), or makes")
S = _symbol("S", "ranks whose tokens compete for an expert's capacity")
scored = _symbol("scored", "1 where a capacity leaves the rows of the highest weights, else 0")
places = _symbol("places", "experts that a rank has place for, its own and guests")

# of the model, on one rank where it says so
N = _symbol("N", "tokens of the batch")
n = _symbol("n", "tokens of a rank: ceil(B/dp)*T/(cp*tp), of B sequences of T tokens")
H = _symbol("H", "width of a token")
O = _symbol("O", "width of a token's result")  # noqa: E741
D = _symbol("D", "sums of a token over features that ranks share, such as a norm's")
h = _symbol("h", "heads of queries")
g = _symbol("g", "heads of keys that move: as few as a group has, if ranks divide these")
d = _symbol("d", "width of a query's and a key's head")
e = _symbol("e", "width of a value's head")
j = _symbol("j", "ranks to which keys travel: cp-1, or fewer in a window")
z = _symbol("z", "share of a rank's tokens that change places for a ring (zig-zag): 1/2 or 0")
E = _symbol("E", "experts of a layer")
k = _symbol("k", "experts that a token chooses")
F = _symbol("F", "features of a row on its way to an expert, with weights that go with it")
f = _symbol("f", "the same without these")
Q = _symbol("Q", "features of a row on its way back")
q = _symbol("q", "those that backward needs: none where weights go with the row instead")
V = _symbol("V", "words of a vocabulary")
v = _symbol("v", "words of the next rank on a ring, about V/vp")
J = _symbol("J", "features of the results of an expert's first products: twice I, with a gate")
A = _symbol("A", "bytes of a value that is added up, or made whole, as a rank then has it")
summed = _symbol("summed", "1 for a sum over ranks, 0 for a value whose gradient alone is one")
m = _symbol("m", "operators that take the weights of a token's choices")

# of one weight
x = _symbol("x", "length of the dimension along which a weight is gathered, on a rank")
y = _symbol("y", "elements of a weight, or of one expert's, at each place of that dimension")
G = _symbol("G", "ranks that a weight is gathered from: W/dp_replicate, or edp = W/(ep*etp)")
R = _symbol("R", "ranks with copies of a weight's slice: dp_replicate, or edp where that is copied")
P = _symbol("P", "ranks of the axis along which something moves")
trained = _symbol("trained", "1 for what has a gradient that moves, else 0")
again = _symbol(
    "again", "share of what was moved that backward needs, 0 or 1 but for weights cut after"
)

# bytes
b = _symbol("b", "bytes of an activation's element")
a = _symbol("a", "bytes of an element of sums that travel: those of float32, at least")
i = _symbol("i", "bytes of an integer")
w = _symbol("w", "bytes of a weight's element as it is used and gathered")
r = _symbol("r", "bytes of its gradient's element as it is added up")
s = _symbol("s", "bytes of its element as it is stored, and of its gradient's")
guest = _symbol("guest", "bytes of what one expert has")


# --- the table ------------------------------------------------------------------------------------

ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Sent:
    """What one kind of collective sends: in forward and in backward, and at ``worst`` in all.

    ``worst`` is None where nothing but sizes decides.
    """

    kind: str
    forward: Any = ZERO
    backward: Any = ZERO
    worst: Any = None


@dataclass(frozen=True, eq=False)
class Mechanism:
    """One way of a plan to divide work or memory: its name, its formulas, where they come from."""

    name: str
    sent: tuple[Sent, ...]
    stored: Any = ZERO
    gradients: Any = ZERO
    kept: Any = ZERO
    made: Any = ZERO
    buffer: Any = ZERO
    source: str = ""

    @property
    def expressions(self) -> dict[str, Any]:
        """Every formula by what it is of, without those that are zero."""
        found = {f"{one.kind} forward": one.forward for one in self.sent}
        found |= {f"{one.kind} backward": one.backward for one in self.sent}
        memory = ("stored", "gradients", "kept", "made", "buffer")
        found |= {name: getattr(self, name) for name in memory}
        found |= {f"{one.kind} worst": one.worst for one in self.sent if one.worst is not None}
        return {name: expression for name, expression in found.items() if expression != 0}

    @cached_property
    def symbols(self) -> tuple[Symbol, ...]:
        used = set[Any]().union(*(x.free_symbols for x in self.expressions.values()))
        return tuple(sorted(used, key=str))

    @cached_property
    def _compiled(self) -> Callable[..., list[float]]:
        return sympy.lambdify(self.symbols, list(self.expressions.values()), "math")

    def at(self, sizes: Mapping[Symbol, float]) -> dict[str, float]:
        """The numbers of the formulas, by what they are of."""
        values = self._compiled(*(sizes[symbol] for symbol in self.symbols))
        return dict(zip(self.expressions, values, strict=True))


def _all_to_all(parts: Any, size: Any) -> Any:
    return (parts - 1) * size / parts


def _all_reduce(parts: Any, size: Any) -> Any:
    return 2 * (parts - 1) * size / parts


_rows = sigma * k * N / W  # of a rank, on average
_chunk = sigma * k * ceiling(n / K)  # of a chunk
_full = k * n  # under any routing
_own = ceiling(E / ep)  # experts of a rank
_times = 1 + rho
_slots = _own * ep * C  # padded rows that come to a rank
_cards = ep * etp  # that a group of experts' ranks has
_words = ceiling(V / vp)
_ids = V * (1 - (1 - 1 / V) ** n) * (vp - 1) / vp  # distinct ones whose rows are elsewhere
_keys = g * (d + e)


def _gathered(name: str, beside: Any, source: str) -> Mechanism:
    """Weights of which ``beside`` elements lie at each place of the dimension that is gathered."""
    slice_ = ceiling(x / G) * beside
    return Mechanism(
        name,
        (
            Sent("all_gather", (G - 1) * slice_ * w),
            Sent("reduce_scatter", ZERO, trained * (G - 1) * slice_ * r),
            Sent("all_reduce", ZERO, trained * _all_reduce(R, slice_ * r)),
        ),
        stored=slice_ * s,
        gradients=trained * slice_ * s,
        kept=again * x * beside * w,
        buffer=Piecewise((x * beside * w, G > 1), (0, True)),
        source=source,
    )


WEIGHTS = _gathered(
    "weights stored in slices, gathered before use",
    y,
    "MoP, arXiv 2607.01844, section 1: O(Theta/W); HSDP adds up the gradients of copies",
)
EXPERT_WEIGHTS = _gathered(
    "experts' weights, gathered from ranks with the same experts",
    _own * y,
    "MoP, arXiv 2607.01844, section 1; Folding, arXiv 2504.14960: edp = W/(ep*etp)",
)
FUSED = Mechanism(
    "blocks of a fused weight",
    (Sent("all_to_all", _all_to_all(P, x * y * w), trained * _all_to_all(P, x * y * w)),),
    kept=again * x * y * w,
    buffer=x * y * w,
    source="Shard(blocks): the bytes of one share",
)
TENSOR = Mechanism(
    "tensor parallel: tokens gathered before, sums scattered after",
    (
        Sent("all_gather", (tp - 1) * n * H * b, (tp - 1) * n * O * b),
        Sent("reduce_scatter", (tp - 1) * n * O * b, (tp - 1) * n * H * b),
        Sent("all_reduce", _all_reduce(tp, tp * n * D * b), _all_reduce(tp, tp * n * D * b)),
    ),
    kept=again * tp * n * H * b,
    buffer=n * Max(tp * H, tp * D, O) * b,
    source="Korthikanti et al., 2022 (sequence parallel)",
)
EXCHANGED = Mechanism(
    "tensor parallel: tokens exchanged for heads",
    (Sent("all_to_all", _all_to_all(tp, n * H * b), _all_to_all(tp, n * H * b)),),
    kept=n * H * b,
    buffer=n * H * b,
    source="Jacobs et al., DeepSpeed Ulysses, 2023, along tp",
)
_heads = h * d + _keys + cp * ceiling(h / cp) * e
ULYSSES = Mechanism(
    "context parallel: tokens exchanged for heads (Ulysses)",
    (Sent("all_to_all", _all_to_all(cp, n * _heads * b), _all_to_all(cp, n * _heads * b)),),
    kept=n * (h * d + _keys + h * e) * b,
    buffer=n * Max(h * d, g * d, g * e, h * e) * b,
    source="Jacobs et al., DeepSpeed Ulysses, 2023: 4*N*H/D",
)
RING = Mechanism(
    "context parallel: keys travel around (ring)",
    (
        Sent(
            "ring",
            n * (j * _keys * b + z * ((h * d + _keys + h * e) * b + h * a)),
            n * (j * _keys * b + Piecewise((j + 1, j > 0), (0, True)) * _keys * a)
            + n * z * (2 * (h * d + _keys + h * e) * b + h * a),
        ),
    ),
    buffer=2 * n * _keys * (b + a),
    source="Liu et al., Ring Attention, 2023; Brandon et al., Striped Attention, 2023",
)
WHOLE = Mechanism(
    "context parallel: tokens gathered for attention",
    (Sent("all_gather", (cp - 1) * n * (h * d + _keys) * b),),
    kept=cp * n * (h * d + _keys) * b,
    buffer=cp * n * Max(h * d, g * d, g * e) * b,
    source="what place inserts",
)
EXPERTS = Mechanism(
    "experts: rows sent to their ranks, and back (all-to-all)",
    (
        Sent(
            "send_rows",
            _times * _all_to_all(ep, _rows * F * b),
            _all_to_all(ep, _rows * Q * b),
            worst=_full * (_times * F + Q) * b,
        ),
        Sent(
            "return_rows",
            _times * _all_to_all(ep, _rows * Q * b),
            _all_to_all(ep, _rows * F * b),
            worst=(ep - 1) * _full * (_times * Q + F) * b,
        ),
        Sent("exchange_counts", _times * K * (ep - 1) * Max(_own, places) * i),
    ),
    kept=(1 - rho) * (_rows * (Piecewise((F, etp < 2), (0, True)) + q) * b + ep * _own * i),
    buffer=_chunk * Max(f, Q) * b,
    source="Folding, arXiv 2504.14960, section 3: N*k*H*b each way",
)
FUNCTION = Mechanism(
    "experts: results of the first products",
    (),
    made=(1 - rho) * _rows * J * b,
    source="SonicMoE: 2*N*H + 4*N*k*I bytes, of which rows are counted where they come",
)
BOUND = Mechanism(
    "experts: chunks of tokens",
    (),
    buffer=_cards * k * ceiling(n / K) * f * b,
    source="FEMP, arXiv 2609.14306, Eq. 1: at most ep*k*c rows come, for any router",
)
SLOTS = Mechanism(
    "experts: as many rows for each, padded to a capacity",
    (
        Sent("send_slots", _all_to_all(ep, E * C * F * b), _all_to_all(ep, E * C * Q * b)),
        Sent("return_slots", _all_to_all(ep, E * C * Q * b), _all_to_all(ep, E * C * F * b)),
    ),
    kept=E * C * (Piecewise((F, etp < 2), (0, True)) + q) * b,
    buffer=Max(_slots * f, E * C * Q) * b,
    source="GShard, 2020, section 3.2; Folding, arXiv 2504.14960, section 3.3",
)
HIDDEN = Mechanism(
    "expert tensor parallel: rows gathered, sums scattered",
    (
        Sent(
            "all_gather_rows",
            _times * (etp - 1) * _rows * F * b,
            (etp - 1) * _rows * Q * b,
            worst=(etp - 1) * ep * _full * (_times * F + Q) * b,
        ),
        Sent(
            "reduce_scatter_rows",
            _times * (etp - 1) * _rows * Q * b,
            (etp - 1) * _rows * F * b,
            worst=(etp - 1) * ep * _full * (_times * Q + F) * b,
        ),
        Sent("all_gather", _times * K * (etp - 1) * Max(_own, places) * i),
    ),
    kept=(1 - rho) * etp * (_rows * F * b + _own * i),
    buffer=etp * _chunk * Max(f, Q) * b,
    source="Folding, arXiv 2504.14960, section 3: AG-V and RS-V along etp",
)
HIDDEN_SLOTS = Mechanism(
    "expert tensor parallel of padded rows",
    (
        Sent("all_gather_slots", (etp - 1) * _slots * F * b, (etp - 1) * _slots * Q * b),
        Sent("reduce_scatter_slots", (etp - 1) * _slots * Q * b, (etp - 1) * _slots * F * b),
    ),
    kept=etp * _slots * F * b,
    buffer=_slots * Max(etp * f, Q) * b,
    source="Folding, arXiv 2504.14960, section 3.3",
)
GATHERED = Mechanism(
    "experts: all tokens gathered",
    (
        Sent("all_gather", (_cards - 1) * n * (H + k * m) * b, (_cards - 1) * n * O * b),
        Sent("reduce_scatter", (_cards - 1) * n * O * b, (_cards - 1) * n * (H + k * m) * b),
    ),
    kept=_cards * n * k * m * b,
    buffer=n * Max(_cards * H, _cards * k * m, O) * b,
    source="gather_tokens: (ep*etp-1)*n tokens come to a rank, where n*k*(ep-1)/ep rows would",
)
CHOICES = Mechanism(
    "experts: choices of all tokens gathered",
    (Sent("all_gather", (_cards - 1) * n * k * i),),
    buffer=_cards * n * k * i,
    source="gather_tokens",
)
COMPETING = Mechanism(
    "capacity: choices and weights of the tokens that compete",
    (Sent("all_gather", (S - 1) * n * k * (i + scored * b)),),
    buffer=S * n * k * Max(i, scored * b),
    source="Folding, arXiv 2504.14960, section 3.3: sub-sequences need none",
)
BALANCED = Mechanism(
    "least-loaded experts: counts of all ranks, and weights of guests",
    (
        Sent("all_gather", (ep - 1) * E * i + (etp - 1) * ep * E * i),
        Sent("send_experts", worst=_times * (ep - 1) * (places - _own) * guest),
        Sent("return_experts", worst=(places - _own) * guest),
    ),
    buffer=places * guest,
    source="LLEP, arXiv 2601.17111: no weights move while the fullest rank is below the threshold",
)
LOGITS = Mechanism(
    "vocabulary: logits of a rank's tokens whole",
    (),
    made=n * V * a,
    source="the 3NV of Ring-DTP's baseline, FEMP, arXiv 2609.14306",
)
WORDS = Mechanism(
    "vocabulary: weights travel around (ring)",
    (Sent("ring", (V - v) * H * b, (V - v) * H * b + V * H * a),),
    buffer=2 * _words * H * (b + a),
    source="Ring-DTP, FEMP, arXiv 2609.14306: weights move iff N > V/P",
)
TRAVELLERS = Mechanism(
    "vocabulary: tokens travel around (ring)",
    (
        Sent(
            "ring",
            (vp - 1) * n * (H * b + i) + vp * n * 4 * a,
            (vp - 1) * n * (H * b + i + 4 * a) + vp * n * H * a,
        ),
    ),
    buffer=2 * n * (H * (b + a) + i + 4 * a),
    source="Ring-DTP, FEMP, arXiv 2609.14306: activations move iff N <= V/P",
)
LOOKUP = Mechanism(
    "embedding: rows fetched from the ranks that have them",
    (
        Sent(
            "all_to_all",
            (vp - 1) * i + _ids * (i + H * b),
            (vp - 1) * i + _ids * (i + H * a),
            worst=2 * (vp - 1) * i + n * (2 * i + H * (b + a)),
        ),
    ),
    buffer=_ids * H * a,
    source="fuse_embedding: the distinct ids of a rank, if every id is as likely",
)
SUMS = Mechanism(
    "sums over the batch",
    (Sent("all_reduce", summed * _all_reduce(P, A), trained * _all_reduce(P, A)),),
    source="losses are global: a sum and its count over all tokens",
)
TOGETHER = Mechanism(
    "tokens made whole, whatever the plan says",
    (
        Sent("all_gather", (P - 1) * A / P),
        Sent("reduce_scatter", ZERO, trained * (P - 1) * A / P),
    ),
    buffer=A,
    source="what place inserts where an operator mixes tokens, such as a shift of labels",
)

MECHANISMS: tuple[Mechanism, ...] = (
    WEIGHTS, EXPERT_WEIGHTS, FUSED, TENSOR, EXCHANGED, ULYSSES, RING, WHOLE, EXPERTS, FUNCTION,
    BOUND, SLOTS, HIDDEN, HIDDEN_SLOTS, GATHERED, CHOICES, COMPETING, BALANCED, LOGITS, WORDS,
    TRAVELLERS, LOOKUP, SUMS, TOGETHER,
)  # fmt: skip
