"""Keeps freed host memory in the process: on a CPU, XLA allocates and frees its buffers in every step."""

import ctypes
import platform

# Options of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Makes glibc's malloc keep freed memory for later allocations. Does nothing with another C library.

    By default malloc returns every large buffer to the system, which then clears each page of the next buffer when it
    is first touched. That takes more time than most elementwise functions of a step. With this setting the process
    holds its peak memory until it ends; the peak itself is not higher. Call this before the first thread starts: a
    thread's own arena cannot hold large buffers, so all threads must share one.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
            mallopt(option, value)
