"""Prints and differences: what they must show, and goldens of every pass on a tiny Mixtral.

``MOPTRACE_UPDATE_GOLDEN=1`` writes the goldens instead of comparing with them.
"""

from __future__ import annotations

import html
import operator
import re
import time
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from goldens import GOLDEN, assert_golden
from moptrace import roles
from moptrace.core import Input, Level, Output, Program, Signature
from moptrace.diff import diff
from moptrace.passes.default import canonical, sharded
from moptrace.placement import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Axis,
    Placement,
    Rows,
    Shard,
    View,
)
from moptrace.plan import Plan
from moptrace.render import op_name, render, render_html, type_name
from moptrace.trace import trace
from tiny_mixtral import TinyMixtral

aten = torch.ops.aten


def build(layers: int = 2) -> Program:
    tokens = torch.zeros(4, 6, dtype=torch.int64)
    program = trace(TinyMixtral(layers), {"ids": tokens, "labels": tokens})
    return sharded(Plan(ep=2), 4)(canonical()(program))


@cache
def history() -> tuple[Program, ...]:
    return build().history


NAMES = [program.made_by.name if program.made_by else "trace" for program in history()]
every_program = pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)


# --- goldens --------------------------------------------------------------------------------------


@every_program
def test_the_print_and_the_difference_are_the_golden_ones(number: int) -> None:
    program = history()[number]
    text = f"{program.diff()}\n\n{render(program)}\n" if number else f"{render(program)}\n"
    assert_golden(NAMES[number], text)


def test_every_golden_is_compared() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {*NAMES, "formulas"}


# --- the print ------------------------------------------------------------------------------------


@every_program
def test_a_print_has_every_name_operator_and_argument(number: int) -> None:
    program = history()[number]
    text = render(program, fold=False).split("\nnodes\n")
    lines = {
        line.split()[0]: line
        for part in text
        for line in part.split("\noutputs")[0].split("\nexpert_function")[0].split("\n")
        if line.startswith("  %")
    }
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        line = lines.pop(f"%{node.name}")
        assert type_name(node, program.level) in line
        if node.op == "placeholder":
            continue
        call = line.split(" = ", 1)[1]
        if node.target is not operator.getitem:
            assert call.startswith(f"{op_name(node.target)}(")
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            assert _written(leaf) in call
    assert not lines


def _written(leaf: Any) -> str:
    if isinstance(leaf, fx.Node):
        return f"%{leaf.name}"
    if isinstance(leaf, str):
        return leaf
    return {torch.float32: "f32", torch.int64: "i64"}.get(leaf, str(leaf))


def test_a_print_names_parameters_stacks_inputs_and_the_loss() -> None:
    text = str(history()[-1])
    assert "# embedding.weight" in text
    assert re.search(r"stack of layers\.0\.experts\.experts\.\{0\.\.3\}\.up\.weight", text)
    assert re.search(r"%ids +i64\[1@dp, 6\] +# ids", text)
    assert re.search(r"outputs\n  %\w+ +f32\[\]\{invariant\} +# the loss", text)


def test_a_print_leads_to_the_user_s_line_and_the_pass() -> None:
    assert re.search(r"= linear\(.*# .*tiny_mixtral\.py:\d+", str(history()[0]))
    assert re.search(r"= all_gather\(.*axis='.*'.*dim=\d.*# .*localize", str(history()[-2]))


def test_tied_parameters_buffers_and_their_updates_are_named() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(7, 4)
            self.head = torch.nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("seen", torch.zeros(7), persistent=False)
            self.register_parameter("fixed", torch.nn.Parameter(torch.ones(4), requires_grad=False))

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.seen.add_(torch.bincount(ids, minlength=7))
            logits = self.head(self.embedding(ids) * self.fixed)
            return logits.mean(), logits

    text = str(trace(Counting(), {"ids": torch.zeros(3, dtype=torch.int64)}))
    assert "# embedding.weight, also head.weight" in text
    assert "# seen, not saved" in text
    assert "# fixed, frozen" in text
    assert re.search(r"# the loss, 0\n", text)
    assert re.search(r"# new value of seen$", text)


def test_prints_of_equal_programs_are_equal() -> None:
    for have, want in zip(build().history, history(), strict=True):
        assert str(have) == str(want)
        assert have.diff() == want.diff()


@every_program
def test_a_print_names_no_address_and_no_folder(number: int) -> None:
    program = history()[number]
    for text in (str(program), program.diff()):
        assert not re.search(r"0x[0-9a-f]{4}|\bat 0x|[\w.]/\w", text)


TOKENS = View("home", (Axis("dp", 4),))
EXPERTS = View("experts", (Axis("edp", 2), Axis("ep", 2)))
ALONE = View("experts", (Axis("edp", 4), Axis("ep", 1)))


@pytest.mark.parametrize(
    ("shape", "view", "kinds", "level", "text"),
    [
        ((8, 3), TOKENS, (Shard(0),), Level.PLACED, "f32[8@dp, 3]"),
        ((8, 3), TOKENS, (Shard(1),), Level.PLACED, "f32[8, 3@dp]"),
        ((24, 3), TOKENS, (Shard(0, 3),), Level.PLACED, "f32[24@dp in 3, 3]"),
        ((8, 3), TOKENS, (REPLICATE,), Level.PLACED, "f32[8, 3]"),
        ((), TOKENS, (PARTIAL,), Level.PLACED, "f32[]{partial dp}"),
        ((5,), TOKENS, (INVARIANT,), Level.PLACED, "f32[5]{invariant}"),
        ((5,), EXPERTS, (INVARIANT, INVARIANT), Level.PLACED, "f32[5]{invariant}"),
        ((5,), EXPERTS, (INVARIANT, Shard(0)), Level.PLACED, "f32[5@ep]{invariant edp}"),
        ((5,), EXPERTS, (PARTIAL, INVARIANT), Level.PLACED, "f32[5]{partial edp; invariant ep}"),
        ((8, 3), EXPERTS, (Shard(0), Shard(0)), Level.PLACED, "f32[8@(edp, ep), 3]"),
        ((8, 3), EXPERTS, (Shard(1), Shard(0)), Level.PLACED, "f32[8@ep, 3@edp]"),
        ((9, 3), TOKENS, (Rows("token"),), Level.PLACED, "f32[9@dp by token, 3]"),
        ((9, 3), TOKENS, (Rows("token"),), Level.LOCAL, "f32[rows@dp by token, 3]"),
        (
            (9, 3),
            EXPERTS,
            (Rows("token"), Rows("expert")),
            Level.LOCAL,
            "f32[rows@(edp by token, ep by expert), 3]",
        ),
        ((8, 3), ALONE, (Shard(1), Shard(0)), Level.PLACED, "f32[8, 3@edp]"),
        ((8, 3), ALONE, (INVARIANT, Shard(0)), Level.PLACED, "f32[8, 3]{invariant}"),
    ],
)
def test_placements_are_part_of_the_type(
    shape: tuple[int, ...], view: View, kinds: Any, level: Level, text: str
) -> None:
    node = fx.Graph().placeholder("x")
    roles.set_value(node, torch.empty(shape, device="meta"))
    roles.set_role(node, placements=(Placement(view, kinds),))
    assert type_name(node, level) == text


def test_unknown_sizes_are_symbols() -> None:
    assert "i64[u0]" in str(history()[0])


def test_colours_change_nothing_but_colours() -> None:
    program = history()[-1]
    assert re.sub(r"\033\[\d+m", "", render(program, color=True)) == render(program)


def test_html_is_the_escaped_print() -> None:
    program = history()[NAMES.index("place")]
    text = render_html(program)
    assert "-&gt; replicate" in text
    assert program._repr_html_() == text
    plain = re.sub(r"</?(pre|span)[^>]*>", "", text)
    assert html.unescape(plain) == render(program)


# --- folding --------------------------------------------------------------------------------------


def chain_of(layers: int, *, skip_at: int | None = None, twice: int = 1) -> Program:
    """A graph of equal layers; layer ``skip_at`` reads the input of the one before it too."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    example = torch.empty(4, 4, device="meta")
    roles.set_value(x, example)
    before = x

    def call(target: Any, *args: Any, module: str = "") -> fx.Node:
        node = graph.create_node("call_function", target, args, name=op_name(target))
        roles.set_value(node, example)
        roles.set_role(node, module=module)
        return node

    here = x
    for layer in range(layers):
        module, start = f"layers.{layer}", here
        inner = here
        for _ in range(twice):
            inner = call(aten.tanh.default, inner, module=module)
            inner = call(aten.mul.Tensor, inner, 2, module=module)
            inner = call(aten.exp.default, inner, module=module)
        here = call(aten.add.Tensor, before if layer == skip_at else start, inner, module=module)
        before = start
    graph.output((here,))
    spec = pytree.tree_structure(None)
    signature = Signature(
        (), (), (Input("x", "x", (4, 4), torch.float32),), (Output(""),), 0, spec, (), spec, ()
    )
    return Program(graph, signature, Level.CAPTURED)


def nodes_shown_and_hidden(text: str) -> tuple[int, int]:
    body = text.split("\nnodes\n")[1].split("\noutputs\n")[0].split("\n")
    hidden = sum(int(n.replace(",", "")) for n in re.findall(r"like it \(([\d,]+) nodes\)", text))
    return sum(line.startswith("  %") for line in body), hidden


def test_the_first_of_equal_layers_stands_for_all() -> None:
    text = render(chain_of(94), fold=True)
    assert "  ... 93 more like it (372 nodes)" in text
    assert nodes_shown_and_hidden(text) == (4, 372)


def test_a_run_inside_a_layer_is_folded_in_the_layer_shown() -> None:
    text = render(chain_of(10, twice=5), fold=True)
    assert "... 4 more like it (12 nodes)" in text
    assert "... 9 more like it (144 nodes)" in text


def test_a_layer_that_is_wired_otherwise_is_shown() -> None:
    text = render(chain_of(20, skip_at=10), fold=True)
    assert text.count("... 9 more like it") == 2
    assert "%add_10 " in text
    assert nodes_shown_and_hidden(text) == (8, 72)


def test_folding_hides_no_node_from_the_count() -> None:
    program = build(layers=3)
    for step in program.history:
        shown, hidden = nodes_shown_and_hidden(render(step, fold=True))
        inputs = len(step.signature.names)
        assert (hidden > 0) and shown + hidden >= len(step.graph.nodes) - 1 - inputs


def test_long_programs_are_folded_unless_asked_otherwise() -> None:
    assert "more like it" in str(chain_of(200))
    assert "more like it" not in str(chain_of(20))
    assert "more like it" not in render(chain_of(200), fold=False)


def test_printing_94_layers_takes_less_than_two_seconds() -> None:
    program = chain_of(94, twice=70)
    assert len(program.graph.nodes) > 19_000
    start = time.process_time()
    text = str(program)
    assert time.process_time() - start < 2
    assert len(text.split("\n")) < 30


# --- the difference -------------------------------------------------------------------------------


def edited(program: Program, edit: Any) -> Program:
    graph, mapping = program.copy_graph()
    edit(graph, {node.name: new for node, new in mapping.items()})
    return program.with_graph(graph, previous=program)


def signs(text: str) -> list[str]:
    """``sign %name`` of each line."""
    return re.findall(r"^([-+~ ] %\w+)", text, re.MULTILINE)


def test_a_program_does_not_differ_from_itself_or_its_copy() -> None:
    program = chain_of(3)
    copy = edited(program, lambda graph, at: None)
    assert "no node changed" in diff(program, program)
    assert "no node changed" in copy.diff()


def test_renamed_nodes_have_not_changed() -> None:
    program = chain_of(6)
    graph, new = fx.Graph(), {}
    for number, node in enumerate(program.graph.nodes):
        new[node] = graph.node_copy(node, new.__getitem__)
        if node.op == "call_function":
            new[node].name = f"n{number}"
    assert "no node changed" in diff(program, program.with_graph(graph))


def test_an_inserted_node_is_added_and_its_users_are_rewired() -> None:
    def negate(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        with graph.inserting_before(at["exp_1"]):
            new = graph.create_node("call_function", aten.neg.default, (at["mul_1"],), name="neg")
        roles.copy_role(new, of=at["mul_1"])
        roles.set_value(new, roles.value(at["mul_1"]))
        at["exp_1"].replace_input_with(at["mul_1"], new)

    text = edited(chain_of(6), negate).diff()
    lines = [line for line in signs(text) if line[0] != " "]
    assert lines == ["+ %neg", "- %exp_1", "+ %exp_1"]
    assert "25 -> 26 nodes   neg x1  rewired x1" in text
    assert "  ...  (5 unchanged)" in text


def test_a_removed_node_is_shown_where_it_was() -> None:
    def drop(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        at["mul_2"].replace_all_uses_with(at["tanh_2"])
        graph.erase_node(at["mul_2"])

    lines = signs(edited(chain_of(6), drop).diff())
    assert lines == [
        "  %add_1",
        "  %tanh_2",
        "- %mul_2",
        "- %exp_2",
        "+ %exp_2",
        "  %add_2",
        "  %tanh_3",
    ]


def test_another_output_is_a_change() -> None:
    def swap(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        graph.output_node().args = ((at["exp_1"],),)

    text = edited(chain_of(2), swap).diff()
    assert [x for x in signs(text) if x[0] != " "] == ["- %output", "+ %output"]
    assert re.search(r"- %output += return \(%add_1,\)\n\+ %output += return \(%exp_1,\)", text)


def test_a_moved_node_is_shown_at_both_places() -> None:
    def move(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        extra = at["tanh_5"]
        extra.replace_input_with(at["add_4"], at["x"])
        at["tanh"].prepend(extra)

    program = edited(
        chain_of(6), lambda graph, at: at["tanh_5"].replace_input_with(at["add_4"], at["x"])
    )
    moved = edited(program, move)
    assert [x for x in signs(moved.diff()) if x[0] != " "] == ["+ %tanh_5", "- %tanh_5"]


def test_a_new_type_or_tag_alone_is_marked() -> None:
    def place(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        roles.set_role(at["mul"], placements=(Placement(TOKENS, (Shard(0),)),))
        roles.set_role(at["exp"], component=roles.Component.ROUTER, block=0)

    text = edited(chain_of(2), place).diff()
    assert [x for x in signs(text) if x[0] != " "] == ["~ %mul", "~ %exp"]
    assert re.search(r"~ %mul +f32\[4@dp, 4\] += mul\(%tanh, 2\) +# was f32\[4, 4\]", text)
    assert re.search(r"~ %exp .*# router 0", text)
    assert "retyped x1  retagged x1" in text


@every_program
def test_a_difference_accounts_for_every_node(number: int) -> None:
    program = history()[number]
    if program.previous is None:
        return
    text = program.diff()
    found = [line[0] for line in signs(text)]
    counts = re.findall(r"(\d+) (?:unchanged|retyped)", text.split("\n", 1)[1])
    hidden = sum(map(int, counts))
    if "no node changed" in text:
        assert len(program.graph.nodes) == len(program.previous.graph.nodes)
        return
    for side, steps in (("-", program.previous), ("+", program)):
        shown = sum(sign in f" ~{side}" for sign in found)
        assert shown + hidden == len(steps.graph.nodes)


def test_a_difference_can_show_one_block() -> None:
    def tag(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        for name, node in at.items():
            if name.endswith("_3"):
                roles.set_role(node, block=3)

    def replace(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        for name in ("exp_2", "exp_3"):
            at[name].target = aten.sin.default

    before = edited(chain_of(6), tag)
    after = edited(before, replace)
    changed = [x for x in signs(after.diff()) if x[0] != " "]
    assert changed == ["- %exp_2", "+ %exp_2", "- %exp_3", "+ %exp_3"]
    alone = after.diff(block=3)
    assert signs(alone) == ["  %tanh_3", "  %mul_3", "- %exp_3", "+ %exp_3", "  %add_3"]


def test_a_block_has_the_weights_that_it_alone_uses() -> None:
    placed = history()[NAMES.index("place")]
    graph, mapping = placed.copy_graph()
    products = [n for n in mapping.values() if n.target is torch.ops.moptrace.grouped_mm.default]
    for number, node in enumerate(products):
        roles.set_role(node, component=roles.Component.EXPERTS, block=number // 3)
    tagged = placed.with_graph(graph)
    empty = placed.with_graph(fx.Graph())
    empty.graph.output(())
    shown = diff(empty, tagged, block=0)
    assert shown.count("grouped_mm(") == 3
    assert shown.count("= transpose(%reshard") == 3
    assert shown.count("stack of layers.0.") == 3
    assert "layers.1." not in shown


def test_a_difference_is_headed_by_the_passes_between() -> None:
    steps = history()
    at = NAMES.index("place")
    assert steps[at].diff().startswith("place()   ")
    assert diff(steps[at], steps[at + 2]).startswith("localize(), bucket_gathers(size=")
    assert diff(steps[at + 1], steps[0]).startswith("local -> captured   ")


def test_a_long_difference_folds_the_layers() -> None:
    def sine(graph: fx.Graph, at: dict[str, fx.Node]) -> None:
        for node in at.values():
            if node.target is aten.exp.default:
                node.target = aten.sin.default

    text = edited(chain_of(200), sine).diff()
    assert "more like it" in text
    assert len(text.split("\n")) < 60
