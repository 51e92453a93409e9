"""Write a pass, from the first idea to the proof: prose and code, alternating.

Run it with ``python examples/2_write_a_pass.py``, and read on.
"""

import operator

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

import moptrace
from moptrace import roles
from moptrace.core import Level, Pass, Program, erase_dead
from moptrace.errors import CheckError
from moptrace.passes.default import canonical, sharded
from moptrace.reshard import reshard
from moptrace.roles import Component
from moptrace.rules import rule_for
from moptrace.testing import assert_same_function

ops, aten = torch.ops.moptrace, torch.ops.aten

# 1. A model
#
# The model is the user's, on one device. Its experts are gated: each multiplies its rows by two
# weights, `gate` and `up`, before the third. It loops over the experts, as people do.


class Experts(nn.Module):
    def __init__(self, vocabulary=64, width=16, hidden=24, experts=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.gate = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(experts))
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(experts))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(len(self.gate)):
            token, slot = torch.where(chosen == e)
            rows = F.silu(self.gate[e](x[token])) * self.up[e](x[token])
            out.index_add_(0, token, self.down[e](rows) * weights[token, slot, None])
        return F.cross_entropy(self.head(x + out), labels.flatten())


# 2. A Program
#
# `trace` captures the model as a Program: a graph, the meaning of its inputs and outputs, a level,
# and the program that it came from. It never changes. `canonical()` is a pass made of three passes.
# After it every Mixture-of-Experts block reads the same, whatever it looked like before:
#
#     dispatch -> grouped_mm (gate), grouped_mm (up) -> silu, mul -> grouped_mm (down) -> combine

torch.manual_seed(0)
model = Experts().double()
ids = torch.randint(64, (8, 6))
batch = {"input_ids": ids, "labels": ids}

program = canonical()(moptrace.trace(model, batch))
products = program.graph.find_nodes(op="call_function", target=ops.grouped_mm.default)
print(
    f"1. a {program.level} program of {len(program.nodes)} nodes, {len(products)} grouped products"
)

# 3. Roles
#
# A node says which operator runs on what. All else that is known of it is its role: the component
# it belongs to, the block, the user's module and source line, later its placement. `roles` reads
# them; `roles.tensor(node)` is a fake tensor with the node's shape and type. Passes look at
# structure and roles, never at the names of variables.

first = products[0]
assert roles.component(first) is Component.EXPERTS
print(f"2. the first is {roles.where(first)}: {tuple(roles.tensor(first).shape)}")

# 4. Rules
#
# How may this operator be split over ranks? A rule answers with a letter for each dimension, as
# einsum does. Here `e` counts rows in expert order and `E` the experts. What carries a letter is
# split together. Rules know no ranks, so there is nothing to write for a new mesh; and there is
# nothing to write for this pass, since it makes no operator that has no rule yet.

print(f"3. its rule: {rule_for(first)}")

# 5. An idea
#
# The same rows meet `gate` and `up`. One product with both weights side by side gives both results
# at once: x [A | B] = [x A | x B], the same sums in the same order. First, find such a pair: two
# products with the same rows and the same counts.


def pairs(graph: fx.Graph):
    """Two grouped products of the same rows, whose weights have the same shape."""
    waiting = {}
    for node in graph.find_nodes(op="call_function", target=ops.grouped_mm.default):
        rows, weight, counts = node.args
        key = (rows, counts, roles.tensor(weight).shape)
        if key in waiting:
            yield waiting.pop(key), node
        else:
            waiting[key] = node


# 6. A pass
#
# A pass takes a copy of the graph, edits it, and returns a new program. `emit` adds a node: the
# fake result comes from calling the operator on fake operands, and the role from the node that it
# replaces, so messages about it still lead to the user's line.


def emit(like: fx.Node, target, *args) -> fx.Node:
    """Call ``target`` before ``like``, in its role."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args)
    roles.set_value(node, target(*map_arg(args, roles.value)))
    roles.copy_role(node, of=like)
    return node


def merge_products() -> Pass:
    """Multiply the rows of experts by two weights at once.

    Requires: a canonical program. Ensures: the same values, with fewer and wider products.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        for first, second in list(pairs(graph)):
            rows, weight, counts = first.args
            if second.args[1].op != "placeholder":
                first.prepend(second.args[1])  # made of a parameter alone: it can come earlier
            both = emit(first, aten.cat.default, [weight, second.args[1]], 2)
            product = emit(first, ops.grouped_mm.default, rows, both, counts)
            halves = emit(first, aten.chunk.default, product, 2, 1)
            for at, old in enumerate((first, second)):
                old.replace_all_uses_with(emit(first, operator.getitem, halves, at))
        erase_dead(graph)
        return program.with_graph(graph)

    return Pass("merge_products", rewrite, takes=(Level.CANONICAL,), gives=Level.CANONICAL)


# 7. Check
#
# Applying a pass checks the result: the graph, the types, the level, and at later levels every
# placement. Then `diff` shows what happened. Lines with `+` are new, and the pass signed them.

merged = merge_products()(program)
print("4. what the pass changed:\n")
print(merged.diff(block=0))

# 8. Proof
#
# `chain` would put the pass in a pipeline; here we go on by hand. The passes that shard know
# nothing of ours, and need not: rules and placements carry them. `assert_same_function` runs the
# local program on simulated ranks in one process, and compares the loss and every gradient with
# the user's model, in float64, to 1e-10. Eight ranks, four of which share the experts:

plan = moptrace.Plan(ep=4)
assert_same_function(sharded(plan, 8)(merged), model, batch)
print("\n5. eight ranks compute the same loss and the same gradients, to 1e-10")

# 9. A wrong pass
#
# Suppose a pass "saves communication": it drops a reshard and uses its operand as it is. That is a
# sum of which every rank holds one term. On four ranks the loss would be four different numbers,
# all of them too small, and nothing would crash. A program carries its placements, so the checker
# sees that the division takes a whole value and is given terms of a sum. It refuses.


def save_communication() -> Pass:
    """Wrong: drops the reductions of the loss."""

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        for node in graph.find_nodes(op="call_function", target=reshard):
            if roles.component(node) is Component.LOSS and str(node.args[2]) == "partial":
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        return program.with_graph(graph)

    return Pass("save_communication", rewrite, takes=(Level.PLACED,))


placed = next(p for p in sharded(plan, 8)(merged).history if p.level is Level.PLACED)
try:
    save_communication()(placed)
except CheckError as error:
    print(f"\n6. the checker refuses a missing reduction:\n   {str(error).splitlines()[0]}")

# 10. A wrong pass that is well placed
#
# Not all mistakes are about placement. This pass swaps the halves: `gate` for `up`. Every shape and
# every placement fits, and the checker has nothing to say. The comparison has. So a pass is done
# when both agree; `moptrace.testing` has Hypothesis strategies for models, meshes and plans, to ask
# the same of any model on any mesh.


def swap_halves() -> Pass:
    """Wrong: takes each half for the other one."""

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        for chunk in graph.find_nodes(op="call_function", target=aten.chunk.default):
            for half in list(chunk.users):
                half.update_arg(1, 1 - half.args[1])
        return program.with_graph(graph)

    return Pass("swap_halves", rewrite)


try:
    assert_same_function(sharded(plan, 8)(swap_halves()(merged)), model, batch)
except AssertionError as error:
    print(f"\n7. the comparison refuses swapped halves:\n   {str(error).splitlines()[0]}")
