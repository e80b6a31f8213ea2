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
from jaxtyping import Float, UInt8
from torch import Tensor

from smolforge.checkpoint.gguf.block_types import (
    BLOCK_TYPE_BY_NUMBER,
    BLOCK_TYPES,
    BlockType,
    from_blocks,
    to_blocks,
    type_name,
)
from smolforge.errors import InvalidFileError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of values by their numbers, as `struct` has them."""
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
MAX_HEADER_BYTES, MAX_ARRAY_VALUES, MAX_TENSORS, MAX_AXES = 64 << 20, 3 << 19, 1 << 16, 4
"""Limits on what comes before the data: far beyond any model of today."""
MAX_NAME_LENGTH = 256
LENGTH = struct.Struct("<Q")
MetadataValue = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file."""

    shape: tuple[int, ...]
    type: BlockType
    path: Path
    start: int
    """Where in the file its bytes begin."""

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(prod(self.shape))


Header = tuple[dict[str, MetadataValue], dict[str, TensorInfo]]
"""The values of a file, and where each of its tensors is."""


def read_header(path: Path) -> Header:
    """Return what comes before the data of one file. Raises InvalidFileError where it is broken or cut."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = HeaderParser(path, file.read(MAX_HEADER_BYTES), size)
    except OSError as error:
        raise InvalidFileError(f"{path} cannot be read: {error.strerror}") from None
    return head.parse()


def read_tensor(stored: TensorInfo) -> Float[Tensor, "..."]:
    """Return a tensor of a file in fp32."""
    content = torch.empty(stored.nbytes, dtype=torch.uint8)
    memory: Any = content.numpy()
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            complete = file.readinto(memory) == stored.nbytes
    except OSError as error:
        raise InvalidFileError(f"{stored.path} cannot be read: {error.strerror}") from None
    if not complete:
        raise InvalidFileError(f"{stored.path} ends within a tensor; it was cut while it was read")
    return from_blocks(content, stored.type, stored.shape)


class HeaderParser:
    """Parser of what comes before the data. It reads front to back, and never past the end of the bytes."""

    def __init__(self, path: Path, content: bytes, size: int) -> None:
        self.path, self.content, self.size = path, content, size
        self.position, self.values_left = 0, MAX_ARRAY_VALUES

    def parse(self) -> Header:
        """The values, and where each tensor is. Raises InvalidFileError for what is not so."""
        if self.read_bytes(4) != MAGIC:
            raise self.invalid_file("does not begin with GGUF, so it is no such file")
        version = self.read_number("I")
        if version not in VERSIONS:
            big = " (written for a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise self.invalid_file(f"has version {version}{big}; versions 2 and 3, little-endian, are read")
        tensor_count, value_count = self.read_number("Q"), self.read_number("Q")
        if tensor_count > MAX_TENSORS or value_count > MAX_TENSORS:
            raise self.invalid_file(
                f"claims {tensor_count:,} tensors and {value_count:,} values, more than any real one"
            )
        metadata: dict[str, MetadataValue] = {}
        for _ in range(value_count):
            self.add_entry(metadata, self.read_string(), self.read_value)
        return metadata, self.read_tensor_infos(metadata.get("general.alignment", ALIGNMENT), tensor_count)

    def read_tensor_infos(self, alignment: MetadataValue, count: int) -> dict[str, TensorInfo]:
        """Parse the tensor infos; return each tensor with the offset of its first byte."""
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.invalid_file(f"has general.alignment {alignment!r}; a power of two of at least 8 is needed")
        entries: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
        for _ in range(count):
            self.add_entry(entries, self.read_string(), self.read_tensor_info)
        start = align_offset(self.position, alignment)
        tensors: dict[str, TensorInfo] = {}
        end = 0
        for name, (shape, kind, offset) in entries.items():
            if offset != end:
                raise self.invalid_file(
                    f"has the data of {name} at {offset:,}, where {end:,} follows on the tensor before"
                )
            tensors[name] = TensorInfo(shape, kind, self.path, start + offset)
            end = align_offset(offset + tensors[name].nbytes, alignment)
            if tensors[name].start + tensors[name].nbytes > self.size:
                raise self.invalid_file(f"has {self.size:,} bytes and ends before {name} does; it was cut")
        return tensors

    def add_entry(self, entries: dict[str, Any], name: str, read_value: Any) -> None:
        if len(name) > MAX_NAME_LENGTH:
            raise self.invalid_file(f"has a name of {len(name):,} characters")
        if name in entries:
            raise self.invalid_file(f"has {name!r} twice")
        entries[name] = read_value(name)

    def read_value(self, key: str) -> MetadataValue:
        kind = self.read_number("I")
        if kind == STRING:
            return self.read_string()
        if kind == ARRAY:
            return self.read_array(key)
        if kind not in NUMBER_FORMATS:
            raise self.invalid_file(f"has {key} of type {kind}, which GGUF does not have")
        return self.read_number(NUMBER_FORMATS[kind])

    def read_array(self, key: str) -> list[Any]:
        kind, count = self.read_number("I"), self.read_number("Q")
        if count > self.values_left:
            raise self.invalid_file(f"has {count:,} entries in {key}, more than any real one")
        self.values_left -= count
        if kind == STRING:
            return self.read_strings(count)
        if kind not in NUMBER_FORMATS:
            raise self.invalid_file(f"has {key} with entries of type {kind}, which is not read here")
        form = f"<{count}{NUMBER_FORMATS[kind]}"
        return list(struct.unpack(form, self.read_bytes(struct.calcsize(form))))

    def read_tensor_info(self, name: str) -> tuple[tuple[int, ...], BlockType, int]:
        """Shape, type, and offset in the data."""
        axes = self.read_number("I")
        if not 1 <= axes <= MAX_AXES:
            raise self.invalid_file(f"has {name} with {axes:,} axes; 1 to {MAX_AXES} are possible")
        shape = tuple(self.read_number("Q") for _ in range(axes))[::-1]
        kind, offset = BLOCK_TYPE_BY_NUMBER.get(number := self.read_number("I")), self.read_number("Q")
        if kind is None:
            raise self.invalid_file(
                f"has {name} in {type_name(number)}, which is not read; {', '.join(BLOCK_TYPES)} are. llama-quantize "
                "--allow-requantize converts it to one of them, or take another file of this model"
            )
        if shape[-1] % kind.block_size:
            raise self.invalid_file(
                f"has {name} of shape {shape}, whose rows are no whole blocks of {kind.block_size} as {kind.name} has"
            )
        if not 0 < prod(shape) <= self.size * kind.block_size:
            raise self.invalid_file(f"has {name} of shape {shape}, which a file of {self.size:,} bytes cannot hold")
        return shape, kind, offset

    def read_number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.read_bytes(struct.calcsize("<" + form)))[0]

    def read_string(self) -> str:
        return self.read_strings(1)[0]

    def read_strings(self, count: int) -> list[str]:
        """Read `count` strings, each after its length; in one loop, since a vocabulary has hundreds of thousands."""
        content, position, texts = self.content, self.position, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + LENGTH.unpack_from(content, position)[0]
                if position > len(content):
                    raise self.truncated_error()
                texts.append(content[start:position].decode())
        except struct.error:
            raise self.truncated_error() from None
        except UnicodeDecodeError:
            raise self.invalid_file("has a text that is not UTF-8") from None
        self.position = position
        return texts

    def read_bytes(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.content):
            raise self.truncated_error()
        return self.content[start : self.position]

    def truncated_error(self) -> InvalidFileError:
        return self.invalid_file("ends before its values do, or claims more of them than any real one has")

    def invalid_file(self, problem: str) -> InvalidFileError:
        return InvalidFileError(f"{self.path} {problem}")


def write(
    path: Path,
    values: Mapping[str, MetadataValue],
    tensors: Mapping[str, Tensor],
    *,
    types: Mapping[str, BlockType],
    encoded: Mapping[str, UInt8[Tensor, "..."]] | None = None,
) -> None:
    """Write a file. Whole numbers become uint32, in lists int32; others float32. `encoded` are blocks as they are."""
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(values)))
    for key, value in values.items():
        head += encode_string(key) + encode_value(value)
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += encode_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", types[name].type_id, offset)
        offset = align_offset(offset + types[name].nbytes(tensor.numel()), ALIGNMENT)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for name, tensor in tensors.items():
            blocks = (
                encoded[name].flatten()
                if encoded and name in encoded
                else to_blocks(tensor.detach().cpu(), types[name])
            )
            content: Any = blocks.numpy()
            file.write(memoryview(content))
            file.write(bytes(-len(content) % ALIGNMENT))


def encode_string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def encode_value(value: MetadataValue) -> bytes:
    """Encode a value as files have it: its type, then itself."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + encode_string(value)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(encode_string, value))
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)


def align_offset(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
