"""Runs pytest as an unprivileged user: `python tests/as_another_user.py [--no-namespaces] ARGUMENTS`.

Root becomes nobody; directories above the interpreter and the project that nobody may not enter (an
interpreter under /root) are replaced by open ones, in a mount namespace of our own. With --no-namespaces the
kernel also refuses to make namespaces and to mount, as it does for a user in many containers.
"""

import ctypes
import os
import stat
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from isolation import kernel  # noqa: E402

NOBODY, NOBODY_ELSE = 65534, 65533  # two users: both modes may run side by side, each with its own limits


def closed_ancestor(path: Path) -> Path | None:
    """The highest directory on the way to `path` that others may not enter."""
    return next((place for place in reversed(path.parents) if not place.stat().st_mode & stat.S_IXOTH), None)


def open_the_way(libc: ctypes.CDLL, paths: list[Path]) -> None:
    """Replace closed directories above `paths` by empty open ones with `paths` bound into them."""
    needed = [path for path in paths if closed_ancestor(path)]
    if not needed:
        return
    if libc.unshare(kernel.NEW_MOUNTS) or libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None):
        sys.exit("cannot make a mount namespace")
    held = {path: os.open(path, os.O_PATH) for path in needed}
    for closed in {closed_ancestor(path) for path in needed}:
        libc.mount(b"tmpfs", bytes(closed), b"tmpfs", ctypes.c_ulong(0), b"mode=755")
    for path, descriptor in held.items():
        path.mkdir(parents=True)
        if libc.mount(
            f"/proc/self/fd/{descriptor}".encode(), bytes(path), None, ctypes.c_ulong(0x5000), None
        ):
            sys.exit(f"cannot bind {path}")
        os.close(descriptor)


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = sys.argv[1:]
    if os.getuid() == 0:
        project = Path(__file__).resolve().parent.parent
        open_the_way(libc, [Path(sys.base_prefix), Path(sys.prefix), project])
        os.setgroups([])
        user = NOBODY_ELSE if arguments[:1] == ["--no-namespaces"] else NOBODY
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        libc.prctl(kernel.PR_SET_DUMPABLE, 1, 0, 0, 0)
    if arguments[:1] == ["--no-namespaces"]:
        del arguments[0]
        libc.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        kernel.CLOSED_CALLS = "unshare 272 97 setns 308 268 mount 165 40 mount_setattr 442 442"
        kernel.install_filter(kernel.make_filter(None))
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}
    os.execv(sys.executable, [sys.executable, *arguments])
