"""Where the openai SDK and its HTTP libraries are touched; nothing else knows them."""

from ._http import Patch, patches
from ._retrieve import HttpRetriever

__all__ = ["HttpRetriever", "Patch", "patches"]
