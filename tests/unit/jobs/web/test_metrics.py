"""`/metrics`, as Prometheus asks for it."""


def test_metrics_need_a_token_where_everything_does(make_web):
    web = make_web(web_require_token=True)
    assert web.client.get("/metrics").status_code == 401
    answer = web.client.get("/metrics", headers=web.token("", "read"))
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert b'rushes_jobs{state="queued"} 0.0' in answer.content


def test_metrics_are_those_of_now(web):
    web.submit(3)
    assert b'rushes_jobs{state="queued"} 3.0' in web.client.get("/metrics").content
    web.claim(web.job_id("latest"))
    told = web.client.get("/metrics").content
    assert b'rushes_jobs{state="queued"} 2.0' in told
    assert b"rushes_claims_total 1.0" in told
