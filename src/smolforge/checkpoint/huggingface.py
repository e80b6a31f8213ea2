"""A Hugging Face model folder <-> a model.

Loading is strict: every setting in config.json is understood or known to change nothing, every tensor of
the files is used or known to change nothing, every parameter is filled. Weights are in model.safetensors, or in
several shards, which model.safetensors.index.json lists if it is there. Names may have what torch.compile and DDP
put before them, or lack the `model.` that a decoder saved without its head has not.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
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
from smolforge.models.decoder import LanguageModel, empty_model, inverse_frequencies, meta_model
from smolforge.models.family import family_of
from smolforge.models.lora import merged_parameters
from smolforge.models.quantized import QuantizationScheme
from smolforge.tokenizer import Tokenizer

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METADATA = {"format": "pt"}
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
"""Names of a model, or of one of its layers, inside what DDP, torch.compile, FSDP and checkpointing wrap it in."""
OUTER_WRAPPERS = re.compile(rf"((?:{WRAPPERS})\.)*")
LAYER_WRAPPERS = re.compile(rf"(?<=\.layers\.)(\d+\.)(?:(?:{WRAPPERS})\.)+")
INERT_TENSOR = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Tensors that say again what config.json says: the frequencies of rotary positions, which old versions saved."""
Shape = tuple[int, ...]
log = logging.getLogger("smolforge")


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
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a safetensors file into an InvalidFileError that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InvalidFileError(f"{path} cannot be read: {error}") from None


class SafetensorsReader:
    """Reader of a folder's safetensors files, one tensor at a time, by the names that `plain_names` gives them.

    Raises InvalidFileError where they are corrupted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.stack, self.path = folder, ExitStack(), folder / WEIGHTS
        self.files: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        """Of each tensor that a model has: its name in its file."""
        self.inert: dict[str, str] = {}
        """The same of INERT_TENSOR."""

    def __enter__(self) -> "SafetensorsReader":
        with ExitStack() as stack:  # closed if anything here fails
            for path in weight_files(self.folder):
                self._open(path, stack)
            names = plain_names(self.files, self.path)
            self.inert = {name: stored for name, stored in names.items() if INERT_TENSOR.fullmatch(name)}
            self.names = {name: stored for name, stored in names.items() if name not in self.inert}
            self.stack = stack.pop_all()
        return self

    def _open(self, path: Path, stack: ExitStack) -> None:
        """Open one file. Raises InvalidFileError where it repeats another or has not what the index lists for it."""
        with safetensors_errors(path):
            path.open("rb").close()  # without permission safetensors says: no such file
            file = stack.enter_context(safe_open(path, "pt"))
            names = list(file.keys())
        if repeated := self.files.keys() & set(names):
            raise InvalidFileError(f"{path} holds {min(repeated)}, which another file of {self.folder} holds too")
        self.files |= dict.fromkeys(names, file)
        self.path = path
        if path.name != WEIGHTS and (self.folder / INDEX).is_file():
            listed = {name for name, file in read_index(self.folder / INDEX).items() if file == path.name}
            if listed != set(names):
                raise InvalidFileError(f"{path} does not hold what {INDEX} says, such as {min(listed ^ set(names))}")

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def shapes(self) -> dict[str, Shape]:
        """Name to shape, from the headers alone."""
        return {name: tuple(self.files[stored].get_slice(stored).get_shape()) for name, stored in self.names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.get_tensor(name)

    def get_tensor(self, name: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
        """Return a tensor of one of these dtypes. Raises InvalidFileError where it has another."""
        stored = self.names.get(name) or self.inert[name]
        with safetensors_errors(self.path):
            tensor = self.files[stored].get_tensor(stored)
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
    """The safetensors files of a model folder. Raises InvalidFileError where one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        names = unlisted_shards(str(folder), [path.name for path in folder.iterdir()]) if folder.is_dir() else []
        if not names:
            raise InvalidFileError(f"{folder} has no {WEIGHTS}")
        return [folder / name for name in names]
    names = shard_names(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InvalidFileError(f"{folder} lacks {missing[0]}, which its {INDEX} names")
    return [folder / name for name in names]


def unlisted_shards(source: str, names: Iterable[str]) -> list[str]:
    """Return the shards among the names of a folder's files, for a folder without an index.

    Raises InvalidFileError where one is missing, or where they are of several sets.
    """
    shards = {match[0]: match[2] for name in names if (match := SHARD.fullmatch(name))}
    counts = set(shards.values())
    if len(counts) > 1:
        raise InvalidFileError(f"{source} has shards of {' and of '.join(sorted(counts))} files, and no {INDEX}")
    expected = [name for count in counts for name in _shard_names(int(count))]
    if missing := sorted(set(expected) - shards.keys()):
        raise InvalidFileError(f"{source} lacks {missing[0]}, and has no {INDEX} that says otherwise")
    return sorted(shards)


def plain_names(stored: Collection[str], source: Path) -> dict[str, str]:
    """Return the name of each tensor in a Hugging Face model, with its name in the files.

    Raises InvalidFileError where only some have the prefix of a wrapper, or two become one.
    """
    names: dict[str, str] = {}
    prefixes = {match[0]: name for name in stored if (match := OUTER_WRAPPERS.match(name))}
    if len(prefixes) > 1:
        raise InvalidFileError(
            f"{source} has names with and without a wrapper's prefix, such as {' and '.join(sorted(prefixes.values()))}"
        )
    prefix = next(iter(prefixes), "")
    without_model = f"{prefix}{EMBEDDING.removeprefix('model.')}" in stored
    for name in stored:
        plain = name.removeprefix(prefix)
        plain = f"model.{plain}" if without_model and plain != HEAD else plain
        plain = LAYER_WRAPPERS.sub(r"\1", plain)
        if plain in names:
            raise InvalidFileError(f"{source} has both {names[plain]} and {name}, which are the same tensor")
        names[plain] = name
    if renamed := [(name, plain) for plain, name in names.items() if plain != name]:
        log.debug("%s: %d tensors are renamed, such as %s to %s", source, len(renamed), *renamed[0])
    return names


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
    if HEAD in expected.keys() - shapes.keys() and EMBEDDING in shapes:
        raise InvalidFileError(
            f"{source} has no lm_head.weight, and config.json does not tie the head to the embedding; save the model "
            "with its head (LlamaForCausalLM, not LlamaModel)"
        )
    check_shapes(source, shapes, expected, optional=optional)
    check_rotary_buffers(tensors, config)
    if optional & shapes.keys() and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise InvalidFileError(
            f"{source} has an lm_head.weight that differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false there if the head is its own"
        )


def check_rotary_buffers(tensors: SafetensorsReader, config: ModelConfig) -> None:
    """Check that saved frequencies are those that the config makes, to the precision of their dtype."""
    expected = inverse_frequencies(config)
    for name in tensors.inert:
        values = tensors.get_tensor(name)
        limits = torch.finfo(values.dtype)
        rtol, atol = max(2 * limits.eps, 1e-5), limits.eps * limits.tiny
        if values.shape != expected.shape or not torch.allclose(values.double(), expected.double(), rtol, atol):
            raise InvalidFileError(
                f"{tensors.path}: {name} holds other frequencies than rope_theta {config.rope_theta:g} in config.json "
                "makes, as if positions were scaled; config.json should say how"
            )
    if tensors.inert:
        log.debug(
            "%s: %d tensors that config.json makes again are ignored: %s",
            tensors.path,
            len(tensors.inert),
            ", ".join(tensors.inert),
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
        "eos_token_id": _one_or_list(tokenizer.eos_ids) if tokenizer else None,
        **({"pad_token_id": tokenizer.pad_id} if tokenizer and tokenizer.pad_id is not None else {}),
        **(special or {}),
    }
    extra: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
    extra |= {} if scheme is None else {quantization.KEY: quantization.quantization_config(scheme)}
    _write_json(folder / CONFIG, to_hugging_face(config) | special | extra)
    _write_json(folder / GENERATION, special | (generation or {}))
    if tokenizer:
        tokenizer.save(folder)


def _one_or_list(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def read_eos_ids(folder: Path) -> list[int]:
    """Return the ids of eos_token_id in generation_config.json, and then in config.json: any of them ends an answer.

    Raises InvalidFileError where one is no id of the model's vocabulary.
    """
    paths = [path for name in (GENERATION, CONFIG) if (path := folder / name).is_file()]
    contents = {path: read_json(path) for path in paths}
    vocab_size = contents.get(folder / CONFIG, {}).get("vocab_size")
    valid = range(vocab_size if isinstance(vocab_size, int) else 1 << 31)
    eos_ids: list[int] = []
    for path, content in contents.items():
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and number in valid for number in ids):
            raise InvalidFileError(
                f"{path}: eos_token_id is {str(value)[:80]}; it should be a token's id, from 0 to "
                f"{valid[-1]:,}, or a list of such ids"
            )
        eos_ids += ids
    return eos_ids


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
