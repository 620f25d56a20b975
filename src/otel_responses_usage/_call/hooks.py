"""Functions of the application that take part in every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from opentelemetry.trace import Span

from .. import _fault
from .._callback import result_of


class Hooks(NamedTuple):
    """Functions that the application gave to `instrument()`. What they raise is contained and counted.

    They cannot change the parameters, which are sent after they have returned.

    Attributes:
        on_request: Called with the span and the parameters of each call, when it begins.
        excludes: Returns whether a call with these parameters is not to be recorded.

    """

    on_request: Callable[[Span, Mapping[str, Any]], object] | None = None
    excludes: Callable[[Mapping[str, Any]], object] | None = None

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a call with these parameters is to be recorded."""
        if self.excludes is None:
            return True
        try:
            return not result_of(self.excludes, MappingProxyType(parameters))
        except Exception:
            _fault.report("asking the application whether a call is excluded")
            return True

    def begin(self, span: Span, parameters: Mapping[str, Any]) -> None:
        """Tell that a call begins."""
        if self.on_request is not None:
            try:
                result_of(self.on_request, span, MappingProxyType(parameters))
            except Exception:
                _fault.report("running the request hook")


NO_HOOKS: Final = Hooks()
