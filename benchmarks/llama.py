"""llama.cpp on a .gguf, told by name what to do, in an environment of its own: `make .llama`."""

import time
from pathlib import Path
from typing import Any


class LlamaCpp:
    """One sequence, greedy, its model mapped into memory and read once."""

    def __init__(self, file: Path, threads: int, prompt: list[int], new: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            str(file), n_ctx=len(prompt) + new + 1, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.prompt, self.new = prompt, new

    def turn(self) -> dict[str, Any]:
        """Times of the first token and the last, by the clock and the processor's, and the ids."""
        self.model.reset()
        at, ids = [], []
        for token in self.model.generate(self.prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            at.append((time.perf_counter(), time.process_time()))
            ids.append(token)
            if len(ids) == self.new:
                return {"at": at, "ids": ids}
        raise AssertionError("it never stops by itself")
