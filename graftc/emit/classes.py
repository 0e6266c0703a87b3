"""The classes of a tree: one for each distinct module, named after the model's own.

Every module is brought to a constructor's text: a layer of torch.nn, a list of such, an operator's
class with its arguments, or the name of a class that is printed. Modules with one text are alike.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graftc.emit.containers import constructor_of_list, is_chain, is_list, list_members
from graftc.emit.foreign import Foreign
from graftc.emit.leaves import ARGUMENTS, captured_leaf, constructor
from graftc.emit.names import RESERVED
from graftc.program.program import Program, join, structure_hash

TAKEN = RESERVED | {
    "Any", "Output", "Path", "Tensor", "check_inputs", "load", "load_weights", "NamedTuple", "annotations",
    "INPUTS", "ABSENT", "CONSTANTS", "CLASS",
}  # fmt: skip


@dataclass
class Class:
    """A class to be printed: its name, one module that it stands for and that module's path."""

    name: str
    module: nn.Module
    path: str
    original: str
    paths: list[str]


@dataclass
class Tree:
    """The module tree as source: constructor text by module, classes in printing order, ties."""

    program: Program
    text: dict[int, str]
    classes: dict[str, Class]
    foreign: Foreign
    kinds: dict[int, str]
    ties: dict[str, list[tuple[str, str]]]

    def class_of(self, module: nn.Module) -> Class | None:
        return self.classes.get(self.text[id(module)].removesuffix("()"))

    def access(self, owner: nn.Module, path: str) -> ast.expr:
        """`self.blocks[0].norm` for `blocks.0.norm` under `owner`."""
        made: ast.expr = ast.Name("self")
        module: Any = owner
        for name in path.split("."):
            kind = self.kinds.get(id(module), "class")
            if kind == "list":
                made = ast.Subscript(made, ast.Constant(int(name)))
            elif kind == "dict":
                made = ast.Subscript(made, ast.Constant(name))
            elif name.isidentifier():
                made = ast.Attribute(made, name)
            else:
                made = ast.Call(ast.Name("getattr"), [made, ast.Constant(name)], [])
            module = getattr(module, name, None)
        return made


def build_tree(program: Program) -> Tree:
    """Every module's constructor; classes are found children first, and named at the end."""
    tree = Tree(program, {}, {}, Foreign(), {}, _ties(program.root))
    groups = _group(program, tree)
    names = _name(program, groups, tree)
    for key, members in groups.items():
        path, module = members[0]
        original = program.classes.get(path, "")
        tree.classes[names[key]] = Class(
            names[key], module, path, original, [p for p, _ in members]
        )
    _write_constructors(program, tree, groups, names)
    return tree


def _needs_class(path: str, module: nn.Module, tree: Tree) -> bool:
    """Whether `module` is printed as a class; else its constructor is written where it stands."""
    if isinstance(module, fx.GraphModule):
        if not path:
            if is_list(module) == "list":
                tree.kinds[id(module)] = "list"
            return True
        if is_chain(module):
            tree.kinds[id(module)] = "list"
            return False
        leaf = captured_leaf(module)
        if leaf is None and is_list(module) == "list":
            tree.kinds[id(module)] = "list"  # a subclass of nn.Sequential with a forward of its own
        return leaf is None
    if type(module) is nn.Module:
        kind = is_list(module)
        if kind:
            tree.kinds[id(module)] = kind
        return kind is None
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        tree.kinds[id(module)] = "list"
    elif isinstance(module, nn.ModuleDict):
        tree.kinds[id(module)] = "dict"
    return False


def _group(program: Program, tree: Tree) -> dict[str, list[tuple[str, nn.Module]]]:
    """Modules that need a class, by structure and original class, children first."""
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    memo: dict[int, str] = {}
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        opaque = not isinstance(module, fx.GraphModule) and type(module) is not nn.Module
        if opaque and not _is_torch_container(module):
            return
        for name, child in module.named_children():
            visit(join(path, name), child)
        if _needs_class(path, module, tree):
            original = program.classes.get(path, "").rpartition(".")[2]
            ties = {
                p[len(path) :]: t
                for p, t in tree.ties.items()
                if p == path or p.startswith(f"{path}.")
            }
            key = f"{original}:{structure_hash(module, memo)}:{ties}:{_details(module)}"
            groups.setdefault(key, []).append((path, module))

    visit("", program.root)
    return groups


def _is_torch_container(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _details(module: nn.Module) -> str:
    """What `structure_hash` does not see and the source says, of a module and all in it.

    Of an operator these are its class and its settings: two may have the same parameters and compute
    different things.
    """
    found: list[Any] = []
    for path, inner in module.named_modules():
        frozen = [n for n, p in inner._parameters.items() if p is not None and not p.requires_grad]
        loose = sorted(inner._non_persistent_buffers_set)
        dtypes = [(n, str(b.dtype)) for n, b in inner._buffers.items() if b is not None]
        found.append((path, frozen, loose, dtypes))
        if not isinstance(inner, fx.GraphModule) and type(inner) is not nn.Module:
            plain = (bool, int, float, str, tuple, type(None))
            settings = {
                k: v for k, v in vars(inner).items() if isinstance(v, plain) and k != "training"
            }
            built = getattr(inner, ARGUMENTS, None)
            found.append((type(inner).__module__, type(inner).__qualname__, settings, built))
    return repr(found)


def _name(
    program: Program, groups: Mapping[str, list[tuple[str, nn.Module]]], tree: Tree
) -> dict[str, str]:
    """A name for each group: the original class's; variants say what they hold."""
    by_base: dict[str, list[str]] = {}
    for key, members in groups.items():
        by_base.setdefault(_base_name(program, *members[0]), []).append(key)
    taken = set(TAKEN)
    names: dict[str, str] = {}
    for base, keys in by_base.items():
        plain = sorted(keys, key=lambda k: (len(_held(groups[k][0][1])), keys.index(k)))
        for key in plain:
            held = _held(groups[key][0][1])
            wanted = f"{base}With{''.join(held)}" if held and len(keys) > 1 else base
            names[key] = _unused(wanted, taken)
            taken.add(names[key])
    for module in program.root.modules():
        if not isinstance(module, fx.GraphModule) and not _from_torch(module):
            tree.foreign.add(type(module), taken)
    return names


def _base_name(program: Program, path: str, module: nn.Module) -> str:
    original = program.classes.get(path, "").rpartition(".")[2]
    if original and original not in (
        "Sequential",
        "ModuleList",
        "ModuleDict",
        "Module",
        "GraphModule",
    ):
        return re.sub(r"\W", "", original)
    words = [w for w in re.split(r"\W|_", path) if w and not w.isdigit()]
    return "".join(w.capitalize() for w in words[-2:]) or "Model"


def _unused(wanted: str, taken: set[str]) -> str:
    if wanted not in taken:
        return wanted
    number = 2
    while f"{wanted}{number}" in taken:
        number += 1
    return f"{wanted}{number}"


def _held(module: nn.Module) -> list[str]:
    """The classes of the operators inside, each once."""
    found: dict[str, None] = {}
    for inner in module.modules():
        pieces = type(inner).__module__ == "graftc.operators.lowering"  # of a written operator
        if not isinstance(inner, fx.GraphModule) and not _from_torch(inner) and not pieces:
            found[type(inner).__name__] = None
    return list(found)


def _from_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _write_constructors(
    program: Program,
    tree: Tree,
    groups: Mapping[str, list[tuple[str, nn.Module]]],
    names: Mapping[str, str],
) -> None:
    class_names = {id(m): names[k] for k, members in groups.items() for _, m in members}

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in tree.text:
            return
        if id(module) in class_names or isinstance(module, fx.GraphModule) or (
            type(module) is nn.Module or _is_torch_container(module)
        ):  # fmt: skip
            for name, child in module.named_children():
                visit(join(path, name), child)
        if id(module) in class_names:
            made = f"{class_names[id(module)]}()"
        elif isinstance(module, fx.GraphModule) and not is_chain(module):
            made = captured_leaf(module) or ""
        elif isinstance(module, fx.GraphModule):
            made = constructor_of_list("nn.Sequential", list_members(module), tree.text)
        elif type(module) is nn.Module or _is_torch_container(module):
            kind = type(module).__name__ if type(module) is not nn.Module else (
                "ModuleDict" if tree.kinds[id(module)] == "dict" else "ModuleList"
            )  # fmt: skip
            made = constructor_of_list(f"nn.{kind}", list_members(module), tree.text)
        elif _from_torch(module):
            made = constructor(module, f"nn.{type(module).__name__}", path)
        else:
            made = constructor(module, tree.foreign.name(type(module)), path)
        tree.text[id(module)] = made

    visit("", program.root)


def _ties(root: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Modules and parameters that stand at two paths: nearest common owner → (first, other), relative."""
    first: dict[int, str] = {}
    shared: list[tuple[str, str]] = []
    inside: list[str] = []
    for path, module in root.named_modules(remove_duplicate=False):
        if any(path == p or path.startswith(f"{p}.") for p in inside):
            continue  # shared as a part of what is shared
        if path and id(module) in first:
            shared.append((first[id(module)], path))
            inside.append(path)
            continue
        first[id(module)] = path
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            at = join(path, name)
            if id(tensor) in first:
                shared.append((first[id(tensor)], at))
            else:
                first[id(tensor)] = at
    ties: dict[str, list[tuple[str, str]]] = {}
    for a, b in shared:
        owner = _common_owner(root, a, b)
        cut = len(owner) + 1 if owner else 0
        ties.setdefault(owner, []).append((a[cut:], b[cut:]))
    return ties


def _common_owner(root: nn.Module, a: str, b: str) -> str:
    """The longest common path whose module is printed as a class with a graph."""
    owner: list[str] = []
    for x, y in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if x != y:
            break
        owner.append(x)
    while owner:
        module = root.get_submodule(".".join(owner))
        if isinstance(module, fx.GraphModule) and not is_chain(module):
            break
        owner.pop()
    return ".".join(owner)


def float_default(tensor: torch.Tensor) -> bool:
    """Whether a tensor's dtype needs no mention: loading gives it the file's own."""
    return tensor.is_floating_point()
