"""With traces asked for, every attempt at a job and its upload are spans of one trace."""

import pytest

from jobs import lifecycle
from worker import scratch, simulation, tracing

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
    assert inside == {"load", "text", "denoise", "decode", "mux"}
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
