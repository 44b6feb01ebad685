"""One notice to one listener: a signed webhook, or a message through apprise."""

import hashlib
import http.client
import json
import logging
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import standardwebhooks

from jobs import listeners, outside

TOTAL_SECONDS = 20.0
CONNECT_SECONDS = 5.0
READ_SECONDS = 15.0
GONE = 410


@dataclass(frozen=True, kw_only=True)
class Letter:
    """What is sent, and where to."""

    url: str
    secret: str | None
    message_id: str
    body: dict[str, Any]
    taken: frozenset[str] = frozenset()
    """Recipients of the address that have it already; see `PartlyDelivered`."""


class NotDelivered(Exception):
    """Not this time; the message holds no secret."""


class PartlyDelivered(NotDelivered):
    """Some recipients of an address lack it yet; `taken` tells who has it, of all tries."""

    def __init__(self, reason: str, *, taken: frozenset[str]) -> None:
        self.taken = taken
        super().__init__(reason)


class Gone(NotDelivered):
    """The receiver wants nothing more, ever."""


@dataclass(frozen=True, kw_only=True)
class Courier:
    """Delivers letters; holds no state."""

    internal_hosts: frozenset[str] = frozenset()
    """Hosts of our own network that may be told, also by http."""
    network: outside.Network = outside.INTERNET

    def deliver(self, letter: Letter) -> None:
        """NotDelivered says why not."""
        if letter.secret is None:
            _by_apprise(letter)
        else:
            self._by_webhook(letter, letter.secret)

    def _by_webhook(self, letter: Letter, secret: str) -> None:
        deadline = time.monotonic() + TOTAL_SECONDS
        try:
            place = outside.Place.of(letter.url)
        except outside.Refused as error:
            raise NotDelivered(str(error)) from None
        try:
            network = self._network_for(place)
            connection = outside.Connection(
                place,
                outside.addresses(place, deadline=deadline, network=network),
                tls=network.tls() if place.is_encrypted else None,
                connect_seconds=CONNECT_SECONDS,
                read_seconds=READ_SECONDS,
            )
        except outside.Refused as error:
            raise NotDelivered(f"{error}, and not in RUSHES_NOTIFY_INTERNAL_HOSTS") from None
        except outside.Unreachable as error:
            raise NotDelivered(str(error)) from None
        payload = json.dumps(letter.body, separators=(",", ":")).encode()
        headers = signed(letter.message_id, payload, secret=secret)
        with connection.until(deadline):
            try:
                connection.request("POST", place.target, body=payload, headers=headers)
                status = connection.getresponse().status  # the body says nothing that we need
            except (OSError, http.client.HTTPException) as error:
                raise NotDelivered(outside.reason(error)) from None
        if status == GONE:
            raise Gone("the receiver answered 410: it wants no more notices")
        if not 200 <= status < 300:
            raise NotDelivered(f"the receiver answered {status}")

    def _network_for(self, place: outside.Place) -> outside.Network:
        if place.host in self.internal_hosts:
            return replace(self.network, is_allowed=lambda _address: True)
        if not place.is_encrypted:
            raise outside.Refused(f"{place.host} is asked without encryption")
        return self.network


def signed(message_id: str, payload: bytes, *, secret: str) -> dict[str, str]:
    """The headers of Standard Webhooks, with the time of this try."""
    now = datetime.now(UTC)
    signature = standardwebhooks.Webhook(secret).sign(message_id, now, payload.decode())
    return {
        "Content-Type": "application/json",
        "User-Agent": "rushes",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }


def _by_apprise(letter: Letter) -> None:
    try:
        import apprise
    except ImportError:
        raise NotDelivered("the library apprise is not installed here") from None
    # It logs addresses, which hold passwords.
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
    service = apprise.Apprise()
    if not service.add(letter.url):
        raise NotDelivered("apprise does not know this address")
    title, text = sentence(letter.body)
    taken = set(letter.taken)
    are_told = [
        _is_told(plugin, position, taken, title=title, text=text)
        for position, plugin in enumerate(service)
    ]
    if not all(are_told):
        some = "all of " if taken else ""
        raise PartlyDelivered(
            f"apprise could not send to {some}{listeners.shown(letter.url)}",
            taken=frozenset(taken),
        )


def _is_told(plugin: Any, position: int, taken: set[str], *, title: str, text: str) -> bool:
    """Whether all recipients of this part of an address have it now. `taken` grows by who has."""
    import apprise

    def name(recipient: object) -> str:
        return hashlib.sha256(f"{position} {recipient!r}".encode()).hexdigest()[:16]

    everybody = name("")
    if everybody in taken:
        return True
    if plugin.overflow_mode != apprise.OverflowMode.SPLIT:
        # Asked and told by apprise's plugins for each recipient; by itself it remembers one call
        # long. A text that is sent in pieces has them several times, and is always sent whole.
        plugin.is_delivered = lambda key, per_message=False: name(key) in taken  # noqa: ARG005
        plugin.mark_delivered = lambda key, per_message=False: taken.add(name(key))  # noqa: ARG005
    alone = apprise.Apprise()
    alone.add(plugin)
    if not alone.notify(title=title, body=text):
        return False
    taken.add(everybody)
    return True


def sentence(body: dict[str, Any]) -> tuple[str, str]:
    """Title and text, for people."""
    data = body["data"]
    if "counts" in data:
        counts = data["counts"]
        name = f"{data['batch_id']} ({data['name']})" if data["name"] else data["batch_id"]
        title = f"rushes: batch {name} {data['state'].replace('_', ' ')}"
        told = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        return title, told
    if "schedule" in data:
        return f"rushes: schedule {data['schedule']} failed", str(data["reason"])
    return "rushes: test", "This is what a notice looks like."
