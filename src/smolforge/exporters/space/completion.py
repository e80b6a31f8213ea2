"""Continue a text with a model: `pip install -r requirements.txt && python app.py`, here or as a Space."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextIteratorStreamer

MODEL, REVISION, TITLE = "model", "main", "A model"
FOLDER = Path(__file__).parent / MODEL
SOURCE = str(FOLDER) if FOLDER.is_dir() else MODEL
tokenizer: Any = AutoTokenizer.from_pretrained(SOURCE, revision=REVISION)
model: Any = AutoModelForCausalLM.from_pretrained(SOURCE, revision=REVISION, dtype=torch.float32).eval()


def continue_text(text: str, temperature: float, top_p: float, tokens: int) -> Iterator[str]:
    """Yield the text with its continuation as it grows; of a text that is too long, the model reads the end."""
    max_tokens = model.config.max_position_embeddings - tokens
    encoded = tokenizer(text or tokenizer.eos_token, return_tensors="pt", split_special_tokens=bool(text))
    ids = {name: encoded[name][:, -max_tokens:] for name in ("input_ids", "attention_mask")}
    streamer = TextIteratorStreamer(tokenizer, timeout=300, skip_prompt=True, skip_special_tokens=True)
    stop_event = Event()
    stops = StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), stop_event.is_set())])
    sampling = {"temperature": float(temperature), "top_p": top_p} if temperature else {}  # a page sends 2 for 2.0
    options = {**ids, **sampling, "max_new_tokens": tokens, "streamer": streamer, "stopping_criteria": stops}
    future = ThreadPoolExecutor(1).submit(model.generate, **options, do_sample=temperature > 0)
    future.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))  # where it failed as well
    try:
        for chunk in streamer:
            yield (text := text + chunk)
        future.result()  # which tells the page why it failed
    finally:
        stop_event.set()  # the page was closed, or its stop button pressed


MAX_NEW_TOKENS = min(1024, model.config.max_position_embeddings // 2)
with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
    gr.Markdown(f"# {TITLE}\nIt continues what you write; go on where it stopped.")
    box = gr.Textbox("Once upon a time", lines=12, max_lines=30, label="text", autofocus=True)
    with gr.Row():
        start, stop = gr.Button("Continue", variant="primary"), gr.Button("Stop")
    with gr.Row():
        temperature = gr.Slider(0, 2, 0.7, label="temperature")
        top_p = gr.Slider(0.05, 1, 0.95, label="top_p")
        tokens = gr.Slider(1, MAX_NEW_TOKENS, min(100, MAX_NEW_TOKENS), step=1, label="max_new_tokens")
    writing = start.click(
        continue_text, [box, temperature, top_p, tokens], box, api_name="go_on", show_progress="minimal"
    )
    stop.click(None, cancels=[writing])
if __name__ == "__main__":
    page.launch(theme=gr.themes.Base(), footer_links=[])
