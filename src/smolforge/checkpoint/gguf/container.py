"""The GGUF container: named values and named tensors in one file, little-endian.

    "GGUF" | version | tensors | values | key, type, value ... | name, shape, type, offset ... | padding | data

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shapes stand innermost first there and outermost first
here. As llama.cpp demands it, the data of each tensor begins where that before it ends, padded to the alignment.
A file from outside may say anything, so nothing is believed before it is held to the bytes there are.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.checkpoint.gguf.block_types import BY_NUMBER, TYPES, Type, from_blocks, to_blocks
from smolforge.errors import InvalidFile

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of values by their numbers, as `struct` has them."""
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
MOST_BYTES, MOST_VALUES, MOST_TENSORS, MOST_AXES = 64 << 20, 3 << 19, 1 << 16, 4
"""What may stand before the data: far beyond any model of today."""
LONGEST_NAME = 256
LENGTH = struct.Struct("<Q")
Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    type: Type
    start: int
    """Where in the file its bytes begin."""

    @property
    def bytes(self) -> int:
        return self.type.bytes_of(prod(self.shape))


class File:
    """A file's values and tensors; the data of a tensor is read when it is asked for.

    Raises InvalidFile where it is broken, cut, or holds a type of tensor that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = Head(path, file.read(MOST_BYTES), size)
        except OSError as error:
            raise InvalidFile(f"{path} cannot be read: {error.strerror}") from None
        self.values, self.tensors = head.read()

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        """A tensor in fp32."""
        stored = self.tensors[name]
        content = torch.empty(stored.bytes, dtype=torch.uint8)
        memory: Any = content.numpy()
        try:
            with self.path.open("rb") as file:
                file.seek(stored.start)
                whole = file.readinto(memory) == stored.bytes
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be read: {error.strerror}") from None
        if not whole:
            raise InvalidFile(f"{self.path} ends within {name}; it was cut while it was read")
        return from_blocks(content, stored.type, stored.shape)


class Head:
    """What stands before the data, read from front to back and never further than there is."""

    def __init__(self, path: Path, content: bytes, size: int) -> None:
        self.path, self.content, self.size = path, content, size
        self.place, self.values_left = 0, MOST_VALUES

    def read(self) -> tuple[dict[str, Value], dict[str, Stored]]:
        """The values, and where each tensor is. Raises InvalidFile for what is not so."""
        if self.take(4) != MAGIC:
            raise self.broken("does not begin with GGUF, so it is no such file")
        version = self.number("I")
        if version not in VERSIONS:
            big = " (written for a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise self.broken(f"has version {version}{big}; versions 2 and 3, little-endian, are read")
        count, values = self.number("Q"), self.number("Q")
        if count > MOST_TENSORS or values > MOST_TENSORS:
            raise self.broken(f"claims {count:,} tensors and {values:,} values, more than any real one")
        found: dict[str, Value] = {}
        for _ in range(values):
            self.add(found, self.text(), self.value)
        return found, self.placed(found.get("general.alignment", ALIGNMENT), count)

    def placed(self, alignment: Value, count: int) -> dict[str, Stored]:
        """The tensors, with where each begins."""
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.broken(f"has general.alignment {alignment!r}; a power of two of at least 8 is needed")
        named: dict[str, tuple[tuple[int, ...], Type, int]] = {}
        for _ in range(count):
            self.add(named, self.text(), self.tensor)
        start = padded(self.place, alignment)
        tensors: dict[str, Stored] = {}
        end = 0
        for name, (shape, kind, offset) in named.items():
            if offset != end:
                raise self.broken(f"has the data of {name} at {offset:,}, where {end:,} follows on the tensor before")
            tensors[name] = Stored(shape, kind, start + offset)
            end = padded(offset + tensors[name].bytes, alignment)
            if tensors[name].start + tensors[name].bytes > self.size:
                raise self.broken(f"has {self.size:,} bytes and ends before {name} does; it was cut")
        return tensors

    def add(self, found: dict[str, Any], name: str, read: Any) -> None:
        if len(name) > LONGEST_NAME:
            raise self.broken(f"has a name of {len(name):,} characters")
        if name in found:
            raise self.broken(f"has {name!r} twice")
        found[name] = read(name)

    def value(self, key: str) -> Value:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(key)
        if kind not in NUMBERS:
            raise self.broken(f"has {key} of type {kind}, which GGUF does not have")
        return self.number(NUMBERS[kind])

    def array(self, key: str) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > self.values_left:
            raise self.broken(f"has {count:,} entries in {key}, more than any real one")
        self.values_left -= count
        if kind == STRING:
            return self.texts(count)
        if kind not in NUMBERS:
            raise self.broken(f"has {key} with entries of type {kind}, which is not read here")
        form = f"<{count}{NUMBERS[kind]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))

    def tensor(self, name: str) -> tuple[tuple[int, ...], Type, int]:
        """Shape, type, and offset in the data."""
        axes = self.number("I")
        if not 1 <= axes <= MOST_AXES:
            raise self.broken(f"has {name} with {axes:,} axes; 1 to {MOST_AXES} are possible")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        kind, offset = BY_NUMBER.get(number := self.number("I")), self.number("Q")
        if kind is None:
            raise self.broken(f"has {name} of ggml's type {number}; those read here are {', '.join(TYPES)}")
        if shape[-1] % kind.size or not 0 < prod(shape) <= self.size * kind.size:
            raise self.broken(f"has {name} of shape {shape}, which a file of {self.size:,} bytes cannot hold")
        return shape, kind, offset

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """So many texts, each behind its length; in one loop, since a vocabulary has hundreds of thousands."""
        content, place, found = self.content, self.place, []
        try:
            for _ in range(count):
                begin = place + 8
                place = begin + LENGTH.unpack_from(content, place)[0]
                if place > len(content):
                    raise self.short()
                found.append(content[begin:place].decode())
        except struct.error:
            raise self.short() from None
        except UnicodeDecodeError:
            raise self.broken("has a text that is not UTF-8") from None
        self.place = place
        return found

    def take(self, count: int) -> bytes:
        begin, self.place = self.place, self.place + count
        if self.place > len(self.content):
            raise self.short()
        return self.content[begin : self.place]

    def short(self) -> InvalidFile:
        return self.broken("ends before its values do, or claims more of them than any real one has")

    def broken(self, said: str) -> InvalidFile:
        return InvalidFile(f"{self.path} {said}")


def write(path: Path, values: Mapping[str, Value], tensors: Mapping[str, Tensor], types: Mapping[str, Type]) -> None:
    """Write a file. Whole numbers become uint32, in lists int32; others float32."""
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(values)))
    for key, value in values.items():
        head += packed(key) + packed_with_type(value)
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += packed(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", types[name].number, offset)
        offset = padded(offset + types[name].bytes_of(tensor.numel()), ALIGNMENT)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for name, tensor in tensors.items():
            content: Any = to_blocks(tensor.detach().cpu(), types[name]).numpy()
            file.write(memoryview(content))
            file.write(bytes(-len(content) % ALIGNMENT))


def packed(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def packed_with_type(value: Value) -> bytes:
    """A value as files have it: its type, then itself."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + packed(value)
    if all(isinstance(each, str) for each in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(packed, value))
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
