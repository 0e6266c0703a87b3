"""A Program as one Python file that reads like a person's and needs torch alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from graftc.emit.classes import Class, Tree, build_tree
from graftc.emit.containers import constructor_of_list, list_members
from graftc.emit.describe import docstring
from graftc.emit.dropout import with_dropout
from graftc.emit.forward import Access, Forward, Hints, forward
from graftc.emit.names import Style, clean, stream_name
from graftc.emit.opaque import libraries
from graftc.emit.standalone import CALL, CHECK, LOAD
from graftc.emit.wrap import quoted, wrap
from graftc.program.dropout import told
from graftc.program.program import Program, join, value


def source(
    program: Program, *, provenance: Mapping[str, str] | None = None, made_by: str = ""
) -> str:
    """The text of `model.py`.

    `provenance`: module path → what to say of it in a comment (`hyena @ dit.graft:5`). `made_by` is one
    line for the head of the file. Classes, their order and all names depend on the Program alone.
    Raises GraftError for an operator that is not torch's, or a module that cannot be built again.

    >>> import torch; from graftc.program.capture import capture; from graftc.program.model import Model
    >>> program = capture(Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"input": torch.zeros(2, 4)}))
    >>> [line.strip() for line in source(program).splitlines() if "super().__init__" in line]
    ['super().__init__(nn.Linear(4, 4), nn.ReLU())']
    """
    program, _ = with_dropout(program)
    tree = build_tree(program)
    style = _style(program)
    forwards = _forwards(tree, style)
    root = tree.class_of(program.root)
    assert root is not None
    out: list[str] = []
    for text in tree.foreign.sources.values():
        out += ["", "", text]
    for name, cls in tree.classes.items():
        if cls is root and program.outputs.kind == "named" and _named(program):
            out += ["", "", *_output_class(program)]
        out += [
            "",
            "",
            *_class(tree, cls, forwards.get(name), provenance or {}, style, cls is root),
        ]
    facts = program.facts
    inputs = {p.name: p.shape for p in program.inputs}
    check = CHECK.format(
        inputs=_assigned("INPUTS: dict[str, tuple[int | str, ...]]", inputs),
        absent=_assigned("ABSENT: tuple[str, ...]", tuple(facts.absent)),
        constants=_assigned("CONSTANTS: dict[str, object]", dict(facts.constants)),
    )
    load = LOAD.format(root=root.name, mode=facts.mode)
    body = "\n".join(out)
    return f"{_head(program, tree, root, made_by, body)}{body}\n\n{check}\n{load}"


def _assigned(name: str, literal: Any) -> str:
    return "\n".join(wrap(f"{name} = {quoted(repr(literal))}"))


def _head(program: Program, tree: Tree, root: Class, made_by: str, body: str) -> str:
    facts = program.facts
    original = program.classes.get("", "")
    if original.startswith(("_graftc_user", "__main__")):
        original = original.rpartition(".")[2]
    dynamic = ", ".join(facts.dynamic) or "nothing"
    others = libraries(program)
    lines = [
        f'"""{root.name}.', "",
        *([f"From {original}."] if "." in original else []),
        *([f"{made_by}."] if made_by else []),
        f"Captured in {facts.mode} mode at {facts.dtype}; {dynamic} may vary from call to call.",
        *[f"Note: {note}" for note in facts.notes],
        *([f"In train mode: {dropped}."] if (dropped := told(program)) else []),
        "It needs torch, and safetensors to load its weights: `model = load()`.",
        *[f"And {m}, which registers the operators of {n}." for m, n in others.items()], '"""', "",
        "from __future__ import annotations", "",
    ]  # fmt: skip
    imports = sorted(tree.foreign.imports - {"import torch", "import math"})
    standard = [i for i in imports if "torch" not in i]
    if "math." in body or "import math" in tree.foreign.imports:
        standard.append("import math")
    if program.outputs.kind == "named":
        standard.append("from collections import namedtuple")
    standard += ["from pathlib import Path", "from typing import Any"]
    lines += sorted(standard, key=lambda s: (s.startswith("from"), s))
    lines += ["", "import torch"]
    lines += [i for i in imports if "torch" in i]
    lines += [f"import {m}  # registers torch.ops.{n}" for m, n in others.items()]
    if "F." in body:
        lines.append("import torch.nn.functional as F")
    lines.append("from torch import Tensor, nn")
    return "\n".join(lines) + "\n"


def _style(program: Program) -> Style:
    inputs = tuple(p.name for p in program.inputs)
    sizes: dict[str, str] = {}
    for node in program.root.graph.nodes:
        if node.op != "placeholder":
            continue
        port = next((p for p in program.inputs if p.name == str(node.target)), None)
        shape = getattr(value(node), "shape", ())
        for size, name in zip(shape, port.shape if port else (), strict=False):
            if isinstance(name, str):
                sizes[str(size)] = clean(name)
    return Style(stream_name(inputs), frozenset(inputs), sizes)


def _forwards(tree: Tree, style: Style) -> dict[str, Forward]:
    """Each class's forward, callers first, so that a name is handed down to the callee."""
    made: dict[str, Forward] = {}
    root = tree.class_of(tree.program.root)
    assert root is not None

    def visit(cls: Class, hints: Hints) -> None:
        if cls.name in made or not isinstance(cls.module, fx.GraphModule):
            return
        result = _result(tree.program) if cls is root else None
        access = _access(tree, cls.module)
        made[cls.name] = forward(cls.module.graph, access, style, hints, cls.path, result)
        for target, child_hints in made[cls.name].children.items():
            descend(cls.module.get_submodule(target), child_hints)

    def descend(module: nn.Module, hints: Hints) -> None:
        child = tree.class_of(module)
        if child is not None:
            visit(child, hints)
        elif isinstance(module, fx.GraphModule):  # a chain: its members read what it reads
            first, *rest = [m for _, m in module.named_children()] or [module]
            descend(first, hints) if first is not module else None
            for other in rest:
                descend(other, Hints(("x",)))

    visit(root, Hints())
    for cls in tree.classes.values():  # called by no graph that is printed
        visit(cls, Hints(("x",) * 8))
    return made


def _access(tree: Tree, owner: fx.GraphModule) -> Access:
    paths = {
        str(n.target): tree.access(owner, str(n.target))
        for n in owner.graph.nodes if n.op in ("call_module", "get_attr")
    }  # fmt: skip
    for path, module in owner.named_modules(remove_duplicate=False):
        if path and tree.kinds.get(id(module)) in ("list", "dict"):
            paths[path] = tree.access(owner, path)

    def members(path: str) -> tuple[int, ...]:
        names = list(list_members(owner.get_submodule(path)))
        numbers = tuple(int(n) for n in names if n.isdecimal())
        # A member beside the numbered ones (`3_graft0`): a loop over these is not one over all.
        return numbers if len(numbers) == len(names) else (*numbers, -1)

    def keyed(path: str) -> bool:
        return tree.kinds.get(id(owner.get_submodule(path))) == "dict"

    return Access(paths, members, keyed, _element)


def _element(container: str) -> str:
    """What one member of a list is called: `transformer_blocks` → `block`, `h` → `block`, `net` → `module`."""
    name = clean(container)
    last = name.rpartition("_")[2]
    if last.endswith("s") and len(last) > 3:
        return last[:-1]
    return "block" if name == "h" else last if last != name else "module"


def _result(program: Program) -> Any:
    def wrap_outputs(values: list[ast.expr]) -> ast.expr:
        if program.outputs.kind == "tensor" and len(values) == 1:
            return values[0]
        if program.outputs.kind == "named" and _named(program, len(values)):
            pairs = zip(program.outputs.names, values, strict=True)
            return ast.Call(ast.Name("Output"), [], [ast.keyword(n, v) for n, v in pairs])
        return ast.Tuple(values)

    return wrap_outputs


def _named(program: Program, count: int | None = None) -> bool:
    returned = next(n for n in reversed(program.root.graph.nodes) if n.op == "output").args[0]
    found = len(returned) if isinstance(returned, (tuple, list)) else 1
    return len(program.outputs.names) == (found if count is None else count)


def _output_class(program: Program) -> list[str]:
    names = ", ".join(f'"{n}"' for n in program.outputs.names)
    return wrap(f'Output = namedtuple("Output", [{names}])')


def _class(
    tree: Tree,
    cls: Class,
    made: Forward | None,
    provenance: Mapping[str, str],
    style: Style,
    is_root: bool,
) -> list[str]:
    chain = tree.kinds.get(id(cls.module)) == "list"
    lines = [f"class {cls.name}({'nn.Sequential' if chain else 'nn.Module'}):"]
    doc = docstring(cls, style, is_root)
    init = _init(tree, cls, provenance)
    if doc:
        lines += [f'    """{doc}"""']
    if init:
        begin = [] if chain else ["        super().__init__()"]
        lines += [*([""] if doc else []), "    def __init__(self) -> None:", *begin, *init]
    if is_root:
        lines += CALL.rstrip().splitlines() if init or doc else CALL.strip("\n").splitlines()
    if made is not None:
        parameters = ", ".join(["self", *[f"{p}: Tensor" for p in made.parameters]])
        returns = _annotation(tree.program, cls, is_root)
        if len(lines) > 1:
            lines.append("")
        lines += wrap(f"def forward({parameters}){returns}:", 4)
        for line in made.lines:
            extra = len(line) - len(line.lstrip())
            lines += wrap(quoted(line.strip()), 8 + extra)
    elif not init:
        lines.append("    pass")
    return lines


def _annotation(program: Program, cls: Class, is_root: bool) -> str:
    if is_root and program.outputs.kind == "named" and _named(program):
        return " -> Output"
    assert isinstance(cls.module, fx.GraphModule)
    returned = next(n for n in reversed(cls.module.graph.nodes) if n.op == "output").args[0]
    several = isinstance(returned, (tuple, list))
    if is_root and program.outputs.kind == "tensor":
        several = False
    return " -> tuple[Tensor, ...]" if several else " -> Tensor"


def _init(tree: Tree, cls: Class, provenance: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    module = cls.module
    if tree.kinds.get(id(module)) == "list":
        made = constructor_of_list("", list_members(module), tree.text)
        return wrap(quoted(f"super().__init__({made})"), 8)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        options = "" if parameter.requires_grad else ", requires_grad=False"
        made = f"nn.Parameter({_zeros(parameter)}{options})"
        set_ = (
            f"self.{name} = {made}"
            if name.isidentifier()
            else f'self.register_parameter("{name}", {made})'
        )
        lines += wrap(set_, 8)
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        options = ", persistent=False" if name in module._non_persistent_buffers_set else ""
        lines += wrap(f'self.register_buffer("{name}", {_zeros(buffer)}{options})', 8)
    for name, child in module._modules.items():
        if child is None:
            continue
        text = quoted(tree.text[id(child)])
        set_ = (
            f"self.{name} = {text}" if name.isidentifier() else f'self.add_module("{name}", {text})'
        )
        comment = _comment(cls, name, child, provenance)
        wrapped = wrap(set_, 8)
        if comment and len(wrapped) == 1 and len(wrapped[0]) + len(comment) + 2 <= 96:
            wrapped = [f"{wrapped[0]}  {comment}"]
        elif comment:
            wrapped = [f"        {comment}", *wrapped]
        lines += wrapped
    for first, other in tree.ties.get(cls.path, []):
        left, right = tree.access(module, other), tree.access(module, first)
        lines += wrap(f"{quoted(ast.unparse(left))} = {quoted(ast.unparse(right))}", 8)
    return lines


def _zeros(tensor: Any) -> str:
    shape = ", ".join(map(str, tensor.shape))
    dtype = "" if tensor.is_floating_point() else f", dtype={tensor.dtype}"
    return f"torch.zeros({shape or '()'}{dtype})"


def _comment(cls: Class, name: str, child: nn.Module, provenance: Mapping[str, str]) -> str:
    """What made this child, in every place where this class stands, each said once."""
    said: dict[str, None] = {}
    for path in cls.paths:
        at = join(path, name)
        if at in provenance:
            said[without_folders(provenance[at])] = None
        if not isinstance(child, fx.GraphModule):
            for inner in list(child._modules):
                if join(at, inner) in provenance:
                    said[without_folders(provenance[join(at, inner)])] = None
    return f"# {'; '.join(said)}" if said else ""


def without_folders(text: str) -> str:
    """A place in a file without the folders of one machine."""
    return re.sub(r"(?<!\S)/\S*/", "", text)
