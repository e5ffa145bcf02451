from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_networks import OPTIONS

from lfm_torch.comparison.run import compare
from lfm_torch.representations.saved_activations import Activations


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "safetensors"])
def test_saved_activations_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = {name: torch.randn(40, 5, generator=generator) for name in ("a", "b")}
    for seed in range(2):
        path, saved = tmp_path / f"model_seed_{seed}.{kind}", {name: x + seed for name, x in layers.items()}
        if kind == "npy":
            np.save(path, saved["a"].numpy().astype(">f4"))
        elif kind == "npz":
            np.savez(path, **{name: x.numpy() for name, x in saved.items()})
        elif kind == "pt":
            torch.save(saved, path)
        else:
            save_file(saved, path)
    source = Activations(tmp_path)
    found = source["model_seed_1"]
    assert next(iter(found.values())).equal(layers["a"] + 1)
    comparison = compare(source, store=tmp_path / "store", measures=["heat"], **OPTIONS)
    assert comparison.layers == (("representation",) if kind == "npy" else ("a", "b"))
    assert (
        compare(source, store=tmp_path / "store", measures=["heat"], **OPTIONS)
        .matrix("heat")
        .equal(comparison.matrix("heat"))
    )


def test_activations_that_are_none_fail_alone(tmp_path: Path) -> None:
    for seed in range(2):
        np.save(tmp_path / f"good{seed}.npy", np.random.default_rng(seed).normal(size=(30, 4)))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04")
    with pytest.warns(UserWarning, match="2 could not be compared"):
        comparison = compare(Activations(tmp_path), store=tmp_path / "store", **OPTIONS)
    assert {failure.checkpoint for failure in comparison.failures} == {"object", "short"}
