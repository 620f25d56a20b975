"""What importing and switching on adds to the start of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from .row import Row

_SCRIPT = """
import openai, time
import opentelemetry.trace, opentelemetry.metrics, opentelemetry.propagate
openai.OpenAI, openai.AsyncOpenAI
began = time.process_time()
{}
print((time.process_time() - began) * 1000)
"""
_OURS = """
from otel_responses_usage import ResponsesUsageInstrumentor
ResponsesUsageInstrumentor().instrument()
"""
# Of every instrumentation the base class, and what wraps functions.
_FLOOR = "import opentelemetry.instrumentation.instrumentor, wrapt"


def rows(*, quick: bool) -> list[Row]:
    """Measure in processes that have imported openai and the OpenTelemetry API already."""
    with tempfile.TemporaryDirectory() as compiled:
        _ms(_OURS, compiled)  # installed packages are compiled once, not at each start
        times = [(_ms(_OURS, compiled), _ms(_FLOOR, compiled)) for _ in range(2 if quick else 15)]
    added_ms = median(ours - floor for ours, floor in times)
    floor_ms = median(floor for _, floor in times)
    beside = f"wrapt and the base class {floor_ms:.0f} ms"
    return [Row("import and instrument(), beyond wrapt and the base class", added_ms, 7, "ms", beside)]


def _ms(script: str, compiled: str) -> float:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _SCRIPT.format(script)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""},
    )
    return float(done.stdout)
