"""A model in one file, or in several as llama-gguf-split writes them, each with some of the tensors.

    name-00001-of-00003.gguf    all values, and split.no 0, split.count 3, split.tensors.count 272
    name-00002-of-00003.gguf    split.no 1 ...

Any part may be named, and stands for all.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from smolforge.checkpoint.gguf.container import Header, MetadataValue, TensorInfo, read_header, read_tensor
from smolforge.errors import InvalidFileError

PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
NUMBER, COUNT, TENSOR_COUNT = "split.no", "split.count", "split.tensors.count"


class GGUFReader:
    """The values and tensors of a model; the data of a tensor is read when it is asked for.

    Raises InvalidFileError where a file is broken, cut or missing, or holds a type of tensor that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.tensors = read_header(path)
        self.paths = part_paths(path, self.metadata)
        if len(self.paths) > 1:
            self.metadata, self.tensors = join_parts({part: read_header(part) for part in self.paths})

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        """A tensor in fp32."""
        return read_tensor(self.tensors[name])


def first_part(path: Path) -> Path:
    """Return the file that has the values of a model, by its name alone."""
    match = PART_NAME.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")


def part_paths(path: Path, metadata: Mapping[str, MetadataValue]) -> list[Path]:
    """Return all files of a model by what one of them says. Raises InvalidFileError for one that is missing."""
    number, count = metadata.get(NUMBER), metadata.get(COUNT, 1)
    if count == 1:
        return [path]
    match = PART_NAME.fullmatch(path.name)
    if match is None or (int(match[2]) - 1, int(match[3])) != (number, count):
        raise InvalidFileError(
            f"{path} is not named as the part that it says to be, {NUMBER} {number!s:.20} of {count!s:.20}; its name "
            f"should end in -00001-of-00003.gguf where {NUMBER} is 0 and {COUNT} 3"
        )
    paths = [path.with_name(f"{match[1]}-{index:05}-of-{match[3]}.gguf") for index in range(1, int(match[3]) + 1)]
    missing = next((part.name for part in paths if not part.is_file()), None)
    if missing is not None:
        raise InvalidFileError(f"{path} is one of {count} parts of a model, and {missing} is not beside it")
    return paths


def join_parts(headers: Mapping[Path, Header]) -> Header:
    """Return the values and tensors of all parts. Raises InvalidFileError for a part of another model."""
    metadata, _ = next(iter(headers.values()))
    tensors: dict[str, TensorInfo] = {}
    for index, (path, (values, part_tensors)) in enumerate(headers.items()):
        expected = metadata | {NUMBER: index, COUNT: len(headers)}
        different = [key for key, value in values.items() if expected.get(key) != value]
        repeated = tensors.keys() & part_tensors.keys()
        if different or repeated or NUMBER not in values:
            problem = (
                f"has {min(repeated)} again" if repeated and not different else f"has another {[*different, NUMBER][0]}"
            )
            raise InvalidFileError(f"{path} is no part of the model that the parts before it are of: it {problem}")
        tensors |= part_tensors
    if len(tensors) != metadata.get(TENSOR_COUNT):
        raise InvalidFileError(
            f"{path} and the parts before it have {len(tensors):,} tensors together, where the first says "
            f"{metadata.get(TENSOR_COUNT)!s:.20}; they are not of one model"
        )
    return metadata, tensors
