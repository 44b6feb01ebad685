"""Prompts become jobs whole or not at all, on both databases."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from jobs import bulk, database, errors, looks, queues, schema, submission
from jobs.schema import Batch, Job
from tests.integration.jobs.conftest import PRESET, World, prompt_file


def rows_of(world: World) -> int:
    with world.db.reading() as session:
        return sum(
            session.scalar(select(func.count()).select_from(table)) or 0 for table in (Batch, Job)
        )


def test_each_job_is_stored_as_its_line_says(world: World) -> None:
    rows = [
        {"prompt": "a kite", "custom_id": "k", "seed": 2**63 - 1, "metadata": {"shot": "1"}},
        {"prompt": "día 日 🎬", "priority": 7, "width": 32, "height": 48},
    ]
    batch_id = world.submit(rows, name="rushes of the day", priority=-3)
    batch = world.batch(batch_id)
    assert (batch.name, batch.preset, batch.total, batch.queued) == (
        "rushes of the day",
        "tiny",
        2,
        2,
    )
    first, second = world.jobs(batch_id)
    assert (first.position, first.custom_id, first.seed) == (0, "k", 2**63 - 1)
    assert (first.meta, first.rank) == ({"shot": "1"}, 3)
    assert (second.prompt, second.rank, second.custom_id) == ("día 日 🎬", -7, None)
    assert first.queue == queues.of_model("tiny")
    with world.db.reading() as session:
        look = session.get_one(schema.Look, second.look_id)
    assert (look.body["width"], look.body["height"]) == (32, 48)
    assert looks.Look.model_validate(look.body).id == look.id
    world.check()


BAD = b"""{"prompt": "good"}
{"prompt": "bad", "width": 33}
not json
{"prompt": "good too", "custom_id": "a"}
{"prompt": "again", "custom_id": "a"}
{"prompt": "nul \\u0000"}
{"prompt": "half \\ud800"}
{"prompt": "image", "image": "https://example.org/a.png"}
{"prompt": "meta", "metadata": {"k": "\\u0000"}}
"""


def test_one_bad_line_stores_nothing_and_every_bad_line_is_told(world: World) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        submission.submit(world.db, prompt_file(BAD))
    assert [problem.line for problem in caught.value.problems] == [2, 3, 5, 6, 7, 8, 9]
    assert rows_of(world) == 0


def test_bad_lines_can_be_left_out(world: World) -> None:
    done = submission.submit(world.db, prompt_file(BAD, skip_invalid=True))
    assert [job.prompt for job in world.jobs(done.batch_id)] == ["good", "good too"]
    assert [problem.line for problem in done.plan.skipped] == [2, 3, 5, 6, 7, 8, 9]
    world.check()


def test_a_doubled_custom_id_names_both_lines(world: World) -> None:
    with pytest.raises(errors.InvalidInput, match=r'line 5: custom_id "a" is already on line 4'):
        submission.submit(world.db, prompt_file(BAD.replace(b"width", b"priority")))


def test_a_file_without_prompts_is_refused_even_when_bad_lines_are_left_out(world: World) -> None:
    for data in (b"", b"\n\n", b"not json\n"):
        with pytest.raises(errors.InvalidInput) as caught:
            submission.submit(world.db, prompt_file(data, skip_invalid=True))
        assert caught.value.problems, data
    assert rows_of(world) == 0


def test_after_the_bad_lines_that_are_told_a_file_is_not_read_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submission, "MAX_PROBLEMS", 2)
    file = prompt_file(BAD)
    read: list[int] = []
    file.fill = lambda row: (read.append(row.line), row)[1]
    with pytest.raises(errors.InvalidInput) as caught:
        submission.plan(file)
    assert [problem.line for problem in caught.value.problems] == [2, 3, None]
    assert "reading stopped after 2 bad lines" in caught.value.problems[-1].message
    assert read == [1, 2, 4, 5]


def test_more_bad_lines_than_are_told_are_counted_where_they_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submission, "MAX_PROBLEMS", 2)
    checked = submission.plan(prompt_file(BAD, skip_invalid=True))
    assert (checked.prompts, checked.num_skipped) == (2, 7)
    assert "5 more bad lines" in checked.skipped[-1].message


# Seeds and repetitions.


def test_a_repeated_prompt_counts_its_seed_on(world: World) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "custom_id": "x", "seed": 7}, {"prompt": "b"}]
    jobs = world.jobs(world.submit(rows, repeat=3))
    assert [job.custom_id for job in jobs] == ["x", "x#2", "x#3", None, None, None]
    assert [job.seed for job in jobs[:3]] == [7, 8, 9]
    assert len({job.seed for job in jobs[3:]}) == 3
    world.check()


def test_a_seed_counted_past_the_widest_begins_at_0(world: World) -> None:
    jobs = world.jobs(world.submit([{"prompt": "a", "seed": 2**63 - 1}], repeat=2))
    assert [job.seed for job in jobs] == [2**63 - 1, 0]


def test_a_custom_id_that_looks_like_a_repetition_is_refused_with_repeat(world: World) -> None:
    rows = [{"prompt": "a", "custom_id": "x#2"}]
    assert world.submit(rows)
    with pytest.raises(errors.InvalidInput, match="repeat"):
        world.submit(rows, repeat=2)


def test_a_drawn_seed_stays_with_its_job(world: World) -> None:
    job = world.only_job(world.submit())
    claims = []
    for _ in range(2):
        claim = world.claim(job.id)
        assert claim is not None
        claims.append(claim.spec)
        world.release(claim.attempt_id)
    assert claims[0] == claims[1]
    assert 0 <= claims[0].seed < 2**32
    others = {other.seed for other in world.jobs(world.submit(50))}
    assert len(others) > 45


# Idempotency.


def test_the_same_key_and_content_is_the_same_batch(world: World) -> None:
    first = submission.submit(world.db, prompt_file([{"prompt": "a"}], idempotency_key="k"))
    second = submission.submit(world.db, prompt_file([{"prompt": "a"}], idempotency_key="k"))
    assert (first.is_new, second.is_new) == (True, False)
    assert (second.batch_id, second.jobs) == (first.batch_id, 1)
    assert rows_of(world) == 2


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"prompt": "b"}], {}),
        ([{"prompt": "a"}], {"priority": 1}),
        ([{"prompt": "a"}], {"repeat": 2}),
        ([{"prompt": "a"}], {"name": "other"}),
        (
            [{"prompt": "a"}],
            {"preset": replace(PRESET, look=PRESET.look.model_copy(update={"fps": 9}))},
        ),
    ],
)
def test_the_same_key_and_other_content_is_refused(
    world: World, rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    first = world.submit([{"prompt": "a"}], idempotency_key="k")
    with pytest.raises(errors.IdempotencyConflict, match=first):
        world.submit(rows, idempotency_key="k", **options)
    assert rows_of(world) == 2


def test_without_a_key_the_same_file_is_another_batch(world: World) -> None:
    assert world.submit([{"prompt": "a"}]) != world.submit([{"prompt": "a"}])


# All or nothing.


class Changing(io.BytesIO):
    """A file that somebody saves again just before it is read for the nth time."""

    def __init__(self, first: bytes, then: bytes, *, reading: int) -> None:
        super().__init__(first)
        self._then = then
        self._reading = reading
        self.reads_from_start = 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.reads_from_start += offset == 0 and whence == 0
        if self.reads_from_start == self._reading:
            super().seek(0)
            self.truncate()
            self.write(self._then)
        return super().seek(offset, whence)


@pytest.mark.parametrize("reading", [2, 3], ids=["before the rows", "after the rows"])
@pytest.mark.parametrize(
    "then",
    [b'{"prompt": "c"}\n', b'{"prompt": "a"}\n{"prompt": "b"}\n'],
    ids=["same length", "longer"],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    sqlite_world: World, then: bytes, reading: int
) -> None:
    file = prompt_file([])
    file.stream = Changing(b'{"prompt": "a"}\n', then, reading=reading)
    with pytest.raises(errors.InvalidInput, match="changed while it was read"):
        submission.submit(sqlite_world.db, file)
    assert rows_of(sqlite_world) == 0


def test_a_crash_in_the_middle_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"prompt {number}"} for number in range(3 * bulk.ROWS_AT_ONCE)]
    jobs = submission._jobs

    def crash_later(*arguments: Any) -> Iterator[tuple[Any, ...]]:
        yield from itertools.islice(jobs(*arguments), 2 * bulk.ROWS_AT_ONCE + 1)
        raise MemoryError

    monkeypatch.setattr(submission, "_jobs", crash_later)
    with pytest.raises(MemoryError):
        world.submit(rows)
    monkeypatch.setattr(submission, "_jobs", jobs)
    assert rows_of(world) == 0
    assert world.submit(rows[:1])


def test_a_killed_submit_leaves_nothing(world: World, database_url: str) -> None:
    script = """
import io, os, sys
from jobs import database, presets, submission
jobs = submission._jobs
def deadly(*arguments):
    for row in jobs(*arguments):
        if row[1] == 7_000:
            os._exit(9)
        yield row
submission._jobs = deadly
data = b"".join(b'{"prompt": "prompt %d"}\\n' % n for n in range(10_000))
options = submission.Options(preset=presets.load(sys.argv[2]))
file = submission.PromptFile(io.BytesIO(data), "x", "jsonl", options)
submission.submit(database.Database(sys.argv[1]), file)
"""
    done = subprocess.run([sys.executable, "-c", script, database_url, str(PRESET.path)])
    assert done.returncode == 9
    assert rows_of(world) == 0
    assert world.submit(2)


def test_what_copy_would_take_for_a_sign_arrives_as_it_was(world: World) -> None:
    """Tabs, line ends, backslashes, what stands for NULL and for the end of a COPY."""
    texts = ["a\tb", "a\nb", "a\r\nb", "back\\slash", "\\N", "\\.", "x\n\\.\ny", "日\u2028\x7f\x01"]
    rows = [
        {"prompt": text, "negative_prompt": text, "metadata": {text: text}, "seed": 2**63 - 1}
        for text in texts
    ]
    jobs = world.jobs(world.submit(rows))
    assert [job.prompt for job in jobs] == texts
    assert [job.negative_prompt for job in jobs] == texts
    assert [job.meta for job in jobs] == [{text: text} for text in texts]
    assert {job.seed for job in jobs} == {2**63 - 1}
    assert world.jobs(world.submit(1))[0].meta is None
    world.check()


@pytest.mark.parametrize("number", [3, 4, 5, 8])
def test_rows_are_copied_in_pieces_none_missing_and_none_twice(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(bulk, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(bulk, "COPIED_AT_ONCE", 4)
    jobs = postgres_world.jobs(postgres_world.submit(number))
    assert [(job.position, job.prompt) for job in jobs] == [
        (position, f"prompt {position}") for position in range(number)
    ]


def test_a_connection_that_breaks_while_jobs_are_stored_is_an_outage_of_the_database(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = postgres_world
    jobs = submission._jobs

    def broken(*arguments: Any) -> Iterator[tuple[Any, ...]]:
        for row in jobs(*arguments):
            if row[1] == bulk.ROWS_AT_ONCE:
                with world.db.transaction() as session:
                    session.execute(
                        text(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                            "datname = current_database() AND pid <> pg_backend_pid()"
                        )
                    )
            yield row

    monkeypatch.setattr(submission, "_jobs", broken)
    with pytest.raises(DBAPIError):
        world.submit(10 * bulk.ROWS_AT_ONCE)
    monkeypatch.setattr(submission, "_jobs", jobs)
    assert rows_of(world) == 0
    assert world.submit(2)


# A COMMIT without an answer.


Broken = Callable[..., Callable[..., None]]


@pytest.fixture
def breaking(world: World, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Given to a submit: the connection breaks at its COMMIT, before or after the server had it."""
    monkeypatch.setattr(submission, "LOOK_AGAIN_SECONDS", (0.0, 0.0))
    dialect = world.db.engine.dialect
    commit, error = dialect.do_commit, dialect.loaded_dbapi.OperationalError

    def make(*, is_committed: bool) -> Callable[..., None]:
        def broken(connection: Any) -> None:
            monkeypatch.setattr(dialect, "do_commit", commit)
            (commit if is_committed else dialect.do_rollback)(connection)
            raise error("server closed the connection unexpectedly")

        return lambda *_: monkeypatch.setattr(dialect, "do_commit", broken)

    return make


def test_a_submit_whose_answer_was_lost_is_looked_for(
    world: World, breaking: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again where the database is not back yet."""
    reading, looks = database.Database.reading, iter([True])

    def once_away(db: database.Database) -> Any:
        if next(looks, False):
            raise OperationalError("SELECT", {}, Exception("the database system is starting up"))
        return reading(db)

    monkeypatch.setattr(database.Database, "reading", once_away)
    given = prompt_file([{"prompt": "a cat"}, {"prompt": "a dog"}])
    made = submission.submit(world.db, given, beside=breaking(is_committed=True))
    assert (made.is_new, made.jobs, next(looks, None)) == (True, 2, None)
    assert len(world.jobs(made.batch_id)) == 2
    assert rows_of(world) == 3


def test_a_submit_whose_commit_never_arrived_fails_and_left_nothing(
    world: World, breaking: Broken
) -> None:
    with pytest.raises(OperationalError, match="server closed"):
        submission.submit(
            world.db, prompt_file([{"prompt": "a cat"}]), beside=breaking(is_committed=False)
        )
    assert rows_of(world) == 0


def test_a_submit_of_which_nothing_is_known_names_its_batch(
    world: World, breaking: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    lose = breaking(is_committed=True)

    def away(_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("connection refused"))

    def lost(_: object, batch_id: str) -> None:
        ids.append(batch_id)
        lose()
        monkeypatch.setattr(database.Database, "reading", away)

    with pytest.raises(submission.AnswerLost, match="rushes show") as error:
        submission.submit(world.db, prompt_file([{"prompt": "a cat"}]), beside=lost)
    assert [error.value.batch_id] == ids


def test_a_commit_that_the_server_is_still_at_is_no_failure(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it waits for a standby: the batch may be there in a moment."""
    world = postgres_world
    monkeypatch.setattr(submission, "LOOK_AGAIN_SECONDS", (0.0,))
    with world.db.transaction() as other:
        under_way = submission._transaction(other)
        with pytest.raises(submission.AnswerLost):
            submission._is_stored(world.db, "batch", under_way)
    assert not submission._is_stored(world.db, "batch", under_way)


# Looks.


def test_a_look_that_is_there_already_is_shared(world: World) -> None:
    first = world.only_job(world.submit())
    second = world.only_job(world.submit())
    assert first.look_id == second.look_id
    with world.db.reading() as session:
        assert session.scalar(select(func.count()).select_from(schema.Look)) == 1


def test_the_looks_of_a_file_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "MAX_LOOKS", 3)
    rows = [{"prompt": "a", "width": 16 * number} for number in (1, 2, 3, 2, 4, 1, 5)]
    with pytest.raises(errors.InvalidInput) as caught:
        world.submit(rows)
    assert [problem.line for problem in caught.value.problems] == [5, 7]
    batch_id = world.submit(rows, skip_invalid=True)
    assert len(world.jobs(batch_id)) == 5
    world.check()


def test_spellings_of_looks_are_not_remembered_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submission, "MAX_REMEMBERED", 10)
    rows = [{"prompt": "a", "seconds": 1 + number / 10_000} for number in range(200)]
    file = prompt_file(rows)
    plan = submission.plan(file)
    assert plan.jobs == 200
    assert len(plan.looks) == 1
    assert len(file._remembered) <= 10


def test_editing_a_preset_changes_no_queued_job(world: World) -> None:
    job = world.only_job(world.submit())
    edited = replace(PRESET, look=PRESET.look.model_copy(update={"sample_shift": 3.0}))
    world.submit(preset=edited)
    claim = world.claim(job.id)
    assert claim is not None
    assert claim.spec.look == PRESET.look


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 101}, "priority must be -100 to 100, got 101"),
        ({"priority": -101}, "priority"),
        ({"repeat": 0}, "repeat must be 1 to 10,000, got 0"),
        ({"repeat": 10_001}, "repeat"),
        ({"name": ""}, "name must be 1 to 200 characters on one line"),
        ({"name": "x" * 201}, "name"),
        ({"name": "\u200b\u2060"}, "name must have a character that can be seen"),
        ({"name": "two\nlines"}, "name"),
        ({"name": "nul\0"}, "name"),
        ({"name": "half \udcff"}, "one line, and it was not read as UTF-8: set LC_ALL=C.UTF-8"),
        ({"idempotency_key": "x" * 201}, "idempotency key"),
        ({"idempotency_key": "\0"}, "idempotency key"),
    ],
)
def test_an_option_out_of_bounds_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidInput, match=message):
        submission.plan(prompt_file([{"prompt": "a"}], **options))


def test_the_longest_options_fit_the_tables(world: World) -> None:
    batch_id = world.submit(
        [{"prompt": "p" * 10_000, "custom_id": "ü" * 512, "seed": 1}],
        name="ñ" * 200,
        idempotency_key="日" * 200,
        repeat=2,
        priority=100,
    )
    assert [len(job.custom_id or "") for job in world.jobs(batch_id)] == [512, 514]


def test_a_negative_prompt_is_kept_and_its_lack_of_effect_told(world: World) -> None:
    rows = [{"prompt": "a", "negative_prompt": "blurry"}]
    done = submission.submit(world.db, prompt_file(rows))
    assert world.only_job(done.batch_id).negative_prompt == "blurry"
    assert "1 prompts" in done.plan.notes[0]


def test_batch_ids_begin_with_the_databases_day(world: World) -> None:
    batch = world.batch(world.submit())
    assert batch.id.startswith(f"{batch.created_at:%y%m%d}-")
    assert len(batch.id) == 15


MEMORY = """
import io, json, resource, sys
from jobs import database, presets, submission
def submit(rows):
    data = io.BytesIO()
    for n in range(rows):
        line = json.dumps({"prompt": f"prompt {n} " * 8, "custom_id": f"c{n}"})
        data.write(line.encode() + b"\\n")
    options = submission.Options(preset=presets.load(sys.argv[2]))
    file = submission.PromptFile(data, "x", "jsonl", options)
    submission.submit(database.Database(sys.argv[1]), file)
    return data.tell()
submit(5_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file_bytes = submit(50_000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(after - before) * 1024, file_bytes]))
"""


def test_a_long_file_needs_no_memory_beyond_its_own_bytes(world: World, database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, database_url, str(PRESET.path)],
        check=True,
        capture_output=True,
        text=True,
    )
    grown, file_bytes = json.loads(done.stdout)
    # The test holds the file in memory; SQLite's page caches are 16 MB at most.
    assert grown - file_bytes < 24_000_000
    with world.db.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 55_000
