"""A call that costs too much reaches somebody's pager, by way of every program that people run."""

from __future__ import annotations

import pytest

from stack import BILLED, MODEL, Stack


def test_a_budget_that_burns_pages_somebody_and_is_resolved(stack: Stack) -> None:
    """Calls of a process that exports once, at its end, raise the alert; it is taken back when they stop."""
    with stack.service("shop", *["whole"] * 10) as ended:
        assert ended() == 0
    told = stack.notice("OpenAITokenBudgetBurningFast", "firing", job="shop")
    assert told.receiver == "/page"
    assert told.labels == {
        "alertname": "OpenAITokenBudgetBurningFast",
        "severity": "page",
        "job": "shop",
        "gen_ai_request_model": MODEL,
    }
    assert told.annotations["summary"] == f"shop burns its token budget for {MODEL}"
    [used] = stack.prometheus.query(
        'sum(sum_over_time(job_model_type:gen_ai_client_token_usage:increase1m{job="shop"}[10m]))'
    )
    assert float(used["value"][1]) == 10 * (BILLED["input_tokens"] + BILLED["output_tokens"])
    stack.notice("OpenAITokenBudgetBurningFast", "resolved", job="shop")


@pytest.mark.parametrize(
    ("alert", "receiver"),
    [
        ("OpenAIUsageUnmetered", "/ticket"),
        ("OpenAIStreamsCut", "/page"),
        ("OpenAIStreamsAbandoned", "/ticket"),
        ("OpenAIRetrievalFailing", "/ticket"),
        ("OpenAIRetrievalCircuitOpen", "/ticket"),
        ("OpenAITokensWithoutPrice", "/ticket"),
        ("OpenAIToolsWithoutPrice", "/ticket"),
    ],
)
def test_what_goes_wrong_in_a_service_is_told(stack: Stack, alert: str, receiver: str) -> None:
    """Each alert finds its metric under the name and the labels that a real service gives it."""
    assert stack.notice(alert, "firing", job="cafe").receiver == receiver


def test_nothing_is_told_without_reason(stack: Stack) -> None:
    """No other alert has been raised by the calls that were made."""
    stack.notice("OpenAIRetrievalCircuitOpen", "firing", job="cafe")
    expected = {
        "OpenAITokenBudgetBurningFast",
        "OpenAITokenBudgetBurningSlowly",
        "OpenAISpendBudgetBurningFast",
        "OpenAISpendBudgetBurningSlowly",
        "OpenAIUsageUnmetered",
        "OpenAIStreamsCut",
        "OpenAIStreamsAbandoned",
        "OpenAIRetrievalFailing",
        "OpenAIRetrievalCircuitOpen",
        "OpenAITokensWithoutPrice",
        "OpenAIToolsWithoutPrice",
        "OpenAITenantBudgetNear",
        "OpenAITenantBudgetUsedUp",
    }
    assert {notice.alert for notice in stack.notices} <= expected


def test_a_tenant_that_has_used_up_its_budget_is_told(stack: Stack) -> None:
    """The alert names the tenant, and links its section of the runbook and its dashboard."""
    told = stack.notice("OpenAITenantBudgetUsedUp", "firing", tenant_id="acme")
    assert told.receiver == "/page"
    assert told.annotations["runbook_url"].endswith("/operations.html#openaitenantbudgetusedup")
    assert told.annotations["dashboard_url"].endswith("/d/openai-responses-tenants?var-tenant=acme")
    assert not any(notice.labels.get("tenant_id") == "zeta" for notice in stack.notices)
