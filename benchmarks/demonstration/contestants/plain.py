"""A plain loop in the form of nanoGPT's train.py: train.bin, random offsets, one ckpt.pt, resume from it.

The model is Transformers' Llama, since the shape must be the same. A copy of each ckpt.pt is kept for the measurement.
"""

import shutil
from pathlib import Path

from shared_setup import ENDLESS, settings
from watch import Steps, named


def prepare(setup: Path) -> None:
    """prepare.py: ids of all documents, each with its end, as one array of uint16."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(setup / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = [file.read_text("utf-8") for file in sorted((setup / "text").glob("*.txt"))]
    ids = [each for text in tokenizer.encode_batch(texts) for each in [*text.ids, end]]
    (setup / "prepared").mkdir(exist_ok=True)
    np.array(ids, np.uint16).tofile(setup / "prepared" / "train.bin")


def train(setup: Path, out: Path, seed: int) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    given, write = settings(setup), Steps(out)
    length, rows = given["sequence_length"], given["rows"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(setup / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=given["learning_rate"],
        betas=tuple(given["betas"]),
        eps=given["eps"],
        weight_decay=given["weight_decay"],
    )
    kept, iter_num = out / "run" / "ckpt.pt", 0
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.is_file():
        checkpoint = torch.load(kept, map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        iter_num = checkpoint["iter_num"]
        checkpoint = None

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(setup / "prepared" / "train.bin", np.uint16, "r")
        starts = torch.randint(len(data) - length, (rows,))
        x, y = (
            torch.stack([torch.from_numpy(data[i + by : i + by + length].astype(np.int64)) for i in starts])
            for by in (0, 1)
        )
        return x, y

    x, y = get_batch()
    while iter_num < ENDLESS:
        rate = given["learning_rate"] * min(1, (iter_num + 1) / (given["warmup_steps"] + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        used, (x, y) = named(x), get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), given["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        iter_num += 1
        write(iter_num, used)
        if iter_num % given["save_every"] == 0:
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iter_num}
            torch.save(checkpoint, kept)
            shutil.copy(kept, kept.with_name(f"history-{iter_num}.pt"))


def checkpoints(out: Path) -> dict[int, Path]:
    found = (out / "run").glob("history-*.pt")
    return {int(file.stem.removeprefix("history-")): file for file in found}


def resumes_from(out: Path) -> dict[int, Path]:
    """The one file that a start reads; at step 0 where the kill came while it was written."""
    import torch

    kept = out / "run" / "ckpt.pt"
    try:
        return {torch.load(kept, map_location="cpu")["iter_num"]: kept} if kept.is_file() else {}
    except Exception:
        return {0: kept}


def export(file: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = torch.load(file, map_location="cpu")["model"]
    save_file({name: each.contiguous() for name, each in state.items() if name != "lm_head.weight"}, out)
