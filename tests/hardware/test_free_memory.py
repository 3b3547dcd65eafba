from pathlib import Path

from capstan.hardware.free_memory import free_host_memory, usable_cores

GIB = 2**30


def system(root: Path, groups: str, files: dict[str, str], available_kb: int = 8 * 2**20) -> Path:
    """A root folder with the files that the kernel would show."""
    files = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available_kb} kB\n",
        "proc/self/cgroup": groups,
        **files,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_limit_the_available_memory_counts(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.max": "max\n"})
    assert free_host_memory(root) == (8 * GIB, None)


def test_a_version_2_limit_counts_and_idle_file_cache_is_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/job/inner"
    files = {
        f"{group}/memory.max": f"{4 * GIB}\n",
        f"{group}/memory.current": f"{3 * GIB}\n",
        f"{group}/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 5\n",
    }
    free = free_host_memory(system(tmp_path, "0::/job/inner\n", files))
    assert free.value == 2 * GIB
    assert free.note is not None
    assert "leaves 2.00 GiB" in free.note
    assert "8.00 GiB available" in free.note


def test_a_limit_of_an_outer_group_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/job/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/job/memory.current": "0\n",
        "sys/fs/cgroup/job/inner/memory.max": "max\n",
    }
    assert free_host_memory(system(tmp_path, "0::/job/inner\n", files)).value == GIB


def test_a_version_1_limit_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/box"
    files = {
        f"{group}/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{group}/memory.usage_in_bytes": f"{GIB}\n",
        f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n",
    }
    free = free_host_memory(system(tmp_path, "9:cpu,cpuacct:/\n4:memory:/box\n0::/\n", files))
    assert free.value == 3 * GIB // 2


def test_inside_a_container_the_limit_lies_at_the_top_of_the_mount(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    assert free_host_memory(system(tmp_path, "4:memory:/docker/0123\n", files)).value == GIB


def test_the_number_that_version_1_writes_for_no_limit_is_no_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert free_host_memory(system(tmp_path, "4:memory:/\n", files)) == (8 * GIB, None)


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "10\n", "sys/fs/cgroup/memory.current": "20\n"}
    assert free_host_memory(system(tmp_path, "0::/\n", files)).value == 0


def test_a_system_without_these_files_still_has_an_answer(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path).value > 0
    assert usable_cores(tmp_path).value >= 1


def test_a_cpu_quota_below_the_visible_cores_counts_rounded_up(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"})
    cores = usable_cores(root)
    assert cores.value == 1
    assert cores.note is not None
    assert "0.5 cores" in cores.note


def test_a_version_1_cpu_quota_counts_and_minus_one_is_none(tmp_path: Path) -> None:
    period = {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    limited = system(tmp_path / "a", "1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "25000\n", **period})
    free = system(tmp_path / "b", "1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", **period})
    assert usable_cores(limited).note is not None
    assert usable_cores(free).note is None
