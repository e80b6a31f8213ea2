"""litgpt's pretrain, by the function behind its command: TextFiles in one process, `--resume true`, its compiler."""

import sys
from pathlib import Path
from typing import Any

from shared_setup import ENDLESS, settings
from watch import Steps, named


def shape(setup: Path, folder: Path) -> Any:
    from litgpt_shape import shape_of

    return shape_of(folder, settings(setup)["sequence_length"])


def prepare(setup: Path) -> None:
    """The model folder as `litgpt convert_to_litgpt` leaves it, and its own preparation of the text."""
    import torch
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.tokenizer import Tokenizer
    from litgpt.utils import save_config
    from safetensors.torch import load_file

    given = settings(setup)
    folder, renamed = setup / "model", dict[str, Any]()
    config = shape(setup, folder)
    copy_weights_hf_llama(config, {}, renamed, load_file(folder / "model.safetensors"))
    renamed.setdefault("lm_head.weight", renamed["transformer.wte.weight"])
    torch.save(renamed, folder / "lit_model.pth")
    save_config(config, folder)
    data = texts(setup)
    data.connect(Tokenizer(folder), given["rows"], given["sequence_length"])
    data.prepare_data()


def texts(setup: Path) -> Any:
    """Its TextFiles over one file, since it makes a process for each; what is held out is for its validation."""
    from litgpt.data import TextFiles

    folder = setup / "prepared" / "litgpt"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        documents = [file.read_text("utf-8") for file in sorted((setup / "text").glob("*.txt"))]
        (folder / "1.txt").write_text("<|endoftext|>".join(documents), "utf-8")
        (folder / "held_out").mkdir()
        (folder / "held_out" / "0.txt").write_text((setup / "held_out.txt").read_text("utf-8"), "utf-8")
    return TextFiles(train_data_path=folder, val_data_path=folder / "held_out", num_workers=0)


def train(setup: Path, out: Path, seed: int) -> None:
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs

    given, write = settings(setup), Steps(out)
    tokens = given["rows"] * given["sequence_length"]
    begun = checkpoints(out)
    count = max(begun, default=0)

    following = pretrain.CycleIterator.__next__
    under_way: list[Any] = []

    def watched(self: Any) -> Any:
        """A step is over when the batch of the next is asked for."""
        nonlocal count
        if under_way:
            count += 1
            write(count, named(under_way.pop()[:, :-1]))
        under_way.append(following(self))
        return under_way[0]

    pretrain.CycleIterator.__next__ = watched  # type: ignore
    sys.argv = ["pretrain", "demonstration"]  # read again by its saving, which writes down how it was called
    pretrain.setup(
        "demonstration",
        shape(setup, setup / "model"),
        out / "run",
        "32-true",
        initial_checkpoint_dir=None if begun else setup / "model",
        resume=bool(begun),
        data=texts(setup),
        train=TrainArgs(
            save_interval=given["save_every"],
            log_interval=1,
            global_batch_size=given["rows"],
            micro_batch_size=given["rows"],
            max_tokens=ENDLESS * tokens,
            max_seq_length=given["sequence_length"],
            max_norm=given["max_grad_norm"],
            min_lr=given["learning_rate"],
            lr_warmup_steps=given["warmup_steps"],
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=ENDLESS, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": given["learning_rate"],
                "betas": tuple(given["betas"]),
                "eps": given["eps"],
                "weight_decay": given["weight_decay"],
            },
        },
        tokenizer_dir=setup / "model",
        devices=1,
        logger_name="csv",
        seed=seed,
    )


def checkpoints(out: Path) -> dict[int, Path]:
    found = (out / "run").glob("step-*/lit_model.pth")
    return {int(file.parent.name.removeprefix("step-")): file for file in found}


resumes_from = checkpoints


def export(file: Path, out: Path) -> None:
    import torch
    from litgpt import Config
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from safetensors.torch import save_file

    config = Config.from_file(file.parent / "model_config.yaml")
    state, renamed = torch.load(file, map_location="cpu")["model"], dict[str, Any]()
    state = {name.removeprefix("_orig_mod."): each for name, each in state.items()}
    copy_weights_llama(config, renamed, state, untie_weights=True)
    save_file({name: each.contiguous() for name, each in renamed.items()}, out)
