"""Append what a ``torch.optim`` optimizer does with the gradients."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moptrace import roles
from moptrace.core import Level, Output, Pass, Program, State
from moptrace.errors import StepError
from moptrace.joint import Recording, Tape, record, splice
from moptrace.kernels.fused_adam import Recorded
from moptrace.roles import Component, Role
from moptrace.updates import add_state

__all__ = ["apply_optimizer", "learning_rate", "state_tensors"]


aten = torch.ops.aten


def apply_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Pass:
    """Replace each gradient output by the new values of its parameter and optimizer state.

    ``names`` gives the fully qualified name of every parameter of the optimizer. The optimizer's
    own ``step`` is recorded on a rank's shards, once for all parameters of one shape and group,
    which asks that it treats every element alike: AdamW, Adam, SGD, Adagrad and most others do. The
    present state tells which tensors the graph takes; those that the optimizer has yet to make, in
    its first step, are outputs. Each group's learning rate is an input, so that a scheduler may
    change it. Its other options are constants of the graph. Numbers that eager PyTorch reads from
    tensors, such as the count of steps, are read when the graph runs, and are computed with as it
    does. ``foreach`` and ``fused`` say how kernels are called and not what they compute: the plain
    operators are recorded, but for the fused kernel of Adam and AdamW, which is one operator.

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


@dataclass(frozen=True)
class _Recipe:
    """What a step does with one parameter: the recording's results after the parameter are the
    entries of its state with these keys."""

    recording: Recording
    keys: tuple[str, ...]


class _Update:
    """The walk that appends the update of every parameter, each kind of which is recorded once."""

    def __init__(
        self, program: Program, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
    ):
        self.program, self.optimizer, self.names = program, optimizer, names
        self.kind = type(optimizer).__name__
        self.outputs = program.signature.outputs
        self.graph, self.copies = program.copy_graph()
        self.graph.erase_node(self.graph.output_node())
        self.constants = dict(program.constants)
        self.inputs = {x.name: x for x in self.graph.find_nodes(op="placeholder")}
        self.gradients = {
            output.gradient: self.copies[node]
            for output, node in zip(self.outputs, program.outputs, strict=True)
            if output.gradient is not None
        }
        self.states: list[State] = []
        self.recipes: dict[Any, _Recipe] = {}

    def apply(self) -> Program:
        kept = [
            (output, self.copies[node])
            for output, node in zip(self.outputs, self.program.outputs, strict=True)
            if output.gradient is None
        ]
        for number, group in enumerate(self.optimizer.param_groups):
            lr = learning_rate(group)
            rate = self._add_input(f"groups__{number}__lr", f"groups.{number}.lr", lr)
            for parameter in group["params"]:
                if self.names[parameter] in self.gradients:
                    kept += self._update(number, parameter, rate)
        self.graph.output(tuple(node for _, node in kept))
        signature = replace(
            self.program.signature,
            states=tuple(self.states),
            outputs=tuple(output for output, _ in kept),
        )
        return self.program.with_graph(self.graph, signature=signature, constants=self.constants)

    def _update(self, group: int, parameter: Tensor, lr: fx.Node) -> list[tuple[Output, fx.Node]]:
        """Append the update of one parameter; returns its new values and those of its state."""
        fqn = self.names[parameter]
        name = self.program.signature.parameter(fqn).name
        held = {
            f"state_{key}": self._add_input(f"{name}__{_identifier(key)}", f"{fqn}.{key}", x, fqn)
            for key, x in state_tensors(self.optimizer, parameter).items()
        }
        operands = {"parameter": self.inputs[name], "gradient": self.gradients[fqn], "lr": lr}
        operands |= held
        recipe = self._recipe(group, parameter, operands)
        new, *states = splice(self.graph, recipe.recording, operands, self.constants)
        found = [(Output(fqn, updates=name), new)]
        for key, state in zip(recipe.keys, states, strict=True):
            old = held.get(f"state_{key}")
            if state is not old:
                known = old.name if old is not None else None
                found.append((Output(f"{fqn}.{key}", state_of=fqn, updates=known), state))
        return found

    def _add_input(self, name: str, path: str, x: Tensor, fqn: str | None = None) -> fx.Node:
        """A graph input for a tensor of the optimizer."""
        state = State(name, path, tuple(x.shape), x.dtype, fqn)
        example = torch.empty(x.shape, dtype=x.dtype, device="meta" if x.is_meta else x.device)
        with self.graph.inserting_before(self.inputs[self.program.signature.inputs[0].name]):
            node, state = add_state(self.graph, self.program, state, example)
        self.states.append(state)
        return node

    # --- the recording ---

    def _recipe(self, group: int, parameter: Tensor, operands: Mapping[str, fx.Node]) -> _Recipe:
        """The recording for parameters of this group, shape and state."""
        values = {name: roles.tensor(x) for name, x in operands.items()}
        alike = (
            group,
            tuple((name, x.shape, x.dtype, x.device) for name, x in values.items()),
            repr(_plain_state(self.optimizer, parameter)),
        )
        if alike not in self.recipes:
            examples = {name: x.detach() for name, x in values.items()}
            self.recipes[alike] = self._recorded(group, parameter, examples)
        return self.recipes[alike]

    def _recorded(self, group: int, parameter: Tensor, examples: Mapping[str, Tensor]) -> _Recipe:
        keys: list[str] = []
        step = inspect.unwrap(type(self.optimizer).step)
        self._check_closure(step)

        def run(tape: Tape, **values: Tensor) -> list[Tensor]:
            tape.work_on(Role(Component.OPTIMIZER))
            twin = self._twin(group, parameter, values)
            before = _constants(twin)
            with torch.no_grad(), Recorded(values["lr"]):
                step(twin)
            self._check_constants(before, _constants(twin))
            state = twin.state[values["parameter"]]
            made = {key: x for key, x in state.items() if isinstance(x, Tensor)}
            keys.extend(made)
            return [values["parameter"], *made.values()]

        try:
            recording = record(run, examples)
        except StepError:
            raise
        except GuardOnDataDependentSymNode as error:
            raise StepError(
                f"{self.kind}.step goes one way or another depending on a number that is only "
                "known when it runs, so one graph cannot hold it. Use an optimizer that computes "
                "the same way in every step, such as AdamW, Adam, SGD or Adagrad; in one of your "
                "own, choose with torch.where."
            ) from error
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise StepError(
                f"{self.kind}.step cannot be recorded: it raised {type(error).__name__}: "
                f"{first_line}. It must compute with torch operators on the parameters, gradients "
                "and state."
            ) from error
        self._check_elementwise(recording)
        return _Recipe(recording, tuple(keys))

    def _twin(self, number: int, parameter: Tensor, values: Mapping[str, Tensor]) -> Any:
        """A copy of the optimizer that holds one parameter: the tensor that is recorded."""
        shard = values["parameter"]
        shard.grad = values["gradient"]
        group = self.optimizer.param_groups[number]
        is_fused = group.get("fused") and isinstance(self.optimizer, torch.optim.Adam)
        # The fused kernels are told the rate as a tensor (Recorded), whatever the optimizer says.
        rate = 0.0 if is_fused else values["lr"]
        if not (is_fused or isinstance(group["lr"], Tensor)):
            rate = values["lr"].item()
        state = {key: values[f"state_{key}"] for key in state_tensors(self.optimizer, parameter)}
        state |= _plain_state(self.optimizer, parameter)
        twin = object.__new__(type(self.optimizer))
        twin.__dict__.update(self.optimizer.__dict__)
        options = _one_by_one(group, shard.device, bool(is_fused))
        twin.param_groups = [{**group, **options, "params": [shard], "lr": rate}]
        twin.state = defaultdict(dict, {shard: state} if state else {})
        return twin

    # --- what cannot be recorded ---

    def _check_closure(self, step: Any) -> None:
        closure = inspect.signature(step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise StepError(
                f"{self.kind} calls a closure that computes the loss, as often as it likes, so a "
                "step is not one graph. Use an optimizer that takes gradients, such as AdamW, "
                "Adam, SGD or Adagrad, or train without train_step: model(...), backward, "
                f"{self.kind}.step."
            )

    def _check_elementwise(self, recording: Recording) -> None:
        """A rank has a part of a parameter: what looks at other elements would see too few."""
        for node in recording.graph.nodes:
            if node.op == "call_function" and _mixes(node):
                raise StepError(
                    f"{self.kind}.step computes {node.target} of a whole parameter, and each rank "
                    "has only its shard of it. Use an optimizer that treats every element alike, "
                    "such as AdamW, Adam, SGD or Adagrad."
                )

    def _check_constants(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        changed = sorted(key for key, x in after.items() if _differ(before.get(key), x))
        if changed:
            raise StepError(
                f"{self.kind}.step changes Python values ({', '.join(changed)}), which a graph "
                "holds as constants. Keep them in the state as tensors: "
                "state['step'] = torch.tensor(0.0), and state['step'] += 1."
            )


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):  # traced: not to be compared by value
        return one is not other
    return one != other


def _plain_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    held = optimizer.state.get(parameter, {})
    return {key: x for key, x in held.items() if not isinstance(x, Tensor)}


def _constants(optimizer: Any) -> dict[str, Any]:
    """The values in an optimizer's groups and state that are no tensors, by where they are."""
    found: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for key, x in group.items():
            if key not in ("params", "lr", "initial_lr"):  # the last is a scheduler's
                found[f"group[{key!r}]"] = x
    for held in optimizer.state.values():
        for key, x in held.items():
            if not isinstance(x, Tensor) and x is not None:
                found[f"state[{key!r}]"] = x
    return found


def learning_rate(group: Mapping[str, Any]) -> Tensor:
    """A group's learning rate as the graph takes it; a Python number in the precision of one."""
    rate = group["lr"]
    return _own(rate) if isinstance(rate, Tensor) else torch.tensor(rate, dtype=torch.float64)


def _one_by_one(group: Mapping[str, Any], device: torch.device, is_fused: bool) -> dict[str, bool]:
    """Options that ask for plain operators: those on lists take no numbers that a graph computes.

    The fused kernel of Adam and AdamW is an operator of its own. On a GPU, another fused optimizer
    has its count of steps there, as a capturable one has.
    """
    plain = ("foreach",) if is_fused else ("foreach", "fused")
    options = {key: False for key in plain if group.get(key)}
    if group.get("fused") and not is_fused and device.type == "cuda":
        options["capturable"] = True
    return options


def _identifier(key: str) -> str:
    return re.sub(r"\W", "_", key)


_MAKES_NEW = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.clone)
_SAME_ELEMENTS = (*_MAKES_NEW, aten._to_copy, aten.copy, torch.ops.moptrace.fused_adam)


def _mixes(node: fx.Node) -> bool:
    """Whether an operator computes an element of its result from several of an operand."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or packet in _SAME_ELEMENTS or torch.Tag.pointwise in node.target.tags:  # type: ignore
        return False
    values = (roles.value(x) for x in node.all_input_nodes)
    return any(isinstance(x, Tensor) and x.dim() for x in values)
