"""Filling an operator's new parameters, and saying where each came from.

`plan_init` needs no weights: names and shapes of a module on the meta device are enough.
`initialise` does the same and writes the values. Both let a rule's `init` clause override the
spec's defaults slot by slot, and both refuse a parameter that neither names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graftc.diagnostics import Span, fail, nearest
from graftc.operators.build import build
from graftc.operators.spec import (
    SITE,
    Apply,
    Arguments,
    OperatorSpec,
    Part,
    Slot,
)
from graftc.weights.assign import Assignment, Clauses, assign, bodies, present, rows_of
from graftc.weights.fit import Fit
from graftc.weights.fresh import seed_of
from graftc.weights.parts import Affine, Heads, SiteParts
from graftc.weights.policies import bias_of
from graftc.weights.sources import (
    Context,
    evaluate,
    missing_part,
    parts_of,
    text,
)
from graftc.weights.whole import evaluate_whole


@dataclass(frozen=True)
class Origin:
    """Where a parameter's first value comes from.

    `slot` is the one that named it; `rows` (start, stop) where it fills only some of the rows.
    `pending`: the value in place is a start, and the last word needs calibration data; `fit` says
    how it is found then. `module` is the submodule that holds the parameter.
    """

    parameter: str
    slot: str
    text: str
    module: str
    rows: tuple[int, int] | None = None
    fit: Fit | None = None

    @property
    def pending(self) -> bool:
        return self.fit is not None


Available = Mapping[str, Collection[str]]
"""The parts of each binding by name; in a mapping, a string as value says why one is not affine."""


def plan_init(
    spec: OperatorSpec,
    arguments: Arguments,
    role: str,
    clauses: Clauses = (),
    available: Available | None = None,
    path: str = "",
    *,
    binding: str = SITE,
    spans: Mapping[str | None, Span] | None = None,
) -> tuple[Origin, ...]:
    """Where each parameter of the operator would come from; needs no weights.

    arguments: resolved. role: whose defaults of the spec apply. clauses: what the rule says.
    available: checked if given; `site`, or `binding`, stands for the site itself. path: the
    operator's place in the student, for messages. spans: of the clauses, by slot.
    Raises GraftError: G401 a parameter that nothing names, G402 an unknown slot, G403 a part that
    the site does not have, G406 least squares for a map that is not the last.

    >>> from graftc.operators.specs import SPECS
    >>> for origin in plan_init(SPECS["token_linear"], {"dim": 8}, "mlp", path="blocks.0.mlp"):
    ...     print(origin.parameter, "|", origin.text, "|", origin.pending)
    proj.weight | least_squares, from product(site.down, site.up) | True
    proj.bias | least_squares, from product(site.down, site.up) | True
    """
    with torch.device("meta"):
        module = build(spec, arguments)
    context = Context(spec.name, arguments, path, binding, {}, {}, 0, known=available or {})
    plan = assign(spec, role, clauses, context, spans or {}, module)
    if available is not None:
        for assignment in plan:
            for part in parts_of(assignment.source):
                _check_part(part, available, replace(context, span=assignment.span))
    return _origins(module, plan, context)


def initialise(
    module: nn.Module,
    spec: OperatorSpec,
    arguments: Arguments,
    role: str,
    clauses: Clauses = (),
    parts: Mapping[str, SiteParts] | None = None,
    path: str = "",
    *,
    heads: Mapping[str, Heads] | None = None,
    binding: str = SITE,
    seed: int = 0,
    spans: Mapping[str | None, Span] | None = None,
) -> tuple[Origin, ...]:
    """Fill the parameters of `module` in place, and say where each came from, as `plan_init` does.

    parts, heads: of every site that a source may read, by binding. With fewer key-value heads in
    the site than in the operator, k and v are repeated. seed: of `random`, together with the
    path. Where an origin is `pending` the value is a start, to be solved when data is there.
    A module and parts on meta check the shapes alone.
    Raises GraftError: also G404 for shapes that do not fit and G405 for a source that cannot be
    computed; the module may then be half filled.
    """
    parts = parts or {}
    context = Context(spec.name, arguments, path, binding, parts, heads or {}, seed, known=parts)
    plan = assign(spec, role, clauses, context, spans or {}, module)
    origins = _origins(module, plan, context)
    whole: dict[int, dict[str, Affine]] = {}
    drawn = spec.user is not None and not _on_meta(module)
    if drawn:
        _as_constructed(module, spec, context)
    with torch.no_grad():
        for item in plan:
            here = replace(context, span=item.span)
            if drawn and item.span is None:
                continue  # its constructor's own values stand
            if item.slot.parameter is not None:
                _fill_constant(module, item, here)
                continue
            submodule = module.get_submodule(item.slot.module)
            if item.whole:
                key = id(item.source)
                if key not in whole:
                    slots = {
                        s.name: (s.module, module.get_submodule(s.module))
                        for s in bodies(present(spec, arguments))
                        if s.parameter is None
                    }
                    whole[key] = evaluate_whole(item.source, here, slots)
                value = whole[key][item.slot.name]
            else:
                value = evaluate(item.source, here, submodule, item.slot.module)
            _fill(submodule, item, value, here)
    return origins


def _on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def _as_constructed(module: nn.Module, spec: OperatorSpec, context: Context) -> None:
    """Every parameter and buffer as the user's constructor draws it from the seed and the path."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed_of(context.seed, context.path))
        made = build(spec, context.arguments)
    with torch.no_grad():
        for ours, own in ((module.named_parameters(), made.get_parameter),
                          (module.named_buffers(), made.get_buffer)):  # fmt: skip
            for name, tensor in ours:
                tensor.copy_(own(name))


def _targets(module: nn.Module, slot: Slot) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a slot, by their short names."""
    submodule = module.get_submodule(slot.module)
    for name, parameter in submodule.named_parameters(recurse=False):
        if slot.parameter is None or slot.parameter == name:
            yield name, parameter


def _origins(module: nn.Module, plan: list[Assignment], context: Context) -> tuple[Origin, ...]:
    """One line for each parameter, or part of one; G401 where a parameter has no source."""
    lines: dict[str, list[Origin]] = {name: [] for name, _ in module.named_parameters()}
    sizes = {name: p.shape[0] if p.ndim else 1 for name, p in module.named_parameters()}
    for item in plan:
        for short, parameter in _targets(module, item.slot):
            name = f"{item.slot.module}.{short}" if item.slot.module else short
            total = parameter.shape[0] if parameter.ndim else 1
            rows = rows_of(item.slot, total, context.arguments)
            said = text(item.source, context.binding)
            if item.fit is not None and item.fit.policy not in ("svd", "keep_top"):
                source = item.source
                if isinstance(source, Apply) and source.policy == "least_squares":
                    source = source.options.get("otherwise", Apply("zero"))
                said = f"least_squares, from {text(source, context.binding)}"
            lines[name].append(Origin(name, item.slot.name, said, item.slot.module, rows, item.fit))
    bare = [n for n, found in lines.items() if not _complete(found, sizes[n])]
    if bare:
        names = ", ".join(f"`{n}`" for n in bare)
        fail(
            "G401",
            f"nothing says where {names} of `{context.operator}` comes from",
            site=context.path,
            help=f"write `init {bare[0].rpartition('.')[0] or bare[0]} = …`"
            " (random(0), zero, a part of the site, …)",
        )
    return tuple(origin for found in lines.values() for origin in found)


def _complete(found: list[Origin], total: int) -> bool:
    if any(o.rows is None for o in found):
        return True
    covered = {i for o in found if o.rows for i in range(*o.rows)}
    return len(covered) == total


def _fill(submodule: nn.Module, item: Assignment, value: Affine, context: Context) -> None:
    """Write a slot's weight and bias; G404 where they do not fit."""
    slot = item.slot
    for name, parameter in submodule.named_parameters(recurse=False):
        new = value.weight if name == "weight" else bias_of(value)
        target: Tensor = parameter
        rows = rows_of(slot, parameter.shape[0], context.arguments)
        if rows is not None:
            target = parameter[slice(*rows)]
            # `random`, `zero` and the like give the whole submodule: take the slot's rows.
            if new.shape == parameter.shape and isinstance(item.source, Apply):
                new = new[slice(*rows)]
        if new.shape != target.shape:
            said = text(item.source, context.binding)
            fail(
                "G404",
                f"`{said}` does not fit `{slot.name}` of `{context.operator}`",
                span=context.span,
                site=context.path,
                wanted=f"{name} {list(target.shape)}",
                found=f"{name} {list(new.shape)}",
                help=_pooled(item, context),
            )
        target.copy_(new)
    if value.bias is not None and "bias" not in dict(submodule.named_parameters(recurse=False)):
        context.refuse(
            "G404",
            f"the source of `{slot.name}` has a bias, and `{context.operator}` has no place for it",
        )


def _pooled(item: Assignment, context: Context) -> str | None:
    """How k or v of a site with more key-value heads than the operator's becomes that of fewer."""
    source, wanted = item.source, context.arguments.get("kv_heads")
    if not isinstance(source, Part) or source.name is None or not isinstance(wanted, int):
        return None
    heads = context.heads.get(context.name(source.site))
    if source.name.rstrip("_12") not in ("k", "v") or heads is None or heads.kv_heads <= wanted:
        return None
    named = text(source, context.binding)
    return f"write `{item.slot.name} = mean_pool({named}, groups = {wanted})`"


def _fill_constant(module: nn.Module, item: Assignment, context: Context) -> None:
    """A parameter of the operator itself: `constant(argument)`, `zero`, or `random` as built."""
    source = item.source
    parameter = module.get_submodule(item.slot.module).get_parameter(str(item.slot.parameter))
    if isinstance(source, Apply) and source.policy == "zero":
        parameter.zero_()
        return
    if isinstance(source, Apply) and source.policy == "random":
        parameter.copy_(_as_built(module, item, context))
        return
    value = None
    if isinstance(source, Apply) and source.policy == "constant":
        value = context.arguments.get(text(source.args[0]))
    if not isinstance(value, (int, float)):
        context.refuse(
            "G405", f"`{text(source)}` gives no value for `{item.slot.name}`", "write `zero`"
        )
    parameter.fill_(value)


def _as_built(module: nn.Module, item: Assignment, context: Context) -> Tensor:
    """What the operator's own constructor draws for a parameter, from the seed and the path."""
    if _on_meta(module):
        return module.get_submodule(item.slot.module).get_parameter(str(item.slot.parameter))
    arguments = getattr(module, "graft_arguments", context.arguments)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        seed = context.seed
        if isinstance(item.source, Apply) and "seed" in item.source.options:
            seed = int(text(item.source.options["seed"]))
        torch.default_generator.manual_seed(seed_of(seed, f"{context.path}.{item.slot.name}"))
        made = type(module)(**arguments)
    return made.get_submodule(item.slot.module).get_parameter(str(item.slot.parameter)).detach()


def _check_part(part: Part, available: Available, context: Context) -> None:
    binding = context.name(part.site)
    if binding not in available:
        near = nearest(binding, available)
        context.refuse(
            "G403",
            f"`{binding}` is no site of this rule with weights to read",
            f"write `{near}`" if near else None,
        )
    names = available[binding]
    if part.name is None:
        return
    if part.name not in names:
        missing_part(binding, part.name, tuple(names), context)
    why = names[part.name] if isinstance(names, Mapping) else None
    if isinstance(why, str):
        context.refuse(
            "G403",
            f"`{binding}.{part.name}` is no affine map, which init of `{context.operator}` reads:"
            f" {why}",
            "give the slot another source in `init`",
        )
