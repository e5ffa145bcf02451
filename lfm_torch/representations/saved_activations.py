"""Activations that are saved already, as a source: a file a network, the arrays in it its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lfm_torch import _checks
from lfm_torch.representations.arrays import ARRAY_SUFFIXES, check_file, read_tensors
from lfm_torch.representations.checkpoint_files import Checkpoint
from lfm_torch.representations.checkpoint_search import find_checkpoints
from lfm_torch.representations.fingerprints import DigestOf, digest, file_digest
from lfm_torch.representations.sources import SINGLE_LAYER, Source


class Activations(Source):
    """Saved activations as a lazy mapping, mapped into memory: a file a network, the arrays in it its layers.

    Args:
        paths: What :func:`find_checkpoints` takes, of npy, npz, pt and safetensors files.
        pattern: As in :func:`find_checkpoints`.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in range(2):
        ...         np.savez(f"{folder}/model_seed_{seed}.npz", early=np.eye(9, 3), late=np.eye(9, 5))
        ...     {name: list(layers) for name, layers in Activations(folder).items()}
        {'model_seed_0': ['early', 'late'], 'model_seed_1': ['early', 'late']}
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], *, pattern: str | None = None) -> None:
        self.checkpoints: Sequence[Checkpoint] = find_checkpoints(paths, pattern=pattern, suffixes=ARRAY_SUFFIXES)
        self._paths = {checkpoint.name: checkpoint.path for checkpoint in self.checkpoints}

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        found = _arrays(self._path(name))
        return {layer: x if x.is_floating_point() else x.float() for layer, x in found.items()}

    def _path(self, name: str) -> Path:
        path = self._paths[name]
        assert path is not None
        return path

    def identities(self, name: str, digest_of: DigestOf) -> dict[str, str]:
        """Return digests of the file and the array's name in it."""
        path = self._path(name)
        check_file(path, ARRAY_SUFFIXES)
        content = digest_of(path, file_digest)
        return {layer: digest("activations", content, layer) for layer in _arrays(path)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a report should say about where the representations come from."""
        return {"activations": len(self)}


def _arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a file, mapped into memory where its format can be, or raise what is wrong with it."""
    check_file(path, ARRAY_SUFFIXES)
    if path.suffix in (".npy", ".npz"):
        try:
            # copy on write: torch knows no read-only tensors, and nothing here writes
            loaded = np.load(path, mmap_mode="c" if path.suffix == ".npy" else None, allow_pickle=False)
            arrays = {SINGLE_LAYER: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            return {name: _checks.from_numpy(array) for name, array in arrays.items()}
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise ValueError(f"{path} must be a readable file of numbers, got: {error}") from error
    content = read_tensors(path, mapped=True)
    if isinstance(content, Tensor):
        return {SINGLE_LAYER: content}
    if isinstance(content, Mapping) and content and all(isinstance(x, Tensor) for x in content.values()):
        return {str(name): x for name, x in content.items()}
    raise ValueError(f"{path} must hold a tensor or a dict of tensors, got {type(content).__name__}")
