"""llama.cpp itself: its converter, its quantiser and its own running of our files. `make .llama` builds what is needed.

.llama/venv        llama-cpp-python, and so llama.cpp's library
.llama/source      its source, with llama.cpp's converter
.llama/converter   what the converter imports and we do not
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from gguf import GGUFReader
from test_tokenizer import NASTY

from smolforge.checkpoint import huggingface, loading
from smolforge.config import Generation
from smolforge.exporters.gguf import FILE_TYPES, to_gguf
from smolforge.exporters.transformers import to_transformers
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models.decoder import build
from smolforge.testing import tiny_config, tiny_model
from smolforge.tokenizer import Tokenizer
from smolforge.verification import HARD_TEXTS

LLAMA = Path(__file__).parents[1] / ".llama"
PYTHON, CONVERTER = LLAMA / "venv/bin/python", LLAMA / "source/vendor/llama.cpp/convert_hf_to_gguf.py"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (PYTHON.exists() and CONVERTER.exists()), reason="llama.cpp is not here: make .llama"),
]
TEXTS = [*HARD_TEXTS, *NASTY]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    return", "12345 \u6f22\u5b57 I've"]
GREEDY_TOKENS = 48
SHAPE = {"vocab_size": 49_152, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "head_dim": 16}

QUANTIZE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = 1, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""
RUN = """
import json, sys, numpy, llama_cpp
asked = json.load(sys.stdin)
exact = {"flash_attn": False, "type_k": 0, "type_v": 0}  # caches in fp32, as ours are
one = {"n_threads": 1, "n_threads_batch": 1}
model = llama_cpp.Llama(asked["model"], verbose=False, n_ctx=128, logits_all=True, **one, **exact)
said = {"ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]], "greedy": []}
for prompt in asked["prompts"]:
    model.reset()
    model.eval(prompt)
    said.setdefault("logits", model.scores[: len(prompt)].tolist())
    said["greedy"].append([])
    for _ in range(asked["count"]):
        said["greedy"][-1].append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
        model.eval(said["greedy"][-1][-1:])
print(json.dumps(said))
"""


def child(*words: object, given: str | None = None, python: Path | str = PYTHON, path: str = "") -> str:
    """What a program of llama.cpp's says."""
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), *map(str, words)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mixtral"])
def folder(request, tmp_path_factory):
    """A small model of random weights with the real tokenizer, as Transformers has it."""
    if not SHARED.is_dir():
        pytest.skip("the real tokenizer is not beside this checkout")
    shared = SHARED / "smollm2-tokenizer"
    below = tmp_path_factory.mktemp(request.param)
    model = build(tiny_config(model_type=request.param, **SHAPE), seed=1)
    template = (shared / "chat_template_instruct.jinja").read_text()
    real = Tokenizer.load(shared)
    model.tokenizer = Tokenizer(real.backend, real.settings | {"chat_template": template})
    huggingface.save(model, below / "run", model.tokenizer)
    to_transformers(below / "run", below / "model")
    return below / "model"


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name to type, shape and bytes of every tensor, as the gguf package reads them."""
    tensors = GGUFReader(path).tensors
    return {each.name: (each.tensor_type.name, tuple(each.shape), np.array(each.data).tobytes()) for each in tensors}


def said(path: Path) -> dict[str, object]:
    """What a file says of shape and tokenizer; names and sizes for people (general) aside."""
    fields = GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith(("GGUF.", "general."))}


@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind != "q4_0"])  # which the converter has not
def test_gguf_equals_the_llama_cpp_converter(folder, tmp_path, kind):
    to_gguf(folder, tmp_path / "ours.gguf", kind)
    source = shutil.copytree(folder, tmp_path / "source")
    if "qwen2" in (source / "config.json").read_text():  # AutoTokenizer would take Qwen's rules for splitting text
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": ""}))
    words = [CONVERTER, "--outtype", kind, "--outfile", tmp_path / "theirs.gguf", source]
    child(*words, python=sys.executable, path=str(LLAMA / "converter"))
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")
    ours, wanted = said(tmp_path / "ours.gguf"), said(tmp_path / "theirs.gguf")
    assert {key: ours.get(key) for key in wanted} == wanted
    assert ours.keys() - wanted.keys() <= {  # of qwen the converter leaves these to be derived
        *(f"{family}.{key}" for family in ("qwen2", "qwen3") for key in ("vocab_size", "rope.dimension_count")),
        *("qwen2.attention.key_length", "qwen2.attention.value_length"),
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_space_prefix",
    }


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_gguf_quantization_equals_llama_cpp(folder, tmp_path, kind):
    to_gguf(folder, tmp_path / "f32.gguf", "f32")
    to_gguf(folder, tmp_path / "ours.gguf", kind)
    child("-c", QUANTIZE, tmp_path / "f32.gguf", tmp_path / "theirs.gguf", FILE_TYPES[kind])
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")
    ours, theirs = (dict(loading.load(tmp_path / name).named_parameters()) for name in ("ours.gguf", "theirs.gguf"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_gguf_with_a_q6_k_head_is_read(tmp_path):
    """What the quantiser makes of a width that 256 divides; here it is q8_0."""
    wide = tiny_model(hidden_size=256)
    huggingface.save(wide, tmp_path / "wide", wide.tokenizer)
    to_gguf(tmp_path / "wide", tmp_path / "f32.gguf", "f32")
    child("-c", QUANTIZE, tmp_path / "f32.gguf", tmp_path / "theirs.gguf", FILE_TYPES["q4_0"])
    assert stored(tmp_path / "theirs.gguf")["token_embd.weight"][0] == "Q6_K"
    head = loading.load(tmp_path / "theirs.gguf").lm_head_weight
    assert 0 < (head - wide.lm_head_weight).abs().max() < wide.lm_head_weight.abs().max() / 32


@torch.inference_mode()
def test_gguf_tokenizer_ids_equal_llama_cpp(tmp_path):
    """Which is what the name in the file says, whosever tokens they are."""
    model = tiny_model(vocab_size=600)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    to_gguf(tmp_path / "model", tmp_path / "f32.gguf", "f32")
    assert said(tmp_path / "f32.gguf")["tokenizer.ggml.pre"] == "smollm"
    asked = {"model": str(tmp_path / "f32.gguf"), "texts": TEXTS, "prompts": [], "count": 0}
    answer = json.loads(child("-c", RUN, given=json.dumps(asked)).splitlines()[-1])
    assert answer["ids"] == [model.tokenizer.encode(text) for text in TEXTS]


@torch.inference_mode()
def test_gguf_logits_and_greedy_ids_equal_llama_cpp(folder, tmp_path):
    to_gguf(folder, tmp_path / "f32.gguf", "f32")
    model = loading.load(folder)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    asked = {"model": str(tmp_path / "f32.gguf"), "texts": TEXTS, "prompts": prompts, "count": GREEDY_TOKENS}
    answer = json.loads(child("-c", RUN, given=json.dumps(asked)).splitlines()[-1])
    for text, ids in zip(TEXTS, answer["ids"], strict=True):
        assert ids == model.tokenizer.encode(text), text
    logits = torch.tensor(answer["logits"])
    torch.testing.assert_close(model(torch.tensor(prompts[:1]))[0], logits, atol=1e-5, rtol=0)
    for prompt, ids in zip(prompts, answer["greedy"], strict=True):
        greedy = generate_tokens(model, [prompt], make_sampler(Generation(temperature=0)), max_new_tokens=GREEDY_TOKENS)
        assert [token.id for token in greedy] == ids
