"""A function for AWS Lambda and other platforms that freeze the process after each call."""

from typing import Any

import telemetry
from answers import first_line

telemetry.set_up()


def handler(event: dict[str, Any], _context: object) -> str:
    try:
        return first_line(event["question"])
    finally:
        telemetry.flush()
