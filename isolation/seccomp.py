"""The filter that the kernel applies to every system call of a program.

The tables have a call's numbers on x86_64 and on aarch64, or -1 for a call that a machine does not have.
"""

import ctypes
import os
import struct

from isolation.kernel import MACHINE, PR_SET_SECCOMP, check, libc

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


class Filter(ctypes.Structure):
    """A filter as the kernel reads it: the number of its instructions, and where they are."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def make_filter(only_process: int | None) -> Filter:
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
    return Filter(len(code), b"".join(struct.pack("HBBI", *step) for step in code))


def probe() -> None:
    """Raise OSError if there can be no filter here."""
    if MACHINE is None:
        raise OSError(0, f"no table of system calls for {os.uname().machine}")
    check(libc.syscall((317, 277)[MACHINE], 2, 0, struct.pack("I", 0x50000)))


def install(rules: Filter) -> None:
    """Filter the calls of this process and its children from now on."""
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(rules), 0, 0))
