"""Runs `python -m otel_responses_usage`, the same as the command `otel-responses-usage`."""

import sys

from ._commands import main

if __name__ == "__main__":
    sys.exit(main())
