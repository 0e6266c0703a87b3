"""What a site is regressed on: gates, masks, the loss told from the tails, whose inputs, when it stops, errors by time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn

from graftc.diagnostics import GraftError
from graftc.distillation import capture_graph, distill, runs
from graftc.distillation import generation as engine
from graftc.distillation.bins import BinSums, edges_of
from graftc.distillation.loss import Moments, chosen, regression
from graftc.distillation.student_inputs import StudentInputs, share_at
from graftc.distillation.students import students_of
from graftc.distillation.targets import Budget, Loss
from graftc.distillation.targets_file import from_dict, to_dict
from tests.distillation import tiny


def build(path, *sites, **made):
    return tiny.FakeBuild(path, tiny.targets(*sites), **made)


def run(made, **options):
    return distill(made, tiny.latents(), tiny.Denoise(), **{"batch": 16, "seed": 0} | options)


def log(result):
    return [json.loads(line) for line in (result.path / "log.jsonl").read_text().splitlines()]


def gated(block, **changes):
    site = tiny.attention_site(block, **changes)
    return replace(site, teacher=replace(site.teacher, gate=True))


def batch(count=6):
    made = torch.Generator().manual_seed(5)
    x = torch.randn(count, tiny.TOKENS, tiny.DIM, generator=made)
    return {"x": x, "t": torch.arange(count) * 20}


# -- the gate ------------------------------------------------------------------------------------


def test_the_gate_that_follows_a_site_is_captured_between_inputs_and_output():
    model, inputs = tiny.teacher(), batch()
    site = gated(1)
    ((x, gate, output),) = capture_graph(model, [site.teacher])(**inputs)
    expected = model.blocks[1].ada(model.time(inputs["t"])).unsqueeze(1).chunk(2, dim=-1)[1]
    torch.testing.assert_close(gate, expected)
    torch.testing.assert_close(output, model.blocks[1].attn(x))


class Halved(nn.Module):
    """A block whose site is added as it is, or scaled by what does not reach a sum."""

    def __init__(self, how):
        super().__init__()
        self.mlp, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        if self.how == "plain":
            return x + self.mlp(x)
        if self.how == "twice":
            return x + x * self.mlp(x) + self.mlp(x)
        return (x * self.mlp(x)).relu()


@pytest.mark.parametrize(("how", "found"), [("plain", "`add`"), ("no sum", "`relu`")])
def test_a_site_without_a_gate_is_told(how, found):
    cut = replace(tiny.call("mlp"), gate=True)
    with pytest.raises(GraftError) as raised:
        capture_graph(Halved(how), [cut])
    assert raised.value.diagnostics[0].code == "G552"
    assert found in str(raised.value)


def test_the_loss_is_weighted_by_the_gate_and_the_error_is_not(tmp_path):
    plain, weighed = (tmp_path / n for n in ("plain", "weighed"))
    for path in (plain, weighed):
        path.mkdir()
    one = run(build(plain, tiny.attention_site(1)), steps=1).sites[0]
    other = run(build(weighed, gated(1)), steps=1).sites[0]
    assert one.error_start == pytest.approx(other.error_start, rel=1e-6)
    assert one.loss_start != pytest.approx(other.loss_start, rel=1e-3)
    # By hand, on the gate's own values.
    made = build(tmp_path, gated(1))
    (student,) = students_of(made.student(), made.sites.sites)
    (values,) = capture_graph(made.teacher(), [student.site.teacher])(**batch())
    x, gate, target = values
    moments = Moments()
    moments.add((gate * target).detach())
    scale = moments.scale()
    ours = student.loss(student.region(x), values, scale)
    by_hand = (gate * (student.region(x) - target)).abs().mean() / (gate * target).abs().mean()
    torch.testing.assert_close(ours, by_hand)


# -- outliers and tails --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_masked_entries_cost_nothing_and_predicting_zero_still_costs_one(kind):
    target = torch.ones(1000) * torch.tensor([1.0, -1.0]).repeat(500)
    target[7] = 1000.0
    loss = Loss(kind, mask_above=3.0)
    whole = Moments()
    whole.add(target)
    limit = 3.0 * whole.scale().energy ** 0.5
    kept = Moments()
    kept.add(target, limit)
    scale = kept.scale(limit)
    assert regression(torch.zeros(1000), target, loss, scale).item() == pytest.approx(1.0, rel=1e-5)
    student = target.clone().requires_grad_(True)
    with torch.no_grad():
        student[7] = -50.0
    value = regression(student, target, loss, scale)
    value.backward()
    assert value.item() == 0.0
    assert float(student.grad.abs().max()) == 0.0
    assert float(regression(student, target, Loss(kind), replace(scale, limit=None))) > 0.1


def test_training_masks_what_the_file_says(tmp_path):
    """With every entry of the target above the limit but the smallest, the loss is over those alone."""
    site = tiny.attention_site(1, loss=Loss("l2", mask_above=0.5))
    masked = run(build(tmp_path, site), steps=2)
    plain = run(build(tmp_path, tiny.attention_site(1, loss=Loss("l2"))), steps=2)
    assert masked.sites[0].error_start == plain.sites[0].error_start
    assert (
        masked.sites[0].loss_start > 1.5 * plain.sites[0].loss_start
    )  # small targets, same misses


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (torch.linspace(-1, 1, 4001), "l2"),  # uniform: 1.8
        (torch.distributions.Normal(0, 1).icdf(torch.linspace(0.001, 0.999, 4001)), "l2"),
        (torch.distributions.Laplace(0, 1).icdf(torch.linspace(1e-4, 1 - 1e-4, 40001)), "l1"),
        (torch.distributions.StudentT(9).sample((200000,)), "huber"),  # 3 + 6 / (9 - 4) = 4.2
    ],
)
def test_the_loss_is_told_from_the_tails_of_the_target(values, kind):
    torch.manual_seed(0)
    moments = Moments()
    for piece in (values + 7).split(1000):  # the mean does not matter
        moments.add(piece)
    assert chosen(Loss("auto"), moments.scale()) == kind


def test_a_run_says_which_loss_it_chose(tmp_path):
    made = build(tmp_path, tiny.attention_site(1, loss=Loss("auto")), tiny.attention_site(2))
    start = log(run(made, steps=2))[0]["sites"]
    assert start["blocks.2.attn"]["kind"] == "l1"
    kurtosis = start["blocks.1.attn"]["kurtosis"]
    expected = "l2" if kurtosis < 3.3 else "huber" if kurtosis < 4.52 else "l1"
    assert start["blocks.1.attn"]["kind"] == expected


# -- whose inputs --------------------------------------------------------------------------------


def test_the_students_own_inputs_are_those_of_the_student_model():
    model, inputs = tiny.hyena((1, 2)).train(), batch()
    (student,) = students_of(model, [tiny.attention_site(2, student_inputs=(1.0, 1.0))])
    teachers = capture_graph(tiny.teacher(), [student.site.teacher])(**inputs)
    seen = []
    hook = model.blocks[2].attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(**inputs)
    hook.remove()
    own = StudentInputs(model)
    (fed,) = own.fed([student], teachers, {"blocks.2.attn": 1.0}, inputs)
    torch.testing.assert_close(fed[0], seen[0])
    assert fed[1] is teachers[0][1]  # the target stays the teacher's
    assert not torch.allclose(fed[0], teachers[0][0])
    (half,) = own.fed([student], teachers, {"blocks.2.attn": 0.5}, inputs)
    torch.testing.assert_close(half[0][:3], seen[0][:3])
    torch.testing.assert_close(half[0][3:], teachers[0][0][3:])
    assert model.blocks[2].attn.training  # and the model trains on


def test_a_mix_moves_from_one_to_the_other():
    (student,) = students_of(tiny.hyena(), [tiny.attention_site(2, student_inputs=(0.0, 1.0))])
    assert [share_at(student, step, 5) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_trained_on_its_own_inputs_a_site_makes_up_for_the_one_before(tmp_path):
    """Block 1 stays random and untrained, so block 2 sees other inputs than the teacher's."""
    ends = {}
    for name, shares in (("teacher", (0.0, 0.0)), ("mix", (0.0, 1.0)), ("student", (1.0, 1.0))):
        (tmp_path / name).mkdir()
        site = tiny.attention_site(2, student_inputs=shares, budget=Budget(steps=200))
        made = build(tmp_path / name, site)
        result = distill(made, tiny.latents(200), tiny.Denoise(), batch=16)
        student = made.student(result.id).eval()
        with torch.no_grad():
            wanted = capture_graph(tiny.teacher(), [site.teacher])(**batch(32))[0][-1]
            found = capture_graph(student, [site.student])(**batch(32))[0][-1]
        ends[name] = float((found - wanted).square().sum() / wanted.square().sum())
        assert result.sites[0].error_end < result.sites[0].error_start
    assert ends["student"] < ends["teacher"]
    assert ends["mix"] < ends["teacher"]


# -- clipping, patience --------------------------------------------------------------------------


def test_each_site_is_clipped_to_its_own_norm(tmp_path, monkeypatch):
    limits, clip = [], engine.clip_or_drop

    def noted(parameters, norm, limit):
        limits.append(limit)
        return clip(parameters, norm, limit)

    monkeypatch.setattr(engine, "clip_or_drop", noted)
    sites = (
        tiny.attention_site(1, budget=Budget(steps=1, clip=0.25), loss=Loss("l1", weight=2.0)),
        tiny.attention_site(2, budget=Budget(steps=1)),
    )
    run(build(tmp_path, *sites))
    assert limits == [0.5, 1.0]


def test_a_site_that_no_longer_gains_stops_early(tmp_path):
    """Steps of a rate far too high make no site better: the first validation is the last."""
    hopeless = tiny.attention_site(1, budget=Budget(steps=40, patience=2, lr=50.0))
    sites = hopeless, tiny.attention_site(2, budget=Budget(steps=40, patience=2))
    result = run(build(tmp_path, *sites), optimiser="adamw")
    assert [s.steps for s in result.sites] == [10, 40]  # validations are every fifth step
    assert result.sites[0].error_end == result.sites[0].error_start
    assert result.steps == 40
    late = [e["values"] for e in log(result) if e["event"] == "step" and e["step"] > 10]
    assert all("blocks.1.attn" not in values for values in late)
    alone = run(build(tmp_path, hopeless), optimiser="adamw")
    assert alone.steps == alone.sites[0].steps == 10


# -- errors by time ------------------------------------------------------------------------------


def test_errors_are_told_by_bins_of_the_tasks_time(tmp_path):
    class Timed(tiny.Denoise):
        time_range = (0.0, 1000.0)

    sites = tiny.attention_site(1, exact=False), tiny.attention_site(2)
    made = build(tmp_path, *sites)
    held = tiny.latents(40)
    result = distill(made, tiny.latents(), Timed(), steps=2, batch=16, validation=held)
    found = [e for e in log(result) if e["event"] == "bins"]
    assert [e["site"] for e in found] == ["blocks.1.attn", "blocks.2.attn"]
    assert all(set(e) == {"event", "site", "edges", "errors"} for e in found)
    assert found[0]["edges"][0] == 0.0
    assert found[0]["edges"][-1] == 1000.0
    assert len(found[0]["errors"]) == len(found[0]["edges"]) - 1 > 3
    for event, site in zip(found, result.sites, strict=True):
        assert min(event["errors"]) <= site.error_end <= max(event["errors"])
        assert site.bins == {"edges": event["edges"], "errors": event["errors"]}
    kept = yaml.safe_load((result.path / "run.yaml").read_text())["result"]["sites"][0]["bins"]
    assert kept == result.sites[0].bins


def test_a_bin_holds_the_samples_of_its_time_and_none_is_empty():
    times = torch.tensor([0.0, 1, 2, 3, 900, 901, 902, 999.0])
    edges = edges_of(times, (0, 1000))
    assert edges == [0.0, 500.0, 1000.0]
    sums = BinSums(edges)
    target = torch.ones(8, 3)
    output = target.clone()
    output[4:] = 3.0
    assert sums.add(times, output, target)
    assert sums.errors() == [0.0, 4.0]
    crowded = edges_of(torch.full((64,), 990.0), (0, 1000))
    assert crowded == [0.0, 1000.0]
    assert edges_of(torch.full((8,), 3.0), None) == [3.0, 3.0]


def test_a_task_without_a_time_has_no_bins(tmp_path):
    class Timeless(tiny.Denoise):
        def prepare(self, sample, generator):
            made = super().prepare(sample, generator)
            return tiny.Made({"x": made.inputs["x"], "t": made.inputs["t"]}, made.targets)

    made = build(tmp_path, tiny.attention_site(1))
    made.targets["inputs"][1]["meaning"] = "other"
    result = distill(made, tiny.latents(), Timeless(), steps=1, batch=16)
    assert result.sites[0].bins is None
    assert not [e for e in log(result) if e["event"] == "bins"]
    assert runs(tmp_path)["0001-distill"]["result"]["sites"][0]["bins"] is None


# -- the file ------------------------------------------------------------------------------------


def test_all_of_it_is_in_the_file():
    site = gated(
        1,
        loss=Loss("auto", mask_above=8.0),
        budget=Budget(steps=3, clip=0.5, patience=2),
        student_inputs=(0.0, 1.0),
    )
    made = tiny.targets(site)
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(made)))) == made


@pytest.mark.parametrize("given", [[0.5], [0.0, 1.5], "student"])
def test_shares_that_are_none_are_told(given):
    plain = to_dict(tiny.targets(tiny.attention_site(1)))
    plain["sites"][0]["student_inputs"] = given
    with pytest.raises(GraftError) as raised:
        from_dict(plain)
    assert raised.value.diagnostics[0].code == "G502"


RULE = """rule r {{
  match m = mlp in blocks all
  replace m with mlp(ratio = 3)
  distill auto, {}
}}
"""


class Stack(nn.Module):
    """Blocks x + c · mlp(x), the factor there or not."""

    def __init__(self, factor):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(factor) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), tiny.Mlp()
        self.scale = nn.Parameter(torch.ones(16)) if factor else None

    def forward(self, x):
        found = self.mlp(self.norm(x))
        return x + (found if self.scale is None else self.scale * found)


def targets_of(module, options):
    from graftc import Model
    from graftc.diagnostics import Source
    from graftc.language.check import check
    from graftc.program.analysis import analyse
    from graftc.program.capture import capture
    from graftc.rewrite.plan import make_plan
    from graftc.targets import make_targets

    program = capture(Model(module, {"x": torch.zeros(2, 8, 16)}))
    rules = check(Source("r.graft", RULE.format(options)), {})
    return make_targets(make_plan(rules, analyse(program)), program)


def test_what_a_rule_says_reaches_the_targets():
    said = "gate = true, mask_above = 8, inputs = mix(0%, 50%), clip = 0.5, patience = 3"
    site = targets_of(Stack(True), said).sites[0]
    assert site.teacher.gate
    assert not site.student.gate
    assert site.loss == Loss("auto", mask_above=8.0)
    assert site.student_inputs == (0.0, 0.5)
    assert (site.budget.clip, site.budget.patience) == (0.5, 3)
    assert targets_of(Stack(False), "inputs = student").sites[0].student_inputs == (1.0, 1.0)


def test_a_gate_that_is_not_there_is_refused_when_compiled():
    with pytest.raises(GraftError) as raised:
        targets_of(Stack(False), "gate = true")
    assert raised.value.diagnostics[0].code == "G552"
    assert raised.value.diagnostics[0].site == "blocks.0.mlp"
