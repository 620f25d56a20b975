"""Baggage of the caller on the span and on every metric of its calls: whose tokens these are."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry import baggage, context
from opentelemetry.instrumentation.utils import suppress_instrumentation

from calls import CAN_RESUME, CUT, HTTP
from conftest import Instrument, Serve
from embedded.answer import Answer, new_id, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import Observed, eventually
from otel_responses_usage import CallRecord, ResponsesUsageInstrumentor
from otel_responses_usage._telemetry import semconv as _semconv
from otel_responses_usage._telemetry.baggage import BaggageReader
from test_exit import NamedAPI, run
from test_on_call import KEY, Told, ask, messages, needs_websocket

KEYS = ("tenant.id", "feature")
MODEL = "gpt-5.4-mini"
COUNTS = usage(31, 245, cached=16, cache_write=5, reasoning=128)
LIMITS = {
    "x-ratelimit-limit-tokens": "2000",
    "x-ratelimit-remaining-tokens": "1500",
    "x-ratelimit-limit-requests": "50",
    "x-ratelimit-remaining-requests": "49",
}


@contextmanager
def tenant(name: object, key: str = "tenant.id") -> Iterator[None]:
    """Code that runs on behalf of a tenant."""
    token = context.attach(baggage.set_baggage(key, name))
    try:
        yield
    finally:
        context.detach(token)


def planned(request: SeenRequest) -> Plan | Reply:
    """What a call comes to, as its model is named."""
    answer = Answer(pieces=("one ", "two ", "three "), usage=COUNTS, id=new_id())
    model = request.json["model"]
    if model == "tools":
        body = answer.response(request.json)
        kinds = ("web_search_call", "image_generation_call")
        body["output"] += [{"id": kind, "type": kind, "status": "completed"} for kind in kinds]
        images = {"input_tokens": 50, "output_tokens": 4000, "total_tokens": 4050}
        body["tool_usage"] = {"web_search": {"num_requests": 2}, "image_gen": images}
        return Reply.json(body, headers=LIMITS)
    if model == "retried" and request.headers.get("x-stainless-retry-count") == "0":
        refused = error(503, "Overloaded.")
        return replace(refused, headers={**refused.headers, "retry-after-ms": "1"})
    if model == "left":
        return Plan(answer, cut_after=5, end=Hold())
    return Plan(answer, cut_after=5, end=Cut()) if model == "cut" else Plan(answer)


@pytest.fixture
def server(serve: Serve) -> ScriptedServer:
    """The Responses API; the model of a call says what becomes of it. Each input has twelve tokens."""
    api = ResponsesAPI(planned)
    counted = {"object": "response.input_tokens", "input_tokens": 12}
    return serve(lambda seen: Reply.json(counted) if seen.path.endswith("/input_tokens") else api(seen))


def client_of(server: ScriptedServer, kind: type[Any] = openai.OpenAI, **given: Any) -> Any:
    return kind(base_url=f"{server.url}/v1", api_key=KEY, **{"max_retries": 0, **given})


def read(client: openai.OpenAI, model: str = "whole", **asked: Any) -> None:
    with (
        suppress(*CUT),
        client.responses.create(model=model, input="x", stream=True, **asked) as stream,
    ):
        for event in stream:
            if model == "left" and event.type == "response.output_text.delta":
                break


def points(observed: Observed) -> dict[str, list[Any]]:
    """All points of this package, by the name of the metric."""
    data = observed._metrics.get_metrics_data()
    return {
        metric.name: list(metric.data.data_points)
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        if scope.scope.name == "otel_responses_usage"
        for metric in scope.metrics
    }


def by_tenant(observed: Observed, metric: str, **wanted: str) -> dict[str | None, float]:
    """The sums of a metric by tenant."""
    sums: defaultdict[str | None, float] = defaultdict(float)
    for point in points(observed).get(metric, ()):
        if wanted.items() <= point.attributes.items():
            sums[point.attributes.get("tenant.id")] += getattr(point, "sum", getattr(point, "value", 0))
    return dict(sums)


OUTPUT = {"gen_ai.token.type": "output"}
TOKENS = "gen_ai.client.token.usage"

# --- every span, every metric --------------------------------------------------------------------------


def metrics_of(generations: tuple[_semconv.Generation, ...]) -> set[str]:
    """The metrics that every call may have: those of the conventions, and ours."""
    names = {
        name
        for generation in generations
        for name in (
            generation.duration,
            generation.time_to_first_chunk,
            generation.time_per_output_chunk,
            *(metric.name for metric in generation.tokens),
        )
    }
    return names | {
        "openai_responses.calls",
        "openai_responses.late_usage",
        "openai_responses.tool.calls",
        "openai_responses.tool.web_search.requests",
        "openai_responses.tool.tokens",
        "openai_responses.retries",
        "openai_responses.rate_limit.limit",
        "openai_responses.rate_limit.remaining",
        "openai_responses.retrieval.duration",
        "openai_responses.pending",
        "openai_responses.usage.input_count",
    }


@pytest.mark.parametrize(
    ("opt_in", "generations"),
    [
        ("", (_semconv.CURRENT,)),
        ("gen_ai_latest_experimental/dup", (_semconv.CURRENT, _semconv.NEXT)),
    ],
)
def test_every_metric_and_every_span_says_whose_call_it_was(
    opt_in: str,
    generations: tuple[_semconv.Generation, ...],
    instrument: Instrument,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that a call leaves behind has its entries, under their names: looked up, fetched, late, retried."""
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
    observed = instrument(baggage_keys=KEYS, input_count=True)
    window = {"background": True, "background_options": {"completion_window": "2h"}}
    with (
        client_of(server, max_retries=1) as client,
        tenant("acme"),
        tenant("chat", key="feature"),
        tenant("secret", key="not.asked.for"),
    ):
        read(client)
        read(client, "left")
        read(client, "cut")
        read(client, "left", store=False)
        client.responses.create(model="tools", input="x")
        client.responses.create(model="retried", input="x")
        deferred = client.responses.create(model="whole", input="x", extra_body=window)
        if CAN_RESUME:
            list(client.responses.retrieve(deferred.id, stream=True))
        else:
            client.responses.retrieve(deferred.id)
    expected = {"tenant.id": "acme", "feature": "chat"}
    for span in observed.spans(8 if CAN_RESUME else 7):
        attributes = dict(span.attributes or {})
        assert {name: attributes.get(name) for name in KEYS} == expected, span.name
        assert "secret" not in attributes.values()
    found = points(observed)
    assert set(found) == metrics_of(generations)
    for name, series in found.items():
        for point in series:
            attributes = dict(point.attributes)
            assert {key: attributes.get(key) for key in KEYS} == expected, name
            assert "secret" not in attributes.values()
    assert by_tenant(observed, TOKENS, **OUTPUT) == {"acme": 6 * 245}
    assert by_tenant(observed, "openai_responses.pending") == {"acme": 0}


def test_a_call_belongs_to_the_context_that_made_it(
    instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """It is not the one in which a stream is read or closed, nor that of the look-up."""
    observed = instrument(baggage_keys=KEYS, on_call=told)
    with client_of(server) as client:
        with tenant("maker"):
            stream = client.responses.create(model="left", input="x", stream=True)
        with tenant("reader"), stream:
            next(iter(stream))
    assert told.one().baggage == {"tenant.id": "maker"}
    assert by_tenant(observed, TOKENS, **OUTPUT) == {"maker": 245}
    assert by_tenant(observed, "openai_responses.pending") == {"maker": 0}


@pytest.fixture
def told() -> Told:
    return Told()


def test_tasks_of_one_loop_have_tenants_of_their_own(
    instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """Concurrent calls of an event loop are not mixed up."""
    observed = instrument(baggage_keys=KEYS, on_call=told)

    async def call(client: openai.AsyncOpenAI, number: int) -> None:
        with tenant(f"t{number}"):
            stream = await client.responses.create(
                model="left" if number % 3 else "whole", input="x", stream=True
            )
            async with stream:
                for _ in range(4):
                    await anext(stream)
                    await asyncio.sleep(0.001)

    async def main() -> None:
        async with client_of(server, openai.AsyncOpenAI) as client:
            await asyncio.gather(*(call(client, number) for number in range(12)))

    asyncio.run(main())
    told.all(12)
    assert by_tenant(observed, TOKENS, **OUTPUT) == {f"t{number}": 245 for number in range(12)}
    assert {record.baggage["tenant.id"] for record in told.records} == {f"t{number}" for number in range(12)}


def test_calls_outside_of_any_tenant_have_no_label(instrument: Instrument, server: ScriptedServer) -> None:
    """What has no baggage is as it was before, beside others that have it."""
    observed = instrument(baggage_keys=KEYS)
    with client_of(server) as client:
        read(client)
        with tenant("acme"):
            read(client)
    assert by_tenant(observed, TOKENS, **OUTPUT) == {None: 245, "acme": 245}
    bare = [span for span in observed.spans(2) if "tenant.id" not in (span.attributes or {})]
    assert len(bare) == 1


@needs_websocket
def test_a_message_belongs_to_the_context_that_sends_it(instrument: Instrument, told: Told) -> None:
    """Over a WebSocket each call has the baggage of its `send`, whoever opened the connection."""
    observed = instrument(baggage_keys=KEYS, on_call=told)
    with (
        messages(lambda asked: Answer(usage=COUNTS, id=new_id()).events(asked)) as url,
        openai.OpenAI(api_key=KEY, base_url="http://127.0.0.1:9/v1", websocket_base_url=url) as client,
        tenant("opener"),
        client.responses.connect() as connection,
    ):
        for name in ("acme", "zeta"):
            with tenant(name):
                ask(connection)
    told.all(2)
    assert [record.baggage for record in told.records] == [{"tenant.id": "acme"}, {"tenant.id": "zeta"}]
    assert by_tenant(observed, TOKENS, **OUTPUT) == {"acme": 245, "zeta": 245}
    assert [(span.attributes or {})["tenant.id"] for span in observed.spans(2)] == ["acme", "zeta"]


def test_a_compaction_has_them(instrument: Instrument, serve: Serve) -> None:
    """Its tokens are somebody's, too."""
    body = {"id": new_id(), "object": "response.compaction", "output": [], "usage": COUNTS}
    observed = instrument(baggage_keys=KEYS)
    with client_of(serve(lambda _: Reply.json(body))) as client, tenant("acme"):
        client.post("/responses/compact", body={"model": MODEL, "input": "x"}, cast_to=object)
    assert (observed.span().attributes or {})["tenant.id"] == "acme"
    assert by_tenant(observed, TOKENS, **OUTPUT) == {"acme": 245}


# --- beside another instrumentation --------------------------------------------------------------------

INFERENCE = {"gen_ai.operation.name": "chat"}


def test_a_neighbours_span_and_the_usage_span_have_them(
    instrument: Instrument, server: ScriptedServer
) -> None:
    """Both say whose call it was, and so do the points that the neighbour does not record."""
    observed = instrument(baggage_keys=KEYS)
    tracer = observed.tracer_provider.get_tracer("theirs")
    with (
        client_of(server) as client,
        tenant("acme"),
        tracer.start_as_current_span("theirs", attributes=INFERENCE),
    ):
        read(client, "left")
        eventually(lambda: sum(observed.calls().values()) == 1, "settled")
    assert {span.name: (span.attributes or {})["tenant.id"] for span in observed.spans(2)} == {
        "theirs": "acme",
        "usage left": "acme",
    }
    assert by_tenant(observed, TOKENS, **OUTPUT) == {"acme": 245}
    assert by_tenant(observed, "openai_responses.calls") == {"acme": 1}


def test_a_neighbour_that_suppresses_instrumentation_does_not_take_them_away(
    instrument: Instrument, server: ScriptedServer
) -> None:
    """Logfire makes the call under suppression, and the caller's baggage is still the caller's."""
    observed = instrument(baggage_keys=KEYS)
    tracer = observed.tracer_provider.get_tracer("logfire.openai")
    with (
        client_of(server) as client,
        tenant("acme"),
        tracer.start_as_current_span("theirs", attributes=INFERENCE),
        suppress_instrumentation(),
    ):
        read(client, "left")
        eventually(lambda: sum(observed.calls().values()) == 1, "settled")
    assert by_tenant(observed, TOKENS, **OUTPUT) == {"acme": 245}
    spans = observed.spans(observed.finished)
    assert {(span.attributes or {}).get("tenant.id") for span in spans} == {"acme"}


def test_a_neighbours_own_attributes_win(instrument: Instrument, server: ScriptedServer) -> None:
    """What another instrumentation has written on its span is not replaced by baggage."""
    observed = instrument(baggage_keys=("gen_ai.operation.name", "feature"))
    tracer = observed.tracer_provider.get_tracer("theirs")
    with (
        client_of(server) as client,
        tenant("forged", key="gen_ai.operation.name"),
        tenant("chat", key="feature"),
        tracer.start_as_current_span("theirs", attributes=INFERENCE),
    ):
        read(client)
    attributes = dict(observed.span().attributes or {})
    assert (attributes["gen_ai.operation.name"], attributes["feature"]) == ("chat", "chat")


# --- bounds --------------------------------------------------------------------------------------------


def test_a_long_value_is_cut(instrument: Instrument, server: ScriptedServer, told: Told) -> None:
    """On the span, on metrics and in the record it has 128 characters."""
    observed = instrument(baggage_keys=KEYS, on_call=told)
    with client_of(server) as client, tenant("é" * 127 + "ab" + "c" * 10_000):
        read(client)
    value = "é" * 127 + "a"
    assert (observed.span().attributes or {})["tenant.id"] == value
    assert by_tenant(observed, TOKENS, **OUTPUT) == {value: 245}
    assert told.one().baggage == {"tenant.id": value}


def test_a_key_has_a_hundred_values_on_metrics(
    instrument: Instrument, server: ScriptedServer, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """Further values are `other` there, with one warning for the key, and stay what they are elsewhere."""
    observed = instrument(baggage_keys=KEYS, on_call=told)
    with client_of(server) as client:
        for number in range(103):
            with tenant(f"t{number}"), tenant(f"f{number % 2}", key="feature"):
                client.responses.create(model="whole", input="x")
        with tenant("t0"):
            client.responses.create(model="whole", input="x")
    sums = by_tenant(observed, TOKENS, **OUTPUT)
    assert sums == {f"t{number}": 245 for number in range(1, 100)} | {"t0": 2 * 245, "other": 3 * 245}
    shown = [(span.attributes or {})["tenant.id"] for span in observed.spans(104)]
    assert shown == [*(f"t{number}" for number in range(103)), "t0"]
    assert [record.baggage["tenant.id"] for record in told.all(104)] == shown
    features = {point.attributes.get("feature") for point in points(observed)[TOKENS]}
    assert features == {"f0", "f1", None}
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            "The baggage entry tenant.id has more than 100 values. On metrics, further values are 'other'.",
        )
    ]


def test_threads_that_race_for_the_last_value(caplog: pytest.LogCaptureFixture) -> None:
    """Of new values that come at once a hundred are labels, each for good, and one warning is logged."""
    reader, start = BaggageReader(("tenant.id",)), threading.Barrier(16)
    labels: defaultdict[str, set[str]] = defaultdict(set)
    interval = sys.getswitchinterval()

    def work(seed: int) -> None:
        start.wait()
        for number in range(400):
            with tenant(f"t{(number * 7 + seed * 31) % 150}"):
                read_ = reader.read()
                labels[read_.on_span["tenant.id"]].add(read_.on_points["tenant.id"])

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(labels) == 150
    assert sorted(map(len, labels.values())) == [1] * 150
    assert sum(label == {name} for name, label in labels.items()) == 100
    assert sum(label == {"other"} for label in labels.values()) == 50
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_fork_does_not_inherit_a_held_lock(instrument: Instrument) -> None:
    """A child that is forked while a thread takes a new value in does not wait for that thread."""
    instrument(baggage_keys=KEYS)
    ledger = ResponsesUsageInstrumentor()._ledger
    assert ledger is not None
    reader = ledger._telemetry._baggage
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with reader._lock:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a child that waits for ever
        with tenant("new"):
            os._exit(0 if reader.read().on_points == {"tenant.id": "new"} else 1)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- odd names and values ------------------------------------------------------------------------------


def test_our_own_attributes_win(instrument: Instrument, server: ScriptedServer) -> None:
    """A key with the name of an attribute of ours does not change what we measured."""
    keys = ("gen_ai.request.model", "gen_ai.usage.output_tokens", "gen_ai.token.type", "server.port")
    own = ("openai_responses.stream.outcome", "openai_responses.usage.source", "gen_ai.response.id")
    observed = instrument(baggage_keys=(*keys, *own))
    with ExitStack() as entries, client_of(server) as client:
        for key in (*keys, *own):
            entries.enter_context(tenant("forged", key=key))
        read(client)
        read(client, "left")
    for span in observed.spans(2):
        assert "forged" not in {value for name, value in (span.attributes or {}).items() if name != keys[2]}
    assert observed.tokens() == {"input": (2, 62), "output": (2, 490)}
    assert observed.calls() == {"stream": 1, "retrieval": 1}
    ports = {point.attributes["server.port"] for point in observed.points(TOKENS)}
    assert "forged" not in ports


class Unprintable:
    """An object whose text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("canary")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (42, "42"),
        (True, "True"),
        ("", ""),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("a" * 127 + "\U0001f600", "a" * 127 + "\U0001f600"),
        (b"bytes", "b'bytes'"),
        (Unprintable(), "other"),
    ],
    ids=["number", "bool", "empty", "surrogate", "emoji", "bytes", "unprintable"],
)
def test_odd_values(value: object, shown: str, instrument: Instrument, server: ScriptedServer) -> None:
    """A value of any kind becomes text that can be exported, and no call is lost by one that cannot."""
    observed = instrument(baggage_keys=KEYS)
    with client_of(server) as client, tenant(value):
        read(client)
    assert (observed.span().attributes or {})["tenant.id"] == shown
    assert by_tenant(observed, TOKENS, **OUTPUT) == {shown: 245}
    shown.encode()


@pytest.mark.parametrize("keys", ["tenant.id", ("tenant id",), ("",), ("ключ",), (1,)])
def test_keys_are_names(keys: Any) -> None:
    """What the W3C does not allow as a key is an error in code, and so is one string in place of a tuple."""
    from otel_responses_usage import Config

    with pytest.raises(ValueError, match="baggage_keys"):
        Config(baggage_keys=keys)


# --- forks ---------------------------------------------------------------------------------------------

FORK = """
from opentelemetry import baggage, context


def of(tenant):
    context.attach(baggage.set_baggage("tenant.id", tenant))


for tenant in ("a", "a", "b"):
    of(tenant)
    read_cut("cut")
child = os.fork()
if child == 0:
    make_clients()
    of("c")
    read_cut("cut in the child")
    sys.exit()
os.waitpid(child, 0)
"""
SETUP = """
provide()
ResponsesUsageInstrumentor().instrument()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_what_waits_in_the_parent_does_not_wait_in_a_forked_child(tmp_path: Path, serve: Serve) -> None:
    """A child takes the pending calls of its parent out of its own count, of each tenant for itself."""
    settings = {"OTEL_RESPONSES_USAGE_BAGGAGE_KEYS": "tenant.id"}
    server = serve(NamedAPI(before_get=Pause(1)))
    ran = run(tmp_path, server, FORK, SETUP, **settings)
    assert "Traceback" not in ran.complaints
    assert len(ran.points) == 2
    for line in ran.points:
        pending = {
            point["attributes"].get("tenant.id"): point["value"]
            for point in line["points"]
            if point["name"] == "openai_responses.pending"
        }
        assert set(pending.values()) == {0}, pending
        assert set(pending) <= {"a", "b", "c"}


# --- the example ---------------------------------------------------------------------------------------


@pytest.fixture
def example() -> Any:
    """`examples/tenants/middleware.py`."""
    pytest.importorskip("fastapi")
    path = Path(__file__).parents[1] / "examples" / "tenants" / "middleware.py"
    spec = importlib.util.spec_from_file_location("middleware", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get(app: Any, *headers: dict[str, str]) -> None:
    """Ask the application once with each of these headers, at the same time."""

    async def main() -> None:
        transport = HTTP.ASGITransport(app)
        async with HTTP.AsyncClient(transport=transport, base_url="http://app") as client:
            asked = [client.get("/answer?question=x", headers=one) for one in headers]
            assert {answer.text for answer in await asyncio.gather(*asked)} == {"one two three "}

    asyncio.run(main())


def test_the_middleware_of_the_example(
    example: Any,
    instrument: Instrument,
    server: ScriptedServer,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each streamed answer belongs to the tenant of its request, and one without a tenant to `unknown`."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    instrument(baggage_keys=KEYS, on_call=told)
    get(example.app, *({"x-tenant-id": f"t{number}"} for number in range(5)), {})
    found = sorted(record.baggage["tenant.id"] for record in told.all(6))
    assert found == [*(f"t{number}" for number in range(5)), "unknown"]
    assert baggage.get_baggage("tenant.id") is None


def test_the_middleware_of_the_example_with_a_session(
    example: Any,
    instrument: Instrument,
    server: ScriptedServer,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tenant may come from the session that a middleware outside of it has read."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    instrument(baggage_keys=KEYS, on_call=told)

    class Session:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app({**scope, "session": {"tenant": "of the session"}}, receive, send)

    from fastapi import FastAPI

    app = FastAPI()
    app.add_middleware(example.TenantBaggage, tenant_of=lambda request: request.session.get("tenant"))
    app.add_middleware(Session)
    app.get("/answer")(example.answer)
    get(app, {})
    record: CallRecord = told.one()
    assert record.baggage == {"tenant.id": "of the session"}
