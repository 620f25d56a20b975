"""What a check can find: the kinds of findings, each with its level, its meaning and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple


class Level(str, Enum):
    """How bad a finding is. Only problems make the command fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


class Area(str, Enum):
    """The heading that a finding is listed under."""

    VERSIONS = "Versions"
    SET_UP = "Set-up of OpenTelemetry"
    SETTINGS = "Settings"
    DELIVERY = "Delivery"
    PATCHES = "Patches of the SDK"
    NEIGHBOURS = "Other instrumentations"
    PROCESS = "The process"
    CALLS = "Calls"
    API = "The API"


class Kind(NamedTuple):
    """One kind of finding.

    Attributes:
        area: Where it is listed.
        level: How bad it is.
        meaning: What it means, for every case.
        advice: What to do.

    """

    area: Area
    level: Level
    meaning: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        name: The name of its kind, as in `KINDS`; of an `ok`, the name of what was checked.
        area: Where it is listed.
        level: How bad it is.
        found: What was found, in this case.
        advice: What to do; empty if there is nothing to do.

    """

    name: str
    area: Area
    level: Level
    found: str
    advice: str = ""


def find(name: str, found: str, advice: str | None = None) -> Finding:
    """Return a finding of this kind. `advice` is for this case, if it is known better than for all cases."""
    kind = KINDS[name]
    return Finding(name, kind.area, kind.level, found, kind.advice if advice is None else advice)


def fine(area: Area, name: str, found: str) -> Finding:
    """Return the result of a check that found nothing wrong."""
    return Finding(name, area, Level.OK, found)


_P, _N = Level.PROBLEM, Level.NOTE

# `docs/doctor.md` has this table, and a test compares the two.
KINDS: Final[dict[str, Kind]] = {
    # --- versions
    "entry-point-missing": Kind(
        Area.VERSIONS,
        _P,
        "The package is importable but not installed, so `opentelemetry-instrument` does not find it.",
        "Install the package: `pip install otel-responses-usage`, or `pip install -e .` in a clone.",
    ),
    "openai-missing": Kind(
        Area.VERSIONS,
        _P,
        "The `openai` SDK is not installed in this environment.",
        "Run the command with the Python of your application, or install `otel-responses-usage[instruments]`.",
    ),
    "openai-unsupported": Kind(
        Area.VERSIONS,
        _P,
        "This release of `openai` is outside of the supported range, so nothing is instrumented.",
        "Install a release in the range: `pip install 'otel-responses-usage[instruments]'`.",
    ),
    "sdk-missing": Kind(
        Area.VERSIONS,
        _P,
        "The SDK of OpenTelemetry is not installed. Without it nothing is recorded.",
        "Install `otel-responses-usage[otlp]`, or `opentelemetry-sdk` and an exporter.",
    ),
    "exporter-missing": Kind(
        Area.VERSIONS,
        _P,
        "The exporter for the chosen protocol is not installed.",
        "Install the package that is named. If the exporter for the other protocol is installed, you can also "
        "choose that protocol with `OTEL_EXPORTER_OTLP_PROTOCOL`.",
    ),
    "version-conflict": Kind(
        Area.VERSIONS,
        _P,
        "An installed package requires another version of a package, or one that is not installed.",
        "Install matching versions. All packages of OpenTelemetry should be of one release: `pip install -U` "
        "all of them together.",
    ),
    # --- set-up
    "sdk-disabled": Kind(
        Area.SET_UP,
        _P,
        "`OTEL_SDK_DISABLED=true` switches all spans and metrics off.",
        "Unset `OTEL_SDK_DISABLED`.",
    ),
    "sdk-disabled-unclear": Kind(
        Area.SET_UP,
        _N,
        "`OTEL_SDK_DISABLED` has a value other than `true`. Only `true` switches the SDK off.",
        "Set it to `true` or `false`.",
    ),
    "instrumentation-disabled": Kind(
        Area.SET_UP,
        _P,
        "`OTEL_PYTHON_DISABLED_INSTRUMENTATIONS` switches this package off.",
        "Take `openai_responses_usage`, or `*`, out of `OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`.",
    ),
    "disabled-name-unknown": Kind(
        Area.SET_UP,
        _N,
        "`OTEL_PYTHON_DISABLED_INSTRUMENTATIONS` names an instrumentation that is not installed.",
        "Use the name of an entry point. The name of this package there is `openai_responses_usage`.",
    ),
    "distro-missing": Kind(
        Area.SET_UP,
        _P,
        "No distro or configurator is installed, so `opentelemetry-instrument` sets up no SDK.",
        "Install `opentelemetry-distro`. If your application sets OpenTelemetry up in code, use `--in-code` or "
        "`--run`.",
    ),
    "distro-unknown": Kind(
        Area.SET_UP,
        _P,
        "`OTEL_PYTHON_DISTRO` or `OTEL_PYTHON_CONFIGURATOR` names something that is not installed.",
        "Unset the variable, or use an installed name.",
    ),
    "traces-off": Kind(
        Area.SET_UP,
        _P,
        "`OTEL_TRACES_EXPORTER` is `none`: no spans are exported.",
        "Unset `OTEL_TRACES_EXPORTER`, or set it to `otlp`. If you want no spans, use `--accept traces-off`.",
    ),
    "metrics-off": Kind(
        Area.SET_UP,
        _P,
        "`OTEL_METRICS_EXPORTER` is `none`: no metrics are exported.",
        "Unset `OTEL_METRICS_EXPORTER`, or set it to `otlp`. If you want no metrics, use `--accept metrics-off`.",
    ),
    "exporter-unknown": Kind(
        Area.SET_UP,
        _P,
        "`OTEL_TRACES_EXPORTER` or `OTEL_METRICS_EXPORTER` names an exporter that is not installed. "
        "`opentelemetry-instrument` then sets up nothing at all.",
        "Correct the name, or install the package with that exporter.",
    ),
    "exporter-console": Kind(
        Area.SET_UP,
        _N,
        "The exporter `console` prints telemetry and sends it nowhere.",
        "Set the exporter to `otlp` to send telemetry.",
    ),
    "exporter-pull": Kind(
        Area.SET_UP,
        _N,
        "The exporter `prometheus` sends nothing. Prometheus has to read the metrics from the process.",
        "Check that Prometheus reads every process of the application, or set the exporter to `otlp`.",
    ),
    "protocol-unknown": Kind(
        Area.SET_UP,
        _P,
        "The variable for the protocol of OTLP has a value that the SDK does not know.",
        "Use `grpc` or `http/protobuf`.",
    ),
    "config-file": Kind(
        Area.SET_UP,
        _N,
        "`OTEL_CONFIG_FILE` is set. The SDK reads that file, and not the variables checked here.",
        "Check the file. Use `--run` to see which exporters it leads to.",
    ),
    "set-up-failed": Kind(
        Area.SET_UP,
        _P,
        "`opentelemetry-instrument` raised an error while it set up the SDK. The application runs without "
        "telemetry.",
        "Correct what the error names.",
    ),
    "no-sdk": Kind(
        Area.SET_UP,
        _P,
        "The process has no provider of the SDK. Without one this package records nothing.",
        "Start the application with `opentelemetry-instrument`, or set the providers as the README shows.",
    ),
    "no-meter-provider": Kind(
        Area.SET_UP,
        _P,
        "There is a tracer provider, but no meter provider of the SDK: spans, and no metrics.",
        "Call `metrics.set_meter_provider(...)`, or give `meter_provider` to `instrument()`.",
    ),
    "no-tracer-provider": Kind(
        Area.SET_UP,
        _P,
        "There is a meter provider, but no tracer provider of the SDK: metrics, and no spans.",
        "Call `trace.set_tracer_provider(...)`, or give `tracer_provider` to `instrument()`.",
    ),
    "no-exporter": Kind(
        Area.SET_UP,
        _P,
        "A provider of the SDK has no exporter.",
        "Add a `BatchSpanProcessor` with an exporter, or a `PeriodicExportingMetricReader`.",
    ),
    "provider-unused": Kind(
        Area.SET_UP,
        _P,
        "The application made a provider with an exporter, but the spans or points of this package go to another "
        "provider.",
        "Make one provider only, and set it before anything else does. Under `opentelemetry-instrument` make "
        "none. Or give the provider to `instrument()`.",
    ),
    "provider-twice": Kind(
        Area.SET_UP,
        _N,
        "A provider was set twice. OpenTelemetry keeps the first one, so the exporters of the second get nothing.",
        "Under `opentelemetry-instrument` make no providers in code. Otherwise set them once.",
    ),
    "log-warning": Kind(
        Area.SET_UP,
        _N,
        "OpenTelemetry, or this package, has logged a warning.",
        "Read the warning. A section of this report may explain it.",
    ),
    # --- settings
    "setting-invalid": Kind(
        Area.SETTINGS,
        _P,
        "A variable `OTEL_RESPONSES_USAGE_...` has a value that cannot be used. The default is used.",
        "Correct the value. docs/reference.md lists the settings.",
    ),
    "setting-unknown": Kind(
        Area.SETTINGS,
        _P,
        "There is no setting with this name, so the variable does nothing.",
        "Correct the name. docs/reference.md lists the settings.",
    ),
    "variable-unknown": Kind(
        Area.SETTINGS,
        _P,
        "A variable differs by a letter or two from one of OpenTelemetry, and does nothing.",
        "Correct the name.",
    ),
    "variable-quoted": Kind(
        Area.SETTINGS,
        _P,
        "The value of a variable begins with a quotation mark. `docker --env-file` and others keep these.",
        "Write the value without quotation marks.",
    ),
    "look-up-off": Kind(
        Area.SETTINGS,
        _N,
        "`OTEL_RESPONSES_USAGE_RETRIEVAL` is off. Calls that end early have no usage, with the reason `disabled`.",
        "Unset the variable to have the usage looked up.",
    ),
    "conventions-unknown": Kind(
        Area.SETTINGS,
        _P,
        "`OTEL_SEMCONV_STABILITY_OPT_IN` has a value that looks like one for GenAI, but is not. It does nothing.",
        "Use `gen_ai_latest_experimental` or `gen_ai_latest_experimental/dup`, or leave it out.",
    ),
    "conventions-next": Kind(
        Area.SETTINGS,
        _N,
        "`OTEL_SEMCONV_STABILITY_OPT_IN` chooses the next names of the metrics. Queries for the names of today "
        "find nothing.",
        'Use the names under "The next generation" in docs/reference.md, or `gen_ai_latest_experimental/dup` '
        "for both.",
    ),
    "service-name": Kind(
        Area.SETTINGS,
        _N,
        "No service name is set. Backends show the service as `unknown_service`.",
        "Set `OTEL_SERVICE_NAME`.",
    ),
    "sampling-off": Kind(
        Area.SETTINGS,
        _P,
        "The sampler drops every span. Metrics are not affected.",
        "Unset `OTEL_TRACES_SAMPLER`, or set it to `parentbased_always_on`.",
    ),
    "sampling-part": Kind(
        Area.SETTINGS,
        _N,
        "The sampler drops a part of the traces. Metrics have all calls.",
        "Use the metrics for sums of tokens. Spans are examples only.",
    ),
    "sampler-unknown": Kind(
        Area.SETTINGS,
        _P,
        "`OTEL_TRACES_SAMPLER` or its argument cannot be used. The SDK then samples every trace.",
        "Use a sampler of OpenTelemetry, such as `parentbased_traceidratio`, and a number from 0 to 1.",
    ),
    "interval-short": Kind(
        Area.SETTINGS,
        _P,
        "`OTEL_METRIC_EXPORT_INTERVAL` is in milliseconds, and less than half a second.",
        "Set it in milliseconds: 60000 is one minute.",
    ),
    "interval-invalid": Kind(
        Area.SETTINGS,
        _P,
        "`OTEL_METRIC_EXPORT_INTERVAL` is not a number of milliseconds.",
        "Set it to a number: 60000 is one minute.",
    ),
    "interval-long": Kind(
        Area.SETTINGS,
        _N,
        "Metrics are exported less often than every two minutes.",
        "Wait that long, or set `OTEL_METRIC_EXPORT_INTERVAL` to 60000 or less.",
    ),
    "temporality-delta": Kind(
        Area.SETTINGS,
        _N,
        "Metrics are sent as differences (delta). Prometheus, and the Collector's exporters for it, need "
        "cumulative values.",
        "For Prometheus unset `OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE`.",
    ),
    "temporality-unknown": Kind(
        Area.SETTINGS,
        _P,
        "`OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE` has a value that the SDK does not know.",
        "Use `cumulative`, `delta` or `lowmemory`.",
    ),
    "histogram-exponential": Kind(
        Area.SETTINGS,
        _N,
        "Histograms are exponential, and have not the buckets that the conventions advise.",
        "Check that your backend takes them. Queries over fixed buckets (`_bucket`) find nothing.",
    ),
    "exemplars-off": Kind(
        Area.SETTINGS,
        _N,
        "`OTEL_METRICS_EXEMPLAR_FILTER=always_off`: no point of a metric leads to its span.",
        "Unset the variable to have exemplars.",
    ),
    "span-limits": Kind(
        Area.SETTINGS,
        _P,
        "A limit of the SDK is so low that attributes of this package are dropped or cut.",
        "Allow 64 attributes for each span, and values of 128 characters, or more.",
    ),
    "timeout-unit": Kind(
        Area.SETTINGS,
        _N,
        "`OTEL_EXPORTER_OTLP_TIMEOUT` is in seconds in Python. The value looks like milliseconds.",
        "Set it in seconds: 10 is the default.",
    ),
    # --- delivery
    "endpoint-invalid": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint is not an address.",
        "Write it as `http://host:port` or `https://host:port`.",
    ),
    "endpoint-scheme": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint has no `http://` or `https://`. Over gRPC it then means TLS; over HTTP it is an error.",
        "Write the scheme: `http://` for a Collector without TLS, else `https://`.",
    ),
    "endpoint-path": Kind(
        Area.DELIVERY,
        _P,
        "The path of the endpoint is wrong. The SDK adds `/v1/traces` and `/v1/metrics` to "
        "`OTEL_EXPORTER_OTLP_ENDPOINT`, and adds nothing to the variables of one signal.",
        "Set `OTEL_EXPORTER_OTLP_ENDPOINT` without `/v1/...`, or the variable of the signal with the whole path.",
    ),
    "endpoint-path-ignored": Kind(
        Area.DELIVERY,
        _N,
        "The endpoint has a path. gRPC has none and ignores it.",
        "Leave out the path, or set `OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf`.",
    ),
    "endpoint-unresolved": Kind(
        Area.DELIVERY,
        _P,
        "The host name of the endpoint is not known here.",
        "Correct the name. A name of Docker or Kubernetes is known inside of its network only.",
    ),
    "endpoint-refused": Kind(
        Area.DELIVERY,
        _P,
        "Nothing listens at the endpoint.",
        "Start the Collector, or correct host and port. Inside of a container `localhost` is the container.",
    ),
    "endpoint-silent": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint does not answer. A firewall may drop the packets, or another program listens there.",
        "Correct host and port, or open the firewall.",
    ),
    "protocol-mismatch": Kind(
        Area.DELIVERY,
        _P,
        "The exporter speaks one protocol of OTLP and the endpoint the other. As a rule 4317 is the port for "
        "`grpc`, and 4318 for `http/protobuf`.",
        "Set `OTEL_EXPORTER_OTLP_PROTOCOL` to the protocol of the port, or change the port.",
    ),
    "tls-expected": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint speaks TLS, and the exporter does not.",
        "Write `https://` in the endpoint, and unset `OTEL_EXPORTER_OTLP_INSECURE`.",
    ),
    "tls-unexpected": Kind(
        Area.DELIVERY,
        _P,
        "The exporter speaks TLS, and the endpoint does not.",
        "Write `http://` in the endpoint.",
    ),
    "certificate": Kind(
        Area.DELIVERY,
        _P,
        "The certificate of the endpoint is not accepted.",
        "Name the certificate of its authority in `OTEL_EXPORTER_OTLP_CERTIFICATE`. It must hold for the host "
        "name of the endpoint.",
    ),
    "insecure-ignored": Kind(
        Area.DELIVERY,
        _N,
        "`OTEL_EXPORTER_OTLP_INSECURE` is ignored if the endpoint has a scheme.",
        "Use the scheme: `http://` is without TLS.",
    ),
    "proxy": Kind(
        Area.DELIVERY,
        _N,
        "Exports to the endpoint go through a proxy, by the proxy variables of the environment.",
        "Add the host of the endpoint to `no_proxy` and `NO_PROXY` if the proxy cannot reach it.",
    ),
    "proxy-failed": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint can be reached directly. Exports go through a proxy, and fail.",
        "Add the host of the endpoint to `no_proxy` and `NO_PROXY`.",
    ),
    "headers-invalid": Kind(
        Area.DELIVERY,
        _P,
        "`OTEL_EXPORTER_OTLP_HEADERS` has a part that is not `name=value`. That header is not sent.",
        "Write `name=value,name=value`, with `%20` for a space: `authorization=Bearer%20...`.",
    ),
    "delivery-unauthorized": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint refused the credentials, or there were none.",
        "Correct `OTEL_EXPORTER_OTLP_HEADERS`. Check that the key may write, and belongs to this region.",
    ),
    "delivery-not-found": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint has no such path, or does not take this signal.",
        "Correct the path of the endpoint. A Collector needs a pipeline for traces and one for metrics.",
    ),
    "delivery-rejected": Kind(
        Area.DELIVERY,
        _P,
        "The endpoint answered with an error.",
        "Look up the status at the operator of the endpoint, and read its log.",
    ),
    "delivery-failed": Kind(
        Area.DELIVERY,
        _P,
        "The exporter could not deliver, and gave no status.",
        "Read the message of the exporter.",
    ),
    "delivery-late": Kind(
        Area.DELIVERY,
        _P,
        "The test was not over in time, so it is not known whether telemetry is delivered.",
        "Try again with a longer `--timeout`.",
    ),
    "delivery-untried": Kind(
        Area.DELIVERY,
        _N,
        "Nothing was exported, so it is not known whether telemetry is delivered.",
        "Make a call in the application, or run `doctor` without `--run`.",
    ),
    # --- patches
    "not-instrumented": Kind(
        Area.PATCHES,
        _P,
        "The instrumentation is not switched on.",
        "Call `ResponsesUsageInstrumentor().instrument()`, or start with `opentelemetry-instrument`.",
    ),
    "patch-missing": Kind(
        Area.PATCHES,
        _P,
        "A function that this package wraps is not there in this release of the other package.",
        "Install a supported release of `openai`, and the newest release of this package.",
    ),
    "patch-replaced": Kind(
        Area.PATCHES,
        _P,
        "Another package has replaced a wrapped function since. Calls may be missed.",
        "Call `instrument()` after the other package has been set up.",
    ),
    "patch-covered": Kind(
        Area.PATCHES,
        _N,
        "Another package has put a wrapper of its own above ours. This is harmless as a rule.",
        "Nothing. If calls are missed, call `instrument()` after that package.",
    ),
    "client-own-request": Kind(
        Area.PATCHES,
        _N,
        "A client class has a `request` of its own, from another package or the application. Its calls are seen "
        "at their answer.",
        "Nothing, as long as that method calls the `request` of the SDK.",
    ),
    "test-call-missed": Kind(
        Area.PATCHES,
        _P,
        "A test call to a server of `doctor` itself was not recorded.",
        "Look at the other findings. If there are none, report it: this is a fault of this package.",
    ),
    "test-call-late": Kind(
        Area.PATCHES,
        _P,
        "The test was stopped because its time was up. What it had not tried until then is not known.",
        "Try again with a longer `--timeout`.",
    ),
    # --- neighbours
    "neighbour": Kind(
        Area.NEIGHBOURS,
        _N,
        "Another instrumentation of the same calls is installed, one that this package knows.",
        "Nothing. docs/neighbours.md shows the spans and metrics of both.",
    ),
    "neighbour-unknown": Kind(
        Area.NEIGHBOURS,
        _N,
        "An instrumentation of `openai` is installed that this package does not know. Tokens may count twice.",
        "Read docs/neighbours.md. `OTEL_RESPONSES_USAGE_SPANS=never` avoids a second span.",
    ),
    "neighbour-twice": Kind(
        Area.NEIGHBOURS,
        _N,
        "`OTEL_RESPONSES_USAGE_SPANS=always` beside another instrumentation: sums over all scopes count twice.",
        "Select the scope `otel_responses_usage` in every query, or use `auto`.",
    ),
    # --- process
    "gevent-order": Kind(
        Area.PROCESS,
        _P,
        "gevent or eventlet replaced threads and sockets after the exporters were made. The process can hang.",
        "Replace them first: set up OpenTelemetry after `monkey.patch_all()`. Under `opentelemetry-instrument` set "
        "`OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH=patch_all`. See docs/deploying.md.",
    ),
    "gevent-grpc": Kind(
        Area.PROCESS,
        _N,
        "Under gevent or eventlet an export over gRPC stops all greenlets until the Collector has answered.",
        "Set `OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf`.",
    ),
    "preload": Kind(
        Area.PROCESS,
        _N,
        "gunicorn loads the application before it forks its workers (`preload_app`). Providers that the "
        "application makes then are made before the fork.",
        "Set OpenTelemetry up in `post_worker_init`. See docs/deploying.md.",
    ),
    "forked": Kind(
        Area.PROCESS,
        _N,
        "The process was forked after its providers were made. Connections of gRPC do not survive a fork.",
        "Set OpenTelemetry up in the worker, after the fork. See docs/deploying.md.",
    ),
    "frozen": Kind(
        Area.PROCESS,
        _N,
        "The environment is of a platform that freezes the process between requests.",
        "Call `force_flush()` of both providers at the end of each request. See docs/deploying.md.",
    ),
    "frozen-no-wait": Kind(
        Area.PROCESS,
        _P,
        "The platform freezes the process, and `OTEL_RESPONSES_USAGE_FLUSH_TIMEOUT=0` keeps a flush from waiting "
        "for look-ups.",
        "Unset `OTEL_RESPONSES_USAGE_FLUSH_TIMEOUT`.",
    ),
    "server-signals": Kind(
        Area.PROCESS,
        _N,
        "This server ends its processes by a signal, without their exit handlers. What is not exported then is "
        "lost.",
        "Shut the providers down in the server's own hook. docs/deploying.md has it.",
    ),
    "killed": Kind(
        Area.PROCESS,
        _P,
        "The process ended without its exit handlers: by a signal or `os._exit()`. What was not exported is lost.",
        "Shut the providers down before the end. docs/deploying.md has a recipe for each server.",
    ),
    "run-failed": Kind(
        Area.PROCESS,
        _N,
        "The application ended with an error.",
        "Read its own output.",
    ),
    "run-stopped": Kind(
        Area.PROCESS,
        _N,
        "The application was still running after the time of `--timeout`, and was stopped as with Ctrl-C.",
        "Use a longer `--timeout` if it had not made its calls yet.",
    ),
    "run-unseen": Kind(
        Area.PROCESS,
        _P,
        "The program did not tell anything: it is not Python, or ignores `PYTHONPATH` (`python -I`, `-E`, `-S`).",
        "Name the Python program that makes the calls.",
    ),
    # --- calls
    "openai-unused": Kind(
        Area.CALLS,
        _N,
        "The application did not import `openai`.",
        "Nothing, if it makes its calls later or in another process.",
    ),
    "no-calls": Kind(
        Area.CALLS,
        _N,
        "The application made no Responses call.",
        "Make one while `doctor` runs.",
    ),
    "other-api": Kind(
        Area.CALLS,
        _N,
        "The application called another API of `openai`. This package records the Responses API only.",
        "Use `responses.create`. Frameworks have an option for it: see docs/frameworks.md.",
    ),
    "calls-missed": Kind(
        Area.CALLS,
        _P,
        "The application made Responses calls that were not recorded.",
        "Look at the findings on the set-up and the patches: one of them is the cause as a rule.",
    ),
    "calls-suppressed": Kind(
        Area.CALLS,
        _N,
        "Calls were made inside of `suppress_instrumentation()`. They are not recorded.",
        "Nothing, if that is intended.",
    ),
    "calls-open": Kind(
        Area.CALLS,
        _P,
        "Calls were recorded as begun, and not as ended.",
        "Close every stream, and let the process run its exit handlers.",
    ),
    "usage-unknown": Kind(
        Area.CALLS,
        _N,
        "Calls ended without their usage.",
        "The reason tells why. docs/troubleshooting.md has a section for each reason.",
    ),
    # --- api
    "api-key-missing": Kind(
        Area.API,
        _P,
        "`OPENAI_API_KEY` is not set, so no call can be made.",
        "Set `OPENAI_API_KEY`.",
    ),
    "api-failed": Kind(
        Area.API,
        _P,
        "The call of `--api` was refused, or there was no connection.",
        "Check `OPENAI_API_KEY`, `OPENAI_BASE_URL` and the model (`--model`).",
    ),
    "api-not-stored": Kind(
        Area.API,
        _P,
        "The server took the call, and has no response to look up. Calls that end early have no usage here.",
        "Read streams to their end, or use `background=True`. Set `OTEL_RESPONSES_USAGE_RETRIEVAL=false` if the "
        "server never stores responses.",
    ),
    "api-look-up-refused": Kind(
        Area.API,
        _P,
        "The server refused the look-up. The key may create responses and may not read them.",
        "Give the key the right to read responses.",
    ),
    "api-no-usage": Kind(
        Area.API,
        _P,
        "The server returned the response, and no usage in time.",
        "The reason tells why. docs/troubleshooting.md has a section for each reason.",
    ),
}

# What a test that was stopped too soon seems to show.
_OF_A_STOPPED_TEST: Final = frozenset(
    {"no-sdk", "not-instrumented", "run-unseen", "test-call-missed", "delivery-untried"}
)

# Findings that follow from another one in the same report, and are left out beside it.
_CONSEQUENCES: Final[dict[str, frozenset[str]]] = {
    "exporter-unknown": frozenset({"set-up-failed", "no-sdk", "not-instrumented"}),
    "exporter-missing": frozenset({"set-up-failed", "no-sdk", "not-instrumented"}),
    "protocol-unknown": frozenset({"set-up-failed", "no-sdk", "not-instrumented"}),
    "distro-unknown": frozenset({"no-sdk"}),
    "distro-missing": frozenset({"no-sdk"}),
    "sdk-missing": frozenset(
        {"exporter-missing", "no-sdk", "distro-missing", "set-up-failed", "delivery-untried"}
    ),
    "set-up-failed": frozenset({"no-sdk", "not-instrumented"}),
    "sdk-disabled": frozenset({"no-sdk", "delivery-untried", "delivery-late"}),
    "instrumentation-disabled": frozenset({"not-instrumented"}),
    "openai-missing": frozenset({"version-conflict", "test-call-missed", "not-instrumented"}),
    "openai-unsupported": frozenset({"not-instrumented"}),
    "endpoint-scheme": frozenset({"tls-unexpected", "delivery-failed"}),
    "endpoint-path": frozenset({"delivery-not-found"}),
    "delivery-late": frozenset({"test-call-late", *_OF_A_STOPPED_TEST}),
    "test-call-late": _OF_A_STOPPED_TEST,
    "proxy-failed": frozenset({"proxy"}),
    "headers-invalid": frozenset({"log-warning"}),
    "temporality-unknown": frozenset({"log-warning"}),
    "sampler-unknown": frozenset({"log-warning"}),
    "no-calls": frozenset({"delivery-untried"}),
    "calls-missed": frozenset({"delivery-untried"}),
    "calls-suppressed": frozenset({"delivery-untried"}),
    "killed": frozenset({"delivery-untried"}),
    "openai-unused": frozenset({"delivery-untried"}),
}


def without_consequences(findings: list[Finding]) -> list[Finding]:
    """Return the findings without those that only follow from another one."""
    names = {finding.name for finding in findings}
    left_out = frozenset[str]().union(*(follow for name, follow in _CONSEQUENCES.items() if name in names))
    return [finding for finding in findings if finding.name not in left_out]
