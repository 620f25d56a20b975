"""Wraps one function of another package, and removes the wrapper again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

import wrapt

# In wrapt 2, neither class is a subclass of the other.
_PROXIES: Final[Any] = (wrapt.ObjectProxy, wrapt.FunctionWrapper)


class Patch:
    """A wrapper around a function of another package."""

    def __init__(self, owner: Any, attribute: str, function: Any, wrapper: Callable[..., Any]) -> None:
        """Wrap the function that is this attribute of a class."""
        self._owner = weakref.ref(owner)  # the application may drop a class of its own
        self._attribute = attribute
        self._proxy = wrapt.FunctionWrapper(function, wrapper)
        setattr(owner, attribute, self._proxy)

    @classmethod
    def of_module(cls, module: str, name: str, wrapper: Callable[..., Any]) -> Patch:
        """Wrap a function by its name in a module, which must be imported.

        Raises:
            AttributeError: There is no such function.

        """
        owner, attribute, function = wrapt.resolve_path(module, name)
        return cls(owner, attribute, function, wrapper)

    @property
    def is_in_place(self) -> bool:
        """Whether the wrapper is used, as far as can be seen."""
        outer = self._outermost()
        while outer is not None:
            # A method that was stored from a class refers to its wrapper as its parent.
            if outer is self._proxy or getattr(outer, "_self_parent", None) is self._proxy:
                return True
            outer = getattr(outer, "__wrapped__", None)
        return False

    def remove(self) -> None:
        """Remove the wrapper. Wrappers that others have added since stay in place."""
        outer = self._outermost()
        if outer is self._proxy:
            setattr(self._owner(), self._attribute, self._proxy.__wrapped__)
            return
        while isinstance(outer, _PROXIES):
            if outer.__wrapped__ is self._proxy:
                outer.__wrapped__ = self._proxy.__wrapped__
                return
            outer = outer.__wrapped__
        # A wrapper of another kind cannot be changed. Below it this wrapper stays, and does nothing.

    def _outermost(self) -> Any:
        owner = self._owner()
        return None if owner is None else vars(owner).get(self._attribute)
