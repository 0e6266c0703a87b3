"""Installed kernels: called by their published signatures, compared before they are chosen, missed with a clear error.

The packages are stood in for by modules that compute by those signatures; `pytest -m gpu` runs the real ones.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import graftc.verbs as verbs
from graftc.emit.package import load_package
from graftc.operators import agreement, kernels
from graftc.operators.agreement import disagreement
from graftc.operators.build import arguments_at, build
from graftc.operators.forms import choose
from graftc.operators.mamba2 import ssd_scan
from graftc.operators.spec import Form, Machine, OperatorSpec
from graftc.operators.specs import SPECS
from graftc.program.model import Model

ON_GPU = kernels.on_gpu
SITE = {
    "dim": 16,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "causal": True,
    "rotary": "none",
    "tokens": 64,
}
CASES = {
    "mamba_ssm": ("mamba2", {"head_dim": 8, "groups": 2}),
    "mamba_ssm, both ways": ("mamba2", {"head_dim": 8, "causal": False}),
    "fla": ("linear_attention", {"causal": True}),
    "fla, learned features": ("linear_attention", {"causal": True, "feature": "softmax_pair"}),
    "causal_conv1d": ("hyena_x", {}),
    "causal_conv1d, y": ("hyena_y", {"kernel": 2, "order": 3}),
    "causal_conv1d, se": ("hyena_se", {"kernel": 3}),
}  # fmt: skip


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
) -> Tensor:  # fmt: skip
    """x: [batch, tokens, heads, width]; dt: [batch, tokens, heads]; B, C: [batch, tokens, groups, state]."""
    assert A.shape == D.shape == dt_bias.shape == x.shape[2:3]
    assert dt_softplus
    wide = torch.promote_types(x.dtype, torch.float32)  # in which the kernel computes
    x_, dt, b, c = (t.to(wide) for t in (x, dt + dt_bias, B, C))
    dt = F.softplus(dt)
    return (ssd_scan(x_ * dt.unsqueeze(-1), A * dt, b, c) + D.unsqueeze(-1) * x_).to(x.dtype)


def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, normalize: bool = True, head_first: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """q, k, v: [batch, tokens, heads, width]."""
    assert not normalize
    assert q.is_contiguous()
    assert v.is_contiguous()
    scores = torch.einsum(
        "bihd,bjhd->bhij", q * (q.shape[-1] ** -0.5 if scale is None else scale), k
    )
    return torch.einsum("bhij,bjhe->bihe", scores.tril(), v), None


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """x: [batch, channels, tokens]; weight: [channels, taps]."""
    assert 2 <= weight.shape[1] <= 4
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    y = y[..., : x.shape[2]]
    return y if activation is None else F.silu(y)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The packages as modules of this test, and a CPU that passes for a GPU."""
    made: dict[str, ModuleType] = {}
    for name, function in (
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
        ("fla.ops.linear_attn", chunk_linear_attn),
        ("causal_conv1d", causal_conv1d_fn),
    ):
        parts = name.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[: i + 1])
            made[path] = ModuleType(path)
            made[path].__spec__ = object()  # what find_spec of a module that is there wants
            made[path].__path__ = []
            monkeypatch.setitem(sys.modules, path, made[path])
        setattr(made[name], function.__name__, function)
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    agreement.errors.cache_clear()
    return made


def arguments(case: str, form: str) -> tuple[OperatorSpec, dict[str, Any]]:
    operator, given = CASES[case]
    return SPECS[operator], arguments_at(SPECS[operator], SITE, {**given, "form": form})


def here(spec: OperatorSpec, form: Form, given: Any, machine: Machine) -> str | None:
    """The comparison that `choose` makes on a GPU, on the CPU."""
    return disagreement(spec, form, given, Machine("cpu", machine.dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("stand_ins")
def test_a_kernel_is_called_by_its_signature_and_computes_the_operator(case: str) -> None:
    """Outputs and all gradients, in float64, at lengths below, at and above a chunk."""
    spec, given = arguments(case, case.partition(",")[0])
    torch.manual_seed(0)
    fast = build(spec, given).double()
    own = build(spec, {**given, "form": "auto"}).double()
    own.load_state_dict(fast.state_dict())
    for batch, tokens in ((3, 1), (1, 7), (2, 100)):
        x = torch.randn(batch, tokens, 16, dtype=torch.float64)
        found, wanted = fast(x), own(x)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        tangent = torch.randn_like(x)
        for a, b in zip(
            torch.autograd.grad(found, list(fast.parameters()), tangent),
            torch.autograd.grad(wanted, list(own.parameters()), tangent),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert fast(torch.zeros(0, 7, 16, dtype=torch.float64)).shape == (0, 7, 16)
    assert fast(torch.zeros(2, 0, 16, dtype=torch.float64)).shape == (2, 0, 16)


@pytest.mark.parametrize(("case", "taken"), [("mamba_ssm", "mamba_ssm"), ("fla", "fla")])
def test_a_kernel_is_chosen_where_it_agrees_and_not_where_it_does_not(
    case: str, taken: str, stand_ins: dict[str, ModuleType]
) -> None:
    spec, given = arguments(case, "auto")
    given = {**given, "form": "auto"}
    for dtype in ("fp32", "bf16"):
        choice = choose(spec, given, Machine("cuda", dtype), 64, here)
        assert choice is not None
        assert choice.form == taken, choice.why
    for other in (Machine(), Machine("cuda", to="onnx"), Machine("cuda", to="tensorrt")):
        assert choose(spec, given, other, 64, here).form == spec.forms[-1].name

    name, function = {
        "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
        "fla": ("fla.ops.linear_attn", chunk_linear_attn),
    }[case]

    def another(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        return (made[0] * 2, None) if isinstance(made, tuple) else made * 2

    setattr(stand_ins[name], function.__name__, another)
    agreement.errors.cache_clear()
    choice = choose(spec, given, Machine("cuda", "bf16"), 64, here)
    assert choice.form == spec.forms[-1].name
    assert "off here, wanted at most" in choice.why

    setattr(stand_ins[name], function.__name__, lambda q: q)
    agreement.errors.cache_clear()
    choice = choose(spec, given, Machine("cuda", "bf16"), 64, here)
    assert choice.form == spec.forms[-1].name
    assert "it does not run here: " in choice.why


@pytest.mark.parametrize(
    ("error", "own", "said"),
    [
        (1e-5, 1e-6, None),
        (1e-3, 6e-4, None),  # the own form is not better
        (1e-3, 4e-4, "1.0e-03 off here, wanted at most 0.0008"),
        (0.3, 0.2, "wanted at most 0.1"),  # whatever the own form does
        (float("inf"), 1e-6, "inf off here"),
        (float("inf"), float("inf"), "the operator's own form gives no finite numbers"),
        (1e-6, float("inf"), "the operator's own form gives no finite numbers"),
    ],
)
def test_how_far_off_a_kernel_may_be(
    error: float, own: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreement.errors.cache_clear()
    monkeypatch.setattr(agreement, "_errors", lambda *given: (error, own))
    spec, given = arguments("mamba_ssm", "mamba_ssm")
    why = disagreement(spec, spec.form("mamba_ssm"), given, Machine())
    assert why is None if said is None else said in why
    agreement.errors.cache_clear()


def test_a_comparison_that_failed_once_is_made_again(stand_ins: dict[str, ModuleType]) -> None:
    """The GPU may have been full."""
    file = stand_ins["mamba_ssm.ops.triton.ssd_combined"]
    spec, given = arguments("mamba_ssm", "mamba_ssm")
    calls: list[int] = []

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def free(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return mamba_chunk_scan_combined(*args, **kwargs)

    file.mamba_chunk_scan_combined = full
    why = disagreement(spec, spec.form("mamba_ssm"), given, Machine())
    assert why == "it does not run here: CUDA out of memory"
    file.mamba_chunk_scan_combined = free
    assert disagreement(spec, spec.form("mamba_ssm"), given, Machine()) is None
    count = len(calls)
    assert disagreement(spec, spec.form("mamba_ssm"), given, Machine()) is None
    assert count == len(calls) > 0  # what was made is kept


@pytest.mark.parametrize(("factor", "ends"), [(1.0, None), (1.0005, "skip"), (2.0, "fail")])
def test_the_test_of_a_gpu_forgives_in_float32_what_tf32_costs_and_no_more(
    factor: float,
    ends: str | None,
    stand_ins: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.gpu import test_operators_gpu as on_a_gpu

    def near(*args: Any, **kwargs: Any) -> Any:
        return mamba_chunk_scan_combined(*args, **kwargs) * factor

    stand_ins["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = near
    monkeypatch.setattr(on_a_gpu, "DEVICE", "cpu")
    wanted: Any = {"skip": pytest.skip.Exception, "fail": AssertionError}.get(str(ends))
    with pytest.raises(wanted) if wanted else nullcontext():
        on_a_gpu.test_an_installed_kernel_agrees("mamba2", "mamba_ssm", {}, "fp32")


def test_without_a_gpu_or_the_package_the_reason_is_said() -> None:
    agreement.errors.cache_clear()
    spec, given = arguments("mamba_ssm", "auto")
    choice = choose(spec, {**given, "form": "auto"}, Machine("cuda"), 64)
    assert choice.form == "chunks"
    if "mamba_ssm" not in sys.modules and kernels.on_gpu is not None:
        assert "mamba-ssm is not installed here" in choice.why
    if not torch.cuda.is_available():
        why = disagreement(spec, spec.form("mamba_ssm"), given, Machine("cuda"))
        assert why == "no CUDA device here to compare it on"


@pytest.mark.parametrize("case", ["mamba_ssm", "fla", "causal_conv1d"])
def test_a_student_without_its_package_runs_on_a_cpu_and_says_on_a_gpu_what_it_needs(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, given = arguments(case, case)
    module = build(spec, given)
    assert module(torch.zeros(1, 5, 16)).shape == (1, 5, 16)
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    package = spec.form(case).package
    monkeypatch.setitem(sys.modules, package[0], None)
    with pytest.raises(ImportError, match=f"package `{package[1]}` on a GPU") as caught:
        module(torch.zeros(1, 5, 16))
    assert "another `form`" in str(caught.value)
    assert module.needs == package[1]


RULE = """
rule scan {
    match   a = self_attention
    replace a with %s
    distill l2
}
"""


@pytest.mark.parametrize(
    ("operator", "package"),
    [
        ("mamba2(head_dim = 8, form = mamba_ssm)", "mamba-ssm"),
        ("hyena_x(form = causal_conv1d)", "causal-conv1d"),
        ("linear_attention(causal = true, form = fla)", "flash-linear-attention"),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_a_rule_forces_a_kernel_and_the_student_names_its_package(
    operator: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning where it was not seen to agree; the package runs alone, on a CPU, without what it names."""
    monkeypatch.setattr(kernels, "on_gpu", ON_GPU)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True).eval()
    model = Model(torch.nn.ModuleList([layer])[0], {"src": torch.randn(2, 40, 16)})
    file = tmp_path / "scan.graft"
    file.write_text(RULE % operator)
    if not torch.cuda.is_available():
        (note,) = (n for n in verbs.plan(file, model, device="cuda").notes if n.code == "G822")
        assert note.found == "no CUDA device here to compare it on"
    made = verbs.compile(file, model, tmp_path / "build", device="cuda", copy_teacher=True)
    assert made.plan["edits"][0]["forms"][0]["why"] == "the rule says so"
    config = yaml.safe_load((made.path / "student/config.yaml").read_text())
    assert config["needs_on_a_gpu"] == [package]
    student = load_package(made.path / "student")
    assert student(torch.zeros(2, 40, 16)).shape == (2, 40, 16)
    assert "graftc." not in (made.path / "student/model.py").read_text()
