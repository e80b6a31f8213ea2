"""Where each parameter is in nanotron's files, whole again and in our order -> a model."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from smolforge.checkpoint import huggingface
from smolforge.checkpoint.families import from_hugging_face, read_json
from smolforge.checkpoint.huggingface import DTYPES, expected_shapes
from smolforge.config import ModelConfig
from smolforge.errors import InvalidFileError
from smolforge.models.decoder import LanguageModel, empty_model
from smolforge.models.family import TensorLocation, all_families, family_of

CONFIG, MODEL = "model_config.json", "model"
INTERLEAVED = "rope_interleaved"
WEIGHT_FILE = re.compile(r"model_(\w+?)(?:_pp-rank-(\d+)-of-(\d+)_tp-rank-(\d+)-of-(\d+)(_exp-.*)?)?\.safetensors")
Shards = Callable[[str], Sequence[Tensor]]
"""A parameter's nanotron name -> what each rank has of it."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is laid out as nanotron's are."""
    return (folder / CONFIG).is_file() and (folder / MODEL).is_dir() and not (folder / "config.json").exists()


def read_config(folder: Path) -> ModelConfig:
    """Raises InvalidFileError where the shape is none of ours."""
    content = read_json(folder / CONFIG)
    content.pop(INTERLEAVED, None)
    flags = {family.nanotron.flag: name for name, family in all_families() if family.nanotron}
    model_types = [name for flag, name in flags.items() if content.pop(flag, None) is True]
    if len(model_types) != 1:
        names = ", ".join(f"{name} ({flag})" for flag, name in flags.items())
        raise InvalidFileError(f"{folder / CONFIG} is not of nanotron's {names}, all that is read here")
    return from_hugging_face(content | {"model_type": model_types[0]}, str(folder / CONFIG))


@dataclass(frozen=True)
class Layout:
    """What model_config.json says."""

    config: ModelConfig
    interleaved: bool
    """Rotation pairs neighbouring channels, as in SmolLM2-1.7B, and not those half a head apart, as in 135M."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Layout":
        """Raises InvalidFileError where it is no shape of ours, or leaves open how queries and keys are to be read."""
        interleaved = read_json(folder / CONFIG).get(INTERLEAVED)
        if not isinstance(interleaved, bool):  # nanotron's default was true once, and is false now
            raise InvalidFileError(
                f"{folder / CONFIG} does not say {INTERLEAVED}, without which queries and keys cannot be told; "
                "write it there as the training's config.yaml has it"
            )
        return cls(read_config(folder), interleaved)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a checkpoint, on the CPU.

    Raises InvalidFileError, naming the file, for anything missing, unknown, broken or of another shape.
    """
    layout = Layout.from_folder(folder)
    return model_from_tensors(layout.config, read_tensors(folder, layout), dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the files' embedding."""
    location = tensor_locations(read_config(folder))[huggingface.EMBEDDING]
    return WeightFiles(folder / MODEL).shards(location.name)[0].dtype


def weight_files(folder: Path) -> list[Path]:
    """The files its weights are in, of every rank."""
    return sorted((folder / MODEL).rglob("*.safetensors"))


def read_tensors(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """The files' tensors by our names."""
    files = WeightFiles(folder / MODEL)
    return dict(iterate_parameters(files.root, layout, files.shards, present=files.paths.keys()))


@torch.no_grad()
def model_from_tensors(config: ModelConfig, values: Mapping[str, Tensor], dtype: torch.dtype) -> LanguageModel:
    """Return a model with these weights."""
    model = empty_model(config, dtype)
    for name, weight in model.named_parameters():
        weight.copy_(values[name])
    return model


def iterate_parameters(
    source: Path, layout: Layout, shards: Shards, *, present: Set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, value) of every parameter from the shards of each rank;
    `present` has all of nanotron's names.
    """
    config = layout.config
    locations, shapes = tensor_locations(config), dict(expected_shapes(config))
    expected = {location.name for location in locations.values()}
    if missing := sorted(expected - present):
        raise InvalidFileError(f"{source} lacks {len(missing)} of {len(expected)} parameters, the first {missing[0]}")
    if unknown := sorted(present - expected):
        raise InvalidFileError(f"{source} has {unknown[0]}, which its {CONFIG} leaves no place for")
    for name, location in locations.items():
        value = merge_shards(shards(location.name), location, shapes[name], source=source)
        yield (
            name,
            deinterleave(value, config.resolved_head_dim) if layout.interleaved and location.is_rotary else value,
        )


def tensor_locations(config: ModelConfig) -> dict[str, TensorLocation]:
    """Return the location of each of our parameters."""
    names = family_of(config).nanotron
    assert names is not None, "read_config accepts no other family"
    return names.locations(config)


def merge_shards(shards: Sequence[Tensor], location: TensorLocation, shape: tuple[int, ...], *, source: Path) -> Tensor:
    """A parameter of this shape from what each rank has of the tensor it is in. Raises InvalidFileError where that is
    less.

    rank 0 | q0 k0 v0 |     part 1 of it:  k0     joined:  k0
    rank 1 | q1 k1 v1 |                    k1              k1
    """
    ranks = len(shards)
    check_shapes(shards, location, shape, source=source)
    if location.split_dim is None:
        if any(not torch.equal(shards[0], shard) for shard in shards[1:]):
            raise InvalidFileError(
                f"{source}: {location.name} differs from rank to rank, and each should have all of it"
            )
        return shards[0]
    if location.chunks:
        shards = [shard.split([chunk // ranks for chunk in location.chunks])[location.part] for shard in shards]
    return shards[0] if ranks == 1 else torch.cat(list(shards), location.split_dim)


def check_shapes(shards: Sequence[Tensor], location: TensorLocation, shape: tuple[int, ...], *, source: Path) -> None:
    """Raises InvalidFileError where a rank has another share than its part of a parameter of this shape."""
    ranks, expected = len(shards), list(shape)
    if location.chunks:
        expected[0] = sum(location.chunks)
    if location.split_dim is not None:
        sizes = location.chunks or (expected[location.split_dim],)
        if any(length % ranks for length in sizes):
            raise InvalidFileError(
                f"{source}: {location.name} cannot be shared out over {ranks} ranks as its {CONFIG} has it"
            )
        expected[location.split_dim] //= ranks
    for shard in shards:
        if list(shard.shape) != expected:
            raise InvalidFileError(
                f"{source}: {location.name} has shape {tuple(shard.shape)} on one of {ranks} ranks, where its {CONFIG} "
                f"makes it {tuple(expected)}"
            )


def deinterleave(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of heads from paired neighbors to pairs half a head apart: 0 1 2 3 -> 0 2 1 3."""
    heads = weight.unflatten(0, (-1, head_size // 2, 2))
    return heads.transpose(1, 2).reshape(weight.shape)


class WeightFiles:
    """The tensors of the files below a checkpoint's model/. Raises InvalidFileError for a file that belongs to none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, dict[int, Path]] = {}
        self.ranks: dict[str, int] = {}
        for path in weight_files(root.parent):
            self._add(path)

    def _add(self, path: Path) -> None:
        match = WEIGHT_FILE.fullmatch(path.name)
        if match is None:
            raise InvalidFileError(f"{path} is no file of a nanotron model")
        last, _, stages, rank, ranks, experts = match.groups()
        if experts or int(stages or 1) > 1:
            raise InvalidFileError(f"{path} is of pipeline stages or experts, which are not read here")
        name = ".".join([*path.parent.relative_to(self.root).parts, last])
        if self.ranks.setdefault(name, int(ranks or 1)) != int(ranks or 1):
            raise InvalidFileError(f"{path} is of {ranks} ranks, and another file of {name} is of {self.ranks[name]}")
        self.paths.setdefault(name, {})[int(rank or 0)] = path

    def shards(self, name: str) -> list[Tensor]:
        """What each rank has of a parameter."""
        paths = self.paths[name]
        if missing := set(range(self.ranks[name])) - paths.keys():
            raise InvalidFileError(
                f"{self.root} lacks the part of {name} that rank {min(missing)} of {self.ranks[name]} had"
            )
        return [read_weight_file(paths[rank]) for rank in range(self.ranks[name])]


def read_weight_file(path: Path) -> Tensor:
    """The tensor of a weight file. Raises InvalidFileError where there is none, or more."""
    with huggingface.safetensors_errors(path):
        tensors = load_file(path)
    if tensors.keys() != {"data"} or tensors["data"].dtype not in DTYPES:
        raise InvalidFileError(
            f"{path} should hold one tensor of weights called data, and has {', '.join(tensors) or 'none'}"
        )
    return tensors["data"]
