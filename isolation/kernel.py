"""What the layers and the servers need of the kernel: calls, the filter of a program's calls, processes.

The tables have a call's numbers on x86_64 and on aarch64, or -1 for a call that a machine does not have.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import time

libc = ctypes.CDLL(None, use_errno=True)
capset, sigprocmask = libc.capset, libc.sigprocmask  # looked up once, not in each child
# os.fork also takes locks of threads, of which there are none here, and seeds `random` anew: that touches two
# hundred pages, each of which the child would copy.
fork = ctypes.PyDLL(None).fork
MACHINE = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)  # the column of it in tables of numbers
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38

AUDIT_ARCHITECTURE = (0xC000003E, 0xC00000B7)
CLOSED_CALLS = """
ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 kcmp 312 272 pidfd_getfd 438 438
mount 165 40 pidfd_send_signal 424 424 process_madvise 440 440 process_mrelease 448 448 socket 41 198
connect 42 203 bind 49 200 umount2 166 39 pivot_root 155 41 chroot 161 51 open_tree 428 428 move_mount 429 429
fsopen 430 430 fsconfig 431 431 fsmount 432 432 fspick 433 433 mount_setattr 442 442 open_tree_attr 467 467
unshare 272 97 setns 308 268 add_key 248 217 request_key 249 218 keyctl 250 219 bpf 321 280
perf_event_open 298 241 userfaultfd 323 282 io_uring_setup 425 425 io_uring_enter 426 426
io_uring_register 427 427 memfd_create 319 279 memfd_secret 447 447 shmget 29 194 shmat 30 196 shmctl 31 195
semget 64 190 msgget 68 186 mq_open 240 180 init_module 175 105 finit_module 313 273 delete_module 176 106
kexec_load 246 104 kexec_file_load 320 294 reboot 169 142 acct 163 89 swapon 167 224 swapoff 168 225
quotactl 179 60 quotactl_fd 443 443 sethostname 170 161 setdomainname 171 162 settimeofday 164 170
clock_settime 227 112 adjtimex 159 171 clock_adjtime 305 266 name_to_handle_at 303 264
open_by_handle_at 304 265 syslog 103 116 personality 135 92 fanotify_init 300 262 vhangup 153 58 iopl 172 -1
ioperm 173 -1 setpriority 141 140 sched_setaffinity 203 122 sched_setparam 142 118 sched_setscheduler 144 119
sched_setattr 314 274 ioprio_set 251 30 migrate_pages 256 238 move_pages 279 239 chmod 90 -1 fchmod 91 52
fchmodat 268 53 fchmodat2 452 452 chown 92 -1 fchown 93 55 lchown 94 -1 fchownat 260 54 setxattr 188 5
lsetxattr 189 6 fsetxattr 190 7 setxattrat 463 463 removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16
utime 132 -1 utimes 235 -1 futimesat 261 -1 utimensat 280 88 vmsplice 278 75 io_setup 206 0
inotify_add_watch 254 27
"""
ALLOW, REFUSE, MISSING, ANY = 0x7FFF0000, 0x50001, 0x50026, 0xFFFFFFFF  # refuse: EPERM; missing: ENOSYS
CHECKED_CALLS = (  # number, argument, its bits looked at, value, what then, what else (None: other rules)
    ((435, 435), 0, 0, 0, MISSING, None),  # clone3 hides its flags in memory; the C library then uses clone
    ((56, 220), 0, 0x7E020080, 0, ALLOW, REFUSE),  # clone: no new namespaces
    ((302, 261), 0, ANY, 0, ALLOW, REFUSE),  # prlimit64: of oneself
    ((53, 199), 1, 15, 1, ALLOW, REFUSE),  # socketpair: streams; another kind could be connected elsewhere
    *(((72, 25), 1, ANY, command, REFUSE, None) for command in (8, 10, 15)),  # fcntl: signals by F_SETOWN
    # ioctl: typing, and signals as by F_SETOWN.
    *(((16, 29), 1, ANY, command, REFUSE, None) for command in (0x5412, 0x541C, 0x8901, 0x8902)),
    # Memory that would count as nobody's: what is shared without a file stays when nobody has its pages, huge
    # pages and those on disk are counted apart, and the queue of a socket can be made long.
    *(((9, 222), 3, flags, flags, REFUSE, None) for flags in (0x21, 0x40000)),  # mmap
    *(((28, 233), 2, ANY, advice, REFUSE, None) for advice in (20, 21)),  # madvise: COLD, PAGEOUT
    ((54, 208), 2, ANY, 7, REFUSE, None),  # setsockopt: SO_SNDBUF
)
SIGNAL_CALLS = ((62, 129), (234, 131), (200, 130), (129, 138), (297, 240))  # kill, ..., rt_tgsigqueueinfo


def check(result: int) -> int:
    """The result of a call of the C library; raises OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def mount(kind: str, target: str, flags: int, options: str = "", source: str = "none") -> None:
    """Mount a file system, or change how one is mounted."""
    words = [word.encode() for word in (source, target, kind, options)]
    check(libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]))


def make_filter(only_process: int | None) -> bytes:
    """The filter, a program for the kernel's small virtual machine (classic BPF).

    Args:
        only_process: signals may go to this process only; None: to all that the other layers let it see.
    """
    load, equal, greater, mask, give = 0x20, 0x15, 0x25, 0x54, 0x06
    number, architecture, arguments = (load, 0, 0, 0), (load, 0, 0, 4), 16
    code = [architecture, (equal, 1, 0, AUDIT_ARCHITECTURE[MACHINE]), (give, 0, 0, REFUSE)]
    code += [number, (greater, 0, 1, 0x3FFFFFFF), (give, 0, 0, REFUSE)]  # x32 would have other numbers
    checked = list(CHECKED_CALLS)
    if only_process is not None:
        checked += [(calls, 0, ANY, only_process, ALLOW, REFUSE) for calls in SIGNAL_CALLS]
    for calls, argument, bits, value, then, other in checked:
        last = number if other is None else (give, 0, 0, other)
        looked = [(load, 0, 0, arguments + 8 * argument), (mask, 0, 0, bits)]
        steps = [*looked, (equal, 0, 1, value), (give, 0, 0, then), last]
        code += [(equal, 0, len(steps), calls[MACHINE]), *steps]
    for call in map(int, CLOSED_CALLS.split()[1 + MACHINE :: 3]):
        if call >= 0:
            code += [(equal, 0, 1, call), (give, 0, 0, REFUSE)]
    code.append((give, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in code)


def probe_filter() -> None:
    """Raise OSError if there can be no filter here."""
    if MACHINE is None:
        raise OSError(0, f"no table of system calls for {os.uname().machine}")
    check(libc.syscall((317, 277)[MACHINE], 2, 0, struct.pack("I", 0x50000)))


def install_filter(rules: bytes) -> None:
    """Filter the calls of this process and its children from now on."""
    code = ctypes.create_string_buffer(rules)
    check(libc.prctl(PR_SET_SECCOMP, 2, struct.pack("HP", len(rules) // 8, ctypes.addressof(code)), 0, 0))


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


def tree_bytes(proc: int, limit: int) -> int:
    """The memory of all processes below this one. What they share counts once if the sum is above `limit`."""
    tree = descendants(proc)
    for share in (False, True):  # to find out a process's share takes long
        total = 0
        for pid in tree:
            rollup = read_proc(proc, pid, "smaps_rollup").partition(b"Pss:")[2] if share else b""
            if rollup:
                total += int(rollup.split()[0]) * 1024
            elif statm := read_proc(proc, pid, "statm"):
                total += int(statm.split()[1]) * mmap.PAGESIZE
        if total <= limit:
            break
    return total


def clear(proc: int, home: str) -> None:
    """Kill and reap every process below this one, to which all orphans have come, and delete all files."""
    try:
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)  # the whole pid namespace at once, faster than any fork
                os.waitpid(-1, 0)
                continue
            for process in descendants(proc):
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
    except ChildProcessError:  # none is left
        pass
    empty(home)


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
