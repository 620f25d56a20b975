"""Draws the pictures of the demo from recorded telemetry: `scripts/draw-pictures [--record]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import page
import picture
import recording
from demo import perform
from embedded.otlp_receiver import OtlpReceiver
from outlets import outlets
from readings import read_calls

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
RECORDING = PICTURES / "demo.otlp.jsonl"


def main() -> None:
    options = argparse.ArgumentParser(prog="scripts/draw-pictures", description="Draws docs/pictures/demo*.")
    options.add_argument("--record", action="store_true", help="run the demo first, and record what arrives")
    if options.parse_args().record:
        record(Console())
    for path, text in drawn().items():
        path.write_text(text, "utf-8")
        print(path)


def record(console: Console) -> None:
    """Runs the demo and keeps what arrived over OTLP."""
    with OtlpReceiver() as receiver:
        perform(console, outlets(receiver)[:1])
    recording.write(RECORDING, receiver.requests)


def drawn() -> dict[Path, str]:
    """The pictures and the page by their files, made from the recorded telemetry."""
    recorded = recording.Recording.read(RECORDING)
    calls = read_calls(recorded.spans)
    return {
        PICTURES / "demo-light.svg": picture.draw(calls, "light"),
        PICTURES / "demo-dark.svg": picture.draw(calls, "dark"),
        PICTURES / "demo.html": page.write(recorded.spans, recorded.metrics),
    }


if __name__ == "__main__":
    main()
