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


def clean(text: str) -> str:
    """Replace special tokens in what the user writes."""
    for token in SPECIAL:
        text = text.replace(token, " ")  # and not nothing, which would let its neighbours become one
    return text


def encode(messages: list[dict[str, str]], max_tokens: int) -> Any:
    """Encode the conversation as ids; where it is too long, drop its oldest turns."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if ids["input_ids"].shape[1] > max_tokens and len(messages) > 2:
        return encode(messages[2:], max_tokens)
    return {name: rows[:, -max_tokens:] for name, rows in ids.items()}


def answer(message: str, history: list[Any], temperature: float, top_p: float, tokens: int) -> Iterator[str]:
    """Yield the answer as it grows."""
    turns = [{"role": turn["role"], "content": clean(turn["content"][0]["text"])} for turn in history]
    ids = encode([*turns, {"role": "user", "content": clean(message)}], model.config.max_position_embeddings - tokens)
    streamer, stop = TextIteratorStreamer(tokenizer, timeout=300, skip_prompt=True, skip_special_tokens=True), Event()
    text, stops = "", StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), stop.is_set())])
    sampling = {"temperature": float(temperature), "top_p": top_p} if temperature else {}  # a page sends 2 for 2.0
    options = {**ids, **sampling, "max_new_tokens": tokens, "streamer": streamer, "stopping_criteria": stops}
    future = ThreadPoolExecutor(1).submit(model.generate, **options, do_sample=temperature > 0)
    future.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))  # where it failed as well
    try:
        for chunk in streamer:
            yield (text := text + chunk)
        future.result()  # which tells the page why it failed
    finally:
        stop.set()  # the page was closed, or its stop button pressed


MAX_NEW_TOKENS = min(1024, model.config.max_position_embeddings // 2)
sliders = [gr.Slider(0, 2, 0.2, label="temperature"), gr.Slider(0.05, 1, 0.9, label="top_p")]
sliders.append(gr.Slider(1, MAX_NEW_TOKENS, min(256, MAX_NEW_TOKENS), step=1, label="max_new_tokens"))
chatbot = gr.Chatbot(show_label=False, buttons=["copy"], placeholder="Say something.", height="60vh")
page = gr.ChatInterface(answer, chatbot=chatbot, additional_inputs=sliders, title=TITLE, analytics_enabled=False)
if __name__ == "__main__":
    page.launch(theme=gr.themes.Base(), footer_links=[])
