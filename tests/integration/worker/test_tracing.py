"""With traces asked for, every attempt at a job and its upload are spans of one trace."""

import gzip
import http.server
import socket
import threading
import time

import pytest
from celery import signals

from jobs import lifecycle
from tests.waiting import until
from worker import scratch, simulation, tasks, tracing  # noqa: F401  # tasks hears Celery's signals

sdk = pytest.importorskip("opentelemetry.sdk.trace.export")


@pytest.fixture
def spans():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing.begin(sdk.SimpleSpanProcessor(exporter), worker="cpu0@here")
    yield exporter.get_finished_spans
    tracing.end()


def test_a_job_is_one_trace_with_a_span_per_attempt_stage_and_upload(host, spans):
    job, other = host.submit(2)
    host.runner().run_attempt(job.id)
    (folder,) = scratch.folders(host.config.scratch_dir)
    host.db.write(lifecycle.release, folder.attempt_id, reason="again")
    folder.remove()
    host.runner().run_attempt(job.id)
    (folder,) = scratch.folders(host.config.scratch_dir)
    host.publisher().publish(folder.attempt_id)
    found = spans()
    assert len({span.context.trace_id for span in found}) == 1
    attempts = [span for span in found if span.name == "attempt"]
    assert [span.attributes["rushes.attempt"] for span in attempts] == [1, 2]
    inside = {span.name for span in found if span.parent.span_id == attempts[1].context.span_id}
    assert inside == {"load", "text", "denoise", "decode"}
    finish = [span for span in found if span.name == "finish"][1]
    inside = {span.name for span in found if span.parent.span_id == finish.context.span_id}
    assert inside == {"mux"}  # beside the next job's attempt
    assert "upload" in {span.name for span in found}
    host.runner().run_attempt(other.id)
    assert len({span.context.trace_id for span in spans()}) == 2


def test_a_failed_attempt_says_so(host, spans, monkeypatch):
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "0")
    renderer = simulation.SimulatedRenderer(type(host.worker_settings)())
    host.runner(renderer=renderer).run_attempt(host.submit()[0].id)  # it only simulates
    (span,) = spans()
    assert span.status.is_ok is False
    assert "needs a real device" in span.status.description


class Collector(http.server.HTTPServer):
    """Takes spans as OpenTelemetry's own collector does: OTLP in protobuf over HTTP."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests = []

    def spans(self):
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        for _, body in self.requests:
            message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                names = {each.key: each.value.string_value for each in resource.resource.attributes}
                yield from ((names, span) for scope in resource.scope_spans for span in scope.spans)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(((self.path, self.headers["Content-Type"]), body))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    server = Collector()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_spans_reach_a_collector_over_http(host, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    tracing.start(worker="cpu0@here")
    (job,) = host.submit()
    host.runner().run_attempt(job.id)
    until(lambda: any(span.name == "attempt" for _, span in collector.spans()))
    tracing.end()
    assert {told for told, _ in collector.requests} == {("/v1/traces", "application/x-protobuf")}
    found = list(collector.spans())
    names, attempt = next((names, span) for names, span in found if span.name == "attempt")
    assert (names["service.name"], names["service.instance.id"]) == ("rushes", "cpu0@here")
    facts = {each.key: each.value for each in attempt.attributes}
    assert facts["rushes.job_id"].int_value == job.id
    inside = {span.name for _, span in found if span.parent_span_id == attempt.span_id}
    assert inside == {"load", "text", "denoise", "decode"}
    assert {span.trace_id for _, span in found} == {attempt.trace_id}


def test_the_last_spans_are_sent_when_a_process_ends(host, collector, monkeypatch):
    """Spans are sent in batches every five seconds: those of the last ones wait."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    tracing.start(worker="cpu0@here")
    (job,) = host.submit()
    host.runner().run_attempt(job.id)
    assert "attempt" not in {span.name for _, span in collector.spans()}
    signals.worker_process_shutdown.send(sender="cpu0@here", pid=0, exitcode=0)
    assert "attempt" in {span.name for _, span in collector.spans()}


def test_a_collector_that_does_not_answer_holds_up_no_end(host, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and that is all
        port = silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(tracing, "LAST_SPANS_SECONDS", 0.2)
        tracing.start(worker="cpu0@here")
        with tracing.job("attempt", batch_id="b", job_id=1):
            pass
        began = time.monotonic()
        tracing.end()
        assert time.monotonic() - began < 5  # the exporter alone would wait for ten
