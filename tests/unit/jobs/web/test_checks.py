"""A user's check of prompts, asked where they are submitted."""

import re

import pytest

HTML = {"Accept": "text/html"}
MODULE = """
def cats_only(asked):
    return None if "cat" in asked.prompt else "we like cats"

def away(asked):
    raise TimeoutError("moderation")
"""


@pytest.fixture
def web_with(make_web, tmp_path, monkeypatch):
    """`web_with("cats_only")`: a service that asks this function."""
    (tmp_path / "rules_of_web.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda function: make_web(prompt_check=f"rules_of_web:{function}")


def test_a_refused_prompt_is_a_bad_line_with_its_reason(web_with):
    web = web_with("cats_only")
    rows = [{"prompt": "a cat"}, {"prompt": "a dog"}]
    answer = web.client.post("/api/batches", json={"preset": "tiny", "prompts": rows})
    assert answer.status_code == 422
    (problem,) = answer.json()["problems"]
    assert problem["line"] == 2
    assert problem["message"].endswith("rules_of_web:cats_only: we like cats")
    skipped = web.submit(rows, skip_invalid=True)
    assert web.client.get(f"/api/batches/{skipped}").json()["counts"]["total"] == 1


def test_a_check_that_breaks_stores_nothing_and_may_be_asked_again(web_with):
    web = web_with("away")
    answer = web.client.post(
        "/api/batches", json={"preset": "tiny", "prompts": [{"prompt": "a cat"}]}
    )
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert web.client.get("/api/batches").json()["batches"] == []


def test_a_form_is_shown_again_when_the_check_breaks(web_with):
    web = web_with("away")
    typed = {"preset": "tiny", "prompts": "a typed cat", "name": "n", "cron": "@daily"}
    for path in ("/submit", "/schedules"):
        page = web.client.get(path, headers=HTML)
        csrf = re.search(r'name="csrf" value="(\w+)"', page.text)[1]
        answer = web.client.post(path, data=typed | {"csrf": csrf}, headers=HTML)
        assert answer.status_code == 503
        assert "Nothing was stored yet" in answer.text
        assert "The safety check does not answer. Press" in answer.text
        assert "moderation" not in answer.text
        assert "a typed cat</textarea>" in answer.text
    assert web.client.get("/api/batches").json()["batches"] == []
    assert web.client.get("/api/schedules").json()["schedules"] == []
