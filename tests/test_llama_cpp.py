"""llama.cpp itself: its converter, its tools and its own running of our files. `make .llama` builds what is needed.

.llama/build/bin   llama.cpp's library, llama-quantize and llama-gguf-split
.llama/venv        llama-cpp-python
.llama/source      its source, with llama.cpp's converter
.llama/converter   what the converter imports and we do not
"""

import ctypes
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
from gguf import GGUFReader, dequantize
from test_gguf import random_blocks
from test_tokenizer import NASTY
from transformers import AutoModelForCausalLM

from smolforge.checkpoint import gguf, huggingface, loading
from smolforge.checkpoint.gguf import block_types
from smolforge.config import Generation
from smolforge.errors import InvalidFileError
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.transformers import to_transformers
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models.decoder import build
from smolforge.testing import tiny_config, tiny_model
from smolforge.tokenizer import Tokenizer
from smolforge.verification import HARD_TEXTS

LLAMA = Path(__file__).parents[1] / ".llama"
SOURCE, TOOLS, PYTHON = LLAMA / "source/vendor/llama.cpp", LLAMA / "build/bin", LLAMA / "venv/bin/python"
CONVERTER = SOURCE / "convert_hf_to_gguf.py"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not all(path.exists() for path in (PYTHON, CONVERTER, TOOLS / "llama-gguf-split")),
        reason="llama.cpp is not here: make .llama",
    ),
]
TEXTS = [*HARD_TEXTS, *NASTY]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    return", "12345 \u6f22\u5b57 I've"]
GREEDY_TOKENS = 48
SHAPE = {"vocab_size": 49_152, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "head_dim": 16}

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


def convert(*words: object) -> None:
    child(CONVERTER, *words, python=sys.executable, path=str(LLAMA / "converter"))


def quantize(source: Path, out: Path, kind: str) -> Path:
    """Write a file of a type by llama-quantize."""
    child(source, out, kind, 1, python=TOOLS / "llama-quantize")
    return out


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


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])  # and no others has the converter
def test_gguf_equals_the_llama_cpp_converter(folder, tmp_path, kind):
    to_gguf(folder, tmp_path / "ours.gguf", kind)
    source = shutil.copytree(folder, tmp_path / "source")
    if "qwen2" in (source / "config.json").read_text():  # AutoTokenizer would take Qwen's rules for splitting text
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": ""}))
    convert("--outtype", kind, "--outfile", tmp_path / "theirs.gguf", source)
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")
    ours, wanted = said(tmp_path / "ours.gguf"), said(tmp_path / "theirs.gguf")
    assert {key: ours.get(key) for key in wanted} == wanted
    assert ours.keys() - wanted.keys() <= {  # of qwen the converter leaves these to be derived
        *(f"{family}.{key}" for family in ("qwen2", "qwen3") for key in ("vocab_size", "rope.dimension_count")),
        *("qwen2.attention.key_length", "qwen2.attention.value_length"),
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_space_prefix",
    }


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_gguf_quantization_equals_llama_cpp(folder, tmp_path, kind):
    to_gguf(folder, tmp_path / "f32.gguf", "f32")
    to_gguf(folder, tmp_path / "ours.gguf", kind)
    quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", kind)
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")
    ours, theirs = (dict(loading.load(tmp_path / name).named_parameters()) for name in ("ours.gguf", "theirs.gguf"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_gguf_with_a_q6_k_head_is_read(tmp_path):
    """What the quantiser makes of a width that 256 divides; here it is q8_0."""
    wide = tiny_model(hidden_size=256)
    huggingface.save(wide, tmp_path / "wide", wide.tokenizer)
    to_gguf(tmp_path / "wide", tmp_path / "f32.gguf", "f32")
    quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "q4_0")
    assert stored(tmp_path / "theirs.gguf")["token_embd.weight"][0] == "Q6_K"
    head = loading.load(tmp_path / "theirs.gguf").lm_head_weight
    assert 0 < (head - wide.lm_head_weight).abs().max() < wide.lm_head_weight.abs().max() / 32


@pytest.fixture(scope="module", params=[256, 576])
def f32_file(request, tmp_path_factory):
    """A model of as wide a row as K types need, and one of SmolLM2's, which 256 does not divide."""
    below = tmp_path_factory.mktemp(f"wide-{request.param}")
    shape = {"hidden_size": request.param, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 8}
    model = tiny_model(**shape, head_dim=64 if request.param == 256 else 72, num_key_value_heads=4)
    huggingface.save(model, below / "model", model.tokenizer)
    to_gguf(below / "model", below / "f32.gguf", "f32")
    return below / "f32.gguf"


QUANTIZE_TYPES = """
    Q8_0 Q5_0 Q5_1 Q4_0 Q4_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ4_NL IQ4_XS
""".split()  # noqa: SIM905


def test_every_file_of_llama_quantize_is_read(f32_file, tmp_path):
    """Each tensor as the gguf package decodes it; what 256 does not divide falls back to other types."""
    types, wide = set(), "wide-256" in str(f32_file)
    original = gguf.GGUFReader(f32_file)
    for kind in QUANTIZE_TYPES:
        path = quantize(f32_file, tmp_path / f"{kind}.gguf", kind)
        read = gguf.GGUFReader(path)
        tensors = GGUFReader(path).tensors
        assert list(read.tensors) == [each.name for each in tensors]
        for each in tensors:
            values = read[each.name].numpy()
            np.testing.assert_array_equal(dequantize(each.data, each.tensor_type).reshape(values.shape), values)
            assert np.abs(values - original[each.name].numpy()).max() <= np.abs(values).max() / 2, "a wrong type"
        types |= {stored.type.name for stored in read.tensors.values()}
        loaded = loading.load(path)
        assert bool(loaded(torch.arange(30)[None]).isfinite().all())
    by_32 = {"f32", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl"}
    by_256 = {"q3_K", "q4_K", "q5_K", "q6_K", "iq4_xs"}  # of rows of 512, also in the narrow model
    assert types == by_32 | by_256 | ({"q2_K"} if wide else set())


def test_a_k_file_is_the_same_in_transformers(f32_file, tmp_path):
    quantize(f32_file, tmp_path / "k.gguf", "Q4_K_M")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="k.gguf", dtype=torch.float32)
    ours = loading.load(tmp_path / "k.gguf")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), oracle(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [name for name, kind in gguf.BLOCK_TYPES.items() if kind.dtype is None])
def test_blocks_are_decoded_as_llama_cpp_does(kind):
    """Random bits, by the C function of each type."""
    content = np.ascontiguousarray(random_blocks(kind, 4096))
    count = 4096 * gguf.BLOCK_TYPES[kind].block_size
    expected = np.empty(count, np.float32)
    library = ctypes.CDLL(str(TOOLS / "libggml-base.so"))
    pointers = (content.ctypes.data_as(ctypes.c_void_p), expected.ctypes.data_as(ctypes.c_void_p))
    getattr(library, f"dequantize_row_{kind}")(*pointers, ctypes.c_int64(count))
    ours = block_types.from_blocks(torch.from_numpy(content).flatten(), gguf.BLOCK_TYPES[kind], (count,)).numpy()
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(ours).max() > 0


@pytest.mark.parametrize("more", [[], ["--no-tensor-first-split"]])
def test_parts_of_llama_gguf_split_are_one_model(f32_file, tmp_path, more):
    words = ["--split", "--split-max-tensors", 20, *more, f32_file, tmp_path / "part"]
    child(*words, python=TOOLS / "llama-gguf-split")
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) == 5 + bool(more)
    whole = loading.load(f32_file)
    for part in (parts[0], parts[-1]):
        model = loading.load(part)
        assert model.config == whole.config
        assert model.tokenizer.fingerprint == whole.tokenizer.fingerprint
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), whole.parameters(), strict=True))
    parts[2].unlink()
    with pytest.raises(InvalidFileError, match=rf"{parts[2].name} is not beside it"):
        loading.load(parts[0])
    assert loading.load_tokenizer(parts[0]).fingerprint == whole.tokenizer.fingerprint


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_vocabularies_of_llama_cpp_are_read(folder, tmp_path):
    """One of its converter, and one of its own tests with texts and ids."""
    convert("--vocab-only", "--outfile", tmp_path / "vocabulary.gguf", folder)
    assert not gguf.GGUFReader(tmp_path / "vocabulary.gguf").tensors
    ours, real = loading.load_tokenizer(tmp_path / "vocabulary.gguf"), loading.load_tokenizer(folder)
    assert [ours.encode(text) for text in TEXTS] == [real.encode(text) for text in TEXTS]
    file = SOURCE / "models/ggml-vocab-gpt-2.gguf"
    tokenizer = loading.load_tokenizer(file)
    texts = file.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = file.with_suffix(".gguf.out").read_text().split("\n")
    expected = [[int(number) for number in line.split()] for line in lines][: len(texts)]
    assert len(texts) > 40
    assert [tokenizer.encode(text) for text in texts] == expected


ROPE_SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
@torch.inference_mode()
def test_rotary_scaling_equals_llama_cpp(tmp_path, kind):
    """Its converter's file, and its logits in a long text."""
    model = build(tiny_config(rope_scaling=ROPE_SCALINGS[kind], **SHAPE | {"head_dim": 32}), seed=1).eval()
    if not SHARED.is_dir():
        pytest.skip("the real tokenizer is not beside this checkout")
    model.tokenizer = Tokenizer.load(SHARED / "smollm2-tokenizer")
    huggingface.save(model, tmp_path / "run", model.tokenizer)
    to_transformers(tmp_path / "run", tmp_path / "model")
    to_gguf(tmp_path / "run", tmp_path / "ours.gguf", "f32")
    convert("--outtype", "f32", "--outfile", tmp_path / "theirs.gguf", tmp_path / "model")
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")
    ours, wanted = said(tmp_path / "ours.gguf"), said(tmp_path / "theirs.gguf")
    assert {key: ours.get(key) for key in wanted} == wanted
    assert loading.read_config(tmp_path / "theirs.gguf").rope_scaling == model.config.rope_scaling
    prompt = torch.randint(49_152, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {"model": str(tmp_path / "ours.gguf"), "texts": [], "prompts": [prompt], "count": 8}
    answer = json.loads(child("-c", RUN, given=json.dumps(asked)).splitlines()[-1])
    torch.testing.assert_close(model(torch.tensor([prompt]))[0], torch.tensor(answer["logits"]), atol=1e-5, rtol=0)


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
