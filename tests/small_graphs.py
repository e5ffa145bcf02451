"""Graphs whose spectra are known or hard: repeated eigenvalues, many components, weights of all sizes."""

from __future__ import annotations

import numpy as np
import torch

import lfm_torch as lfm


def graph_of(w: np.ndarray, dtype: torch.dtype) -> lfm.Graph:
    matrix = torch.from_numpy(w).to_sparse_csr()
    return lfm.Graph(matrix.crow_indices(), matrix.col_indices().int(), matrix.values().to(dtype), len(w))


def path(n: int) -> np.ndarray:
    return np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)


def ring(n: int) -> np.ndarray:
    w = path(n)
    w[0, -1] = w[-1, 0] = 1
    return w


def grid(side: int) -> np.ndarray:
    return np.kron(path(side), np.eye(side)) + np.kron(np.eye(side), path(side))


def star(n: int) -> np.ndarray:
    w = np.zeros((n, n))
    w[0, 1:] = w[1:, 0] = 1
    return w


def cliques(count: int, size: int) -> np.ndarray:
    return np.kron(np.eye(count), np.ones((size, size)) - np.eye(size))


def orders_of_magnitude(n: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    w = np.triu(10.0 ** generator.uniform(-12, 0, (n, n)) * (generator.random((n, n)) < 0.1), 1)
    return w + w.T + 1e-12 * path(n)


def isolated(n: int) -> np.ndarray:
    w = ring(n)
    w[5] = w[:, 5] = 0
    return w
