"""Append what a ``torch.optim`` optimizer does with the gradients."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moptrace import roles
from moptrace.core import Level, Output, Pass, Program, State
from moptrace.errors import StepError
from moptrace.joint import Recording, Tape, record, splice
from moptrace.placement import INVARIANT, Placement
from moptrace.roles import Component, Role

__all__ = ["apply_optimizer", "learning_rate", "state_tensors"]


aten = torch.ops.aten


def apply_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Pass:
    """Replace each gradient output by the new values of its parameter and optimizer state.

    ``names`` gives the fully qualified name of every parameter of the optimizer. The optimizer's
    own ``step`` is recorded on a rank's shards, which asks that it treats every element alike:
    AdamW, Adam, SGD, Adagrad, RMSprop and most others do. The present state tells which tensors the
    graph takes; those that the optimizer has yet to make, in its first step, are outputs. Each
    group's learning rate is an input, so that a scheduler may change it. Its other options are
    constants of the graph. Numbers that eager PyTorch reads from tensors, such as the count of
    steps, are read when the graph runs, and are computed with as it does. ``foreach`` and ``fused``
    say how kernels are called and not what they compute: the plain operators are recorded.

    Requires: ``differentiate``. Ensures: the optimizer's own arithmetic, operator by operator; the
    optimizer is not changed. Raises StepError for one that cannot be recorded or that mixes
    elements.
    """

    def rewrite(program: Program) -> Program:
        return _Update(program, optimizer, names).apply()

    options = (("optimizer", type(optimizer).__name__),)
    return Pass("apply_optimizer", rewrite, options, (Level.STEP,), needs=("differentiate",))


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors of a parameter's state, each rank's own part of them."""
    held = optimizer.state.get(parameter, {})
    return {key: _own(x) for key, x in held.items() if isinstance(x, Tensor)}


def _own(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class _Update:
    """One recording of an optimizer's step."""

    def __init__(
        self, program: Program, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
    ):
        self.program, self.optimizer, self.names = program, optimizer, names
        self.outputs = program.signature.outputs
        self.gradients = {
            output.gradient: node
            for output, node in zip(self.outputs, program.outputs, strict=True)
            if output.gradient is not None
        }
        self.device = next(roles.tensor(x).device for x in self.gradients.values())
        self.states: dict[State, torch.device] = dict(self._states())
        self.made: list[Output] = []

    # --- inputs ---

    def _states(self) -> Iterator[tuple[State, torch.device]]:
        """The state that the optimizer has now, and every group's learning rate."""
        for parameter in self._trained():
            fqn = self.names[parameter]
            for key, x in state_tensors(self.optimizer, parameter).items():
                yield (
                    State(self._name(fqn, key), f"{fqn}.{key}", tuple(x.shape), x.dtype, fqn),
                    x.device,
                )
        for number, group in enumerate(self.optimizer.param_groups):
            lr = learning_rate(group)
            yield State(_lr_name(number), f"groups.{number}.lr", (), lr.dtype), lr.device

    def _name(self, fqn: str, key: str) -> str:
        """The graph input of an entry of a parameter's state."""
        return f"{self.program.signature.parameter(fqn).name}__{_identifier(key)}"

    def _trained(self) -> list[Tensor]:
        every = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p for p in every if self.names[p] in self.gradients]

    # --- the graph ---

    def apply(self) -> Program:
        program = self.program
        graph, mapping = program.copy_graph()
        graph.erase_node(graph.output_node())
        operands = {f"gradient_of_{n}": mapping[x] for n, x in self._numbered().items()}
        placeholders = {x.name: x for x in graph.find_nodes(op="placeholder")}
        for fqn in self.gradients:
            name = program.signature.parameter(fqn).name
            operands[name] = placeholders[name]
        operands |= self._add_inputs(graph, placeholders)
        examples = {name: roles.tensor(x).detach() for name, x in operands.items()}
        recording = self._recorded(examples)
        results = splice(graph, recording, operands)
        kept = [
            (output, mapping[node])
            for output, node in zip(self.outputs, program.outputs, strict=True)
            if output.gradient is None
        ]
        kept += [pair for pair in zip(self.made, results, strict=True) if _is_new(*pair)]
        graph.output(tuple(node for _, node in kept))
        signature = replace(
            program.signature,
            states=tuple(self.states),
            outputs=tuple(output for output, _ in kept),
        )
        constants = {**program.constants, **recording.constants}
        return program.with_graph(graph, signature=signature, constants=constants)

    def _numbered(self) -> dict[int, fx.Node]:
        return dict(enumerate(self.gradients.values()))

    def _add_inputs(
        self, graph: fx.Graph, placeholders: Mapping[str, fx.Node]
    ) -> dict[str, fx.Node]:
        layout = self.program.layout
        assert layout is not None
        signature = self.program.signature
        added: dict[str, fx.Node] = {}
        with graph.inserting_before(placeholders[signature.inputs[0].name]):
            for entry, device in self.states.items():
                node = graph.placeholder(entry.name)
                value = torch.empty(entry.shape, dtype=entry.dtype, device=device)
                placement = Placement.uniform(layout.home, INVARIANT)
                if entry.parameter is not None:
                    owner = placeholders[signature.parameter(entry.parameter).name]
                    if roles.tensor(owner).shape == entry.shape:
                        placement = roles.placement(owner) or placement
                roles.set_value(node, value)
                roles.set_role(node, component=Component.OPTIMIZER, placements=(placement,))
                added[entry.name] = node
        return added

    # --- the recording ---

    def _recorded(self, examples: Mapping[str, Tensor]) -> Recording:
        kind = type(self.optimizer).__name__
        try:
            recording = record(self._run, examples)
        except StepError:
            raise
        except GuardOnDataDependentSymNode as error:
            raise StepError(
                f"{kind}.step goes one way or another depending on a number that is only known "
                "when it runs, so one graph cannot hold it. Use an optimizer that computes the "
                "same way in every step, such as AdamW, Adam, SGD or Adagrad; in one of your own, "
                "choose with torch.where."
            ) from error
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise StepError(
                f"{kind}.step cannot be recorded: it raised {type(error).__name__}: {first_line}. "
                "It must compute with torch operators on the parameters, gradients and state."
            ) from error
        if self.program.layout and self.program.layout.world_size > 1:
            self._check_elementwise(recording)
        return recording

    def _run(self, tape: Tape, **values: Tensor) -> list[Tensor]:
        tape.work_on(Role(Component.OPTIMIZER))
        twin = self._twin(values)
        step = inspect.unwrap(type(self.optimizer).step)
        self._check_closure(step)
        constants = _constants(twin)
        with torch.no_grad():
            step(twin)
        self._check_constants(constants, _constants(twin))
        found: list[Tensor] = []
        for fqn, parameter in self._shards(values).items():
            name = self.program.signature.parameter(fqn).name
            found.append(parameter)
            self.made.append(Output(fqn, updates=name))
            for key, x in twin.state[parameter].items():
                if isinstance(x, Tensor):
                    name = self._name(fqn, key)
                    known = name if name in values else None
                    self.made.append(Output(f"{fqn}.{key}", state_of=fqn, updates=known))
                    found.append(x)
        return found

    def _shards(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {fqn: self.program.signature.parameter(fqn).name for fqn in self.gradients}
        return {fqn: values[name] for fqn, name in names.items()}

    def _twin(self, values: Mapping[str, Tensor]) -> Any:
        """A copy of the optimizer that holds the tensors that are recorded."""
        shards = self._shards(values)
        for number, shard in enumerate(shards.values()):
            shard.grad = values[f"gradient_of_{number}"]
        twin = object.__new__(type(self.optimizer))
        twin.__dict__.update(self.optimizer.__dict__)
        twin.param_groups = []
        for number, group in enumerate(self.optimizer.param_groups):
            lr = values[_lr_name(number)]
            owned = [shards[self.names[p]] for p in group["params"] if self.names[p] in shards]
            rate = lr if isinstance(group["lr"], Tensor) else lr.item()
            options = _one_by_one(group, self.device)
            twin.param_groups.append({**group, **options, "params": owned, "lr": rate})
        twin.state = defaultdict(dict)
        for parameter in self._trained():
            fqn = self.names[parameter]
            held = dict(self.optimizer.state.get(parameter, {}))
            for key, x in held.items():
                if isinstance(x, Tensor):
                    held[key] = values[self._name(fqn, key)]
            if held:
                twin.state[shards[fqn]] = held
        return twin

    # --- what cannot be recorded ---

    def _check_closure(self, step: Any) -> None:
        closure = inspect.signature(step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            kind = type(self.optimizer).__name__
            raise StepError(
                f"{kind} calls a closure that computes the loss, as often as it likes, so a step "
                "is not one graph. Use an optimizer that takes gradients, such as AdamW, Adam, SGD "
                f"or Adagrad, or train without train_step: model(...), backward, {kind}.step."
            )

    def _check_elementwise(self, recording: Recording) -> None:
        """A rank has a part of a parameter: what looks at other elements would see too few."""
        for node in recording.graph.nodes:
            if node.op != "call_function" or not _mixes(node):
                continue
            raise StepError(
                f"{type(self.optimizer).__name__}.step computes {node.target} of a whole "
                "parameter, and each rank has only its shard of it. Use an optimizer that treats "
                "every element alike, such as AdamW, Adam, SGD or Adagrad."
            )

    def _check_constants(self, before: Any, after: Any) -> None:
        changed = sorted(key for key in after if before.get(key) != after[key])
        if changed:
            raise StepError(
                f"{type(self.optimizer).__name__}.step changes Python values "
                f"({', '.join(changed)}), which a graph holds as constants. Keep them in the state "
                "as tensors: state['step'] = torch.tensor(0.0), and state['step'] += 1."
            )


def _constants(optimizer: Any) -> dict[str, Any]:
    """The values in an optimizer's groups and state that are no tensors, by where they are."""
    found: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        for key, x in group.items():
            if key not in ("params", "lr"):
                found[f"param_groups[{number}][{key!r}]"] = x
    for number, held in enumerate(optimizer.state.values()):
        for key, x in held.items():
            if not isinstance(x, Tensor) and x is not None:
                found[f"state[{number}][{key!r}]"] = x
    return found


def learning_rate(group: Mapping[str, Any]) -> Tensor:
    """A group's learning rate as the graph takes it; a Python number in the precision of one."""
    rate = group["lr"]
    return _own(rate) if isinstance(rate, Tensor) else torch.tensor(rate, dtype=torch.float64)


def _one_by_one(group: Mapping[str, Any], device: torch.device) -> dict[str, bool]:
    """Options that ask for plain operators: those on lists take no numbers that a graph computes.

    On a GPU, a fused optimizer has its count of steps there, as a capturable one has.
    """
    options = {key: False for key in ("foreach", "fused") if group.get(key)}
    if group.get("fused") and device.type == "cuda":
        options["capturable"] = True
    return options


def _identifier(key: str) -> str:
    return re.sub(r"\W", "_", key)


def _lr_name(group: int) -> str:
    return f"groups__{group}__lr"


_MAKES_NEW = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.clone)
_SAME_ELEMENTS = (*_MAKES_NEW, aten._to_copy, aten.copy)


def _mixes(node: fx.Node) -> bool:
    """Whether an operator computes an element of its result from several of an operand."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or packet in _SAME_ELEMENTS or torch.Tag.pointwise in node.target.tags:  # type: ignore
        return False
    if packet.__name__.startswith("_fused_"):
        return False
    values = (roles.value(x) for x in node.all_input_nodes)
    return any(isinstance(x, Tensor) and x.dim() for x in values)


def _is_new(output: Output, node: fx.Node) -> bool:
    """Whether the step changes the value at all."""
    return node.name != output.updates
