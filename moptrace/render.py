"""Programs as text, plain or in colour.

A line is a node: ``%name  type  = op(arguments)   # component, source line, pass that made it``.
The type is written as JAX writes an aval, with the placement inside it:

==============================  ===================================================================
``f32[8, 128]``                 one device, or the same on all ranks, used by each for itself
                                (replicate: gradients are terms of a sum)
``f32[8@dp, 128]``              dimension 0 is split over the axis ``dp``
``f32[64@(edp, ep), 32]``       dimension 0 is split over two axes, the slowest first
``f32[24@dp in 3, 8]``            each of 3 equal pieces of dimension 0 is split over ``dp``
``f32[96@ep by expert, 32]``    the rows of this rank's experts, along ``ep``
``f32[]{partial dp}``           the sum over ``dp`` is pending
``f32[256]{invariant}``         the same on all ranks and used alike (the gradient is complete)
``f32[256]{invariant edp}``     that along ``edp`` only
==============================  ===================================================================

Axes of one rank are left out: splitting over them means nothing. From level local on, shapes are
those of one rank (the first, where ranks differ), and ``rows`` is the number of rows that routing
gives it. An argument is named where the operator's schema has a default for it; operators and
collectives of moptrace have all their constants named. Nothing in a print depends on the machine,
the process or the order of a dictionary, so prints can be compared as goldens.
"""

from __future__ import annotations

import html
import inspect
import operator
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import PurePath
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.core import Buffer, Input, Level, Parameter, Program, State
from moptrace.fold import runs, wired_alike
from moptrace.kernels.expert_function import ExpertFunction, ExpertOperator
from moptrace.kernels.host_update import HostUpdate
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.placement import Invariant, Partial, Placement, Rows, Shard
from moptrace.random import draw
from moptrace.reshard import reshard, route
from moptrace.roles import Component

__all__ = [
    "FOLD_ABOVE",
    "Line",
    "NameOf",
    "Writer",
    "call_text",
    "node_count",
    "op_name",
    "percent",
    "plain",
    "render",
    "render_html",
    "type_name",
    "without_numbers",
    "write_lines",
]

FOLD_ABOVE = 400  # nodes: longer programs are folded unless asked otherwise
LONG = 200  # characters: longer types and calls are cut in folded prints


def render(program: Program, color: bool = False, fold: bool | None = None) -> str:
    """The program as text, one line for each node.

    With ``fold``, the first of a run of isomorphic regions (layers) stands for all of them and
    long lists are cut; by default programs of more than 400 nodes are folded. Without it, every
    node's name, operator and arguments are in the text. ``color`` adds terminal colours.
    """
    return _print(program, fold, _ansi if color else plain)


def render_html(program: Program, fold: bool | None = None) -> str:
    """The print in a ``<pre>``, coloured by component."""
    return f"<pre>{_print(program, fold, _span)}</pre>"


# --- types ----------------------------------------------------------------------------------------

_DTYPES = {
    torch.bool: "bool",
    torch.bfloat16: "bf16",
    **{getattr(torch, f"float{n}"): f"f{n}" for n in (16, 32, 64)},
    **{getattr(torch, f"int{n}"): f"i{n}" for n in (8, 16, 32, 64)},
    **{getattr(torch, f"uint{n}"): f"u{n}" for n in (8, 16, 32, 64)},
    **{getattr(torch, f"complex{n}"): f"c{n}" for n in (64, 128)},
    torch.float8_e4m3fn: "f8e4m3fn",
    torch.float8_e5m2: "f8e5m2",
}


def type_name(node: fx.Node, level: Level) -> str:
    """The printed type of a node's result, with its placement."""
    if node.op == "output":
        return ""
    value, placed = roles.value(node), roles.placements(node)
    if isinstance(value, (tuple, list)):
        each = placed if len(placed) == len(value) else (None,) * len(value)
        return f"({', '.join(_type(v, p, level) for v, p in zip(value, each, strict=True))})"
    return _type(value, placed[0] if placed else None, level)


def _type(value: Any, placement: Placement | None, level: Level) -> str:
    if not isinstance(value, Tensor):
        return str(value) if value is not None else "?"
    sizes = ", ".join(_size(n, d, placement, level) for d, n in enumerate(value.shape))
    return f"{_dtype(value.dtype)}[{sizes}]{_kinds(placement)}"


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def _size(size: Any, dim: int, placement: Placement | None, level: Level) -> str:
    text, axes = str(size), list[str]()
    for axis, kind in _along(placement):
        if isinstance(kind, Shard) and kind.dim == dim:
            axes.append(axis if kind.blocks == 1 else f"{axis} in {kind.blocks}")
        elif isinstance(kind, Rows) and dim == 0:
            axes.append(f"{axis} by {kind.by}")
            text = "rows" if level >= Level.LOCAL else text
    if not axes:
        return text
    return f"{text}@{axes[0]}" if len(axes) == 1 else f"{text}@({', '.join(axes)})"


def _kinds(placement: Placement | None) -> str:
    """The kinds that split no dimension; replicate, the ordinary one, is not written."""
    along = list(_along(placement))
    partial = [axis for axis, kind in along if isinstance(kind, Partial)]
    invariant = [axis for axis, kind in along if isinstance(kind, Invariant)]
    words = [f"partial {', '.join(partial)}"] if partial else []
    if invariant:
        everywhere = len(invariant) == len(along)
        words.append("invariant" if everywhere else f"invariant {', '.join(invariant)}")
    return f"{{{'; '.join(words)}}}" if words else ""


def _along(placement: Placement | None) -> Iterator[tuple[str, Any]]:
    if placement is not None:
        for axis, kind in zip(placement.view.axes, placement.kinds, strict=True):
            if axis.size > 1:
                yield axis.name, kind


# --- calls ----------------------------------------------------------------------------------------

NameOf: TypeAlias = Callable[[fx.Node], str]


def percent(node: fx.Node) -> str:
    return f"%{node.name}"


def call_text(node: fx.Node, name_of: NameOf = percent) -> str:
    """``op(arguments)``, empty for an input; ``name_of`` writes the operands."""
    if node.op == "placeholder":
        return ""
    if node.op == "get_attr":
        return f"constant({node.target})"
    if node.target is operator.getitem:
        source, at = node.args
        return f"{_argument(source, name_of)}[{_argument(at, name_of)}]"
    arguments = list(_arguments(node, name_of))
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    if node.target in (reshard, route):
        arguments[-2:] = [f"{node.args[-2]} -> {node.args[-1]}"]
    return f"{op_name(node.target)}({', '.join(arguments)})"


def op_name(target: Any) -> str:
    """The operator without its overload, and without its namespace if that is torch's or ours."""
    if isinstance(target, torch._ops.OpOverload):
        space, name = target._schema.name.split("::")
        return name if space in ("aten", "moptrace") else f"{space}.{name}"
    if isinstance(target, torch._ops.OperatorBase):
        return str(target.name())
    return getattr(target, "__name__", str(target))


def _arguments(node: fx.Node, name_of: NameOf) -> Iterator[str]:
    names, optional = _parameters(node.target)
    named = False
    for position, value in enumerate(node.args):
        name = names[position] if position < len(names) else None
        text = _argument(value, name_of)
        constant = not _has_node(value)
        named = name is not None and (named or (constant and name in optional))
        yield f"{name}={text}" if named else text
    for name, value in sorted(node.kwargs.items()):
        yield f"{name}={_argument(value, name_of)}"


@cache
def _parameters(target: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of an operator's arguments, and those to be written when they are constants."""
    if isinstance(target, torch._ops.OpOverload):
        ours = target.namespace == "moptrace"
        entries = target._schema.arguments
        optional = {x.name for x in entries if ours or x.has_default_value()}
        return tuple(x.name for x in entries), frozenset(optional)
    if getattr(target, "__module__", "").startswith("moptrace") and target is not draw:
        names = tuple(inspect.signature(target).parameters)
        return names, frozenset(names)
    return (), frozenset()


def _argument(value: Any, name_of: NameOf) -> str:
    match value:
        case fx.Node():
            return name_of(value)
        case list():
            return f"[{', '.join(_argument(x, name_of) for x in value)}]"
        case tuple():
            inner = ", ".join(_argument(x, name_of) for x in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        case torch.dtype():
            return _dtype(value)
        case torch.device() | torch.layout() | torch.memory_format():
            return str(value).removeprefix("torch.")
        case torch._ops.OpOverload():
            return op_name(value)
        case _:
            return repr(value)


def _has_node(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_node(x) for x in value)
    return isinstance(value, fx.Node)


# --- lines ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One printed line; ``sign`` is the margin of a difference."""

    name: str = ""
    type: str = ""
    call: str = ""
    comment: str = ""
    component: Component | None = None
    sign: str = " "
    heading: str = ""


Entry: TypeAlias = Parameter | Buffer | State | Input


class Writer:
    """Writes the nodes of one program; ``short`` cuts the middle out of long lists."""

    def __init__(self, program: Program, short: bool = False):
        self.level, self.short = program.level, short
        signature = program.signature
        entries = (
            *signature.parameters,
            *signature.buffers,
            *signature.states,
            *signature.inputs,
        )
        self.entries: dict[str, Entry] = {x.name: x for x in entries}

    def __call__(self, node: fx.Node, sign: str = " ", remark: str = "") -> Line:
        words = [remark, *_entry_words(self.entries.get(node.name)), *_tags(node)]
        return Line(
            f"%{node.name}",
            self._cut(type_name(node, self.level)),
            self._cut(call_text(node)),
            ", ".join(filter(None, words)),
            roles.component(node),
            sign,
        )

    def _cut(self, text: str) -> str:
        cut = self.short and len(text) > LONG
        return f"{text[: LONG - 40]} ... {text[-40:]}" if cut else text


def _entry_words(entry: Entry | None) -> Iterator[str]:
    match entry:
        case Parameter():
            yield entry.fqn
            if entry.aliases:
                yield f"also {', '.join(entry.aliases)}"
            if entry.stacked:
                yield f"stack of {_names(entry.stacked)}"
            if not entry.requires_grad:
                yield "frozen"
        case Buffer():
            yield entry.fqn
            if entry.aliases:
                yield f"also {', '.join(entry.aliases)}"
            if not entry.persistent:
                yield "not saved"
        case Input() | State():
            yield entry.path
        case None:
            return


def _names(names: Sequence[str]) -> str:
    """Many names in one: those that differ in one number by its range, others by both ends.

    >>> _names(["experts.0.up", "experts.1.up", "experts.2.up"])
    'experts.{0..2}.up'
    """
    first, last = names[0].split("."), names[-1].split(".")
    places = [i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b]
    if len(first) == len(last) and len(places) == 1:
        at = places[0]
        span = f"{{{first[at]}..{last[at]}}}"
        return ".".join([*first[:at], span, *first[at + 1 :]])
    return f"{names[0]} .. {names[-1]}"


def _tags(node: fx.Node) -> Iterator[str]:
    role = roles.role(node)
    if role.component:
        yield str(role.component) if role.block is None else f"{role.component} {role.block}"
    if role.backward:
        yield "backward"
    if role.source:
        yield f"{PurePath(role.source.file).name}:{role.source.line}"
    if role.made_by:
        yield role.made_by


# --- ink: how a piece of a line is written --------------------------------------------------------

Ink: TypeAlias = Callable[[str, str | None], str]

_HUES = {  # component -> (terminal colour, web colour)
    Component.EMBEDDING: (36, "#0b7285"),
    Component.NORM: (90, "#868e96"),
    Component.ATTENTION: (34, "#1c7ed6"),
    Component.ROUTER: (35, "#9c36b5"),
    Component.DISPATCH: (33, "#e67700"),
    Component.EXPERTS: (31, "#e03131"),
    Component.SHARED_EXPERT: (91, "#f06595"),
    Component.COMBINE: (33, "#e67700"),
    Component.DENSE_MLP: (94, "#4c6ef5"),
    Component.VOCAB: (96, "#0ca678"),
    Component.LOSS: (32, "#2f9e44"),
    Component.AUX_LOSS: (92, "#66a80f"),
    Component.CLIPPING: (95, "#ae3ec9"),
    Component.OPTIMIZER: (93, "#f59f00"),
}
_QUIET = (2, "#868e96")


def plain(text: str, style: str | None) -> str:
    return text


def _ansi(text: str, style: str | None) -> str:
    return f"\033[{_hue(style)[0]}m{text}\033[0m" if style and text else text


def _span(text: str, style: str | None) -> str:
    text = html.escape(text, quote=False)
    return f'<span style="color:{_hue(style)[1]}">{text}</span>' if style and text else text


def _hue(style: str | None) -> tuple[int, str]:
    return _QUIET if style == "quiet" or style is None else _HUES[Component(style)]


_WIDEST = (28, 36, 84)  # a longer name, type or line breaks its column instead of widening it


def write_lines(lines: Sequence[Line], ink: Ink) -> Iterator[str]:
    """Align names, types and comments in columns."""
    nodes = [line for line in lines if not line.heading]
    name = min(max((len(x.name) for x in nodes), default=0), _WIDEST[0])
    kind = min(max((len(x.type) for x in nodes if x.call), default=0), _WIDEST[1])

    def left(line: Line) -> str:
        text = f"{line.name:<{name}}  {line.type}"
        return f"{text:<{name + 2 + kind}}  = {line.call}" if line.call else text

    end = min(max((len(left(x)) for x in nodes), default=0), _WIDEST[2])
    for line in lines:
        if line.heading:
            yield f"{line.sign} "[: 2 if line.sign else 0] + ink(line.heading, "quiet")
            continue
        text = left(line)
        named = len(line.name)
        shown = ink(text[:named], line.component or "quiet") + ink(text[named:], None)
        if line.comment:
            shown += " " * (max(end - len(text), 0) + 3) + ink(f"# {line.comment}", "quiet")
        yield f"{line.sign} {shown}"


# --- the print ------------------------------------------------------------------------------------


def _print(program: Program, fold: bool | None, ink: Ink) -> str:
    fold = len(program.graph.nodes) > FOLD_ABOVE if fold is None else fold
    lines = [line for section in _sections(program, fold) for line in section]
    return "\n".join([ink(_title(program), None), *write_lines(lines, ink)])


def _title(program: Program) -> str:
    parts = [f"{program.level} program"]
    if program.layout:
        parts.append(str(program.layout))
    parts.append(f"{node_count(program)} nodes")
    parts.append(f"made by {program.made_by or 'trace'}")
    return "   ".join(parts)


def node_count(program: Program) -> int:
    return len(program.graph.nodes) - 1  # the output node is no operation


def _sections(program: Program, fold: bool) -> Iterator[list[Line]]:
    nodes = list(program.graph.nodes)
    write = Writer(program, short=fold)
    by_name = {node.name: node for node in nodes if node.op == "placeholder"}
    signature = program.signature
    for title, entries in (
        ("parameters", signature.parameters),
        ("buffers", signature.buffers),
        ("optimizer", signature.states),
        ("inputs", signature.inputs),
    ):
        if entries:
            inputs = [by_name[entry.name] for entry in entries]
            yield [Line(heading=title, sign=""), *_lines(inputs, write, fold)]
    body = [node for node in nodes if node.op not in ("placeholder", "output")]
    yield [Line(heading="nodes", sign=""), *_lines(body, write, fold)]
    for target in dict.fromkeys(node.target for node in body):
        if isinstance(target, (ExpertFunction, ExpertOperator)):
            heading = f"{target.__name__}, for each expert"
            yield [Line(heading=heading, sign=""), *_inside(target)]
        if isinstance(target, MatrixFunction):
            heading = f"{target.__name__}, for each matrix"
            yield [Line(heading=heading, sign=""), *_inputs_and_body(target.graph)]
        if isinstance(target, HostUpdate):
            heading = f"{target.__name__}, on the host"
            yield [Line(heading=heading, sign=""), *_inputs_and_body(target.body.graph)]
    yield [Line(heading="outputs", sign=""), *_outputs(program)]


def _inside(function: ExpertFunction | ExpertOperator) -> Iterator[Line]:
    """The operators that an expert's function, its forward or its backward is made of."""
    counts, *inputs = function.graph.find_nodes(op="placeholder")
    yield Line(f"%{counts.name}", "[experts]")
    sides = {"rows": "rows", "tokens": "tokens", "experts": "experts", "all": ""}
    for node, operand in zip(inputs, function.operands, strict=True):
        sizes = filter(None, (sides[operand.kind], *map(str, operand.shape)))
        yield Line(f"%{node.name}", f"{_dtype(operand.dtype)}[{', '.join(sizes)}]")
    yield from _body(function.graph)


def _inputs_and_body(graph: fx.Graph) -> Iterator[Line]:
    """The operators of an optimizer that run on a whole matrix, or on the host."""
    for node in graph.find_nodes(op="placeholder"):
        yield Line(f"%{node.name}", type_name(node, Level.LOCAL))
    yield from _body(graph)


def _body(graph: fx.Graph) -> Iterator[Line]:
    for node in graph.nodes:
        if node.op == "call_function":
            yield Line(f"%{node.name}", "", call_text(node))
    yield Line("returned", "", ", ".join(map(percent, graph.output_node().all_input_nodes)))


def _outputs(program: Program) -> Iterator[Line]:
    for position, (node, output) in enumerate(
        zip(program.outputs, program.signature.outputs, strict=True)
    ):
        replaced = output.buffer or output.updates
        meaning = f"new value of {replaced}" if replaced else output.path
        loss = "the loss" if position == program.signature.loss else ""
        comment = ", ".join(dict.fromkeys(filter(None, (loss, meaning))))
        kind = type_name(node, program.level)
        yield Line(f"%{node.name}", kind, "", comment, roles.component(node))


# --- folding --------------------------------------------------------------------------------------


def _lines(nodes: Sequence[fx.Node], write: Writer, fold: bool) -> Iterator[Line]:
    if fold:
        keys = [_key(node, write.level, write.entries.get(node.name)) for node in nodes]
        yield from _folded(nodes, keys, 0, len(nodes), write)
    else:
        yield from map(write, nodes)


def _folded(
    nodes: Sequence[fx.Node], keys: Sequence[Hashable], start: int, stop: int, write: Writer
) -> Iterator[Line]:
    """The lines of ``nodes[start:stop]``; the first of a run of regions stands for all."""
    index = {nodes[position]: position for position in range(start, stop)}
    at = start
    for run in runs(keys, start, stop, wired_alike(nodes, index)):
        yield from map(write, nodes[at : run.start])
        yield from _folded(nodes, keys, run.start, run.start + run.period, write)
        yield Line(heading=f"... {run.count - 1} more like it ({run.hidden:,} nodes)")
        at = run.stop
    yield from map(write, nodes[at:stop])


def _key(node: fx.Node, level: Level, entry: Entry | None) -> Hashable:
    """What a node has in common with its like in another layer."""
    role = roles.role(node)
    module = without_numbers(getattr(entry, "fqn", role.module))
    call = call_text(node, _blank)
    if node.target is draw or node.target is operator.getitem:
        call = without_numbers(call)  # the site of a draw, the place in an unpacked bucket
    kind = (role.component, role.backward, role.made_by, role.source, module)
    return (call, type_name(node, level), *kind)


def _blank(node: fx.Node) -> str:
    return "%"


@lru_cache(1 << 16)
def without_numbers(text: str) -> str:
    return re.sub(r"\d+", "0", text)
