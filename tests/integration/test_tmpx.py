import psycopg, sqlalchemy, os, time
from jobs import settings, storage
def test_a(database_url):
    e=sqlalchemy.create_engine(database_url)
    with e.connect() as c: print(c.execute(sqlalchemy.text("select 1")).scalar(), database_url)
    e.dispose()
def test_b(postgres_database_url): assert "psycopg" in postgres_database_url
def test_c(clean_redis_url, s3):
    s=storage.open_store(settings.Settings(**s3)); s.check(); assert list(s.list())==[]
    s.put_bytes(b"x","a/b",content_type="t/p")
