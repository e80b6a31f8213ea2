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
from smolforge.errors import InvalidFile
from smolforge.models.decoder import LanguageModel

FOLDER, ABOUT, SHARDED = "optimizer", "optimizer_config.json", "ZeroDistributedOptimizer"
FILE = re.compile(r"optimizer_pp-0-of-1_tp-(\d+)-of-(\d+)(?:_exp-0-of-1)?\.pt")
MOMENTS, STEP, STEPPED = ("exp_avg", "exp_avg_sq"), "step", "gradient_accumulator"
KEYS = {"state", "names", "param_groups"}
Named = dict[str, Tensor]


def moments(folder: Path) -> dict[str, Tensor]:
    """Both moments and the step count of every parameter, as `optim.state_tensors` names them."""
    layout, ranks = weights.Layout.of(folder), read(folder)
    found = {f"{what}.{name}": value for what in MOMENTS for name, value in whole(folder, layout, ranks, what).items()}
    for name, place in weights.places(layout.config).items():
        found[f"{STEP}.{name}"] = ranks[0][STEP][place.name]
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a checkpoint with the fp32 weights its optimizer steps; the files of model/ have them rounded."""
    layout, ranks = weights.Layout.of(folder), read(folder)
    rounded = weights.values(folder, layout)
    if STEPPED not in ranks[0]:
        return weights.filled(layout.config, rounded, dtype)
    exact = whole(folder, layout, ranks, STEPPED)
    for name, value in exact.items():
        if not torch.equal(value.to(rounded[name].dtype), rounded[name]):
            raise InvalidFile(f"{folder / FOLDER} is of other weights than those in {weights.MODEL}/, as of {name}")
    return weights.filled(layout.config, exact, dtype)


def whole(folder: Path, layout: weights.Layout, ranks: list[dict[str, Named]], what: str) -> dict[str, Tensor]:
    """One kind of tensor of all parameters, by our names."""
    present = {name for rank in ranks for name in rank[what]}
    if lacking := [name for rank in ranks for name in present - rank[what].keys()]:
        raise InvalidFile(f"{folder / FOLDER} lacks {what} of {min(lacking)} on one of its ranks")
    return dict(weights.named(folder / FOLDER, layout, lambda name: [rank[what][name] for rank in ranks], present))


def read(folder: Path) -> list[dict[str, Named]]:
    """Kind -> nanotron's name -> tensor, of each rank. Raises InvalidFile, naming the file, for anything else."""
    ranks = [sorted_out(read_pickled(path), path) for path in files(folder)]
    if any(rank.keys() != ranks[0].keys() for rank in ranks):
        raise InvalidFile(f"{folder / FOLDER}: only some ranks have a {STEPPED}")
    return ranks


def files(folder: Path) -> list[Path]:
    """The optimizer's files in the order of ranks. Raises InvalidFile where one is missing, or they are sharded."""
    root = folder / FOLDER
    paths = sorted(root.glob("*.pt"))
    if not paths:
        raise InvalidFile(f"{folder} has no moments to go on with: there is no {FOLDER}/*.pt in it")
    about = root / ABOUT
    if "_dp-" in paths[0].name or (about.is_file() and read_json(about).get("type") == SHARDED):
        raise InvalidFile(f"{root} is sharded over replicas ({SHARDED}); only zero_stage 0 is read, as SmolLM2 had it")
    found = {}
    for path in paths:
        match = FILE.fullmatch(path.name)
        if match is None:
            raise InvalidFile(f"{path} is of pipeline stages, experts or nothing known, which is not read here")
        found[int(match[1]), int(match[2])] = path
    count = max(ranks for _, ranks in found)
    for rank in range(count):
        if (rank, count) not in found:
            raise InvalidFile(f"{root} lacks the file of rank {rank} of {count}")
    if len(found) > count:
        raise InvalidFile(f"{root} has files of different numbers of ranks, such as {paths[0].name}")
    return [found[rank, count] for rank in range(count)]


def read_pickled(path: Path) -> Any:
    """What torch.save wrote, if it is tensors, numbers, text and containers. No code of the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken stream makes its reader raise anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            said = f"it asks for {asked[1]}, which no optimizer needs; it was not run"
        else:
            said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidFile(f"{path} cannot be read: {said}") from None


def sorted_out(content: Any, path: Path) -> dict[str, Named]:
    """Kind -> nanotron's name -> tensor, of one rank's state_dict. Raises InvalidFile where it is none."""
    check_keys(content, path, "it", KEYS, {STEPPED})
    state, names = content["state"], content["names"]
    check_keys(state, path, "state", set(names) if isinstance(names, dict) else set())
    if not all(isinstance(name, str) for name in names.values()) or len(set(names.values())) < len(names):
        raise InvalidFile(f"{path}: names should give each parameter one name")
    found: dict[str, Named] = {what: {} for what in (*MOMENTS, STEP)}
    for index, name in names.items():
        check_keys(state[index], path, f"the state of {name}", {*MOMENTS, STEP})
        for what, kept in found.items():
            kept[name] = numbers(state[index][what], path, f"{what} of {name}")
        if found[STEP][name].numel() != 1:
            raise InvalidFile(f"{path}: {STEP} of {name} should be one number")
        found[STEP][name] = found[STEP][name].float().reshape(())
    if STEPPED in content:
        check_keys(content[STEPPED], path, STEPPED, set(names.values()))
        found[STEPPED] = {name: numbers(each, path, f"the weight of {name}") for name, each in content[STEPPED].items()}
    return found


def check_keys(content: Any, path: Path, what: str, wanted: Set[Any], also: Set[str] = frozenset()) -> None:
    """Raises InvalidFile for what is no dictionary, lacks a key, or has one that is not known."""
    if not isinstance(content, dict):
        raise InvalidFile(f"{path}: {what} should be a dictionary, and is {type(content).__name__}")
    if wrong := (wanted - content.keys()) or (content.keys() - wanted - also):
        first = min(map(str, wrong))
        raise InvalidFile(f"{path}: {what} {'lacks' if wanted - content.keys() else 'has an unknown'} {first}")


def numbers(value: Any, path: Path, what: str) -> Tensor:
    """A plain tensor of finite-precision numbers, as it should be. Raises InvalidFile for anything else."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    if not plain or value.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise InvalidFile(f"{path}: {what} should be a tensor of floating-point numbers")
    return value.detach()
