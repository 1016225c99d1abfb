"""Messages between the caller, its servers, the judges and the programs, and the codec for plain data.

A message is a dict as JSON with its length in front, on a socket; file descriptors travel beside it. Texts
that nobody on the way may see are files in memory. Judge and program pack values by a strict codec, because a
program may send anything.
"""

import importlib
import itertools
import json
import os
import re
import socket
import struct
import sys

LONGEST = 1 << 30  # bytes of a message
RPC_DEPTH = 200  # deepest nesting of a value
PIECE = 1 << 13  # items of a list that are packed together
NO_VERDICT = "no verdict"  # what a judge says where a row is wrong, not the program
SHOWN = 2000  # characters of a value or a traceback in a result
# How each plain type reads an instance: a subclass may say anything about itself.
READERS = {int: int.__index__, float: float.__float__, complex: complex.__complex__}
READERS |= {str: str.__str__, bytes: bytes.__bytes__, dict: dict.items}
READERS |= {kind: kind.__iter__ for kind in (list, tuple, set, frozenset)}
AS_THEY_ARE = {bool, str, float, type(None)}  # in JSON
MAKERS = {"list": list, "set": set, "frozenset": frozenset}
# Words that come again and again, as in the combinations of some, are one object each, as they were.
MAKERS["tuple"] = lambda items: tuple(sys.intern(item) if type(item) is str else item for item in items)
MAKERS |= {"complex": lambda parts: complex(*parts)}
MAKERS |= {"dict": lambda parts: dict(zip(parts[::2], parts[1::2], strict=True)), "iterator": iter}
# Types that are made anew from what their `__reduce__` or their items say, and the modules that have them.
REBUILT = {"range": "builtins", "bytearray": "builtins", "deque": "collections", "Fraction": "fractions"}
REBUILT |= {"Decimal": "decimal", **dict.fromkeys(("date", "datetime", "time", "timedelta"), "datetime")}


def send(channel: socket.socket, message: dict, descriptors: list[int] = (), data: list = ()) -> None:
    """Send a message, with `data` after it. The descriptors go with it and are closed here."""
    text = json.dumps(message).encode()
    parts = [struct.pack("!Q", len(text)), text, *data]
    try:
        sent = socket.send_fds(channel, parts, list(descriptors))  # all at once: the other side wakes once
        for part in parts:
            if sent < len(part):
                channel.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def read_bytes(channel: socket.socket, length: int) -> bytearray:
    """Exactly `length` bytes. Raises EOFError if the other side has closed the channel."""
    data = bytearray()
    while len(data) < length:
        piece = channel.recv(min(1 << 20, length - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return data


def receive(channel: socket.socket, most_files: int = 0, unpacks: bool = False) -> tuple[dict, list[int]]:
    """The next message and its descriptors, with its values unpacked if they were packed.

    Raises: EOFError if the channel is closed; another Exception if it is no message.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, 8, most_files)
    if not header:
        raise EOFError
    (length,) = struct.unpack("!Q", header + read_bytes(channel, 8 - len(header)))
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes, more than {LONGEST}")
    text = read_bytes(channel, length).decode()
    return json.loads(text, object_hook=unpack if unpacks else None), descriptors


def memory_file(text: str) -> int:
    """The descriptor of a new file in memory with this text."""
    descriptor = os.memfd_create("sandbox")
    os.pwrite(descriptor, text.encode("utf-8", "surrogatepass"), 0)
    return descriptor


def contents(memory_file: int) -> str:
    """The text of a file that `memory_file` made."""
    length = os.lseek(memory_file, 0, os.SEEK_END)
    return os.pread(memory_file, length, 0).decode("utf-8", "surrogatepass")


def cut(text: str, length: int) -> str:
    """The start of a text, with a visible mark if something is left out."""
    return text if len(text) <= length else f"{text[:length]}\n[cut]"


def pack(value: object, depth: int = 0) -> object:
    """Plain data as JSON's types; TypeError for everything else.

    An object of a subclass (Counter, namedtuple, IntEnum) is packed as its plain type reads it.
    """
    if value is None or type(value) is bool:
        return value
    if depth > RPC_DEPTH:
        raise TypeError(f"a value nested deeper than {RPC_DEPTH} levels")
    kind = type(value)
    if kind not in READERS:
        kind = next((plain for plain in READERS if issubclass(kind, plain)), None)
        if kind is None:
            return pack_other(value, type(value).__name__, type(value).__module__, depth)
    value = READERS[kind](value)
    if kind in (str, float) or kind is int and abs(value) < 1 << 63:
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        value = value.real, value.imag
    if kind is dict:
        value = itertools.chain.from_iterable(value)
    items = [item if type(item) in AS_THEY_ARE else pack(item, depth + 1) for item in value]
    return items if kind is list else {kind.__name__: items}


def pack_other(value: object, name: str, module: str, depth: int) -> object:
    """The same for what is of no subclass of a plain type; a number of numpy as Python's.

    A match counts as the tuple of its text and groups: functions of MBPP+ may return one as something true.
    """
    if type(value) is re.Match:
        return pack((value[0], *value.groups()), depth)
    if module == "numpy" and hasattr(value, "tolist"):
        packed = pack(value.tolist(), depth)
        return {"array": packed} if name == "ndarray" else packed
    if name.startswith("dict_") and hasattr(value, "mapping"):  # a view
        items = itertools.chain.from_iterable(dict(value.mapping).items())
    elif hasattr(type(value), "__next__"):  # an endless one reaches the limits, as by list()
        name, items = "iterator", value
    elif REBUILT.get(name) == module:
        items = [list(value)] if name == "deque" else value.__reduce__()[1]
    else:
        raise TypeError(f"a value of type {name} is not plain data")
    return {name: [pack(item, depth + 1) for item in items]}


def unpack(packed: dict) -> object:
    """The value that `pack` made this object of; an Exception of some type if it makes none like it."""
    if len(packed) != 1:  # the message itself
        return packed
    ((kind, content),) = packed.items()
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "array":  # where numpy is not loaded, or replaced, a list
        make = getattr(sys.modules.get("numpy"), "array", None)
        return make(content) if make else content
    if kind in REBUILT:
        return getattr(importlib.import_module(REBUILT[kind]), kind)(*content)
    if kind.startswith("dict_"):
        return getattr(MAKERS["dict"](content), kind.removeprefix("dict_"))()
    return MAKERS[kind](content)
