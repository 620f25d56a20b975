"""The demo's calls in Phoenix: the real program, looked at in a real browser.

It takes most of a minute. So it runs only where PHOENIX names the program, as in `.ci/run`:
`PHOENIX=$(examples/look/run --install) scripts/test tests/examples/test_look.py`. With PHOENIX_PICTURE it
also keeps a picture of a call that was cut and looked up, in that file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, ViewportSize, expect

from acts import ACTS
from browsers import chromium

RUN = Path(__file__).parents[2] / "examples" / "look" / "run"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SIZE: ViewportSize = {"width": 1200, "height": 1330}


@contextmanager
def looking(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Phoenix with the demo's calls, as a user starts it, and the address that was printed."""
    program = os.environ.get("PHOENIX", "")
    if not program:
        how = "needs Phoenix: PHOENIX=$(examples/look/run --install)"
        pytest.fail(how) if os.environ.get("CI") else pytest.skip(how)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    said = directory / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(  # noqa: S603 - the project's own file
            [RUN],
            env=inherited | {"PHOENIX": program, "PHOENIX_PORT": "0", "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not (found := re.search(r"in Phoenix: (http://\S+)", said.read_text("utf-8"))):
            assert process.poll() is None, said.read_text("utf-8")
            assert time.monotonic() < deadline, said.read_text("utf-8")
            time.sleep(0.2)
        yield process, found[1]
        assert "Traceback" not in said.read_text("utf-8")
    finally:
        process.terminate()
        process.wait(20)


def ask(url: str) -> Any:
    """What Phoenix has at an address."""
    with OPENER.open(url, timeout=20) as response:
        return json.load(response)["data"]


def call_of(spans: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The call in the application's span of this name."""
    [parent] = [span for span in spans if span["name"] == name]
    return next(span for span in spans if span["parent_id"] == parent["context"]["span_id"])


def test_phoenix_shows_the_tokens_of_a_call_that_was_cut(tmp_path: Path) -> None:
    """It knows the call as one of a model, with its tokens; it asks nobody else, and Ctrl-C ends it all."""
    with looking(tmp_path) as (process, address):
        origin = address.partition("/projects")[0]
        spans = ask(f"{origin}/v1/projects/default/spans?limit=100")
        assert len(spans) == 2 * len(ACTS) + 1  # one around each call, its own, and the resumed stream
        cut = call_of(spans, "cut by network")
        assert (cut["span_kind"], cut["status_code"]) == ("LLM", "ERROR")
        assert cut["attributes"]["llm.token_count.total"] == 52 + 388
        assert cut["attributes"]["openai_responses.usage.source"] == "retrieval"
        asked: list[str] = []
        with chromium() as browser, browser.new_context(viewport=SIZE) as context:
            tab = context.new_page()
            tab.on("request", lambda request: asked.append(request.url))
            show(tab, f"{address}/traces/{cut['context']['trace_id']}?selectedSpanNodeId={cut['id']}")
        assert [url for url in asked if not url.startswith((origin, "data:", "blob:"))] == []
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
    assert list(tmp_path.glob("phoenix-*")) == []
    with pytest.raises(OSError, match="refused"):
        ask(f"{origin}/v1/projects")


def show(tab: Page, address: str) -> None:
    """Open a call, and keep a picture of it if one is asked for."""
    tab.goto(address)
    expect(tab.get_by_text("chat gpt-5.4-mini").first).to_be_visible(timeout=30_000)
    tab.get_by_role("tab", name="Attributes").click()
    expect(tab.get_by_text("openai_responses.usage.source")).to_be_visible(timeout=30_000)
    expect(tab.get_by_text("440").first).to_be_visible()
    if picture := os.environ.get("PHOENIX_PICTURE"):
        tab.wait_for_timeout(1000)  # the panel slides in
        tab.screenshot(path=picture, clip={"x": 300, "y": 46, "width": 900, "height": SIZE["height"] - 46})
