"""Read pickle streams without executing anything.

A pickle is a program for a stack machine. Two of its instructions import what the file names and call it; that is how a
checkpoint runs code. The machine here knows no import at all: it has the instructions that build plain data, and a name
in the stream is looked up in a table of the caller, whose functions make inert records. Whatever is not in the table,
and every instruction that is not needed for data, is refused with its byte offset. The instructions and the operands
are decoded by `pickletools.genops` of the standard library, which executes nothing either.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_INSTRUCTIONS = 2_000_000  # a one-byte instruction takes up to 200 bytes of memory; real checkpoints have far fewer


class Record:
    """An inert stand-in for an object; BUILD hands it the object's state."""

    def set_state(self, state: Any) -> None:
        """Take the state that the stream gives."""
        raise ValueError(f"a {type(self).__name__} has no state")


Constructor = Callable[..., Any]


@dataclass(frozen=True)
class Global:
    """A name of the caller's table on the stack."""

    name: str
    construct: Constructor


def read_pickle(
    stream: io.BytesIO, constructors: Mapping[str, Constructor], persistent: Constructor | None = None
) -> Any:
    """Read one pickle; the stream is left behind its end.

    Args:
        stream: at the first byte of a pickle.
        constructors: what may be named, as "module name", with the function that gets the arguments of a call
            (REDUCE, NEWOBJ) and returns plain data or a `Record`.
        persistent: gets the identifier of an object that is stored outside of the stream.

    Returns:
        The object: plain data and what the constructors returned.

    Raises:
        ValueError: for a global that is not in the table, an instruction that is not plain data, and a stream that is
            cut off or inconsistent; the message begins with the offset of the instruction.
    """
    machine = _Machine(constructors, persistent)
    position = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    stream.seek(position)
    instructions = pickletools.genops(stream)
    try:
        for _ in range(MAX_INSTRUCTIONS):
            instruction, operand, _ = next(instructions)
            if instruction.name == "STOP":
                return machine.result()
            remaining = size - stream.tell()
            if instruction.name == "FRAME" and int(operand or 0) > remaining:
                raise ValueError(f"a frame of {operand} bytes is announced, but only {remaining} remain")
            machine.execute(instruction.name, operand)
            position = stream.tell()
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"byte {position}: {error}") from error
    raise ValueError(f"byte {position}: more than {MAX_INSTRUCTIONS} instructions")


class _Machine:
    """Stack, marks and memo."""

    def __init__(self, constructors: Mapping[str, Constructor], persistent: Constructor | None) -> None:
        self.constructors, self.persistent = constructors, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise ValueError("the stream ends, but does not leave one object")
        return self.stack[0]

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError(f"{count} objects are needed, but the stack holds {len(self.stack)}")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def execute(self, name: str, operand: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                push(operand)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":
                push(operand)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                push(operand)
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT":
                self.memo[operand] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[operand])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_SET":
                push(set())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self.pop(int(name[-1]))))
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.pop_mark())
            case "ADDITEMS":
                self.add(self.pop_mark())
            case "SETITEM":
                self.set_items(self.pop(2))
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "GLOBAL":
                push(self.find(operand))
            case "STACK_GLOBAL":
                module, attribute = self.pop(2)
                if type(module) is not str or type(attribute) is not str:
                    raise ValueError("the name of a global is not text")
                push(self.find(f"{module} {attribute}"))
            case "REDUCE" | "NEWOBJ":
                called, arguments = self.pop(2)
                if type(called) is not Global or type(arguments) is not tuple:
                    raise ValueError("what is called is not a global, or its arguments are not a tuple")
                push(self.call(called, arguments))
            case "BUILD":
                (state,) = self.pop(1)
                if not isinstance(self.stack[-1], Record):
                    raise ValueError(f"a state is given to a {type(self.stack[-1]).__name__}, which has none")
                self.stack[-1].set_state(state)
            case "BINPERSID" if self.persistent is not None:
                push(self.persistent(self.pop(1)[0]))
            case _:
                raise ValueError(f"the instruction {name} does not occur in checkpoints and is refused")

    def find(self, name: str) -> Global:
        if name not in self.constructors:
            shown = name[:120].replace(" ", ".", 1)
            raise ValueError(f"the global {shown!a} does not belong in a checkpoint; it was not imported")
        return Global(name, self.constructors[name])

    @staticmethod
    def call(called: Global, arguments: tuple[Any, ...]) -> Any:
        try:
            return called.construct(*arguments)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise ValueError(f"in {called.name.replace(' ', '.')}: {error}") from error

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError(f"items are appended to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise ValueError(f"items are added to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(text_keys(items))

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise ValueError(f"keys and values are given to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(text_keys(items[::2]), items[1::2], strict=True))


def text_keys(keys: list[Any]) -> list[str]:
    """Let only text be a key: hashing a deeply nested tuple would overflow the interpreter's stack."""
    for key in keys:
        if type(key) is not str:
            raise ValueError(f"a key is a {type(key).__name__}, but only text is expected")
    return keys
