"""`jobs` reaches what stands above it by one list of names, and each of them is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import parts

JOBS = Path(parts.__file__).parent


@pytest.mark.parametrize("part", parts.ALL, ids=lambda part: f"{part.module}.{part.name}")
def test_every_part_is_there(part):
    assert callable(part.load())


def test_every_part_is_in_the_list():
    assert set(parts.ALL) == {each for each in vars(parts).values() if type(each) is parts.Part}


def test_no_other_module_reaches_for_them():
    reaches = re.compile(r"""import_module\(|__import__|["'](worker|models)\.(?!log\b)[a-z]""")
    found = {
        path.relative_to(JOBS).as_posix()
        for path in JOBS.rglob("*.py")
        if reaches.search(path.read_text())
    }
    # root: each command of its own when called; safety: a user's own module
    assert found == {"parts.py", "cli/root.py", "safety.py"}


def test_parts_without_torch_load_none():
    names = [(part.module, part.name) for part in parts.ALL if not part.loads_torch]
    script = f"""
import sys
from jobs import parts
for module, name in {names!r}:
    parts.Part(module, name).load()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
