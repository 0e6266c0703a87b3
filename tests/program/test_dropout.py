"""Dropout of train mode: kept in the student, invisible to the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graftc
from graftc.diagnostics import GraftError
from graftc.emit.package import load_package, write_package
from graftc.program.capture import capture
from graftc.program.dropout import noted, told
from graftc.program.model import Model
from graftc.program.modes import captured
from graftc.program.program import structure_hash
from graftc.tasks.base import Prepared, primary

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def encoder() -> Model:
    """Dropout of four kinds of place: inside the attention, after it, in the MLP and after that."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return Model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), {"src": X})


class Several(nn.Module):
    """Modules and functions, in a list, in place, of whole channels, twice in a row, of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.3, True)
        )
        self.channels = nn.Dropout2d(0.25)
        self.alpha = nn.AlphaDropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.4, self.training)
        x = self.alpha(x + self.net(x))
        return F.dropout(self.channels(x.unsqueeze(-1)).squeeze(-1), 0.5, self.training)


class Layerdrop(nn.Module):
    """As transformers write it: a layer that is left out with probability 0."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.linear, self.drop = p, nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            chance = torch.rand([])
            if chance < self.p:
                return x
        return x + self.drop(self.linear(x))


class AroundLabels(nn.Module):
    """Dropout beside a branch that belongs to the Task, and a value that is read dropped and whole."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.linear, self.drop, self.mixed = nn.Linear(16, 16), nn.Dropout(0.5), mixed
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.mixed:
            return x + self.linear(self.drop(x))
        if self.training:
            x = torch.where(torch.rand(x.shape[0], 1, 1) < 0.1, 0, x)
        return self.linear(x)


def package(model: Model, folder: Path) -> nn.Module:
    write_package(captured(model), folder)
    return load_package(folder)


def drawn(module: nn.Module, seed: int, **inputs: Tensor) -> Any:
    torch.manual_seed(seed)
    return module(**inputs)


MODELS: dict[str, Callable[[], Model]] = {
    "encoder": encoder,
    "several": lambda: Model(Several().eval(), {"x": X}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_student_drops_what_the_original_drops(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    ours, its = package(model, tmp_path), model.module
    inputs: dict[str, Any] = dict(model.inputs)
    assert not ours.training
    torch.testing.assert_close(ours(**inputs), its(**inputs), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours(**inputs), ours(**inputs))
    ours.train(), its.train()
    one, other = drawn(ours, 3, **inputs), drawn(ours, 4, **inputs)
    assert torch.equal(one, drawn(its, 3, **inputs))  # the same numbers in the same order
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(checkpoint(ours, *inputs.values(), use_reentrant=False), one)


def test_gradients_in_train_mode_are_those_of_the_original_also_recomputed(tmp_path: Path) -> None:
    model = encoder()
    ours, its = package(model, tmp_path).train(), model.module.train()
    found: list[dict[str, Tensor]] = []
    for module, again in ((ours, False), (ours, True), (its, False)):
        module.zero_grad()
        torch.manual_seed(5)
        made = checkpoint(module, X, use_reentrant=False) if again else module(src=X)
        made.square().sum().backward()
        found.append(
            {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        )
    plain, recomputed, wanted = found
    assert len(plain) == len(wanted) == 24
    for gradient, again in zip(plain.values(), recomputed.values(), strict=True):
        assert torch.equal(gradient, again)
    sums, theirs = (sorted(float(g.square().sum()) for g in f.values()) for f in (plain, wanted))
    assert sums == pytest.approx(theirs, rel=1e-4)


def test_the_graphs_are_those_of_eval_mode() -> None:
    model = encoder()
    program = captured(model)
    assert told(program) == "dropout p = 0.1 at 8 places"
    assert structure_hash(program.root) == structure_hash(capture(model).root)
    assert not model.module.training


def test_a_model_in_train_mode_that_only_drops_is_taken(tmp_path: Path) -> None:
    model = encoder()
    model.module.train()
    assert told(captured(model)) == "dropout p = 0.1 at 8 places"
    assert all(m.training for m in model.module.modules())
    assert not package(model, tmp_path).training


class Counted(nn.Module):
    """A block that counts how often its class runs, and reads its mode."""

    runs = 0

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        return x + F.dropout(self.linear(x), 0.1, self.training)


def test_each_mode_costs_one_trace_of_each_kind_of_block() -> None:
    blocks = nn.Sequential(*(Counted(i) for i in range(5)))
    Counted.runs = 0
    assert told(captured(Model(blocks.eval(), {"input": X}))) == "dropout p = 0.1 at 5 places"
    assert Counted.runs == 2


def test_what_is_never_open_is_no_choice() -> None:
    program = captured(Model(Layerdrop(0.0).eval(), {"x": X}))
    assert (told(program), program.facts.warnings) == ("dropout p = 0.1 at 1 place", ())
    (warning,) = captured(Model(Layerdrop(0.3).eval(), {"x": X})).facts.warnings
    assert "if chance < self.p" in warning.notes[0].message


@pytest.mark.parametrize(
    ("mixed", "said"), [(True, "self.linear(self.drop(x))"), (False, "torch.rand(x.shape[0]")]
)
def test_what_is_not_kept_is_told_at_its_line(mixed: bool, said: str, tmp_path: Path) -> None:
    model = Model(AroundLabels(mixed).eval(), {"x": X})
    program = captured(model)
    (warning,) = program.facts.warnings
    assert warning.code == "G814"
    assert any(said in n.message for n in warning.notes)
    assert [d.p for *_, d in noted(program)] == [0.1]  # and the rest is kept
    with pytest.raises(GraftError, match="G813"):
        captured(Model(model.module.train(), {"x": X}))


def test_an_edit_takes_its_own_dropout_and_no_other(tmp_path: Path) -> None:
    model = encoder()
    text = "rule wide {\n match m = mlp in blocks {0}\n replace m with mlp(ratio = 4)\n}"
    file = tmp_path / "wide.graft"
    file.write_text(text)
    made = graftc.plan(file, model)
    (note,) = (n for n in made.notes if n.code == "G832")
    assert "p = 0.1 at 7 places; at 1 more it went with what the rules replace" in note.message
    build = graftc.compile(file, model, tmp_path / "out")
    student = build.student().train()
    names = [n for n, m in student.named_modules() if "dropout" in n.rpartition(".")[2]]
    assert "layers.0.dropout2" in names  # on what the new MLP gives
    assert len(names) == 7
    assert not torch.equal(drawn(student, 1, src=X), drawn(student, 2, src=X))
    assert (
        "In train mode: dropout p = 0.1 at 7 places."
        in (tmp_path / "out/student/model.py").read_text()
    )


def test_under_compile_it_drops_too(tmp_path: Path) -> None:
    ours = package(Model(Several().eval(), {"x": X}), tmp_path)
    whole = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x=X), ours(x=X))
    whole.train()
    first, second = (drawn(whole, seed, x=X) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_stage_one_leaves_it_off_and_gives_it_back(tmp_path: Path) -> None:
    file = tmp_path / "wide.graft"
    file.write_text("rule wide {\n match m = mlp in blocks {0}\n replace m with mlp(ratio = 4)\n}")
    graftc.compile(file, encoder(), tmp_path / "out")
    work = graftc.load_targets(tmp_path / "out")
    student = work.student.train()
    assert torch.equal(drawn(student, 1, src=X), drawn(student, 2, src=X))
    merged = work.merge().train()
    assert not torch.equal(drawn(merged, 1, src=X), drawn(merged, 2, src=X))


class Reversed:
    """A task on tokens: give them back the other way round."""

    def prepare(self, sample: Mapping[str, Tensor], generator: torch.Generator) -> Prepared:
        return Prepared({"src": sample["x"]}, {"wanted": sample["x"].flip(1)})

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        return (primary(outputs) - prepared.targets["wanted"]).square().mean()

    def sample(self, model: Any, *, count: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        return {}


def test_stage_two_trains_with_it_and_gives_the_same_bits_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "wide.graft"
    file.write_text(
        "rule wide {\n match m = mlp in blocks {0}\n replace m with mlp(ratio = 4)\n}\n"
        "finetune {\n epochs = 1\n batch = 4\n}"
    )
    build = graftc.compile(file, encoder(), tmp_path / "out", task=Reversed())
    modes: list[bool] = []
    plain = nn.Dropout.forward

    def seen(self: nn.Dropout, x: Tensor) -> Tensor:
        modes.append(self.training)
        return plain(self, x)

    monkeypatch.setattr(nn.Dropout, "forward", seen)
    data = [{"x": x} for x in torch.randn(16, 6, 16)]
    for _ in range(2):
        graftc.finetune(build, data, task=Reversed(), seed=1)
    assert set(modes) == {True, False}  # steps, and validations
    first, second = (load_file(p) for p in sorted(tmp_path.glob("out/runs/*/student.safetensors")))
    assert all(torch.equal(first[n], second[n]) for n in first)
