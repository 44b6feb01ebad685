"""The Celery app: messages carry ids, the database decides. Reasons in docs/decisions.md."""

from typing import Any

from celery import Celery

from jobs import settings

RENDER_TASK = "rushes.render"
PUBLISH_TASK = "rushes.publish"
CONTROL = "rushes"
PIDBOX = f"{CONTROL}.pidbox"
UNACKED_KEYS = {
    "unacked_key": "rushes.unacked",
    "unacked_index_key": "rushes.unacked_index",
    "unacked_mutex_key": "rushes.unacked_mutex",
}
"""Not Celery's own names, as of `CONTROL`: with those another app in the same Redis ends our
workers, and ours send its messages a second time."""
BROKER_CONNECT_SECONDS = 5.0
BROKER_ANSWER_SECONDS = 30.0  # longer than Redis's own blocking wait of kombu, 1 s


def make(config: settings.Settings, *, answer_seconds: float = BROKER_ANSWER_SECONDS) -> Celery:
    """An app on this broker. Makes no connection yet."""
    url = config.broker_url.get_secret_value()
    app = Celery("rushes", broker=url, set_as_current=False)
    # These two count before CELERY_BROKER_URL as it stands in the environment, `broker` does not.
    app.conf.update(values(answer_seconds), broker_read_url=url, broker_write_url=url)
    return app


def values(answer_seconds: float) -> dict[str, Any]:
    """Celery's settings, the same for those who send and, but for their patience, who work."""
    is_sender = answer_seconds < BROKER_ANSWER_SECONDS  # tries again by itself, a little later
    return {
        # The claim in the database is the acknowledgement: a message may be lost or doubled.
        "task_acks_late": False,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_default_queue": "rushes.unused",
        "control_exchange": CONTROL,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        # A fresh interpreter per child: CUDA does not survive a fork.
        "worker_pool_start_method": "spawn",
        "worker_proc_alive_timeout": 120.0,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_hijack_root_logger": False,
        "worker_send_task_events": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            **UNACKED_KEYS,
            "socket_connect_timeout": min(BROKER_CONNECT_SECONDS, answer_seconds),
            "socket_timeout": answer_seconds,
            "socket_keepalive": True,
            "health_check_interval": 25,
            **({"max_retries": 0} if is_sender else {"retry_on_timeout": True}),
        },
    }
