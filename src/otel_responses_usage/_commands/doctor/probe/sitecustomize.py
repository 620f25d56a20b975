"""Runs in the process of an application under `doctor`: writes what happens there to a file.

Python imports this file at its start. It imports neither threads nor sockets nor the log at that time, so
that the application can still replace them first: gevent depends on that. It acts when modules are imported,
and passes everything on unchanged. A fault of its own is ignored.

Each event is one line of JSON, written at once: a process that is killed has told all but its end.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # `typing` imports more than this file needs
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, TypeAlias

    _Wrapped: TypeAlias = Callable[..., Any]

_REPORT = os.environ.get("RESPONSES_USAGE_DOCTOR_REPORT", "")
_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  # pathlib is not imported yet
_MAX_MESSAGE = 600
_MAX_MESSAGES = 40
_MAX_LAYERS = 16
_CALLS = ("/responses", "/responses/compact")


class _State:
    """What is known of this process."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.opened = 0
        self.ended = 0
        self.suppressed = 0
        self.exporters: list[dict[str, Any]] = []
        self.messages: dict[int, list[str]] = {}
        self.warnings = 0
        self.is_listening = False
        self.has_described = False


_state = _State()
exporters: list[Any] = []  # those whose exports are written to the report


def write(event: str, **facts: Any) -> None:
    """Append one event to the report."""
    import json

    try:
        line = json.dumps({"event": event, "pid": os.getpid(), **facts}, default=str)
        file = os.open(_REPORT, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)
    except Exception:  # noqa: S110  # nothing of this may reach the application
        pass


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception:
        return None


# --- modules of the application, when they are imported


class _Finder:
    """Finds modules as before, and has a hook called after the import of some."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        hook = _HOOKS.get(name)
        if hook is None or name in self._busy:
            return None
        self._busy.add(name)
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec: Any = None
                if find is not None and finder is not self:
                    spec = find(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, hook)
                    found: ModuleSpec = spec
                    return found
        finally:
            self._busy.discard(name)
        return None


class _Loader:
    """Loads a module with its own loader, then calls the hook."""

    def __init__(self, loader: Any, hook: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _quietly(self._hook, module)


def _wrap(owner: Any, name: str, make: Callable[[_Wrapped], _Wrapped]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        return
    wrapper = make(original)
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__", "__signature__"):
        value = getattr(original, attribute, None)
        if value is not None:
            setattr(wrapper, attribute, value)
    wrapper.__wrapped__ = original  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)


def _before(owner: Any, name: str, look: Callable[..., Any]) -> None:
    """Have `look` called with the arguments of a method, before the method."""

    def make(original: _Wrapped) -> _Wrapped:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _quietly(look, args, kwargs)
            return original(*args, **kwargs)

        return wrapper

    _wrap(owner, name, make)


def _after(owner: Any, name: str, look: Callable[..., Any]) -> None:
    """Have `look` called with the arguments and the result of a method, after the method."""

    def make(original: _Wrapped) -> _Wrapped:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            _quietly(look, args, kwargs, result)
            return result

        return wrapper

    _wrap(owner, name, make)


# --- calls


def _on_openai(module: ModuleType) -> None:
    write("openai", version=getattr(sys.modules.get("openai"), "__version__", None))
    _before(module.BaseClient, "_build_request", _on_request)


def _on_request(args: Any, kwargs: Any) -> None:
    if kwargs.get("retries_taken"):
        return
    options = args[1] if len(args) > 1 else kwargs["options"]
    method, path = str(options.method).upper(), str(options.url).partition("?")[0].rstrip("/")
    api = "/" + "/".join(path.lstrip("/").split("/")[:2])
    is_call = method == "POST" and path in _CALLS
    if not is_call and api.startswith("/responses"):
        return  # a look-up of the application, or a count of tokens
    _state.calls[api] = _state.calls.get(api, 0) + 1
    if not is_call:
        write("request", api=api)
        return
    instrumentor: Any = sys.modules.get("otel_responses_usage._instrumentor")
    if instrumentor is not None and getattr(
        instrumentor.ResponsesUsageInstrumentor()._ledger, "_closed", False
    ):
        return  # the process is ending, and calls are not recorded any more
    utils = sys.modules.get("opentelemetry.instrumentation.utils")
    is_enabled = utils is None or bool(utils.is_instrumentation_enabled())
    _state.suppressed += not is_enabled
    write("call", api=api, suppressed=not is_enabled)
    if not _state.has_described:
        _state.has_described = True
        write("state", at="call", **_quietly_described())


def _on_ledger(module: ModuleType) -> None:
    def look(args: Any, kwargs: Any, invocation: Any) -> None:
        request = args[1] if len(args) > 1 else kwargs["request"]
        if invocation is not None and not request.is_fetch:
            _state.opened += 1
            span = invocation.call_span
            write("opened", recorded=bool(span.span.is_recording()), neighbour=span.neighbour is not None)

    _after(module.Ledger, "open", look)


def _on_telemetry(module: ModuleType) -> None:
    def look(args: Any, kwargs: Any, _: Any) -> None:
        record = args[2] if len(args) > 2 else kwargs["record"]
        if not record.request.is_fetch:
            _state.ended += 1
            reason, source = record.missing_reason, record.source
            write(
                "ended",
                outcome=record.ending.outcome.value,
                source=source.value if source is not None else None,
                reason=reason.value if reason is not None else None,
            )

    _after(module.Telemetry, "finish", look)


# --- exporters


def _on_span_export(module: ModuleType) -> None:
    for name in ("BatchSpanProcessor", "SimpleSpanProcessor"):
        _after(getattr(module, name), "__init__", _exporter_made("traces", "span_exporter"))


def _on_metric_export(module: ModuleType) -> None:
    _after(module.PeriodicExportingMetricReader, "__init__", _exporter_made("metrics", "exporter"))


def _exporter_made(signal: str, parameter: str) -> Callable[..., None]:
    def look(args: Any, kwargs: Any, _: Any) -> None:
        _listen()
        exporter = args[1] if len(args) > 1 else kwargs[parameter]
        facts = {**_describe_exporter(exporter, signal), "patched": _green(), "pid": os.getpid()}
        _state.exporters.append(facts)
        write("exporter", **{**facts, "made_at": time.time()})
        _watch(exporter, signal)

    return look


def _watch(exporter: Any, signal: str) -> None:
    export = exporter.export

    def watched(data: Any, *args: Any, **kwargs: Any) -> Any:
        thread = _thread_id()
        _state.messages[thread] = []
        result = None
        try:
            result = export(data, *args, **kwargs)
        except Exception as error:
            _keep_message(f"{type(error).__name__}: {error}"[:_MAX_MESSAGE])
            raise
        finally:
            messages = _state.messages.pop(thread, [])
            is_delivered = getattr(result, "name", "") == "SUCCESS"
            is_ours = _quietly(_has_ours, data)
            count = _quietly(len, data) if signal == "traces" else None
            facts = {"exporter": id(exporter), "signal": signal, "delivered": is_delivered}
            write("export", **facts, ours=bool(is_ours), items=count, messages=messages[-6:])
        return result

    exporter.export = watched
    exporters.append(exporter)
    _hear_all(exporter)


def _hear_all(exporter: Any) -> None:
    """Take the messages of an exporter before its loggers drop those that repeat."""
    import logging

    class Hearer(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            _quietly(_keep_message, record.getMessage()[:_MAX_MESSAGE])
            return True

    for cls in type(exporter).__mro__:
        logger = logging.root.manager.loggerDict.get(cls.__module__)
        if isinstance(logger, logging.Logger) and not any(
            type(one).__name__ == "Hearer" for one in logger.filters
        ):
            logger.filters.insert(0, Hearer())


def _keep_message(message: str) -> bool:
    """Keep a message for the export that this thread is making. False if there is none."""
    messages = _state.messages.get(_thread_id())
    if messages is None:
        return False
    if message not in messages:
        messages.append(message)
    return True


def _has_ours(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return any(_is_ours(span.instrumentation_scope) for span in data)
    return any(
        _is_ours(scope.scope) for resource in data.resource_metrics for scope in resource.scope_metrics
    )


def _is_ours(scope: Any) -> bool:
    return str(getattr(scope, "name", "")).startswith("otel_responses_usage")


def _describe_exporter(exporter: Any, signal: str) -> dict[str, Any]:
    endpoint = getattr(exporter, "_endpoint", None)
    return {
        "id": id(exporter),
        "signal": signal,
        "module": type(exporter).__module__,
        "name": type(exporter).__qualname__,
        "endpoint": endpoint if isinstance(endpoint, str) else None,
        "insecure": getattr(exporter, "_insecure", None),
        "timeout": getattr(exporter, "_timeout", None),
    }


def _thread_id() -> int:
    import _thread

    return _thread.get_ident()


def _green() -> list[str]:
    """The packages that have replaced threads by now."""
    found = []
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and _quietly(monkey.is_module_patched, "threading"):
        found.append("gevent")
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and _quietly(patcher.is_monkey_patched, "thread"):
        found.append("eventlet")
    return found


# --- warnings in the log


def _listen(_: object = None) -> None:
    if _state.is_listening:
        return
    _state.is_listening = True
    import logging

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _quietly(self._tell, record)
            # Python prints a warning only if its logger has no handler. This one must make no difference.
            last = logging.lastResort
            others = [handler for handler in logging.getLogger(record.name).handlers if handler is not self]
            is_unheard = not logging.getLogger().handlers and not others
            if is_unheard and last is not None and record.levelno >= last.level:
                last.handle(record)

        def _tell(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
            message = record.getMessage()[:_MAX_MESSAGE]
            if error is not None:
                message += f": {type(error).__name__}: {error}"[:_MAX_MESSAGE]
            if not _keep_message(message) and _state.warnings < _MAX_MESSAGES:
                _state.warnings += 1
                write("warning", logger=record.name, level=record.levelname, message=message)

    for name in ("opentelemetry", "otel_responses_usage"):
        logging.getLogger(name).addHandler(Listener(logging.WARNING))


# --- the state of the process


def _quietly_described() -> dict[str, Any]:
    found = {"green": _green(), "calls": dict(_state.calls), "opened": _state.opened, "ended": _state.ended}
    found["suppressed"] = _state.suppressed
    for part in (_describe_providers, _describe_instrumentation, _describe_sdk):
        found.update(_quietly(part) or {})
    return found


def _describe_providers() -> dict[str, Any]:
    tracer_provider: Any = getattr(sys.modules.get("opentelemetry.trace"), "_TRACER_PROVIDER", None)
    internal = sys.modules.get("opentelemetry.metrics._internal")
    meter_provider = getattr(internal, "_METER_PROVIDER", None)
    return {
        "tracer_provider": _name_of(tracer_provider),
        "meter_provider": _name_of(meter_provider),
        "resource": _quietly(lambda: str(tracer_provider.resource.attributes.get("service.name"))),
    }


def _name_of(thing: Any) -> str | None:
    return None if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


def _describe_instrumentation() -> dict[str, Any]:
    module = sys.modules.get("otel_responses_usage._instrumentor")
    if module is None:
        return {"package": False, "instrumented": False}
    instrumentor: Any = module.ResponsesUsageInstrumentor()
    patches, ledger = instrumentor._patches, instrumentor._ledger
    found: dict[str, Any] = {"package": True, "instrumented": patches is not None}
    if patches is None or ledger is None:
        return found
    found["has_sdk"] = bool(ledger._telemetry.has_sdk)
    found["patches"] = _quietly(_describe_patches, patches)
    found.update(_quietly(_describe_destinations, patches) or {})
    return found


def _describe_patches(patches: Any) -> list[dict[str, Any]]:
    has_feature = getattr(sys.modules[type(patches).__module__], "_has_feature", lambda _: True)
    made = {(id(patch._owner()), patch._attribute): patch for patch in patches._made}
    rows = []
    for module, name, _ in patches._replacements:
        if module not in sys.modules:
            continue
        class_name, _, attribute = name.rpartition(".")
        patch = made.get((id(getattr(sys.modules[module], class_name, None)), attribute))
        if patch is None and not has_feature(module):
            continue  # this release of the other package has nothing of the kind
        row: dict[str, Any] = {"name": f"{module}.{name}", "made": patch is not None}
        if patch is not None:
            row["in_place"] = bool(patch.is_in_place)
            row["above"] = _quietly(_layers_above, patch) or []
        rows.append(row)
    return rows


def _layers_above(patch: Any) -> list[str]:
    """The modules of the wrappers between the caller and ours."""
    layers: list[str] = []
    layer = patch._outermost()
    while layer is not None and layer is not patch._proxy and len(layers) < _MAX_LAYERS:
        layers.append(_module_of(layer))
        layer = getattr(layer, "__wrapped__", None)
    return layers


def _module_of(function: Any) -> str:
    return str(getattr(getattr(function, "_self_wrapper", function), "__module__", "unknown"))


def _describe_destinations(patches: Any) -> dict[str, Any]:
    tracer, meter = next(
        wrapper.__self__._sources
        for _, _, wrapper in patches._replacements
        if hasattr(getattr(wrapper, "__self__", None), "_sources")
    )
    tracer = getattr(tracer, "_tracer", tracer)  # of a proxy, the real one
    meter = getattr(meter, "_real_meter", meter)
    found: dict[str, Any] = {"tracer": _name_of(tracer), "meter": _name_of(meter)}
    processor = getattr(tracer, "span_processor", None)
    if processor is not None:
        found["span_exporters"] = _exporters_of(processor)
        found["sampler"] = _quietly(lambda: str(tracer.sampler.get_description()))
    consumer = getattr(meter, "_measurement_consumer", None)
    if consumer is not None:
        readers = list(getattr(consumer, "_reader_storages", ()))
        found["readers"] = [_name_of(reader) for reader in readers]
        exporters = [getattr(reader, "_exporter", None) for reader in readers]
        found["metric_exporters"] = [
            _describe_exporter(one, "metrics") for one in exporters if one is not None
        ]
    return found


def _exporters_of(processor: Any, depth: int = 4) -> list[dict[str, Any]]:
    exporters = []
    for part in (processor, getattr(processor, "_batch_processor", None)):
        exporter = getattr(part, "span_exporter", None) or getattr(part, "_exporter", None)
        if exporter is not None:
            exporters.append(_describe_exporter(exporter, "traces"))
            break
    for inner in getattr(processor, "_span_processors", ()):
        exporters += _exporters_of(inner, depth - 1) if depth else []
    return exporters


def _describe_sdk() -> dict[str, Any]:
    openai = sys.modules.get("openai")
    if openai is None:
        return {"openai": None}
    found: dict[str, Any] = {"openai": getattr(openai, "__version__", None)}
    base: Any = sys.modules["openai._base_client"]
    own = []
    for sdk_class in (base.SyncAPIClient, base.AsyncAPIClient):
        for cls in _subclasses(sdk_class):
            method = vars(cls).get("request")
            if method is not None:
                layers = [
                    layer for layer in _modules_of(method) if not layer.startswith("otel_responses_usage")
                ]
                own.append({"name": f"{cls.__module__}.{cls.__qualname__}", "module": (layers or [""])[0]})
    found["own_request"] = own
    return found


def _modules_of(function: Any) -> list[str]:
    modules: list[str] = []
    while function is not None and len(modules) < _MAX_LAYERS:
        modules.append(_module_of(function))
        function = getattr(function, "__wrapped__", None)
    return modules


def _subclasses(cls: Any) -> list[Any]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]


def on_exit() -> None:
    """Write the state of the process at its end."""
    write("state", at="exit", **_quietly_described())


def _on_fork() -> None:
    made_before = [one["module"] for one in _state.exporters]
    _state.calls, _state.opened, _state.ended, _state.suppressed = {}, 0, 0, 0
    _state.has_described = False
    if made_before:
        write("forked", exporters=made_before)


_HOOKS: dict[str, Callable[[ModuleType], Any]] = {
    "openai._base_client": _on_openai,
    "otel_responses_usage._call.ledger": _on_ledger,
    "otel_responses_usage._telemetry.telemetry": _on_telemetry,
    "opentelemetry.sdk.trace.export": _on_span_export,
    "opentelemetry.sdk.metrics.export": _on_metric_export,
    "opentelemetry.instrumentation.auto_instrumentation": _listen,
    "otel_responses_usage._config": _listen,
}


def _start() -> None:
    write("start", executable=sys.executable, version=sys.version.partition(" ")[0])
    sys.meta_path.insert(0, _Finder())
    atexit.register(on_exit)  # the first to be registered is the last to run
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_on_fork)


def _run_next() -> None:
    """Run the `sitecustomize` that Python would have run: that of `opentelemetry-instrument`, as a rule."""
    path = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = type(sys)("sitecustomize")
    module.__spec__, module.__file__ = spec, spec.origin
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if _REPORT and __name__ == "sitecustomize":
    sys.modules["_responses_usage_doctor_probe"] = sys.modules[__name__]
    _quietly(_start)
    try:
        _run_next()
    finally:
        # It may have put its own folder first. Processes that the application starts are to find this one.
        _parts = [
            part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != _HERE
        ]
        os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *_parts])
