"""Pickles that hold data and nothing else, such as CIFAR's: read without Python's unpickler, so that nothing in them is run.

A pickle is a program for a small stack machine (Python's `pickletools` describes it). Here the instructions that build
dictionaries, lists, tuples, numbers, text and bytes are followed, and of those that name and call something only what stands for
a uint8 array of numpy, and for bytes as Python 3 writes them with protocol 2. Whatever else a pickle asks for is refused by name.
"""

from __future__ import annotations

import pickletools
from math import prod
from typing import Any

import numpy as np
from attrs import define, frozen

VALUES = {  # the argument of the instruction is the value
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ENCODE, DTYPE, NDARRAY = "_codecs encode", "numpy dtype", "numpy ndarray"
ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
BYTE = ("u1", "uint8", "|u1")


@frozen
class _Name:
    """Something that the pickle names; never looked up."""

    name: str


@define(eq=False)
class _Array:
    """A uint8 array before and after its bytes are there."""

    values: Any = None


def read(data: bytes) -> Any:
    """What the pickle holds: dict, list, tuple, str, bytes, int, bool, None and uint8 arrays; keys of dictionaries are str.

    A ValueError says where it is damaged or asks for something else.
    """
    machine = _Machine(len(data))
    try:
        for instruction, argument, position in pickletools.genops(data):
            if instruction.name == "STOP":
                return _plain(machine.pop())
            machine.step(instruction.name, argument, position or 0)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged: its instructions do not fit each other ({type(error).__name__})") from error
    raise ValueError("it breaks off")


class _Machine:
    def __init__(self, most: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # where on the stack collections begin
        self.memo: dict[int, Any] = {}
        self.left = most  # bytes that may still be made out of text: a pickle is longer than what it holds

    def pop(self) -> Any:
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def step(self, name: str, argument: Any, position: int) -> None:
        """One instruction."""
        if name in ("PROTO", "FRAME"):
            return
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif not (self._collection(name) or self._call(name, argument)):
            raise ValueError(f"it asks for what plain data does not need: {name} at byte {position:,}; nothing of it was run")

    def _collection(self, name: str) -> bool:
        """Dictionaries, lists and tuples; whether it was one of their instructions."""
        if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            self.stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in TUPLES:
            count = TUPLES[name]
            items, self.stack[-count:] = tuple(self.stack[-count:]), []
            self.stack.append(items)
        elif name in ("TUPLE", "LIST"):
            self.stack.append((tuple if name == "TUPLE" else list)(self.to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items_ = [self.pop()] if name == "APPEND" else self.to_mark()
            _typed(self.stack[-1], list).extend(items_)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            flat = [self.stack.pop(-2), self.pop()] if name == "SETITEM" else self.to_mark()
            if name == "DICT":
                self.stack.append({})
            _typed(self.stack[-1], dict).update({_text(key): value for key, value in zip(flat[::2], flat[1::2], strict=True)})
        else:
            return False
        return True

    def _call(self, name: str, argument: Any) -> bool:
        """What names something or calls it; whether it was one of these instructions."""
        if name == "GLOBAL":
            self.stack.append(_known(argument))
        elif name == "STACK_GLOBAL":
            symbol, module = self.pop(), self.pop()
            self.stack.append(_known(f"{module} {symbol}"))
        elif name == "REDUCE":
            arguments = _typed(self.pop(), tuple)
            self.stack.append(self._made(_typed(self.pop(), _Name).name, arguments))
        elif name == "BUILD":
            state, target = self.pop(), self.stack[-1]
            if isinstance(target, _Array):
                target.values = _filled(_typed(state, tuple))
            elif target != _Name(DTYPE):
                raise ValueError("it gives a state to something that is no array")
        else:
            return False
        return True

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What the call of one of the names known here stands for."""
        if name == ENCODE:
            text, encoding = arguments
            self.left -= len(text)
            if encoding not in ("latin1", "latin-1") or self.left < 0:
                raise ValueError("its bytes are not written as Python writes them")
            return _typed(text, str).encode("latin-1")
        if name == DTYPE:
            if _text(arguments[0]) not in BYTE:
                raise ValueError(f"it holds an array of {_text(arguments[0])!r}, only uint8 ('u1') is read")
            return _Name(DTYPE)
        if name in ARRAY:
            return _Array()
        raise ValueError(f"it calls {name}")


def _known(name: str) -> _Name:
    if name not in (ENCODE, DTYPE, NDARRAY, *ARRAY):
        raise ValueError(f"it asks for {name.replace(' ', '.')}, which plain data does not need; nothing of it was run")
    return _Name(name)


def _filled(state: tuple[Any, ...]) -> Any:
    """uint8 array of the state (version, shape, type, whether the first axis is the fastest, bytes) that numpy pickles."""
    _, shape, dtype, first_fastest, held = state
    data = held.encode("latin-1") if isinstance(held, str) else _typed(held, bytes)  # text: Python 2's strings
    shape = tuple(_typed(length, int) for length in _typed(shape, tuple))
    if dtype != _Name(DTYPE) or min(shape, default=0) < 0 or prod(shape) != len(data):
        raise ValueError(f"it holds an array {list(shape)} with {len(data):,} bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if first_fastest else "C")


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"damaged: a {type(value).__name__.strip('_')} stands where a {kind.__name__.strip('_')} is needed")
    return value


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(_typed(value, str))


def _plain(value: Any) -> Any:
    """The array in place of what stood for it, in a dictionary or alone."""
    if isinstance(value, dict):
        return {key: _plain(item) if isinstance(item, _Array) else item for key, item in value.items()}
    return value.values if isinstance(value, _Array) else value
