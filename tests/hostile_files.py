"""Files that nobody should load."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any


class Bomb:
    """Pickles to a command that makes a file: what a malicious checkpoint is."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)
