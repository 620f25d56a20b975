"""The checks of `doctor` that need no run, and the page that explains its findings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from otel_responses_usage._commands.doctor import (
    CHECKS,
    calls,
    delivery,
    neighbours,
    process,
    set_up,
    settings,
)
from otel_responses_usage._commands.doctor.findings import KINDS, Finding, Level
from otel_responses_usage._commands.doctor.situation import Redactor, Situation, installed_version
from otel_responses_usage._facts.usage import MissingReason

DOCS = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text("utf-8")
ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
HTTP = "http/protobuf"
SECRET = "canary-secret-4711"


def found(
    check: Callable[[Situation], Iterator[Finding]], environ: dict[str, str], *, zero_code: bool = True
) -> set[str]:
    """The findings of one check, in this environment."""
    return {finding.name for finding in check(Situation(environ, zero_code)) if finding.level is not Level.OK}


OWN = "OTEL_RESPONSES_USAGE_"


@pytest.mark.parametrize(
    ("check", "variable", "value", "name"),
    [
        (settings.check_own_settings, f"{OWN}RETREIVAL", "false", "setting-unknown"),
        (settings.check_own_settings, f"{OWN}MAX_PENDING", "many", "setting-invalid"),
        (settings.check_own_settings, f"{OWN}RETRIEVAL", "no", "look-up-off"),
        (settings.check_own_settings, f"{OWN}SPANS", "AUTO", None),
        (settings.check_own_settings, f"{OWN}ON_CALL", "no_such_module:on_call", "setting-invalid"),
        (settings.check_own_settings, f"{OWN}ON_CALL", "no function", "setting-invalid"),
        (settings.check_own_settings, f"{OWN}ON_CALL", "json:dumps", None),
        (settings.check_own_settings, f"{OWN}BAGGAGE_KEYS", "tenant.id", None),
        (settings.check_own_settings, f"{OWN}TAIL_TIMEOUT", "0", None),
        (settings.check_names, "OTEL_EXPORTER_OLTP_ENDPOINT", "http://x", "variable-unknown"),
        (settings.check_names, "OTEL_TRACE_EXPORTER", "otlp", "variable-unknown"),
        (settings.check_names, "OTEL_METRICS_EXPORT_INTERVAL", "5000", "variable-unknown"),
        (settings.check_names, "OTEL_PYTHON_FLASK_EXCLUDED_URLS", "health", None),
        (settings.check_names, "OTEL_SERVICE_NAME", "shop", None),
        (settings.check_names, ENDPOINT, '"http://x"', "variable-quoted"),
        (settings.check_conventions, "OTEL_SEMCONV_STABILITY_OPT_IN", "gen_ai", "conventions-unknown"),
        (
            settings.check_conventions,
            "OTEL_SEMCONV_STABILITY_OPT_IN",
            "http,gen_ai_latest_experimental/dup",
            "conventions-next",
        ),
        (settings.check_conventions, "OTEL_SEMCONV_STABILITY_OPT_IN", "http/dup", None),
        (settings.check_service, "OTEL_RESOURCE_ATTRIBUTES", "a=b", "service-name"),
        (settings.check_sampling, "OTEL_TRACES_SAMPLER", "parentbased_always_of", "sampler-unknown"),
        (settings.check_sampling, "OTEL_TRACES_SAMPLER", "traceidratio", "sampler-unknown"),
        (settings.check_metrics, "OTEL_METRIC_EXPORT_INTERVAL", "60", "interval-short"),
        (settings.check_metrics, "OTEL_METRIC_EXPORT_INTERVAL", "600000", "interval-long"),
        (settings.check_metrics, "OTEL_METRIC_EXPORT_INTERVAL", "60s", "interval-invalid"),
        (
            settings.check_metrics,
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
            "delta",
            "temporality-delta",
        ),
        (
            settings.check_metrics,
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
            "cumulativ",
            "temporality-unknown",
        ),
        (
            settings.check_metrics,
            "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
            "base2_exponential_bucket_histogram",
            "histogram-exponential",
        ),
        (settings.check_metrics, "OTEL_METRICS_EXEMPLAR_FILTER", "always_off", "exemplars-off"),
        (settings.check_limits, "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "16", "span-limits"),
        (settings.check_limits, "OTEL_EXPORTER_OTLP_TIMEOUT", "10000", "timeout-unit"),
        (set_up.check_switches, "OTEL_SDK_DISABLED", "1", "sdk-disabled-unclear"),
        (
            set_up.check_switches,
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS",
            "requests, *",
            "instrumentation-disabled",
        ),
        (set_up.check_switches, "OTEL_PYTHON_DISTRO", "acme", "distro-unknown"),
        (set_up.check_switches, "OTEL_CONFIG_FILE", "otel.yaml", "config-file"),
        (set_up.check_exporters, "OTEL_METRICS_EXPORTER", "none", "metrics-off"),
        (set_up.check_exporters, "OTEL_TRACES_EXPORTER", "console", "exporter-console"),
        (set_up.check_exporters, PROTOCOL, "http", "protocol-unknown"),
        (delivery.check_endpoints, ENDPOINT, "http://collector:port", "endpoint-invalid"),
        (delivery.check_endpoints, ENDPOINT, "http://collector:4317/v1/traces", "endpoint-path-ignored"),
        (delivery.check_endpoints, HEADERS, "authorization: Bearer x", "headers-invalid"),
        (delivery.check_endpoints, HEADERS, "authorization=Bearer%20x==,b=c", None),
        (delivery.check_endpoints, "https_proxy", "http://proxy:3128", "proxy"),
        (process.check_platform, "AWS_LAMBDA_FUNCTION_NAME", "shop", "frozen"),
        (process.check_server, "GUNICORN_CMD_ARGS", "--preload --workers 2", "preload"),
    ],
)
def test_a_variable_is_checked(check: Any, variable: str, value: str, name: str | None) -> None:
    """A value that is wrong, or surprises, has its finding; a right one has none."""
    names = found(check, {variable: value})
    assert (name in names) if name is not None else not names


def test_a_name_that_is_misspelt_is_told_with_the_right_one() -> None:
    """The nearest name is told, for settings and for exporters."""
    [setting] = settings.check_own_settings(Situation({f"{OWN}RETREIVAL": "1"}, True))
    assert setting.found.endswith(f"The nearest name is {OWN}RETRIEVAL.")
    [exporter] = set_up.check_exporters(Situation({"OTEL_METRICS_EXPORTER": "otpl"}, True))
    assert exporter.found == "OTEL_METRICS_EXPORTER has otpl. The nearest name is otlp."


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ({"grpc"}, "or set `OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf`."),
        ({"grpc", "http"}, "or `otel-responses-usage[otlp]`."),
    ],
    ids=["one", "both"],
)
def test_the_other_protocol_is_proposed_if_its_exporter_is_installed(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], advice: str
) -> None:
    """Nobody is sent from one missing exporter to another."""
    names = {f"opentelemetry-exporter-otlp-proto-{one}" for one in missing}
    monkeypatch.setattr(
        set_up, "installed_version", lambda name: None if name in names else installed_version(name)
    )
    [exporter] = set_up.check_exporters(Situation({}, True))
    assert exporter.name == "exporter-missing"
    assert exporter.advice == f"Install opentelemetry-exporter-otlp-proto-grpc, {advice}"


def test_endpoints_of_one_signal_have_their_own_path() -> None:
    """The SDK adds no path to the variable of one signal, so a path that lacks is told."""
    environ = {PROTOCOL: HTTP, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318"}
    assert found(delivery.check_endpoints, environ) == {"endpoint-path"}


def test_what_matters_to_auto_instrumentation_alone_is_not_told_otherwise() -> None:
    """An application that sets OpenTelemetry up in code does not use these variables."""
    environ = {"OTEL_TRACES_EXPORTER": "none", "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "*"}
    for check in (set_up.check_switches, set_up.check_exporters):
        assert found(check, environ, zero_code=False) == set()


def test_a_host_that_needs_no_proxy_has_no_finding() -> None:
    """Entries of `no_proxy` are hosts, domains, and `*`."""
    for no_proxy in ("localhost", ".local, localhost", "*"):
        assert found(delivery.check_endpoints, {"https_proxy": "http://p:1", "NO_PROXY": no_proxy}) == set()
    assert "proxy" in found(delivery.check_endpoints, {"https_proxy": "http://p:1", "NO_PROXY": "host"})


def test_the_settings_of_gunicorn_are_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greenlets without the variable that replaces threads early, and an application that is loaded early."""
    (tmp_path / "gunicorn.conf.py").write_text('preload_app = True\nworker_class = "gevent"\n')
    monkeypatch.chdir(tmp_path)
    assert found(process.check_server, {}) == {"preload", "gevent-order", "gevent-grpc"}
    patched = {"OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH": "patch_all", PROTOCOL: HTTP}
    assert found(process.check_server, patched) == {"preload"}


def test_neighbours_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known instrumentation is told with its version, and sums that count twice are."""
    versions = {"openinference-instrumentation-openai": "0.1.66"}
    monkeypatch.setattr(neighbours, "installed_version", versions.get)
    assert found(neighbours.check_neighbours, {}) == {"neighbour"}
    always = {"OTEL_RESPONSES_USAGE_SPANS": "always"}
    assert found(neighbours.check_neighbours, always) == {"neighbour", "neighbour-twice"}


def test_secrets_are_taken_out() -> None:
    """Values of headers in any encoding, keys, and users in addresses."""
    redactor = Redactor(
        {
            HEADERS: f"authorization=Bearer%20{SECRET},x={SECRET}%3D",
            "OPENAI_API_KEY": "sk-canary",
            "http_proxy": "http://joe:pa%24s@proxy:1",
        }
    )
    text = f"Bearer {SECRET} {SECRET}= sk-canary http://joe:pa%24s@proxy:1 joe:pa$s https://a:b@c/d?k=e"
    assert redactor.clean(text) == "*** *** *** http://***@proxy:1 *** https://***@c/d?***"


# --- the page


def test_the_page_has_every_kind_of_finding() -> None:
    """Each row of the tables is a kind of the code: its name, level, meaning and what to do."""
    told = [
        tuple(cell.strip() for cell in row.strip("|").split(" | "))
        for row in re.findall(r"^\| `[a-z-]+` \| .+\|$", DOCS, re.MULTILINE)
    ]
    kinds = [(f"`{name}`", kind.level.value, kind.meaning, kind.advice) for name, kind in KINDS.items()]
    assert sorted(told) == sorted(kinds)


def test_every_kind_is_used_by_a_check() -> None:
    """No finding is listed that no check can find."""
    sources = "".join(
        file.read_text("utf-8")
        for file in Path(process.__file__).parent.glob("*.py")
        if file.stem != "findings"
    )
    dynamic = {"traces-off", "metrics-off"}
    assert [name for name in KINDS if f'"{name}"' not in sources and name not in dynamic] == []
    assert len(CHECKS) == len(set(CHECKS))


def test_every_missing_reason_is_explained() -> None:
    """A call without usage is told with what its reason means."""
    assert {reason.value for reason in MissingReason} <= set(calls.REASONS)
