"""Requests drawn from the OpenAPI document: whatever is asked, no answer is a defect."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.unit.jobs.web.conftest import Web

EXAMPLES = 4  # per operation: most defects are in how it is wired, not in rare values

EXCLUDED = [positive_data_acceptance]  # no schema says what a prompt, a cron rule or a size may be


@pytest.fixture
def schema(make_web: Callable[..., Web]) -> Any:
    web = make_web(web_rate="off", web_require_token=True)
    web.client.headers |= web.token("", "admin")
    batch_id = web.submit(2)
    web.succeed(web.job_id(batch_id))
    found = schemathesis.openapi.from_asgi("/openapi.json", web.client.app)
    return found, {"Authorization": web.client.headers["Authorization"]}


def test_no_request_meets_a_defect(schema: Any) -> None:
    seen = 0
    document, headers = schema
    for found in document.get_all_operations():
        operation = found.ok()
        if operation.path.endswith("/events"):
            continue  # a stream

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, excluded_checks=EXCLUDED)

        check()
        seen += 1
    assert seen > 35
