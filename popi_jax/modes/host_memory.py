"""What the process does with memory that it frees: on a CPU, XLA's buffers come and go with every step."""

import ctypes
import platform

# Of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Makes glibc's malloc keep what is freed for what is allocated next, and elsewhere does nothing.

    By itself it hands every large buffer back, and the system gives the next one page by page, each cleared when it is
    first touched: more time than what most of a step's elementwise functions take. The process then holds its peak to
    its end, which is no higher for it. To be called before the first thread starts: a thread's own arena could not
    hold large buffers, so all share one.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
            mallopt(option, value)
