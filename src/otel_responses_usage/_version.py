"""The version of this package. `pyproject.toml` reads it from this file."""

from typing import Final

__version__: Final = "0.2.0"
