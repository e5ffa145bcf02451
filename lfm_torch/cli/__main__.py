"""``python -m lfm_torch.cli``: what torchrun starts."""

from lfm_torch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
