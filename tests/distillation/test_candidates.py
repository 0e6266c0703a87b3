"""All candidates of `one of` train in one run, each as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graftc.distillation import Targets, distill, from_dict, to_dict
from graftc.distillation.targets import Budget, Candidate, Pending
from graftc.emit.build import Build
from graftc.reporting.gather import gather
from tests.distillation import tiny
from tests.distillation.test_resume import Killed, killer, same

PLACE = "candidates/blocks.1.attn"


def mixer(seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.Mixer()


def mlp() -> nn.Module:
    torch.manual_seed(6)
    return tiny.Mlp()


def student_with(operator: nn.Module) -> nn.Module:
    model = tiny.teacher()
    model.blocks[1].attn = operator
    return model


def chosen(operator: str, make, **changes) -> tuple[Targets, object]:
    """A build whose site has this operator alone."""
    site = tiny.attention_site(1, operator=operator, budget=Budget(steps=9), **changes)
    return tiny.targets(site), lambda: student_with(make())


def one_of(path):
    """A Mixer in the student; beside it a Mixer with other weights whose last map is solved, an MLP, and `keep`."""
    path.mkdir(exist_ok=True)
    targets, student = chosen("mixer", lambda: mixer(1))
    (site,) = targets.sites
    others = (
        Candidate("mixer"),
        Candidate("mixer", f"{PLACE}/1", (Pending("operator", "out_proj"),)),
        Candidate("keep"),
        Candidate("mlp", f"{PLACE}/3"),
    )
    targets = replace(targets, sites=(replace(site, candidates=others),))
    made = {f"{PLACE}/1": mixer, f"{PLACE}/3": mlp}
    return tiny.FakeBuild(path, targets, make_student=student, make_candidates=made)


def run(build, **options):
    given = {"batch": 8, "checkpoint_every": 3, "stacked": "never"}
    return distill(build, tiny.latents(40), tiny.Denoise(), **{**given, **options})


def trained(result, candidate: int) -> dict[str, torch.Tensor]:
    """The operator's trained weights, by names inside it."""
    if candidate == 0:
        state, prefix = load_file(result.weights), "blocks.1.attn."
    else:
        file = result.path / "candidates/blocks.1.attn" / f"{candidate}.safetensors"
        state, prefix = load_file(file), "operator."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return run(one_of(tmp_path_factory.mktemp("one_of")))


def test_every_candidate_but_keep_has_a_result_and_weights(whole):
    assert [(s.name, s.candidate, s.operator) for s in whole.sites] == [
        ("blocks.1.attn", 0, "mixer"),
        ("blocks.1.attn", 1, "mixer"),
        ("blocks.1.attn", 3, "mlp"),
    ]
    assert all(s.steps == 9 and s.error_end <= s.error_start for s in whole.sites)
    assert whole.metrics["error_end"] == whole.sites[0].error_end  # the student's, not the others'


@pytest.mark.parametrize(
    ("candidate", "operator", "make", "solve"),
    [(0, "mixer", lambda: mixer(1), False), (1, "mixer", mixer, True), (3, "mlp", mlp, False)],
)
def test_a_candidate_ends_with_the_bits_of_a_run_of_it_alone(
    tmp_path, whole, candidate, operator, make, solve
):
    """The other candidates change nothing: this is what lets a bank stand in for a run."""
    targets, student = chosen(operator, make, solve=solve)
    alone = run(tiny.FakeBuild(tmp_path, targets, make_student=student))
    (single,) = alone.sites
    together = next(s for s in whole.sites if s.candidate == candidate)
    assert replace(together, candidate=0) == single
    ours, theirs = trained(whole, candidate), trained(alone, 0)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


def test_one_teacher_pass_feeds_all_candidates(tmp_path, monkeypatch):
    from graftc.distillation.activations import Teacher

    asked: list[int] = []
    original = Teacher.graph

    def graph(self, cuts):
        asked.append(len(cuts))
        return original(self, cuts)

    monkeypatch.setattr(Teacher, "graph", graph)
    run(one_of(tmp_path / "build"))
    assert set(asked) == {1}


@pytest.mark.parametrize("at", [1, 6, 10])
def test_killed_and_resumed(tmp_path, whole, at):
    build = one_of(tmp_path)
    with pytest.raises(Killed):
        run(build, progress=killer(at))
    resumed = distill(build, tiny.latents(40), tiny.Denoise(), resume="0001-distill")
    same(resumed, whole)
    for candidate in (1, 3):
        ours, theirs = trained(resumed, candidate), trained(whole, candidate)
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


def test_the_report_has_results_by_candidate(whole):
    folder = whole.path.parents[1]
    (facts,) = gather(Build(folder, {}, {}, {})).runs
    assert [(s["name"], s["candidate"]) for s in facts.sites] == [
        ("blocks.1.attn", 0),
        ("blocks.1.attn", 1),
        ("blocks.1.attn", 3),
    ]


def test_targets_of_the_first_version_are_read():
    """They say nothing of arguments, first weights, sizes and noise; a candidate takes what the student takes."""
    plain = to_dict(tiny.targets(tiny.attention_site(1)))
    plain["version"] = 1
    del plain["noise"]
    for key in ("arguments", "definition", "init", "sample"):
        del plain["sites"][0][key]
    old = {"operator": "mlp", "package": "candidates/a/1", "pending": []}
    plain["sites"][0]["candidates"] = [{**old, "package": None}, old]
    (site,) = from_dict(plain).sites
    assert site.sample is None
    assert site.candidates[1].inputs == ()
