"""Main memory is what the machine has and what the control groups leave of it."""

import psutil
import pytest

from worker import host_memory

MIB = 1 << 20
FREE = psutil.virtual_memory().available


@pytest.fixture
def machine(tmp_path):
    """`machine(cgroup, {path: content})`: a root with the files that Linux shows a process."""

    def make(cgroup, files):
        for path, content in {"proc/self/cgroup": cgroup, **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
        return tmp_path

    return make


def v2(folder, *, limit, used=30 * MIB, cached=10 * MIB):
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {
        f"{at}/memory.max": f"{limit}\n",
        f"{at}/memory.current": f"{used}\n",
        f"{at}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


def v1(folder, *, limit, used=30 * MIB, cached=10 * MIB):
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n",
        f"{at}/memory.usage_in_bytes": f"{used}\n",
        f"{at}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cached}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/jobs/one\n", v2("jobs/one", limit=100 * MIB)),
        ("0::/jobs/one\n", v2("jobs/one", limit="max") | v2("jobs", limit=100 * MIB)),
        ("0::/\n", v2("", limit=100 * MIB)),
        ("0::/of/the/machine\n", v2("", limit=100 * MIB)),  # seen from inside a container
        ("4:memory:/docker/1f\n0::/\n", v1("docker/1f", limit=100 * MIB)),
        ("4:cpu,memory:/docker/1f\n", v1("", limit=100 * MIB)),
    ],
    ids=["v2", "v2 above", "v2 root", "v2 inside", "v1", "v1 inside"],
)
def test_the_limit_of_a_container_counts_and_its_file_cache_is_free(machine, cgroup, files):
    now = host_memory.now(root=machine(cgroup, files))
    assert now.total_bytes == 100 * MIB
    assert now.free_bytes == 80 * MIB


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("", {}),
        ("0::/jobs/one\n", v2("jobs/one", limit="max")),
        ("4:memory:/\n", v1("", limit=0x7FFFFFFFFFFFF000)),  # how version 1 says "none"
        ("4:cpu:/jobs\nnonsense\n", v1("jobs", limit=100 * MIB)),
    ],
    ids=["no groups", "v2", "v1", "other controllers"],
)
def test_without_a_limit_it_is_the_machines(machine, cgroup, files):
    now = host_memory.now(root=machine(cgroup, files))
    assert now.total_bytes == psutil.virtual_memory().total
    assert now.free_bytes == pytest.approx(FREE, rel=0.5)


def test_a_group_beyond_its_limit_has_nothing_free(machine):
    root = machine("0::/\n", v2("", limit=100 * MIB, used=120 * MIB, cached=0))
    assert host_memory.now(root=root).free_bytes == 0
