"""Stitched models do what their parts do."""

from __future__ import annotations

import pytest
import torch

from lfm_torch.alignment.stitching import stitch
from lfm_torch.alignment.translator import fit_translator


def test_stitched_models_do_what_their_parts_do() -> None:
    encoder, head = torch.nn.Linear(7, 4), torch.nn.Linear(5, 3)
    translator = fit_translator(torch.randn(30, 4), torch.randn(30, 5))
    model = stitch(encoder, head, translator)
    x = torch.randn(6, 7)
    torch.testing.assert_close(model(x), head(translator(encoder(x))))
    assert set(model.state_dict()) >= {"matrix", "origin_x", "origin_y"}
    assert model.double()(x.double()).dtype == torch.float64
    space = torch.nn.Conv2d(1, 2, 3)
    square = fit_translator(torch.randn(30, 8), torch.randn(30, 8))
    assert stitch(space, torch.nn.Identity(), square)(torch.randn(3, 1, 4, 4)).shape == (3, 2, 2, 2)
    with pytest.raises(TypeError, match="translator must be a Translator, got Linear"):
        stitch(encoder, head, head)  # type: ignore[arg-type]
