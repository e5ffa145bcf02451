"""From words on a command line to files and lines of text: ``lfm-torch``, a module for each command.

Takes names of checkpoints, models, arrays and options; gives a report, the text or JSON of what was found, and an exit
status. What the user did wrong is a line, never a traceback.
"""

from lfm_torch.cli.commands import main

__all__ = ["main"]
