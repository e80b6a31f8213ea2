"""Transformers' Trainer, as its examples use it: text in blocks, `get_last_checkpoint`, `resume_from_checkpoint`."""

from collections import deque
from pathlib import Path
from typing import Any

from shared_setup import ENDLESS, settings
from watch import Steps, named


def prepare(setup: Path) -> None:
    """run_clm.py's group_texts: all ids strung together, cut into blocks, the rest dropped."""
    import torch
    from tokenizers import Tokenizer

    given, tokenizer = settings(setup), Tokenizer.from_file(str(setup / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = [file.read_text("utf-8") for file in sorted((setup / "text").glob("*.txt"))]
    ids = [each for text in tokenizer.encode_batch(texts) for each in [*text.ids, end]]
    length = given["sequence_length"]
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    (setup / "prepared").mkdir(exist_ok=True)
    torch.save(blocks, setup / "prepared" / "trainer.pt")


def train(setup: Path, out: Path, seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    given, write = settings(setup), Steps(out)
    blocks = torch.load(setup / "prepared" / "trainer.pt")
    model = AutoModelForCausalLM.from_pretrained(setup / "model", dtype=torch.float32)
    fetched: deque[list[str]] = deque()  # the loader is a batch ahead

    def collate(examples: list[Any]) -> dict[str, Any]:
        ids = torch.stack([example["input_ids"] for example in examples])
        fetched.append(named(ids))
        return {"input_ids": ids, "labels": ids}

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write(state.global_step, fetched.popleft())

    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        max_steps=ENDLESS,
        per_device_train_batch_size=given["rows"],
        learning_rate=given["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=given["warmup_steps"],
        adam_beta1=given["betas"][0],
        adam_beta2=given["betas"][1],
        adam_epsilon=given["eps"],
        weight_decay=given["weight_decay"],
        max_grad_norm=given["max_grad_norm"],
        save_steps=given["save_every"],
        save_total_limit=None,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": block} for block in blocks]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Watching()])  # type: ignore
    last = get_last_checkpoint(str(out / "run")) if (out / "run").is_dir() else None
    trainer.train(resume_from_checkpoint=last)


def checkpoints(out: Path) -> dict[int, Path]:
    found = (out / "run").glob("checkpoint-*/model.safetensors")
    return {int(file.parent.name.removeprefix("checkpoint-")): file for file in found}


def resumes_from(out: Path) -> dict[int, Path]:
    """`get_last_checkpoint` takes the newest folder, whether or not there are weights in it yet."""
    found = (out / "run").glob("checkpoint-*")
    return {int(folder.name.removeprefix("checkpoint-")): folder / "model.safetensors" for folder in found}


def export(file: Path, out: Path) -> None:
    """Read and written, so that a file that was being written is an error here."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(file), out)
