"""Objects that all calls of one instrumentation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .._config import Config
from .._lookup.recovery import Recovery
from .._telemetry.telemetry import Telemetry
from .observation import Observation

if TYPE_CHECKING:
    from .delivery import Delivery


class Services(NamedTuple):
    """Objects that all calls of one instrumentation share.

    Attributes:
        config: The settings.
        telemetry: Writes spans and metrics.
        recovery: Looks up usage.
        delivery: Tells the application of each call; `None` if it has not asked for that.
        observation: Takes usage from responses that the application itself fetches.
        on_end: Called with each call once, when it has ended.

    """

    config: Config
    telemetry: Telemetry
    recovery: Recovery
    delivery: Delivery | None
    observation: Observation
    on_end: Callable[[Any], object]
