"""Chat with a model: `pip install -r requirements.txt && python app.py`, here or as a Space."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextIteratorStreamer

MODEL, REVISION, TITLE = "model", "main", "A model"
SOURCE = str(FOLDER) if (FOLDER := Path(__file__).parent / MODEL).is_dir() else MODEL
tokenizer: Any = AutoTokenizer.from_pretrained(SOURCE, revision=REVISION)
model: Any = AutoModelForCausalLM.from_pretrained(SOURCE, revision=REVISION, dtype=torch.float32).eval()
SPECIAL = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def plain(text: str) -> str:
    """What people write holds no special tokens."""
    for token in SPECIAL:
        text = text.replace(token, " ")  # and not nothing, which would let its neighbours become one
    return text


def prompt(messages: list[dict[str, str]], room: int) -> Any:
    """The conversation as ids; where it is too long, without its oldest turns."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if ids["input_ids"].shape[1] > room and len(messages) > 2:
        return prompt(messages[2:], room)
    return {name: rows[:, -room:] for name, rows in ids.items()}


def answer(message: str, history: list[Any], temperature: float, top_p: float, tokens: int) -> Iterator[str]:
    """What the assistant says, as it grows."""
    said = [{"role": turn["role"], "content": plain(turn["content"][0]["text"])} for turn in history]
    ids = prompt([*said, {"role": "user", "content": plain(message)}], model.config.max_position_embeddings - tokens)
    pieces, left = TextIteratorStreamer(tokenizer, timeout=300, skip_prompt=True, skip_special_tokens=True), Event()
    text, stops = "", StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), left.is_set())])
    draws = {"temperature": float(temperature), "top_p": top_p} if temperature else {}  # a page sends 2 for 2.0
    options = {**ids, **draws, "max_new_tokens": tokens, "streamer": pieces, "stopping_criteria": stops}
    done = ThreadPoolExecutor(1).submit(model.generate, **options, do_sample=temperature > 0)
    done.add_done_callback(lambda _: pieces.on_finalized_text("", stream_end=True))  # where it failed as well
    try:
        for piece in pieces:
            yield (text := text + piece)
        done.result()  # which tells the page why it failed
    finally:
        left.set()  # the page was closed, or its stop button pressed


LONGEST = min(1024, model.config.max_position_embeddings // 2)
sliders = [gr.Slider(0, 2, 0.2, label="temperature"), gr.Slider(0.05, 1, 0.9, label="top_p")]
sliders.append(gr.Slider(1, LONGEST, min(256, LONGEST), step=1, label="max_new_tokens"))
talk = gr.Chatbot(show_label=False, buttons=["copy"], placeholder="Say something.", height="60vh")
page = gr.ChatInterface(answer, chatbot=talk, additional_inputs=sliders, title=TITLE, analytics_enabled=False)
if __name__ == "__main__":
    page.launch(theme=gr.themes.Base(), footer_links=[])
