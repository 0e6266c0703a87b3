"""An export directory: what is in it, what its checks say, and that each of them can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import onnx
import pytest
import yaml
from onnx import numpy_helper

from graftc import verbs
from graftc.cli.main import main
from graftc.deploy import directory
from graftc.deploy.directory import Export
from graftc.deploy.ladder import verify_export
from graftc.deploy.profile import regions_of_nodes
from graftc.deploy.request import read_request
from graftc.diagnostics import GraftError


def states(result, *words):
    return {r.name: r.state for r in result.rungs if any(w in r.name for w in words)}


def test_an_export_is_whole_and_says_what_made_it(exported):
    folder = exported("fp32").path
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
    assert manifest["opset"] == {"version": 20, "why": manifest["opset"]["why"]}
    batch = manifest["dynamic"]["batch"]
    assert (batch["declared"], batch["proved"], batch["verified"]) == ("1:2:4", "1..", [1, 2, 3, 4])
    edited = next(r for r in manifest["regions"] if r["path"] == "blocks.2.attn")
    assert edited["rule"] == "mix @ dit.graft:3"
    assert edited["nodes"] > 0
    assert edited["moves_output"] > 0.01
    for name in (
        "verify.py",
        "trt/build.sh",
        "trt/build_engine.py",
        "trt/parity.sh",
        "triton/student/config.pbtxt",
    ):
        assert (folder / name).is_file(), name
    raw = numpy.fromfile(folder / "golden/usual-0/x.bin", numpy.float32)
    with numpy.load(folder / "golden/usual-0/inputs.npz") as arrays:
        assert numpy.array_equal(raw, arrays["x"].reshape(-1))
    raw = numpy.fromfile(folder / "golden/batch-4/output.out.bin", numpy.float32)
    with numpy.load(folder / "golden/batch-4/outputs.npz") as arrays:
        assert numpy.array_equal(raw, arrays["output"].reshape(-1))


def test_the_manifest_holds_what_was_checked_by_whom(copy):
    """First what the export itself did; then what `verify` found, on a disk that can be written."""
    before = Export.open(copy).manifest["rungs"]
    assert before["by"] == "graftc export"
    assert [r["state"] for r in before["found"]] == ["PASS", "PASS", "NOT RUN"]
    assert "batch=4" in before["found"][0]["detail"]
    verbs.verify(copy, command="graftc verify copy")
    after = Export.open(copy).manifest["rungs"]
    assert after["by"] == "graftc verify copy"
    assert after["found"][0] == before["found"][0]
    states = {r["name"]: r["state"] for r in after["found"]}
    assert states["ONNX Runtime CPU, usual-0"] == "PASS"
    assert states["TensorRT engine, golden files"] == "NOT RUN"


def test_every_node_leads_back_to_its_rule_and_line(exported):
    proto = onnx.load(str(exported("fp32").model))
    props = {n.name: {p.key: p.value for p in n.metadata_props} for n in proto.graph.node}
    assert all(name.startswith(p["graftc.region"]) for name, p in props.items())
    edited = [p for p in props.values() if p["graftc.region"].startswith("blocks.2.attn")]
    assert {p["graftc.rule"] for p in edited} == {"mix @ dit.graft:3"}
    assert {p["graftc.line"] for p in edited} == {"dit.graft:3"}
    assert not any(k.startswith("pkg.") for p in props.values() for k in p)


def test_weights_have_the_students_names_and_layout(exported, build):
    """The exporter's optimiser folds transpositions into weights under new names: here it may not."""
    proto = onnx.load(str(exported("fp32").model))
    weights = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    named = exported("fp32").manifest["weights"]
    state = build.student().state_dict()
    assert set(named) == {n for n, t in state.items() if t.is_floating_point()}
    for name, there in named.items():
        assert numpy.array_equal(weights[there], state[name].numpy()), name
    assert {n for n, a in weights.items() if a.ndim == 2} <= set(state)


def test_the_ladder_of_float32(exported):
    result = verify_export(exported("fp32"), regions=True)
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]
    assert set(states(result, "control").values()) == {"PASS"}
    assert len([r for r in result.rungs if "control" in r.name]) == 5
    assert set(states(result, "ONNX Runtime CPU", "reference", "outside", "region").values()) == {
        "PASS"
    }
    assert states(result, "engine") == {"TensorRT engine, golden files": "NOT RUN"}
    assert not result.missed  # nobody asked for an engine


def test_halves_keep_their_tolerance(exported):
    fp16 = verify_export(exported("fp16"), regions=True)
    assert fp16.passed, [r for r in fp16.rungs if r.state == "FAIL"]
    proto = onnx.load(str(exported("fp16").model))
    assert next(o.version for o in proto.opset_import if not o.domain) == 23
    assert sum(n.op_type == "Attention" for n in proto.graph.node) == 3
    types = {i.data_type for i in proto.graph.initializer if "weight" in i.name}
    assert types == {onnx.TensorProto.FLOAT16}
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_bfloat16_is_checked_by_the_reference_evaluator(exported):
    result = verify_export(exported("bf16"), regions=True)
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]
    assert states(result, "ONNX Runtime CPU") == {"ONNX Runtime CPU": "NOT RUN"}
    assert states(result, "reference") == {"onnx reference evaluator": "PASS"}
    assert "reference evaluator" in next(
        r.detail for r in result.rungs if r.name == "region blocks.0.attn"
    )


def test_the_script_stands_alone(copy):
    """Without graftc and torch: their import is made to fail."""
    code = "import sys; sys.modules['graftc'] = sys.modules['torch'] = None; import verify; sys.exit(verify.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, ".", "--json"], cwd=copy, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rungs = json.loads(done.stdout)
    assert {r["state"] for r in rungs} == {"PASS"}


def spoil(folder: Path, name: str, change) -> None:
    """Change one weight, and make the file's recorded hash fit: what only a comparison can find."""
    import hashlib

    proto = onnx.load(str(folder / "model.onnx"))
    weight = next(i for i in proto.graph.initializer if i.name.startswith(name))
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)), weight.name))
    onnx.save(proto, str(folder / "model.onnx"))
    index = json.loads((folder / "golden/golden.json").read_text())
    index["sha256"]["model.onnx"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "golden/golden.json").write_text(json.dumps(index))


def test_a_wrong_region_is_named(copy):
    spoil(copy, "blocks.1.mlp.0", lambda a: a * 1.5)
    result = verify_export(Export.open(copy), regions=True)
    found = states(result, "region ")
    first = next(name for name, state in found.items() if state == "FAIL")
    assert first == "region blocks.1.mlp"
    assert found["region blocks.0.mlp"] == "PASS"
    assert "FAIL" in states(result, "ONNX Runtime CPU, usual").values()


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (
            lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:9000]),
            "truncated",
        ),
        (
            lambda f: (f / "golden/odd/outputs.npz").write_bytes(b"PK"),
            "truncated, changed, or of another export",
        ),
        (lambda f: (f / "golden/odd/inputs.npz").unlink(), "is missing"),
        (lambda f: (f / "golden/golden.json").write_text("{"), "cannot be read"),
    ],
)
def test_spoiled_files_are_refused(copy, spoiled, said):
    spoiled(copy)
    with pytest.raises(GraftError, match=said) as error:
        verify_export(Export.open(copy))
    assert error.value.diagnostics[0].code == "G667"


def test_golden_files_of_another_export_are_refused(copy, exported):
    other = exported("fp16").path / "golden/odd/outputs.npz"
    with numpy.load(other) as arrays:
        numpy.savez(copy / "golden/odd/outputs.npz", **{k: v + 1 for k, v in arrays.items()})
    with pytest.raises(GraftError, match="of another export"):
        verify_export(Export.open(copy))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_a_rung_that_was_asked_for_and_not_run_is_exit_3(exported, capsys):
    folder = str(exported("fp32").path)
    assert run("verify", folder) == 0
    assert run("verify", folder, "--ep", "cuda") == 3
    assert "no CUDAExecutionProvider" in capsys.readouterr().out
    assert (
        run("verify", folder, "--ep", "tensorrt-rtx") == 3
        or "TensorRT-RTX" in capsys.readouterr().out
    )
    assert run("verify", folder, "--ep", "vulkan") == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"precision": "fp8"}, "G661"),
        ({"target": "ort-1.19x"}, "G661"),
        ({"opset": "99"}, "G662"),
        ({"opset": "nineteen"}, "G662"),
        ({"target": "ort-1.20", "opset": "23"}, "G662"),
        ({"target": "ort-1.20", "precision": "bf16"}, "G662"),
        ({"dynamic": "batch=8:2:1"}, "G663"),
        ({"dynamic": "batch"}, "G663"),
        ({"dynamic": "batch=1:2:4,batch=1:2:4"}, "G663"),
        ({"dynamic": "height=8:16:32"}, "G664"),
        ({"to": "coreml"}, "G600"),
    ],
)
def test_what_cannot_be_is_refused_early(build, options, code):
    with pytest.raises(GraftError) as error:
        read_request(build.config(), **options)
    assert error.value.diagnostics[0].code == code


def test_a_full_disk_leaves_nothing_half_written(build, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    request = read_request(build.config(), dynamic="batch=1:2:2")
    monkeypatch.setattr(directory, "write_golden", full)
    with pytest.raises(GraftError, match="No space left"):
        directory.export_module(build.student(), build.config(), tmp_path / "out", request)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1_000, 20_000, 60_000])
def test_a_write_that_the_system_refuses_leaves_the_old_export(build, copy, limit, monkeypatch):
    """For real: files may not grow beyond `limit`, so a golden file, the model or a script is cut off."""
    import resource
    import signal

    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    request = read_request(build.config(), dynamic="batch=1:2:2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(GraftError, match="cannot write") as error:
            directory.export_module(build.student(), build.config(), copy, request)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, kept)
    assert error.value.diagnostics[0].code == "G611"
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_the_golden_folder_of_another_export_is_refused(copy, exported):
    shutil.rmtree(copy / "golden")
    shutil.copytree(exported("fp16").path / "golden", copy / "golden")
    with pytest.raises(GraftError, match="of another export"):
        verify_export(Export.open(copy))


def test_the_script_refuses_an_unknown_provider_with_exit_1(copy):
    command = [sys.executable, "verify.py", "--ep", "vulkan"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "vulkan" in done.stderr


def test_a_folder_of_someone_else_is_left_alone(build, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    request = read_request(build.config(), dynamic="batch=2")
    with pytest.raises(GraftError, match="holds something else"):
        directory.export_module(build.student(), build.config(), tmp_path, request)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_build_is_no_export(build):
    with pytest.raises(GraftError, match="are for an export directory"):
        verbs.verify(build.path, regions=True)
    with pytest.raises(GraftError, match="no export"):
        Export.open(build.path)


def test_the_server_is_told_the_shapes(exported):
    text = (exported("fp32").path / "triton/student/config.pbtxt").read_text()
    assert "max_batch_size: 4" in text
    assert '{ name: "x" data_type: TYPE_FP32 dims: [3, 8, 8] }' in text
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")
    script = (exported("fp32").path / "trt/build.sh").read_text()
    assert "--minShapes=x:1x3x8x8,t:1,y:1" in script
    assert "--stronglyTyped" in script


def test_the_server_gets_the_engine_once_there_is_one(copy):
    def install() -> subprocess.CompletedProcess[str]:
        command = [str(copy / "triton/install.sh")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert install().returncode == 1
    assert "trt/build.sh" in install().stderr
    (copy / "trt/model.engine").write_text("engine")
    assert install().returncode == 0
    assert (copy / "triton/student/1/model.plan").read_text() == "engine"


def test_time_is_attributed_to_regions_and_rules(exported):
    found = verbs.bench(exported("fp32").path, against=exported("fp16").path, regions=True)
    for side in (
        found.ours,
        found.other,
    ):  # in halves the runtime puts casts between, and writes Gelu out
        assert 0.95 <= side.attributed <= 1
        assert "mix @ dit.graft:3" in side.rules
        assert "blocks.2.attn" in side.regions
        assert sum(side.regions.values()) == pytest.approx(1)


def test_a_node_of_the_runtimes_own_belongs_to_who_uses_it():
    make = onnx.helper.make_node

    def proto(*nodes):
        return onnx.helper.make_model(onnx.helper.make_graph(list(nodes), "g", [], []))

    first, second = (
        make("Gelu", ["x"], ["a"], name="blocks.0/Gelu_0"),
        make("Relu", ["a"], ["y"], name="head/Relu_0"),
    )
    for node, region in ((first, "blocks.0"), (second, "head")):
        onnx.helper.set_model_props(node, {"graftc.region": region})
    runtime = [
        make("Cast", ["x"], ["wide"], name="0:"),
        make("Erf", ["wide"], ["erf"], name="1:"),
        make("Mul", ["erf", "wide"], ["a"], name="2:"),  # the value that Gelu computed
        make("Cast", ["a"], ["b"], name="3:"),
        make("Relu", ["b"], ["y"], name="4:head/Relu_0"),
        make("Neg", ["y"], ["z"], name="5:"),
        make("Exp", ["other"], ["nobody"], name="6:"),
    ]
    found = regions_of_nodes(proto(first, second), proto(*runtime))
    assert [found[n.name] for n in runtime] == ["blocks.0"] * 3 + ["head"] * 3 + [""]
