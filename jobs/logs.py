"""Where log lines go and how they look: one set-up for every process of ours."""

import logging
import sys

import structlog
from structlog.typing import Processor

from jobs import settings

NOISY = (
    "alembic",
    "amqp",
    "billiard",
    "boto3",
    "botocore",
    "celery",
    "kombu",
    "s3transfer",
    "urllib3",
)


def configure(config: settings.Settings, *, level: str | None = None) -> None:
    """Event name and fields to stderr, as JSON lines or text; libraries from WARNING on."""
    wanted = level or config.log_level
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(wanted)),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(config),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if not isinstance(h, StderrHandler)] + [handler]
    root.setLevel(wanted)
    for name in NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class StderrHandler(logging.Handler):
    """Writes to what stderr is at that moment, and is found again by the next `configure`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # as every handler of `logging`: a log line never stops the work
            self.handleError(record)


def _renderers(config: settings.Settings) -> list[Processor]:
    is_text = config.log_format == "text" or (config.log_format == "auto" and sys.stderr.isatty())
    if is_text:
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
