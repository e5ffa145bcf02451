"""The version, written once: pyproject.toml reads it from here, and a source tree that is not installed has it too."""

__version__ = "0.1.0"
