"""A Hugging Face model folder <-> a model.

Loading is strict: every setting in config.json is understood or known to change nothing, every tensor of
the files is used, every parameter is filled. Weights stand in model.safetensors, or in several shards that
model.safetensors.index.json lists.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolforge.checkpoint import quantization
from smolforge.checkpoint import safetensors_writer as tensor_file
from smolforge.checkpoint.families import names_on_disk, read_config, read_json, to_hugging_face
from smolforge.config import ModelConfig
from smolforge.errors import InvalidFile, SettingError
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel, allocate, outline
from smolforge.models.lora import folded
from smolforge.models.quantized import Scheme
from smolforge.tokenizer import Tokenizer

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METADATA = {"format": "pt"}
Shape = tuple[int, ...]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a folder, on the CPU.

    Raises InvalidFile, naming file and key, for anything missing, unknown or of another shape.
    """
    config, scheme = read_config(folder / CONFIG), read_scheme(folder)
    with Tensors(folder) as tensors:
        check_names(tensors, config, scheme)
        model = laid(allocate(config, dtype), scheme)
        fill(model, tensors)
    quantization.check(model, folder)
    return model


def read_scheme(folder: Path) -> Scheme | None:
    """How a folder's matrices are kept as integers; None where they are not."""
    return quantization.take(read_json(folder / CONFIG), str(folder / CONFIG))


def laid(model: LanguageModel, scheme: Scheme | None) -> LanguageModel:
    """The model with layers of integers where a file's scheme has them. Raises InvalidFile where it cannot be meant."""
    if scheme is not None:
        try:
            quantized.lay(model, scheme)
        except SettingError as error:
            raise InvalidFile(f"{CONFIG} has a {quantization.KEY} that does not fit the model: {error}") from None
    return model


class Tensors:
    """The tensors of a folder's safetensors files, read one at a time. Raises InvalidFile where they are broken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stack, self.source = folder, ExitStack(), folder / WEIGHTS
        self.open: dict[str, Any] = {}

    def __enter__(self) -> "Tensors":
        for path in files(self.folder):
            try:
                path.open("rb").close()  # safetensors says of every file it may not read that there is none
                file = self.stack.enter_context(safe_open(path, "pt"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                self.stack.close()
                raise InvalidFile(f"{path} cannot be read: {error}") from None
            repeated = self.open.keys() & set(names)
            if repeated:
                self.stack.close()
                raise InvalidFile(f"{path} holds {min(repeated)}, which another file of {self.folder} holds too")
            self.open |= dict.fromkeys(names, file)
            self.source = path
            self._hold_to_index(path, names)
        return self

    def _hold_to_index(self, path: Path, names: list[str]) -> None:
        """Where an index says which file holds what, that is what it must hold."""
        if path.name == WEIGHTS:
            return
        listed = {name for name, file in read_index(self.folder / INDEX).items() if file == path.name}
        if listed != set(names):
            self.stack.close()
            raise InvalidFile(f"{path} does not hold what {INDEX} says, such as {min(listed ^ set(names))}")

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def shapes(self) -> dict[str, Shape]:
        """Name to shape, from the headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.open.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.get(name)

    def get(self, name: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
        """A tensor of one of these dtypes. Raises InvalidFile where it holds another."""
        try:
            found = self.open[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InvalidFile(f"{self.source} cannot be read: {error}") from None
        if found.dtype not in dtypes:
            kind, wanted = (str(each).removeprefix("torch.") for each in (found.dtype, dtypes[0]))
            rule = (
                "quantised weights are read only as export has them" if dtypes is DTYPES else f"it should hold {wanted}"
            )
            raise InvalidFile(f"{self.source}: {name} holds {kind}; {rule}")
        return found


def files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, or the .gguf it is. Raises InvalidFile where one is missing."""
    if folder.is_file():
        return [folder]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InvalidFile(f"{folder} has no {WEIGHTS}")
    names = shard_names(folder / INDEX)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise InvalidFile(f"{folder} lacks {absent[0]}, which its {INDEX} names")
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The files that an index names."""
    return sorted(set(read_index(index).values()))


def read_index(index: Path) -> dict[str, str]:
    """Tensor to file, as an index has it. Raises InvalidFile for a file that is no safetensors file beside it."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InvalidFile(f"{index} has no weight_map of tensor names to files")
    for name in listed.values():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) and ".." not in name
        if not plain:
            raise InvalidFile(f"{index} names {name!r}, which is no .safetensors file beside it; it is not followed")
    return listed


def check_names(tensors: Tensors, config: ModelConfig, scheme: Scheme | None = None) -> None:
    """Hold the tensors of the files to those of the model, before anything is allocated."""
    found, where = tensors.shapes(), tensors.source
    count = tensor_count(config)
    if count > 2 * len(found) + 64:  # before so many names are made
        raise InvalidFile(f"{where} has {len(found):,} tensors where config.json makes it {count:,}")
    wanted = dict(wanted_shapes(config, scheme))
    optional = {HEAD} if config.tie_word_embeddings and EMBEDDING in wanted else set()
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys() - optional)
    if missing:
        raise InvalidFile(f"{where} lacks {len(missing)} of {len(wanted)} tensors, the first {missing[0]}")
    if unknown:
        raise InvalidFile(f"{where} has {len(unknown)} tensors this model has no place for, the first {unknown[0]}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InvalidFile(f"{where}: {name} has shape {found[name]} where config.json makes it {shape}")
    if optional & found.keys() and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise InvalidFile(
            f"{where} has an lm_head.weight that differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false there if the head is its own"
        )


def tensor_count(config: ModelConfig) -> int:
    """How many tensors the files of a model hold, without naming them."""
    count = 0
    for name, _ in outline(config.model_copy(update={"num_hidden_layers": 1})).named_parameters():
        one = config.num_local_experts if ".experts." in name else 1
        count += one * (config.num_hidden_layers if ".layers." in name else 1)
    return count


def wanted_shapes(config: ModelConfig, scheme: Scheme | None = None) -> Iterator[tuple[str, Shape]]:
    """(name on disk, shape) of every tensor of a model."""
    for name, weight in laid(outline(config), scheme).named_parameters():
        yield from ((each, tuple(place.shape)) for each, place in parts(name, weight, config))


@torch.no_grad()
def fill(model: LanguageModel, tensors: Tensors) -> None:
    """Copy the files' values into the model's parameters: integers and their scales as they are, others as they fit."""
    kept = quantization.dtypes(model)
    for name, weight in model.named_parameters():
        for each, place in parts(name, weight, model.config):
            place.copy_(tensors.get(each, (kept[each],) if each in kept else DTYPES))


def parts(name: str, weight: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    """A parameter as the tensors it is on disk: the experts' stacked matrices one by one, any other whole."""
    disk = names_on_disk(name, config)
    if disk == [name]:
        return [(name, weight)]
    return list(zip(disk, weight if weight.ndim == 3 else [weight], strict=True))


def named_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Every tensor of a model by its name on disk: the live ones where they are, low-rank updates added."""
    return {each: place.detach() for name, weight in folded(model) for each, place in parts(name, weight, model.config)}


def disk_tensors(model: LanguageModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a model file, by its name on disk, as it is written."""
    kept = quantization.dtypes(model)
    return {
        name: each.to(kept.get(name, dtype) or each.dtype).cpu().contiguous()
        for name, each in named_tensors(model).items()
    }


def save(
    model: LanguageModel,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    special: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write a folder that Transformers, and `load`, read.

    `dtype` is by default the model's; files are cut at `max_shard_bytes`. `special` (ids of special tokens)
    and `generation` join what the tokenizer says in config.json and generation_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = disk_tensors(model, dtype)
    save_settings(folder, model.config, tokenizer, dtype or model.head.dtype, special, generation, model.scheme)
    shards = cut(tensors, max_shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        tensor_file.write(folder / name, shard, METADATA)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        listed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": listed})


def save_settings(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    special: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    scheme: Scheme | None = None,
) -> None:
    """Write everything of a model folder but its weights."""
    special = {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
        **({"pad_token_id": tokenizer.pad_id} if tokenizer and tokenizer.pad_id is not None else {}),
        **(special or {}),
    }
    said: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
    said |= {} if scheme is None else {quantization.KEY: quantization.said(scheme)}
    _write_json(folder / CONFIG, to_hugging_face(config) | special | said)
    _write_json(folder / GENERATION, special | (generation or {}))
    if tokenizer:
        tokenizer.save(folder)


def cut(tensors: dict[str, Tensor], max_shard_bytes: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, in parts of at most so many bytes where a single tensor allows it."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if max_shard_bytes is not None and shards[-1] and size > max_shard_bytes:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
