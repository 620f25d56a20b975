"""What importing and switching on adds to the start of a process."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from .row import Row

_SCRIPT = """
import openai, time
import opentelemetry.trace, opentelemetry.metrics, opentelemetry.propagate
openai.OpenAI, openai.AsyncOpenAI
began = time.process_time()
from otel_responses_usage import ResponsesUsageInstrumentor
ResponsesUsageInstrumentor().instrument()
print((time.process_time() - began) * 1000)
"""


def rows(*, quick: bool) -> list[Row]:
    """Measure in processes that have imported openai and the OpenTelemetry API already."""
    times = [_ms() for _ in range(2 if quick else 15)]
    return [Row("import and instrument()", median(times), 30, "ms")]


def _ms() -> float:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True)  # noqa: S603
    return float(done.stdout)
