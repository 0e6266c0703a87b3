"""What is measured on whole models, against what the models themselves say; bad data and bad models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.diagnostics import GraftError
from graftc.measures import Measuring, measure
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.tasks import Prepared
from tests.measures.test_attention import Largest


@dataclass(frozen=True)
class AsItIs:
    """A task that gives samples to the model as they are."""

    def prepare(self, sample: dict[str, Tensor], generator: torch.Generator) -> Prepared:
        return Prepared(dict(sample))

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        raise NotImplementedError

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        raise NotImplementedError


TOKENS = 12


def llama(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)  # far from uniform attention
    return module


@pytest.fixture(scope="module")
def words() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (TOKENS,), generator=generator)} for _ in range(6)]


@pytest.fixture(scope="module")
def of_llama(words: list[dict[str, Tensor]]) -> Callable[[str], Analysis]:
    def measured(attention: str) -> Analysis:
        example = torch.stack([words[0]["input_ids"], words[1]["input_ids"]])
        analysis = analyse(capture(Model(llama(attention), {"input_ids": example})))
        return measure(analysis, Measuring(words, AsItIs(), samples=6))

    return measured


def distances() -> Tensor:
    index = torch.arange(TOKENS)
    return (index[:, None] - index).abs()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_as_it_says_itself(
    attention: str, of_llama: Callable[[str], Analysis], words: list[dict[str, Tensor]]
) -> None:
    """Causal, grouped heads, rotary: q and k are those that the attention op reads."""
    analysis = of_llama(attention)
    module = llama("eager")
    outputs: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if name.endswith(("self_attn", "mlp")):
            part.register_forward_hook(
                lambda _, __, out, name=name: outputs.update(
                    {name: out[0] if isinstance(out, tuple) else out}
                )
            )
    with torch.no_grad():
        said = module(
            torch.stack([w["input_ids"] for w in words]),
            output_attentions=True,
            output_hidden_states=True,
        )
    sites = {s.path: s.measured for s in analysis.sites}
    for layer, weights in enumerate(said.attentions):
        found = sites[f"model.layers.{layer}.self_attn"]
        assert found is not None
        for band in (0, 1, 5, 11, 100):
            wanted = weights[..., distances() <= band].sum() / weights.sum()
            assert found.value("locality", band) == pytest.approx(wanted.item(), rel=1e-5)
        for path in (f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"):
            at = sites[path]
            assert at is not None
            assert at.statistics is not None
            assert at.statistics.std == pytest.approx(
                outputs[path].std(correction=0).item(), rel=1e-4
            )
            assert at.statistics.absmax == pytest.approx(outputs[path].abs().max().item(), rel=1e-4)
    states = said.hidden_states
    for layer in range(2):  # the last state is after the final norm
        similar = F.cosine_similarity(states[layer], states[layer + 1], dim=-1).mean().item()
        found = sites[f"model.layers.{layer}"]
        assert found is not None
        assert found.influence == pytest.approx(1 - similar, abs=1e-5)


class Attention(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.form == "linear":
            q, k = F.relu(q), F.relu(k)
            mixed = q @ (k.transpose(-1, -2) @ v) / TOKENS
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None] > 0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), Attention(form)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x), mask)
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """`runs` blocks; one block, run so often, where `shared`."""

    def __init__(self, form: str = "softmax", runs: int = 3, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.runs, self.shared = runs, shared
        self.blocks = nn.ModuleList(Block(form) for _ in range(1 if shared else runs))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for i in range(self.runs):
            x = self.blocks[0 if self.shared else i](x, mask)
        return x


def analysed(module: nn.Module, tokens: int = TOKENS) -> Analysis:
    inputs = {"x": torch.zeros(2, tokens, 16), "mask": torch.ones(2, tokens)}
    return analyse(capture(Model(module, inputs)))


def vectors(count: int = 5, tokens: int = TOKENS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(tokens, 16, generator=generator),
            "mask": (torch.arange(tokens) < tokens - i).float(),
        }
        for i in range(count)
    ]


def dense_locality(net: Net, samples: list[dict[str, Tensor]], band: int) -> list[float]:
    """The definition, written out: [a value for each block]."""
    x, mask = (torch.stack([s[n] for s in samples]) for n in ("x", "mask"))
    found: list[float] = []
    with torch.no_grad():
        for block in net.blocks:
            q, k, _ = block.attn.qkv(block.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2) / 2).masked_fill(mask[:, None, None] == 0, -torch.inf)
            weights = scores.softmax(-1)
            inside = (weights * (distances() <= band)).sum((-1, -2)) / TOKENS
            found.append(inside.mean().item())
            x = block(x, mask)
    return found


def test_a_padding_mask() -> None:
    net, samples = Net(), vectors()
    analysis = measure(analysed(net), Measuring(samples, AsItIs(), samples=5))
    for band in (0, 2, TOKENS, 999):
        found = [
            s.measured.value("locality", band) for s in analysis.of_role("self_attention")
        ]  # fmt: skip
        assert found == pytest.approx(dense_locality(net, samples, band), rel=1e-5)
    assert found == [1.0, 1.0, 1.0]  # exactly: the band holds everything


def test_a_block_that_runs_several_times_is_measured_over_all_runs() -> None:
    one, again = Net(runs=3), Net(runs=3, shared=True)
    for block in one.blocks:
        block.load_state_dict(again.blocks[0].state_dict())
    apart, together = (
        measure(analysed(n), Measuring(vectors(), AsItIs(), samples=5)) for n in (one, again)
    )
    (block,) = [s for s in together.sites if s.role == "block"]
    wanted = [s.measured.influence for s in apart.sites if s.role == "block"]
    assert block.measured.influence == pytest.approx(sum(wanted) / 3, rel=1e-6)
    (attention,) = together.of_role("self_attention")
    local = [s.measured.value("locality", 2) for s in apart.of_role("self_attention")]
    assert attention.measured.value("locality", 2) == pytest.approx(sum(local) / 3, rel=1e-6)


def test_a_pass_makes_nothing_of_n_by_n() -> None:
    tokens = 512
    analysis = analysed(Net(runs=2), tokens)
    on = Measuring([{**s, "mask": torch.ones(tokens)} for s in vectors(2, tokens)], AsItIs(), 2)
    with Largest() as seen:
        measure(analysis, on, ("influence", "statistics"))
    of_the_model = seen.elements
    assert of_the_model < tokens * tokens
    with Largest() as seen:
        measure(analysis, on, ("locality",))
    assert seen.elements <= max(of_the_model, 1 << 22)


def test_more_samples_than_there_are_and_an_iterable() -> None:
    samples = vectors(3)

    class Stream:
        def __iter__(self):
            return iter(samples)

    analysis = analysed(Net())
    sized = measure(analysis, Measuring(samples, AsItIs(), samples=64), ("influence",))
    stream = measure(analysis, Measuring(Stream(), AsItIs(), samples=64), ("influence",))
    assert sized.measured is not None
    assert sized.measured.samples == 3
    for a, b in zip(sized.sites, stream.sites, strict=True):
        assert (a.measured.influence is None) == (a.role != "block")
        if a.role == "block":
            assert a.measured.influence == pytest.approx(b.measured.influence, rel=1e-6)


def values(analysis: Analysis) -> list[Any]:
    """Every figure of every site, for comparison."""
    found: list[Any] = []
    for site in analysis.sites:
        had = site.measured
        assert had is not None
        found += [site.path, had.influence, had.statistics, had.why]
        found.append(None if had.within is None else had.within.tolist())
    return found


def test_the_cache_is_by_content(tmp_path: Path) -> None:
    net, samples = Net(), vectors()
    analysis = analysed(net)

    def on(**changed: Any) -> Measuring:
        return Measuring(**{"data": samples, "task": AsItIs(), "samples": 4, "cache": tmp_path, **changed})  # fmt: skip

    first = measure(analysis, on())
    assert first.measured.cached == ()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3  # one for each family, and no partial file
    again = measure(analysis, on())
    assert again.measured.cached == ("locality", "influence", "statistics")
    assert values(again) == values(first)
    assert measure(analysis, on(), ("influence",)).measured.cached == ("influence",)
    for changed in (on(seed=1), on(samples=5), on(data=samples[1:])):
        assert measure(analysis, changed).measured.cached == ()
    with torch.no_grad():
        net.blocks[1].down.bias[0] += 1e-3
    assert measure(analysis, on()).measured.cached == ()
    assert measure(analysed(Net(runs=2)), on()).measured.cached == ()


def test_a_broken_file_is_said_and_replaced(tmp_path: Path) -> None:
    on = Measuring(vectors(), AsItIs(), 4, cache=tmp_path)
    analysis = analysed(Net())
    first = measure(analysis, on, ("influence",))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for bad in (whole[:40], b"", whole.replace(b'"key"', b'"kez"')):
        file.write_bytes(bad)
        found = measure(analysis, on, ("influence",))
        (note,) = found.measured.notes
        assert (note.code, note.severity) == ("G491", "warning")
        assert values(found) == values(first)
        assert measure(analysis, on, ("influence",)).measured.cached == ("influence",)


def refused(analysis: Analysis, on: Measuring) -> Any:
    with pytest.raises(GraftError) as raised:
        measure(analysis, on)
    return raised.value.diagnostics[0]


def test_a_teacher_that_emits_nan_is_named(tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.blocks[1].down.bias[3] = float("nan")
    analysis = analysed(net)
    found = refused(analysis, Measuring(vectors(), AsItIs(), 4, cache=tmp_path))
    assert (found.code, found.site) == ("G489", "blocks.1.mlp")
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        for block in (net.blocks[1], net.blocks[2]):
            block.down.bias[3] = 3e38  # finite weights, and a sum that is not
    assert refused(analysis, Measuring(vectors(), AsItIs(), 4)).code == "G489"


def test_bad_data() -> None:
    analysis = analysed(Net())

    def code(data: Any, samples: int = 4) -> str:
        return refused(analysis, Measuring(data, AsItIs(), samples)).code

    assert code([]) == "G520"
    assert code(iter(())) == "G523"
    assert code(vectors(), samples=0) == "G493"
    assert code([{"x": torch.zeros(TOKENS, 16)}]) == "G530"
    assert code([{"x": torch.zeros(3, 16), "mask": torch.ones(3)}]) == "G532"
    assert code([*vectors(1), {"x": torch.zeros(3, 16), "mask": torch.ones(3)}]) == "G522"


def test_a_fixed_batch() -> None:
    inputs = {"x": torch.zeros(2, TOKENS, 16), "mask": torch.ones(2, TOKENS)}
    analysis = analyse(capture(Model(Net(), inputs, dynamic={"x": {}})))
    assert [p.shape[0] for p in analysis.program.inputs] == [2, 2]
    found = measure(analysis, Measuring(vectors(5), AsItIs(), 5), ("influence",))
    assert found.measured.samples == 4
    assert refused(analysis, Measuring(vectors(1), AsItIs(), 5)).code == "G495"


def test_a_linear_attention_has_no_locality_and_says_why() -> None:
    analysis = measure(analysed(Net("linear")), Measuring(vectors(), AsItIs(), 4))
    sites = list(analysis.of_role("self_attention"))
    assert len(sites) == 3
    for site in sites:
        assert site.measured.within is None
        assert "no softmax" in site.measured.why["locality"]
