"""Hostile programs: what they must not get, as root, as another user, and where the kernel refuses namespaces.

A *forgery* wants to be "passed" without the answer. Each runs three times: as a program, at the import of an
assert test's program, and inside the call of its function. A *harm* wants something outside: it tries, and
prints what it got, else "refused". All are queued at once; each test looks at the results of its attack.
"""

# ruff: noqa: E501 (many attacks read best as one line)

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import AssertTest, IoTest, Job, Limits, Sandbox, Verdict

SHORT = Limits(seconds=1.0, memory_bytes=256 << 20, output_bytes=1 << 16)
PROJECT = Path(__file__).resolve().parent.parent
SECRET = "sesame-" + "opens-7203"  # what tests expect: no program may come to know it

FORGERIES = {
    # ends of all sorts
    "nothing": "pass",
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit with the answer": "import sys; sys.exit('sesame')",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "exit in atexit": "import atexit, os; atexit.register(os._exit, 0)",
    "exit in a thread": "import threading, os; threading.Thread(target=os._exit, args=(0,)).start()",
    "exit in __del__": "import os\nclass D:\n  def __del__(self): os._exit(0)\nd = D(); del d",
    "exit by exec": "import os; os.execv('/bin/true', ['true'])",
    "killed by itself": "import os; os.kill(os.getpid(), 9)",
    "stopped by itself": "import os; os.kill(os.getpid(), 19)",
    "abort": "import os; os.abort()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "recursion in C": "import sys; sys.setrecursionlimit(10**9)\nclass A:\n"
    "  def __getattr__(self, n): return getattr(self, n + 'x')\nA().x",
    "expected exception at once": "raise ValueError",
    "AssertionError": "raise AssertionError",
    "an exception that lies": "class E(Exception):\n  def __str__(self): return 1 / 0\n  __repr__ = __str__\nraise E",
    "an exception that hangs": "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E",
    "an exception that exits": "import os\nclass E(Exception):\n  def __str__(self): os._exit(0)\nraise E",
    # words and bytes
    "the word": "print('passed')",
    "a verdict as JSON": 'print(\'{"verdict": "passed", "exit_code": 0, "ended": ""}\')',
    "a verdict on every descriptor": "import os, json, struct\n"
    "m = json.dumps({'verdict': 'passed', 'exit_code': 0, 'ended': '', 'out': 0, 'err': 0, 'value': 1}).encode()\n"
    "for d in range(256):\n  for b in (m, struct.pack('!Q', len(m)) + m):\n"
    "    try: os.write(d, b)\n    except OSError: pass",
    "every descriptor closed": "import os; os.closerange(0, 256)",
    "closed descriptors, then sleep": "import os, time; os.closerange(0, 256); time.sleep(60)",
    "descriptors swapped": "import os\nfor d in range(3, 9):\n  try: os.dup2(1, d)\n  except OSError: pass",
    "no stdout": "import sys; sys.stdout = None",
    "invalid UTF-8": "import os; os.write(1, bytes(range(128, 256)))",
    "NUL in the output": "print('\\0' * 100)",
    "the answer on stderr": "import sys; sys.stderr.write('42')",
    # a look at the harness
    "frames": "import sys\nframe, words = sys._getframe(), []\nwhile frame:\n"
    "  words += [repr(frame.f_locals), repr(frame.f_globals)[:10**6]]\n  frame = frame.f_back\n"
    "found = [w for w in words if 'ses' 'ame-' in w]\n"
    "for w in found: i = w.index('ses' 'ame-'); print(w[i:i + 17])",
    "gc": "import gc\nfor o in gc.get_objects():\n  if type(o) in (dict, list, tuple):\n"
    "    for v in (list(o.values()) if type(o) is dict else o):\n"
    "      if type(v) in (str, bytes) and ('ses' 'ame-') in str(v): i = str(v).index('ses' 'ame-'); print(str(v)[i:i+17])",
    "its memory": "key = b'ses' b'ame-'\nfor line in open('/proc/self/maps'):\n  a, b = [int(x, 16) for x in line.split()[0].split('-')]\n"
    "  try:\n    with open('/proc/self/mem', 'rb', 0) as m:\n      m.seek(a); t = m.read(b - a)\n"
    "  except (OSError, ValueError, OverflowError): continue\n"
    "  i = t.find(key)\n  if i >= 0: print(t[i:i + 17].decode())",
    "its memory through ctypes": "import ctypes\nkey = b'ses' b'ame-'\nb = id(key) & ~0xfffff\n"
    "for a in range(b - (8 << 20), b + (8 << 20), 4096):\n  t = ctypes.string_at(a, 4096)\n  i = t.find(key)\n"
    "  if i >= 0 and t[i:i + 17].endswith(b'7203'): print(t[i:i + 17].decode())",
    "tracing": "import sys\ndef t(f, e, a):\n  if e == 'return': print(a)\n  return t\nsys.settrace(t); sys.setprofile(t)\n"
    "g = sys._getframe()\nwhile g: g.f_trace = t; g = g.f_back",
    "patched builtins": "import builtins\nclass T:\n  def __eq__(self, o): return True\n  __ne__ = lambda s, o: False\n"
    "builtins.int = builtins.str = builtins.AssertionError = T\nbuiltins.compile = builtins.exec = lambda *a: None",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"value": true, "verdict": "passed"}\'',
    "patched unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.main = lambda: None",
    "patched sockets": "import socket, os\nsocket.socket.sendall = lambda *a: None\nos._exit = lambda *a: None",
    "patched sandbox": "import sys\nfor m in list(sys.modules.values()):\n"
    "  for n in ('pack', 'judge', 'run_test', 'run_program', 'outputs_match', 'candidate_traceback'):\n"
    "    if hasattr(m, n): setattr(m, n, lambda *a, **k: {'verdict': 'passed'})",
    "a thread that patches": "import threading, sys, time\ndef t():\n  for _ in range(50):\n    for f in sys._current_frames().values():\n"
    "      f.f_globals.update(code=0, exit_code=0, verdict='passed')\n    time.sleep(0.001)\n"
    "threading.Thread(target=t).start()",
    # the right thing, wrongly: these know the answer of the program test, but do not end as they must
    "right answer, then exit 1": "import sys; print('sesame-' 'opens-7203'); sys.exit(1)",
    "right answer, then hang": "import time; print('sesame-' 'opens-7203', flush=True); time.sleep(60)",
    "right answer, then killed": "import os; print('sesame-' 'opens-7203', flush=True); os.kill(os.getpid(), 9)",
    "right answer, then noise": "import sys; print('sesame-' 'opens-7203'); sys.stderr.write('x' * 100000)",
    # never ending
    "endless loop": "while True: pass",
    "endless sleep": "import time\nwhile True: time.sleep(9)",
    "signals ignored": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
    "while True: pass",
    "BaseException swallowed": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "a thread that never ends": "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
    "wait in atexit": "import atexit, time; atexit.register(time.sleep, 99)",
    "a child holds stdout": "import os, time\nif os.fork() == 0: time.sleep(99)",
    "an orphan holds stdout": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(99)\n  os._exit(0)",
    "a regular expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "a huge power": "x = 10 ** 10 ** 8; y = x * x",
    # too much
    "endless stdout": "while True: print('x' * 1000)",
    "endless stderr": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "one long line": "import sys\nfor _ in range(100): sys.stdout.write('x' * 10**6)",
    "3 GB": "x = bytearray(3 << 30)",
    "10 GB in steps": "x = []\nwhile True: x.append(bytearray(b'x' * (10 << 20)))",
    "10 GB of address space": "import mmap; m = mmap.mmap(-1, 10 << 30); m.write(b'x' * (9 << 30))",
    "ten children of 100 MB": "import os, time\nfor _ in range(10):\n"
    "  if os.fork() == 0: x = bytearray(b'x' * (100 << 20)); time.sleep(60)\ntime.sleep(60)",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "files": "i = 0\nwhile True: open(f'f{i}', 'wb').write(b'x' * (1 << 20)); i += 1",
    "one large file": "f = open('f', 'wb')\nwhile True: f.write(b'x' * (1 << 20))",
    "empty files": "i = 0\nwhile True: open(f'f{i}', 'w').close(); i += 1",
    "3,000 nested directories": "import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()",
    "closed directories": "import os\nfor i in range(50): os.mkdir('d', 0o700); os.chdir('d')\nos.mkdir('e', 0)",
    "pipes": "import os, fcntl\np = []\nwhile True: p.append(os.pipe()); fcntl.fcntl(p[-1][1], 1031, 1 << 20); os.write(p[-1][1], b'x' * 9**6)",
    "tracebacks": "def f(n): return f(n + 1)\nf(0)",
    "a long exception": "raise ValueError('x' * 10**7)",
    # sources
    "NUL in the source": "x = 1\0",
    "a surrogate in the source": "x = '\ud800'",
    "nested 10,000 deep": "(" * 10000 + ")" * 10000,
    "10,000 unary signs": "-" * 10000 + "1",
    "a source that eats memory": "x = [" + "[1],{}," * 400000 + "]",
    "a source that is compiled for long": "eval('[' * 90 + ']' * 90)\nexec('x = ' + '1 + ' * 10**6 + '1')",
    "exec at run time": "exec('(' * 10**5)",
}
CALLS = {  # programs with a function; what it returns must not be equal to anything that it should not be
    "always equal": "class E:\n  def __eq__(self, o): return True\n  __ne__ = lambda s, o: False\ndef f(x): return E()",
    "int subclass": "class I(int):\n  def __eq__(self, o): return True\n  __hash__ = int.__hash__\ndef f(x): return I(1)",
    "str subclass": "class S(str):\n  def __eq__(self, o): return True\n  __hash__ = str.__hash__\ndef f(x): return S('a')",
    "list of equals": "class E:\n  def __eq__(self, o): return True\ndef f(x): return [E()]",
    "dict subclass": "class D(dict):\n  def __eq__(self, o): return True\ndef f(x): return D()",
    "metaclass": "class M(type):\n  def __eq__(c, o): return True\n  __hash__ = type.__hash__\nclass C(metaclass=M): pass\n"
    "def f(x): return C",
    "type that claims to be str": "class S:\n  __class__ = str\n  def __eq__(self, o): return True\ndef f(x): return S()",
    "pickle": "import os\nclass P:\n  def __reduce__(self): return os._exit, (0,)\ndef f(x): return P()",
    "mock": "from unittest.mock import ANY\ndef f(x): return ANY",
    "infinite generator": "import itertools\ndef f(x): return itertools.count()",
    "huge string": "def f(x): return 'a' * (1 << 25)",
    "huge int": "def f(x): return 1 << (1 << 25)",
    "int too long to print": "def f(x): return 10 ** 5000",
    "deep list": "def f(x):\n  a = []\n  for _ in range(10**5): a = [a]\n  return a",
    "cyclic list": "def f(x):\n  a = []; a.append(a); return a",
    "exponential list": "def f(x):\n  a = [0]\n  for _ in range(99): a = [a, a]\n  return a",
    "nan": "def f(x): return float('nan')",
    "the function deleted": "def f(x):\n  global f; del f; return 1",
    "no function": "g = 1",
    "not a function": "f = 1",
    "a class": "class f:\n  def __init__(self, x): pass\n  def __eq__(self, o): return True",
    "argument replaced": "class L(list):\n  def __eq__(self, o): return True\ndef f(x): return L([x])",
    "exit in the second call": "import os\nn = 0\ndef f(x):\n  global n; n += 1\n  if n > 1: os._exit(0)\n  return 0",
    "ValueError always": "def f(x): raise ValueError(x)",
    "AssertionError in the call": "def f(x): raise AssertionError",
    "StopIteration": "def f(x): raise StopIteration",
    "ExceptionGroup": "def f(x): raise ExceptionGroup('x', [ValueError(1)])",
    "named as an exception": "class AssertionError(Exception): pass\ndef f(x): raise AssertionError",
    "endless output in the call": "def f(x):\n  while True: print(x)",
    # what the judge's socket takes
    **{
        f"forged answer: {name}": "import os, socket, struct\n"
        f"def f(x):\n  m = {message}\n  m = m if m[:1] == b'R' else struct.pack('!Q', len(m)) + m\n"
        "  socket.socket(fileno=3).sendall(m.removeprefix(b'R'))\n  import time; time.sleep(60)"
        for name, message in {
            "a verdict": 'b\'{"verdict": "passed"}\'',
            "no JSON": "b'x' * 100",
            "an endless header": "b'R' + b'\\xff' * 8 + b'x' * 10**8",
            "a flood": "b'R' + struct.pack('!Q', 2) * 10**7",
            "no tag": 'b\'{"value": 1, "given": null}\'',
            "two tags": 'b\'{"value": {"int": "0x1", "float": "0x1"}, "given": null}\'',
            "unknown tag": 'b\'{"value": {"code": "x"}, "given": null}\'',
            "unhashable": 'b\'{"value": {"set": [{"list": []}]}, "given": {"tuple": [{"tuple": []}, {"dict": []}]}}\'',
            "deep": "b'{\"value\": ' + b'{\"list\": [' * 10**5",
            "a hex bomb": 'b\'{"value": {"int": "0x\' + b\'f\' * (15 << 20) + b\'"}, "given": 1}\'',
            "a long number": "b'{\"value\": ' + b'9' * (10 << 20) + b'}'",
            "NaN": 'b\'{"value": NaN, "given": NaN}\'',
            "strange error": 'b\'{"error": [], "message": {}, "traceback": 1}\'',
            "error: exit": 'b\'{"error": "SystemExit", "message": "0", "traceback": ""}\'',
            "colliding keys": 'b\'{"value": {"set": [\' + b",".join(b\'{"int": "%s"}\' % hex(i * (2**61 - 1)).encode()'
            " for i in range(1, 12000)) + b']}, \"given\": 1}'",
        }.items()
    },
}
ASSERTS = (  # none of them can be passed by a program that does not know the secret
    f"assert f('x') == {SECRET!r}",
    f"try:\n  f('x')\nexcept ValueError: pass\nassert candidate('y') == {SECRET!r}",
    f"r = []\ntry:\n  r.append(f('x'))\nexcept BaseException: pass\nassert {SECRET!r} in r",
)
SWALLOWS = (
    "try:\n  f('x')\n  f('x')\nexcept:\n  pass"  # passed by all that answer or raise, never by what is lost
)
LOST = {
    "exit": "import os\ndef f(x): os._exit(0)",
    "killed": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "exit at import": "import os; os._exit(0)",
    "closed": "import os\ndef f(x): os.closerange(3, 9); return 1",
    "hangs": "def f(x):\n  while True: pass",
    "unhashable": CALLS["forged answer: unhashable"],
    "no JSON": CALLS["forged answer: no JSON"],
}

TRY = """
def attempt(name, action):
    try:
        got = action()
    except BaseException as error:
        return
    if got is not False:
        print('BREACH', name, repr(got)[:200])

import ctypes, glob, os, resource, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno())
def read(path): return open(path, 'rb').read(100) or False
def write(path):
    with open(path, 'w') as f: f.write('attack')
try:
    others = [int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]
except OSError:  # it is out of reach: then those that were started before
    others = list(range(max(1, os.getpid() - 30), os.getpid()))
others += [os.getppid()] if os.getppid() else []
others += [BYSTANDER]
"""
HARMS = {
    "kill others": "for p in others:\n  for s in (9, 19, 15):\n"
    "    try: os.kill(p, s)\n    except OSError: pass",
    "kill everything": "signal.signal(15, signal.SIG_IGN)\nfor s in (15, 18):\n  try: os.kill(-1, s)\n  except OSError: pass",
    "kill the group of the parent": "try: os.killpg(os.getpgid(os.getppid()), 9)\nexcept OSError: pass",
    "signals by fcntl": "import fcntl\nr, w = os.pipe()\nfor p in others:\n"
    "  attempt('owner', lambda: fcntl.fcntl(r, 8, p))",
    "ptrace": "for p in others: attempt('attach', lambda: call(101, 16, p, 0, 0)); attempt('seize', lambda: call(101, 0x4206, p, 0, 0))",
    "memory of others": "for p in others:\n  attempt('mem', lambda: open(f'/proc/{p}/mem', 'r+b', 0))\n"
    "  attempt('maps', lambda: read(f'/proc/{p}/maps'))\n"
    "  b = ctypes.create_string_buffer(8); v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "  attempt('process_vm_readv', lambda: call(310, p, v, 1, v, 1, 0))",
    "environment of others": "for p in others: attempt('environ', lambda: read(f'/proc/{p}/environ'))",
    "command lines of others": "for p in others:\n  try: t = open(f'/proc/{p}/cmdline').read()\n  except OSError: continue\n"
    "  if 'pytest' in t or 'time.sleep' in t: print('BREACH', t)",
    "descriptors of others": "for p in others:\n  attempt('fd', lambda: os.listdir(f'/proc/{p}/fd') or False)\n"
    "  attempt('pidfd', lambda: call(438, os.pidfd_open(p), 0, 0))",
    "directories of others": "for p in others:\n  attempt('root', lambda: os.listdir(f'/proc/{p}/root'))\n"
    "  attempt('cwd', lambda: os.listdir(f'/proc/{p}/cwd'))",
    "limits of others": "for p in others: attempt('prlimit', lambda: resource.prlimit(p, resource.RLIMIT_CPU, (1, 1)))",
    "priority of others": "attempt('nice', lambda: os.setpriority(0, BYSTANDER, 19))",
    "limits raised": "for w in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):\n"
    "  attempt('limit', lambda: resource.setrlimit(w, (-1, -1)))",
    "another user": "for n in (os.setuid, os.setgid, os.seteuid): attempt(str(n), lambda: n(0) if os.getuid() else False)\n"
    "attempt('groups', lambda: os.setgroups([0]))",
    "capabilities": "b = ctypes.create_string_buffer(b'\\xff' * 24, 24); h = ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20\\0\\0\\0\\0')\n"
    "attempt('capset', lambda: call(126, h, b))",
    "namespaces": "for k in (0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):\n"
    "  attempt('unshare', lambda: call(272, k))\n  attempt('clone', lambda: call(56, k | 17, 0, 0, 0, 0))\n"
    "for n in ('mnt', 'pid', 'user'): attempt('setns', lambda: call(308, os.open('/proc/1/ns/' + n, 0), 0))",
    "mounts": "attempt('mount', lambda: call(165, b'none', b'.', b'tmpfs', 0, 0))\nattempt('bind', lambda: call(165, b'/', b'.', 0, 4096, 0))\n"
    "attempt('umount', lambda: call(166, os.getcwd().encode(), 2))\nattempt('chroot', lambda: os.chroot('.'))\n"
    "attempt('open_tree', lambda: call(428, -100, b'/', 1))\nattempt('fsopen', lambda: call(430, b'tmpfs', 0))",
    "kernel": "attempt('bpf', lambda: call(321, 0, b'x' * 128, 128))\nattempt('keys', lambda: call(248, b'user', b'x', b'x', 1, -3))\n"
    "attempt('io_uring', lambda: call(425, 8, ctypes.create_string_buffer(256)))\nattempt('userfaultfd', lambda: call(323, 1))\n"
    "attempt('perf', lambda: call(298, b'\\0' * 128, 0, -1, -1, 0))\nattempt('syslog', lambda: call(103, 3, ctypes.create_string_buffer(99), 99))\n"
    "attempt('x32', lambda: call(0x40000000 + 39))\nattempt('personality', lambda: call(135, 0x0040000))",
    "memory that nobody counts": "attempt('memfd', lambda: os.memfd_create('x'))\nattempt('shm', lambda: call(29, 0, 4096, 0o1600))\n"
    "attempt('mq', lambda: call(240, b'x', 66, 0o600, 0))\nattempt('sem', lambda: call(64, 0, 1, 0o1600))",
    "network": "for a in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17):\n"
    "  for t in (1, 2, 3): attempt('socket', lambda: socket.socket(a, t))\nattempt('pair', lambda: socket.socketpair(1, 2))\n"
    "attempt('pair', lambda: socket.socketpair(1, 5))",
    "name service": "attempt('dns', lambda: socket.getaddrinfo('example.org', 80))",
    "write everywhere": "for d in (PROJECT, TESTS, OUTSIDE, '/', '/tmp', '/var/tmp', '/dev/shm', '/dev', '/etc', '/root', '/proc/self', sys.prefix,\n"
    "          os.path.dirname(os.__file__), os.path.dirname(os.getcwd()), os.path.expanduser('~/..')):\n"
    "  if os.path.isdir(d):\n"
    "    attempt(d, lambda: write(d + '/attack-left-this'))\n    attempt(d, lambda: os.mkdir(d + '/attack-left-this'))\n"
    "    attempt(d, lambda: os.symlink('x', d + '/attack-left-this'))\n    attempt(d, lambda: os.mkfifo(d + '/attack-left-this'))",
    "change what is there": "for p in (PROJECT + '/sandbox.py', PROJECT + '/isolation/child.py', OUTSIDE + '/canary', os.__file__):\n"
    "  attempt(p, lambda: open(p, 'r+'))\n  attempt(p, lambda: os.truncate(p, 0))\n  attempt(p, lambda: os.unlink(p))\n"
    "  attempt(p, lambda: os.rename(p, 'mine'))\n  attempt(p, lambda: os.link(p, 'mine'))\n  attempt(p, lambda: os.chmod(p, 0))\n"
    "  attempt(p, lambda: os.utime(p))\n  attempt(p, lambda: os.setxattr(p, 'user.x', b'x'))\n"
    "  attempt(p, lambda: os.chown(p, os.getuid(), os.getgid()))",
    "links to what is there": "os.symlink(OUTSIDE + '/canary', 'way')\nattempt('read', lambda: read('way'))\nattempt('write', lambda: open('way', 'a'))\n"
    "os.symlink(OUTSIDE, 'ways')",
    "read what is there": "for p in (PROJECT + '/sandbox.py', PROJECT + '/isolation/child.py', TESTS + '/test_attacks.py', OUTSIDE + '/canary', '/etc/shadow', '/root/.profile', '/root/.bashrc',\n"
    "          '/var/log/dpkg.log', '/proc/kcore', '/proc/kallsyms' * 0 or '/proc/kcore', '/dev/mem', '/dev/sda', '/dev/vda', '/dev/kmsg'):\n"
    "  attempt(p, lambda: read(p))\nfor d in (PROJECT, OUTSIDE, '/root', '/home', '/tmp'): attempt(d, lambda: os.listdir(d) or False)",
    "secrets in its environment": "t = repr(os.environ) + str(glob.glob('/proc/self/environ') and open('/proc/self/environ').read() if os.access('/proc/self/environ', 4) else '')\n"
    "if 'top' 'secret' in t: print('BREACH', t)",
    "secrets of the interpreter": "t = repr(sys.argv) + repr(sys.orig_argv) + repr(sys.path)\nif PROJECT in repr(sys.path): print('BREACH', t)",
    "sandbox modules": "attempt('import', lambda: __import__('sandbox'))\nattempt('import', lambda: __import__('isolation'))\nattempt('import', lambda: __import__('data'))",
    "other tests' descriptors": "for d in range(3, 256): attempt(f'fd {d}', lambda: os.fstat(d))",
    "a daemon": "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    for s in range(1, 64):\n      try: signal.signal(s, 1)\n      except (OSError, ValueError): pass\n"
    "    open('/proc/self/comm', 'w').write('attack-daemon')\n    os.closerange(0, 99)\n    time.sleep(100)\n  os._exit(0)\ntime.sleep(0.2)",
    "a family of reapers": "for _ in range(5):\n  libc.prctl(36, 1, 0, 0, 0)\n  if os.fork(): os._exit(0)\n"
    "  os.setsid()\nopen('/proc/self/comm', 'w').write('attack-daemon')\ntime.sleep(100)",
    "a sibling": "p = libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0)\nif p == 0:\n  open('/proc/self/comm', 'w').write('attack-daemon')\n  time.sleep(100)",
    "devices": "attempt('mknod', lambda: os.mknod('null', 0o020666, os.makedev(1, 3)))\nattempt('mknod', lambda: os.mknod('mem', 0o020666, os.makedev(1, 1)))",
    "set-user-id programs": "for p in ('/usr/bin/su', '/usr/bin/mount', '/bin/umount', '/usr/bin/passwd'):\n"
    "  if os.path.exists(p): attempt(p, lambda: not subprocess.run([p, '-h'], capture_output=True).returncode and open('/etc/shadow').read())",
    "cores": "if os.fork() == 0: os.abort()\nos.wait()\nattempt('core', lambda: glob.glob('core*') or False)",
    "memory that is nobody's": "import mmap\nattempt('shared', lambda: mmap.mmap(-1, 1 << 20))\n"
    "attempt('a device', lambda: open('/dev/zero', 'rb'))\n"
    "libc.mmap.restype = ctypes.c_ssize_t\ndef pages(flags):\n"
    "  if libc.mmap(None, ctypes.c_size_t(2 << 20), 3, flags, -1, ctypes.c_long(0)) == -1: raise OSError\n"
    "for f in (0x21, 0x23, 0x40022, 0x40021): attempt(f'mmap {f:x}', lambda: pages(f))\n"
    "m = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:] = b'x' * (1 << 20)\n"
    "for advice in (20, 21): attempt(f'madvise {advice}', lambda: m.madvise(advice))\n"
    "r, w = os.pipe(); b = ctypes.create_string_buffer(8); v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "attempt('vmsplice', lambda: call(278, w, v, 1, 0))\n"
    "a, b = socket.socketpair(); attempt('queue', lambda: a.setsockopt(1, socket.SO_SNDBUF, 1 << 30))",
    "signals by ioctl": "import fcntl, struct\na, b = socket.socketpair()\nfor p in others:\n"
    "  for c in (0x8901, 0x8902): attempt('owner', lambda: fcntl.ioctl(a, c, struct.pack('i', p)))\n"
    "fcntl.ioctl(a, 0x5452, struct.pack('i', 1)); b.send(b'x'); time.sleep(0.1)",
    "what the machine has few of": "c = ctypes.c_ulong(); attempt('io_setup', lambda: call(206, 1, ctypes.byref(c)))\n"
    "attempt('inotify', lambda: call(254, libc.inotify_init(), b'.', 2))",
    "time": "attempt('time', lambda: time.clock_settime(time.CLOCK_REALTIME, 0))\nattempt('name', lambda: socket.sethostname('x'))",
}
STATE = """
import builtins, decimal, json, os, random, signal, sys
def processes():  # besides the server, the zygote and this one
    try:
        return [p for p in os.listdir('/proc') if p.isdigit()][3:]
    except OSError:
        return 0
seen = [name for name, found in {
    'file': os.listdir('.'), 'environment': 'LEFT' in os.environ, 'builtins': hasattr(builtins, 'left'),
    'module': hasattr(json, 'left'), 'argv': 'left' in sys.argv, 'path': 'left' in sys.path, 'umask': os.umask(0o22) != 0o22,
    'directory': os.path.basename(os.getcwd()) == 'd', 'alarm': signal.getitimer(signal.ITIMER_REAL)[0],
    'handler': signal.getsignal(15) is not signal.SIG_DFL, 'decimal': decimal.getcontext().prec != 28,
    'input': os.fstat(0).st_size != 2,
    'processes': processes(),
}.items() if found]
print(seen, random.random() == 0.5)
open('f', 'w').close(); os.mkdir('d'); os.mkfifo('p'); os.symlink('/', 'l'); os.chdir('d'); open('f', 'w').close()
os.environ['LEFT'] = 'x'; builtins.left = json.left = 1; sys.argv.append('left'); sys.path.append('left'); os.umask(0)
signal.signal(15, signal.SIG_IGN); signal.setitimer(signal.ITIMER_REAL, 99); decimal.getcontext().prec = 5
sys.stdin.close()
try: os.write(0, b'left in the input')
except OSError: pass  # where programs may write no files
try:
    child = os.fork()
except OSError:  # without a user namespace all that the user runs counts, bombs beside this one too
    child = 1
if not child:
    import time
    time.sleep(99)
"""


class Suite:
    """All attacks' results, and the bystander that they must not touch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "canary").write_text("alive")
        self.bystander = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1000)", "topsecret"]
        )
        os.environ["PASSWORD"] = "topsecret"
        self.sandbox = Sandbox()
        self.keeper = self.sandbox._keeper.process.pid
        names = {"PROJECT": str(PROJECT), "TESTS": str(PROJECT / "tests"), "OUTSIDE": str(directory)}
        words = TRY.replace("BYSTANDER", str(self.bystander.pid))
        start = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + words
        program, function = IoTest("x\n", SECRET), AssertTest(ASSERTS[0])
        jobs = {}
        for name, text in FORGERIES.items():
            timed = EXPECTED.get(name, Verdict.TIMEOUT) == Verdict.TIMEOUT
            jobs["program", name] = Job(text, (program,), SHORT if timed else replace(SHORT, seconds=8.0))
            jobs["import", name] = Job(f"{text}\ndef f(x): return x", (function,), SHORT, "f")
            inside = f"def f(x):\n  exec({text!r}, {{'__name__': 'g'}})\n  return x"
            jobs["call", name] = Job(inside, (function,), SHORT, "f")
        for name, text in CALLS.items():
            jobs["function", name] = Job(text, tuple(map(AssertTest, ASSERTS)), SHORT, "f")
        for name, text in LOST.items():
            jobs["lost", name] = Job(text, (AssertTest(SWALLOWS),), SHORT, "f")
        for name, text in HARMS.items():
            text = f"{start}{text.replace('BYSTANDER', str(self.bystander.pid))}\nprint('refused')"
            jobs["harm", name] = Job(text, (IoTest("", "refused"),), Limits(seconds=3.0))
        jobs["state", "zygote"] = Job(STATE, (IoTest("x\n", "[] False"),) * 3, Limits(seconds=3.0))
        for number in range(4):
            jobs["state", f"server {number}"] = Job(STATE, (IoTest("x\n", "[] False"),), Limits(seconds=3.0))
        self.results = {key: self.sandbox.submit(job) for key, job in jobs.items()}

    def verdicts(self, kind: str, name: str) -> list[Verdict]:
        return [result.verdict for result in self.results[kind, name].result(timeout=120)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    suite = Suite(tmp_path_factory.mktemp("outside"))
    yield suite
    suite.bystander.kill()
    suite.bystander.wait()
    suite.sandbox.close()
    os.environ.pop("PASSWORD")


KNOWS = [name for name in FORGERIES if name.startswith("right answer")]
EXPECTED = {  # where the verdict itself matters, not only that it is none of "passed"
    "right answer, then exit 1": Verdict.EXCEPTION,
    "right answer, then hang": Verdict.TIMEOUT,
    "right answer, then killed": Verdict.EXCEPTION,
    "right answer, then noise": Verdict.TOO_MUCH_OUTPUT,
    "closed descriptors, then sleep": Verdict.TIMEOUT,
    "nothing": Verdict.WRONG_ANSWER,
    "sys.exit": Verdict.WRONG_ANSWER,
    "os._exit": Verdict.WRONG_ANSWER,
    "segmentation fault": Verdict.EXCEPTION,
    "endless loop": Verdict.TIMEOUT,
    "endless sleep": Verdict.TIMEOUT,
    "signals ignored": Verdict.TIMEOUT,
    "BaseException swallowed": Verdict.TIMEOUT,
    "endless stdout": Verdict.TOO_MUCH_OUTPUT,
    "endless stderr": Verdict.TOO_MUCH_OUTPUT,
    "one long line": Verdict.TOO_MUCH_OUTPUT,
    "3 GB": Verdict.OUT_OF_MEMORY,
    "10 GB in steps": Verdict.OUT_OF_MEMORY,
    "ten children of 100 MB": Verdict.OUT_OF_MEMORY,
    "NUL in the source": Verdict.EXCEPTION,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_not_passed(suite, name):
    (verdict,) = suite.verdicts("program", name)
    assert verdict != Verdict.PASSED and verdict == EXPECTED.get(name, verdict)


@pytest.mark.parametrize("kind", ["import", "call"])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_in_a_function_is_not_passed(suite, kind, name):
    assert suite.verdicts(kind, name) != [Verdict.PASSED]


@pytest.mark.parametrize("name", CALLS)
def test_a_forged_answer_is_not_passed(suite, name):
    assert Verdict.PASSED not in suite.verdicts("function", name)


@pytest.mark.parametrize("name", LOST)
def test_a_call_without_an_answer_is_not_passed_by_a_test_that_catches_everything(suite, name):
    assert suite.verdicts("lost", name) != [Verdict.PASSED]


@pytest.mark.parametrize("name", HARMS)
def test_harm_is_refused(suite, name):
    (result,) = suite.results["harm", name].result(timeout=60)
    killed = name in ("a family of reapers", "kill everything", "kill others", "kill the group of the parent")
    assert "BREACH" not in result.stdout, result.stdout
    assert result.verdict == Verdict.PASSED or killed, result
    assert (suite.directory / "canary").read_text() == "alive"
    assert suite.bystander.poll() is None and os.getpriority(
        os.PRIO_PROCESS, suite.bystander.pid
    ) == os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.parametrize("name", ["zygote", "server 0", "server 1", "server 2", "server 3"])
def test_no_state_is_carried_to_the_next_test(suite, name):
    results = suite.results["state", name].result(timeout=60)
    assert [result.verdict for result in results] == [Verdict.PASSED] * len(results), results


def left_behind() -> list[str]:
    """What the attacks would have left: processes by name, files, and mounts."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += [name for name in (Path(f"/proc/{pid}/comm").read_text(),) if "attack-daemon" in name]
        except OSError:
            pass
    for place in ("/tmp", "/dev/shm", "/var/tmp", str(PROJECT), str(PROJECT / "tests"), "/"):
        found += [name for name in os.listdir(place) if "attack-left" in name] if os.path.isdir(place) else []
    return found


def homes_of(keeper: int) -> list[Path]:
    return list(Path("/tmp").glob(f"sandbox-{keeper}-*"))


def test_nothing_is_left_of_the_suite_and_a_bystander_lives(suite):
    """Last: waits for every attack, closes a sandbox of its own, and looks for what is left."""
    for future in suite.results.values():
        future.result(timeout=120)
    assert suite.bystander.poll() is None and (suite.directory / "canary").read_text() == "alive"
    assert os.listdir(suite.directory) == ["canary"]
    assert suite.sandbox._keeper.process.poll() is None and suite.sandbox._keeper.process.pid == suite.keeper
    assert left_behind() == []
    with Sandbox(workers=2) as another:
        hostile = [
            FORGERIES[name] for name in ("3,000 nested directories", "an orphan holds stdout", "fork bomb")
        ]
        another.run([Job(text, (IoTest("", ""),) * 3, SHORT) for text in hostile])
        server = another._keeper.process.pid
        assert homes_of(server)
    assert not os.path.exists(f"/proc/{server}") and not homes_of(server)
    assert f"/tmp/sandbox-{server}-" not in Path("/proc/self/mounts").read_text()
    parents = [
        line.split()[1]
        for line in subprocess.run(
            ["ps", "-eo", "pid,ppid"], capture_output=True, text=True
        ).stdout.splitlines()
    ]
    assert str(server) not in parents


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_sandbox_ends_with_its_caller():
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\nfrom sandbox import *\ns = Sandbox(1)\n"
        "s.submit(Job('while True: pass', (IoTest('', ''),)))\nprint(s._keeper.process.pid, flush=True)\n"
        "import time; time.sleep(60)"
    )
    caller = subprocess.Popen([sys.executable, "-c", script, str(PROJECT)], stdout=subprocess.PIPE)
    keeper = int(caller.stdout.readline())
    time.sleep(0.3)
    assert homes_of(keeper)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (homes_of(keeper) or alive(keeper)):
        time.sleep(0.05)
    assert not homes_of(keeper) and not alive(keeper)
