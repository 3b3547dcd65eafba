from pathlib import Path

from capstan.hardware.processor import UNTOLD_CACHE_BYTES, last_level_cache_bytes, processor_name

MIB = 2**20


def cache(root: Path, core: int, shared: str, size: str) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cache/index3"
    folder.mkdir(parents=True)
    (folder / "shared_cpu_list").write_text(f"{shared}\n")
    (folder / "size").write_text(f"{size}\n")


def test_a_cache_that_cores_share_is_counted_once(tmp_path: Path) -> None:
    cache(tmp_path, 0, "0-1", "32768K")
    cache(tmp_path, 1, "0-1", "32768K")
    cache(tmp_path, 2, "2-3", "16M")
    assert last_level_cache_bytes(tmp_path) == 48 * MIB


def test_a_system_that_tells_no_cache_is_assumed_to_have_a_large_one(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) == UNTOLD_CACHE_BYTES
    cache(tmp_path, 0, "0", "")
    assert last_level_cache_bytes(tmp_path) == UNTOLD_CACHE_BYTES


def test_the_first_model_name_is_the_processor(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name : Fast One\nmodel name : Other\n")
    assert processor_name(tmp_path) == "Fast One"
