"""Which sources a compiled library was built from; setup.py runs this file by its path, without the package."""

import hashlib
from pathlib import Path


def source_digest(csrc: Path) -> str:
    """Digest of the names and contents of all files below ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
