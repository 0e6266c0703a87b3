"""Stage 2's terms and ways: the teacher's output, the sites' outputs, bfloat16, checkpointing, adapters, previews."""

from __future__ import annotations

import copy
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from graftc.diagnostics import GraftError, NotRunError
from graftc.distillation import distill, finetune, finetune_module, from_dict, to_dict
from graftc.distillation.finetune import train_of
from graftc.distillation.pieces import held
from graftc.distillation.preview import Preview, grid, write_png, write_sheet
from graftc.distillation.ranks import ALONE
from graftc.distillation.recompute import blocks_of, recomputed
from graftc.distillation.run import open_run
from graftc.distillation.sources import seeded
from graftc.distillation.targets import Budget, Lora, Only, Stage2
from graftc.distillation.terms import Terms, relative_error
from graftc.tasks import CausalLM
from tests.distillation import tiny

TERMS = Stage2(steps=30, batch=16, lr=5e-3, warmup=4, ema=0.9)
SITES = [tiny.attention_site(i, budget=Budget(steps=5)) for i in (1, 2)]


def build(path, **terms):
    path.mkdir(exist_ok=True)
    return tiny.FakeBuild(path, tiny.targets(*SITES, stage2=replace(TERMS, **terms)))


def run(made, task=None, **options):
    return finetune(made, tiny.latents(), task or tiny.Denoise(), **options)


def log(result):
    return [json.loads(line) for line in (result.path / "log.jsonl").read_text().splitlines()]


def batch():
    made = torch.Generator().manual_seed(9)
    x = torch.randn(64, tiny.TOKENS, tiny.DIM, generator=made)
    return tiny.Made({"x": x, "t": torch.arange(64) * 15})


def distance(student):
    """How far the student's output is from the teacher's."""
    with torch.no_grad():
        return float(relative_error(student(**batch().inputs), tiny.teacher()(**batch().inputs)))


# -- terms ---------------------------------------------------------------------------------------


def test_the_teachers_output_alone_pulls_the_student_to_it(tmp_path):
    made = build(tmp_path, task=0.0, teacher=1.0)
    start = distance(made.student().eval())
    result = run(made)
    plain = build(tmp_path / "plain")
    assert distance(made.student(result.id).eval()) < 0.85 * start
    assert distance(plain.student(run(plain).id).eval()) > start  # the task alone leads elsewhere
    steps = [e for e in log(result) if e["event"] == "step" and "norm" in e]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "loss_start" in result.metrics  # the task's, whatever was trained


def outputs_of(site, model, inputs):
    """What a site returns inside its model, by a hook."""
    found = []
    hook = site.register_forward_hook(lambda _, __, out: found.append(out))
    model(**inputs)
    hook.remove()
    return found[0]


def test_the_terms_add_up_with_their_weights():
    student, teacher = tiny.hyena().eval(), tiny.teacher()
    weights = Stage2(task=0.5, teacher=2.0, features=3.0)
    prepared = tiny.Denoise().prepare({"latent": batch().inputs["x"]}, torch.Generator())
    loss, parts = Terms(
        held(student, ALONE, pieces=False), tiny.Denoise(), weights, teacher=teacher, sites=SITES
    )(prepared)
    assert set(parts) == {"task", "teacher", "features"}
    by_weight = 0.5 * parts["task"] + 2 * parts["teacher"] + 3 * parts["features"]
    torch.testing.assert_close(loss, by_weight)
    torch.testing.assert_close(
        parts["task"], tiny.Denoise().loss(student(**prepared.inputs), prepared)
    )
    torch.testing.assert_close(
        parts["teacher"],
        relative_error(student(**prepared.inputs), teacher(**prepared.inputs)),
    )
    errors = []
    for i in (1, 2):  # each model on its own inputs, by hooks
        seen = []
        for model in (student, teacher):
            seen.append(outputs_of(model.blocks[i].attn, model, prepared.inputs))
        errors.append(relative_error(*seen))
    torch.testing.assert_close(parts["features"], torch.stack(errors).mean())
    loss.backward()
    assert student.blocks[1].attn.in_proj.weight.grad.abs().sum() > 0


def test_the_sites_outputs_alone_train_them(tmp_path):
    made = build(tmp_path, task=0.0, features=1.0, train="inserted")
    result = run(made)
    told = [e["loss"] for e in log(result) if e["event"] == "step" and "loss" in e]
    assert told[-1] < 0.8 * told[0]


def test_several_terms_are_logged_each(tmp_path):
    result = run(build(tmp_path, teacher=0.5, features=0.5), steps=2)
    last = [e for e in log(result) if e["event"] == "step" and "norm" in e][-1]
    assert last["loss"] == pytest.approx(
        last["task"] + 0.5 * last["teacher"] + 0.5 * last["features"], rel=1e-5
    )


def test_the_teacher_given_the_same_stage_2_starts_at_itself(tmp_path):
    made = build(tmp_path, task=0.0, teacher=1.0, features=1.0)
    result = run(made, model="teacher", steps=1)
    assert next(e["loss"] for e in log(result) if e["event"] == "step" and "loss" in e) < 1e-10


@pytest.mark.parametrize(
    ("weights", "given"),
    [
        ({"teacher": 1.0}, {}),
        ({"features": 1.0}, {"teacher": True}),
        ({"task": 0.0}, {}),
    ],
)
def test_terms_that_cannot_be_are_told(weights, given):
    teacher = tiny.teacher() if given else None
    with pytest.raises(GraftError) as raised:
        finetune_module(
            tiny.hyena(),
            tiny.Denoise(),
            tiny.latents(),
            stage2=replace(TERMS, **weights),
            teacher=teacher,
        )
    assert raised.value.diagnostics[0].code == "G553"


def test_a_task_says_how_it_imitates():
    from graftc.tasks import CausalLM, Classification

    tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    task = CausalLM()
    prepared = task.prepare({"input_ids": tokens, "attention_mask": mask}, torch.Generator())
    ours, theirs = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    reference, count = 0.0, 0
    for b, i in ((0, 0), (0, 1), (0, 2), *((1, i) for i in range(5))):
        p, q = theirs[b, i].softmax(-1), ours[b, i].softmax(-1)
        reference, count = reference + float((p * (p / q).log()).sum()), count + 1
    assert float(task.imitate(ours, theirs, prepared)) == pytest.approx(reference / count, rel=1e-5)
    assert float(Classification().imitate(ours[0], ours[0], None)) == pytest.approx(0.0, abs=1e-7)


# -- precision and memory ------------------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path):
    seen = []

    class Watched(tiny.Denoise):
        def loss(self, outputs, prepared):
            seen.append(outputs.dtype)
            return super().loss(outputs, prepared)

    made = build(tmp_path, precision="bfloat16")
    result = run(made, Watched())
    assert set(seen) == {torch.bfloat16}
    assert {w.dtype for w in load_file(result.weights).values()} == {torch.float32}
    assert result.metrics["loss_end"] < 0.9 * result.metrics["loss_start"]


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_checkpointing_changes_no_bit(tmp_path, features):
    whole, again = (
        run(build(tmp_path / name, features=features, checkpointing=on), steps=4)
        for name, on in (("whole", False), ("again", True))
    )
    ours, theirs = load_file(whole.weights), load_file(again.weights)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


def saved_bytes(model):
    """Bytes that autograd keeps between the forward and the backward pass, parameters left out."""
    own = {p.data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = model(**batch().inputs)
    assert kept.requires_grad
    return sum(found.values())


def test_checkpointing_keeps_less():
    model = tiny.teacher().train()
    whole = saved_bytes(model)
    with recomputed(model):
        less = saved_bytes(model)
    assert less < 0.4 * whole
    assert saved_bytes(model) == whole  # and the model is as it was
    assert blocks_of(model) == [f"blocks.{i}" for i in range(tiny.DEPTH)]


def test_a_model_without_blocks_cannot_be_checkpointed():
    with pytest.raises(GraftError) as raised, recomputed(nn.Linear(1, 1)):
        pass
    assert raised.value.diagnostics[0].code == "G554"


# -- adapters ------------------------------------------------------------------------------------


def test_adapters_are_kept_as_peft_reads_them(tmp_path):
    import peft

    made = build(tmp_path, train=Lora(2, 4.0))
    distill(made, tiny.latents(), tiny.Denoise(), batch=16)
    result = run(made)
    folder = result.path / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    start = made.student("0001-distill").eval()  # the adapters' base is the parent run's student
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(start), str(folder)).eval()
    merged = made.student(result.id).eval()
    with torch.no_grad():
        out, wanted, before = (m(**batch().inputs) for m in (loaded, merged, start))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)
    plain = loaded.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-5, atol=1e-6)


def test_without_adapters_there_is_no_folder(tmp_path):
    assert not (run(build(tmp_path), steps=1).path / "adapter").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("all", "all"),
        ("inserted", "inserted"),
        ("lora(8)", Lora(8)),
        ("lora(8, 16)", Lora(8, 16.0)),
    ],
)
def test_what_is_trained_can_be_said_on_the_command_line(tmp_path, text, wanted):
    assert train_of(text, Stage2()) == wanted
    assert train_of("inserted", Stage2(train=Only(("a",)))) == Only(("a",))
    result = run(build(tmp_path), steps=1, train=text)
    assert (result.path / "adapter").exists() == text.startswith("lora")


@pytest.mark.parametrize("text", ["lora", "lora(0)", "some", "lora(8; 2)"])
def test_what_cannot_be_trained_is_told(text):
    with pytest.raises(GraftError) as raised:
        train_of(text, Stage2())
    assert raised.value.diagnostics[0].code == "G556"


# -- previews ------------------------------------------------------------------------------------


class Drawing(tiny.Denoise):
    """Samples are what the model makes of noise, as a picture of one channel."""

    def sample(self, model, *, count, generator, steps=1):
        assert not model.training
        x = torch.randn(count, tiny.TOKENS, tiny.DIM, generator=generator)
        with torch.inference_mode():
            for _ in range(steps):
                x = model(x=x, t=torch.full((count,), 500))
        return x[:, None].clamp(-1, 1).clone()


def test_sheets_of_samples_come_along_the_way(tmp_path):
    from PIL import Image

    made = build(tmp_path / "a", preview=10)
    result = run(made, Drawing())
    folder = result.path / "samples"
    names = [f"step-{i:06d}.png" for i in (0, 10, 20)]
    assert {p.name for p in folder.iterdir()} == {*names, "student.png", "teacher.png"}
    with Image.open(folder / "student.png") as picture:
        assert picture.text["seed"] == "0"
        assert picture.text["step"] == "30"
        pixels = torch.tensor(list(picture.getdata())).reshape(picture.size[::-1])
    student = made.student(result.id).eval()
    expected = grid(Drawing().sample(student, count=16, generator=seeded("preview", 0)))
    assert torch.equal(pixels.to(torch.uint8), expected)
    assert [e["file"] for e in log(result) if e["event"] == "samples"][-1] == "samples/student.png"
    # The same noise each time, and training does not notice.
    again = run(build(tmp_path / "b"), Drawing())
    ours, theirs = load_file(result.weights), load_file(again.weights)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not (again.path / "samples").exists()


def test_a_model_of_language_continues_what_was_held_out(tmp_path):
    """Tokens are written as text: the first half as it was held out, then what the model goes on with."""
    task, length = CausalLM(), 8

    class Next(nn.Module):
        """Of a fixed length, as a capture is; each token is followed by the one after it."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((), 50.0))

        def forward(self, input_ids):
            assert input_ids.shape[1] == length
            return self.scale * nn.functional.one_hot((input_ids + 1) % 20, 20).float()

    data = [{"input_ids": torch.arange(i, i + length) % 20} for i in range(20)]
    with open_run(tiny.FakeBuild(tmp_path, tiny.targets()), "finetune", options={}) as opened:
        finetune_module(
            Next(),
            task,
            data,
            stage2=Stage2(steps=2, batch=4),
            run=opened,
            preview=Preview(1, count=2),
        )
        folder = opened.path / "samples"
        names = {p.name for p in folder.iterdir()}
        lines = (folder / "student.txt").read_text().splitlines()
    assert names == {"step-000000.txt", "step-000001.txt", "student.txt"}
    assert lines[0].startswith("# seed 0, step 2")
    for line in lines[1:]:
        tokens = [int(word) for word in line.split()]
        assert tokens == [(tokens[0] + i) % 20 for i in range(length)]
    task_with_words = types.SimpleNamespace(decode=lambda row: "".join(chr(97 + t) for t in row))
    write_sheet(tmp_path, "w", torch.tensor([[0, 1], [2, 3]]), task_with_words, {"seed": 0})
    assert (tmp_path / "w.txt").read_text() == "# seed 0\nab\ncd\n"


def test_the_sampler_takes_options_and_conditions(tmp_path):
    seen = []

    class Labelled(Drawing):
        label_name, label_key = "y", "label"

        def sample(self, model, *, count, generator, steps=1, labels=None):
            seen.append((count, steps, labels.tolist()))
            return super().sample(model, count=count, generator=generator, steps=steps)

    data = [{**s, "label": torch.tensor(i % 10)} for i, s in enumerate(tiny.latents())]
    made = build(tmp_path)
    finetune(made, data, Labelled(), steps=1, preview=5, preview_options={"steps": 3})
    assert len(seen) == 3  # the student at the start, the teacher, the student at the end
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][:2] == (16, 3)
    assert len(set(seen[0][2])) > 1


@pytest.mark.parametrize(
    ("sample", "code"),
    [(lambda **_: torch.zeros(4, 9), "G555"), (None, "G203")],
)
def test_a_task_that_draws_no_images_is_told_before_training(tmp_path, sample, code):
    task = tiny.Denoise()
    if sample is not None:
        task.sample = lambda model, **given: sample(**given)
    with pytest.raises(GraftError) as raised:
        run(build(tmp_path, preview=5), task)
    assert raised.value.diagnostics[0].code == code


def test_a_picture_of_latents_and_one_of_colours(tmp_path):
    from PIL import Image

    colours = torch.stack([torch.full((4, 4), v) for v in (-1.0, 0.0, 1.0)])[None]
    write_png(tmp_path / "c.png", grid(colours), {"seed": 3})
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.getpixel((10, 10)) == (0, 128, 255)
        assert picture.size == (68, 68)  # drawn larger, with a border
    assert grid(torch.randn(5, 4, 64, 64)).shape == (2 * 66 + 2, 3 * 66 + 2, 3)


def test_a_preview_of_a_bare_module_needs_a_run():
    """Without a run there is nowhere to write to: nothing is drawn, nothing breaks."""
    terms = replace(TERMS, steps=1)
    done = finetune_module(
        tiny.hyena(), tiny.Denoise(), tiny.latents(), stage2=terms, preview=Preview(1)
    )
    assert done.steps == 1


# -- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_shows_the_curves_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = build(tmp_path)
    first = distill(made, tiny.latents(), tiny.Denoise(), batch=16, tensorboard=True)
    second = run(made, steps=4, tensorboard=True)
    for result, name in ((first, "blocks.1.attn"), (second, "loss")):
        events = EventAccumulator(str(result.path / "tensorboard"))
        events.Reload()
        shown = [(e.step, round(e.value, 4)) for e in events.Scalars(name)]
        said = [
            (e["step"], round((e.get("values") or e)[name], 4))
            for e in log(result)
            if e["event"] == "step" and name in (e.get("values") or e)
        ]
        assert [s for s, _ in shown] == [s for s, _ in said]
        assert [v for _, v in shown] == pytest.approx([v for _, v in said], abs=2e-4)
        assert ("bins/blocks.1.attn/0" in events.Tags()["scalars"]) == (result is first)


def test_without_tensorboard_it_is_not_run(tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotRunError) as raised:
        run(build(tmp_path), steps=1, tensorboard=True)
    assert raised.value.exit_code == 3
    assert raised.value.diagnostics[0].code == "G557"
    assert "graftc[tensorboard]" in str(raised.value)


# -- the file ------------------------------------------------------------------------------------


def test_all_of_it_is_in_the_file():
    terms = replace(
        TERMS,
        task=0.5,
        teacher=1.0,
        features=0.25,
        precision="bfloat16",
        checkpointing=True,
        preview=9,
    )
    made = tiny.targets(*SITES, stage2=terms)
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(made)))) == made


@pytest.mark.parametrize(
    ("key", "value"),
    [("precision", "float16"), ("task", 0), ("teacher", -1), ("preview", 0), ("checkpointing", 1)],
)
def test_what_is_wrong_in_it_is_told(key, value):
    plain = to_dict(tiny.targets(*SITES))
    plain["stage2"][key] = value
    with pytest.raises(GraftError) as raised:
        from_dict(plain)
    assert raised.value.diagnostics[0].code == "G502"
    assert raised.value.diagnostics[0].site == f"targets.yaml: stage2.{key}"


def test_a_file_says_it_too():
    from graftc.diagnostics import Source
    from graftc.language.check import check

    rule = "rule r {\n  match b = block in blocks 1\n  skip b\n}\n"

    def said(precision, more):
        given = f"precision = {precision}, checkpointing = true, preview = 100{more}"
        return f"{rule}finetune {{ teacher = 0.5, features = 1, {given} }}\n"

    found = check(Source("a.graft", said("bfloat16", ", task = 0")), {}).finetune
    assert (found.task, found.teacher, found.features) == (0, 0.5, 1)
    assert (found.precision, found.checkpointing, found.preview) == ("bfloat16", True, 100)
    for wrong, code in (
        (said("bf16", ""), "G121"),
        (rule + "finetune { task = 0 }\n", "G122"),
    ):
        with pytest.raises(GraftError) as raised:
            check(Source("a.graft", wrong), {})
        assert raised.value.diagnostics[0].code == code


def test_flags_of_the_command_line_reach_the_engine(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from graftc import verbs
    from graftc.cli.commands import app

    seen = {}

    class Stop(Exception):
        pass

    def noted(directory, data, **options):
        seen.update(options)
        raise Stop

    monkeypatch.setattr(verbs, "finetune", noted)
    words = (
        "finetune DIR -d d.py:f --warmup 3 --ema 0.5 --clip 2 --task-weight 0.5 --teacher-weight 1 --features-weight 2 "
        "--train lora(4) --precision bfloat16 --checkpointing --preview 10 --preview-steps 5 --tensorboard"
    )
    assert isinstance(CliRunner().invoke(app, words.split()).exception, Stop)
    wanted = {
        "warmup": 3, "ema": 0.5, "clip": 2.0, "task_weight": 0.5, "teacher_weight": 1.0, "features_weight": 2.0,
        "train": "lora(4)", "precision": "bfloat16", "checkpointing": True, "preview": 10,
        "preview_options": {"steps": 5}, "tensorboard": True, "device": "cpu",
    }  # fmt: skip
    assert {k: seen[k] for k in wanted} == wanted
