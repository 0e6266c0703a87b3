"""Blocks that repeat are traced once, and nobody can tell."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graftc.program.capture import _capture, capture
from graftc.program.model import Model
from graftc.program.program import graphs
from graftc.program.repeats import NotShared
from tests.models.case import Case
from tests.models.zoo import CASES


class Block(nn.Module):
    """A residual MLP that counts how often its class runs."""

    runs = 0

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.index = scale, -1
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        Block.runs += 1
        return x + self.scale * self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def agrees(module: nn.Module, *shape: int) -> None:
    x = torch.randn(*shape)
    program = capture(Model(module, {"x": torch.randn(*shape)}))
    torch.testing.assert_close(program.root(x)[0], module(x), rtol=0, atol=0)


def test_five_equal_blocks_run_once() -> None:
    module = Stack([Block() for _ in range(5)])
    for i, block in enumerate(module.blocks):
        block.index = i  # type: ignore[assignment]
    Block.runs = 0
    program = capture(Model(module, {"x": torch.randn(3, 4)}))
    assert Block.runs == 1  # `index` differs, and nobody reads it
    assert [p for p, _ in graphs(program.root) if p.count(".") == 1] == [
        f"blocks.{i}" for i in range(5)
    ]
    for i in range(5):
        ours = program.root.get_submodule(f"blocks.{i}.up").weight
        assert ours is module.blocks[i].up.weight  # type: ignore[union-attr]
    agrees(module, 3, 4)


def test_an_attribute_that_forward_reads_tells_blocks_apart() -> None:
    module = Stack([Block(1.0), Block(2.0), Block(1.0), Block(2.0)])
    Block.runs = 0
    capture(Model(module, {"x": torch.randn(3, 4)}))
    assert Block.runs == 2
    agrees(module, 3, 4)


class Remembers(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0) + self.down(torch.relu(self.up(x)))


class Appends(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class Looks(Block):
    """Reads its attributes through `vars`, where one differs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * vars(self)["index"]


class Processor:
    def __init__(self, gain: float) -> None:
        self.gain = gain

    def __call__(self, block: Block, x: Tensor) -> Tensor:
        return block.down(torch.relu(block.up(x))) * self.gain


class Delegates(Block):
    """As diffusers' attention: what it does is in an object beside it."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.processor = Processor(gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.processor(self, x)


class Asks(Block):
    """Does something else where it is not itself."""

    def forward(self, x: Tensor) -> Tensor:
        same = type(self) is Asks and self.__class__ is Asks
        return super().forward(x) * (2.0 if same else 3.0)


class Reaches(Block):
    """Uses a value that is not its input."""

    outside: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.outside[-1]


class Feeds(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            Reaches.outside.append(torch.sin(x))
            x = block(x)
        return x


def hooked() -> Stack:
    module = Stack([Block() for _ in range(3)])
    module.blocks[1].register_forward_hook(lambda m, args, out: out * 3)
    return module


def indexed() -> Stack:
    module = Stack([Looks() for _ in range(3)])
    for i, block in enumerate(module.blocks):
        block.index = i + 2  # type: ignore[assignment]
    return module


def twice() -> Stack:
    block = Block()
    return Stack([block, Block(), block])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stack([Remembers() for _ in range(3)]),
        lambda: Stack([InPlace() for _ in range(3)]),
        lambda: Stack([Appends() for _ in range(3)]),
        lambda: Stack([Delegates(g) for g in (1.0, 1.0, 2.0)]),
        lambda: Stack([Asks() for _ in range(3)]),
        lambda: Feeds([Reaches() for _ in range(3)]),
        hooked,
        indexed,
        twice,
    ],
    ids=[
        "state",
        "in place",
        "appends",
        "processor",
        "its own class",
        "outside value",
        "hook",
        "vars",
        "twice",
    ],
)
def test_blocks_that_differ_out_of_sight_are_told_apart(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make()
    x = torch.randn(3, 4)
    wanted = module(x.clone())
    program = capture(Model(module, {"x": torch.randn(3, 4)}))
    torch.testing.assert_close(program.root(x.clone())[0], wanted, rtol=0, atol=1e-6)


def test_what_tracing_changed_is_put_back() -> None:
    module = Stack([Block() for _ in range(3)])
    before: list[Any] = [(type(m), dict(vars(m))) for m in module.modules()]
    capture(Model(module, {"x": torch.randn(3, 4)}))
    after: list[Any] = [(type(m), dict(vars(m))) for m in module.modules()]
    assert [c for c, _ in after] == [c for c, _ in before]
    assert [list(v) for _, v in after] == [list(v) for _, v in before]
    assert "__getattribute__" not in vars(nn.Module)


def computed(root: fx.GraphModule) -> object:
    """What a tree computes: each value as the operation and the values that it comes of.

    Sizes stand as what they are, since one size can be read off several tensors.
    """

    def run(path: str, module: fx.GraphModule, given: list[object]) -> Any:
        values: dict[fx.Node, Any] = {}
        rest = iter(given)
        for node in module.graph.nodes:
            args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            size = node.meta.get("val")
            if node.op == "placeholder":
                values[node] = next(rest)
            elif node.op == "get_attr":
                values[node] = f"{path}.{node.target}"
            elif node.op == "output":
                return args[0][0]
            elif isinstance(size, torch.SymInt) or node.target is torch.ops.aten.sym_size.int:
                values[node] = "a size" if size is None else str(size)
            elif node.op == "call_module" and isinstance(
                inner := module.get_submodule(str(node.target)), fx.GraphModule
            ):
                values[node] = run(f"{path}.{node.target}", inner, args[0])
            elif node.target is operator.getitem and isinstance(args[0][0], (tuple, list)):
                values[node] = args[0][0][args[0][1]]
            else:
                text = repr((path if node.op == "call_module" else "", node.target, args))
                values[node] = hashlib.sha256(text.encode()).hexdigest()
        raise AssertionError("a graph without output")

    return run("", root, [n.name for n in root.graph.nodes if n.op == "placeholder"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if "Lumina2" not in c.name], ids=lambda c: c.name
)
def test_every_model_of_the_matrix_is_captured_alike(case: Case) -> None:
    try:
        shared = _capture(case.build(), share=True)
    except NotShared as reason:
        pytest.skip(f"traced block by block: {reason}")
    alone = _capture(case.build(), share=False)
    assert computed(shared.root) == computed(alone.root)
    names = [sorted((n, t.shape) for n, t in p.root.state_dict().items()) for p in (shared, alone)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["transformers Gemma 3", "U-ViT", "diffusers PixArt"])
def test_real_models_compute_what_they_did(name: str) -> None:
    model = next(c for c in CASES if c.name == name).build()
    program = capture(model)
    with torch.no_grad():
        theirs = model.module(**model.inputs)
        tensors = {k: v for k, v in model.inputs.items() if isinstance(v, Tensor)}
        ours = program.root(*(tensors[p.name] for p in program.inputs))
    ours = ours if isinstance(ours, Tensor) else ours[0]
    theirs = theirs if isinstance(theirs, Tensor) else theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
