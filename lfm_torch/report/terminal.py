"""The one-screen summary of a comparison, its plan, and the similarity of a pair, as the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lfm_torch.comparison.jobs.plan import Plan
from lfm_torch.comparison.jobs.sizes import shown_size
from lfm_torch.comparison.result import Comparison
from lfm_torch.report.scales import name_of, shown_chance
from lfm_torch.report.summary import left_out

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_STEPS = 8
_SHOWN_FAILURES = 6
_SHOWN_REMARKS = 3
_GAP = 3  # between the columns of a table


def check_available() -> None:
    """Raise ImportError, saying what to install, where rich is missing."""
    try:
        import rich  # noqa: F401
    except ImportError as error:
        message = 'the terminal display needs rich: pip install "lfm-torch[cli]" (or pass --quiet)'
        raise ImportError(message) from error


def print_plan(plan: Plan) -> None:
    """Print what a comparison has to do, and about how long it takes."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    samples = "" if plan.samples is None else f", {plan.samples:,} samples"
    console.print(f"{plan.checkpoints:,} checkpoints, {plan.representations:,} representations{samples}", style="bold")
    console.print(f"in the store: {plan.stored:,}; to reduce: {plan.representations - plan.stored:,}")
    console.print(f"pairs to compare: {plan.pairs:,}")
    if plan.seconds is not None and plan.store_bytes is not None:
        console.print(
            f"about {_duration(plan.seconds)} on this machine, reading and running the models not counted; "
            f"the store grows by about {shown_size(plan.store_bytes)}"
        )
    _print_failures(console, "cannot be compared", plan.problems, "--json lists them")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print_failures(console: Console, what: str, failures: Sequence[object], others: str) -> None:
    if failures:
        console.print(f"{len(failures):,} {what}:", style="bold yellow")
        for failure in failures[:_SHOWN_FAILURES]:
            console.print(f"  {failure}", style="yellow", soft_wrap=True)
        if len(failures) > _SHOWN_FAILURES:
            console.print(f"  and {len(failures) - _SHOWN_FAILURES:,} more, {others}", style="yellow")


def print_summary(comparison: Comparison, written: Sequence[Any] = (), notes: Sequence[str] = ()) -> None:
    """Print what was compared, how layers match, how training converges, what failed, and the files written."""
    from rich.console import Console

    # names are data: nothing in them is markup
    console = Console(markup=False, highlight=False)
    console.print(_headline(comparison), style="bold")
    if said := left_out(comparison):
        console.print(said, style="yellow", soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print()
    _print_measures(console, comparison)
    for sentence in comparison.below_chance().values():
        console.print(f"{sentence}\n", style="yellow")
    _print_trajectories(console, comparison)
    if comparison.failures:
        _print_failures(console, "not compared", comparison.failures, "see the report")
        console.print()
    for remark in comparison.remarks():
        count = f"{len(remark.items)} of {len(comparison.items)} representations"
        console.print(f"{count}: {remark.text} ({remark.names(_SHOWN_REMARKS)})\n", style="yellow", soft_wrap=True)
    if written:
        console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _headline(comparison: Comparison) -> str:
    checkpoints, runs, layers = len(comparison.checkpoints), len(comparison.runs), len(comparison.layers)
    parts = [f"{checkpoints} checkpoint{'s' if checkpoints > 1 else ''}"]
    if 1 < runs < checkpoints:
        parts[0] += f" of {runs} runs"
    parts.append(f"{layers} layer{'s' if layers > 1 else ''}")
    parts.append(f"{comparison.settings['n_samples']} samples")
    return f"{', '.join(parts)}: compared in {comparison.settings['seconds']:.1f} s"


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, or where that is too narrow for it a list per row: lines may break, but no value is cut."""
    from rich import box
    from rich.table import Table

    width = [max(map(len, values)) for values in zip(*rows, strict=True)]
    words = [max(map(len, name.split())) for name in header]
    # names may break between words, values not
    least = [max(words[0], *(len(word) for row in rows for word in row[0].split()))]
    least += [max(pair) for pair in zip(width[1:], words[1:], strict=True)]
    spare = console.width - sum(least) - _GAP * len(header)
    if spare < 0:
        console.print(title, style="bold")
        for name, *values in rows:
            console.print(f"\n {name}", style="bold")
            for label, value in zip(header[1:], values, strict=True):
                console.print(f" {label + ' ':.<{max(map(len, header[1:])) + 2}} {value}")
        console.print()
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(header):
        more = min(spare, max(width[k], len(name)) - least[k])
        spare -= more
        table.add_column(name, justify="right" if k else "left", width=least[k] + more)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_measures(console: Console, comparison: Comparison) -> None:
    matchings = {name: comparison.layer_matching(name) for name in comparison.measures}
    guessing = next((matching.chance for matching in matchings.values() if matching), None)
    if guessing is None:
        title, columns = "similarity", ["mean over pairs"]
    else:
        title = "which layer of another network is most similar?"
        columns = [f"the same (guessing {guessing:.0%})", "same layer", "other layers"]
    rows = []
    for name, matching in matchings.items():
        if matching is None:
            matrix = comparison.matrix(name)
            apart = matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]
            values = [f"{float(apart.mean()):.3f}"]
        else:
            right = round(matching.accuracy * matching.n_decisions)
            found = f"{right} of {matching.n_decisions}: {matching.accuracy:.0%}"
            values = [found, f"{matching.same_layer:.3f}", f"{matching.other_layer:.3f}"]
        rows.append([name_of(name), *values, shown_chance(comparison, name)])
    _print_table(console, title, ["measure", *columns, "shuffled rows"], rows)


def _print_trajectories(console: Console, comparison: Comparison) -> None:
    trajectories = {name: comparison.trajectories(name) for name in comparison.measures}
    first = trajectories[comparison.measures[0]]
    if not first:
        return
    alike = all(trajectory.steps == first[0].steps for trajectory in first)
    steps = first[0].steps
    columns = [["epoch or step", *map(name_of, trajectories)], *([str(step)] for step in steps)]
    for members in trajectories.values():
        values = torch.stack([member.values for member in (members if alike else members[:1])]).nanmean((0, 2))
        for column, value in zip(columns[1:], values.tolist(), strict=True):
            column.append(f"{value:.3f}")
    # as many steps as have room beside the names, the first and the last at least
    name_width, *widths = (max(map(len, column)) for column in columns)
    count = min(len(steps), max(2, min(_SHOWN_STEPS, (console.width - name_width - _GAP) // (max(widths) + _GAP))))
    shown = sorted({round(i * (len(steps) - 1) / (count - 1)) for i in range(count)})
    header, *rows = zip(columns[0], *(columns[1 + k] for k in shown), strict=True)
    whose = f"mean over {len(first)} runs and" if alike and len(first) > 1 else f"run {first[0].run}, mean over"
    _print_table(console, f"similarity to the final checkpoint ({whose} layers)", header, rows)


def print_pair(x: str, y: str, n: int, values: dict[str, dict[str, float | None]]) -> None:
    """Print the similarity of two arrays, in both directions, with its interval and what shuffled rows give."""
    from rich.console import Console

    rows = []
    for name, value in values.items():
        keys = ("low", "high", "shuffled_rows", "shuffled_rows_std")
        low, high, chance, std = (_number(value[key], 3) for key in keys)
        numbers = [
            _number(value["similarity"], 4),
            _number(value["reverse"], 4),
            "-" if value["low"] is None else f"{low} to {high}",
            "-" if value["shuffled_rows"] is None else f"{chance} ± {std}",
            _number(value["z"], 1),
            _number(value["p"], 2),
        ]
        rows.append([name_of(name), *numbers])
    header = ("measure", "x to y", "y to x", "95% interval", "shuffled rows", "z", "p")
    _print_table(Console(markup=False, highlight=False), f"{x} (x) and {y} (y), {n} samples", header, rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
