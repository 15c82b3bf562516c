"""The oracle's low rank against the identities of its equations."""

import math

import pytest
import torch
from test_reference import BF16, F16, F32, F64, gradients, randn, wire

from arc_topk import reference as ref
from arc_topk.reference import Oracle


def orthogonality(p):
    """How far the columns are from orthonormal or zero."""
    gram = p.T @ p
    return float((gram - torch.diag((gram.diagonal() > 0.5).double())).abs().max())


@pytest.mark.parametrize("m", [1, 7, 50])
def test_orthonormal_columns_span_what_the_columns_do(m):
    p = randn(m, min(m, 4))
    q = ref.orthonormalise(p, 2.0**-40)
    assert orthogonality(q) < 1e-14
    assert torch.allclose(q @ (q.T @ p), p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_columns_that_add_nothing_become_zero(scale):
    a, b = randn(30, 2).unbind(1)
    zero = torch.zeros(30, dtype=F64)
    q = ref.orthonormalise(torch.stack([a, zero, a, b, a - 2 * b, -a], 1) * scale, 2.0**-20)
    assert q.isfinite().all()
    assert [bool(column.any()) for column in q.unbind(1)] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert orthogonality(q) < 1e-14


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_column_that_has_overflowed_counts_as_zero(bad):
    p = randn(9, 3)
    p[4, 1] = bad
    q = ref.orthonormalise(p, 2.0**-20)
    assert not q[:, 1].any() and orthogonality(q) < 1e-14
    assert q[:, 0].any() and q[:, 2].any()


def test_nearly_parallel_columns_are_orthogonal_all_the_same():
    a = randn(40, 1)
    p = torch.cat([a, a + 1e-5 * randn(40, 1, seed=1), a + 1e-5 * randn(40, 1, seed=2)], 1)
    q = ref.orthonormalise(p, 2.0**-20)
    assert orthogonality(q) < 1e-14 and q.any(dim=0).all()


def test_only_zero_columns_are_drawn_and_all_columns_have_unit_norm():
    w = ref.unit_columns(torch.tensor([[3.0, 0, 1e-300], [4, 0, 0]], dtype=F64))
    assert torch.equal(w, torch.tensor([[0.6, 0, 1], [0.8, 0, 0]]))
    filled = ref.drawn(w, seed=1, step=2, stream=3)
    assert torch.equal(filled[:, [0, 2]], w[:, [0, 2]])
    assert float(filled[:, 1].norm()) == pytest.approx(1, abs=1e-6)
    others = [ref.drawn(w, *key)[:, 1] for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0))] + [
        ref.drawn(torch.zeros(2, 3), 1, 2, 3)[:, 2]
    ]
    assert not any(torch.equal(other, filled[:, 1]) for other in others)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (7, 1), (7, 7), (20, 6), (6, 20)])
def test_full_rank_gives_the_plain_mean(m, n):
    x = [randn(m, n, seed=i) for i in range(3)]
    w = ref.drawn(torch.zeros(n, min(m, n)), 0, 0, 0)
    result, _ = ref.low_rank(x, w, wire(3))
    assert torch.allclose(result.mean, sum(x) / 3, rtol=1e-10, atol=1e-10)
    for own, xi in zip(result.own, x, strict=True):
        if m <= n:  # then P^ P^T = 1, whatever the message
            assert torch.allclose(own, xi, rtol=1e-10, atol=1e-10)


def test_a_mean_of_low_rank_is_sent_whole_whatever_the_ranks_own():
    """C = P^ P^T mean X: exact where k columns span mean X, though no X_i is of that rank."""
    mean = randn(12, 2) @ randn(2, 9, seed=1)
    noise = randn(3, 12, 9, seed=2)
    x = list(mean + noise - noise.mean(dim=0))
    result, _ = ref.low_rank(x, ref.drawn(torch.zeros(9, 2), 0, 0, 0), wire(3))
    assert torch.allclose(result.mean, mean, rtol=1e-10, atol=1e-10)


def test_the_mean_is_contracted_and_the_warm_basis_finds_the_strongest_directions():
    """||C - mean X|| <= ||mean X||; repeated, the best approximation of that rank is reached."""
    x = [randn(30, 20, seed=i) for i in range(2)]
    mean = sum(x) / 2
    best = float(torch.linalg.svdvals(mean)[3:].norm())
    w, errors = torch.zeros(20, 3), []
    for step in range(200):
        result, w = ref.low_rank(x, ref.drawn(w, 0, step, 0), wire(2))
        errors.append(float((result.mean - mean).norm()))
    assert errors[0] < float(mean.norm())
    assert errors[-1] == pytest.approx(best, rel=1e-3)


def run(feedback, dtype, steps=4, world_size=3, check=None, **config):
    shapes = [(20, 6), (5,), (4, 5, 2, 3)]
    fields = {"compressor": "low_rank", "feedback": feedback, "ratio": 0.4, **config}
    oracle = Oracle(shapes, dtype, world_size, **fields)
    results = []
    for step in range(steps):
        g = gradients(shapes, world_size, dtype, step)
        results = oracle.step(g)
        if check is not None:
            check(oracle, g, results)
    return oracle, results


@pytest.mark.parametrize(
    ("wire_dtype", "sketch_dtype"),
    [*((w, s) for w in (None, BF16, F16) for s in (None, BF16)), (torch.uint8, None)],
)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_ef14_loses_nothing(dtype, wire_dtype, sketch_dtype):
    """C_i + e_i = g_i + e_i(old), but for the rounding of e_i."""
    old = {}
    seen = set()

    def check(oracle, g, results):
        for t, result in enumerate(results):
            if result.kind != "compressed":
                continue
            seen.add(t)
            for i, own in enumerate(result.compressed.own):
                e = oracle.states[i][t].e
                sum_before = g[i][t].flatten().to(e.dtype) + old.get((i, t), torch.zeros_like(e))
                unit = torch.finfo(e.dtype).eps * (1 + float(sum_before.abs().max()))
                assert ((oracle.views[t].flat(own) + e - sum_before).abs() <= unit).all()
                old[i, t] = e

    fields = {"wire_dtype": wire_dtype, "sketch_dtype": sketch_dtype}
    if dtype == F64:  # of which a dense tensor in bfloat16 is a quarter
        fields["ratio"] = 0.2
    run("ef14", dtype, **fields, check=check)
    assert seen == ({0, 1, 2} if wire_dtype == torch.uint8 else {0, 2})


def test_units_of_columns():
    """A / h times sqrt(||P||^2 / n + v), where 25 = ||P||^2 + (1 - 1 / 2) 2 v and ||P||^2 = 9."""
    p = [torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([[3.0, 0.0], [-4.0, 0.0]])]
    codec = ref.Directions(2, F32)
    summed = (p[0] + p[1]) / 5 / codec.step(2)
    unit = codec.units(codec.norms(p), summed, 4).unit
    expected = torch.tensor([ref.reach(2) / 63 * math.sqrt(9 / 4 + 16), 0.0])
    torch.testing.assert_close(unit, expected, rtol=2**-15, atol=0)
    alone = ref.Directions(1, F32)
    unit = alone.units(alone.norms(p[:1]), p[0] / 5 / alone.step(2), 4).unit
    expected = torch.tensor([ref.reach(1) / 127 * math.sqrt(25 / 4), 0.0])
    torch.testing.assert_close(unit, expected, rtol=2**-15, atol=0)
    # A rank that has nothing counts for nothing: as if the other was alone.
    unit = codec.units(codec.norms([p[0], 0 * p[0]]), p[0] / 5 / codec.step(2), 4).unit
    expected = torch.tensor([ref.reach(2) / 63 * math.sqrt(25 / 4), 0.0])
    torch.testing.assert_close(unit, expected, rtol=2**-15, atol=0)


def test_norms_are_told_by_their_first_two_bytes():
    for dtype, digits in ((F32, 8), (F64, 5)):
        norms = torch.logspace(-30, 30, 200, dtype=dtype)
        told = ref.first_two_bytes(norms)
        assert ((told <= norms) & (told >= norms * (1 - 2.0 ** (1 - digits)))).all()
        assert torch.equal(ref.first_two_bytes(told), told)
    overflown = [torch.tensor([[1e30, 1.0], [math.inf, 1.0]])]
    assert torch.equal(ref.Directions(1, F32).norms(overflown), torch.tensor([[0, 2**0.5]]))


@pytest.mark.parametrize("world_size", [1, 2, 8, 32])
@pytest.mark.parametrize("m", [2, 3, 50, 3000])
def test_directions_say_where_columns_point(m, world_size):
    """Whatever their length; no sum overflows, and one element alone is within reach."""
    codec, h = ref.Directions(world_size, F32), ref.most_level(world_size)
    p = [randn(m, 3, seed=i).float() * 10.0 ** (i % 7 - 3) for i in range(world_size)]
    p[0][:, 2] = 0
    p[0][1, 2] = -1e-20
    alone = [[own if j == i else 0 * own for j in range(world_size)] for i, own in enumerate(p)]
    levels = [codec.summed(its, codec.norms(its)) for its in alone]
    assert all(int(own.abs().max()) <= h for own in levels)
    assert torch.equal(codec.summed(p, codec.norms(p)), sum(levels))
    for own, level in zip(p, levels, strict=True):
        a, b = own.double(), level.double()
        near = ((a / a.norm(dim=0)) * (b / b.norm(dim=0))).sum(dim=0)
        assert (near > (0.999 if world_size <= 2 else 0.95 if world_size == 8 else 0.75)).all()
    assert levels[0][1, 2] < 0 and int((levels[0][:, 2] != 0).sum()) == 1
    if m < ref.reach(world_size) ** 2:
        assert int(levels[0][1, 2]) == -h
    alike = [p[0][:, :2] * 2.0**i for i in range(world_size)]
    a, b = alike[0].double(), codec.summed(alike, codec.norms(alike)).double()
    assert (((a / a.norm(dim=0)) * (b / b.norm(dim=0))).sum(dim=0) > 0.9995).all()


def test_a_matrix_of_one_row_is_a_row():
    """P^ = 1 and R_i = X_i, in the unit that a row of ARC-Top-K would have."""
    x = [randn(1, 9, seed=i) for i in range(3)]
    codec = ref.Directions(3, F64)
    result, _ = ref.low_rank(x, ref.drawn(torch.zeros(9, 1), 0, 0, 0), codec)
    rows = ref.Levels(3, F64, 9).fitted(x, torch.tensor([0]))
    unit = codec.unit_of_row(codec.norms([xi.T for xi in x]), 9).unit
    assert 0.9 < float(unit) / float(rows.unit) <= 1
    for own, xi in zip(result.own, x, strict=True):
        cut = unit * ref.most_level(3)
        assert ((own - xi.clamp(-cut, cut)).abs() <= 1.0001 * unit).all()
    oracle, _ = run("ef14", F32, wire_dtype=torch.uint8)
    assert [(v.m, v.n, v.k) for v in oracle.views][1] == (1, 5, 1)


@pytest.mark.parametrize("noise", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(64, 1024), (1024, 64), (200, 200)])
@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_units_are_those_of_the_columns_that_come(shape, noise, world_size):
    """Whatever the shape, and whether the ranks have much in common or little."""
    chance = torch.Generator().manual_seed(5)
    m, n = shape
    common = torch.randn(m, 2, generator=chance) @ torch.randn(2, n, generator=chance)
    w = ref.drawn(torch.zeros(n, 2), 0, 0, 0)
    for step in range(6):
        x = [
            (common + noise * torch.randn(m, n, generator=chance)).double()
            for _ in range(world_size)
        ]
        p = [xi @ w.double() for xi in x]
        mean = torch.stack(p).mean(dim=0)
        basis = ref.orthonormalise(mean, 2.0**-20)
        r = [xi.T @ basis for xi in x]
        codec = ref.Directions(world_size, F64)
        norms = codec.norms(p)
        unit = codec.units(norms, codec.summed(p, norms), n).unit
        expected = torch.stack(r).square().mean(dim=1).sqrt().mean(dim=0)
        told = unit * ref.most_level(world_size) / ref.reach(world_size) / expected
        if step > 2:  # W has settled
            assert (told > 0.6).all() and (told < 2.5).all(), (step, told)
        w = ref.unit_columns(torch.stack(r).mean(dim=0))


@pytest.mark.parametrize("world_size", [1, 2, 8, 32])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_bytes_lose_nothing_where_a_gradient_jumps(world_size, elsewhere):
    """100 times as large from one step on, in the same directions or in others.

    Units are of the very step, so that the first is not cut off; the second is, for one step.
    """
    shapes, chance = [(24, 40)], torch.Generator().manual_seed(3)
    oracle = Oracle(shapes, F32, world_size, compressor="low_rank", rank=2, wire_dtype=torch.uint8)
    base = torch.randn(24, 2, generator=chance) @ torch.randn(2, 40, generator=chance)
    other = torch.randn(24, 2, generator=chance) @ torch.randn(2, 40, generator=chance)
    owed = []
    for step in range(10):
        common = base if step < 5 else 100 * (other if elsewhere else base)
        noise = 0.1 if step < 5 else 10.0
        g = [[common + noise * torch.randn(24, 40, generator=chance)] for _ in range(world_size)]
        before = [own[0].e.clone() for own in oracle.states]
        result = oracle.step(g)[0]
        for i, own in enumerate(result.compressed.own):
            given = g[i][0].flatten() + before[i]
            total = own.flatten() + oracle.states[i][0].e
            near = 1e-5 * float(given.abs().max())
            torch.testing.assert_close(total, given, rtol=1e-5, atol=near)
        left = torch.stack([states[0].e for states in oracle.states]).mean(dim=0)
        owed.append(float(left.norm() / common.norm()))
    assert owed[4] < 0.5 and owed[5] < (0.9 if elsewhere else 0.5)
    assert max(owed[7:]) < 0.5


@pytest.mark.parametrize("feedback", ["none", "ef14"])
def test_a_step_that_does_not_count_leaves_the_basis(feedback):
    oracle, _ = run(feedback, F64, may_be_unused=True)
    before = oracle.bases[0].clone()
    for make in (torch.zeros_like, lambda g: torch.full_like(g, math.nan)):
        g = gradients([(20, 6), (5,), (4, 5, 2, 3)], 3, F64, 99)
        for own in g:
            own[0] = make(own[0])
        assert oracle.step(g)[0].kind in ("unused", "non-finite")
        assert torch.equal(oracle.bases[0], before)


def test_zeros_owe_nothing_more_in_the_end():
    oracle, _ = run("ef14", F64)
    for _ in range(100):
        oracle.step([[torch.zeros(20, 6), torch.zeros(5), torch.zeros(4, 5, 2, 3)]] * 3)
    mean = sum(oracle.state("e", i, 0) for i in range(3)) / 3
    assert float(mean.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("shape", "options", "k", "wire_bytes"),
    [
        ((100, 50), {"ratio": 0.1}, 3, 4 * (3 * 150 + 1)),
        ((100, 50), {"ratio": 0.1, "wire_dtype": BF16}, 4, 4 * (4 * 100 + 1) + 2 * 4 * 50),
        ((100, 50), {"ratio": 1e-6}, 1, 4 * (150 + 1)),
        ((100, 50), {"rank": 7}, 7, 4 * (7 * 150 + 1)),
        ((100, 50), {"ratio": 0.03, "rank": 1}, 1, 4 * (150 + 1)),
        ((100, 50), {"rank": 7, "wire_dtype": torch.uint8}, 7, 7 * (100 + 50 + 2 * 2) + 2),
        ((100, 50), {"ratio": 0.1, "wire_dtype": torch.uint8}, 12, 12 * 154 + 2),
        ((1, 50), {"rank": 7, "wire_dtype": torch.uint8}, 1, 50 + 4 + 2),
        ((100,), {"rank": 7, "wire_dtype": torch.uint8}, 1, 100 + 4 + 2),
        ((), {"rank": 7, "wire_dtype": torch.uint8}, 1, 1 + 4 + 2),
        ((6, 5), {"rank": 4, "wire_dtype": torch.uint8}, 1, 30 + 4 + 2),  # no gain
        ((0, 5), {"rank": 4, "wire_dtype": torch.uint8}, None, 0),
        ((100,), {"rank": 7}, None, 400),
        ((100, 50), {"rank": 50}, None, 4 * 5000),  # more than dense
        ((100, 2), {"rank": 50}, None, 4 * 200),
        ((9, 1), {"ratio": 0.1}, None, 36),
        ((100,), {"rank": 1, "row_width": 10}, 1, 4 * 21),
    ],
)
def test_bytes_of_the_plan(shape, options, k, wire_bytes):
    oracle = Oracle([shape], F32, 2, compressor="low_rank", **options)
    view = oracle.views[0]
    assert (view.k if view.compressed else None) == k
    assert oracle.wire_bytes == wire_bytes
