"""OpenTelemetry spans, one trace per job. Off unless RUSHES_TRACES asks for them.

The trace's id comes from the job, so that its attempts, and the publisher on the same host, write
into one trace without a word to each other. Where spans go is said by OpenTelemetry's own variables
(OTEL_EXPORTER_OTLP_ENDPOINT and so on).
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs import errors

LAST_SPANS_SECONDS = 5.0  # a collector that does not answer may not hold up a stop for longer

_tracer: Any = None  # of this process; None: off
_provider: Any = None


def start(*, worker: str) -> None:
    """From this process, which must not fork afterwards. InvalidInput without the library."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        message = "RUSHES_TRACES needs OpenTelemetry: pip install 'rushes[traces]'"
        raise errors.InvalidInput(
            "settings", [errors.Problem(line=None, message=message)]
        ) from None
    begin(BatchSpanProcessor(OTLPSpanExporter()), worker=worker)


def begin(processor: Any, *, worker: str) -> None:
    """Give spans to this processor."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    global _tracer, _provider
    names = {"service.name": "rushes", "service.instance.id": worker}
    _provider = TracerProvider(resource=Resource.create(names))
    _provider.add_span_processor(processor)
    _tracer = _provider.get_tracer("rushes")


def end() -> None:
    """Send what is not sent yet, and off again. Takes LAST_SPANS_SECONDS at most."""
    global _tracer, _provider
    if _provider is not None:
        last = threading.Thread(target=_provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(LAST_SPANS_SECONDS)
    _tracer = _provider = None


@contextmanager
def job(name: str, *, batch_id: str, job_id: int, **facts: str | int) -> Iterator[None]:
    """A span of this job's trace."""
    if _tracer is None:
        yield
        return
    from opentelemetry import trace

    digest = hashlib.sha256(f"{batch_id}/{job_id}".encode()).digest()
    root = trace.SpanContext(
        trace_id=int.from_bytes(digest[:16]),
        span_id=int.from_bytes(digest[16:24]),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    attributes = {"rushes.batch_id": batch_id, "rushes.job_id": job_id} | {
        f"rushes.{key}": value for key, value in facts.items()
    }
    context = trace.set_span_in_context(trace.NonRecordingSpan(root))
    with _tracer.start_as_current_span(name, context=context, attributes=attributes):
        yield


def stage(name: str) -> contextlib.AbstractContextManager[Any]:
    """A span inside that of the attempt."""
    if _tracer is None:
        return contextlib.nullcontext()
    span: contextlib.AbstractContextManager[Any] = _tracer.start_as_current_span(name)
    return span
