"""Stage 1: errors fall, exact sites are left alone, inner sites come first, stacking changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graftc.diagnostics import GraftError
from graftc.distillation import distill, latest, runs
from graftc.distillation.targets import Budget, Loss
from tests.distillation import tiny


def build(path, *sites, **made):
    return tiny.FakeBuild(path, tiny.targets(*sites), **made)


def run(made, **options):
    options = {"batch": 16, "seed": 0} | options
    return distill(made, options.pop("data", tiny.latents()), tiny.Denoise(), **options)


def nudged(scale=0.3):
    """Self-grafts of blocks 1 and 2: the first as it was, the second disturbed."""
    model = tiny.teacher()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.blocks[2].attn.parameters():
            parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return model


def log(result):
    return [json.loads(line) for line in (result.path / "log.jsonl").read_text().splitlines()]


def test_a_self_graft_is_skipped_and_a_disturbed_one_is_mended(tmp_path):
    made = build(tmp_path, tiny.attention_site(1), tiny.attention_site(2), make_student=nudged)
    result = run(made)
    same, mended = result.sites
    assert same.error_start == same.error_end == 0.0
    assert same.steps == 0
    assert mended.steps == 60
    assert mended.error_end < 0.1 * mended.error_start
    weights, start = load_file(result.weights), nudged().state_dict()
    trained = {n for n in start if not torch.equal(weights[n], start[n])}
    assert trained <= {n for n in start if n.startswith("blocks.2.attn.")}
    assert trained
    assert runs(tmp_path)["0001-distill"]["status"] == "finished"
    assert latest(tmp_path, "distill") == result.id == "0001-distill"
    assert log(result)[0]["sites"]["blocks.1.attn"]["steps"] == 0


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_each_loss_and_optimiser_lowers_the_error(tmp_path, kind, optimiser):
    made = build(tmp_path, tiny.attention_site(2, loss=Loss(kind)), make_student=nudged)
    site = run(made, optimiser=optimiser).sites[0]
    assert site.error_end < 0.5 * site.error_start
    assert site.loss_end < site.loss_start < 1


def test_a_pending_weight_is_solved_first(tmp_path):
    made = [
        build(tmp_path / str(solve), tiny.attention_site(1, solve=solve), tiny.attention_site(2))
        for solve in (False, True)
    ]
    for one in made:
        one.path.mkdir()
    plain, solved = (run(one, steps=1).sites for one in made)
    assert solved[0].error_start < 0.95 < plain[0].error_start
    assert solved[1].error_start == plain[1].error_start


def test_an_inner_site_is_trained_before_the_pair_that_holds_it(tmp_path):
    inner, outer = tiny.attention_site(2), tiny.pair_site(after=("blocks.2.attn",))
    made = build(tmp_path, outer, inner, make_student=lambda: tiny.paired((2,)))
    result = run(made)
    assert [s.name for s in result.sites] == ["blocks.2.attn", "blocks.2+blocks.3"]
    assert all(s.error_end < s.error_start for s in result.sites)
    assert result.steps == 120
    weights, start = load_file(result.weights), tiny.paired((2,)).state_dict()
    assert torch.equal(weights["blocks.1.mlp.fc1.weight"], start["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(weights["blocks.3.mlp.fc1.weight"], start["blocks.3.mlp.fc1.weight"])


def test_sites_end_after_their_own_steps(tmp_path):
    short = tiny.attention_site(1, budget=Budget(steps=12))
    result = run(build(tmp_path, short, tiny.attention_site(2, budget=Budget(steps=24))))
    assert [s.steps for s in result.sites] == [12, 24]
    late = [e["values"] for e in log(result) if e["event"] == "step" and e["step"] > 12]
    assert late
    assert all("blocks.1.attn" not in values for values in late)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_stacked_sites_come_out_as_single_ones_do(tmp_path, optimiser):
    results = {}
    for stacked in ("never", "always"):
        (tmp_path / stacked).mkdir()
        sites = [tiny.attention_site(i, budget=Budget(steps=8)) for i in (0, 1, 2)]
        student = lambda: tiny.hyena((0, 1, 2))  # noqa: E731
        made = build(tmp_path / stacked, *sites, make_student=student)
        results[stacked] = run(made, stacked=stacked, optimiser=optimiser)
    assert log(results["always"])[0]["stacks"] == [[f"blocks.{i}.attn" for i in (0, 1, 2)]]
    tolerance = 1e-6 if optimiser == "adamw" else 1e-3  # Muon rounds to bfloat16 inside
    for one, other in zip(results["never"].sites, results["always"].sites, strict=True):
        assert abs(one.error_end - other.error_end) < tolerance


def test_the_stacked_forward_and_gradient_equal_the_single_ones():
    from graftc.distillation.stacked import Stack

    model = tiny.hyena((0, 1, 2))
    regions = {str(i): model.blocks[i].attn for i in (0, 1, 2)}
    given = {name: (torch.randn(4, tiny.TOKENS, tiny.DIM),) for name in regions}
    for name, output in Stack(regions)(given).items():
        torch.testing.assert_close(output, regions[name](*given[name]), rtol=0, atol=1e-6)
    gradients = []
    for outputs in (Stack(regions)(given), {n: regions[n](*given[n]) for n in regions}):
        model.zero_grad()
        sum(o.square().mean() for o in outputs.values()).backward()
        gradients.append([p.grad.clone() for p in model.blocks[1].attn.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_an_operator_without_a_batching_rule_is_looped(tmp_path):
    class Stubborn(tiny.Mixer):
        def forward(self, x):
            assert float(x.sum()) == float(x.sum())  # vmap cannot read a number
            return super().forward(x)

    def student():
        model = tiny.teacher()
        for i in (1, 2):
            model.blocks[i].attn = Stubborn()
        return model

    sites = tiny.attention_site(1), tiny.attention_site(2)
    (tmp_path / "a").mkdir()
    assert log(run(build(tmp_path / "a", *sites, make_student=student), steps=2))[0]["stacks"] == []
    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, *sites, make_student=student), steps=2, stacked="always")
    assert raised.value.diagnostics[0].code == "G544"


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    sites = tiny.attention_site(1), tiny.attention_site(2)
    made = build(tmp_path, *sites)
    one, two, three = (run(made, steps=10, seed=seed) for seed in (0, 0, 1))
    assert [r.id for r in (one, two, three)] == ["0001-distill", "0002-distill", "0003-distill"]
    ours, again, other = (load_file(r.weights) for r in (one, two, three))
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    assert one.sites == two.sites
    assert not all(torch.equal(ours[n], other[n]) for n in ours)


def test_the_end_is_never_worse_than_the_start(tmp_path):
    made = build(tmp_path, tiny.attention_site(2), make_student=lambda: nudged(0.01))
    site = run(made, lr=10.0, optimiser="adamw").sites[0]
    assert site.loss_end == site.loss_start
    assert site.error_end == site.error_start


def test_nan_in_the_teacher_before_training(tmp_path):
    def teacher():
        model = tiny.teacher()
        model.blocks[1].attn.proj.weight.data[0] = float("nan")
        return model

    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, tiny.attention_site(1), make_teacher=teacher))
    found = raised.value.diagnostics[0]
    assert (found.code, found.site) == ("G546", "blocks.1.attn")
    assert "its output" in str(raised.value)
    assert "held-out batch 0" in str(raised.value)


def test_nan_in_the_data_is_told_with_its_step_and_the_checkpoint_stays(tmp_path):
    data = tiny.latents()
    made = build(tmp_path, tiny.attention_site(1))
    from graftc.distillation import open_data

    order = open_data([{"i": torch.tensor(i)} for i in range(len(data))], seed=0)
    bad = int(order.raw(2, 16)["i"][5])  # first drawn in step 2
    data[bad] = {"latent": torch.full_like(data[bad]["latent"], float("nan"))}
    with pytest.raises(GraftError) as raised:
        run(made, data=data, checkpoint_every=1)
    assert raised.value.diagnostics[0].code == "G546"
    assert "step 2" in str(raised.value)
    assert "input `x`" in str(raised.value)
    assert runs(tmp_path)["0001-distill"]["status"] == "running"
    from graftc.distillation.checkpoint import load_tensors

    tensors, facts = load_tensors(tmp_path / "runs" / "0001-distill" / "checkpoint.safetensors")
    assert facts["state"]["step"] == 2
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_a_target_of_zero_is_told(tmp_path):
    def teacher():
        model = tiny.teacher()
        nn.init.zeros_(model.blocks[1].attn.proj.weight)
        nn.init.zeros_(model.blocks[1].attn.proj.bias)
        return model

    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, tiny.attention_site(1), make_teacher=teacher))
    assert raised.value.diagnostics[0].code == "G543"


def biased():
    """A teacher whose attention gives the same for every input: its bias."""
    model = tiny.teacher()
    nn.init.zeros_(model.blocks[1].attn.proj.weight)
    nn.init.ones_(model.blocks[1].attn.proj.bias)
    return model


def test_a_constant_target_is_told_and_nothing_is_trained(tmp_path):
    sites = tiny.attention_site(2), tiny.attention_site(1)
    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, *sites, make_teacher=biased))
    found = raised.value.diagnostics[0]
    assert (found.code, found.site) == ("G569", "blocks.1.attn")
    assert not (tmp_path / "runs" / "0001-distill" / "checkpoint.safetensors").exists()
    run(build(tmp_path, sites[0], make_teacher=biased), steps=2)  # other sites are trained


def test_a_target_that_hardly_changes_is_no_constant(tmp_path):
    def teacher():
        model = biased()
        nn.init.normal_(model.blocks[1].attn.proj.weight, std=1e-4)
        return model

    run(build(tmp_path, tiny.attention_site(1), make_teacher=teacher), steps=2)


class Hiccup(tiny.Mixer):
    """Gives NaN in the calls that `bad` says."""

    calls = 0

    def __init__(self, bad) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.calls += 1
        return super().forward(x) * (float("nan") if self.bad(self.calls) else 1.0)


def test_steps_without_a_finite_gradient_are_skipped_and_counted(tmp_path):
    def student():
        model = tiny.hyena()
        model.blocks[1].attn = Hiccup(lambda call: call in (3, 5))
        return model

    made = build(tmp_path, tiny.attention_site(1), tiny.attention_site(2), make_student=student)
    result = run(made, steps=20, stacked="never")
    assert [s.skipped_steps for s in result.sites] == [2, 0]
    assert all(torch.isfinite(w).all() for w in load_file(result.weights).values())
    assert all(s.error_end < s.error_start for s in result.sites)


def test_a_student_that_never_gives_a_number_is_told(tmp_path):
    def student():
        model = tiny.hyena()
        model.blocks[1].attn = Hiccup(lambda _: True)
        return model

    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, tiny.attention_site(1), make_student=student), stacked="never")
    assert raised.value.diagnostics[0].code == "G545"
    assert raised.value.diagnostics[0].site == "blocks.1.attn"


def test_a_student_of_another_shape_is_told(tmp_path):
    def student():
        model = copy.deepcopy(tiny.teacher())
        model.blocks[1].attn = nn.Linear(tiny.DIM, 2 * tiny.DIM)
        return model

    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, tiny.attention_site(1), make_student=student))
    assert raised.value.diagnostics[0].code == "G541"


def test_a_site_with_nothing_to_train_is_told(tmp_path):
    made = build(tmp_path, tiny.attention_site(1, trainable=("blocks.1.atn",)))
    with pytest.raises(GraftError) as raised:
        run(made)
    assert raised.value.diagnostics[0].code == "G542"
    assert "is it `blocks.1.attn." in str(raised.value)


def test_progress_is_told_of_every_step(tmp_path):
    seen = []
    made = build(tmp_path, tiny.attention_site(1, solve=True))
    run(
        made, steps=5, progress=lambda phase, done, total, values: seen.append((phase, done, total))
    )
    assert seen == [("init", 1, 1), *[("distill 1/1", i, 5) for i in range(1, 6)]]
