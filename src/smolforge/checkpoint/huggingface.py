"""A Hugging Face model folder <-> a model.

Loading is strict: every setting in config.json is understood or known to change nothing, every tensor of
the files is used, every parameter is filled. Weights stand in model.safetensors, or in several shards that
model.safetensors.index.json lists.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolforge.checkpoint import quantization
from smolforge.checkpoint import safetensors_writer as tensor_file
from smolforge.checkpoint.families import read_config, read_json, to_hugging_face
from smolforge.config import ModelConfig
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel, empty_model, meta_model
from smolforge.models.family import family_of
from smolforge.models.lora import merged_parameters
from smolforge.models.quantized import QuantizationScheme
from smolforge.tokenizer import Tokenizer

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METADATA = {"format": "pt"}
Shape = tuple[int, ...]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a folder, on the CPU.

    Raises InvalidFileError, naming file and key, for anything missing, unknown or of another shape.
    """
    config, scheme = read_config(folder / CONFIG), read_scheme(folder)
    with SafetensorsReader(folder) as tensors:
        check_tensors(tensors, config, scheme)
        model = with_quantized_layers(empty_model(config, dtype), scheme)
        fill(model, tensors)
    quantization.check_quantized_layers(model, folder)
    return model


def read_scheme(folder: Path) -> QuantizationScheme | None:
    """How a folder's matrices are kept as integers; None where they are not."""
    return quantization.pop_scheme(read_json(folder / CONFIG), str(folder / CONFIG))


def with_quantized_layers(model: LanguageModel, scheme: QuantizationScheme | None) -> LanguageModel:
    """Insert quantized layers where a file's scheme has them; return the model.

    Raises InvalidFileError where the scheme does not fit the model.
    """
    if scheme is not None:
        try:
            quantized.insert_quantized_layers(model, scheme)
        except ConfigError as error:
            raise InvalidFileError(f"{CONFIG} has a {quantization.KEY} that does not fit the model: {error}") from None
    return model


@contextmanager
def safetensors_errors(path: Path, close: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn errors of reading a safetensors file into an InvalidFileError that names it; call `close` before."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        close()
        raise InvalidFileError(f"{path} cannot be read: {error}") from None


class SafetensorsReader:
    """Reader of a folder's safetensors files, one tensor at a time.

    Raises InvalidFileError where they are corrupted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.stack, self.path = folder, ExitStack(), folder / WEIGHTS
        self.files: dict[str, Any] = {}

    def __enter__(self) -> "SafetensorsReader":
        for path in weight_files(self.folder):
            with safetensors_errors(path, self.stack.close):
                path.open("rb").close()  # safetensors says of every file it may not read that there is none
                file = self.stack.enter_context(safe_open(path, "pt"))
                names = list(file.keys())
            repeated = self.files.keys() & set(names)
            if repeated:
                self.stack.close()
                raise InvalidFileError(f"{path} holds {min(repeated)}, which another file of {self.folder} holds too")
            self.files |= dict.fromkeys(names, file)
            self.path = path
            self._check_against_index(path, names)
        return self

    def _check_against_index(self, path: Path, names: list[str]) -> None:
        """Check that a shard has the tensors that the index lists for it."""
        if path.name == WEIGHTS:
            return
        listed = {name for name, file in read_index(self.folder / INDEX).items() if file == path.name}
        if listed != set(names):
            self.stack.close()
            raise InvalidFileError(f"{path} does not hold what {INDEX} says, such as {min(listed ^ set(names))}")

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def shapes(self) -> dict[str, Shape]:
        """Name to shape, from the headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.get_tensor(name)

    def get_tensor(self, name: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
        """Return a tensor of one of these dtypes. Raises InvalidFileError where it has another."""
        with safetensors_errors(self.path):
            tensor = self.files[name].get_tensor(name)
        if tensor.dtype not in dtypes:
            kind, expected = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, dtypes[0]))
            rule = (
                "quantised weights are read only as export has them"
                if dtypes is DTYPES
                else f"it should hold {expected}"
            )
            raise InvalidFileError(f"{self.path}: {name} holds {kind}; {rule}")
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, or the .gguf it is. Raises InvalidFileError where one is missing."""
    if folder.is_file():
        return [folder]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InvalidFileError(f"{folder} has no {WEIGHTS}")
    names = shard_names(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InvalidFileError(f"{folder} lacks {missing[0]}, which its {INDEX} names")
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The files that an index names."""
    return sorted(set(read_index(index).values()))


def read_index(index: Path) -> dict[str, str]:
    """Tensor to file, as an index has it. Raises InvalidFileError for a file that is no safetensors file beside it."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InvalidFileError(f"{index} has no weight_map of tensor names to files")
    for name in listed.values():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) and ".." not in name
        if not plain:
            raise InvalidFileError(
                f"{index} names {name!r}, which is no .safetensors file beside it; it is not followed"
            )
    return listed


def check_tensors(tensors: SafetensorsReader, config: ModelConfig, scheme: QuantizationScheme | None = None) -> None:
    """Check names and shapes of the files' tensors against the model, before anything is allocated."""
    shapes, source = tensors.shapes(), tensors.path
    count = tensor_count(config)
    if count > 2 * len(shapes) + 64:  # before so many names are made
        raise InvalidFileError(f"{source} has {len(shapes):,} tensors where config.json makes it {count:,}")
    expected = dict(expected_shapes(config, scheme))
    optional = {HEAD} if config.tie_word_embeddings and EMBEDDING in expected else set()
    check_shapes(source, shapes, expected, optional=optional)
    if optional & shapes.keys() and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise InvalidFileError(
            f"{source} has an lm_head.weight that differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false there if the head is its own"
        )


def check_shapes(
    source: Path, shapes: Mapping[str, Shape], expected: Mapping[str, Shape], *, optional: Set[str] = frozenset()
) -> None:
    """Raise InvalidFileError if a file's tensors have other names or shapes than a model's."""
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys() - optional)
    if missing:
        raise InvalidFileError(f"{source} lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]}")
    if unknown:
        raise InvalidFileError(
            f"{source} has {len(unknown)} tensors this model has no place for, the first {unknown[0]}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InvalidFileError(f"{source}: {name} has shape {shapes[name]} where its settings make it {shape}")


def tensor_count(config: ModelConfig) -> int:
    """Count the tensors of a model's files without listing their names."""
    count = 0
    for name, _ in meta_model(config.model_copy(update={"num_hidden_layers": 1})).named_parameters():
        one = config.num_local_experts if ".experts." in name else 1
        count += one * (config.num_hidden_layers if ".layers." in name else 1)
    return count


def expected_shapes(config: ModelConfig, scheme: QuantizationScheme | None = None) -> Iterator[tuple[str, Shape]]:
    """Yield (name on disk, shape) of every tensor of a model."""
    for name, weight in with_quantized_layers(meta_model(config), scheme).named_parameters():
        yield from ((disk_name, tuple(part.shape)) for disk_name, part in split_parameter(name, weight, config))


@torch.no_grad()
def fill(model: LanguageModel, tensors: SafetensorsReader) -> None:
    """Copy the files' values into the model's parameters: integers and their scales as they are, others as they fit."""
    quantized_dtypes = quantization.quantized_dtypes(model)
    for name, weight in model.named_parameters():
        for disk_name, part in split_parameter(name, weight, model.config):
            part.copy_(
                tensors.get_tensor(
                    disk_name, (quantized_dtypes[disk_name],) if disk_name in quantized_dtypes else DTYPES
                )
            )


def split_parameter(name: str, weight: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    """Split a parameter into its tensors on disk: the experts' stacked matrices one by one, any other as it is."""
    disk = family_of(config).disk_names(name, config)
    if disk == [name]:
        return [(name, weight)]
    return list(zip(disk, weight if weight.ndim == 3 else [weight], strict=True))


def tensors_by_disk_name(model: LanguageModel) -> dict[str, Tensor]:
    """Return every tensor of a model by its name on disk: the live ones without a copy, LoRA merged."""
    return {
        disk_name: part.detach()
        for name, weight in merged_parameters(model)
        for disk_name, part in split_parameter(name, weight, model.config)
    }


def disk_tensors(model: LanguageModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return every tensor of a model by its name on disk, in the dtype that is written."""
    quantized_dtypes = quantization.quantized_dtypes(model)
    return {
        name: tensor.to(quantized_dtypes.get(name, dtype) or tensor.dtype).cpu().contiguous()
        for name, tensor in tensors_by_disk_name(model).items()
    }


def save(
    model: LanguageModel,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
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
    save_settings(
        folder,
        model.config,
        tokenizer,
        dtype=dtype or model.lm_head_weight.dtype,
        special=special,
        generation=generation,
        scheme=model.quantization,
    )
    shards = split_into_shards(tensors, max_shard_bytes)
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
    *,
    dtype: torch.dtype,
    special: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    scheme: QuantizationScheme | None = None,
) -> None:
    """Write everything of a model folder but its weights."""
    special = {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
        **({"pad_token_id": tokenizer.pad_id} if tokenizer and tokenizer.pad_id is not None else {}),
        **(special or {}),
    }
    extra: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
    extra |= {} if scheme is None else {quantization.KEY: quantization.quantization_config(scheme)}
    _write_json(folder / CONFIG, to_hugging_face(config) | special | extra)
    _write_json(folder / GENERATION, special | (generation or {}))
    if tokenizer:
        tokenizer.save(folder)


def split_into_shards(tensors: dict[str, Tensor], max_shard_bytes: int | None) -> list[dict[str, Tensor]]:
    """Split the tensors, in order, into shards of at most `max_shard_bytes`; a larger tensor gets its own shard."""
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
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")
