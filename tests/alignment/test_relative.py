"""Relative representations do not see rotations."""

from __future__ import annotations

import pytest
import torch

from lfm_torch.alignment.relative import relative_representations


def test_relative_representations_do_not_see_rotations() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    y, anchors = 3 * x @ rotation, torch.randperm(40)[:8]
    torch.testing.assert_close(relative_representations(x, anchors), relative_representations(y, anchors))
    torch.testing.assert_close(relative_representations(x, x[anchors]), relative_representations(x, anchors))


def test_anchors_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"anchors must lie in \[0, 10\)"):
        relative_representations(torch.randn(10, 2), torch.tensor([12]))
