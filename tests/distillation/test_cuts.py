"""Cuts: graph outputs equal what hooks see, nothing runs after the last, regions share weights."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError
from graftc.distillation import capture_graph, extract
from graftc.distillation.targets import Cut, CutInput
from tests.distillation import tiny


def batch(count: int = 3) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(count, tiny.TOKENS, tiny.DIM, generator=made)
    return {"x": x, "t": torch.randint(1000, (count,), generator=made)}


def hooked(model: nn.Module, path: str) -> tuple[list[Tensor], Tensor]:
    """The positional inputs and the output of a module's call."""
    seen: list[tuple[list[Tensor], Tensor]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, inputs, output: seen.append((list(inputs), output))
    )
    model(**batch())
    handle.remove()
    return seen[0]


def test_values_equal_what_hooks_see():
    model = tiny.teacher()
    cuts = [tiny.attention_site(i).teacher for i in (0, 2)] + [tiny.pair_site().teacher]
    first, second, pair = capture_graph(model, cuts)(**batch())
    for values, path in ((first, "blocks.0.attn"), (second, "blocks.2.attn")):
        inputs, output = hooked(model, path)
        torch.testing.assert_close(values[0], inputs[0], rtol=0, atol=0)
        torch.testing.assert_close(values[1], output, rtol=0, atol=0)
    (x, c), _ = hooked(model, "blocks.2")
    _, out = hooked(model, "blocks.3")
    for ours, theirs in zip(pair, (x, c, out), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_value_that_two_cuts_share_is_the_same_tensor():
    cut = tiny.attention_site(1).teacher
    one, two = capture_graph(tiny.teacher(), [cut, cut])(**batch())
    assert one[1] is two[1]


def test_nothing_runs_after_the_last_cut():
    class Bomb(nn.Module):
        def forward(self, *_: Tensor) -> Tensor:
            raise AssertionError("this comes after the last site")

    model = tiny.teacher()
    model.blocks[3] = Bomb()
    model.blocks[2].mlp = Bomb()
    model.head = Bomb()
    captured = capture_graph(model, [tiny.attention_site(2).teacher])
    captured(**batch())
    names = [name for name, _ in captured.named_modules()]
    assert "blocks.2.attn" in names
    assert not [n for n in names if n.startswith(("blocks.3", "head", "blocks.2.mlp"))]
    calls = [n for n in captured.graph.nodes if n.op == "call_module"]
    assert [str(n.target) for n in calls] == ["time", "blocks.0", "blocks.1", "blocks.2"]


def test_the_result_of_a_block_is_threaded_where_a_later_cut_needs_it():
    model = tiny.teacher()
    inner, outer = (
        tiny.attention_site(1).teacher,
        Cut("", (CutInput("x", "blocks.1", 0),), "blocks.1"),
    )
    values = capture_graph(model, [inner, outer])(**batch())
    torch.testing.assert_close(values[1][1], hooked(model, "blocks.1")[1], rtol=0, atol=0)
    torch.testing.assert_close(values[0][1], hooked(model, "blocks.1.attn")[1], rtol=0, atol=0)


def test_parameters_are_shared_and_the_model_is_left_alone():
    model = tiny.teacher()
    before = list(vars(model))
    captured = capture_graph(model, [tiny.attention_site(3).teacher])
    ours = {id(p) for p in model.parameters()}
    assert all(id(p) in ours for p in captured.parameters())
    assert list(vars(model)) == before


def test_capture_compiles_as_one_graph():
    model = tiny.teacher()
    captured = capture_graph(model, [tiny.attention_site(i).teacher for i in (1, 2)])
    compiled = torch.compile(captured, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, theirs in zip(compiled(**batch()), captured(**batch()), strict=True):
            torch.testing.assert_close(ours[1], theirs[1])


def test_arguments_by_keyword_and_by_position_are_the_same():
    model = tiny.paired()  # calls blocks.1 with c as a keyword, blocks.0 without
    by_place = Cut("", (CutInput("c", "blocks.1", 1),), "blocks.1")
    by_name = Cut("", (CutInput("c", "blocks.0", "c"),), "blocks.0")
    one, two = capture_graph(model, [by_place, by_name])(**batch())
    assert one[0] is two[0]


def test_a_single_call_is_extracted_as_the_submodule():
    student = tiny.hyena()
    assert extract(student, tiny.attention_site(1).student) is student.blocks[1].attn


def test_a_pair_is_extracted_as_a_region_that_shares_parameters():
    student = tiny.paired()
    region = extract(student, tiny.pair_site().student)
    x, c = torch.randn(2, tiny.TOKENS, tiny.DIM), torch.randn(2, tiny.DIM)
    expected = student.blocks_merge[0](student.blocks[2](x, c), student.blocks[3](x, c))
    torch.testing.assert_close(region(x, c), expected, rtol=0, atol=0)
    names = {id(p): n for n, p in student.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in region.parameters()} == {"blocks", "blocks_merge"}


def test_a_call_with_a_keyword_becomes_a_region():
    student = tiny.paired()
    inputs = (CutInput("x", "blocks.1", 0), CutInput("c", "blocks.1", 1))
    region = extract(student, Cut("", inputs, "blocks.1"))
    x, c = torch.randn(2, tiny.TOKENS, tiny.DIM), torch.randn(2, tiny.DIM)
    torch.testing.assert_close(region(x, c), student.blocks[1](x, c), rtol=0, atol=0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "cut", "code", "told"),
    [
        (tiny.teacher, tiny.call("blocks.1.atn", "blocks.1"), "G510", "blocks.1.attn"),
        (tiny.teacher, tiny.call("blocks.9"), "G510", "blocks.9"),
        (Twice, tiny.call("layer"), "G511", "2 times"),
        (tiny.teacher, Cut("", (CutInput("x", "blocks.1", 5),), "blocks.1"), "G512", "no tensor"),
        (Branching, tiny.call("layer"), "G513", "straight-line"),
    ],
)
def test_a_cut_that_is_not_in_the_model_is_told(model, cut, code, told):
    with pytest.raises(GraftError) as raised:
        capture_graph(model(), [cut])
    assert raised.value.diagnostics[0].code == code
    assert told in str(raised.value)


def test_a_region_that_uses_more_than_its_inputs_is_told():
    with pytest.raises(GraftError, match="comes from outside") as raised:
        extract(tiny.teacher(), Cut("", (CutInput("x", "blocks.2", 0),), "blocks.3"))
    assert raised.value.diagnostics[0].code == "G514"


def test_the_tuple_of_a_level_is_taken_apart_by_getitem_alone():
    captured = capture_graph(tiny.teacher(), [tiny.attention_site(1).teacher])
    functions = {n.target for n in captured.graph.nodes if n.op == "call_function"}
    assert functions == {operator.getitem, operator.add}
