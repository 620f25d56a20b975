"""Client classes with a `request` of their own: subclasses, and classes that another package has changed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from .. import _fault
from ._patch import Patch
from ._scope import OuterScope

Wrapped = Callable[..., Any]

_METHOD: Final = "request"
_SDK_CLASSES: Final = ("SyncAPIClient", "AsyncAPIClient")


class ClientClasses:
    """Wraps the `request` of clients that do not use the SDK's own at once.

    Such a method may call another `request` than the one that is wrapped in the SDK: it was stored before.
    The wrapper notes when a call begins and what it raises.
    """

    def __init__(
        self,
        on_missed_error: Callable[[Any, Any, Any, BaseException], object],
        on_missed_result: Callable[[Any, Any, Any], object],
    ) -> None:
        """Wrap nothing yet.

        Args:
            on_missed_error: Called with client, args, kwargs and the exception of a call that was not seen.
            on_missed_result: Called with client, args and kwargs of a call that returned and was not seen.

        """
        self._on_missed_error = on_missed_error
        self._on_missed_result = on_missed_result
        self._patches: weakref.WeakKeyDictionary[Any, Patch] = weakref.WeakKeyDictionary()
        self._sdk_methods: dict[type, Any] = {}

    def client_made(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        """Wrap what the class of a new client needs."""
        try:
            self.cover_class(type(client))
        except Exception:
            _fault.report("looking at a client class")
        return wrapped(*args, **kwargs)

    def cover_module(self, module: Any) -> None:
        """Wrap what the subclasses of the SDK's classes need, as far as they exist.

        Args:
            module: The module of the SDK's classes, whose own `request` has been wrapped.

        """
        for name in _SDK_CLASSES:
            cls = getattr(module, name)
            self._sdk_methods[cls] = vars(cls).get(_METHOD)
            self._cover_subclasses(cls)

    def is_direct(self, client: Any) -> bool:
        """Whether a call of this client uses the wrapped `request` of the SDK, and nothing before it."""
        if _METHOD in client.__dict__:
            return False
        for cls in type(client).__mro__:
            method = cls.__dict__.get(_METHOD)
            if method is not None:
                return method is self._sdk_methods.get(cls)
        return False

    def cover_client(self, client: Any) -> None:
        """Wrap what a client and its class need."""
        self.cover_class(type(client))
        if _METHOD in vars(client):
            self._cover(client, type(client))

    def cover_class(self, client_class: type[Any]) -> None:
        """Wrap the `request` of this class and of its base classes, up to the SDK's own."""
        for cls in client_class.__mro__:
            if cls.__name__ in _SDK_CLASSES:
                return
            if _METHOD in vars(cls):
                self._cover(cls, cls)

    def remove(self) -> None:
        """Remove all wrappers."""
        while self._patches:
            self._patches.popitem()[1].remove()

    def _cover_subclasses(self, base: type[Any]) -> None:
        for subclass in base.__subclasses__():
            self.cover_class(subclass)
            self._cover_subclasses(subclass)

    def _cover(self, owner: Any, client_class: type[Any]) -> None:
        patch = self._patches.get(owner)
        if patch is not None and patch.is_in_place:
            return
        is_async = any(cls.__name__ == _SDK_CLASSES[1] for cls in client_class.__mro__)
        wrapper: Wrapped = self._async_request if is_async else self._request
        if owner is not client_class:
            wrapper = _with_client(wrapper, weakref.ref(owner))
        self._patches[owner] = Patch(owner, _METHOD, vars(owner)[_METHOD], wrapper)

    def _request(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        with self._outer_scope(client, args, kwargs):
            return wrapped(*args, **kwargs)

    async def _async_request(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        with self._outer_scope(client, args, kwargs):
            return await wrapped(*args, **kwargs)

    @contextlib.contextmanager
    def _outer_scope(self, client: Any, args: Any, kwargs: Any) -> Iterator[None]:
        """Enter the scope of another package's `request`, and tell if its call was not seen."""
        with OuterScope() as scope:
            try:
                yield
            except BaseException as error:
                if scope.waits_for_call:
                    self._on_missed_error(client, args, kwargs, error)
                raise
            if scope.waits_for_call:
                self._on_missed_result(client, args, kwargs)


def _with_client(wrapper: Wrapped, client_ref: Callable[[], Any]) -> Wrapped:
    """Return a wrapper for the function of one client, which is not bound to it."""

    def wrap(wrapped: Wrapped, instance: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
        return wrapper(wrapped, client_ref(), args, kwargs)

    return wrap
