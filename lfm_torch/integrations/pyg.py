"""PyTorch Geometric: ``knn_graph`` as torch_cluster has it, but for any k, and graphs in the forms of PyG.

``knn_graph`` needs none of these packages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch.graphs.graph import Graph
from lfm_torch.graphs.neighbors import knn
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.sets import set_offsets

if TYPE_CHECKING:
    import torch_geometric.data
    import torch_sparse

Flow = Literal["source_to_target", "target_to_source"]


def knn_graph(
    x: ArrayLike,
    k: int,
    batch: IndexLike | None = None,
    loop: bool = False,
    flow: Flow = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """Return the edges to the k nearest points as ``torch_cluster.knn_graph`` does, without its limit of k = 100.

    Edges come point by point, nearest first; in the default flow row 0 holds the neighbours and row 1 the points that
    chose them. Differences, both where torch_cluster leaves the answer open: duplicates of a point never take the place
    of its self-loop, and never cost it an edge.

    Args:
        x: Points ``[n, d]``, or ``[n]`` for d = 1.
        k: Edges per point, with ``loop`` the self-loop among them; a set with fewer points gives fewer.
        batch: The set of each point, ascending; edges stay within a set.
        loop: Start the edges of every point with its self-loop.
        flow: "source_to_target", or "target_to_source" to swap the rows.
        cosine: By cosine instead of Euclidean distance.
        num_workers: Not used: torch's own threads do the work.
        batch_size: The number of sets, where it is known; not used either, but checked against ``batch``.

    Returns:
        ``edge_index [2, edges]`` int64.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: k below 1, an unknown flow, more sets than ``batch_size``, and what :func:`knn` refuses.

    Example:
        >>> import torch
        >>> from lfm_torch.integrations.pyg import knn_graph
        >>> knn_graph(torch.tensor([[0.0], [1.0], [3.0]]), k=1)
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    _checks.check_choice("flow", flow, ("source_to_target", "target_to_source"))
    x = _checks.as_tensor("x", x)
    x = _checks.check_points("x", x.unsqueeze(1) if x.dim() == 1 else x)
    _checks.check_range("k", k, 1, 2**31 - 1, "indices are 32 bits inside")
    n = x.shape[0]
    sets = None if batch is None else _checks.as_integers("batch", batch, torch.device("cpu"))
    if batch_size is not None and sets is not None and sets.numel() and _checks.has_values(sets):
        count = int(sets.max()) + 1
        if batch_size < count:
            raise ValueError(f"batch_size must be at least {count}, the sets of batch, got {batch_size}")
    others = k - loop
    points = torch.arange(n, device=x.device).unsqueeze(1)
    chosen = points[:, :0]
    if others > 0 and n > 1:
        metric: Metric = "cosine" if cosine else "euclidean"
        with torch.no_grad():
            chosen = knn(x, n_neighbors=min(others, n - 1), metric=metric, batch=sets).indices
    if loop:
        chosen = torch.cat([points, chosen], 1)
    edges = torch.stack([chosen, points.expand_as(chosen)]).flatten(1)
    if sets is not None:  # small ones have no neighbours for all places
        edges = edges[:, edges[0] >= 0]
    return edges if flow == "source_to_target" else edges.flip(0)


def to_torch_sparse(graph: Graph) -> torch_sparse.SparseTensor:
    """Return the weights as a ``torch_sparse.SparseTensor`` (block diagonal for a batch).

    Raises:
        ImportError: torch_sparse is not installed.
    """
    try:
        from torch_sparse import SparseTensor
    except ImportError as error:
        raise ImportError('to_torch_sparse needs torch-sparse: pip install "lfm-torch[pyg]"') from error
    total = graph.rowptr.numel() - 1
    parts: dict[str, Any] = {"rowptr": graph.rowptr, "col": graph.col.long(), "value": graph.weight}
    return SparseTensor(**parts, sparse_sizes=(total, total), is_sorted=True)


def to_pyg(graph: Graph) -> torch_geometric.data.Data:
    """Return ``torch_geometric.data.Data`` with ``edge_index``, ``edge_weight`` and, for a batch of graphs, ``batch``.

    Raises:
        ImportError: torch_geometric is not installed.
    """
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise ImportError('to_pyg needs torch-geometric: pip install "lfm-torch[pyg]"') from error
    total = graph.rowptr.numel() - 1
    data = Data(edge_index=graph.edge_index, edge_weight=graph.weight, num_nodes=total)
    if graph.offsets is not None:
        sizes = graph.offsets.diff()
        data.batch = torch.repeat_interleave(torch.arange(sizes.numel(), device="cpu"), sizes).to(graph.col.device)
    elif graph.batch_shape:
        data.batch = torch.arange(total, device=graph.col.device) // graph.n_nodes
    return data


def from_torch_sparse(matrix: torch_sparse.SparseTensor) -> Graph:
    """Take the weights of a symmetric ``torch_sparse.SparseTensor``; one without values has weight 1 on every edge.

    Raises:
        TypeError, ValueError: as :meth:`Graph.from_torch_csr`.
    """
    rowptr, col, value = matrix.csr()
    value = torch.ones(col.numel(), dtype=torch.float32, device=col.device) if value is None else value
    shape = (matrix.size(0), matrix.size(1))
    return Graph.from_torch_csr(
        torch.sparse_csr_tensor(rowptr, col, value, shape, device=value.device, check_invariants=False)
    )


def from_pyg(data: torch_geometric.data.Data) -> Graph:
    """Take the undirected graph of ``torch_geometric.data.Data``: its ``edge_index``, and ``edge_weight`` or else 1.

    Its ``batch``, where it has one, makes a ragged batch.

    Raises:
        TypeError, ValueError: as :meth:`Graph.from_torch_csr`; an edge between two graphs of the batch.
    """
    edges, weight, n = data.edge_index, getattr(data, "edge_weight", None), int(data.num_nodes)
    weight = torch.ones(edges.shape[1], dtype=torch.float32, device=edges.device) if weight is None else weight
    matrix = torch.sparse_coo_tensor(edges, weight, (n, n), device=weight.device, check_invariants=False)
    graph, batch = Graph.from_torch_csr(matrix.coalesce().to_sparse_csr()), getattr(data, "batch", None)
    if batch is None:
        return graph
    if bool((batch[edges[0]] != batch[edges[1]]).any()):
        raise ValueError("data.edge_index must join nodes of one graph of data.batch, got an edge between two")
    return replace(graph, offsets=set_offsets("data.batch", batch, n))
