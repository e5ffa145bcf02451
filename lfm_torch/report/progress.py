"""The progress bars of the command line."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

_STAGES = {
    "training": "training networks",
    "samples": "looking for NaN",
    "representations": "reading checkpoints",
    "pairs": "comparing pairs",
}


class ProgressBars:
    """Progress callback that draws a bar with a time estimate per stage on stderr; silent where ``quiet``."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        if not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            columns: tuple[ProgressColumn, ...] = (
                TextColumn("{task.description:<20}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            if console.width < 72:  # the numbers whole rather than a bar beside parts of them
                columns = (TextColumn("{task.description}"), columns[2], TimeRemainingColumn(compact=True))
            self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of a stage are finished."""
        if self._bars is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_STAGES.get(stage, stage), total=total, completed=done, rate="")
        task = self._bars.tasks[self._tasks[stage]]
        rate = "" if task.speed is None else f"{task.speed:,.0f}/s" if task.speed >= 10 else f"{task.speed:.1f}/s"
        self._bars.update(self._tasks[stage], completed=done, total=total, rate=rate)
