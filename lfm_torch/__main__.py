"""``python -m lfm_torch`` is ``lfm-torch``."""

import sys

from lfm_torch.cli import main

if __name__ == "__main__":
    sys.exit(main())
