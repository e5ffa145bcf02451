"""Bases of the layers of a checkpoint: one by one on the CPU, side by side on a GPU, as many as there is room for.

On the CPU a basis depends on its layer alone, to the last bit: whatever else is computed, wherever the work stopped. On
a GPU graphs are solved in one batch, whose members share what the solver chooses (windows of filters, steps until all
have converged); there a basis depends on its neighbours within the tolerance of the solver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm_torch._warnings import collecting
from lfm_torch.comparison.jobs.settings import Settings
from lfm_torch.graphs.graph import Graph
from lfm_torch.pipeline import representation_basis, representation_graph
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.compute import spectral_basis

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
# blocks of the solver beside the basis, in multiples of it: the filtered block, its image, trial spaces
_SOLVER_BLOCKS = 12
Found = tuple[Basis, str, list[str]] | Exception


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


class _Waiting(NamedTuple):
    points: Tensor
    graph: Graph | Exception
    notes: list[str]


def bases_of(points: Sequence[Tensor], settings: Settings, *, room: int | None = None) -> Iterator[Found]:
    """Basis of each representation ``[n, d_i]``, how it was made, what its points call for; or the error it raised.

    Args:
        points: Representations of the same samples on one device.
        settings: How graphs and bases are made.
        room: Bytes that a batch may take; None for half of what is free on a GPU, and for no batches on the CPU.
    """
    if room is None:
        if not points or not points[0].is_cuda:
            for x in points:
                yield _alone(x, settings)
            return
        room = torch.cuda.mem_get_info(points[0].device)[0] // 2
    waiting: list[_Waiting] = []
    taken = 0
    for x in points:
        with collecting() as notes:
            graph = _graph_of(x, settings)
        size = 0 if isinstance(graph, Exception) else _bytes_of(graph, settings.basis_of(graph.n_nodes))
        if waiting and taken + size > room:
            yield from _together(waiting, settings)
            waiting, taken = [], 0
        waiting.append(_Waiting(x, graph, notes))
        taken += size
    yield from _together(waiting, settings)


def _bytes_of(graph: Graph, n_basis: int) -> int:
    value = graph.weight.element_size()
    return graph.col.numel() * (value + 4) + _SOLVER_BLOCKS * graph.n_nodes * n_basis * value


def _graph_of(x: Tensor, settings: Settings) -> Graph | Exception:
    try:
        return representation_graph(x, **_graph_options(settings))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        return error


def _together(waiting: Sequence[_Waiting], settings: Settings) -> Iterator[Found]:
    """Solve in one batch; without room for it in halves, and one by one at last, where the CPU may help."""
    graphs = [one.graph for one in waiting if isinstance(one.graph, Graph)]
    alike = len({(graph.n_nodes, graph.weight.dtype) for graph in graphs}) == 1
    if len(graphs) < 2 or not alike:
        yield from (_alone(one.points, settings) for one in waiting)
        return
    again: list[Sequence[_Waiting]] = []
    try:
        basis = spectral_basis(Graph.batch(graphs), n_basis=settings.n_basis)
    except (RuntimeError, MemoryError) as error:
        half = len(waiting) // 2
        # an error of another kind is some layer's own: it shows which when they come one by one
        again = [waiting[:half], waiting[half:]] if is_out_of_memory(error) else [[one] for one in waiting]
    if again:
        del graphs
        torch.cuda.empty_cache()
        for part in again:
            yield from _together(part, settings)
        return
    parts = iter(basis.unbatch())
    for x, graph, notes in waiting:
        if isinstance(graph, Exception):  # what had no room beside the others may have it alone, or on the CPU
            yield _alone(x, settings) if is_out_of_memory(graph) else graph
        else:
            yield next(parts), "", notes


def _alone(x: Tensor, settings: Settings) -> Found:
    """Graph and basis; where the device has no room, on the CPU, and the note says so."""
    options = {**_graph_options(settings), "n_basis": settings.n_basis}
    note = ""
    try:
        with collecting() as notes:
            try:
                return representation_basis(x, **options), note, notes
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not x.is_cuda:
                    raise
                note = f"out of memory on {x.device}: basis computed on the CPU"
            torch.cuda.empty_cache()
            return representation_basis(x.cpu(), **options).to(x.device), note, notes
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        return error


def _graph_options(settings: Settings) -> dict[str, Any]:
    return {"n_neighbors": settings.n_neighbors, "metric": settings.metric, "weights": settings.weights}
