"""The processes and files of a test: how much memory they take, and how they are removed when it ends.

Everything that a test starts is below its server or zygote in the tree of processes, to which orphans return.
"""

import contextlib
import mmap
import os
import signal
import time


def read_proc(proc: int, pid: int | str, name: str) -> bytes:
    """The start of a process's file in /proc (`proc` is its descriptor); empty if the process has ended."""
    try:
        with open(os.open(f"{pid}/{name}", os.O_RDONLY, dir_fd=proc), "rb", buffering=0) as file:
            return file.read(4096)
    except OSError:
        return b""


def descendants(proc: int) -> list[int]:
    """The numbers of all processes below this one, as `proc` has them."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir(proc)):
        if stat := read_proc(proc, name, "stat"):
            children.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(int(name))
    found = [int(os.readlink("self", dir_fd=proc))]
    for pid in found:  # grows as we go
        found += children.get(pid, [])
    return found[1:]


def memory_bytes(proc: int, pid: int, share: bool) -> int:
    """The memory of a process: all that it shares with others, or only its share (slow to find out)."""
    rollup = read_proc(proc, pid, "smaps_rollup").partition(b"Pss:")[2] if share else b""
    if rollup:
        return int(rollup.split()[0]) * 1024
    return int((read_proc(proc, pid, "statm").split() or [0, 0])[1]) * mmap.PAGESIZE


def tree_bytes(proc: int, limit: int) -> int:
    """The memory of all processes below this one. What they share counts once if the sum is above `limit`."""
    tree = descendants(proc)
    total = sum(memory_bytes(proc, pid, share=False) for pid in tree)
    return total if total <= limit else sum(memory_bytes(proc, pid, share=True) for pid in tree)


def kill_tree(proc: int) -> None:
    """Kill and reap every process below this one: all orphans have become its children."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        if os.getpid() == 1:
            os.kill(-1, signal.SIGKILL)  # the whole pid namespace at once, faster than any fork
            os.waitpid(-1, 0)
            continue
        for process in descendants(proc):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)


def empty(home: str) -> None:
    """Delete all files; moves nested directories up instead of going down, because there may be thousands."""
    while entries := list(os.scandir(home)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            # We may not move a directory that we may not write. Where our own filter of system calls refuses
            # to change that, we have the capability to do without.
            with contextlib.suppress(PermissionError):
                os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    with contextlib.suppress(PermissionError):
                        os.chmod(inner.path, 0o700)
                os.rename(inner.path, f"{home}/{time.monotonic_ns()}")
            os.rmdir(entry.path)
