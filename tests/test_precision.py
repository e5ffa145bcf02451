"""Values and dtypes are the data's, whatever the program around a call has set: autocast, defaults, modes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ambients import AMBIENTS, public
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch import measures
from lfm_torch.alignment import consistent, gromov, relative, weights
from lfm_torch.integrations import pyg
from lfm_torch.maps import refine, retrieval
from lfm_torch.measures.map_readings import commutativity_error, orthogonality_error, spectral_distance
from lfm_torch.training import Monitor

N = 80


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def given() -> SimpleNamespace:
    """What the calls are made on: two related spaces in float32, and everything that follows from them."""
    x = randn(N, 6)
    y = (x @ randn(6, 5, seed=1) + 0.3 * randn(N, 5, seed=2)).tanh()
    graph, graph_y = lfm.build_graph(x), lfm.build_graph(y)
    basis, basis_y = lfm.spectral_basis(graph, n_basis=12), lfm.spectral_basis(graph_y, n_basis=10)
    rows = torch.arange(0, N, 8)
    return SimpleNamespace(
        x=x,
        y=y,
        graph=graph,
        laplacian=graph.laplacian(),
        laplacian_y=graph_y.laplacian(),
        basis=basis,
        basis_y=basis_y,
        fmap=lfm.paired_map(basis, basis_y),
        square=lfm.paired_map(basis.truncate(10), basis_y),
        translator=lfm.fit_translator(x, y),
        low=lfm.spectral_basis(graph, n_basis=4),
        rows=rows,
        pairs=torch.stack([rows, rows], 1),
        labels=torch.arange(N) % 3,
        mask=torch.arange(N) < 9,
        f=lfm.descriptors.anchor_distances(x, rows),
        f_y=lfm.descriptors.anchor_distances(y, rows),
        network=nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)),
    )


@functools.cache
def half(dtype: torch.dtype) -> SimpleNamespace:
    """The same with every tensor in a half type, as far as a thing has such a form."""
    g = given()
    moved = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vars(g).items()
    }
    for name in ("basis", "basis_y", "low", "fmap", "square", "translator"):
        moved[name] = getattr(g, name).to(dtype)
    return SimpleNamespace(**moved)


def _streamed(g: SimpleNamespace) -> Tensor:
    stream = lfm.baselines.MinibatchCKA()
    for x, y in zip(g.x.split(20), g.y.split(20), strict=True):
        stream.update(x, y)
    return stream.compute()


class Inner(nn.Module):
    """Passes its inputs on, through a layer that can be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _steps(g: SimpleNamespace) -> object:
    settings: dict[str, Any] = {"reference": "initial", "n_basis": 10, "measures": ("heat", "lfm", "linear_cka")}
    with Monitor(Inner(), g.x, layers="inner", **settings) as monitor:
        point = monitor.step()
        assert point is not None
        return point.scores, monitor.chance, monitor.layer_matrix("heat")


def _compared(g: SimpleNamespace) -> object:
    comparison = lfm.compare({"a": g.x, "b": g.y}, n_basis=10, measures=["lfm", "heat", "linear_cka", "pwcca"])
    return comparison.matrices, comparison.chance, comparison.trajectories(measure="heat")


def _baseline(name: str) -> Callable[[SimpleNamespace], object]:
    return lambda g: getattr(lfm.baselines, name)(g.x, g.y)


CALLS: dict[str, Callable[[SimpleNamespace], object]] = {
    "align": lambda g: lfm.align(g.x, g.y, anchors=g.pairs),
    "align_signs": lambda g: lfm.align_signs(g.basis_y, g.basis),
    "align_subspaces": lambda g: lfm.align_subspaces(g.basis_y, g.basis, tol=0.05),
    "build_graph": lambda g: [
        lfm.build_graph(g.x, weights=weights, metric=metric)
        for weights in ("gaussian", "self_tuning", "binary", "inverse_distance", "distance")
        for metric in ("angular", "euclidean")
    ],
    "compare": _compared,
    "consistent.consistent_maps": lambda g: consistent.consistent_maps({(0, 1): g.fmap}),
    "retrieval.retrieve": lambda g: retrieval.retrieve(g.y, g.y[:20]),
    "distortion": lambda g: [lfm.distortion(g.fmap, g.basis_y), lfm.distortion(g.x, g.y, n_basis=10)],
    "fit_translator": lambda g: [
        lfm.fit_translator(g.x, g.y, kind=kind, robust=True) for kind in ("orthogonal", "linear", "affine", "ridge")
    ],
    "functional_map": lambda g: lfm.functional_map(
        g.basis, g.basis_y, g.f, g.f_y, commutativity_weight=0.1, orthogonality_weight=0.1
    ),
    "gromov.gromov_wasserstein": lambda g: gromov.gromov_wasserstein(g.x, g.y),
    "heat_overlap": lambda g: lfm.heat_overlap(g.fmap),
    "heat_overlap_probes": lambda g: lfm.heat_overlap_probes(g.laplacian, g.laplacian_y),
    "icp": lambda g: lfm.icp(g.square, g.basis, g.basis_y),
    "knn": lambda g: [
        lfm.knn(*points, n_neighbors=9, metric=metric, backend=backend)
        for points in ((g.x,), (g.x, g.x[:20]))
        for metric in ("euclidean", "cosine", "angular", "inner_product")
        for backend in ("auto", "reference")
    ],
    "lfm_similarity": lambda g: lfm.lfm_similarity(g.fmap, symmetric=True),
    "weights.choose_weights": lambda g: weights.choose_weights(g.basis, g.basis_y, g.f, g.f_y, g.pairs),
    "mean_reciprocal_rank": lambda g: lfm.mean_reciprocal_rank(g.x, g.x + 0.2, metric="euclidean"),
    "measures.read": lambda g: measures.read(g.fmap, "heat"),
    "paired_map": lambda g: lfm.paired_map(g.basis, g.basis_y),
    "pointwise_map": lambda g: lfm.pointwise_map(g.fmap, g.basis, g.basis_y),
    "pyg.knn_graph": lambda g: pyg.knn_graph(g.x, 5),
    "refine.orthogonalize": lambda g: refine.orthogonalize(g.fmap),
    "sensitivity": lambda g: lfm.sensitivity(
        g.x, g.y, n_samples=[40, 80], n_neighbors=[5, 9], n_basis=[5, 9], measures=["heat", "lfm", "rbf_cka"]
    ),
    "shape_difference": lambda g: [lfm.shape_difference(g.fmap, kind=kind) for kind in ("area", "conformal")],
    "significance": lambda g: lfm.significance(
        g.x, g.y, measures=["heat", "lfm", "relative"], n_permutations=5, n_splits=3, n_basis=10
    ),
    "similarity": lambda g: lfm.similarity(g.x, g.y, n_basis=10, measures=list(measures.MEASURES)),
    "similarity.commutativity_error": lambda g: commutativity_error(g.fmap, centered=True),
    "similarity.orthogonality_error": lambda g: orthogonality_error(g.fmap),
    "similarity.spectral_distance": lambda g: spectral_distance(g.fmap),
    "sinkhorn_map": lambda g: lfm.sinkhorn_map(g.square, g.basis, g.basis_y),
    "spectral_basis": lambda g: [
        lfm.spectral_basis(graph, n_basis=8, solver=solver, warm_start=warm_start)
        for graph in (g.graph, g.graph.laplacian("unnormalized"))
        for solver in ("dense", "krylov", "lobpcg", "auto")
        for warm_start in (None, g.basis)
    ],
    "stitch": lambda g: lfm.stitch(nn.Identity(), nn.Identity(), g.translator)(g.x),
    "subspace_overlap": lambda g: lfm.subspace_overlap(g.fmap),
    "relative.relative_representations": lambda g: relative.relative_representations(g.x, g.rows),
    "zoomout": lambda g: lfm.zoomout(lfm.paired_map(g.basis.truncate(4), g.basis_y.truncate(4)), g.basis, g.basis_y),
    "Basis.extend": lambda g: g.low.extend(g.x[:9] + 0.1, x=g.x, graph=g.graph),
    "Basis.project": lambda g: g.basis.project(g.f),
    "Basis.reconstruct": lambda g: g.basis.reconstruct(g.basis.evecs[:12]),
    "Basis.truncate": lambda g: g.basis.truncate(3),
    "Basis.unbatch": lambda g: g.basis.unbatch(),
    "ConsistentMaps.fmap": lambda g: consistent.consistent_maps({(0, 1): g.fmap}).fmap(1, 0),
    "Distortion.auc": lambda g: lfm.distortion(g.fmap, g.basis_y).auc(g.mask),
    "Distortion.per_class": lambda g: lfm.distortion(g.fmap, g.basis_y).per_class(g.labels),
    "Distortion.share": lambda g: lfm.distortion(g.fmap, g.basis_y).share(g.mask),
    "Distortion.worst": lambda g: lfm.distortion(g.fmap, g.basis_y).worst(5),
    "FunctionalMap.transfer": lambda g: g.fmap.transfer(g.f, g.basis, g.basis_y),
    "Graph.batch": lambda g: lfm.Graph.batch([g.graph, lfm.build_graph(g.y[:50])]),
    "Graph.component_labels": lambda g: lfm.build_graph(g.x).component_labels,
    "Graph.degree": lambda g: lfm.build_graph(g.x).degree,
    "Graph.edge_index": lambda g: g.graph.edge_index,
    "Graph.from_scipy": lambda g: lfm.Graph.from_scipy(g.graph.to_scipy()),
    "Graph.from_torch_csr": lambda g: lfm.Graph.from_torch_csr(g.graph.to_torch_csr()),
    "Graph.laplacian": lambda g: lfm.build_graph(g.x).laplacian("random_walk").scalings,
    "Graph.n_components": lambda g: lfm.build_graph(g.x).n_components,
    "Graph.to_scipy": lambda g: g.graph.to_scipy().toarray(),
    "Graph.to_torch_csr": lambda g: g.graph.to_torch_csr().values(),
    "Graph.unbatch": lambda g: lfm.Graph.batch([g.graph, lfm.build_graph(g.y)]).unbatch(),
    "Graph.update": lambda g: g.graph.update(g.x.sinh()),
    "Laplacian.apply": lambda g: g.laplacian.apply(g.f, g.f, a=0.5, b=1.0, c=2.0),
    "Laplacian.heat": lambda g: g.laplacian.heat(g.f, time=[0.5, 3.0]),
    "Laplacian.null_space": lambda g: lfm.build_graph(g.x).laplacian().null_space(3),
    "Laplacian.quadratic_form": lambda g: g.laplacian.quadratic_form(g.f),
    "Laplacian.recurrence": lambda g: g.laplacian.recurrence(g.f, [(1.0, 0.5, 0.0), (0.5, 0.0, -1.0)]),
    "Laplacian.to_dense": lambda g: g.laplacian.to_dense(),
    "Laplacian.to_scipy": lambda g: g.laplacian.to_scipy().toarray(),
    "Laplacian.to_torch_csr": lambda g: g.laplacian.to_torch_csr().values(),
    "Laplacian.__matmul__": lambda g: g.laplacian @ g.f,
    "Laplacian.unbatch": lambda g: [part.scalings for part in g.laplacian.unbatch()],
    "Monitor.step": _steps,
    "Translator.__call__": lambda g: g.translator(g.x),
    "Translator.inverse": lambda g: lfm.fit_translator(g.x[:, :5], g.y, kind="affine").inverse(),
    "baselines.MinibatchCKA": _streamed,
    **{
        f"baselines.{name}": _baseline(name)
        for name in lfm.baselines.__all__
        if name not in ("MinibatchCKA", "relative_representation")
    },
    "baselines.relative_representation": lambda g: lfm.baselines.relative_representation(g.x, g.rows),
    "descriptors.anchor_distances": lambda g: lfm.descriptors.anchor_distances(g.x, g.rows, kernel=True),
    "descriptors.farthest_points": lambda g: lfm.descriptors.farthest_points(g.x, 9),
    "descriptors.geodesic_distances": lambda g: lfm.descriptors.geodesic_distances(g.x, g.rows),
    "descriptors.heat_diffusion": lambda g: [lfm.descriptors.heat_diffusion(s, g.rows) for s in (g.basis, g.laplacian)],
    "descriptors.heat_kernel_signature": lambda g: lfm.descriptors.heat_kernel_signature(g.basis, landmarks=g.rows),
    "descriptors.heat_times": lambda g: lfm.descriptors.heat_times(g.basis),
    "descriptors.label_indicators": lambda g: lfm.descriptors.label_indicators(g.labels, basis=g.basis),
    "descriptors.normalize": lambda g: lfm.descriptors.normalize(g.f, g.basis),
    "descriptors.wave_kernel_signature": lambda g: lfm.descriptors.wave_kernel_signature(g.basis),
    "losses.DirichletAlignmentLoss": lambda g: lfm.losses.DirichletAlignmentLoss(n_basis=8)(g.x, g.y),
    "losses.LFMAlignmentLoss": lambda g: lfm.losses.LFMAlignmentLoss(n_basis=8)(g.x, g.y),
}
# what moves, names, or shows and computes no number; and extract, whose numbers are the network's (see below)
WITHOUT_NUMBERS = {
    "Alignment", "Checkpoints", "Comparison", "LFMWarning", "build_info", "extract", "Graph.to_torch_sparse",
    "Laplacian.T", "Laplacian.diagonal", "Laplacian.scalings", "Laplacian.shape", "Laplacian.to_torch_sparse",
    "Laplacian.upper_bound", "Graph.is_constant", "FunctionalMap.adjoint", "Basis.n", "Basis.n_basis",
    *(f"{kind}.{name}" for kind in ("Basis", "FunctionalMap", "Graph") for name in ("to", "save", "load")),
}  # fmt: skip


def public_names() -> set[str]:
    """Functions, and the public members of the classes, that the package hands out."""
    return {name if owner is lfm else f"{owner.__name__.split('.')[-1]}.{name}" for owner, name in public()}


def parts(value: object) -> Iterator[object]:
    """Yield the tensors and numbers inside a result."""
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from parts(getattr(value, field.name))
    elif isinstance(value, dict):
        for part in value.values():
            yield from parts(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from parts(part)
    else:
        yield value


def check_same(found: object, wanted: object) -> None:
    found, wanted = list(parts(found)), list(parts(wanted))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if isinstance(b, Tensor):
            assert isinstance(a, Tensor)
            assert (a.dtype, a.device) == (b.dtype, b.device)
        if isinstance(b, (str, type(None))):
            assert a == b
        else:  # the same steps, up to how a product is split
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)


@functools.cache
def wanted(name: str) -> object:
    return CALLS[name](given())


def test_every_public_name_is_looked_at() -> None:
    assert {name for name in public_names() if name.split(".")[0] not in WITHOUT_NUMBERS} - WITHOUT_NUMBERS <= set(
        CALLS
    )


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Modes are a thread's own, and the kernels have threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ambient", AMBIENTS)
def test_what_surrounds_a_call_changes_nothing(name: str, ambient: str) -> None:
    expected = wanted(name)
    with AMBIENTS[ambient]():
        found = CALLS[name](given())
    check_same(found, expected)


# of points and maps: graphs are weighted in float32 from the start
OF_HALF_TYPES = (
    "build_graph", "knn", "similarity", "significance", "compare", "fit_translator", "mean_reciprocal_rank",
    "paired_map", "pointwise_map", "functional_map", "zoomout", "icp", "sinkhorn_map", "lfm_similarity",
    "subspace_overlap", "heat_overlap", "distortion", "shape_difference", "refine.orthogonalize", "measures.read",
    "relative.relative_representations", "retrieval.retrieve", "gromov.gromov_wasserstein",
    "Basis.project", "Basis.reconstruct", "FunctionalMap.transfer", "Translator.__call__",
    *(name for name in CALLS if name.startswith(("baselines.", "descriptors.", "losses."))),
)  # fmt: skip


@pytest.mark.parametrize("name", OF_HALF_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_single(name: str, dtype: torch.dtype) -> None:
    kept = half(dtype)
    single = SimpleNamespace(
        **{
            key: value.to(torch.float32) if getattr(value, "dtype", None) == dtype or hasattr(value, "save") else value
            for key, value in vars(kept).items()
        }
    )
    found = CALLS[name](kept)
    assert not any(isinstance(part, Tensor) and part.dtype == dtype for part in parts(found))
    check_same(found, CALLS[name](single))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_users_network_keeps_its_autocast(dtype: torch.dtype) -> None:
    g = given()
    with torch.autocast("cpu", dtype):
        wanted = g.network[0](g.x).detach()
        found = lfm.extract(g.network, g.x, layers="0", batch_size=N)["0"]
        with Monitor(g.network, g.x, layers="0", reference={"0": g.y}, n_basis=10) as monitor:
            scores = monitor.history[0].scores["0"]
    assert wanted.dtype == dtype
    assert torch.equal(found, wanted.float())
    assert scores["heat"] == pytest.approx(float(lfm.similarity(wanted.float(), g.y, n_basis=10)["heat"]), abs=1e-4)


LOSSES = {
    "Dirichlet": lambda x, g: lfm.losses.DirichletAlignmentLoss(n_basis=8)(x, g.y),
    "LFM": lambda x, g: lfm.losses.LFMAlignmentLoss(n_basis=8)(x, g.y),
    "LFM, unpaired": lambda x, g: lfm.losses.LFMAlignmentLoss(n_basis=8, reading="lfm")(x, g.y, (g.f, g.f_y)),
    "translator": lambda x, g: g.translator(x).square().sum(),
    "similarity": lambda x, g: lfm.similarity(x, g.y, n_basis=8, measures=["overlap"])["overlap"],
    "inner products": lambda x, g: lfm.knn(x, g.x + 1, n_neighbors=5, metric="inner_product").distances.sum(),
}


def gradient(loss: Callable[[Tensor, SimpleNamespace], Tensor]) -> Tensor:
    x = given().x.clone().requires_grad_()
    loss(x, given()).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ambient", [name for name in AMBIENTS if name != "inference-mode"])
def test_nor_gradients_where_backward_is_called_inside(name: str, ambient: str) -> None:
    wanted = gradient(LOSSES[name])
    with AMBIENTS[ambient]():
        found = gradient(LOSSES[name])
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
