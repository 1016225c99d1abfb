"""macOS and Windows: everything imports, what needs no sandbox runs, the sandbox says that it needs Linux."""

import subprocess
import sys
from pathlib import Path

# Packages look at sys.platform for themselves, so they are imported before the symbols of Linux go. The lists
# hold what macOS or Windows lack of what this project uses on Linux.
WITHOUT_LINUX = """
import contextlib, ctypes, importlib, io, os, runpy, select, signal, socket, sys
from pathlib import Path

import datasets, filelock, huggingface_hub, numpy, pyarrow.parquet, safetensors, torch, tqdm, transformers
import torch.distributed.checkpoint, torch.distributed.fsdp
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN = {
    os: "memfd_create pidfd_open sched_getaffinity uname fork setsid wait wait4 setresuid setresgid "
    "setgroups pread pwrite readv sysconf O_PATH WNOHANG getuid getgid",
    signal: "SIGKILL pthread_sigmask SIG_BLOCK SIG_SETMASK",
    socket: "send_fds recv_fds AF_UNIX",
    select: "poll POLLIN POLLRDHUP",
}
for module, names in HIDDEN.items():
    for name in names.split():
        delattr(module, name)
for name in ("resource", "fcntl"):
    sys.modules[name] = None  # importing it is an ImportError
load_library = ctypes.CDLL.__init__

def load_named_library(self, name, *arguments, **keywords):
    if name is None:
        raise TypeError("bad argument type for built-in operation")  # Windows
    load_library(self, name, *arguments, **keywords)

ctypes.CDLL.__init__ = load_named_library

sys.path.insert(0, str(Path.cwd()))
for file in sorted(Path.cwd().glob("*.py")):
    importlib.import_module(file.stem)

sys.argv = ["train.py", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
    runpy.run_path("train.py", run_name="__main__")
assert "--iterations" in printed.getvalue(), printed.getvalue()

import distributed, sandbox, toy
assert distributed.sandbox_workers() >= 1
assert sandbox.outputs_match("1.0 A", "1 a") and not sandbox.outputs_match("1", "2")
assert len(toy.problems("test")) > 0
toy.ensure_base(Path(BASE), lessons=(1, 0))
try:
    sandbox.Sandbox(workers=1)
except ValueError as error:
    print(error)
"""


def test_what_needs_no_sandbox_runs_without_linux(tmp_path):
    script = WITHOUT_LINUX.replace("BASE", repr(str(tmp_path / "base")))
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert run.returncode == 0, run.stderr
    (sentence,) = run.stdout.splitlines()
    assert all(word in sentence for word in ("Linux", "WSL2", "Docker", "Colab"))
