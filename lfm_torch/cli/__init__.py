"""The command line, ``lfm-torch``."""

from lfm_torch.cli.commands import main

__all__ = ["main"]
