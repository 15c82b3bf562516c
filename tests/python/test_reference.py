"""The oracle against known answers, and the claims of docs/algorithm.md against the oracle."""

import itertools
import math

import pytest
import torch

from arc_topk import reference as ref
from arc_topk.reference import EF14, EF21, EF21M, Oracle, Types, Wire

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GRADIENT_DTYPES = [F32, F64, BF16, F16]
COMPRESSORS = ["dense", "arc_topk", "rand_k", "top_k"]
FEEDBACKS = ["none", "ef14", "ef21", "ef21m"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=F64).to(dtype)


def gradients(shapes, world_size, dtype, seed):
    """Unique per rank and tensor, with rows of very different norm."""
    own = []
    for i in range(world_size):
        tensors = [randn(*shape, seed=1000 * seed + 10 * i + t) for t, shape in enumerate(shapes)]
        own.append(
            [(t * 2.0 ** (torch.arange(t.numel()) % 5).view(t.shape)).to(dtype) for t in tensors]
        )
    return own


def wire(world_size, dtype=F64, work=F64):
    return Wire(dtype, world_size, work)


def squared(x):
    return float(x.double().square().sum())


# -- random numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_paper(counter, key, expected):
    assert ref.philox(counter, tuple(key)).tolist() == expected


def test_normals_at_the_ends_of_the_uniform_range():
    top = 0xFFFFFFFF
    z = ref.normals(torch.tensor([0, 0, top, 0]))
    assert z[0] == pytest.approx(math.sqrt(2 * 24 * math.log(2)))  # u1 = 2^-24, the least there is
    assert z[1] == 0
    assert z[2] == z[3] == 0  # u1 = 1


def test_projection_is_standard_normal():
    v = ref.projection(seed=1, step=2, n=50_000, r=4)
    assert v.dtype == F64
    assert v.mean(dim=0).abs().max() < 0.02  # 4 sigma is 0.018
    assert torch.allclose(v.T @ v / len(v), torch.eye(4, dtype=F64), atol=0.03)
    assert v.pow(4).mean() == pytest.approx(3, abs=0.1)


def test_projection_does_not_depend_on_n_nor_its_first_columns_on_r():
    v = ref.projection(0, 5, 7, 7)
    assert torch.equal(v[:3], ref.projection(0, 5, 3, 7))
    assert torch.equal(v[:, :2], ref.projection(0, 5, 7, 2))
    assert ref.projection(0, 5, 0, 4).shape == (0, 4)


def test_projection_uses_all_64_bits_of_seed_and_step():
    pairs = [(0, 0), (1, 0), (1 << 32, 0), (0, 1), (0, 1 << 32)]
    made = [ref.projection(seed, step, 4, 4) for seed, step in pairs]
    for a, b in itertools.combinations(made, 2):
        assert not torch.equal(a, b)


def test_rand_k_draws_every_row_equally_often_and_streams_apart():
    m, k, steps = 7, 3, 1500
    counts = torch.zeros(m)
    for step in range(steps):
        counts[ref.top_rows(ref.rand_k_keys(0, step, 0, m), k)] += 1
    sigma = math.sqrt(steps * k / m * (1 - k / m))
    assert (counts - steps * k / m).abs().max() < 4 * sigma
    assert not torch.equal(ref.rand_k_keys(0, 0, 0, m), ref.rand_k_keys(0, 0, 1, m))


# -- selection -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "k", "rows"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([2.0, 2.0, 2.0, 2.0], 2, [0, 1]),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [0, 1, 3]),
        ([0.0, -0.0, 0.0], 1, [0]),
        ([math.nan, 1.0, math.inf, 0.0], 2, [0, 2]),
        ([math.nan, math.nan], 1, [0]),
        ([5.0], 1, [0]),
        ([], 1, []),
    ],
)
def test_top_rows_ascend_with_ties_to_the_smaller_index_and_nan_first(values, k, rows):
    assert ref.top_rows(torch.tensor(values), k).tolist() == rows


def test_valid_top_k_accepts_only_what_rounding_explains():
    values = torch.tensor([4.0, 1.0, 4.0 * (1 - 1e-6), 0.0, 9.0])

    def valid(rows, rtol=1e-5):
        return ref.valid_top_k(values, torch.tensor(rows, dtype=torch.long), rtol)

    assert valid([0, 4])
    assert valid([2, 4])
    assert not valid([2, 4], rtol=1e-8)
    assert not valid([0, 2])
    assert not valid([1, 4])
    assert not valid([4, 0]), "must ascend"
    assert not valid([4, 4]), "must differ"
    assert not valid([4, 5]), "must be rows"
    assert valid([0, 1, 2, 3, 4])
    assert valid([])
    # Row 3 is what is left of large numbers that cancelled: nobody knows its score well.
    magnitude = torch.tensor([2.0, 1.0, 2.0, 1e6, 3.0])
    assert ref.valid_top_k(values, torch.tensor([3, 4]), 1e-5, magnitude)


def test_sketch_keeps_the_squared_norm_in_expectation():
    x = randn(3, 5) * torch.tensor([[1.0], [3.0], [0.0]], dtype=F64)
    steps = 1500
    total = sum(ref.scores(ref.sketch(x, ref.projection(0, s, 5, 4))) for s in range(steps))
    exact = x.square().sum(dim=1)  # a score is exact * chi^2_4 / 4, of variance exact^2 / 2
    assert ((total / steps - exact).abs() <= 4 * exact * math.sqrt(0.5 / steps)).all()


# -- the wire --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
def test_wire_counts_the_rounded_value_as_sent(dtype, world_size):
    x = randn(7, dtype=F32)
    w = Wire(dtype, world_size, F32)
    value = w.value(w.send(x))
    eps = max(torch.finfo(dtype).eps, torch.finfo(F32).eps)
    assert torch.allclose(value, x, rtol=2 * eps, atol=0)
    assert torch.equal(w.value(w.send(value)), value)
    mean = w.mean([w.send(x)] * world_size)
    assert torch.allclose(mean, value, rtol=2 * eps, atol=0)


def test_fp16_wire_does_not_overflow_in_the_sum_and_clamps():
    w = Wire(F16, 3, F32)
    x = torch.tensor([60000.0, 1e9, -1e9])
    assert w.scale == 4
    sent = w.send(x)
    assert w.mean([sent] * 3).isfinite().all()
    assert w.value(sent).tolist() == [60000.0, 65504.0, -65504.0]
    assert w.send(torch.tensor([math.inf, math.nan])).isfinite().sum() == 0


def test_fp16_wire_leaves_what_it_clamped_in_the_residual():
    oracle = Oracle([(4, 64)], F32, 2, ratio=0.25, wire_dtype=F16, sketch_dim=1)
    g = [[torch.full((4, 64), 2e5)], [torch.full((4, 64), -2e5)]]
    (result,) = oracle.step(g)
    row = int(result.compressed.rows)
    assert (result.compressed.own[0][row] == 65504).all()
    assert (oracle.states[0][0].e.view(4, 64)[row] == 2e5 - 65504).all()


# -- compressors -----------------------------------------------------------------------------------


def test_arc_topk_picks_the_rows_that_are_large_in_the_mean():
    # Row 0 is the largest on both ranks and cancels; row 2 is small and common.
    a, b = torch.zeros(2, 4, 6, dtype=F64)
    a[0], b[0] = 100, -100
    a[2], b[2] = 1, 1
    result = ref.arc_topk([a, b], ref.projection(0, 0, 6, 4), 1, wire(2))
    assert result.rows.tolist() == [2]
    assert torch.equal(result.mean, (a + b) / 2)


def test_top_k_has_no_contraction_of_the_mean():
    """Two ranks with large opposite entries and a common small signal."""
    a = torch.ones(10, 1, dtype=F64)
    b = torch.ones(10, 1, dtype=F64)
    a[0], b[0] = 100, -100
    mean = (a + b) / 2
    result = ref.top_k([a, b], 1, wire(2))
    assert squared(result.mean) == 0, "the large entries cancel, and the signal is never sent"
    assert squared(result.mean - mean) > (1 - 1 / 10) * squared(mean)

    a[:2, 0] = torch.tensor([100.0, -99.0])
    b[:2, 0] = torch.tensor([-98.0, 101.0])
    mean = (a + b) / 2
    assert torch.equal(mean, torch.ones(10, 1, dtype=F64))
    result = ref.top_k([a, b], 1, wire(2))
    assert squared(result.mean - mean) > 100 * squared(mean), "far worse than sending nothing"


def test_arc_topk_survives_the_counter_example_of_top_k():
    a = torch.ones(10, 1, dtype=F64)
    b = torch.ones(10, 1, dtype=F64)
    a[0], b[0] = 100, -100
    mean = (a + b) / 2
    result = ref.arc_topk([a, b], ref.projection(0, 0, 1, 4), 1, wire(2))
    assert squared(result.mean - mean) <= (1 - 1 / 10) * squared(mean) + 1e-12


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_arc_topk_contracts_the_mean_in_expectation(spread):
    """||C - mean X||^2 <= (1 - K/m) ||mean X||^2 over V, rows of independent random directions."""
    m, n, k, ranks, steps = 12, 64, 3, 3, 1000
    rows = torch.nn.functional.normalize(randn(m, n), dim=1)
    rows *= torch.exp(spread * randn(m, 1, seed=1))
    noise = randn(ranks, m, n, seed=2)
    x = list(rows + noise - noise.mean(dim=0))
    total, bound = 0.0, 1 - k / m
    for step in range(steps):
        result = ref.arc_topk(x, ref.projection(3, step, n, 4), k, wire(ranks))
        total += squared(result.mean - rows) / squared(rows)
    if spread == 0:  # rows of equal norm are chosen at random: the bound is met with equality
        assert total / steps == pytest.approx(bound, abs=0.01)
    else:
        assert total / steps < bound - 0.02


def test_aligned_rows_of_nearly_equal_norm_are_chosen_a_little_worse_than_at_random():
    """The known exception: rows (0, 1), (1, 0), 1.05 (1, 1)/sqrt 2, K = 1, r = 4: 0.667136 > 2/3.

    The rows of V are a, b ~ N(0, I_4). Row 3 is chosen if 1.05^2 |a + b|^2 / 2 > max(|a|^2, |b|^2).
    The share u = |a|^2 / (|a|^2 + |b|^2) has density 6 u (1 - u), the cosine c of the angle in four
    dimensions 2 / pi sqrt(1 - c^2), so that one integral over u is left, done by midpoints.
    """
    strong = 1.05**2
    u = 0.5 + (torch.arange(100_000, dtype=F64) + 0.5) / 200_000  # |a| > |b|; the rest is alike
    t = ((1 - u) / u).sqrt()
    least = ((2 / strong - 1 - t * t) / (2 * t)).clamp(-1, 1)
    tail = 0.5 - (least * (1 - least * least).sqrt() + least.asin()) / math.pi
    p = float((12 * u * (1 - u) * tail).mean()) / 2
    error = 1 - (1 + (strong - 1) * p) / (2 + strong)
    assert error == pytest.approx(0.667136, abs=1e-6)
    assert error > 2 / 3 + 4e-4

    x = [torch.tensor([[0, 1], [1, 0], [1.05 / math.sqrt(2)] * 2], dtype=F64)]
    steps = 2000
    third = 0
    for step in range(steps):
        third += ref.arc_topk(x, ref.projection(0, step, 2, 4), 1, wire(1)).rows.tolist() == [2]
    assert third / steps == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / steps))


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (7, 1), (7, 7)])
def test_ratio_one_gives_the_plain_mean(compressor, m, n):
    x = [randn(m, n, seed=i) for i in range(3)]
    results = {
        "arc_topk": lambda: ref.arc_topk(x, ref.projection(0, 0, n, 4), m, wire(3)),
        "rand_k": lambda: ref.rand_k(x, ref.rand_k_keys(0, 0, 0, m), m, wire(3)),
        "top_k": lambda: ref.top_k([xi.view(-1, 1) for xi in x], m * n, Wire(F64, 3, F64, False)),
    }
    result = results[compressor]()
    assert torch.allclose(result.mean.view(m, n), sum(x) / 3, rtol=1e-14, atol=1e-14)
    for own, xi in zip(result.own, x, strict=True):
        assert torch.equal(own.view(m, n), xi)


def test_top_k_breaks_ties_to_the_smaller_index_by_modulus():
    x = torch.tensor([-1.0, 1.0, -2.0, 1.0], dtype=F64).view(4, 1)
    assert ref.top_k([x], 2, wire(1)).rows[0].tolist() == [0, 2]


def test_energy_captured_is_not_flattered_by_the_noise_that_chose_the_rows():
    """Equal rows at K = m / 10: about 0.10 is captured; the selected scores' share says 0.25."""
    m, n, k, steps = 100, 100, 10, 50
    x = [math.sqrt(n) * torch.eye(m, n, dtype=F64)]
    captured, share = [], []
    for step in range(steps):
        result = ref.arc_topk(x, ref.projection(0, step, n, 4), k, wire(1))
        captured.append(result.mean_energy / result.score_energy)
        share.append(float(result.scores[result.rows].sum()) / result.score_energy)
    assert sum(captured) / steps == pytest.approx(0.10, abs=0.005)
    assert sum(share) / steps == pytest.approx(0.25, abs=0.02)


# -- error feedback --------------------------------------------------------------------------------


def run(compressor, feedback, dtype, steps=4, world_size=3, check=None, **config):
    shapes = [(20, 6), (5,), (4, 5, 2, 3)]
    oracle = Oracle(
        shapes,
        dtype,
        world_size,
        compressor=compressor,
        feedback=feedback,
        **({"ratio": 0.2, "sketch_dim": 2} | config),
    )
    for step in range(steps):
        g = gradients(shapes, world_size, dtype, step)
        results = oracle.step(g)
        if check is not None:
            check(oracle, g, results)
    return oracle, results


@pytest.mark.parametrize("wire_dtype", [None, BF16, F16])
@pytest.mark.parametrize("row_width", [None, 8])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
def test_ef14_loses_nothing_exactly(compressor, dtype, row_width, wire_dtype):
    """C_i + e_i = g_i + e_i(old), element by element, bit for bit."""
    old = {}
    seen = []

    def check(oracle, g, results):
        for t, result in enumerate(results):
            assert result.output.dtype == dtype
            assert result.output.shape == g[0][t].shape
            if result.kind != "compressed":
                continue
            seen.append(t)
            for i, own in enumerate(result.compressed.own):
                e = oracle.states[i][t].e
                sum_before = g[i][t].flatten().to(e.dtype) + old.get((i, t), torch.zeros_like(e))
                assert torch.equal(oracle.views[t].flat(own) + e, sum_before)
                old[i, t] = e

    run(compressor, "ef14", dtype, row_width=row_width, wire_dtype=wire_dtype, check=check)
    assert {0, 2} <= set(seen)


@pytest.mark.parametrize("wire_dtype", [None, BF16])
@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
def test_ef21_keeps_h_at_the_mean_of_the_h_i(compressor, dtype, feedback, wire_dtype):
    oracle, results = run(compressor, feedback, dtype, wire_dtype=wire_dtype)
    # Every step's reduction rounds the sum once, in the wire's type or, at first, the dense one.
    eps = max(
        torch.finfo(d).eps for d in (oracle.types.wire, oracle.types.dense, oracle.types.work)
    )
    for t, view in enumerate(oracle.views):
        if view.compressed:
            mean = torch.stack([own[t].h_i.double() for own in oracle.states]).mean(dim=0)
            h = oracle.states[0][t].h
            assert torch.allclose(
                h.double(), mean, rtol=0, atol=4 * eps * float(mean.abs().max()) * 4
            )
            assert all(torch.equal(own[t].h, h) for own in oracle.states)
            assert torch.equal(results[t].output.flatten(), h.to(dtype))


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_eta_one_makes_ef21m_into_ef21(compressor, dtype):
    a, ra = run(compressor, "ef21", dtype)
    b, rb = run(compressor, "ef21m", dtype, eta=1.0)
    for t, view in enumerate(a.views):
        assert torch.equal(ra[t].output, rb[t].output)
        if view.compressed:
            assert torch.equal(a.state("h_i", 1, t), b.state("h_i", 1, t))


def test_ef21m_tracks_the_momentum_of_its_equations():
    """The tracker t_i = v_i - h_i against v_i = (1 - eta) v_i + eta g_i, followed by itself."""
    v = {}

    def check(oracle, g, results):
        for i, own in enumerate(g):
            v[i] = own[0] if i not in v else 0.7 * v[i] + 0.3 * own[0]
            assert torch.allclose(oracle.state("v", i, 0), v[i], rtol=1e-13, atol=1e-13)

    run("arc_topk", "ef21m", F64, steps=6, eta=0.3, check=check)


@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.parametrize("numel", [0, 1, 7])
@pytest.mark.parametrize(
    "feedback", [EF14(0), EF21(0), EF21M(0), EF21M(0, eta=0.9), EF21M(0, eta=1.0)]
)
def test_undo_restores_the_state(feedback, numel, state):
    """Exact to a few units in the last place of |X| / (1 - eta)."""
    work = F64 if state == F64 else F32
    fb = type(feedback)(numel, work, state, feedback.eta)
    for name, seed in zip(fb.own_state + fb.shared_state, itertools.count(1), strict=False):
        setattr(fb, name, (10 * randn(numel, seed=seed)).to(state))
    before = {name: getattr(fb, name) for name in fb.own_state + fb.shared_state}
    g = randn(numel, dtype=work)
    x = fb.prepare(g)
    fb.undo(g)
    left = 1.0 if fb.eta == 1 or not isinstance(fb, EF21M) else 1 - fb.eta
    for name, value in before.items():
        if name == "t" and fb.eta == 1:
            continue  # nobody asks for it
        unit = torch.finfo(state).eps * (x.abs() + value.abs() + 10 * g.abs() + 100) / left
        assert ((getattr(fb, name).to(work) - value.to(work)).abs() <= unit).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_non_finite_reaches_the_result_and_leaves_the_state(compressor, feedback, bad):
    oracle, _ = run(compressor, feedback, F64)
    shapes = [tuple(t.shape) for t in oracle.layouts]
    names = oracle.states[0][0].own_state + oracle.states[0][0].shared_state
    before = {(n, i): oracle.state(n, i, 0).clone() for n in names for i in range(3)}
    g = gradients(shapes, 3, F64, 99)
    g[1][0][3, 2] = bad
    results = oracle.step(g)
    assert results[0].kind == "non-finite"
    assert results[0].output.isnan().all()
    assert results[2].output.isfinite().all(), "other tensors go on"
    for (name, i), value in before.items():
        assert torch.allclose(oracle.state(name, i, 0), value, rtol=1e-12, atol=1e-12)
    assert all(r.output.isfinite().all() for r in oracle.step(gradients(shapes, 3, F64, 100)))


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_tensor_nobody_used_changes_no_state_and_sends_nothing(compressor, feedback):
    oracle, _ = run(compressor, feedback, F64)
    oracle.may_be_unused = True
    shapes = [tuple(t.shape) for t in oracle.layouts]
    names = oracle.states[0][0].own_state + oracle.states[0][0].shared_state
    before = {(n, i): oracle.state(n, i, 0).clone() for n in names for i in range(3)}
    g = gradients(shapes, 3, F64, 99)
    for own in g:
        own[0].zero_()
    result = oracle.step(g)[0]
    assert result.kind == "unused"
    for (name, i), value in before.items():
        assert torch.allclose(oracle.state(name, i, 0), value, rtol=1e-12, atol=1e-12)
    assert not result.output.any()


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_zeros_are_a_gradient_like_any_other(compressor, feedback):
    oracle, _ = run(compressor, feedback, F64)
    g = gradients([tuple(t.shape) for t in oracle.layouts], 3, F64, 99)
    for own in g:
        own[0].zero_()
    results = [oracle.step(g)[0] for _ in range(200)]
    assert {result.kind for result in results} == {"compressed"}
    assert results[-1].output.abs().max() < 1e-3


def test_a_tensor_that_one_rank_used_goes_on():
    oracle, _ = run("arc_topk", "ef14", F64)
    g = gradients([tuple(t.shape) for t in oracle.layouts], 3, F64, 99)
    for own in g[1:]:
        own[0].zero_()
    assert oracle.step(g)[0].kind == "compressed"


@pytest.mark.parametrize(
    ("feedback", "names"), [("ef14", ["e"]), ("ef21", ["h_i"]), ("ef21m", ["t", "h_i"])]
)
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k"])
def test_results_depend_on_own_states_only_through_their_mean(compressor, feedback, names):
    """Any redistribution that keeps the mean is exact: for another world size, drift, a return."""
    a, _ = run(compressor, feedback, F64)
    b, _ = run(compressor, feedback, F64)
    for name, t in itertools.product(names, (0, 2)):
        values = [getattr(own[t], name) for own in b.states]
        shift = randn(*values[0].shape, seed=5)
        for own, value, weight in zip(b.states, values, (1, -3, 2), strict=True):
            setattr(own[t], name, value + weight * shift)
    shapes = [tuple(t.shape) for t in a.layouts]
    for step in range(10, 14):
        g = gradients(shapes, 3, F64, step)
        for ra, rb in zip(a.step(g), b.step(g), strict=True):
            assert torch.allclose(ra.output, rb.output, rtol=1e-10, atol=1e-10)


def test_top_k_depends_on_how_the_states_are_distributed():
    a, _ = run("top_k", "ef14", F64)
    b, _ = run("top_k", "ef14", F64)
    shift = 100 * randn(120, seed=5)
    b.states[0][0].e, b.states[1][0].e = b.states[0][0].e + shift, b.states[1][0].e - shift
    g = gradients([tuple(t.shape) for t in a.layouts], 3, F64, 9)
    assert not torch.allclose(a.step(g)[0].output, b.step(g)[0].output)


def test_bf16_state_holds_the_message_and_the_residual():
    def check(oracle, g, results):
        assert oracle.states[0][0].e.dtype == BF16
        assert oracle.states[0][0].e.isfinite().all()
        own = oracle.views[0].flat(results[0].compressed.own[0])
        assert torch.equal(own, own.to(BF16).float()), "a message of the state's type"

    run("arc_topk", "ef14", F32, state_dtype=BF16, check=check)


def test_float64_gradients_keep_float64_state():
    assert Types.of(F64, BF16, BF16).state == F64


# -- plan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "wire_dtype", "dense"),
    [
        (F32, None, F32),
        (F32, BF16, F32),
        (F64, F16, F64),
        (BF16, None, BF16),
        (BF16, F32, F32),
        (F16, BF16, F32),
    ],
)
def test_dense_tensors_are_not_narrowed(gradient, wire_dtype, dense):
    assert Types.of(gradient, wire_dtype).dense == dense
    assert Types.of(gradient, wire_dtype, None, "rand_k").dense == (wire_dtype or gradient)


def test_natural_rows_follow_the_largest_stride():
    conv = torch.empty(8, 3, 5, 5)
    assert ref.matrix_shape(conv, None) == (8, 75)
    assert ref.matrix_shape(conv.to(memory_format=torch.channels_last), None) == (8, 75)
    assert ref.matrix_shape(torch.empty(6, 4).t(), None) == (6, 4)
    assert ref.matrix_shape(torch.empty(7, 1), None) == (7, 1)
    assert ref.matrix_shape(torch.empty(7), None) is None
    assert ref.matrix_shape(torch.empty(7), 3) == (3, 3)
    assert ref.matrix_shape(torch.empty(2), 3) == (1, 2)
    assert ref.matrix_shape(torch.empty(0), 3) == (0, 1)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (1, 7), (2, 3, 4, 5)])
def test_flatten_follows_memory_and_comes_back(shape):
    t = torch.arange(math.prod(shape)).view(shape)
    backwards = list(reversed(range(t.dim())))
    layouts = [t, t.permute(backwards).contiguous().permute(backwards)]
    for layout in layouts:
        flat = ref.flatten(layout, layout)
        assert torch.equal(flat, layout.as_strided((t.numel(),), (1,)))
        back = ref.unflatten(flat, layout)
        assert torch.equal(back, t)
        assert back.numel() == 0 or back.stride() == layout.stride()


def test_channels_last_gives_the_rows_as_they_lie_in_memory():
    layout = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last)
    g = randn(4, 3, 2, 2, dtype=F32).to(memory_format=torch.channels_last)
    oracle = Oracle([layout], F32, 1, sketch_dim=1, ratio=0.25)
    (result,) = oracle.step([[g]])
    row = int(result.compressed.rows)
    assert result.output.stride() == g.stride()
    assert torch.equal(result.output[row], g[row])


@pytest.mark.parametrize(
    ("shape", "config", "k", "compressed", "wire_bytes"),
    [
        ((100, 10), {}, 10, True, 4 * 4 * 100 + 10 * 10 * 4 + 4),
        ((100, 4), {}, 10, False, 1600),  # 4 r m alone is as much as the dense bytes
        ((100, 10), {"ratio": 0.59}, 59, True, 1600 + 2360 + 4),
        ((100, 10), {"ratio": 0.6}, 60, False, 4000),  # equal bytes do not pay
        ((100, 10), {"ratio": 0.07}, 7, True, 1600 + 280 + 4),  # 0.07 * 100 > 7 in floating point
        ((100, 10), {"ratio": 1e-9}, 1, True, 1600 + 40 + 4),
        ((1000,), {}, 1, False, 4000),
        ((1000,), {"row_width": 10}, 10, True, 1600 + 400 + 4),
        ((995,), {"row_width": 10}, 10, True, 1600 + 400 + 4),  # the last row is padded on the wire
        ((1000,), {"row_width": 1, "compressor": "rand_k"}, 100, True, 400 + 4),
        ((100, 10), {"compressor": "top_k"}, 100, True, 800 + 4),
        (
            (100, 10),
            {"compressor": "top_k", "ratio": 0.251},
            251,
            False,
            4000,
        ),  # 2 * 251 * 8 > 4000
        ((0, 5), {}, 1, False, 0),
        ((1,), {"row_width": 7}, 1, False, 4),
    ],
)
def test_plan_compresses_only_where_that_saves_bytes(shape, config, k, compressed, wire_bytes):
    view = Oracle([shape], F32, 4, **config).views[0]
    assert (view.compressed, view.wire_bytes) == (compressed, wire_bytes)
    if compressed:
        assert view.k == k


def test_wire_bytes_of_a_mixed_bucket():
    shapes = [(100, 10), (10,)]
    assert Oracle(shapes, F32, 4).wire_bytes == 2000 + 4 + 40
    assert Oracle(shapes, BF16, 4).wire_bytes == 1600 + 200 + 4 + 20
    assert Oracle(shapes, BF16, 4, ratio=0.2).wire_bytes == 2020
    assert Oracle(shapes, F32, 4, wire_dtype=BF16).wire_bytes == 1600 + 200 + 4 + 40
    assert Oracle(shapes, F32, 4, compressor="rand_k", wire_dtype=BF16).wire_bytes == 200 + 2 + 20
    assert Oracle(shapes, F32, 4, compressor="top_k").wire_bytes == 800 + 4 + 40


# -- the oracle's steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("row_width", [None, 8])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_combination_makes_finite_steps_that_a_replay_repeats(
    compressor, feedback, dtype, row_width
):
    """Replaying with the selection of the first run must change nothing."""
    chosen = []

    def record(oracle, g, results):
        chosen.append([r.compressed.rows if r.compressed else None for r in results])
        assert all(r.output.isfinite().all() and r.output.dtype == dtype for r in results)

    first, results = run(compressor, feedback, dtype, row_width=row_width, check=record)
    again = Oracle(
        first.layouts,
        dtype,
        3,
        compressor=compressor,
        feedback=feedback,
        ratio=0.2,
        sketch_dim=2,
        row_width=row_width,
    )
    for step, selected in enumerate(chosen):
        g = gradients([tuple(t.shape) for t in first.layouts], 3, dtype, step)
        replayed = again.step(g, selected)
    for a, b in zip(results, replayed, strict=True):
        assert torch.equal(a.output, b.output)


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
def test_a_wrong_selection_is_refused(compressor):
    shape, g = (20, 6), randn(20, 6, dtype=F32)
    right = Oracle([shape], F32, 1, compressor=compressor, ratio=0.1, sketch_dim=2).step([[g]])
    rows = right[0].compressed.rows
    rows = rows[0] if compressor == "top_k" else rows
    wrong = torch.tensor([i for i in range(20) if i not in rows.tolist()][: len(rows)])
    oracle = Oracle([shape], F32, 1, compressor=compressor, ratio=0.1, sketch_dim=2)
    if compressor == "top_k":
        wrong = torch.cat([wrong, torch.arange(100, 120)])[: len(rows)]
    with pytest.raises(ValueError, match="selected: expected"):
        oracle.step([[g]], [[wrong] if compressor == "top_k" else wrong])


def test_start_step_averages_plainly_and_keeps_no_state():
    shapes = [(20, 6)]
    oracle = Oracle(shapes, F64, 2, start_step=2, ratio=0.2, sketch_dim=2)
    late = Oracle(shapes, F64, 2, ratio=0.2, sketch_dim=2)
    late.steps = 2
    for step in range(2):
        g = gradients(shapes, 2, F64, step)
        (result,) = oracle.step(g)
        assert result.kind == "dense"
        assert torch.allclose(result.output, (g[0][0] + g[1][0]) / 2)
        assert not oracle.states[0][0].e.any()
    g = gradients(shapes, 2, F64, 2)
    assert torch.equal(oracle.step(g)[0].output, late.step(g)[0].output), (
        "V goes by the exchange count"
    )


@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
def test_first_compressed_step_is_dense_and_put_off_while_not_finite(feedback):
    shapes = [(20, 6), (5,)]
    oracle = Oracle(shapes, F64, 2, feedback=feedback, ratio=0.2, sketch_dim=2)
    g = gradients(shapes, 2, F64, 0)
    g[0][1][2] = math.inf
    results = oracle.step(g)
    assert not oracle.started
    assert not results[1].output.isfinite().all()
    assert not oracle.states[0][0].h.any()
    g = gradients(shapes, 2, F64, 1)
    results = oracle.step(g)
    assert oracle.started
    assert results[0].kind == "dense"
    assert torch.allclose(oracle.state("h", 1, 0), (g[0][0] + g[1][0]) / 2)
    assert torch.equal(oracle.state("h_i", 1, 0), g[1][0])
    assert oracle.step(gradients(shapes, 2, F64, 2))[0].kind == "compressed"


def test_dense_tensors_under_ef21m_follow_the_momentum_of_the_mean():
    shapes = [(5,)]
    oracle = Oracle(shapes, F64, 2, feedback="ef21m", eta=0.25, may_be_unused=True)
    h = None
    for step in range(3):
        g = gradients(shapes, 2, F64, step)
        mean = (g[0][0] + g[1][0]) / 2
        h = mean if h is None else 0.75 * h + 0.25 * mean
        assert torch.allclose(oracle.step(g)[0].output, h)
    zeros = [[torch.zeros(5, dtype=F64)]] * 2
    assert not oracle.step(zeros)[0].output.any(), "unused: nothing changes"
    assert torch.allclose(oracle.state("h", 0, 0), h)
    oracle.may_be_unused = False
    h = 0.75 * h
    assert torch.allclose(oracle.step(zeros)[0].output, h), "a gradient like any other"
    bad = [[torch.full((5,), math.nan, dtype=F64)]] * 2
    assert oracle.step(bad)[0].output.isnan().all()
    assert torch.allclose(oracle.state("h", 0, 0), h)


@pytest.mark.parametrize("numel", [0, 1, 7])
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("row_width", [None, 1, 3, 16])
def test_odd_sizes(numel, compressor, row_width):
    oracle = Oracle(
        [(numel,)], F32, 2, compressor=compressor, row_width=row_width, ratio=0.3, sketch_dim=1
    )
    total = torch.zeros(numel)
    for step in range(3):
        g = gradients([(numel,)], 2, F32, step)
        output = oracle.step(g)[0].output
        total += (g[0][0] + g[1][0]) / 2 - output
    residual = sum(own[0].e for own in oracle.states) / 2
    assert torch.allclose(total, residual, atol=1e-5)


def test_eta_is_refused_without_ef21m():
    with pytest.raises(ValueError, match=r"eta: expected None with feedback='ef14', got 0\.3"):
        Oracle([(4, 4)], F32, 1, eta=0.3)
