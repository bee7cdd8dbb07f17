"""A pickle of unknown origin as plain data: no import, no call, no object, whatever it says.

`pickle.load` runs what a file tells it to run. This reader walks the opcodes instead (`pickletools.genops` executes
nothing) and keeps numbers, texts and containers; whatever would be imported or called becomes a `Call` that records
its name and arguments. Used by the doctor on checkpoints that we did not write.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

LARGEST_PICKLE = 64 << 20
"""A longer one is not read: the pickles of checkpoints hold names and shapes, not weights."""


class PickleError(ValueError):
    """The bytes are no whole pickle, or use what checkpoints have no need of; the message says which."""


@dataclasses.dataclass
class Call:
    """What would have been imported, or called: `name` is "module attribute"."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that a pickle describes: its shape, and the record that holds its numbers."""

    shape: tuple[int, ...]
    record: str
    """Name of the storage below `data/`."""
    num_bytes: int
    """Size of the whole storage, which several tensors may share."""


_MARK = object()
_ELEMENT_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
_REBUILDS_TENSOR = "torch._utils _rebuild_tensor_v2"


def read_pickle(content: bytes) -> Any:
    """Return what a pickle describes. Raises PickleError."""
    return _run(content).stack.pop()


def list_imports(content: bytes) -> frozenset[str]:
    """List what loading a pickle would import, each as "module attribute". Raises PickleError."""
    return frozenset(_run(content).imports)


def _run(content: bytes) -> _Machine:
    if len(content) > LARGEST_PICKLE:
        raise PickleError(f"the pickle has {len(content)} bytes, more than a checkpoint's ever has")
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                if not machine.stack:
                    raise PickleError("the pickle holds nothing")
                return machine
            machine.step(opcode.name, argument)
    except PickleError:
        raise
    except Exception as error:
        # Damaged bytes fail in any way: a missing mark, an unknown opcode, text that is no UTF-8.
        raise PickleError(f"the pickle is damaged: {error}") from error
    raise PickleError("the pickle is cut off")


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.imports: set[str] = set()

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop_last(_TUPLES[name])))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"the pickle uses {name}, which no checkpoint needs")

    def pop_last(self, number: int) -> list[Any]:
        if number > len(self.stack):
            raise PickleError("the pickle takes more than it has put")
        values = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return values

    def pop_marked(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def call(self, _argument: Any) -> None:
        function, arguments = self.pop_last(2)
        name = function.name if isinstance(function, Call) else repr(function)
        made = Call(name, arguments if isinstance(arguments, tuple) else ())
        self.stack.append({} if name == "collections OrderedDict" and not made.arguments else made)

    def set_state(self, _argument: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, dict):
                target[key if isinstance(key, str | int | float | bool | None) else repr(key)] = value
            elif isinstance(target, Call):
                target.items.append((key, value))

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target if isinstance(target, list) else target.items).extend(values)

    def remember(self, argument: Any) -> None:
        self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]

    def stack_global(self, _argument: Any) -> None:
        module, attribute = self.pop_last(2)
        self.import_name(f"{module} {attribute}")

    def import_name(self, name: str) -> None:
        self.imports.add(name)
        self.stack.append(Call(name))


_PUSHES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_marked())),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_marked()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_marked()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    "GLOBAL": lambda machine, argument: machine.import_name(str(argument)),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": lambda machine, _: machine.stack.append(Call("storage", (machine.stack.pop(),))),
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GET": lambda machine, argument: machine.stack.append(machine.memo[int(argument)]),
    "BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "LONG_BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_marked(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
}


def list_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """List the tensors below a value that was read, each with the key it stands under."""
    return list(_walk(value))


def _walk(value: Any) -> Iterator[tuple[str, Tensor]]:
    # Shared parts are visited once: a small pickle can describe a walk without end.
    waiting, seen = [("", value)], set()
    while waiting:
        key, one = waiting.pop()
        tensor = as_tensor(one)
        if tensor is not None:
            yield key, tensor
            continue
        if not isinstance(one, dict | list | tuple | Call) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            waiting += [(str(name), inner) for name, inner in one.items()]
        elif isinstance(one, Call):
            waiting += [(key, inner) for inner in (one.arguments, one.state, one.items)]
        else:
            waiting += [(key, inner) for inner in one]


def as_tensor(value: Any) -> Tensor | None:
    """Return the tensor that a recorded call describes; None for anything else."""
    if not isinstance(value, Call) or value.name != _REBUILDS_TENSOR or len(value.arguments) < 3:
        return None
    storage, _, shape = value.arguments[:3]
    try:
        _, kind, record, _, number = storage.arguments[0]
        return Tensor(tuple(shape), str(record), int(number) * _ELEMENT_BYTES.get(_short(kind), 1))
    except (AttributeError, IndexError, TypeError, ValueError):
        return None


def _short(kind: Any) -> str:
    """Return `BFloat16` of `torch BFloat16Storage`."""
    return str(getattr(kind, "name", "")).rpartition(" ")[2].removesuffix("Storage")
