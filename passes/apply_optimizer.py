"""Append what a ``torch.optim`` optimizer does with the gradients."""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moptrace import roles
from moptrace.core import Level, Output, Pass, Program, State, is_random
from moptrace.errors import StepError
from moptrace.joint import Recording, Tape, record
from moptrace.kernels.fused_adam import Recorded
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.placement import INVARIANT, Placement, Shard
from moptrace.roles import Component, Role
from moptrace.updates import add_state
from moptrace.whole_matrices import Cut, Matrix, Owners, apply, matrix_function

__all__ = ["apply_optimizer", "learning_rate", "state_tensors"]


def apply_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    held: Mapping[str, Placement | None] | None = None,
    first_group: int = 0,
) -> Pass:
    """Replace the gradients of an optimizer's parameters by new values of these and their state.

    ``names`` gives the fully qualified name of every parameter of the optimizer. The optimizer's
    own ``step`` is recorded on a whole parameter, as one device would run it, once for all of one
    shape and group; of experts that are stacked, on one expert's. What treats every element alike
    runs on a rank's shards, as all of AdamW, Adam, SGD or Adagrad does. What does not, such as the
    products of Muon and the norms of Adafactor, is computed once, by the owner of the whole
    parameter (``whole_matrices.py``); then its state of the parameter's shape is still sharded, and
    other state is held alike by the ranks that share the parameter.

    The present state tells which tensors the graph takes; those that the optimizer has yet to make,
    in its first step, are outputs. ``held`` says how the ranks hold an entry of the state that an
    earlier step made, by path. Each group's learning rate is an input, so that a scheduler may
    change it; groups are counted from ``first_group``, where several optimizers have parameters.
    Its other options are constants of the graph. Numbers that eager PyTorch reads from tensors,
    such as the count of steps, are read when the graph runs, and are computed with as it does.
    ``foreach`` and ``fused`` say how kernels are called and not what they compute: the plain
    operators are recorded, but for the fused kernel of Adam and AdamW, which is one operator.

    Requires: ``differentiate``. Ensures: the optimizer's own arithmetic, operator by operator; the
    optimizer is not changed. Raises StepError for one that cannot be recorded.
    """

    def rewrite(program: Program) -> Program:
        return _Update(program, optimizer, names, held or {}, first_group).apply()

    options = (("optimizer", type(optimizer).__name__),)
    return Pass("apply_optimizer", rewrite, options, (Level.STEP,), needs=("differentiate",))


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors of a parameter's state, each rank's own part of them."""
    held = optimizer.state.get(parameter, {})
    return {key: _own(x) for key, x in held.items() if isinstance(x, Tensor)}


def _own(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x  # to_local() is recorded by autograd


@dataclass(frozen=True)
class _Recipe:
    """What a step does with one parameter: the recording's results after the parameter are the
    entries of its state with these keys."""

    cut: Cut
    keys: tuple[str, ...]
    function: MatrixFunction | None  # of what needs whole matrices


@dataclass(frozen=True)
class _Task:
    """One parameter to update: its recipe, and what that takes of the graph."""

    fqn: str
    recipe: _Recipe
    given: dict[str, fx.Node]


class _Update:
    """The walk that appends the update of every parameter, each kind of which is recorded once."""

    def __init__(
        self,
        program: Program,
        optimizer: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        held: Mapping[str, Placement | None],
        first_group: int,
    ):
        self.program, self.optimizer, self.names = program, optimizer, names
        self.held, self.first_group = held, first_group
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
        tasks: list[_Task] = []
        for number, group in enumerate(self.optimizer.param_groups, start=self.first_group):
            lr = learning_rate(group)
            rate = self._add_input(f"groups__{number}__lr", f"groups.{number}.lr", lr)
            trained = (x for x in group["params"] if self.names[x] in self.gradients)
            tasks += [self._task(group, number, parameter, rate) for parameter in trained]
        own = {task.fqn for task in tasks}
        kept = [
            (output, self.copies[node])
            for output, node in zip(self.outputs, self.program.outputs, strict=True)
            if output.gradient not in own
        ]
        owners = _owners(tasks)
        for task in tasks:
            kept += self._update(task, owners[task.fqn])
        self.graph.output(tuple(node for _, node in kept))
        signature = replace(
            self.program.signature,
            states=(*self.program.signature.states, *self.states),
            outputs=tuple(output for output, _ in kept),
        )
        changes = {"signature": signature, "constants": self.constants}
        result = self.program.with_graph(self.graph, **changes)
        return result.with_note(note) if (note := self._note(tasks)) else result

    def _task(self, group: Mapping[str, Any], number: int, parameter: Tensor, lr: fx.Node) -> _Task:
        fqn = self.names[parameter]
        name = self.program.signature.parameter(fqn).name
        given = {"parameter": self.inputs[name], "gradient": self.gradients[fqn], "lr": lr}
        placement = roles.placement(given["parameter"])
        held = {"parameter": placement, "gradient": placement, "lr": None}
        for key, x in state_tensors(self.optimizer, parameter).items():
            entry, node_name = f"state_{key}", f"{name}__{_identifier(key)}"
            held[entry] = self._held(parameter, key)
            given[entry] = self._add_input(node_name, f"{fqn}.{key}", x, held[entry], fqn)
        return _Task(fqn, self._recipe(group, number, parameter, given, held), given)

    def _held(self, parameter: Tensor, key: str) -> Placement | None:
        """How the ranks hold an entry of the state: as the parameter, as its experts, or alike."""
        fqn, value = self.names[parameter], self.optimizer.state[parameter][key]
        path, signature = f"{fqn}.{key}", self.program.signature.parameter(fqn)
        placement = roles.placement(self.inputs[signature.name])
        assert placement is not None
        if path in self.held:
            return self.held[path]
        if isinstance(parameter, DTensor):
            if not isinstance(value, DTensor):
                if value.dim() and tuple(value.shape) == tuple(parameter.shape):
                    raise StepError(
                        f"{self.kind} keeps all of {path} on every rank, as a tensor, where the "
                        "parameter is a DTensor. Make it with torch.zeros_like(parameter)."
                    )
                return None
            if value.placements == parameter.placements:
                return placement
            if signature.stacked and value.shape[:1] == parameter.shape[:1]:
                return _of_experts(placement)
            if value.to_local().shape != value.shape:
                raise StepError(
                    f"{path} is split over the ranks in another way than its parameter, as "
                    f"{value.placements}; redistribute it to replicas, or drop it from the state."
                )
            return None
        return placement if value.shape == parameter.shape else None

    def _update(self, task: _Task, first: tuple[int, ...]) -> list[tuple[Output, fx.Node]]:
        """Append the update of one parameter; returns its new values and those of its state."""
        fqn, cut = task.fqn, task.recipe.cut
        parameter = task.given["parameter"]
        function = task.recipe.function
        new, *states = apply(self.graph, cut, task.given, self.constants, first, function)
        found = [(Output(fqn, updates=parameter.name), new)]
        results = zip(task.recipe.keys, states, cut.results[1:], strict=True)
        for key, state, recorded in results:
            old = task.given.get(f"state_{key}")
            if state is old:
                continue
            known = old.name if old is not None else None
            held = None
            if cut.is_like_parameter(recorded):
                held = roles.placement(parameter)
            elif recorded in cut.each:
                held = _of_experts(roles.placement(parameter))
            output = Output(f"{fqn}.{key}", state_of=fqn, updates=known, held=held)
            found.append((output, state))
        return found

    def _note(self, tasks: Sequence[_Task]) -> str | None:
        """What state that is not sharded costs."""
        total = 0
        for task in tasks:
            cut, own = task.recipe.cut, math.prod(task.recipe.cut.matrix.own)
            for node in cut.results[1:]:
                value = roles.tensor(node)
                if not cut.is_like_parameter(node) and value.numel() > own:
                    total += value.numel() * value.element_size() * (cut.matrix.stack or 1)
        if not total:
            return None
        return (
            f"{self.kind} keeps {total:,} bytes of state on every rank that are not of their "
            "parameters' shape, and are not sharded"
        )

    def _add_input(
        self,
        name: str,
        path: str,
        x: Tensor,
        held: Placement | None = None,
        fqn: str | None = None,
    ) -> fx.Node:
        """A graph input for a tensor of the optimizer."""
        state = State(name, path, tuple(x.shape), x.dtype, fqn)
        example = torch.empty(x.shape, dtype=x.dtype, device="meta" if x.is_meta else x.device)
        with self.graph.inserting_before(self.inputs[self.program.signature.inputs[0].name]):
            node, state = add_state(self.graph, self.program, state, example, held)
        self.states.append(state)
        return node

    # --- the recording ---

    def _recipe(
        self,
        group: Mapping[str, Any],
        number: int,
        parameter: Tensor,
        given: Mapping[str, fx.Node],
        held: Mapping[str, Placement | None],
    ) -> _Recipe:
        """The recording for parameters of this group, shape, placement and state."""
        entry = self.program.signature.parameter(self.names[parameter])
        placement = held["parameter"]
        assert placement is not None
        own = roles.tensor(given["parameter"]).shape
        matrix = Matrix.of(entry, placement, own)
        shapes = {name: roles.tensor(node).shape for name, node in given.items()}
        split = [name for name in given if held[name] == placement and shapes[name] == own]
        each = [name for name in given if matrix.stack is not None and held[name] is not None]
        examples: dict[str, Tensor] = {}
        for name, value in ((name, roles.tensor(node)) for name, node in given.items()):
            part = value.shape[1:] if name in each else value.shape
            shape = matrix.shape if name in split else tuple(part)
            with _FAKE:
                examples[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
        alike = (
            number,
            matrix,
            tuple((name, x.shape, x.dtype, x.device) for name, x in examples.items()),
            (*split, None, *each),
            repr(_plain_state(self.optimizer, parameter)),
        )
        if alike not in self.recipes:
            recording, keys = self._recording(group, parameter, examples)
            cut = Cut(recording, matrix, split, each)
            name = f"{_identifier(self.kind).lower()}_{len(self.recipes)}"
            function = matrix_function(name, cut) if cut.whole else None
            self.recipes[alike] = _Recipe(cut, keys, function)
        return self.recipes[alike]

    def _recording(
        self, group: Mapping[str, Any], parameter: Tensor, examples: Mapping[str, Tensor]
    ) -> _Step:
        """What ``_recorded`` gives, or gave for an optimizer, a group and tensors like these.

        A step is made again for every shape of the batch, and its updates are the same. What the
        optimizer's code reads of a module or of its class counts as the same, too.
        """
        options = {key: x for key, x in group.items() if key not in ("params", "lr", "initial_lr")}
        told = _told(
            (_attributes(self.optimizer), options, _plain_state(self.optimizer, parameter))
        )
        if told is None:
            return self._recorded(group, parameter, examples)
        tensors = ((name, x.shape, x.dtype, x.device) for name, x in examples.items())
        key = (type(self.optimizer), isinstance(group["lr"], Tensor), told, *tensors)
        if key not in _recordings:
            _recordings[key] = self._recorded(group, parameter, examples)
        return _recordings[key]

    def _recorded(
        self, group: Mapping[str, Any], parameter: Tensor, examples: Mapping[str, Tensor]
    ) -> _Step:
        keys: list[str] = []
        step = inspect.unwrap(type(self.optimizer).step)
        self._check_closure(step)

        def run(tape: Tape, **values: Tensor) -> list[Tensor]:
            tape.work_on(Role(Component.OPTIMIZER))
            twin = self._twin(group, parameter, values)
            before = _constants(twin)
            with torch.no_grad(), Recorded(values["lr"]), _choosing_numbers(step):
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
            first_line = str(error).strip().partition("\n")[0].rstrip(".")
            fqn, shape = self.names[parameter], list(examples["parameter"].shape)
            stacked = self.program.signature.parameter(fqn).stacked
            part = f"each expert's part of {fqn}" if stacked else fqn
            raise StepError(
                f"{self.kind}.step cannot be recorded: for {part}, of shape {shape}, it raised "
                f"{type(error).__name__}: {first_line}. It must compute with torch operators on "
                "the parameters, gradients and state; give parameters that it does not take to "
                "another optimizer: train_step(model, [one, another])."
            ) from error
        self._check_draws(recording)
        return recording, tuple(keys)

    def _twin(
        self, group: Mapping[str, Any], parameter: Tensor, values: Mapping[str, Tensor]
    ) -> Any:
        """A copy of the optimizer that holds one parameter: the tensor that is recorded."""
        shard = values["parameter"]
        shard.grad = values["gradient"]
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

    def _check_draws(self, recording: Recording) -> None:
        """Ranks that hold parts of a parameter, or the same part, would draw apart."""
        for node in recording.graph.nodes:
            if is_random(node):
                raise StepError(
                    f"{self.kind}.step draws random numbers ({node.target}), which would not be "
                    "those of one device. Draw them before the step, and keep them in the state."
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


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a step may read of an optimizer beside its groups and its state.

    A scheduler replaces the method ``step``, of which the class's is recorded.
    """
    own = {key: x for key, x in vars(optimizer).items() if key not in (*_OF_EVERY_ONE, "step")}
    return own | {"defaults": optimizer.defaults}


def _told(x: Any) -> str | None:
    """A plain value in words; None for one that words may not tell from another."""
    if x is None or isinstance(x, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(x)
    if isinstance(x, dict):
        x = tuple(x.items())
    if not isinstance(x, (tuple, list)):
        return None
    parts = [_told(part) for part in x]
    return None if None in parts else f"({', '.join(map(str, parts))})"


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


def _owners(tasks: Sequence[_Task]) -> dict[str, tuple[int, ...]]:
    """The first owner of every parameter's matrices; the largest are dealt out first."""
    found: dict[str, tuple[int, ...]] = dict.fromkeys((task.fqn for task in tasks), ())
    owners = Owners()
    needing = [task for task in tasks if task.recipe.cut.stages]
    for task in sorted(needing, key=lambda task: -task.recipe.cut.cost):
        found[task.fqn] = owners.choose(task.recipe.cut)
    return found


def _of_experts(placement: Placement | None) -> Placement | None:
    """How the ranks hold what every expert has: split by expert as the parameter is, else alike."""
    assert placement is not None
    kinds = (kind if kind == Shard(0) else INVARIANT for kind in placement.kinds)
    return Placement(placement.view, tuple(kinds))


@contextmanager
def _choosing_numbers(step: Callable[..., Any]) -> Iterator[None]:
    """While a step is recorded, ``min`` and ``max`` of its module take numbers of the graph.

    Python's own would ask which is the larger, which is known only when the graph runs.
    """
    module = step.__globals__  # type: ignore[attr-defined]
    known = {name: module[name] for name in _CHOICES if name in module}
    try:
        for name, choose in _CHOICES.items():
            if name not in known:
                module[name] = choose
        yield
    finally:
        for name in _CHOICES:
            if name not in known:
                del module[name]


def _choice(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    def choose(*values: Any, **options: Any) -> Any:
        if any(isinstance(x, (torch.SymFloat, torch.SymInt)) for x in values):
            return reduce(symbolic, values)
        return plain(*values, **options)

    return choose


_CHOICES = {"min": _choice(min, torch.sym_min), "max": _choice(max, torch.sym_max)}
_FAKE = FakeTensorMode()
_OF_EVERY_ONE = frozenset(vars(torch.optim.Optimizer([torch.zeros(())], {})))
_Step = tuple[Recording, tuple[str, ...]]  # what is recorded, and the keys of its state
_recordings: dict[Any, _Step] = {}
