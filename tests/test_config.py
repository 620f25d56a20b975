"""Settings come from the environment or from `Config`, and a wrong one never stops an application."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import pytest

from otel_responses_usage import Config
from otel_responses_usage._config import NamedFunction

PREFIX = "OTEL_RESPONSES_USAGE_"

DEFAULTS: dict[str, Any] = {
    "RETRIEVAL": True,
    "RETRIEVAL_TIMEOUT": 10.0,
    "BACKGROUND_TIMEOUT": 300.0,
    "MAX_CONCURRENCY": 8,
    "MAX_PENDING": 2048,
    "EXIT_TIMEOUT": 5.0,
    "FLUSH_TIMEOUT": 1.0,
    "GRACE_TIMEOUT": 0.25,
    "TAIL_TIMEOUT": 0.0,
    "SPANS": "auto",
    "BAGGAGE_KEYS": (),
    "INPUT_COUNT": False,
    "ON_CALL": None,
}


def read(**variables: str) -> Config:
    return Config.from_env({PREFIX + name: value for name, value in variables.items()})


def test_the_defaults_are_those_of_the_contract() -> None:
    """`Config()` and an empty environment say the same, and there are no settings but these."""
    assert Config() == Config.from_env({})
    assert {
        field.name.upper(): getattr(Config(), field.name) for field in dataclasses.fields(Config)
    } == DEFAULTS


def test_the_process_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set after the import counts."""
    monkeypatch.setenv(PREFIX + "MAX_CONCURRENCY", "3")
    assert Config.from_env() == Config(max_concurrency=3)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(("RETRIEVAL", text, True) for text in ("true", "True", "1", "yes", "on", " ON ")),
        *(("RETRIEVAL", text, False) for text in ("false", "FALSE", "0", "no", "off")),
        ("RETRIEVAL_TIMEOUT", "2.5", 2.5),
        ("RETRIEVAL_TIMEOUT", "3", 3.0),
        ("RETRIEVAL_TIMEOUT", "0", 0.0),
        ("BACKGROUND_TIMEOUT", "1e3", 1000.0),
        ("MAX_CONCURRENCY", "1", 1),
        ("MAX_PENDING", "0", 0),
        ("EXIT_TIMEOUT", " 1 ", 1.0),
        ("FLUSH_TIMEOUT", "0.5", 0.5),
        ("TAIL_TIMEOUT", "30", 30.0),
        ("BAGGAGE_KEYS", "tenant.id, feature,,", ("tenant.id", "feature")),
    ],
)
def test_a_variable_sets_its_field(
    name: str, text: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A value in any usual spelling is taken, without a word."""
    assert read(**{name: text}) == Config(**{name.lower(): value})
    assert not caplog.records


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_an_unset_one(name: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """As everywhere in OpenTelemetry, an empty value means the default."""
    assert read(**{name: text}) == Config()
    assert not caplog.records


WRONG = [
    *(("RETRIEVAL", text) for text in ("maybe", "2", "tru e")),
    *(("RETRIEVAL_TIMEOUT", text) for text in ("soon", "-1", "nan", "inf", "-inf", "1e999", "10s", "1,5")),
    *((name, "-0.001") for name in ("BACKGROUND_TIMEOUT", "EXIT_TIMEOUT", "TAIL_TIMEOUT")),
    *(("MAX_CONCURRENCY", text) for text in ("0", "-1", "8.0", "many", "9" * 10_000)),
    *(("MAX_PENDING", text) for text in ("-1", "1e3", "\x00", "٣ ٤")),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_wrong_value_is_named_and_its_default_used(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Telemetry never stops an application from starting."""
    assert read(**{name: text}) == Config()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert PREFIX + name in record.getMessage()
    assert repr(DEFAULTS[name]) in record.getMessage()


def test_all_wrong_values_are_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """One line names every variable to look at, and the right ones are taken all the same."""
    wrong = {name: "?" for name in DEFAULTS if name != "MAX_PENDING"}
    assert read(**wrong, MAX_PENDING="7") == Config(max_pending=7)
    [record] = caplog.records
    for name in wrong:
        assert f"{PREFIX}{name} (" in record.getMessage()
    assert "MAX_PENDING" not in record.getMessage()


def test_a_variable_without_setting_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """One warning names every variable that no setting has, with the nearest right one."""
    assert read(RETREIVAL="false", NEW="?") == Config()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    told = record.getMessage()
    assert f"{PREFIX}RETREIVAL (use {PREFIX}RETRIEVAL)" in told
    assert f"{PREFIX}NEW" in told
    assert "?" not in told


@pytest.mark.parametrize("name", ["no_colon", ":f", "m:", ":", "..m:f", "m.:f", "m:f.", "m:f()", "m:f g"])
def test_a_function_is_named_by_module_and_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Anything else is a value that cannot be used."""
    assert read(ON_CALL=name) == Config()
    assert PREFIX + "ON_CALL" in caplog.text


@pytest.mark.parametrize("name", ["os : getpid", "os:getpid ", " os: getpid"])
def test_spaces_around_the_parts_of_a_name_do_not_count(name: str) -> None:
    """As around any other value."""
    function = read(ON_CALL=name).on_call
    assert isinstance(function, NamedFunction)
    assert function.load() is os.getpid


@pytest.mark.parametrize(
    "setting",
    [
        {"retrieval_timeout": -1},
        {"background_timeout": float("nan")},
        {"exit_timeout": float("inf")},
        {"tail_timeout": -0.1},
        {"max_concurrency": 0},
        {"max_pending": -1},
    ],
)
def test_a_wrong_value_in_code_is_an_error(setting: dict[str, float]) -> None:
    """Whoever writes a setting in code learns of a mistake at once, and which it is."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        Config(**setting)  # type: ignore[arg-type]


def test_settings_cannot_be_changed_behind_the_instrumentation() -> None:
    """A `Config` is a value."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().max_pending = 1  # type: ignore[misc]
