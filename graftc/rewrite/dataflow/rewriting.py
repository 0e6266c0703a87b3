"""A region rewritten, on a copy of the tree: modules opened, new ops in, what they replace out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graftc.diagnostics import GraftError, Span, fail
from graftc.language.rules import NewParameter, Rewrite, Rule, SiteTerm
from graftc.program.dropout import hand_over
from graftc.program.flat import Op
from graftc.program.program import ATEN, Program, join, value
from graftc.program.roles import MOVEMENTS
from graftc.rewrite.dataflow.lower import Lowering
from graftc.rewrite.dataflow.region import Argument, Place, Region, path_in
from graftc.rewrite.dataflow.select import tensor_text


@dataclass
class Opening:
    """Modules opened so far in one application: where their nodes are now."""

    root: fx.GraphModule
    moved: dict[tuple[str, str], tuple[str, fx.Node]] = field(
        default_factory=dict[tuple[str, str], tuple[str, fx.Node]]
    )
    gone: set[str] = field(default_factory=set[str])

    def node(self, place: Place) -> fx.Node:
        """A node of the original Program, wherever it is now."""
        found = self.moved.get((place.graph, place.node))
        if found is not None:
            return found[1]
        module = self.root.get_submodule(place.graph)
        assert isinstance(module, fx.GraphModule)
        return next(n for n in module.graph.nodes if n.name == place.node)

    def open(self, path: str, host: str) -> None:
        """Puts the nodes of the module at `path` in place of its call; its parameters keep their names."""
        if path in self.gone:
            return
        holder = self.root.get_submodule(host)
        inner = self.root.get_submodule(path)
        assert isinstance(holder, fx.GraphModule)
        assert isinstance(inner, fx.GraphModule)
        target = path_in(host, path)
        (call,) = (n for n in holder.graph.nodes if n.op == "call_module" and n.target == target)
        new: dict[fx.Node, Any] = {}
        given = iter(call.args)
        returned: Any = None
        with holder.graph.inserting_before(call):
            for node in inner.graph.nodes:
                if node.op == "placeholder":
                    new[node] = next(given)
                elif node.op == "output":
                    returned = fx.map_arg(node.args[0], lambda n: new[n])
                else:
                    copied = holder.graph.node_copy(node, lambda n: new[n])
                    copied.meta = dict(node.meta)
                    if node.op in ("get_attr", "call_module"):
                        copied.target = f"{target}.{node.target}"
                    new[node] = copied
        back = {node: key for key, (where, node) in self.moved.items() if where == path}
        for node, copied in new.items():
            if isinstance(copied, fx.Node) and node.op != "placeholder":
                key = back.get(node, (path, node.name))
                self.moved[key] = (host, copied)
        _replace_call(call, returned)
        self.gone.add(path)


def _replace_call(call: fx.Node, returned: Any) -> None:
    if isinstance(returned, fx.Node):
        call.replace_all_uses_with(returned)
    else:
        for user in list(call.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(returned[user.args[1]])
            user.graph.erase_node(user)
    call.graph.erase_node(call)


@dataclass(frozen=True)
class Written:
    """What a rewrite made: the parameters by FQN, with the text of their source."""

    parameters: Mapping[str, str]


def rewrite_region(
    opening: Opening, rule: Rule, region: Region, origin: str, on_meta: bool
) -> Written:
    """Rewrites one region in place. Raises GraftError where the new ops do not fit."""
    edit = rule.edit
    assert isinstance(edit, Rewrite)
    for path in region.opened:
        opening.open(path, region.host)
    host = opening.root.get_submodule(region.host)
    assert isinstance(host, fx.GraphModule)
    graph = host.graph
    _check_functional(rule, graph, region)
    names: dict[str, Any] = {n: _current(opening, v) for n, v in region.outside.items()}
    names |= {n: opening.node(p) for n, p in region.results.items()}
    names |= {n: opening.node(p) for n, (p, _) in region.sites.items()}
    anchor = _after_inputs(graph, names)
    mark = (rule.name, origin, region.name)
    written: dict[str, str] = {}
    with graph.inserting_before(anchor):
        for new in edit.new:
            names[new.name] = _parameter(host, region, new, opening.root, rule, on_meta, written)
        lowering = Lowering(
            emit=lambda target, args, kwargs, span: _emit(
                graph, target, args, kwargs, span, mark, region
            ),
            names=names,
            is_tensor=lambda v: isinstance(v, fx.Node),
            site=lambda term, args: _site(opening, region, graph, term, args, mark),
        )
        replaced: dict[str, fx.Node] = {}
        for statement in edit.statements:
            made = lowering.term(statement.value)
            if len(statement.targets) > 1:
                made = _parts(graph, made, len(statement.targets), statement.span, mark, region)
            else:
                made = (made,)
            for target, item in zip(statement.targets, made, strict=True):
                if target.name in edit.outputs:
                    if not isinstance(item, fx.Node):
                        fail("G384", f"`{target.name}` would become a number", span=statement.span)
                    replaced[target.name] = item
                else:
                    names[target.name] = item
    for name, node in replaced.items():
        _check_same(rule, region, name, opening.node(region.results[name]), node)
    olds = {opening.node(region.results[name]): node for name, node in replaced.items()}
    for old, node in olds.items():
        hand_over(old, node)
        old.replace_all_uses_with(node, delete_user_cb=lambda user: user.meta.get("graft") != mark)
        _loosen_views(old, node)
    for place in reversed(region.gone):
        node = opening.node(place)
        if not node.users:
            graph.erase_node(node)  # not left to dead-code elimination: dropout counts as impure
    if anchor.op == "call_function" and anchor.target is _marker:
        graph.erase_node(anchor)
    sort_graph(graph)
    return Written(written)


def _marker() -> None:
    """Stands where new nodes are put, until they are there."""


def _current(opening: Opening, what: Any) -> Any:
    if isinstance(what, tuple):
        return tuple(_current(opening, w) for w in what)  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(what, Argument):
        return what
    node = opening.node(what.reader)
    at: Any = node.kwargs if what.keyword else node.args
    for step in what.way:
        at = at[step]
    return at


def _after_inputs(graph: fx.Graph, names: Mapping[str, Any]) -> fx.Node:
    """A marker after everything that the rewrite may read."""
    known: set[fx.Node] = set()
    fx.map_arg(tuple(names.values()), lambda n: known.add(n) or n)
    last = max(known, key={n: i for i, n in enumerate(graph.nodes)}.__getitem__)
    while last.next.op == "placeholder":
        last = last.next
    with graph.inserting_after(last):
        return graph.call_function(_marker)


def _check_functional(rule: Rule, graph: fx.Graph, region: Region) -> None:
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            fail(
                "G383",
                f"`{node.name}` changes a value in place; the ops around it cannot be reordered",
                span=rule.edit.span,
                site=region.host,
                help="write it in the model without the in-place op",
            )


def _emit(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    span: Span,
    mark: tuple[str, str, str],
    region: Region,
) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["graft"] = mark
    _propagate(node, span, region)
    return node


def _propagate(node: fx.Node, span: Span, region: Region) -> None:
    """The shape of a new node, from those of what it reads. Raises GraftError where they do not fit."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: value(n))
    fake = next((m for m in map(_fake_mode, _leaves((args, kwargs))) if m is not None), None)
    try:
        if fake is None:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            with fake:
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(
            tensor_text(t) for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        )
        fail(
            "G384",
            f"`{span.text}` does not take these values: {str(error).splitlines()[0][:200]}",
            span=span,
            site=region.name,
            found=shapes,
        )


def _fake_mode(leaf: Any) -> Any:
    return getattr(leaf, "fake_mode", None)


def _leaves(value_: Any) -> list[Any]:
    if isinstance(value_, (tuple, list)):
        return [leaf for v in value_ for leaf in _leaves(v)]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value_, Mapping):
        return [leaf for v in value_.values() for leaf in _leaves(v)]  # pyright: ignore[reportUnknownVariableType]
    return [value_]


def _parts(
    graph: fx.Graph, made: Any, count: int, span: Span, mark: tuple[str, str, str], region: Region
) -> tuple[Any, ...]:
    if isinstance(made, tuple):
        found: tuple[Any, ...] = made  # pyright: ignore[reportUnknownVariableType]
        size = len(found)
    else:
        whole = value(made) if isinstance(made, fx.Node) else None
        size = len(whole) if isinstance(whole, (tuple, list)) else 1  # pyright: ignore[reportUnknownArgumentType]
        found = ()
    if size != count:
        fail(
            "G384",
            f"{count} names for {size} values",
            span=span,
            site=region.name,
            wanted=f"{size} names",
        )
    return found or tuple(
        _emit(graph, operator.getitem, (made, i), {}, span, mark, region) for i in range(count)
    )


def _site(
    opening: Opening,
    region: Region,
    graph: fx.Graph,
    term: SiteTerm,
    args: tuple[Any, ...] | None,
    mark: tuple[str, str, str],
) -> fx.Node:
    """A site's output as it is, or its module called on other values; inputs not given stay."""
    if term.binding not in region.sites:
        fail("G375", f"`{term.binding}` is not in the pattern", span=term.span)
    place, stream = region.sites[term.binding]
    call = opening.node(place)
    if args is None:
        return call
    others = [a for i, a in enumerate(call.args) if i != stream]
    given = [*args, *others[len(args) - 1 :]]
    given.insert(stream, given.pop(0))
    node = graph.call_module(str(call.target), tuple(given))
    node.meta["val"] = value(call)
    node.meta["graft"] = mark
    return node


def _loosen_views(old: fx.Node, new: fx.Node) -> None:
    """A `view` needs the strides that it was traced with; where they change it becomes a `reshape`."""
    before, after = value(old), value(new)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return
    if tuple(map(str, before.stride())) == tuple(map(str, after.stride())):
        return
    stack, seen = list(new.users), set[fx.Node]()
    while stack:
        user = stack.pop()
        if user in seen or (user.target not in MOVEMENTS and user.target is not operator.getitem):
            continue
        seen.add(user)
        if user.target is ATEN.view.default:
            user.target = ATEN.reshape.default
        stack += user.users


def _check_same(rule: Rule, region: Region, name: str, old: fx.Node, new: fx.Node) -> None:
    """A new value must have the old one's shape and dtype: its users were made for them."""
    before, after = value(old), value(new)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return
    if tensor_text(before) != tensor_text(after):
        fail(
            "G384",
            f"rule `{rule.name}` gives `{name}` another shape or dtype",
            span=rule.edit.span,
            site=region.name,
            wanted=tensor_text(before),
            found=tensor_text(after),
        )


def _parameter(
    host: fx.GraphModule,
    region: Region,
    new: NewParameter,
    root: fx.GraphModule,
    rule: Rule,
    on_meta: bool,
    written: dict[str, str],
) -> fx.Node | None:
    """Computes a new parameter in float64 from the parameters it is made of, and reads it."""
    tensor = new_tensor(new, region, root, on_meta)
    if tensor is None:
        return None
    number = 0
    while hasattr(host, f"{new.name}_graft{number}"):
        number += 1
    name = f"{new.name}_graft{number}"
    host.register_parameter(name, nn.Parameter(tensor))
    written[join(region.host, name)] = new.value.span.text
    node = host.graph.get_attr(name)
    node.meta["graft"] = (rule.name, str(new.span), region.name)
    like = next((value(n) for n in host.graph.nodes if _fake_mode(value(n)) is not None), None)
    if like is None:
        node.meta["val"] = tensor.to("meta")
    else:
        with like.fake_mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.device)
    return node


def new_tensor(
    new: NewParameter, region: Region, root: fx.GraphModule, on_meta: bool
) -> torch.Tensor | None:
    """The value of a new parameter: in float64, then in the dtype of what it is made of; None where that is absent."""
    names: dict[str, Any] = {}
    sources: list[torch.Tensor] = []
    for name, what in region.outside.items():
        if name in region.parameters:
            path, _, leaf = region.parameters[name].rpartition(".")
            tensor: torch.Tensor = getattr(root.get_submodule(path), leaf).detach()
            sources.append(tensor)
            names[name] = (tensor.to("meta") if on_meta else tensor).to(torch.float64)
        elif not isinstance(what, (Argument, tuple)):
            names[name] = what

    def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], span: Span) -> Any:
        try:
            return target(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            fail(
                "G385",
                f"`{span.text}` does not take these parameters: {str(error).splitlines()[0][:200]}",
                span=span,
                site=region.name,
            )

    def no_site(term: SiteTerm, args: Any) -> Any:
        fail(
            "G385", "a new parameter is made of parameters, not of a site's output", span=term.span
        )

    try:
        lowering = Lowering(emit, names, lambda v: isinstance(v, torch.Tensor), no_site, True)
        made = lowering.term(new.value)
    except GraftError as error:
        if error.diagnostics[0].code != "G375":
            raise
        fail(
            "G385",
            f"`{new.name}` is made of a value that is no parameter",
            span=new.span,
            site=region.name,
            wanted="weights and numbers of the pattern",
            help="add `where … is parameter`",
        )
    if made is None:
        return None
    if not isinstance(made, torch.Tensor):
        fail("G385", f"`{new.name}` would be no tensor", span=new.span, found=repr(made))
    if not sources:
        fail("G385", f"`{new.name}` is made of no parameter", span=new.span)
    return made.to(sources[0].dtype).contiguous()


def sort_graph(graph: fx.Graph) -> None:
    """Puts every node after what it reads, keeping the order otherwise."""
    nodes = list(graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    if all(order[s] < order[n] for n in nodes for s in n.all_input_nodes):
        return
    placed: set[fx.Node] = set()
    sorted_nodes: list[fx.Node] = []
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            waiting = [s for s in node.all_input_nodes if s not in placed]
            if node in placed:
                stack.pop()
            elif waiting:
                stack += sorted(waiting, key=order.__getitem__, reverse=True)
            else:
                placed.add(node)
                sorted_nodes.append(node)
                stack.pop()
    for node in sorted_nodes:
        graph._root.prepend(node)


def new_nodes(student: Program, region: Region) -> list[fx.Node]:
    """The nodes of a student that a region became."""
    host = student.root.get_submodule(region.host)
    assert isinstance(host, fx.GraphModule)
    return [n for n in host.graph.nodes if n.meta.get("graft", ("", "", ""))[2] == region.name]


def gone_ops(region: Region) -> list[Op]:
    """The ops that a region takes away."""
    pattern = region.occurrence.pattern
    indices = sorted((pattern.inner | pattern.written) - pattern.read)
    return [region.occurrence.values[i] for i in indices]
