"""A script that runs until it is stopped. It reads questions from its standard input."""

import signal
import sys

import telemetry
from answers import first_line

telemetry.set_up()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

for question in sys.stdin:
    print(first_line(question.strip()), flush=True)
