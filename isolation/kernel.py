"""The system calls for which Python's `os` has no name."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
capset, sigprocmask = libc.capset, libc.sigprocmask  # looked up once, not in each child
# os.fork also takes locks of threads, of which there are none here, and seeds `random` anew: that touches two
# hundred pages, each of which the child would copy.
fork = ctypes.PyDLL(None).fork
MACHINE = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)  # the column of it in tables of numbers

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38


def check(result: int) -> int:
    """The result of a call of the C library; raises OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def unshare(kind: int) -> None:
    """Give this process a new namespace of a kind."""
    check(libc.unshare(kind))


def mount(kind: str, target: str, flags: int, options: str = "", source: str = "none") -> None:
    """Mount a file system, or change how one is mounted."""
    words = [word.encode() for word in (source, target, kind, options)]
    check(libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]))
