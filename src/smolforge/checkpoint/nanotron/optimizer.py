"""What the AdamW of a nanotron run remembers: moments, step counts, and the fp32 weights that it steps.

Its files are pickles, the only ones read here. They are read by torch's reader for tensors alone, which runs nothing,
and what comes out is held to names, kinds and shapes before it is used.
"""

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolforge.checkpoint.families import read_json
from smolforge.checkpoint.nanotron import weights
from smolforge.errors import InvalidFileError
from smolforge.models.decoder import LanguageModel

FOLDER, OPTIMIZER_CONFIG, SHARDED = "optimizer", "optimizer_config.json", "ZeroDistributedOptimizer"
FILE = re.compile(r"optimizer_pp-0-of-1_tp-(\d+)-of-(\d+)(?:_exp-0-of-1)?\.pt")
MOMENTS, STEP, MASTER_WEIGHTS = ("exp_avg", "exp_avg_sq"), "step", "gradient_accumulator"
KEYS = {"state", "names", "param_groups"}
TensorsByName = dict[str, Tensor]


def read_moments(folder: Path) -> dict[str, Tensor]:
    """Return both Adam moments and the step count of every parameter, named as by `optim.state_tensors`."""
    layout, ranks = weights.Layout.from_folder(folder), read_ranks(folder)
    tensors = {
        f"{kind}.{name}": value
        for kind in MOMENTS
        for name, value in merge_ranks(folder, layout, ranks, kind=kind).items()
    }
    for name, location in weights.tensor_locations(layout.config).items():
        tensors[f"{STEP}.{name}"] = ranks[0][STEP][location.name]
    return tensors


def load_master_weights(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a checkpoint with the fp32 weights its optimizer steps; the files of model/ have them rounded."""
    layout, ranks = weights.Layout.from_folder(folder), read_ranks(folder)
    rounded = weights.read_tensors(folder, layout)
    if MASTER_WEIGHTS not in ranks[0]:
        return weights.model_from_tensors(layout.config, rounded, dtype)
    exact = merge_ranks(folder, layout, ranks, kind=MASTER_WEIGHTS)
    for name, value in exact.items():
        if not torch.equal(value.to(rounded[name].dtype), rounded[name]):
            raise InvalidFileError(
                f"{folder / FOLDER} is of other weights than those in {weights.MODEL}/, as of {name}"
            )
    return weights.model_from_tensors(layout.config, exact, dtype)


def merge_ranks(
    folder: Path, layout: weights.Layout, ranks: list[dict[str, TensorsByName]], *, kind: str
) -> dict[str, Tensor]:
    """Merge one kind of tensor over ranks, for all parameters, by our names."""
    present = {name for rank in ranks for name in rank[kind]}
    if missing := [name for rank in ranks for name in present - rank[kind].keys()]:
        raise InvalidFileError(f"{folder / FOLDER} lacks {kind} of {min(missing)} on one of its ranks")
    return dict(
        weights.iterate_parameters(
            folder / FOLDER, layout, lambda name: [rank[kind][name] for rank in ranks], present=present
        )
    )


def read_ranks(folder: Path) -> list[dict[str, TensorsByName]]:
    """Return kind -> nanotron's name -> tensor of each rank.

    Raises InvalidFileError, naming the file, for anything else.
    """
    ranks = [parse_state_dict(read_pickled(path), path) for path in optimizer_files(folder)]
    if any(rank.keys() != ranks[0].keys() for rank in ranks):
        raise InvalidFileError(f"{folder / FOLDER}: only some ranks have a {MASTER_WEIGHTS}")
    return ranks


def optimizer_files(folder: Path) -> list[Path]:
    """The optimizer's files in the order of ranks.

    Raises InvalidFileError where one is missing, or they are sharded.
    """
    root = folder / FOLDER
    paths = sorted(root.glob("*.pt"))
    if not paths:
        raise InvalidFileError(f"{folder} has no moments to go on with: there is no {FOLDER}/*.pt in it")
    config_path = root / OPTIMIZER_CONFIG
    if "_dp-" in paths[0].name or (config_path.is_file() and read_json(config_path).get("type") == SHARDED):
        raise InvalidFileError(
            f"{root} is sharded over replicas ({SHARDED}); only zero_stage 0 is read, as SmolLM2 had it"
        )
    paths_by_rank = {}
    for path in paths:
        match = FILE.fullmatch(path.name)
        if match is None:
            raise InvalidFileError(f"{path} is of pipeline stages, experts or nothing known, which is not read here")
        paths_by_rank[int(match[1]), int(match[2])] = path
    count = max(ranks for _, ranks in paths_by_rank)
    for rank in range(count):
        if (rank, count) not in paths_by_rank:
            raise InvalidFileError(f"{root} lacks the file of rank {rank} of {count}")
    if len(paths_by_rank) > count:
        raise InvalidFileError(f"{root} has files of different numbers of ranks, such as {paths[0].name}")
    return [paths_by_rank[rank, count] for rank in range(count)]


def read_pickled(path: Path) -> Any:
    """What torch.save wrote, if it is tensors, numbers, text and containers. No code of the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken stream makes its reader raise anything
        requested = re.search(r"GLOBAL ([\w.]+)", str(error))
        if requested:
            reason = f"it asks for {requested[1]}, which no optimizer needs; it was not run"
        else:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidFileError(f"{path} cannot be read: {reason}") from None


def parse_state_dict(content: Any, path: Path) -> dict[str, TensorsByName]:
    """Return kind -> nanotron's name -> tensor of one rank's state_dict.

    Raises InvalidFileError where it is not one.
    """
    check_keys(content, path, "it", required=KEYS, optional={MASTER_WEIGHTS})
    state, names = content["state"], content["names"]
    check_keys(state, path, "state", required=set(names) if isinstance(names, dict) else set())
    if not all(isinstance(name, str) for name in names.values()) or len(set(names.values())) < len(names):
        raise InvalidFileError(f"{path}: names should give each parameter one name")
    tensors: dict[str, TensorsByName] = {kind: {} for kind in (*MOMENTS, STEP)}
    for index, name in names.items():
        check_keys(state[index], path, f"the state of {name}", required={*MOMENTS, STEP})
        for kind, by_name in tensors.items():
            by_name[name] = floating_tensor(state[index][kind], path, f"{kind} of {name}")
        if tensors[STEP][name].numel() != 1:
            raise InvalidFileError(f"{path}: {STEP} of {name} should be one number")
        tensors[STEP][name] = tensors[STEP][name].float().reshape(())
    if MASTER_WEIGHTS in content:
        check_keys(content[MASTER_WEIGHTS], path, MASTER_WEIGHTS, required=set(names.values()))
        tensors[MASTER_WEIGHTS] = {
            name: floating_tensor(weight, path, f"the weight of {name}")
            for name, weight in content[MASTER_WEIGHTS].items()
        }
    return tensors


def check_keys(content: Any, path: Path, label: str, *, required: Set[Any], optional: Set[str] = frozenset()) -> None:
    """Raises InvalidFileError for what is no dictionary, lacks a key, or has one that is not known."""
    if not isinstance(content, dict):
        raise InvalidFileError(f"{path}: {label} should be a dictionary, and is {type(content).__name__}")
    if wrong := (required - content.keys()) or (content.keys() - required - optional):
        first = min(map(str, wrong))
        raise InvalidFileError(f"{path}: {label} {'lacks' if required - content.keys() else 'has an unknown'} {first}")


def floating_tensor(value: Any, path: Path, label: str) -> Tensor:
    """Return a value that is a plain floating-point tensor. Raises InvalidFileError for anything else."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    if not plain or value.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise InvalidFileError(f"{path}: {label} should be a tensor of floating-point numbers")
    return value.detach()
