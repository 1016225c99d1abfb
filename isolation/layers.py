"""The layers that hold a program back, each tried when a server starts: "on", or "off: reason".

What a server can do for all tests is done once; a test's child does the rest. docs/sandbox.md has a table.
"""

import contextlib
import os
import re
import resource
import signal
import struct
from dataclasses import dataclass, field

from isolation import kernel
from isolation.kernel import check, libc, mount

PROCESSES = 64  # and threads of one test
STACK_BYTES = 512 << 20  # of address space for the stacks of threads: programs reserve far more than they use
FILE_BYTES = 64 << 20  # of all files of a program together; also what an interpreter needs beside a program
SYSTEM_DIRECTORIES = ["bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "sys", "usr"]
NO_CAPABILITIES, NO_SIGNALS = (struct.pack("Ii", 0x20080522, 0), bytes(24)), bytes(128)


@dataclass
class Jail:
    """What a server has prepared for its children."""

    home: str  # working directory of programs
    readable: list[str]  # what programs may read beside it
    proc: int  # descriptor of /proc: our own, or else the machine's
    layers: dict[str, str] = field(default_factory=dict)  # name -> "on" or "off: reason"
    pid: int = 0  # of the server, as the caller sees it
    user: int | None = None  # that programs run as, if it is not ours
    processes: int = PROCESSES  # that the user may have
    ruleset: int | None = None  # of Landlock
    signals_confined: bool = False  # by a pid namespace or by Landlock
    rules: bytes | None = None  # of seccomp, if they are the same for all children
    filtered: bool = False  # the server has the filter itself, so its children inherit it
    group: int | None = None  # descriptor of the server's control group
    ready: int = -1  # by this descriptor a child says, before its program starts, that its set-up is done

    def on(self, layer: str) -> bool:
        return self.layers.get(layer) == "on"

    def attempt(self, layer: str, action, *arguments: object) -> None:
        """Put on a layer by a function of ours or of the C library, or note why not."""
        try:
            check(action(*arguments) or 0)
            self.layers[layer] = "on"
        except OSError as error:
            self.layers[layer] = f"off: {error.strerror}"


def isolate(home: str, readable: list[str]) -> Jail:
    """Put this server into every layer that the kernel and the user allow."""
    jail = Jail(home, readable, os.open("/proc", os.O_RDONLY), ready=os.eventfd(0, os.EFD_NONBLOCK))
    user = os.getuid()
    jail.attempt("control group", join_control_group, jail)
    if user:
        jail.attempt("user namespace", enter_user_namespace, jail)
        if not jail.on("user namespace"):
            jail.processes += threads_of_user(user)
    jail.attempt("network namespace", libc.unshare, kernel.NEW_NETWORK)
    jail.attempt("ipc namespace", libc.unshare, kernel.NEW_IPC)
    jail.attempt("mount namespace", libc.unshare, kernel.NEW_MOUNTS)
    jail.attempt("pid namespace", libc.unshare, kernel.NEW_PIDS)
    if jail.on("pid namespace"):
        if check(kernel.fork()):  # the first process of a pid namespace is a child of the one that makes it
            os._exit(0)  # the keeper inherits the child
        jail.signals_confined = True
    jail.pid = int(os.readlink("self", dir_fd=jail.proc))
    if jail.on("mount namespace"):
        jail.attempt("private file system", mount_private_files, jail)
        jail.attempt("fresh /proc", mount, "proc", "/proc", 14)
    else:
        reason = "off: it needs a mount namespace"
        jail.layers |= {"private file system": reason, "fresh /proc": reason}
    if jail.on("fresh /proc"):
        jail.proc = os.open("/proc", os.O_RDONLY)
    if not user:
        jail.attempt("unprivileged user", choose_user, jail)
    jail.attempt("no new privileges", libc.prctl, kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    jail.attempt("Landlock", make_landlock_rules, jail)
    jail.attempt("seccomp filter", kernel.probe_filter)
    if jail.signals_confined and jail.on("seccomp filter"):
        jail.rules = kernel.make_filter(None)
        if jail.on("private file system"):  # then the server does not need the calls that the filter closes
            kernel.install_filter(jail.rules)
            jail.filtered = True
    own_files = jail.on("private file system")  # else a program fills the disk
    limit(resource.RLIMIT_FSIZE, FILE_BYTES if own_files else 0)
    limit(resource.RLIMIT_NOFILE, 128)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_MEMLOCK, 0)
    # Programs that recurse ask for more, or for no limit at all; the address space limits them anyway.
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (256 << 20 if most < 0 else min(256 << 20, most), most))
    os.chdir(home)
    libc.prctl(kernel.PR_SET_DUMPABLE, 0, 0, 0, 0)  # else a program of the same user could write our memory
    return jail


def limit(what: int, most: int) -> None:
    """Limit this process and its children; to the caller's own limit if that is lower."""
    try:
        resource.setrlimit(what, (most, most))
    except ValueError:
        resource.setrlimit(what, (resource.getrlimit(what)[1],) * 2)


def group_directory(server: int) -> str:
    """The directory of a server's control group (version 2): beside the caller's, or below it at the top."""
    with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as groups:
        tops = [words[4] for words in map(str.split, mounts) if words[words.index("-") + 1] == "cgroup2"]
        own = [line.strip()[3:] for line in groups if line.startswith("0::/")]
    if not tops or not own:
        raise OSError(0, "no control groups of version 2")
    return f"{tops[0]}{os.path.dirname(own[0]).rstrip('/')}/sandbox-{server}"


def write_file(directory: int, name: str, text: str) -> None:
    with open(os.open(name, os.O_WRONLY, dir_fd=directory), "w") as file:
        file.write(text)


def join_control_group(jail: Jail) -> None:
    """Make a control group for this server, by which the kernel holds the memory of it and its children."""
    path = group_directory(os.getpid())
    above = os.open(os.path.dirname(path), os.O_RDONLY)
    with open(f"{os.path.dirname(path)}/cgroup.controllers") as controllers:
        if "memory" not in controllers.read():
            raise OSError(0, "no memory controller of version 2")
    write_file(above, "cgroup.subtree_control", "+memory +pids")  # refused if it has processes itself
    os.makedirs(path, exist_ok=True)
    group = os.open(path, os.O_RDONLY)
    write_file(group, "pids.max", str(PROCESSES + 2))  # with the server and a zygote
    if os.access("memory.swap.max", os.F_OK, dir_fd=group):
        write_file(group, "memory.swap.max", "0")
    write_file(group, "cgroup.procs", "0")
    jail.group = group


def kernel_kills(jail: Jail) -> int:
    """How many processes of the control group, if there is one, the kernel has killed for their memory."""
    if jail.group is None:
        return 0
    with open(os.open("memory.events", os.O_RDONLY, dir_fd=jail.group), "rb", buffering=0) as events:
        return int(re.search(rb"oom_kill (\d+)", events.read(4096))[1])


def enter_user_namespace(jail: Jail) -> None:
    """In it, an ordinary user may make the other namespaces."""
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(kernel.NEW_USER))
    write_file(jail.proc, "self/setgroups", "deny")
    write_file(jail.proc, "self/uid_map", f"{user} {user} 1")
    write_file(jail.proc, "self/gid_map", f"{group} {group} 1")


def threads_of_user(user: int) -> int:
    """How many threads a user runs anywhere: without a user namespace they count as the program's."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            if os.stat(f"/proc/{pid}").st_uid == user:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def mount_private_files(jail: Jail) -> None:
    """Make everything read-only, hide what is not installed, and give programs a home in memory."""
    mount("", "/", 0x44000)  # private: no other process sees the mounts that follow
    tops = [top for top in os.scandir("/") if top.is_dir(follow_symlinks=False)]
    masked = [top.path for top in tops if top.name not in SYSTEM_DIRECTORIES]
    inside = [path for path in jail.readable if os.path.exists(path) and "/" + path.split("/")[1] in masked]
    held = {path: os.open(path, os.O_PATH) for path in inside}
    for top in masked:
        mount("tmpfs", top, 6, "size=1m,mode=755")
    for path, place in held.items():
        if not os.path.exists(path):  # it may be inside another
            os.makedirs(path)
            mount("", path, 0x5000, source=f"/proc/self/fd/{place}")
        os.close(place)
    os.makedirs(jail.home)
    read_only_no_setuid = struct.pack("4Q", 3, 0, 0, 0)
    check(libc.syscall(442, -1, b"/", 0x8000, read_only_no_setuid, 32))  # all mounts
    mount("tmpfs", jail.home, 6, f"size={FILE_BYTES},nr_inodes=16384,mode=777")


def choose_user(jail: Jail) -> None:
    """Choose the user of programs, another one for each server: the kernel counts processes by user."""
    candidate = 20000 + jail.pid % 40000
    os.setresgid(candidate, candidate, 0)
    os.setresuid(candidate, candidate, 0)
    try:
        open(os.__file__).close()  # the user may not reach an interpreter under /root
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
    os.setgroups([])
    jail.user = candidate


def make_landlock_rules(jail: Jail) -> None:
    """Make the ruleset that lets a program read what is installed and write its home."""
    version = check(libc.syscall(444, None, 0, 1))
    rights = (1 << (13 + (version > 1) + (version > 2))) - 1  # later ones: of devices, which are out of reach
    fields = [rights, *[3] * (version > 3), *[3] * (version > 5)]  # TCP; abstract sockets and signals
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    jail.ruleset = check(libc.syscall(444, attributes, len(attributes), 0))
    jail.signals_confined |= version > 5
    read, file_rights = 0b1101, 0x4007  # execute, read files and directories; what a file can be given
    readable = [*jail.readable, *["/proc"] * jail.on("fresh /proc")]
    for path, wanted in [(jail.home, rights), ("/dev/null", 6), *((path, read) for path in readable)]:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            allowed = wanted & rights & (rights if os.path.isdir(path) else file_rights)
            check(libc.syscall(445, jail.ruleset, 1, struct.pack("=Qi", allowed, place), 0))
            os.close(place)


def enter_child(jail: Jail, memory_bytes: int, descriptors: list[int]) -> None:
    """In the fresh child: take on every limit, and keep no descriptor but these, as 0, 1, 2 and perhaps 3."""
    os.setsid()
    if jail.group is not None and jail.user is not None:  # an ordinary user may not write this
        write_file(jail.proc, "self/oom_score_adj", "1000")  # else the kernel may kill the server instead
    if jail.ruleset is not None:
        check(libc.syscall(446, jail.ruleset, 0))
    for target, source in enumerate(descriptors):
        os.dup2(source, target)  # the keeper keeps 0 to 7 taken: no source is overwritten before its turn
    os.closerange(len(descriptors), 1 << 20)
    kernel.sigprocmask(signal.SIG_SETMASK, NO_SIGNALS, None)
    limit(resource.RLIMIT_AS, memory_bytes + FILE_BYTES + STACK_BYTES)  # with the interpreter's own share
    limit(resource.RLIMIT_NPROC, jail.processes)
    if jail.user is not None:
        os.setresgid(jail.user, jail.user, jail.user)
        os.setresuid(jail.user, jail.user, jail.user)
    check(kernel.capset(*NO_CAPABILITIES))  # whichever user we are
    if jail.on("seccomp filter") and not jail.filtered:
        kernel.install_filter(jail.rules or kernel.make_filter(os.getpid()))
