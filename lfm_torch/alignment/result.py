"""What :func:`lfm_torch.align` found, and how much it is worth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lfm_torch.alignment.translator import Translator
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.spectral.basis import Basis


@dataclass(frozen=True, repr=False, eq=False)
class Correspondence:
    """What was matched with what.

    Attributes:
        fmap: functional map x -> y of ``idx_yx``.
        translator: carries representations from x's space to y's.
        pairs: ``[p, 2]`` rows that are each other's nearest neighbours under the translator, and the anchors.
        idx_yx: ``[n_y]`` for each row of y its row of x.
        idx_xy: ``[n_x]`` for each row of x its row of y.
    """

    fmap: FunctionalMap
    translator: Translator
    pairs: Tensor
    idx_yx: Tensor
    idx_xy: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Alignment:
    """The result of :func:`lfm_torch.align`; where nothing was found, its map and all that follows raise ValueError.

    Attributes:
        found: whether the confidence is clearly above chance, or left-out anchors say so (``anchor_p`` below 1e-4).
        confidence: share of the rows (of the smaller space) whose match is confirmed by a translator fitted without
            it: the two rows are each other's nearest neighbours among all.
        chance: what two unrelated samples reach: the share of mutual nearest neighbours between random halves of one
            space, the larger of both spaces.
        anchor_p: p-value of the ranks of anchors that were left out: every fifth where there are 20 or more; of fewer,
            a fifth in turn, where the confidence does not say enough. None where none were left out.
        method: "descriptors", "signatures" or "coupling", the way that gave the result.
        basis_x: basis of x.
        basis_y: basis of y.
        untrusted: the best correspondence, whether found or not.
    """

    found: bool
    confidence: float
    chance: float
    anchor_p: float | None
    method: str
    basis_x: Basis
    basis_y: Basis
    untrusted: Correspondence

    def __repr__(self) -> str:
        head = "Alignment(" if self.found else "Alignment(no alignment found, "
        held_out = "" if self.anchor_p is None else f", held-out anchors p={self.anchor_p:.1g}"
        return (
            f"{head}{self.basis_x.n} x {self.basis_y.n} rows by {self.method}, confidence {self.confidence:.3f} "
            f"(chance {self.chance:.3f}){held_out})"
        )

    @property
    def correspondence(self) -> Correspondence:
        """The correspondence.

        Raises:
            ValueError: none was found.
        """
        if not self.found:
            raise ValueError(
                f"no alignment found: {self.confidence:.3f} of the rows have a confirmed match, unrelated spaces reach "
                f"{self.chance:.3f}; alignment.untrusted holds what was tried"
            )
        return self.untrusted

    @property
    def fmap(self) -> FunctionalMap:
        """Functional map x -> y; raises ValueError where none was found."""
        return self.correspondence.fmap

    @property
    def translator(self) -> Translator:
        """Translator of representations x -> y; raises ValueError where none was found."""
        return self.correspondence.translator

    @property
    def pairs(self) -> Tensor:
        """Matched rows ``[p, 2]``; raises ValueError where none was found."""
        return self.correspondence.pairs

    @property
    def idx_yx(self) -> Tensor:
        """For each row of y its row of x; raises ValueError where none was found."""
        return self.correspondence.idx_yx

    @property
    def idx_xy(self) -> Tensor:
        """For each row of x its row of y; raises ValueError where none was found."""
        return self.correspondence.idx_xy
