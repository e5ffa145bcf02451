"""A comparison as a table: a row per ordered pair of representations, a column per measure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _files

if TYPE_CHECKING:
    import pandas

# what a row says of each of its two representations
Side = tuple[Any, ...]
_COLUMNS = ("checkpoint", "layer", "run", "step")


def data_frame(sides: Sequence[Side], matrices: Mapping[str, Tensor]) -> pandas.DataFrame:
    """Return the table of matrices ``[N, N]`` as a data frame.

    Args:
        sides: Checkpoint, layer, run and step of each of the N representations.
        matrices: Per measure.

    Raises:
        ImportError: pandas is missing.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('to_pandas needs pandas: pip install "lfm-torch[pandas]"') from error
    n = len(sides)
    columns = [pandas.Series(list(values), dtype=object) for values in zip(*sides, strict=True)]
    frame = pandas.DataFrame()
    for side, order in (("x", np.repeat(np.arange(n), n)), ("y", np.tile(np.arange(n), n))):
        for name, column in zip(_COLUMNS, columns, strict=True):
            dtype = "Int64" if name == "step" else pandas.Series(["a"]).dtype
            frame[f"{side}_{name}"] = column.astype(dtype).take(order).reset_index(drop=True)
    for measure in matrices:
        frame[measure] = np.concatenate([np.array(row) for row in _rounded(matrices[measure])])
    return frame


def write_table(path: str | Path, sides: Sequence[Side], matrices: Mapping[str, Tensor]) -> Path:
    """Write the table to a .csv or .parquet file, or to ``similarity.csv`` in a directory, and return the file.

    Raises:
        ImportError: a package for parquet is missing.
        ValueError: another ending.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / "similarity.csv"
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"path must be a directory or end on .csv or .parquet, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        binary = io.BytesIO()
        data_frame(sides, matrices).to_parquet(binary, index=False)
        _files.write_atomically(path, binary.getvalue())
        return path
    with _files.replacing(path) as file:
        for text in _csv(sides, matrices):
            file.write(text.encode())
    return path


def _csv(sides: Sequence[Side], matrices: Mapping[str, Tensor]) -> Iterator[str]:
    """Return the table as text, a row of the matrices at a time: with millions of lines it is never whole."""
    header = [*(f"x_{name}" for name in _COLUMNS), *(f"y_{name}" for name in _COLUMNS), *matrices]
    yield _csv_line(header) + "\n"
    lines = [_csv_line(side) for side in sides]
    columns = list(matrices.values())
    # nine digits bring every float32 back, seventeen every float64
    numbers = ",".join("%.9g" if column.dtype == torch.float32 else "%.17g" for column in columns)
    for i, side in enumerate(lines):
        line = f"{side.replace('%', '%%')},%s,{numbers}\n"
        rows = zip(lines, *(column[i].tolist() for column in columns), strict=True)
        yield "".join([line % row for row in rows])


def _rounded(matrix: Tensor) -> list[list[float]]:
    values: list[list[float]] = matrix.tolist()
    if matrix.dtype != torch.float32:
        return values
    # float32 as Python floats would show digits that it does not have; nine bring every one of its values back
    return [[float(f"{value:.9g}") for value in row] for row in values]


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()
