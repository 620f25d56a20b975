"""A file of the tests that runs in a process of its own, and answers words that come on its stdin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_PATHS = [str(Path(__file__).parents[1] / name) for name in ("tests", "examples")]


def answer_words(greeting: object, answer: Callable[[str], object]) -> None:
    """Print the greeting, and then an answer to each word, a line each, until stdin ends."""
    print(json.dumps(greeting), flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)  # noqa: T201


class FileProcess:
    """The process, as the tests see it."""

    def __init__(self, file: str, *arguments: str, most_s: float | None = None) -> None:
        """Start it.

        Args:
            file: What it runs.
            arguments: Those of its command.
            most_s: After how many seconds it is killed; `None` for never.

        """
        self.process = subprocess.Popen(  # noqa: S603  # of this repository
            [sys.executable, file, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((*_PATHS, os.environ.get("PYTHONPATH", "")))},
        )
        self._timer = None if most_s is None else threading.Timer(most_s, self.process.kill)
        if self._timer is not None:
            self._timer.start()

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def answer(self) -> Any:
        """Return its next answer."""
        return json.loads(self.line())

    def __call__(self, word: str) -> Any:
        """Send a word, and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End its stdin, and wait for its end."""
        with self.process:
            pass
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.stop()
