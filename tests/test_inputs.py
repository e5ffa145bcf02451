"""What comes in: arrays where tensors are wanted, feature maps where spaces are, index tensors from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch import baselines, descriptors
from lfm_torch.alignment.gromov import gromov_wasserstein
from lfm_torch.alignment.relative import relative_representations
from lfm_torch.alignment.weights import choose_weights
from lfm_torch.integrations.pyg import knn_graph
from lfm_torch.measures.table import MEASURES

N = 60
X, Y = (torch.randn(N, d, generator=torch.Generator().manual_seed(seed)) for d, seed in ((4, 0), (4, 1)))
FUNCTIONS = torch.randn(N, 3, generator=torch.Generator().manual_seed(2))
ROWS = torch.arange(0, N, 4)
PAIRS = torch.stack([ROWS, ROWS], 1)
LABELS = torch.arange(N) % 3
GRAPH = lfm.build_graph(X, metric="euclidean")
BASIS = lfm.spectral_basis(GRAPH, n_basis=6)
DISTORTION = lfm.distortion(X, Y)
PAIRED = [
    getattr(baselines, name)
    for name in baselines.__all__
    if name not in ("MinibatchCKA", "relative_representation", "relative_similarity")
]


def streamed(x: Any, y: Any) -> Tensor:
    stream = baselines.MinibatchCKA()
    stream.update(x, y)
    return stream.compute()


# every public way in for points, functions, numbers of rows and labels: `t` leaves tensors, or makes arrays of them
CALLS: dict[str, Callable[[Callable[[Tensor], Any]], Any]] = {
    "knn": lambda t: lfm.knn(t(X), t(Y), n_neighbors=3),
    "knn of sets": lambda t: lfm.knn(t(X), n_neighbors=3, batch=t(LABELS.sort().values)),
    "build_graph": lambda t: lfm.build_graph(t(X)).weight,
    "build_graph of sets": lambda t: lfm.build_graph(t(X), batch=t(LABELS.sort().values)).weight,
    "knn_graph": lambda t: knn_graph(t(X[:, 0]), 3, batch=t(LABELS.sort().values), batch_size=3),
    "update": lambda t: GRAPH.update(t(Y)).weight,
    "laplacian": lambda t: GRAPH.laplacian() @ t(FUNCTIONS),
    "apply": lambda t: GRAPH.laplacian().apply(t(FUNCTIONS), t(FUNCTIONS), c=2.0),
    "heat": lambda t: GRAPH.laplacian().heat(t(FUNCTIONS), time=[1.0, 2.0]),
    "recurrence": lambda t: GRAPH.laplacian().recurrence(t(FUNCTIONS), [(1.0, 0.0, 0.0), (1.0, 0.5, -1.0)]),
    "quadratic_form": lambda t: GRAPH.laplacian().quadratic_form(t(FUNCTIONS)),
    "project": lambda t: BASIS.project(t(FUNCTIONS)),
    "reconstruct": lambda t: BASIS.reconstruct(t(FUNCTIONS[:6])),
    "extend": lambda t: BASIS.truncate(3).extend(t(Y), x=t(X), graph=GRAPH),
    "functional_map": lambda t: lfm.functional_map(BASIS, BASIS, t(FUNCTIONS), t(FUNCTIONS)).C,
    "transfer": lambda t: lfm.paired_map(BASIS, BASIS).transfer(t(FUNCTIONS), BASIS, BASIS),
    "choose_weights": lambda t: (
        choose_weights(BASIS, BASIS, t(torch.cdist(X, X[ROWS])), t(torch.cdist(X, X[ROWS])), t(PAIRS), n_folds=2).scores
    ),
    "similarity": lambda t: lfm.similarity(t(X), t(Y), measures=MEASURES),
    "significance": lambda t: lfm.significance(t(X), t(Y), n_permutations=3, n_splits=2),
    "sensitivity": lambda t: lfm.sensitivity(t(X), t(Y), n_samples=[40], n_neighbors=[9], n_basis=[5]),
    "distortion": lambda t: lfm.distortion(t(X), t(Y)).per_sample,
    "per_class": lambda t: DISTORTION.per_class(t(LABELS)),
    "share": lambda t: DISTORTION.share(t(LABELS == 1)),
    "auc": lambda t: DISTORTION.auc(t(LABELS == 1)),
    "compare": lambda t: lfm.compare({"a": t(X), "b": {"x": t(Y), "y": X}}).matrices,
    "align": lambda t: (
        lfm.align(
            t(X), t(X), anchors=t(PAIRS), labels=(t(LABELS), t(LABELS)), descriptors=(t(FUNCTIONS), t(FUNCTIONS))
        ).idx_yx
    ),
    "fit_translator": lambda t: lfm.fit_translator(t(X), t(Y), pairs=t(PAIRS), weights=t(1.0 + ROWS)).matrix,
    "translator": lambda t: lfm.fit_translator(X, Y)(t(X)),
    "relative_representations": lambda t: relative_representations(t(X), t(ROWS)),
    "relative_representations of points": lambda t: relative_representations(t(X), t(Y)),
    "mean_reciprocal_rank": lambda t: lfm.mean_reciprocal_rank(t(X), t(Y), targets=t(LABELS)),
    "anchor_distances": lambda t: descriptors.anchor_distances(t(X), t(ROWS)),
    "geodesic_distances": lambda t: descriptors.geodesic_distances(t(X), t(ROWS)),
    "label_indicators": lambda t: descriptors.label_indicators(t(LABELS), classes=t(LABELS[:2]), basis=BASIS),
    "heat_diffusion": lambda t: descriptors.heat_diffusion(GRAPH.laplacian(), t(ROWS), times=t(FUNCTIONS[0].abs())),
    "heat_kernel_signature": lambda t: descriptors.heat_kernel_signature(
        BASIS, times=t(FUNCTIONS[0].abs()), landmarks=t(ROWS)
    ),
    "wave_kernel_signature": lambda t: descriptors.wave_kernel_signature(BASIS, landmarks=t(ROWS)),
    "normalize": lambda t: descriptors.normalize(t(FUNCTIONS), BASIS),
    "farthest_points": lambda t: descriptors.farthest_points(t(X), 5),
    "gromov_wasserstein": lambda t: gromov_wasserstein(t(X), t(Y), start=t(X @ Y.mT)).plan,
    "dirichlet loss": lambda t: lfm.losses.DirichletAlignmentLoss()(t(X), t(Y)),
    "lfm loss": lambda t: lfm.losses.LFMAlignmentLoss()(t(X), t(Y)),
    "lfm loss with descriptors": lambda t: lfm.losses.LFMAlignmentLoss(reading="lfm")(
        t(X), t(Y), (t(FUNCTIONS), t(FUNCTIONS))
    ),
    "extract": lambda t: lfm.extract(nn.Sequential(nn.Identity()), t(X), layers="0"),
    "MinibatchCKA": lambda t: streamed(t(X), t(Y)),
    "relative_representation": lambda t: baselines.relative_representation(t(X), t(ROWS)),
    "relative_similarity": lambda t: baselines.relative_similarity(t(X), t(Y), anchors=t(ROWS)),
    **{function.__name__: lambda t, function=function: function(t(X), t(Y)) for function in PAIRED},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_are_taken_wherever_tensors_are(name: str) -> None:
    found, wanted = CALLS[name](lambda tensor: tensor.numpy()), CALLS[name](lambda tensor: tensor)
    if isinstance(wanted, Tensor):
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, wanted, equal_nan=True)
    else:
        assert type(found) is type(wanted)
        assert str(found) == str(wanted)


@pytest.mark.parametrize(
    "array",
    [
        X.numpy().astype(">f4"),
        X.flip(0).numpy()[::-1],
        np.asfortranarray(X.numpy()),
        np.frombuffer(X.numpy().tobytes(), np.float32).reshape(N, 4),
    ],
    ids=["byte order", "backwards", "columns first", "read-only"],
)
@pytest.mark.filterwarnings("error")
def test_arrays_of_any_layout(array: Any) -> None:
    before = array.copy()
    assert lfm.similarity(array, Y.numpy()) == lfm.similarity(X, Y)
    assert np.array_equal(array, before)


def test_fields_of_records() -> None:
    records = np.zeros(N, [("name", "u1"), ("x", "<f4", 4)])
    records["x"] = X.numpy()
    assert torch.equal(lfm.knn(records["x"], n_neighbors=3).indices, lfm.knn(X, n_neighbors=3).indices)


def test_half_precision_arrays() -> None:
    assert lfm.similarity(X.half().numpy(), Y.half().numpy()) == lfm.similarity(X.half(), Y.half())


class Frame:
    """Stands in for a table of pandas: rows have labels, which nothing here would look at."""

    def __array__(self) -> Any:
        return X.numpy()

    def to_numpy(self) -> Any:
        return X.numpy()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.long().numpy(), "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        (X.numpy().astype(np.longdouble), "x must be an array of a dtype that torch has, got float128"),
        (X.numpy().astype(object), "x must be an array of a dtype that torch has, got object"),
        (np.ma.masked_array(X.numpy(), X.numpy() > 1), "x must be an array without a mask, got a MaskedArray"),
        (X.tolist(), r"x must be a torch.Tensor or a numpy.ndarray, got list; take numpy.asarray\(\) of it"),
        (Frame(), r"x must be a torch.Tensor or a numpy.ndarray, got Frame; take its .to_numpy\(\)"),
        (None, "x must be a torch.Tensor or a numpy.ndarray, got NoneType$"),
        (X.double().numpy(), "y must have the dtype of x, torch.float64, got torch.float32"),
    ],
)
def test_what_is_neither(x: Any, message: str) -> None:
    if "float128" in message and np.dtype(np.longdouble).name != "float128":
        pytest.skip("long doubles have another name here")
    with pytest.raises(TypeError, match=message):
        lfm.similarity(x, Y)


def test_row_numbers_and_labels_may_be_lists() -> None:
    for rows in (ROWS.tolist(), range(0, N, 4), ROWS.int(), ROWS.to(torch.uint8), ROWS.numpy().astype(">i2")):
        wanted = descriptors.anchor_distances(X, ROWS)
        assert torch.equal(descriptors.anchor_distances(X, rows), wanted)  # type: ignore[arg-type]
    assert torch.equal(
        lfm.fit_translator(X, Y, pairs=PAIRS.tolist()).matrix, lfm.fit_translator(X, Y, pairs=PAIRS).matrix
    )
    assert torch.equal(DISTORTION.per_class(LABELS.tolist()), DISTORTION.per_class(LABELS))
    with pytest.raises(TypeError, match=r"anchors must be integers, got torch.bool; take mask.nonzero\(\)"):
        descriptors.anchor_distances(X, LABELS == 1)
    with pytest.raises(ValueError, match=r"anchors must have shape \[p\], p at least 1, got \[0\]"):
        descriptors.anchor_distances(X, [])
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch.int64"):
        DISTORTION.share(LABELS)
    with pytest.raises(ValueError, match=r"mask must have shape \[60\], got \[59\]"):
        DISTORTION.auc(LABELS[1:] == 1)


def test_a_comparison_keeps_arrays_and_tensors_under_one_name(tmp_path: Any) -> None:
    lfm.compare({"a": X, "b": Y}, store=tmp_path)
    pieces = sorted(tmp_path.rglob("*.safetensors"))
    lfm.compare({"a": X.numpy().astype(">f4"), "b": Y.numpy()}, store=tmp_path)
    assert sorted(tmp_path.rglob("*.safetensors")) == pieces


MAPS = torch.randn(8, 16, 10, 12, generator=torch.Generator().manual_seed(3))
# one-call functions: what they are given is one space
WHOLE: dict[str, Callable[[Any], Any]] = {
    "similarity": lambda x: lfm.similarity(x, x),
    "significance": lambda x: lfm.significance(x, x),
    "sensitivity": lambda x: lfm.sensitivity(x, x),
    "distortion": lambda x: lfm.distortion(x, x),
    "align": lambda x: lfm.align(x, x),
    "dirichlet loss": lambda x: lfm.losses.DirichletAlignmentLoss()(x, x),
    "lfm loss": lambda x: lfm.losses.LFMAlignmentLoss()(x, x),
    "target_basis": lambda x: lfm.losses.LFMAlignmentLoss().target_basis(x),
    "MinibatchCKA": lambda x: streamed(x, x),
    "relative_similarity": lambda x: baselines.relative_similarity(x, x),
    **{function.__name__: lambda x, function=function: function(x, x) for function in PAIRED},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", WHOLE)
def test_feature_maps_are_not_batches(name: str) -> None:
    offer = "" if name in ("significance", "sensitivity", "distortion", "align") else ".*batched=True"
    for x, pooled in ((MAPS, r"over space, x.mean\(\(2, 3\)\)"), (MAPS[0], r"over tokens, x.mean\(1\)")):
        for given in (x, x.numpy()):
            wanted = r"must have shape \[n, d\], a row per sample, got .*x.flatten\(1\), or pool it "
            with pytest.raises(ValueError, match=wanted + pooled + offer) as caught:
                WHOLE[name](given)
            assert bool(offer) == ("batched" in str(caught.value))


def test_a_comparison_says_which_layer_is_not_pooled() -> None:
    with pytest.warns(lfm.LFMWarning, match=r"b, layer x: .*got \[60, 2, 3\]: flatten each sample"):
        lfm.compare({"a": {"x": X}, "b": {"x": X.new_ones(N, 2, 3), "y": Y}})


@pytest.mark.parametrize("function", [*PAIRED, baselines.relative_similarity], ids=lambda function: function.__name__)
def test_batches_where_they_are_said_to_be(function: Callable[..., Tensor]) -> None:
    x, y = torch.randn(2, 3, 20, 4), torch.randn(2, 3, 20, 3)
    found = function(x, y, batched=True)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[1, 2], function(x[1, 2], y[1, 2]))
    torch.testing.assert_close(function(x[1, 2], y[1, 2], batched=True), found[1, 2])
