"""The report of a comparison as files: a self-contained HTML page, the table behind it, and PNG figures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lfm_torch import _checks, _files
from lfm_torch.comparison.result import Comparison

FORMATS = ("csv", "parquet")


def check_available() -> None:
    """Raise ImportError, saying what to install, where a package that reports need is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise ImportError(f'a report needs {package}: pip install "lfm-torch[cli]"') from error


def write_report(
    comparison: Comparison,
    directory: str | Path,
    *,
    format: Literal["csv", "parquet"] = "csv",
    title: str | None = None,
) -> Path:
    """Write ``report.html``, ``similarity.csv`` (or .parquet) and PNG figures.

    Args:
        comparison: What to show.
        directory: Where to; made if missing. Files of an earlier report are replaced, each at once.
        format: Of the table.
        title: Heading of the page.

    Returns:
        The path of ``report.html``: one file that loads nothing else.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        ValueError: an unknown format.
    """
    _checks.check_choice("format", format, FORMATS)
    check_available()
    from lfm_torch.report.figures import save_figures
    from lfm_torch.report.html import render

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    comparison.save(directory / f"similarity.{format}")
    save_figures(comparison, directory)
    page = directory / "report.html"
    _files.write_atomically(page, render(comparison, title=title, table=f"similarity.{format}").encode())
    return page
