"""Models that are written in unusual ways: each is captured and computes the same, or is refused precisely."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler import compile_model
from graftc.diagnostics import GraftError
from graftc.emit.package import write_package
from graftc.language.check import check
from graftc.program.analysis import analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.modes import captured


def agrees(module: nn.Module, **inputs: Any) -> None:
    """The Program computes what the module computes, each on a fresh copy."""
    program = capture(Model(copy.deepcopy(module), inputs))
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    with torch.no_grad():
        wanted = module(**inputs)
        found = program.root(*[tensors[p.name] for p in program.inputs])
    torch.testing.assert_close(found[0], wanted[0] if isinstance(wanted, tuple) else wanted)


def refused(module: nn.Module, **inputs: Any) -> str:
    with pytest.raises(GraftError) as caught:
        capture(Model(module, inputs))
    return str(caught.value)


X = torch.arange(12.0).reshape(2, 6)


class Written(nn.Module):
    """Writes into a slice of a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, 0::2] = x[:, 1::2]
        out[:, 1::2] = -x[:, 0::2]
        return out.relu_() + x


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x) + 1  # type: ignore[no-any-return]


class Rotated(nn.Module):
    """Complex numbers inside, as some rotary positions have them."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = z * torch.polar(torch.ones(3), torch.arange(3.0))
        return torch.view_as_real(turned).flatten(-2)


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, size: int = 3) -> tuple[Tensor, None]:
        return (x * size if mask is None else x * mask), None


class Pair(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + 2 * pair[1]


@pytest.mark.parametrize("module", [Written(), Custom(), Rotated(), Optional()])
def test_it_computes_the_same(module: nn.Module) -> None:
    agrees(module, x=X)


def test_none_and_numbers_among_the_inputs() -> None:
    agrees(Optional(), x=X, mask=None, size=5)


def test_a_tuple_of_inputs() -> None:
    program = capture(Model(Pair(), {"pair": (X, X + 1)}))
    assert [p.name for p in program.inputs] == ["pair_0", "pair_1"]
    torch.testing.assert_close(program.root(X, X + 1)[0], 3 * X + 2)


def test_hooks_run_while_capturing() -> None:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, out: out + 1)
    agrees(nn.Sequential(layer), input=X)


@dataclass
class Batch:
    image: Tensor


class OfBatch(nn.Module):
    def forward(self, batch: Batch) -> Tensor:
        return batch.image + 1


def test_a_dataclass_is_refused_with_what_to_do() -> None:
    text = refused(OfBatch(), batch=Batch(X))
    assert "G253" in text
    assert "register_dataclass" in text


def test_data_parallel_is_refused_with_what_to_do() -> None:
    text = refused(nn.DataParallel(nn.Linear(6, 6)), input=X)
    assert "G251" in text
    assert "give `module` of it" in text
    with pytest.raises(GraftError, match="G251"):  # before its modes are looked at
        captured(Model(nn.DataParallel(nn.Dropout(0.1)), {"input": X}))


def test_quantised_weights_are_refused() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(6, 6)), {nn.Linear}, dtype=torch.qint8
    )
    assert "G252" in refused(quantised, input=X)


def test_autocast_inside_a_model_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.linear(x)

    assert "G250" in refused(Half(), x=X)


def test_train_and_eval_are_captured_apart() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    train = capture(Model(module.train(), {"input": X}))
    assert train.facts.mode == "train"
    assert any("dropout" in str(n.target) for _, m in train.graphs() for n in m.graph.nodes)
    evaluated = capture(Model(module.eval(), {"input": X}))
    assert evaluated.facts.mode == "eval"
    assert not any("dropout" in str(n.target) for _, m in evaluated.graphs() for n in m.graph.nodes)


class Cached(nn.Module):
    """Returns a cache, as transformers' decoders do unless told otherwise."""

    def forward(self, x: torch.Tensor) -> Any:
        from transformers import DynamicCache

        return x, DynamicCache()


def test_a_cache_among_the_outputs_is_refused_with_what_to_do() -> None:
    with pytest.raises(GraftError, match=r"G210(.|\n)*use_cache"):
        capture(Model(Cached(), {"x": torch.zeros(2, 3)}))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()
        self.register_buffer("n", torch.zeros(()))
        self.calls, self.length, self.seen = 0, 0, list[Tensor]()
        self.kept: Any = torch.zeros(())


class CountsInABuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x + self.mlp(x) * self.n


class CountsInANumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.mlp(x) * self.calls


class CountsInATensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.kept + 1
        return x + self.mlp(x) * self.kept


class CountsInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept += 1
        return x + self.mlp(x) * self.kept


@pytest.mark.parametrize(
    ("make", "name", "line"),
    [
        (CountsInABuffer, "n", "self.n += 1"),
        (CountsInANumber, "calls", "self.calls += 1"),
        (CountsInATensor, "kept", "self.kept = self.kept + 1"),
        (CountsInPlace, "kept", "self.kept += 1"),
    ],
)
def test_a_count_from_call_to_call_is_refused_at_its_line(
    make: type[Base], name: str, line: str
) -> None:
    text = refused(make(), x=X[None])
    assert "G809" in text
    assert f"`{name}`" in text
    assert "test_unusual_models.py" in text
    assert line in text


class Leaves(Base):
    """Writes that no output depends on."""

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        self.seen.append(x)
        self.length = x.shape[1]
        self.last = x
        x += 1
        return x + self.mlp(x)


def test_what_forward_leaves_in_the_model_is_put_back(tmp_path: Path) -> None:
    module = Leaves().eval()
    given = X[None].clone()
    before = [dict(vars(m)) for m in module.modules()]
    file = tmp_path / "edit.graft"
    file.write_text("rule r {\n match m = mlp\n replace m with mlp(ratio = 2)\n}\n")
    build = graftc.compile(file, Model(module, {"x": given}), tmp_path / "build")
    warnings = [n.partition("\n")[0] for n in build.manifest["notes"]]
    assert [w.split(";")[0] for w in warnings] == [
        "warning[G811]: forward writes to `n`",
        "warning[G811]: forward writes to `x`",
    ]
    after = [dict(vars(m)) for m in module.modules()]
    assert [list(v) for v in after] == [list(v) for v in before]
    assert (module.n, module.seen, module.length) == (0, [], 0)
    assert torch.equal(given, X[None])
    found = build.student()(x=X[None])
    torch.testing.assert_close(
        found, module(X[None].clone())
    )  # the same weights: the edit is exact


class Noisy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) + torch.randn_like(x)


class DropsLabels(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = torch.where(torch.rand(x.shape[0], 1, 1) < 0.1, 0, x)
        return x + self.mlp(x)


class Doubles(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * (2 if self.training else 1)


class NormOfBatches(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.mlp(x)


def test_random_numbers_in_forward_are_refused_at_their_line() -> None:
    text = refused(Noisy().eval(), x=X[None])
    assert "G810" in text
    assert "torch.randn_like(x)" in text
    text = refused(DropsLabels().train(), x=X[None])
    assert "G810" in text
    assert "belongs to the Task" in text
    agrees(DropsLabels().eval(), x=X[None])


@pytest.mark.parametrize(
    ("make", "said"), [(DropsLabels, "rand"), (Doubles, "mul"), (NormOfBatches, "batch_norm")]
)
def test_train_mode_that_differs_is_refused_and_told(make: type[nn.Module], said: str) -> None:
    module = make()
    with pytest.raises(GraftError) as caught:
        captured(Model(module.train(), {"x": X[None]}))
    assert caught.value.diagnostics[0].code == "G813"
    assert all(m.training for m in module.modules())
    (note,) = captured(Model(module.eval(), {"x": X[None]})).facts.warnings
    assert note.code == "G814"
    assert said in note.notes[0].message
    assert "test_unusual_models.py" in note.notes[0].message
    assert captured(Model(MLP().train(), {"x": X[None]})).facts.warnings == ()


def test_repeated_blocks_are_no_difference_of_modes() -> None:
    chain = nn.Sequential(*(MLP() for _ in range(4)))
    assert captured(Model(chain.eval(), {"input": X[None]})).facts.warnings == ()


def test_a_backward_that_is_lost_is_told() -> None:
    (warning,) = capture(Model(Custom(), {"x": X})).facts.warnings
    assert warning.code == "G812"
    assert "Twice.apply(x) + 1" in warning.notes[0].message


class Reads(Base):
    """A length out of a mask: tracing has no values to read it from."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mlp(x[:, : int(mask.sum(1).max())])


class Chooses(Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mlp(x[mask.bool()][None])


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("make", [Reads, Chooses])
def test_a_length_out_of_a_mask_needs_it_fixed(make: type[nn.Module]) -> None:
    module, x = make(), torch.randn(2, 3, 6)
    with pytest.raises(GraftError) as caught:
        analyse(capture(Model(module, {"x": x, "mask": MASK})))
    (d,) = caught.value.diagnostics
    assert d.code in ("G210", "G815")
    assert "test_unusual_models.py" in d.notes[0].message
    assert 'fixed = ("mask",)' in str(d.help)
    program = capture(Model(module, {"x": x, "mask": MASK}, fixed=("mask",)))
    assert [p.name for p in program.inputs] == ["x"]
    assert any("fixed" in n for n in program.facts.notes)
    assert [s.role for s in analyse(program).sites if s.path == "mlp"] == ["mlp"]
    y = torch.randn(2, 3, 6)
    torch.testing.assert_close(program.root(y)[0], module(y, MASK))


def test_what_is_fixed_must_be_a_tensor_input() -> None:
    with pytest.raises(GraftError, match="G808"):
        Model(Reads(), {"x": X[None], "mask": MASK}, fixed=("masks",))


def test_a_fixed_mask_in_a_build_of_a_named_model(tmp_path: Path) -> None:
    """The teacher is linked: the values that capture made are in a file of their own."""
    (tmp_path / "m.py").write_text(FIXED)
    file = tmp_path / "edit.graft"
    file.write_text("rule r {\n match m = mlp\n replace m with mlp(ratio = 2)\n}\n")
    build = graftc.compile(file, f"{tmp_path}/m.py:make", tmp_path / "build")
    assert (tmp_path / "build" / "teacher" / "constants.safetensors").is_file()
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(build.student()(x=x), build.teacher()(x=x))
    assert build.manifest["forms"]["modules"]


FIXED = """
import torch, graftc
from tests.program.test_unusual_models import MASK, Reads

class Scaled(Reads):
    def forward(self, x, mask):
        return super().forward(x, mask) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

def make():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 6), "mask": MASK}
    return graftc.Model(Scaled().eval(), inputs, fixed=("mask",))
"""


def test_complex_numbers_are_real_ones_in_the_graph() -> None:
    program = capture(Model(Rotated(), {"x": X}))
    ops = {str(n.target) for _, m in program.graphs() for n in m.graph.nodes}
    assert "aten.view_as_complex.default" not in ops


class Reparametrised(nn.Module):
    """An MLP whose first weight is made of others in each call."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.up, self.down, self.by = nn.Linear(6, 12), nn.Linear(12, 6), by
        if by in ("weight_norm", "spectral_norm"):
            getattr(nn.utils.parametrizations, by)(self.up)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight
        if self.by == "hand":
            weight = weight / weight.norm(dim=1, keepdim=True)
        return self.down(nn.functional.gelu(nn.functional.linear(x, weight, self.up.bias)))


@pytest.mark.parametrize("by", ["weight_norm", "spectral_norm", "hand"])
def test_a_weight_that_is_computed_of_parameters_is_copied(by: str) -> None:
    module = nn.Sequential(Reparametrised(by)).eval()
    made = compile_model(
        check("rule same {\n match m = mlp\n replace m with mlp(ratio = 2)\n}"),
        Model(module, {"input": X[None]}),
    )
    torch.testing.assert_close(made.student.root(X[None])[0], module(X[None]))


def test_a_weight_of_double_complex_numbers_cannot_be_written(tmp_path: Path) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(6, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.turn * self.turn.conj()).real.float()

    with pytest.raises(GraftError) as caught:
        write_package(capture(Model(Turned(), {"x": X})), tmp_path)
    (told,) = caught.value.diagnostics
    assert (told.code, told.site) == ("G817", "turn")
    assert "make it complex64" in str(told.help)
