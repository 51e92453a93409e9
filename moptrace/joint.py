"""Record what Python code computes, its derivatives included, as a functional graph.

``record`` runs a function on fake tensors, below autograd and functionalised: what the function and
the backward that it asks for compute becomes nodes, and a write in place becomes a new value. The
function says through the ``Tape`` which node of another program it is working on, so that every
node, of the backward too, keeps the component, module and source line that it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.core import copy_node, erase_dead, is_random
from moptrace.fake import fake_mode
from moptrace.random import draw
from moptrace.recorder import unwrapped
from moptrace.roles import Role

__all__ = ["Recording", "Tape", "name_of", "record", "splice", "wrap_draws"]

aten = torch.ops.aten


class Tape:
    """The nodes that are being recorded, and the role that they get.

    A role is given to the nodes that are recorded until the next one is. In backward, each function
    of autograd brings back the role under which its forward was recorded.
    """

    def __init__(self, graph: fx.Graph):
        self._graph = graph
        self._last: fx.Node = graph._root.prev
        self._role = Role()
        self._known: set[Any] = set()

    def work_on(self, role: Role) -> None:
        """What is recorded from now on has this role."""
        for node in self.new_nodes():
            roles.set_role(
                node,
                component=self._role.component,
                block=self._role.block,
                module=self._role.module,
                source=self._role.source,
                backward=self._role.backward,
                recompute=self._role.recompute,
                micro_batch=self._role.micro_batch,
            )
        self._last = self._graph._root.prev
        self._role = role

    def new_nodes(self) -> Iterator[fx.Node]:
        """The nodes recorded under the present role, newest first."""
        node = self._graph._root.prev
        while node is not self._last:
            yield node
            node = node.prev

    def follow(self, results: Any, backward: Role) -> None:
        """Record the backward of what led to ``results``, and to nothing before, under a role."""
        left = [x.grad_fn for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        while left:
            function = left.pop()
            if function is None or function in self._known:
                continue
            self._known.add(function)
            function.register_prehook(lambda *_: self.work_on(backward))
            left += [before for before, _ in function.next_functions]


@dataclass(frozen=True)
class Recording:
    """A functional graph whose inputs have the given names, and the constants that it uses."""

    graph: fx.Graph
    constants: dict[str, Any]


def record(
    function: Callable[..., Sequence[Tensor]],
    examples: Mapping[str, Tensor],
    constants: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Recording:
    """The graph of ``function(tape, **examples, **constants)``, which returns tensors.

    ``examples`` may be real, meta or fake: only shape, dtype, device and ``requires_grad`` are
    read; meta tensors and constants are recorded as on ``device``. Each becomes a graph input of
    its name, in order; a constant becomes an attribute. Sizes that depend on data are symbols;
    Python numbers that are read from tensors (``x.item()``) are nodes too. Raises what the function
    raises, and ``GuardOnDataDependentSymNode`` where it branches on data.
    """
    constants = constants or {}
    mode = fake_mode(ShapeEnv())
    given = {**examples, **constants}
    with mode:
        fakes = [
            torch.empty(
                x.shape,
                dtype=x.dtype,
                device=device if x.is_meta or name in constants else x.device,
                requires_grad=x.requires_grad,
            )
            for name, x in given.items()
        ]

    def flat(*tensors: Tensor) -> list[Tensor]:
        proxies = get_proxy_mode()
        assert proxies is not None
        tape = Tape(proxies.tracer.graph)
        with FunctionalTensorMode():
            wrapped = [FunctionalTensor.to_functional(x) for x in tensors]
            results = function(tape, **dict(zip(given, wrapped, strict=True)))
            tape.work_on(Role())
            return [unwrapped(x) for x in results]

    with mode, torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        traced = make_fx(flat, _allow_non_fake_inputs=True)(*fakes)
    return _cleaned(traced, list(given), constants)


def splice(
    graph: fx.Graph,
    recording: Recording,
    operands: Mapping[str, fx.Node],
    constants: dict[str, Any],
) -> list[fx.Node]:
    """Copy a recording to the end of a graph, applied to ``operands``; return its results.

    The constants of the recording are added to the graph's.
    """
    copies: dict[fx.Node, fx.Node] = {}
    for old in recording.graph.nodes:
        if old.op == "placeholder":
            copies[old] = operands[old.name]
        elif old.op == "get_attr":
            name = name_of(recording.constants[str(old.target)], constants)
            copies[old] = graph.get_attr(name)
            roles.copy_role(copies[old], of=old)
            roles.set_value(copies[old], roles.value(old))
        elif old.op == "output":
            return [copies[x] for x in old.args[0]]
        else:
            copies[old] = copy_node(graph, old, copies.__getitem__)
    raise AssertionError("the recording has no output")


def name_of(value: Any, constants: dict[str, Any]) -> str:
    """The name of a constant, which is added if it is not there yet."""
    for name, known in constants.items():
        if known is value:
            return name
    name = next(n for i in count() if (n := f"constant_{i}") not in constants)
    constants[name] = value
    return name


# --- cleaning -------------------------------------------------------------------------------------

# What means nothing in a graph of values: autograd is done, and sizes were checked.
_ALIASES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
_DROPPED = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
# Real tensors may lie otherwise in memory than fake ones.
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def _cleaned(
    traced: fx.GraphModule, names: Sequence[str], constants: Mapping[str, Any]
) -> Recording:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    kept = dict(constants)
    waiting = iter(names)

    def copied(old: fx.Node) -> fx.Node:
        if old.op == "placeholder":
            name = next(waiting)
            if name in constants:
                return graph.get_attr(name)
            new = graph.placeholder(name)
            assert new.name == name, f"{name} is no name for a graph input"
            return new
        if old.op == "get_attr":
            return graph.get_attr(name_of(getattr(traced, str(old.target)), kept))
        target = aten.reshape.default if old.target in _VIEWS else old.target
        args: Any
        kwargs: Any
        args, kwargs = map_arg((old.args, old.kwargs), copies.__getitem__)
        if old.op == "output":
            return graph.output(tuple(args[0]))
        return graph.create_node(old.op, target, args, kwargs, old.name)

    for old in traced.graph.nodes:
        if old.target in _ALIASES:
            copies[old] = copies[old.args[0]]
        elif old.target is aten.copy.default and _is_same(*old.args[:2]):
            copies[old] = copies[old.args[1]]  # written over all of another value
        elif old.target not in _DROPPED:
            copies[old] = new = copied(old)
            roles.set_value(new, roles.value(old))
            roles.copy_role(new, of=old, placements=roles.placements(old))
    erase_dead(graph)
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    return Recording(graph, {name: x for name, x in kept.items() if name in used})


def _is_same(to: Any, of: Any) -> bool:
    """Whether a copy has the shape, dtype and device of what it copies."""
    one, other = roles.value(to), roles.value(of)
    return all(getattr(one, x) == getattr(other, x) for x in ("shape", "dtype", "device"))


def wrap_draws(tape: Tape, site: int, axes: Sequence[str], apart: int) -> None:
    """Make the random operators just recorded draw as the seed, the site and the shard say.

    The second and later ones of a site get sites of their own, ``apart`` from one another.
    """
    random = [node for node in tape.new_nodes() if is_random(node)]
    for number, node in enumerate(reversed(random)):
        target: Any = node.target
        node.args = (target, site + number * apart, tuple(axes), *node.args)
        node.target = draw
