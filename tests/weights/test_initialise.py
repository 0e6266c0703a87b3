"""First weights of every operator from a teacher's attention or MLP, and every refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graftc.diagnostics import GraftError, Source, Span
from graftc.operators.build import build
from graftc.operators.spec import Apply, Const, Part, holds
from graftc.operators.specs import MERGES, SPECS
from graftc.weights.fit import WIDEST, Block
from graftc.weights.initialise import initialise, plan_init
from graftc.weights.parts import Affine, Heads

DIM, HEADS, HEAD_DIM = 12, 4, 3
PATH = "blocks.3.attn"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _affine(outputs: int, inputs: int, bias: bool = True) -> Affine:
    return Affine(torch.randn(outputs, inputs) / 4, torch.randn(outputs) if bias else None)


def _attention(kv_heads: int = HEADS, bias: bool = True) -> dict[str, Affine]:
    kv = kv_heads * HEAD_DIM
    sizes = {"q": (DIM, DIM), "k": (kv, DIM), "v": (kv, DIM), "out": (DIM, DIM)}
    return {n: _affine(*s, bias) for n, s in sizes.items()}


def _mlp(hidden: int = 24, gated: bool = False) -> dict[str, Affine]:
    sizes = {
        "up": (hidden, DIM),
        "down": (DIM, hidden),
        **({"gate": (hidden, DIM)} if gated else {}),
    }
    return {n: _affine(*s) for n, s in sizes.items()}


def _arguments(name: str, **given):
    facts = {"dim": DIM, "heads": HEADS, "kv_heads": HEADS, "head_dim": HEAD_DIM, "causal": False}
    facts |= {"activation": "gelu", "gated": False, "rotary": "none"}
    spec = SPECS[name]
    arguments = {}
    for a in spec.args:
        own = a.default
        own = facts.get(a.name, own.otherwise) if hasattr(own, "fact") else own
        arguments[a.name] = given.get(a.name, own if holds(a.when, arguments) else None)
    return arguments


def _init(name, parts, role="self_attention", clauses=(), site_kv_heads=HEADS, **given):
    arguments = _arguments(name, **given)
    module = build(SPECS[name], arguments)
    origins = initialise(
        module,
        SPECS[name],
        arguments,
        role,
        clauses,
        {"site": parts, "a": parts},
        PATH,
        heads={n: Heads(HEADS, site_kv_heads, HEAD_DIM) for n in ("site", "a")},
    )
    planned = plan_init(
        SPECS[name], arguments, role, clauses, {"site": list(parts), "a": list(parts)}, PATH
    )
    assert planned == origins
    return module, {(o.parameter, o.slot): o for o in origins}


def _dense(parts, x, kv_heads=HEADS, seen=None):
    q, k, v = (F.linear(x, parts[n].weight, parts[n].bias) for n in ("q", "k", "v"))
    q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(HEADS // kv_heads, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    return F.linear(y, parts["out"].weight, parts["out"].bias)


def _mlp_of(parts, x):
    up = F.linear(x, parts["up"].weight, parts["up"].bias)
    if "gate" in parts:
        up = F.gelu(F.linear(x, parts["gate"].weight, parts["gate"].bias)) * up
    else:
        up = F.gelu(up)
    return F.linear(up, parts["down"].weight, parts["down"].bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_self_graft_is_exact(kv_heads, bias):
    parts, x = _attention(kv_heads, bias), torch.randn(2, 9, DIM)
    module, origins = _init("attention", parts, site_kv_heads=kv_heads, kv_heads=kv_heads)
    torch.testing.assert_close(module(x), _dense(parts, x, kv_heads))
    assert origins["in_proj.weight", "k"].text == "site.k"
    assert not any(o.pending for o in origins.values())


def test_key_value_heads_are_repeated_where_the_operator_has_more():
    parts, x = _attention(2), torch.randn(2, 9, DIM)
    arguments = _arguments("attention")
    module = build(SPECS["attention"], arguments)
    heads = {"site": Heads(HEADS, 2, HEAD_DIM)}
    initialise(
        module,
        SPECS["attention"],
        arguments,
        "self_attention",
        (),
        {"site": parts},
        PATH,
        heads=heads,
    )
    torch.testing.assert_close(module(x), _dense(parts, x, 2))


def test_a_window_over_everything_is_attention():
    parts, x = _attention(), torch.randn(2, 9, DIM)
    module, _ = _init("sliding_window", parts, window=9)
    torch.testing.assert_close(module(x), _dense(parts, x))


@pytest.mark.parametrize("name", ["hyena_x", "hyena_y", "hyena_se"])
@pytest.mark.parametrize("causal", [True, False])
def test_hyena_starts_as_out_after_v_and_waits_for_data(name, causal):
    """Both gates are 1 at first, so the product is v alone; then every map is fitted in turn."""
    parts, x = _attention(), torch.randn(2, 9, DIM)
    module, origins = _init(name, parts, kernel=5, causal=causal)
    v = F.linear(x, parts["v"].weight, parts["v"].bias)
    torch.testing.assert_close(module(x), F.linear(v, parts["out"].weight, parts["out"].bias))
    assert all(o.pending for o in origins.values())
    (fit,) = {o.fit for o in origins.values()}
    assert (fit.policy, fit.linear) == ("alternating", "out_proj")
    assert Block("in_proj", 2 * DIM, 3 * DIM) == fit.blocks[0]
    assert origins["out_proj.weight", "out_proj"].text == "least_squares, from site.out"
    assert origins["in_proj.weight", "q"].text == "least_squares, from one"


def test_a_rule_that_gives_the_last_map_turns_fitting_off():
    _, origins = _init("hyena_x", _attention(), clauses=[("out_proj", Part("a", "out"))])
    assert not any(o.pending for o in origins.values())


def test_what_a_rule_gives_is_not_fitted_but_the_rest_is():
    _, origins = _init("hyena_x", _attention(), clauses=[("k", Part("a", "k"))])
    assert not origins["in_proj.weight", "k"].pending
    fit = origins["in_proj.weight", "v"].fit
    assert fit is not None
    assert Block("in_proj", DIM, 2 * DIM) not in fit.blocks
    assert Block("short_filter", DIM, 2 * DIM) in fit.blocks


def test_least_squares_of_the_whole_fits_what_the_clause_gives_as_a_start():
    clauses = [(None, Apply("least_squares", (), {"sweeps": Const(5)})), ("k", Part("a", "k"))]
    parts = _attention()
    module, origins = _init("hyena_x", parts, clauses=clauses)
    assert torch.equal(module.in_proj.weight[DIM : 2 * DIM], parts["k"].weight)
    assert origins["in_proj.weight", "k"].text == "least_squares, from a.k"
    fit = origins["in_proj.weight", "k"].fit
    assert fit is not None
    assert fit.sweeps == 5


@pytest.mark.parametrize("name", ["sliding_window", "linear_attention", "local_attention_2d"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_attention_that_weighs_otherwise_is_fitted_in_v_and_out(name, kv_heads):
    """v by rows only where each key-value head feeds one query head alone."""
    own = {"kv_heads": kv_heads, "window": 3, "radius": 2, "height": 3, "width": 3}
    _, origins = _init(name, _attention(kv_heads), site_kv_heads=kv_heads, **own)
    fit = origins["out_proj.weight", "out_proj"].fit
    assert fit is not None
    rows = (Block("in_proj", 2 * DIM, 3 * DIM),) if kv_heads == HEADS else ()
    assert fit.blocks == rows
    assert not origins["in_proj.weight", "q"].pending


def test_latent_attention_starts_from_the_nearest_product_of_k_and_v():
    """At full rank it is the attention itself; below, k and v are cut by SVD, then v and out are fitted."""
    parts, x = _attention(), torch.randn(2, 9, DIM)
    whole, _ = _init("latent_attention", parts, rank=DIM)
    exact, _ = _init("attention", parts)
    torch.testing.assert_close(whole(x), exact(x), rtol=1e-4, atol=1e-5)
    thin, origins = _init("latent_attention", parts, rank=5)
    both = torch.cat([parts["k"].weight, parts["v"].weight])
    left = (thin.kv_up.weight @ thin.kv_down.weight - both).norm()
    torch.testing.assert_close(left, torch.linalg.svdvals(both)[5:].norm())
    fit = origins["kv_up.weight", "kv_up"].fit
    assert fit is not None
    assert fit.blocks == (Block("kv_up", DIM, 2 * DIM),)
    assert not origins["kv_down.weight", "kv_down"].pending


@pytest.mark.parametrize("name", ["mamba2", "linear_window_attention"])
def test_random_reaches_parameters_of_the_operator_itself(name):
    """`init random(1)` of a whole operator whose own parameters (A_log, the window's share) stand in no submodule."""
    given = {"head_dim": 4, "window": 3}
    drawn = [
        _init(name, _attention(), clauses=[(None, Apply("random", (Const(s),)))], **given)[0]
        for s in (1, 1, 2)
    ]
    first, again, other = (dict(m.named_parameters()) for m in drawn)
    assert all(torch.equal(p, again[n]) for n, p in first.items())
    assert not torch.equal(first["out_proj.weight"], other["out_proj.weight"])


def test_wider_operators_fit_their_last_map_alone():
    spec, width = SPECS["hyena_x"], WIDEST + 1
    origins = plan_init(spec, _arguments("hyena_x", dim=width), "self_attention")
    assert {o.fit.policy for o in origins if o.fit} == {"least_squares"}
    assert {o.parameter for o in origins if o.pending} == {"out_proj.weight", "out_proj.bias"}


def test_hyena_on_a_grouped_site_repeats_v():
    parts = _attention(2)
    module, _ = _init("hyena_x", parts, site_kv_heads=2)
    v = module.in_proj.weight[2 * DIM :].unflatten(0, (HEADS, HEAD_DIM))
    wanted = parts["v"].weight.unflatten(0, (2, HEAD_DIM))
    assert torch.equal(v, wanted[[0, 0, 1, 1]])


def test_token_linear_starts_as_out_after_v():
    parts, x = _attention(), torch.randn(2, 9, DIM)
    module, origins = _init("token_linear", parts)
    v = F.linear(x, parts["v"].weight, parts["v"].bias)
    torch.testing.assert_close(module(x), F.linear(v, parts["out"].weight, parts["out"].bias))
    assert origins["proj.weight", "proj"].pending


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ratio", [2, 3])
def test_mlp_that_is_as_wide_or_wider_is_exact(ratio, gated):
    parts, x = _mlp(gated=gated), torch.randn(2, 9, DIM)
    module, _ = _init("mlp", parts, "mlp", ratio=ratio, gated=gated)
    torch.testing.assert_close(module(x), _mlp_of(parts, x))
    assert not torch.equal(module.fc1.weight[-1], torch.zeros(DIM))


def test_mlp_that_is_narrower_keeps_the_largest_neurons():
    parts = _mlp()
    parts["up"].weight[5:10] *= 100
    clause = [(None, Apply("keep_top", (Part("a"),), {"by": Const("magnitude")}))]
    for clauses in ((), clause):
        module, origins = _init("mlp", parts, "mlp", clauses, ratio=1)
        assert module.fc1.weight.shape == (12, DIM)
        for row in range(5, 10):
            assert (module.fc1.weight == parts["up"].weight[row]).all(1).any()
    assert origins["fc1.weight", "up"].text == "keep_top(a, by = magnitude)"


def test_a_clause_overrides_a_slot_of_a_default():
    parts = _mlp()
    module, origins = _init("mlp", parts, "mlp", [("down", Apply("zero"))], ratio=3)
    assert torch.equal(module.fc2.weight, torch.zeros(DIM, 36))
    assert torch.equal(module.fc1.weight[:24], parts["up"].weight)
    assert origins["fc2.weight", "down"].text == "zero"


def test_rows_of_a_slot_override_the_whole_and_the_other_way_round():
    parts = _attention()
    module, origins = _init("hyena_x", parts, clauses=[("k", Part("a", "v"))])
    assert torch.equal(module.in_proj.weight[DIM : 2 * DIM], parts["v"].weight)
    assert torch.equal(module.in_proj.weight[2 * DIM :], parts["v"].weight)
    assert origins["in_proj.weight", "k"].rows == (DIM, 2 * DIM)

    source = Apply("concat", (Part("a", "v"), Part("a", "v"), Part("a", "v")))
    module, origins = _init("attention", parts, clauses=[("in_proj", source)])
    assert torch.equal(module.in_proj.weight, parts["v"].weight.repeat(3, 1))
    assert {slot for _, slot in origins} == {"in_proj", "out_proj"}


def test_grouping_by_mean_pool():
    """gqa.graft: 4 query heads on 2 key-value heads."""
    parts = _attention()
    pool = {n: Apply("mean_pool", (Part("a", n),), {"groups": Const(2)}) for n in ("k", "v")}
    clauses = [("k", pool["k"]), ("v", pool["v"]), ("q", Part("a", "q")), ("out", Part("a", "out"))]
    module, _ = _init("attention", parts, clauses=clauses, kv_heads=2)
    k = module.in_proj.weight[DIM : DIM + 2 * HEAD_DIM].unflatten(0, (2, HEAD_DIM))
    heads = parts["k"].weight.unflatten(0, (HEADS, HEAD_DIM))
    torch.testing.assert_close(k[0], heads[:2].mean(0))


def test_random_of_rows_and_of_everything_is_seeded():
    parts = _attention()
    random = Apply("random", (), {"seed": Const(3)})
    a, _ = _init("hyena_x", parts, clauses=[("q", random)])
    b, _ = _init("hyena_x", parts, clauses=[("q", random)])
    assert torch.equal(a.in_proj.weight, b.in_proj.weight)
    assert torch.equal(a.in_proj.weight[2 * DIM :], parts["v"].weight)
    whole, origins = _init("hyena_x", parts, clauses=[(None, random)])
    assert torch.equal(whole.in_proj.weight[:DIM], a.in_proj.weight[:DIM])
    assert {o.text for o in origins.values()} == {"random(seed = 3)"}
    assert whole.in_proj.weight.abs().max() <= DIM**-0.5


def test_least_squares_asked_for_starts_from_the_default():
    parts = _attention()
    module, origins = _init("attention", parts, clauses=[("out", Apply("least_squares"))])
    assert origins["out_proj.weight", "out"].pending
    assert torch.equal(module.out_proj.weight, parts["out"].weight)


@pytest.mark.parametrize(("init", "value"), [("identity", 1.0), ("zero", 0.0)])
def test_depthwise_conv_follows_its_argument(init, value):
    module, origins = _init("depthwise_conv", _attention(), kernel=7, init=init)
    assert torch.equal(module.filter.weight[:, 0, 3], torch.full((DIM,), value))
    assert origins["filter.weight", "filter"].text == init


@pytest.mark.parametrize(("role", "share"), [("block", 0.5), ("site", 1.0)])
def test_linear_merge_starts_as_the_mean_of_blocks_and_the_sum_of_sites(role, share):
    arguments = {"dim": DIM, "branches": 2}
    merge = build(MERGES["linear"], arguments)
    origins = initialise(merge, MERGES["linear"], arguments, role, path="blocks_merge.0")
    a, b = torch.randn(2, 3, 5, DIM)
    torch.testing.assert_close(merge(a, b), share * (a + b))
    assert all(o.pending for o in origins)


def test_lerp_merge_starts_where_it_is_told():
    merge = build(MERGES["lerp"], {"start": 0.5})
    (origin,) = initialise(merge, MERGES["lerp"], {"start": 0.25}, "block", path="m")
    assert merge.factor.item() == 0.25
    assert (origin.parameter, origin.text) == ("factor", "constant(start)")


def test_on_meta_and_in_bfloat16():
    parts = {n: Affine(p.weight.to("meta"), p.bias.to("meta")) for n, p in _attention().items()}
    arguments = _arguments("hyena_se")
    with torch.device("meta"):
        module = build(SPECS["hyena_se"], arguments)
    initialise(module, SPECS["hyena_se"], arguments, "self_attention", (), {"site": parts}, PATH)
    assert module.in_proj.weight.is_meta

    parts = _mlp()
    arguments = _arguments("mlp", ratio=3)
    wide = build(SPECS["mlp"], arguments).to(torch.bfloat16)
    initialise(wide, SPECS["mlp"], arguments, "mlp", (), {"site": parts}, PATH)
    assert wide.fc1.weight.dtype == torch.bfloat16


# -- refusals ------------------------------------------------------------------------------------


def _refused(code: str, *says: str, **call) -> None:
    name, parts = call.pop("name", "attention"), call.pop("parts", _attention())
    with pytest.raises(GraftError) as caught:
        _init(name, parts, **call)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.site == PATH
    for text in says:
        assert text in str(caught.value)


def test_a_parameter_that_nothing_names_is_refused():
    class Scaled(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.proj = nn.Linear(dim, dim)
            self.scale = nn.Parameter(torch.ones(dim))

    with pytest.raises(GraftError) as caught:
        initialise(
            Scaled(DIM), SPECS["token_linear"], {"dim": DIM}, "mlp", (), {"site": _mlp()}, PATH
        )
    assert "G401" in str(caught.value)
    assert "`scale` of `token_linear`" in str(caught.value)
    assert PATH in str(caught.value)


def test_refusals_name_operator_slot_and_site():
    _refused("G402", "no slot `in_porj`", "write `in_proj`", clauses=[("in_porj", Apply("zero"))])
    _refused(
        "G402",
        "no slot `gate` where gated is false",
        name="mlp",
        parts=_mlp(),
        role="mlp",
        ratio=2,
        clauses=[("gate", Apply("zero"))],
    )
    _refused("G403", "no part `k`", parts={n: p for n, p in _attention().items() if n != "k"})
    _refused("G403", "`b` is no site of this rule", clauses=[("q", Part("b", "q"))])
    _refused(
        "G404",
        "`a.q` does not fit `in_proj` of `attention`",
        "wanted: weight [36, 12]",
        "found: weight [12, 12]",
        clauses=[("in_proj", Part("a", "q"))],
    )
    _refused("G404", "does not fit `k`", "write `k = mean_pool(site.k, groups = 2)`", kv_heads=2)
    _refused("G405", "`median` is no init policy", clauses=[("q", Apply("median"))])
    _refused(
        "G405",
        "4 heads do not divide into 3 groups",
        clauses=[("k", Apply("mean_pool", (Part("a", "k"),), {"groups": Const(3)}))],
    )
    _refused(
        "G406",
        "`in_proj` of `attention` is not its last",
        clauses=[("in_proj", Apply("least_squares"))],
    )
    _refused(
        "G405",
        "`keep_top` cannot choose 36 neurons of 24",
        name="mlp",
        parts=_mlp(),
        role="mlp",
        ratio=3,
        clauses=[(None, Apply("keep_top", (Part("a"),)))],
    )
    _refused(
        "G404",
        "is gated, and `mlp` is not",
        name="mlp",
        parts=_mlp(gated=True),
        role="mlp",
        ratio=2,
    )
    _refused(
        "G405",
        "`svd_inner(concat(site.k, site.v))` cannot be computed: rank 13 of a map of 12 inputs",
        name="latent_attention",
        rank=13,
    )
    _refused(
        "G405",
        "cannot choose by `luck`",
        "by = activation",
        name="mlp",
        parts=_mlp(),
        role="mlp",
        ratio=1,
        clauses=[(None, Apply("keep_top", (Part("a"),), {"by": Const("luck")}))],
    )
    _refused("G403", "no part `gate`", name="mlp", parts=_mlp(), role="mlp", ratio=2, gated=True)


def test_a_part_that_is_not_affine_says_why():
    available = {"site": {"q": "rms_norm stands between", "k": 1, "v": 1, "out": 1}}
    with pytest.raises(GraftError, match=r"site.q.*rms_norm stands between"):
        plan_init(
            SPECS["attention"], _arguments("attention"), "self_attention", (), available, PATH
        )


def test_a_refusal_points_at_its_clause():
    span = Span(Source("a.graft", "init in_proj = a.q"), 5, 18)
    with pytest.raises(GraftError) as caught:
        plan_init(
            SPECS["attention"],
            _arguments("attention"),
            "self_attention",
            [("in_porj", Part("a", "q"))],
            path=PATH,
            spans={"in_porj": span},
        )
    assert caught.value.diagnostics[0].span == span


def test_a_fit_of_a_slot_starts_from_what_fills_the_whole():
    """A narrower MLP: the neurons that stay are the default's, and the last map waits for data."""
    parts = _mlp()
    module, origins = _init("mlp", parts, "mlp", [("down", Apply("least_squares"))], ratio=1)
    plain, _ = _init("mlp", parts, "mlp", ratio=1)
    assert torch.equal(module.fc2.weight, plain.fc2.weight)
    fit = origins["fc2.weight", "down"].fit
    assert fit is not None
    assert (fit.policy, fit.linear) == ("least_squares", "fc2")
    assert not origins["fc1.weight", "up"].pending
