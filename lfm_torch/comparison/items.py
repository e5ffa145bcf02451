"""What was compared, and what could not be: the representations of a comparison, remarks on them, failures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One representation that was compared, and what its basis says about itself.

    Attributes:
        checkpoint: name of the network or checkpoint.
        layer: name of the layer.
        n_components: connected components of its neighbour graph.
        n_unconverged: eigenpairs that did not reach the solver's tolerance.
        note: how it was computed where that was not the usual way (on the CPU, for lack of memory on a GPU).
        notes: what is to be known of its points under a metric of angles: rows of zeros, an offset that dwarfs all.
    """

    checkpoint: str
    layer: str
    n_components: int = 1
    n_unconverged: int = 0
    note: str = ""
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whatever a report says of it: ``notes``, and ``note`` where there is one."""
        return (*self.notes, *[self.note] * bool(self.note))


@dataclass(frozen=True)
class Remark:
    """What is to be known of several representations, in the words that the first of them has for it."""

    text: str
    items: tuple[Item, ...]

    def names(self, most: int) -> str:
        """The representations, the first ``most`` by name."""
        listed = [f"{item.checkpoint}, layer {item.layer}" for item in self.items[:most]]
        more = [f"{len(self.items) - most:,} more"] if len(self.items) > most else []
        return "; ".join(listed + more)


@dataclass(frozen=True)
class Failure:
    """What could not be compared, and why; ``layer`` is None where a network failed as a whole or has only one.

    ``other`` is the second network where a pair of them failed, each of which is compared to the rest.
    """

    checkpoint: str
    layer: str | None
    reason: str
    other: str | None = None

    def __str__(self) -> str:
        layer = f", layer {self.layer}" if self.layer else ""
        other = f" against {self.other}" if self.other else ""
        return f"{self.checkpoint}{layer}{other}: {self.reason}"
