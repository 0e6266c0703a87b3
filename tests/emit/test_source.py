"""The generated file: it computes the same, and reads well."""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from graftc.diagnostics import GraftError
from graftc.emit.examples import tensors_of
from graftc.emit.package import import_source, load_package, write_package
from graftc.emit.source import source
from graftc.program.capture import capture
from graftc.program.model import Model
from tests.emit import models
from tests.emit.conftest import MODELS, call, run, run_program, same, with_module

ALL = list(MODELS)


@pytest.mark.parametrize("name", ALL)
def test_equal_to_the_bit_with_the_same_state_dict(case, name):
    c = case(name)
    assert same(run(c.emitted, c.inputs), run_program(c.program, c.inputs))
    assert same(run(c.emitted, c.inputs), run(c.model.module, c.model.inputs))
    ours, its = c.emitted.state_dict(), c.program.root.state_dict()
    assert list(ours) == list(its)
    assert all(torch.equal(ours[n], its[n]) for n in ours)


@pytest.mark.parametrize("name", ALL)
def test_other_batch_sizes(case, name):
    c = case(name)
    for batch in (1, 3):
        inputs = {k: torch.cat([v, v])[:batch] for k, v in c.inputs.items()}
        rest = {k: v for k, v in c.model.inputs.items() if k not in inputs}
        found = run(c.emitted, inputs)
        assert same(found, run_program(c.program, inputs))
        torch.testing.assert_close(found, run(c.model.module, {**inputs, **rest}))


@pytest.mark.parametrize("name", ["tiny_dit", "gpt", "dit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_to_another_dtype(case, name, dtype):
    c = case(name)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in c.inputs.items()}
    found = run(copy.deepcopy(c.emitted).to(dtype), inputs)
    root = c.program.root
    tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    moved = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    with torch.no_grad():
        wanted = tensors_of(torch.func.functional_call(root, moved, tuple(inputs.values())))
    assert same(found, wanted)
    assert all(t.dtype == dtype for t in found)


@pytest.mark.parametrize("name", ["tiny_dit", "gpt", "shared"])
def test_trains(case, name):
    c = case(name)
    ours, its = copy.deepcopy(c.emitted).train(), copy.deepcopy(c.model.module).eval()
    for module in (ours, its):
        sum(t.square().mean() for t in tensors_of(module(**c.inputs))).backward()
    theirs = dict(its.named_parameters(remove_duplicate=False))
    # What was outlined (an MLP in a block's own forward) has a module of its own, and so another name.
    first = {id(p): n for n, p in c.model.module.named_parameters()}
    names = {n: first[id(p)] for n, p in c.program.root.named_parameters(remove_duplicate=False)}
    for n, p in ours.named_parameters(remove_duplicate=False):
        assert p.requires_grad == theirs[names[n]].requires_grad
        if p.requires_grad:
            assert torch.equal(p.grad, theirs[names[n]].grad), n


@pytest.mark.parametrize("name", ALL)
def test_each_class_can_be_traced_alone(case, name):
    class Level(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    c = case(name)
    for module in c.emitted.modules():
        if type(module).__module__ == type(c.emitted).__module__ and len(list(module.children())):
            graph = Level().trace(module)
            assert any(n.op == "call_module" for n in graph.nodes)
            if module is c.emitted:
                traced = fx.GraphModule(module, graph)
                assert same(run(traced, c.inputs), run(c.emitted, c.inputs))


def test_compiled_equals_itself(case):
    c = case("tiny_dit")
    compiled = torch.compile(c.emitted, backend="aot_eager", fullgraph=True)
    assert same(run(compiled, c.inputs), run(c.emitted, c.inputs))
    with pytest.raises(Exception, match="captured at"):  # dynamo wraps the ValueError
        compiled(**{**c.inputs, "x": torch.randn(2, 3, 16, 16)})


@pytest.mark.parametrize("name", ALL)
def test_deterministic_and_tidy(case, name):
    c = case(name)
    text = source(c.program)
    assert text == source(capture(c.model))
    assert text == c.text
    assert "torch.ops" not in text or name == "shared"
    assert str(Path.cwd()) not in text
    assert "graft" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    names = [n.name for n in ast.parse(text).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    assert len(names) == len(set(names))


def test_reads_like_a_person_wrote_it(case):
    text = case("dit").text
    assert "for block in self.transformer_blocks:\n            hidden_states = block(" in text
    assert "nn.ModuleList([BasicTransformerBlock() for _ in range(3)])" in text
    assert "q = self.to_q(hidden_states).view(batch, -1, 2, 16).transpose(1, 2)" in text
    assert "attended = F.scaled_dot_product_attention(q, k, v)" in text
    assert text.count("class BasicTransformerBlock") == 1
    assert (
        "def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Output:"
        in text
    )
    assert "getitem" not in text
    assert (
        "encoder_attention_mask = ((1 - encoder_attention_mask) * -10000.0)" in case("pixart").text
    )


def test_named_outputs(case):
    c = case("dit")
    out = c.emitted(**c.inputs)
    assert out.sample is out[0]
    assert isinstance(case("tiny_dit").emitted(**case("tiny_dit").inputs), torch.Tensor)
    assert len(case("shared").emitted(**case("shared").inputs)) == 2


def test_shared_and_tied_stay_shared(case):
    gpt, shared = case("gpt").emitted, case("shared").emitted
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert shared.again[0].weight is shared.first[0].weight
    moved = copy.deepcopy(gpt).double()
    assert moved.lm_head.weight is moved.transformer.wte.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_states": torch.randn(2, 4, 16, 16)},
            r"captured at \(batch, 4, 8, 8\): batch may vary",
        ),
        ({"timestep": torch.zeros(2, 1)}, r"`timestep` is \(2, 1\)"),
        ({"cross_attention_kwargs": {"scale": 2}}, "captured without `cross_attention_kwargs`"),
    ],
)
def test_a_call_outside_of_what_was_captured_names_the_fact(case, change, message):
    c = case("dit")
    with pytest.raises(ValueError, match=message):
        c.emitted(**{**c.inputs, **change})


def test_operators_are_copied_and_variants_named():
    program = capture(models.tiny_dit())
    for i in (1, 3):
        with_module(program, f"blocks.{i}.attn", models.token_mixer(32))
    said = {f"blocks.{i}.attn": "mix @ /home/someone/rules/a.graft:3" for i in (1, 3)}
    text = source(program, provenance=said)
    assert "class BlockWithTokenMixer(nn.Module):" in text
    assert "[Block(), BlockWithTokenMixer(), Block(), BlockWithTokenMixer()]" in text
    assert text.count("def along_tokens(") == 1
    assert "self.attn = TokenMixer(dim=32)  # mix @ a.graft:3" in text
    assert "/home" not in text


def test_edited_program_computes_the_same(tmp_path):
    model = models.tiny_dit()
    program = with_module(capture(model), "blocks.2.attn", models.token_mixer(32))
    inputs = dict(model.inputs)
    write_package(program, tmp_path / "p")
    assert same(run(load_package(tmp_path / "p"), inputs), run_program(program, inputs))


def test_pairs_become_a_zip_and_gaps_a_dict(tmp_path):
    model = models.tiny_dit()
    program = capture(model)
    graph = program.root.graph
    nodes = [call(program, f"blocks.{i}") for i in range(4)]
    for at, (a, b) in enumerate([(nodes[0], nodes[1]), (nodes[2], nodes[3])]):
        b.args = (a.args[0], *b.args[1:])
        program.root.add_submodule(f"merges.{at}", models.Mean())
        with graph.inserting_after(b):
            merge = graph.call_module(f"merges.{at}", (a, b))
        b.replace_all_uses_with(merge, delete_user_cb=lambda user, merge=merge: user is not merge)
    program.root.recompile()
    text = source(program)
    assert "for first, second, merge in zip(" in text
    assert "merge(first(x, c), second(x, c))" in text.replace("emb", "c")
    write_package(program, tmp_path / "pairs")
    inputs = dict(model.inputs)
    assert same(run(load_package(tmp_path / "pairs"), inputs), run_program(program, inputs))

    program = capture(model)
    gone = call(program, "blocks.1")
    gone.replace_all_uses_with(gone.args[0])
    program.root.graph.erase_node(gone)
    del program.root.blocks._modules["1"]
    program.root.recompile()
    write_package(program, tmp_path / "gap")
    emitted = load_package(tmp_path / "gap")
    assert list(emitted.state_dict()) == list(program.root.state_dict())
    assert same(run(emitted, inputs), run_program(program, inputs))


def test_what_is_not_in_the_table_still_runs(case):
    assert "torch.ops.aten.lerp.Scalar(" in case("shared").text


def test_an_operator_of_another_library_is_refused():
    torch.library.define("graftc_test::twice", "(Tensor x) -> Tensor")
    torch.library.impl("graftc_test::twice", "CompositeExplicitAutograd", lambda x: x * 2)
    torch.library.register_fake("graftc_test::twice", lambda x: torch.empty_like(x))

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.graftc_test.twice(x) + x.sin()

    program = capture(Model(nn.Sequential(Inner(), nn.Linear(4, 4)), {"input": torch.randn(2, 4)}))
    with pytest.raises(GraftError) as error:
        source(program)
    assert error.value.diagnostics[0].code == "G601"
    assert "graftc_test" in str(error.value)


def test_an_operator_that_a_module_registers_is_called_and_imported(tmp_path):
    """flash-attn and xFormers: what is left of them in a student, and in its teacher."""
    from tests.models.plain_models import flash

    model = flash()
    program = capture(model)
    write_package(program, tmp_path / "flash")
    text = (tmp_path / "flash" / "model.py").read_text()
    assert "import tests.models.plain_models  # registers torch.ops.graftc_tests" in text
    found = load_package(tmp_path / "flash")(model.inputs["x"])
    assert torch.equal(found, model.module(model.inputs["x"]))


def test_an_operator_whose_arguments_are_lost_is_refused():
    program = with_module(capture(models.tiny_dit()), "blocks.2.attn", models.TokenMixer(32))
    with pytest.raises(GraftError, match="argument `dim`") as error:
        source(program)
    assert error.value.diagnostics[0].site == "blocks.2.attn"


def test_dropout_of_a_train_capture():
    model = models.tiny_dit()
    model.module.train()
    program = capture(model)
    text = source(program)
    assert "nn.Dropout(0.1)" in text
    assert "return model.train()" in text


def test_two_packages_do_not_meet(case):
    a, b = (
        import_source(case("gpt").directory / "model.py"),
        import_source(case("gpt").directory / "model.py"),
    )
    assert a.GPT is not b.GPT
    assert sys.modules[a.GPT.__module__] is a


def test_operators_with_helpers_of_one_name_do_not_mix(tmp_path):
    """Two files may each have a `helper`; and an operator may be called as a class of the model is."""
    import importlib.util

    def imported(name: str, factor: int) -> type[nn.Module]:
        (tmp_path / f"{name}.py").write_text(
            "from torch import Tensor, nn\n\nFACTOR = " + str(factor) + "\n\n"
            "def helper(x: Tensor) -> Tensor:\n    return x * FACTOR\n\n"
            "class Attention(nn.Module):\n"
            "    def forward(self, x: Tensor) -> Tensor:\n        return helper(x)\n"
        )
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module.Attention

    model = models.tiny_dit()
    program = with_module(capture(model), "blocks.0.attn", imported("two_fold", 2)())
    program = with_module(program, "blocks.1.attn", imported("three_fold", 3)())
    text = source(program)
    assert "class GraftedAttention(nn.Module)" in text
    write_package(program, tmp_path / "p")
    inputs = dict(model.inputs)
    assert same(run(load_package(tmp_path / "p"), inputs), run_program(program, inputs))


def test_operators_that_differ_in_a_setting_alone_stay_apart(tmp_path):
    model = models.tiny_dit()
    program = capture(model)
    for i, causal in enumerate((True, False)):
        mixer = models.Mixer(causal)
        mixer.graft_arguments = {"causal": causal}
        with_module(program, f"blocks.{i}.attn", mixer)
    write_package(program, tmp_path / "p")
    inputs = dict(model.inputs)
    assert same(run(load_package(tmp_path / "p"), inputs), run_program(program, inputs))
