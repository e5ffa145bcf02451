"""Nearest neighbours against dense float64 NumPy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.masked import masked_tensor

import lfm_torch as lfm
from lfm_torch.graphs.neighbors import default_n_neighbors

METRICS = ("euclidean", "cosine", "angular", "inner_product")


def assert_neighbors(found: lfm.Neighbors, x: torch.Tensor, y: torch.Tensor | None, metric: str) -> None:
    """Equal distances within rounding; indices at the distance returned; self excluded; sorted, ties by index."""
    points, database = x.double().numpy(), None if y is None else y.double().numpy()
    k = found.indices.shape[-1]
    _, wanted = oracles.knn(points, database, k, metric)
    table = oracles.distances(points, points if database is None else database, metric)
    distances, indices = found.distances.double().numpy(), found.indices.numpy()
    eps = 5e-7 if found.distances.dtype == torch.float32 else 1e-13
    # float64 rounding of the unit vectors, or of a product of large terms that cancel
    floor = {"euclidean": 0.0, "angular": 1e-15, "cosine": 1e-18, "inner_product": 1e-15 * np.abs(table).max()}[metric]
    np.testing.assert_allclose(distances, wanted, rtol=eps, atol=floor)
    np.testing.assert_allclose(np.take_along_axis(table, indices, 1), distances, rtol=eps, atol=floor)
    if y is None:
        assert not (indices == np.arange(len(points))[:, None]).any()
    assert all(len(set(row)) == k for row in indices.tolist())
    order = -distances if metric == "inner_product" else distances
    steps = np.diff(order, axis=1)
    assert (steps >= 0).all()
    assert (np.diff(indices, axis=1)[steps == 0] > 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(7, 1, 6), (100, 3, 10), (333, 65, 100), (1500, 16, 40), (2100, 140, 7)])
def test_knn_in_itself(n: int, d: int, k: int, dtype: torch.dtype, metric: str) -> None:
    x = torch.randn(n, d, dtype=dtype)
    assert_neighbors(lfm.knn(x, n_neighbors=k, metric=metric), x, None, metric)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 60, 63, 64, 65])
def test_knn_of_few_candidates_with_ties(k: int) -> None:
    x = torch.randint(0, 3, (66, 4)).float()
    assert_neighbors(lfm.knn(x, n_neighbors=k), x, None, "euclidean")


@pytest.mark.parametrize("metric", METRICS)
def test_knn_between_two_sets(metric: str) -> None:
    x, y = torch.randn(150, 20), torch.randn(2500, 20)
    assert_neighbors(lfm.knn(x, y, n_neighbors=2500, metric=metric), x, y, metric)
    assert_neighbors(lfm.knn(x, y, n_neighbors=3, metric=metric), x, y, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_knn_batched_equals_one_by_one(metric: str) -> None:
    x, y = torch.randn(2, 3, 90, 8), torch.randn(2, 3, 60, 8)
    for other in (None, y):
        batched = lfm.knn(x, other, n_neighbors=11, metric=metric)
        for index in np.ndindex(2, 3):
            single = lfm.knn(x[index], None if other is None else other[index], n_neighbors=11, metric=metric)
            assert torch.equal(batched.indices[index], single.indices)
            assert torch.equal(batched.distances[index], single.distances)


@settings(max_examples=60)
@given(
    n=st.integers(2, 60),
    d=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e20]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    kind=st.sampled_from(["normal", "grid", "duplicates", "outlier", "near ties"]),
    data=st.data(),
)
def test_knn_of_hostile_points(
    n: int,
    d: int,
    seed: int,
    metric: str,
    dtype: torch.dtype,
    scale: float,
    offset: float,
    kind: str,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "grid":
        x = x.round() + 0.5
    elif kind == "duplicates":
        x = x[torch.randint(0, max(1, n // 3), (n,), generator=generator)]
    elif kind == "outlier":
        x[0] *= 1e12
    elif kind == "near ties":  # apart by a few units in the last place
        x = x[:1] + 1e-7 * x.round()
    x = ((x * 1e-2 + offset if offset > 1 else x + offset) * scale).to(dtype)
    if metric in ("cosine", "angular"):
        x = torch.where((x == 0).all(-1, keepdim=True), torch.full_like(x, scale), x)
    k = data.draw(st.integers(1, n - 1))
    found = lfm.knn(x, n_neighbors=k, metric=metric)
    exact = oracles.knn(x.double().numpy(), None, k, metric)[1]
    wanted = (
        torch.from_numpy(exact).to(dtype).double().numpy()
    )  # a product of 1e18s is beyond float32: infinity is right
    largest = float(x.double().abs().max())
    # what float64 rounding of unit vectors, or of a product whose terms cancel, may leave
    floor = {"inner_product": 1e-15 * d * largest**2, "angular": 1e-15, "cosine": 1e-15, "euclidean": 1e-15 * largest}
    np.testing.assert_allclose(found.distances.double().numpy(), wanted, rtol=1e-6, atol=max(floor[metric], 1e-44))
    reference = lfm.knn(x, n_neighbors=k, metric=metric, backend="reference")
    # halves are exact in binary, and so are the distances between them: ties must fall the same way
    if kind == "grid" and metric == "euclidean" and scale == 1.0 and offset <= 1:
        assert torch.equal(found.indices, reference.indices)


@settings(max_examples=40)
@given(
    n=st.integers(1, 300),
    m=st.integers(1, 400),
    d=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    clusters=st.sampled_from([0, 1, 7]),
    spread=st.sampled_from([1e-3, 1e-1]),
    data=st.data(),
)
def test_knn_against_the_oracle(
    n: int,
    m: int,
    d: int,
    seed: int,
    metric: str,
    dtype: torch.dtype,
    clusters: int,
    spread: float,
    data: st.DataObject,
) -> None:
    """Several blocks of rows and columns, tight clusters far from the centre, every dtype."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n + m, d, generator=generator)
    if clusters:
        centers = torch.randint(0, min(clusters, n + m), (n + m,), generator=generator)
        points = points[centers] + spread * points
    points = points.to(dtype)
    points = torch.where((points == 0).all(-1, keepdim=True), torch.ones_like(points), points)
    x, y = points[:n], points[n:]
    if n > 1:
        k = data.draw(st.integers(1, n - 1))
        assert_neighbors(lfm.knn(x, n_neighbors=k, metric=metric), x, None, metric)
    k = data.draw(st.integers(1, m))
    assert_neighbors(lfm.knn(x, y, n_neighbors=k, metric=metric), x, y, metric)


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_knn_of_points_that_the_filter_cannot_tell_apart(metric: str) -> None:
    """Rows whose candidates do not fit are searched again; the twin gives the same indices, not only distances."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 24, generator=generator).mul(64).round()
    near = torch.randint(0, 3, (2500, 24), generator=generator) / 512
    x = centers[torch.randint(0, 3, (2500,), generator=generator)] + near  # exact in float32, and so are the squares
    ours = lfm.knn(x, n_neighbors=20, metric=metric)
    twin = lfm.knn(x, n_neighbors=20, metric=metric, backend="reference")
    assert torch.equal(ours.indices, twin.indices)
    assert torch.equal(ours.distances, twin.distances)


def test_knn_where_the_limit_is_guessed_too_low() -> None:
    """Every other point in the order of the positions is near: what the first tiles show is no sample of the rest."""
    n = 3000
    step = int(0.6180339887498949 * n)
    while np.gcd(step, n) != 1:
        step += 1
    x = torch.randn(n, 3)
    order = torch.arange(n) * step % n
    x[order[:600]] *= 1e-2  # the blocks that meet first are dense, all others sparse
    x[order[600:]] += 5 * torch.randn(n - 600, 3).sign()
    assert_neighbors(lfm.knn(x, n_neighbors=100), x, None, "euclidean")


def test_knn_where_the_expansion_of_the_square_fails() -> None:
    x = (1e4 + 1e-2 * torch.randn(500, 30, dtype=torch.float64)).float()
    assert_neighbors(lfm.knn(x, n_neighbors=20), x, None, "euclidean")


def test_knn_of_half_precision_searches_in_float32() -> None:
    x = torch.randn(80, 6)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        found = lfm.knn(half, n_neighbors=5)
        assert found.distances.dtype == torch.float32
        assert torch.equal(found.indices, lfm.knn(half.float(), n_neighbors=5).indices)


@pytest.mark.parametrize("metric", METRICS)
def test_knn_gradient(metric: str) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lfm.knn(x, n_neighbors=4, metric=metric).distances, (x,))
    assert torch.autograd.gradcheck(lambda x, y: lfm.knn(x, y, n_neighbors=4, metric=metric).distances, (x, y))


@settings(max_examples=30)
@given(
    metric=st.sampled_from(["cosine", "angular"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-44, 1e-30, 1.0, 1e20, 1e37]),
    share=st.sampled_from([0.05, 0.5, 0.95]),
    form=st.sampled_from(["one set", "two sets", "ragged", "ragged with y"]),
    backend=st.sampled_from(["auto", "reference"]),
    seed=st.integers(0, 2**31),
)
def test_rows_of_zeros_are_orthogonal_to_all(
    metric: str, dtype: torch.dtype, scale: float, share: float, form: str, backend: str, seed: int
) -> None:
    """As if each had a dimension of its own."""
    generator = torch.Generator().manual_seed(seed)
    n, d, k = 41, 5, 7
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2))
    dead = torch.rand(2, n, generator=generator) < share
    dead[:, [3, 30]] = False  # one that is not, in each part
    for points, zero in ((x, dead[0]), (y, dead[1])):
        points[zero] = 0
    unit = torch.zeros(2 * n, d + 2 * n, dtype=torch.float64)
    unit[:, :d] = torch.cat([x, y]) / max(scale, 1e-44)
    unit[:, d:] = torch.diag(dead.flatten().double())
    other = y if form in ("two sets", "ragged with y") else None
    columns = unit[n:] if other is not None else unit[:n]
    parts = [slice(0, 20), slice(20, n)] if "ragged" in form else [slice(0, n)]
    batch = None if len(parts) == 1 else torch.tensor([0, 20, n])
    offsets = {"batch": batch, "batch_y": batch if other is not None else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lfm.LFMWarning)
        found = lfm.knn(x, other, n_neighbors=k, metric=metric, backend=backend, **offsets)
        x.requires_grad_()
        recorded = lfm.knn(x, other, n_neighbors=k, metric=metric, backend=backend, **offsets)
    assert torch.equal(found.indices, recorded.indices)
    assert torch.equal(found.distances, recorded.distances.detach())
    for part in parts:
        own = None if other is None else columns[part].numpy()
        table = oracles.distances(unit[:n][part].numpy(), columns[part].numpy(), metric)
        wanted = oracles.knn(unit[:n][part].numpy(), own, k, metric)[1]
        eps = 1e-2 if scale < 1e-40 and dtype == torch.float32 else 1e-6
        np.testing.assert_allclose(found.distances[part].double().numpy(), wanted, rtol=eps, atol=1e-7)
        local = (found.indices[part] - part.start).numpy()
        np.testing.assert_allclose(np.take_along_axis(table, local, 1), wanted, rtol=eps, atol=1e-7)
        for row in range(part.start, part.stop):
            if dead[0, row]:
                others = [i for i in range(part.start, part.stop) if other is not None or i != row]
                assert found.indices[row].tolist() == others[:k]
    if dtype == torch.float32 and scale < 1e-40:  # a gradient of 1e44 is beyond the dtype
        return
    recorded.distances.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert torch.equal(x.grad[dead[0]], torch.zeros_like(x.grad[dead[0]]))


@pytest.mark.parametrize("call", [lambda x: lfm.knn(x, n_neighbors=3, metric="cosine"), lfm.build_graph])
def test_rows_of_zeros_are_said_once_with_their_number(call: Any) -> None:
    x = torch.randn(2, 20, 3)
    x[0, 4] = x[1, 7] = x[1, 8] = 0
    with pytest.warns(lfm.LFMWarning, match="^3 of 40 rows are zero") as said:
        call(x)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lfm.knn(x, n_neighbors=3)


@pytest.mark.parametrize("metric", ["cosine", "angular"])
def test_rows_of_zeros_leave_the_gradient_of_the_others(metric: str) -> None:
    x = torch.randn(30, 4, dtype=torch.float64)
    with_zeros = torch.cat([x, torch.zeros(1, 4)]).requires_grad_()
    x.requires_grad_()
    # so few neighbours that none of them is the row of zeros
    lfm.knn(x, n_neighbors=5, metric=metric).distances.square().sum().backward()
    with pytest.warns(lfm.LFMWarning, match="1 of 31"):
        found = lfm.knn(with_zeros, n_neighbors=5, metric=metric)
    found.distances.square().sum().backward()
    assert x.grad is not None
    assert with_zeros.grad is not None
    torch.testing.assert_close(with_zeros.grad[:30], x.grad)


@pytest.mark.parametrize("kind", ["normal", "one large column", "duplicates", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_values_do_not_depend_on_whether_a_gradient_is_asked_for(metric: str, dtype: torch.dtype, kind: str) -> None:
    x, y = torch.randn(200, 9, dtype=dtype), torch.randn(150, 9, dtype=dtype)
    if kind == "one large column":
        x[:, 0] *= 1e6
    elif kind == "duplicates":
        x = x[torch.randint(0, 60, (200,))]
    elif kind == "grid":
        x = x.round() + 0.5
    for other in (None, y):
        plain = lfm.knn(x, other, n_neighbors=60, metric=metric)
        recorded = lfm.knn(x.clone().requires_grad_(), other, n_neighbors=60, metric=metric)
        assert torch.equal(plain.indices, recorded.indices)
        assert torch.equal(plain.distances, recorded.distances.detach())


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("metric", ["euclidean", "angular", "cosine"])
def test_gradients_at_any_scale(metric: str, scale: float, between: bool) -> None:
    points = [(torch.randn(n, 5) * scale) for n in (12, 9)]

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        x, y = (part.to(dtype).requires_grad_() for part in points)
        found = lfm.knn(x, y if between else None, n_neighbors=3, metric=metric).distances
        # of a size near 1 whatever the scale
        value = (found / scale if metric == "euclidean" else found).sum()
        return [grad.double() * scale for grad in torch.autograd.grad(value, (x, y) if between else (x,))]

    for single, double in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert bool(single.isfinite().all())
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-5)


def test_knn_gradient_at_duplicates_is_finite() -> None:
    x = torch.ones(5, 2, requires_grad=True)
    lfm.knn(x, n_neighbors=2).distances.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(5, 2))


def quantized(x: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR", "ignore:.*nested tensors", "ignore:.*MaskedTensors", "ignore:.*quantize"
)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: lfm.knn(x.tolist(), n_neighbors=2),
            TypeError,
            "x must be a torch.Tensor or a numpy.ndarray, got list",
        ),
        (lambda x: lfm.knn(x.int(), n_neighbors=2), TypeError, "x must be float16, .* got torch.int32"),
        (lambda x: lfm.knn(x[0], n_neighbors=2), ValueError, r"x must have shape \[..., n, d\], got \[3\]"),
        (lambda x: lfm.knn(x[:, :0], n_neighbors=2), ValueError, "without empty dimensions"),
        (lambda x: lfm.knn(x, n_neighbors=10), ValueError, "n_neighbors must be between 1 and 9 .*, got 10"),
        (lambda x: lfm.knn(x, n_neighbors=0), ValueError, "got 0"),
        (lambda x: lfm.knn(x, n_neighbors=2.0), TypeError, "n_neighbors must be an int, got float"),
        (lambda x: lfm.knn(x, n_neighbors=2, metric="euclid"), ValueError, "did you mean 'euclidean'"),
        (lambda x: lfm.knn(x, x.double(), n_neighbors=2), TypeError, "y must have the dtype of x"),
        (lambda x: lfm.knn(x, x[:, :2], n_neighbors=2), ValueError, "y must have shape"),
        (lambda x: lfm.knn(x.index_fill(0, torch.tensor(4), torch.nan), n_neighbors=2), ValueError, "got nan in row 4"),
        (
            lambda x: lfm.knn(x.index_fill(0, torch.tensor(6), -torch.inf), n_neighbors=2),
            ValueError,
            "got -inf in row 6",
        ),
        (
            lambda x: lfm.knn(0 * x, n_neighbors=2, metric="angular"),
            ValueError,
            "x must have rows that are not zero under the metrics 'cosine' and 'angular', got nothing but zeros",
        ),
        (lambda x: lfm.knn(x, 0 * x, n_neighbors=2, metric="cosine"), ValueError, "y must have rows that are not zero"),
        (lambda x: lfm.knn(x.to_sparse(), n_neighbors=2), TypeError, r"layout torch.sparse_coo; take x.to_dense\(\)"),
        (lambda x: lfm.knn(x.to_sparse_csr(), n_neighbors=2), TypeError, "got the layout torch.sparse_csr"),
        (lambda x: lfm.knn(x.to_mkldnn(), n_neighbors=2), TypeError, "got the layout torch._mkldnn"),
        (lambda x: lfm.knn(x, x.to_sparse(), n_neighbors=2), TypeError, r"y must be .* take y.to_dense\(\)"),
        (lambda x: lfm.knn(torch.nested.nested_tensor([x, x[:3]]), n_neighbors=2), TypeError, "got a nested one"),
        (lambda x: lfm.knn(masked_tensor(x, x > 0), n_neighbors=2), TypeError, "got a masked one"),
        (lambda x: lfm.knn(x.to(torch.complex64), n_neighbors=2), TypeError, "got torch.complex64"),
        (lambda x: lfm.knn(quantized(x), n_neighbors=2), TypeError, r"got torch.qint8; take x.dequantize\(\)"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    x = torch.randn(10, 3)
    with pytest.raises(error, match=message):
        call(x)  # type: ignore[operator]


def test_the_bad_row_of_a_batch_is_named() -> None:
    x = torch.randn(2, 3, 10, 4)
    x[1, 2, 7, 1] = torch.inf
    with pytest.raises(ValueError, match=r"row 7 of batch entry \[1, 2\] \(column 1\)"):
        lfm.knn(x, n_neighbors=2)


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    x = torch.full((4, 2), 1.5e308, dtype=torch.float64) * torch.tensor([1, 0.5, 0.25, 0.1]).unsqueeze(1)
    lfm.knn(x / 1e200, n_neighbors=1)
    lfm._checks.check_finite("x", x)


def test_the_finite_check_takes_whatever_a_layer_gives() -> None:
    check = lfm._checks.check_finite
    for x in (torch.zeros(3, 0), torch.tensor([[True, False]]), torch.tensor([[1, 2]]), torch.tensor([[1j, 2.0]])):
        check("x", x)
    assert check("x", torch.tensor([[-3.0, 2.0]])) == 3
    assert check("x", torch.tensor([[-3.0, 2.0]]).half()) == 3
    with pytest.raises(ValueError, match="row 0"):
        check("x", torch.tensor([[complex(torch.nan, 0)]]))


def test_default_number_of_neighbors() -> None:
    assert [default_n_neighbors(n) for n in (2, 5, 100, 2000, 10**6)] == [1, 1, 15, 300, 300]
