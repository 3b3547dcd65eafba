"""Host memory that lies together: large pages, where the system has them.

Memory of ordinary pages is scattered over the machine 4 KiB at a time, which makes a disk's request many
small ones and the preparing of large memory slow.
"""

import ctypes
import mmap

HUGE_PAGE_BYTES = 2 << 20


def prefer_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for huge pages; where there are none, ordinary ones do."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        try:
            mapping.madvise(advice)
        except OSError:  # a kernel without them
            return


def huge_page_memory(size_bytes: int) -> memoryview:
    """Private memory of this size that starts where a huge page may start; it goes with its last view."""
    mapping = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    prefer_huge_pages(mapping)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_PAGE_BYTES
    return memoryview(mapping)[start : start + size_bytes]
