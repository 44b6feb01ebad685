"""What tests of the command line and of the checks begin with."""

from collections.abc import Iterator

import pytest

from jobs import database, migrate, settings


@pytest.fixture
def no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at the broker's address."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")


@pytest.fixture
def db() -> Iterator[database.Database]:
    """The database of the settings, with its tables."""
    opened = database.connect(settings.load())
    migrate.upgrade(opened)
    yield opened
    opened.close()
