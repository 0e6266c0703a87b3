"""The contract on shapes: what a traced graph is right for, and who says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.deploy.request import read_request
from graftc.deploy.shapes import prove, read_guards
from graftc.diagnostics import GraftError
from tests.conftest import small_dit


def config(**shapes: list) -> dict:
    ports = [
        {"name": n, "shape": s, "dtype": "float32", "meaning": "other"} for n, s in shapes.items()
    ]
    dynamic = {d: 4 for s in shapes.values() for d in s if isinstance(d, str)}
    facts = {"mode": "eval", "dtype": "float32", "dynamic": dynamic}
    return {"inputs": ports, "outputs": {"kind": "tensor", "names": []}, "facts": facts}


def drawn(about: dict) -> Callable[[Mapping[str, int]], dict[str, Tensor]]:
    return lambda sizes: {
        p["name"]: torch.randn([sizes.get(s, s) for s in p["shape"]]) for p in about["inputs"]
    }


def proof(model: nn.Module, dynamic: str, **shapes: list):
    about = config(**shapes)
    return prove(model.eval(), about, read_request(about, dynamic=dynamic), drawn(about))


class Mixed(nn.Module):
    """Free in the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Positions(nn.Module):
    """A table of twelve positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class Branch(nn.Module):
    """The trap: another path beside four tokens, which tracing at four never sees."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] // 2 == 2:
            return x * 2
        return x * 3


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_size_that_nothing_depends_on_is_proved_without_end():
    _, proofs = proof(Mixed(), "batch=1:2:8,tokens=2:4:16", x=["batch", "tokens", 8])
    assert {p.asked.name: p.text() for p in proofs} == {"batch": "1..", "tokens": "1.."}


def test_a_range_beyond_a_table_is_refused_with_the_models_own_line():
    with pytest.raises(GraftError) as error:
        proof(Positions(), "batch=1:2:2,tokens=2:4:16", x=["batch", "tokens", 8])
    said = str(error.value)
    assert error.value.diagnostics[0].code == "G660"
    assert "tokens=16" in said
    assert "test_shapes.py" in said
    _, proofs = proof(Positions(), "batch=1:2:2,tokens=2:4:12", x=["batch", "tokens", 8])
    assert next(p for p in proofs if p.asked.name == "tokens").high == 12


def test_a_graph_that_is_right_at_the_traced_size_only_is_refused():
    with pytest.raises(GraftError) as error:
        proof(Branch(), "batch=1:2:2,tokens=4:4:8", x=["batch", "tokens", 8])
    said = str(error.value)
    assert "right at the traced ones only" in said
    assert "tokens=8" in said
    assert "test_shapes.py" in said  # the line with the branch


def test_one_fixed_size_of_one_is_traced_at_one():
    (exported, _), proofs = proof(Mixed(), "batch=1,tokens=2:4:16", x=["batch", "tokens", 8])
    x = next(n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder")
    assert x.shape[0] == 1
    assert [str(p.asked) for p in proofs] == ["batch=1:1:1", "tokens=2:4:16"]


def test_equal_dimensions_are_one_symbol():
    (exported, _), proofs = proof(Two(), "n=1:4:8", x=["n", 3], y=["n", 3])
    shapes = [n.meta["val"].shape[0] for n in exported.graph.nodes if n.op == "placeholder"]
    assert len({str(s) for s in shapes}) == 1
    assert proofs[0].places == (("x", 0), ("y", 0))


def test_torch_says_itself_that_dit_is_right_at_one_size():
    """Height and width are accepted as dynamic; the guards, with diffusers' own line, know better."""
    model = small_dit(1)
    auto = torch.export.Dim.AUTO
    traced = torch.export.export(
        model.module, (), dict(model.inputs), strict=False,
        dynamic_shapes={"hidden_states": {2: auto, 3: auto}, "timestep": None, "class_labels": None},
    )  # fmt: skip
    places = {"height": [("hidden_states", 2)], "width": [("hidden_states", 3)]}
    guards = read_guards(traced, places)
    assert all(g.holds({"height": 8, "width": 8}) for g in guards)
    broken = [g for g in guards if not g.holds({"height": 16, "width": 16})]
    assert any("embeddings.py" in g.where and "height" in g.text for g in broken)


def test_a_model_that_fails_inside_the_range_is_refused():
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], -1, 2, 8)

    with pytest.raises(GraftError) as error:
        proof(Picky(), "batch=1:2:2,tokens=2:4:7", x=["batch", "tokens", 8])
    assert "tokens=7" in str(error.value)
