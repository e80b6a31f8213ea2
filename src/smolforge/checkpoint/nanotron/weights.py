"""Where each parameter is in nanotron's files, whole again and in our order -> a model."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smolforge.checkpoint.families import from_hugging_face, read_json
from smolforge.checkpoint.huggingface import DTYPES, wanted_shapes
from smolforge.config import ModelConfig
from smolforge.errors import InvalidFile
from smolforge.models.decoder import LanguageModel, allocate

CONFIG, MODEL = "model_config.json", "model"
INTERLEAVED, EMBEDDING = "rope_interleaved", "model.token_position_embeddings.pp_block.token_embedding.weight"
WEIGHT_FILE = re.compile(r"model_(\w+?)(?:_pp-rank-(\d+)-of-(\d+)_tp-rank-(\d+)-of-(\d+)(_exp-.*)?)?\.safetensors")
Shards = Callable[[str], Sequence[Tensor]]
"""A parameter's nanotron name -> what each rank has of it."""


@dataclass(frozen=True)
class Place:
    """Where one of our parameters is."""

    name: str
    """nanotron's."""
    split: int | None = 0
    """The dimension shared out over ranks; None where each has all."""
    chunks: tuple[int, ...] = ()
    """What stands one after another along dimension 0, all ranks together; each chunk is shared out by itself."""
    part: int = 0
    """Which of these it is."""
    turned: bool = False
    """Whether its rows are channels that rotation pairs."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is laid out as nanotron's are."""
    return (folder / CONFIG).is_file() and (folder / MODEL).is_dir() and not (folder / "config.json").exists()


def read_config(folder: Path) -> ModelConfig:
    """Raises InvalidFile where the shape is none of ours."""
    content = read_json(folder / CONFIG)
    content.pop(INTERLEAVED, None)
    if content.get("is_llama_config") is not True:
        raise InvalidFile(f"{folder / CONFIG} is not of nanotron's llama (is_llama_config), the only one read here")
    return from_hugging_face(content, str(folder / CONFIG))


@dataclass(frozen=True)
class Layout:
    """What model_config.json says."""

    config: ModelConfig
    interleaved: bool
    """Rotation pairs neighbouring channels, as in SmolLM2-1.7B, and not those half a head apart, as in 135M."""

    @classmethod
    def of(cls, folder: Path) -> "Layout":
        """Raises InvalidFile where it is no shape of ours, or leaves open how queries and keys are to be read."""
        said = read_json(folder / CONFIG).get(INTERLEAVED)
        if not isinstance(said, bool):  # nanotron's default was true once, and is false now
            raise InvalidFile(
                f"{folder / CONFIG} does not say {INTERLEAVED}, without which queries and keys cannot be told; "
                "write it there as the training's config.yaml has it"
            )
        return cls(read_config(folder), said)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a checkpoint, on the CPU.

    Raises InvalidFile, naming the file, for anything missing, unknown, broken or of another shape.
    """
    layout = Layout.of(folder)
    return filled(layout.config, values(folder, layout), dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the files' embedding."""
    return Files(folder / MODEL).shards(EMBEDDING)[0].dtype


def files(folder: Path) -> list[Path]:
    """The files its weights are in, of every rank."""
    return sorted((folder / MODEL).rglob("*.safetensors"))


def values(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """The files' tensors by our names."""
    there = Files(folder / MODEL)
    return dict(named(there.root, layout, there.shards, there.paths.keys()))


@torch.no_grad()
def filled(config: ModelConfig, values: Mapping[str, Tensor], dtype: torch.dtype) -> LanguageModel:
    """A model of these weights."""
    model = allocate(config, dtype)
    for name, weight in model.named_parameters():
        weight.copy_(values[name])
    return model


def named(where: Path, layout: Layout, shards: Shards, present: Set[str]) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) of every parameter, from what each rank has; `present` are all of nanotron's names there."""
    config = layout.config
    known, shapes = places(config), dict(wanted_shapes(config))
    wanted = {place.name for place in known.values()}
    if missing := sorted(wanted - present):
        raise InvalidFile(f"{where} lacks {len(missing)} of {len(wanted)} parameters, the first {missing[0]}")
    if unknown := sorted(present - wanted):
        raise InvalidFile(f"{where} has {unknown[0]}, which its {CONFIG} leaves no place for")
    for name, place in known.items():
        value = joined(shards(place.name), place, shapes[name], where)
        yield name, halves(value, config.head_size) if layout.interleaved and place.turned else value


def places(config: ModelConfig) -> dict[str, Place]:
    """Where each of our parameters is: examples/llama/convert_weights.py, chunks as models/llama.py shares them out."""
    attention, mlp = ".self_attn.{}_proj.weight", ".mlp.{}_proj.weight"
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    qkv, wide = tuple(count * config.head_size for count in heads), (config.intermediate_size,) * 2
    found = {"model.embed_tokens.weight": Place(EMBEDDING)}
    for number in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{number}", f"model.decoder.{number}.pp_block"
        for part, letter in enumerate("qkv"):
            place = Place(f"{theirs}.attn.qkv_proj.weight", 0, qkv, part, letter != "v")
            found[ours + attention.format(letter)] = place
        for part, gate in enumerate(("gate", "up")):
            found[ours + mlp.format(gate)] = Place(f"{theirs}.mlp.gate_up_proj.weight", 0, wide, part)
        found[ours + attention.format("o")] = Place(f"{theirs}.attn.o_proj.weight", 1)
        found[ours + mlp.format("down")] = Place(f"{theirs}.mlp.down_proj.weight", 1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{ours}.{norm}.weight"] = Place(f"{theirs}.{norm}.weight", None)
    found["model.norm.weight"] = Place("model.final_layer_norm.pp_block.weight", None)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Place("model.lm_head.pp_block.weight")
    return found


def joined(shards: Sequence[Tensor], place: Place, shape: tuple[int, ...], where: Path) -> Tensor:
    """A parameter of this shape from what each rank has of the tensor it is in. Raises InvalidFile where that is less.

    rank 0 | q0 k0 v0 |     part 1 of it:  k0     joined:  k0
    rank 1 | q1 k1 v1 |                    k1              k1
    """
    ranks = len(shards)
    check_shapes(shards, place, shape, where)
    if place.split is None:
        if any(not torch.equal(shards[0], other) for other in shards[1:]):
            raise InvalidFile(f"{where}: {place.name} differs from rank to rank, and each should have all of it")
        return shards[0]
    if place.chunks:
        shards = [shard.split([chunk // ranks for chunk in place.chunks])[place.part] for shard in shards]
    return shards[0] if ranks == 1 else torch.cat(list(shards), place.split)


def check_shapes(shards: Sequence[Tensor], place: Place, shape: tuple[int, ...], where: Path) -> None:
    """Raises InvalidFile where a rank has another share than its part of a parameter of this shape."""
    ranks, whole = len(shards), list(shape)
    if place.chunks:
        whole[0] = sum(place.chunks)
    if place.split is not None:
        cut = place.chunks or (whole[place.split],)
        if any(length % ranks for length in cut):
            raise InvalidFile(f"{where}: {place.name} cannot be shared out over {ranks} ranks as its {CONFIG} has it")
        whole[place.split] //= ranks
    for shard in shards:
        if list(shard.shape) != whole:
            raise InvalidFile(
                f"{where}: {place.name} has shape {tuple(shard.shape)} on one of {ranks} ranks, where its {CONFIG} "
                f"makes it {tuple(whole)}"
            )


def halves(weight: Tensor, head_size: int) -> Tensor:
    """Rows of heads whose pairs are neighbours, as heads whose pairs are half a head apart: 0 1 2 3 -> 0 2 1 3."""
    heads = weight.unflatten(0, (-1, head_size // 2, 2))
    return heads.transpose(1, 2).reshape(weight.shape)


class Files:
    """The tensors of the files below a checkpoint's model/. Raises InvalidFile for a file that belongs to none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, dict[int, Path]] = {}
        self.ranks: dict[str, int] = {}
        for path in files(root.parent):
            self._admit(path)

    def _admit(self, path: Path) -> None:
        found = WEIGHT_FILE.fullmatch(path.name)
        if found is None:
            raise InvalidFile(f"{path} is no file of a nanotron model")
        last, _, stages, rank, ranks, experts = found.groups()
        if experts or int(stages or 1) > 1:
            raise InvalidFile(f"{path} is of pipeline stages or experts, which are not read here")
        name = ".".join([*path.parent.relative_to(self.root).parts, last])
        if self.ranks.setdefault(name, int(ranks or 1)) != int(ranks or 1):
            raise InvalidFile(f"{path} is of {ranks} ranks, and another file of {name} is of {self.ranks[name]}")
        self.paths.setdefault(name, {})[int(rank or 0)] = path

    def shards(self, name: str) -> list[Tensor]:
        """What each rank has of a parameter."""
        there = self.paths[name]
        if absent := set(range(self.ranks[name])) - there.keys():
            raise InvalidFile(f"{self.root} lacks the part of {name} that rank {min(absent)} of {self.ranks[name]} had")
        return [read_data(there[rank]) for rank in range(self.ranks[name])]


def read_data(path: Path) -> Tensor:
    """The tensor of a weight file. Raises InvalidFile where there is none, or more."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from None
    if found.keys() != {"data"} or found["data"].dtype not in DTYPES:
        raise InvalidFile(f"{path} should hold one tensor of weights called data, and has {', '.join(found) or 'none'}")
    return found["data"]
