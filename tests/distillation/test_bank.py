"""A bank of trained sites: train once, then every choice among the candidates is put together from it."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import graftc
from graftc.cli.main import main
from graftc.diagnostics import GraftError
from graftc.distillation import checkpoint
from graftc.distillation.bank import Bank
from graftc.distillation.bank_prune import Chosen, select
from graftc.emit.build import Build
from graftc.tasks import Prepared
from tests.distillation.test_resume import Killed, killer
from tests.rewrite.models import tiny

BUDGET = "distill l2, steps = 4, batch = 8"
ONE_OF = f"""
rule choose {{
    match   a = self_attention in blocks {{1, 2}}
    replace a with one of {{hyena_x(), sliding_window(window = 2), keep, attention()}}
    {BUDGET}
}}
"""
CHOICE = f"""
rule first {{
    match   token_mixer = self_attention in blocks 1
    replace token_mixer with sliding_window(window = 2)
    {BUDGET}
}}
rule second {{
    match   z = self_attention in blocks 2
    replace z with hyena_x()
    {BUDGET}
}}
"""


class Noisy:
    """Tokens with a little noise; the loss is of no matter here."""

    def __init__(self, share: float = 0.1) -> None:
        self.share = share

    def prepare(self, sample, generator):
        noise = torch.randn(sample["x"].shape, generator=generator)
        return Prepared({"x": sample["x"] + self.share * noise}, {"clean": sample["x"]})

    def loss(self, outputs, prepared):
        return (outputs - prepared.targets["clean"]).square().mean()

    def metrics(self, outputs, prepared):
        return {"mse": float(self.loss(outputs, prepared))}


def tokens(seed: int = 3, count: int = 24):
    made = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(12, 16, generator=made)} for _ in range(count)]


def compiled(folder: Path, text: str, model=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.graft").write_text(text)
    return graftc.compile(folder / "rules.graft", model or tiny(3), folder / "build", **options)


def distilled(build, **options):
    given = {"data": tokens(), "task": Noisy(), "stacked": "never", **options}
    return graftc.distill(build, given.pop("data"), **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A bank with every candidate of two blocks, and the run that filled it."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("trained")
    run = distilled(compiled(home, ONE_OF), bank=home / "bank")
    return home / "bank", run


@pytest.fixture(scope="module")
def compiled_choice(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("choice"), CHOICE)


@pytest.fixture
def choice(compiled_choice, tmp_path):
    """A copy of the build of CHOICE, without runs."""
    return Build.open(shutil.copytree(compiled_choice.path, tmp_path / "choice"))


@pytest.fixture
def bank(trained, tmp_path):
    """A copy of it, to change."""
    return Path(shutil.copytree(trained[0], tmp_path / "bank"))


def test_every_trained_candidate_is_stored(trained):
    path, run = trained
    stored = {(e.identity.site, e.identity.candidate): e for e in Bank.open(path).entries()}
    assert set(stored) == {(f"blocks.{i}.attn", c) for i in (1, 2) for c in (0, 1, 3)}
    for result in run.sites:
        entry = stored[result.name, result.candidate]
        assert entry.error == result.error_end
        assert entry.source["run"] == run.id
        assert all(n.startswith(result.name) for n in entry.tensors())


def test_another_file_with_a_candidate_is_assembled_without_training(trained, tmp_path):
    """Other rule names, bindings and sites a rule: the keys are of the contents."""
    path, run = trained
    build = compiled(tmp_path, CHOICE, bank=path)
    (made,) = build.runs()
    assert made.finished
    assert made.stage == "distill"
    result = graftc.distill(build, tokens(), task=Noisy(), resume=made.id)  # what it says of itself
    assert [(s.name, s.steps) for s in result.sites] == [("blocks.1.attn", 0), ("blocks.2.attn", 0)]
    assert all(run.id in s.reused for s in result.sites)
    ours, theirs = load_file(made.weights), load_file(run.weights)
    window = load_file(run.path / "candidates/blocks.1.attn/1.safetensors")
    for name, tensor in ours.items():
        if name.startswith("blocks.1.attn."):
            source = window["operator" + name.removeprefix("blocks.1.attn")]
        else:  # a site that is the student's own in both, or the teacher's
            source = theirs[name]
        assert torch.equal(tensor, source), name
    tuned = graftc.finetune(build, tokens(), task=Noisy(), steps=1)
    assert build.run(tuned.id).info["parent"] == made.id


def test_the_same_file_is_not_trained_again(trained, tmp_path):
    path, run = trained
    again = distilled(compiled(tmp_path, ONE_OF), bank=path)
    assert all(s.steps == 0 and s.reused for s in again.sites)
    assert [s.error_end for s in again.sites] == [s.error_end for s in run.sites]
    ours, theirs = load_file(again.weights), load_file(run.weights)
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    for name in ("blocks.1.attn/1", "blocks.2.attn/3"):
        one, other = (load_file(r.path / f"candidates/{name}.safetensors") for r in (again, run))
        assert all(torch.equal(one[n], other[n]) for n in other)


def test_what_is_missing_is_trained_and_the_rest_is_not(trained, bank, choice):
    Bank.open(bank).remove(select(Bank.open(bank), Chosen(site="blocks.2.attn")))
    build = choice
    found = graftc.verbs.assemble(build, bank)
    assert found.run is None
    assert not build.runs()
    assert list(found.found) == ["blocks.1.attn"]
    assert [m.site for m in found.missing] == ["blocks.2.attn"]
    run = distilled(build, bank=bank)
    assert [(s.name, s.steps, bool(s.reused)) for s in run.sites] == [
        ("blocks.1.attn", 0, True),
        ("blocks.2.attn", 4, False),
    ]
    # the one that was trained here has the bits of the one that was trained among six
    whole = {e.key: e.weights for e in Bank.open(trained[0]).entries()}
    assert all(whole[e.key] == e.weights for e in Bank.open(bank).entries())


CHANGES = {
    "budget": (("budget", "steps"), 5, "budget"),
    "loss": (("loss", "kind"), "l1", "loss"),
    "init": (("init", 0, "source"), "zero", "the first weights"),
    "arguments": (("arguments", "dim"), 8, "the operator's arguments"),
    "operator": (("definition",), "ops.py:Mixer", "the operator"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_a_site_another_is_in_its_key(trained, choice, change):
    path, value, why = CHANGES[change]
    changed = copy.deepcopy(choice.targets)
    for site in changed["sites"]:
        for step in path[:-1]:
            site = site[step]
        site[path[-1]] = value
    found = graftc.verbs.assemble(replace(choice, targets=changed), trained[0])
    assert all(m.why == f"the nearest entry differs in {why}" for m in found.missing)
    assert found.missing


def test_the_seed_of_first_weights_is_in_the_key(trained, choice):
    other = replace(choice, manifest={**choice.manifest, "seed": 1})
    found = graftc.verbs.assemble(other, trained[0])
    assert {m.why for m in found.missing} == {"the nearest entry differs in the first weights"}


def test_a_build_of_other_weights_is_told(trained, tmp_path):
    other = tiny(3)
    with torch.no_grad():
        next(other.module.parameters()).add_(1e-3)
    found = graftc.verbs.assemble(compiled(tmp_path, CHOICE, other), trained[0])
    assert [m.why for m in found.missing] == [
        "the nearest entry differs in the teacher (its code or weights)"
    ] * 2


def test_data_and_noise_are_in_the_key(trained, choice):
    build = choice
    other_data = graftc.verbs.assemble(build, trained[0], tokens(seed=4), task=Noisy())
    other_noise = graftc.verbs.assemble(build, trained[0], tokens(), task=Noisy(0.2))
    for found in (other_data, other_noise):
        assert all("other DATA, or another noise" in m.why for m in found.missing)
    assert graftc.verbs.assemble(build, trained[0], tokens(), task=Noisy()).run is not None


def test_sites_of_two_data_are_not_mixed_unasked(trained, bank, choice):
    build = choice
    distilled(build, data=tokens(seed=4), bank=bank)
    with pytest.raises(GraftError) as raised:
        graftc.verbs.assemble(build, bank)
    (told,) = raised.value.diagnostics
    assert told.code == "G574"
    assert len(told.notes) == 2


def test_of_several_runs_the_one_with_the_lowest_error_is_taken(trained, bank, choice):
    build = choice
    longer = distilled(build, bank=bank, steps=12)
    found = graftc.verbs.assemble(build, bank)
    for site in longer.sites:
        assert found.found[site.name].error <= site.error_end
    left = select(Bank.open(bank), Chosen(not_best=True))
    assert len(left) == 2
    assert all(e.error >= found.found[e.identity.site].error for e in left)


def test_a_pair_is_known_by_what_stands_inside_it(tmp_path):
    """Sites of a later generation are stored as they were, and the inner ones as they were before."""
    inner = f"rule inner {{\nmatch a = self_attention in blocks 1\nreplace a with hyena_x()\n{BUDGET}\n}}\n"
    pair = f"rule pair {{\nmatch a, b = each pair of blocks 0..1\nreplace with parallel(a, b, merge = linear)\n{BUDGET}\n}}\n"
    bank = tmp_path / "bank"
    first = distilled(compiled(tmp_path / "a", inner + pair), bank=bank)
    again = distilled(Build.open(first.path.parents[1]), bank=bank)
    assert all(s.reused for s in again.sites)
    ours, theirs = load_file(again.weights), load_file(first.weights)
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    alone = distilled(compiled(tmp_path / "c", inner), bank=bank)
    assert alone.sites[0].reused


@pytest.mark.parametrize("at", [2, 4])
def test_a_killed_run_is_resumed_with_what_it_took(trained, bank, choice, at):
    Bank.open(bank).remove(select(Bank.open(bank), Chosen(site="blocks.2.attn")))
    build = choice
    with pytest.raises(Killed):
        distilled(build, bank=bank, checkpoint_every=1, progress=killer(at))
    run = graftc.distill(build, tokens(), task=Noisy(), resume="0001-distill")
    assert [(s.steps, bool(s.reused)) for s in run.sites] == [(0, True), (4, False)]
    assert {e.key for e in Bank.open(bank).entries()} <= {
        e.key for e in Bank.open(trained[0]).entries()
    }


def test_two_runs_on_one_build(choice, tmp_path):
    """Each has its own folder; the second finds in the bank what the first stored meanwhile."""
    build, bank = choice, tmp_path / "bank"
    second = []

    def progress(*_):
        if not second:
            second.append(None)
            second.append(distilled(build, bank=bank))

    first = distilled(build, bank=bank, progress=progress)
    assert first.id == "0001-distill"
    assert second[1].id == "0002-distill"
    assert [s.error_end for s in first.sites] == [s.error_end for s in second[1].sites]
    assert len(Bank.open(bank).entries()) == 2


def test_a_full_disk_leaves_no_half_entry_and_a_run_to_resume(choice, tmp_path, monkeypatch):
    bank = tmp_path / "bank"
    save = checkpoint.save_file

    def full(tensors, path, **options):
        if bank in Path(path).parents:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(GraftError) as raised:
        distilled(choice, bank=bank)
    assert raised.value.diagnostics[0].code == "G550"
    assert "nothing is trained twice" in str(raised.value)
    assert not list((bank / "entries").iterdir())
    monkeypatch.undo()
    phases: list[str] = []
    run = graftc.distill(
        choice,
        tokens(),
        task=Noisy(),
        resume="0001-distill",
        progress=lambda *a: phases.append(a[0]),
    )
    assert run.sites[0].steps == 4
    assert phases == []  # it goes on after the last step
    assert len(Bank.open(bank).entries()) == 2


def test_a_damaged_entry_is_refused_and_can_be_pruned(bank, tmp_path, capsys):
    first, second, *_ = Bank.open(bank).entries()
    save_file({"a": torch.ones(1)}, first.path / "weights.safetensors")
    said = yaml.safe_load((second.path / "entry.yaml").read_text())
    said["problem"]["loss"]["kind"] = "l1"
    (second.path / "entry.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(GraftError, match="G572"):
        first.tensors()
    with pytest.raises(GraftError, match="G572"):
        Bank.open(bank).entries()
    main_(["bank", str(bank), "prune", "--damaged"])
    assert "removed 2 entries" in capsys.readouterr().out
    assert len(Bank.open(bank).entries()) == 4


def main_(words: list[str], wanted: int = 0) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert (raised.value.code or 0) == wanted


def test_banks_are_merged_and_conflicts_are_told(trained, bank, tmp_path, capsys):
    other = tmp_path / "other"
    main_(["bank", str(other), "merge", str(bank)])
    assert "6 entries added" in capsys.readouterr().out
    entry = Bank.open(other).entries()[0]
    tensors = {n: t + 1 for n, t in entry.tensors().items()}
    Bank.open(other).remove([entry])
    Bank.open(other).add(entry.identity, tensors, entry.result, entry.source)
    ours = Bank.open(bank).find(entry.key)
    main_(["bank", str(bank), "merge", str(other)], wanted=1)
    said = capsys.readouterr()
    assert "0 entries added, 5 were there, 1 in conflict" in said.out
    assert "other weights under the same key" in said.err
    assert Bank.open(bank).find(entry.key) == ours


def test_the_list_for_people_and_programs(trained, capsys):
    main_(["bank", str(trained[0])])
    assert "6 entries" in capsys.readouterr().out
    main_(["bank", str(trained[0]), "--site", "blocks.1.*", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert [r["site"] for r in rows] == ["blocks.1.attn"] * 3
    assert all(r["result"]["error_end"] <= r["result"]["error_start"] for r in rows)


def test_prune_says_what_it_would_remove(bank, capsys):
    main_(["bank", str(bank), "prune"], wanted=1)
    assert "G577" in capsys.readouterr().err
    main_(["bank", str(bank), "prune", "--operator", "hyena*", "--dry-run"])
    assert "would remove 2 entries" in capsys.readouterr().out
    main_(["bank", str(bank), "prune", "--operator", "hyena*"])
    assert len(Bank.open(bank).entries()) == 4


def test_no_bank_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for create in (False, True):
        with pytest.raises(GraftError, match="G570"):
            Bank.open(tmp_path, create=create)
    made = Bank.open(tmp_path / "new", create=True)
    (made.path / "bank.yaml").write_text("graftc_bank: 9\n")
    with pytest.raises(GraftError, match="G571"):
        Bank.open(made.path)


def test_targets_of_the_first_version_have_no_key(trained, choice):
    build = choice
    old = yaml.safe_load((build.path / "targets.yaml").read_text())
    old["sites"] = [{**s, "definition": ""} for s in old["sites"]]
    with pytest.raises(GraftError, match="G575"):
        graftc.verbs.assemble(replace(build, targets=old), trained[0])
