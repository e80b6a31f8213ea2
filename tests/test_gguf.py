"""A .gguf says what the model said: held to the gguf package, to Transformers' reader, and to itself.

What llama.cpp makes of these files is in test_llama_cpp.py, which needs llama.cpp.
"""

import itertools
import json
import math
import os
import shutil
import struct
import time
from pathlib import Path

import gguf as theirs
import numpy as np
import pytest
import torch
from conftest import NANO, RELEASED, needs_released
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile import refused
from transformers import AutoModelForCausalLM

import smolforge
from smolforge import atomic, cli
from smolforge.checkpoint import gguf, huggingface, loading
from smolforge.checkpoint.gguf import block_types, container, llama
from smolforge.config import ModelConfig
from smolforge.config.presets import shape
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.exporters.gguf import FILE_TYPES, size_label, to_gguf
from smolforge.exporters.transformers import to_transformers
from smolforge.operating_system import peak_memory_bytes
from smolforge.testing import failing, sentences, tiny_config, tiny_model
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer import gguf_tokenizer as tokenizers
from smolforge.tokenizer.gguf_tokenizer import from_values, to_values
from smolforge.verification import HARD_TEXTS, transformers_reference

WORST_ROUNDING = {
    "f32": 0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 0.51 / 127,
    "q5_0": 1.01 / 16,
    "q5_1": 1.01 / 31,
    "q4_0": 1.01 / 8,
    "q4_1": 1.01 / 15,
}
"""Of a type, as a share of the largest number."""
RELATED_TYPES = ("q5_0", "q5_1", "q4_1")
"""Of which q4_0 and q8_0 show what differs between families."""
WIDE = {"intermediate_size": 64}
"""With it every matrix of the tiny model divides into blocks of 32."""
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def saved(path: Path, **changes) -> Path:
    """A model with a chat template, in a folder; its norms and biases are random too."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1 if weight.ndim == 1 else 0)
    tokenizer = Tokenizer(
        model.tokenizer.backend, model.tokenizer.settings | {"chat_template": TEMPLATE, "pad_token": "<|im_end|>"}
    )
    huggingface.save(model, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder and its .gguf, made once."""
    below = tmp_path_factory.mktemp("sound")
    to_gguf(saved(below / "model"), below / "it.gguf", "f32")
    return below


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound / "model", tmp_path / "model")


@pytest.fixture
def file(sound, tmp_path):
    return Path(shutil.copy(sound / "it.gguf", tmp_path))


@pytest.fixture
def recipe(tmp_path, text_file):
    content = {key: value for key, value in NANO.items() if key != "model"} | {"data": {"sources": [str(text_file)]}}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    return tmp_path / "recipe.json"


# The container, both ways beside the gguf package.

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
plain = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=5),
)
shapes = st.lists(st.integers(1, 3), min_size=0, max_size=2).map(lambda outer: (*outer, 32))


@settings(max_examples=40)
@given(
    values=st.dictionaries(names.map("smolforge.".__add__), plain, max_size=6),
    tensors=st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(FILE_TYPES))), max_size=4),
)
def test_gguf_write_equals_read_and_the_gguf_package(tmp_path_factory, values, tensors):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    generator = torch.Generator().manual_seed(len(values))
    given = {name: torch.randn(size, generator=generator) for name, (size, _) in tensors.items()}
    types = {name: gguf.BLOCK_TYPES[kind] for name, (_, kind) in tensors.items()}
    container.write(path, values, given, types=types)
    read = gguf.GGUFReader(path)
    assert read.metadata == values
    assert list(read.tensors) == list(given)
    for name, tensor in given.items():
        assert torch.equal(read[name], types[name].round_trip(tensor))
    reader = theirs.GGUFReader(path)
    assert {key: reader.fields[key].contents() for key in values} == values
    for each in reader.tensors:
        mine = read[each.name].numpy()
        np.testing.assert_array_equal(theirs.dequantize(each.data, each.tensor_type).reshape(mine.shape), mine)


def test_gguf_reads_files_of_the_gguf_package(tmp_path):
    writer = theirs.GGUFWriter(tmp_path / "b.gguf", "llama")
    for form in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{form}")(f"a.{form}", 7)
    writer.add_float64("a.float64", 0.1)
    writer.add_array("a.floats", [0.5, 2.0])
    writer.add_custom_alignment(64)
    tensors = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.ones(5, np.float16)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(tmp_path / "b.gguf")
    assert [read.metadata[key] for key in read.metadata if key.startswith("a.")] == [7] * 8 + [0.1, [0.5, 2.0]]
    assert read.tensors["y"].start % 64 == 0
    assert {name: read[name].tolist() for name in tensors} == {name: each.tolist() for name, each in tensors.items()}


def hard_rows() -> torch.Tensor:
    """Rows of 32 with zeros, ties, halves, tiny and large numbers."""
    rows = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    rows[:8] = 0
    rows[8:16, ::2] = -rows[8:16, 1::2]
    rows[16:24] = torch.arange(32) - 15.5
    rows[24:32] *= 1e-6
    rows[32:40] *= 1e4
    rows[40] = 127.0 * torch.tensor([1.0, *[0.5 / 127] * 31])
    return rows


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16", "f16"])
def test_block_types_equal_ggml_bit_for_bit(kind):
    rows, reference = hard_rows(), theirs.GGMLQuantizationType[kind.upper()]
    ours = block_types.to_blocks(rows, gguf.BLOCK_TYPES[kind])
    encoded, decoded = in_c(kind, rows)
    assert ours.numpy().tobytes() == encoded.numpy().tobytes() == theirs.quantize(rows.numpy(), reference).tobytes()
    back = block_types.from_blocks(ours, gguf.BLOCK_TYPES[kind], (4096, 32))
    assert torch.equal(back, decoded)
    assert torch.equal(back, gguf.BLOCK_TYPES[kind].round_trip(rows.reshape(2, 2048, 32)).reshape(4096, 32))
    assert gguf.BLOCK_TYPES[kind].type_id == reference
    assert (gguf.BLOCK_TYPES[kind].block_size, gguf.BLOCK_TYPES[kind].type_size) == theirs.GGML_QUANT_SIZES[reference]


def in_c(kind: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of rows, and the values again, as ggml-quants.c has them: quantize_row_q8_0_ref and so on."""
    if kind in ("bf16", "f16"):
        rounded = rows.to({"bf16": torch.bfloat16, "f16": torch.half}[kind])
        return rounded.view(torch.uint8), rounded.float()
    if kind == "q8_0":
        d = rows.abs().amax(-1, keepdim=True) / 127
        scaled = rows * torch.where(d == 0, 0.0, 1.0 / d)
        floor = scaled.abs().floor()  # roundf: halves away from zero
        q = (floor + (2 * (scaled.abs() - floor)).floor()) * scaled.sign()
        content = q.to(torch.int8).view(torch.uint8)
    else:
        d = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)) / -8
        q = (rows * torch.where(d == 0, 0.0, 1.0 / d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
        content, q = q[:, :16] | q[:, 16:] << 4, q.float() - 8
    return torch.cat([d.half().view(torch.uint8), content], -1), q * d.half().float()


def random_blocks(kind: str, count: int) -> np.ndarray:
    """Return blocks of random bits, whose scales are finite: half-precision numbers of about 0.01."""
    block_type = gguf.BLOCK_TYPES[kind]
    content = np.random.default_rng(0).integers(0, 256, (count, block_type.type_size), dtype=np.uint8)
    for start in SCALE_OFFSETS[kind]:
        scales = np.random.default_rng(1).normal(0, 0.01, (count, 1)).astype(np.float16)
        content[:, start : start + 2] = scales.view(np.uint8)
    return content


SCALE_OFFSETS = {
    "f32": (2,),  # its upper half, so that no number is NaN
    "f16": (0,),
    "bf16": (0,),
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_K": (80, 82),
    "q3_K": (108,),
    "q4_K": (0, 2),
    "q5_K": (0, 2),
    "q6_K": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
"""Where in a block its half-precision scales are (ggml-common.h)."""


@pytest.mark.parametrize("kind", gguf.BLOCK_TYPES)
def test_every_block_type_is_read_as_the_gguf_package_does(tmp_path, kind):
    """From a file of that package, by its own reader; test_llama_cpp.py holds them to llama.cpp."""
    block_type, reference = gguf.BLOCK_TYPES[kind], theirs.GGMLQuantizationType(gguf.BLOCK_TYPES[kind].type_id)
    assert (block_type.block_size, block_type.type_size) == theirs.GGML_QUANT_SIZES[reference]
    assert reference.name == kind.upper()
    rows = random_blocks(kind, 64).reshape(8, -1)
    writer = theirs.GGUFWriter(tmp_path / "it.gguf", "llama")
    writer.add_tensor("x", rows, raw_dtype=reference)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (expected,) = theirs.GGUFReader(tmp_path / "it.gguf").tensors
    read = gguf.GGUFReader(tmp_path / "it.gguf")["x"].numpy()
    np.testing.assert_array_equal(read, theirs.dequantize(expected.data, reference).reshape(read.shape))
    assert read.shape == (8, 8 * block_type.block_size)
    assert np.isfinite(read).all()


@pytest.mark.parametrize("kind", gguf.BLOCK_TYPES)
def test_every_block_type_is_refused_cut_half_and_mislabeled(tmp_path, kind):
    block_type, path = gguf.BLOCK_TYPES[kind], tmp_path / "it.gguf"
    number, width, size = block_type.type_id, block_type.block_size, block_type.type_size
    padding = bytes(-len(head(1) + tensor(sides=(width, 2), kind=number)) % 32)
    whole = head(1) + tensor(sides=(width, 2), kind=number) + padding + bytes(2 * size)
    path.write_bytes(whole)
    assert not gguf.GGUFReader(path)["a"].any(), "it is read as it is"
    half = (width + width // 2, 2) if width > 1 else (2**40,)
    for content, said in (
        (whole[:-1], "ends before a does; it was cut"),
        (whole[:-size], "ends before a does; it was cut"),
        (whole[: len(whole) - 2 * size], "ends before a does|which a file of .* cannot hold"),
        (head(1) + tensor(sides=half, kind=number) + bytes(4 * size), "no whole blocks of|cannot hold"),
        (head(1) + tensor(sides=(width, 2**40), kind=number) + bytes(4 * size), "cannot hold"),
        (head(1) + tensor(sides=(width, 3), kind=number) + bytes(2 * size), "ends before a does|cannot hold"),
        (
            head(2) + tensor(sides=(width, 2), kind=number) + tensor("b") + bytes(9 * size + 128),
            "data of b at 0, where",
        ),
    ):
        path.write_bytes(content)
        begun = time.process_time()
        with pytest.raises(InvalidFileError, match=said) as caught:
            gguf.GGUFReader(path)
        assert time.process_time() - begun < 2
        assert "\n" not in str(caught.value)


def test_infinite_scales_are_encoded_without_a_warning():
    """As those of weights that a half-precision scale cannot hold, which the check after writing refuses."""
    for kind in ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1"):
        assert not gguf.BLOCK_TYPES[kind].round_trip(torch.full((2, 32), 1e38)).isfinite().any()


def test_q6_k_blocks_are_read_as_ggml_does():
    content = np.random.default_rng(0).integers(0, 256, (64, 210), dtype=np.uint8)
    content[:, -2:] = np.full((64, 1), 0.01, np.float16).view(np.uint8)
    ours = block_types.from_blocks(torch.from_numpy(content).flatten(), gguf.BLOCK_TYPES["q6_K"], (32, 512))
    low, high, scales, _ = torch.from_numpy(content).split([128, 64, 16, 2], -1)  # dequantize_row_q6_K
    low, high = low.reshape(-1, 2, 1, 64), high.reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], 2).reshape(-1, 256)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(-1, 256)
    q = (low | high << 4).float() - 32
    group_scales = scales.contiguous().view(torch.int8).float() * np.float32(np.float16(0.01))
    assert torch.equal(ours, (q.reshape(-1, 16, 16) * group_scales[..., None]).reshape(32, 512))


# A model out and in again.


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=pytest.mark.long if family != "llama" and kind in RELATED_TYPES else ())
        for family in ("llama", "qwen2", "qwen3", "mixtral")
        for kind in FILE_TYPES
    ],
)
def test_gguf_round_trip_keeps_every_family_and_type(tmp_path, family, kind):
    source = saved(tmp_path / "source", model_type=family, **WIDE)
    made = to_gguf(source, tmp_path / "it.gguf", kind)
    assert made.files == {"it.gguf": (tmp_path / "it.gguf").stat().st_size}
    before, after = smolforge.load(source), smolforge.load(tmp_path / "it.gguf")
    assert before.config.model_copy(update={"initializer_range": 0.02}) == after.config
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.tokenizer.settings["chat_template"] == TEMPLATE
    assert (after.tokenizer.bos_id, after.tokenizer.eos_id, after.tokenizer.pad_id) == (0, 0, 2)
    weights_after = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        apart = (weight - weights_after[name]).abs().max() / weight.abs().max()
        assert apart <= WORST_ROUNDING[kind]
        if kind.startswith("q4") and weight.ndim > 1 and "mlp.gate.weight" not in name:
            eight = name.startswith("model.embed") or (family == "mixtral" and (".k_proj" in name or ".v_proj" in name))
            assert apart > 0 or eight
    assert (made.max_abs_logit_diff == 0) == (kind == "f32")


def test_gguf_is_the_same_model_in_transformers(tmp_path):
    """Which undoes the rotation and reads blocks by its own code."""
    for family, kind in (("llama", "f32"), ("llama", "q8_0"), ("llama", "q4_0"), ("qwen2", "q8_0"), ("qwen3", "f32")):
        folder, path = tmp_path / f"{family}-{kind}", tmp_path / f"{family}-{kind}.gguf"
        wide = {"head_dim": 128} if family == "qwen3" else {}  # Transformers takes that for granted there
        to_gguf(saved(folder, model_type=family, **WIDE, **wide), path, kind)
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
        ours, wanted = smolforge.load(path), oracle.state_dict()
        for name, weight in ours.named_parameters():
            assert torch.equal(weight, wanted[name]), (family, kind, name)
        ids = torch.tensor([ours.tokenizer.encode("the model reads a token")])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), oracle(ids).logits, atol=1e-5, rtol=0)


def test_gguf_keeps_an_untied_head_and_head_dim(tmp_path):
    source = saved(tmp_path / "m", tie_word_embeddings=False, head_dim=16, **WIDE)
    made = to_gguf(source, tmp_path / "it.gguf", "q4_0")
    types = {name: stored.type.name for name, stored in gguf.GGUFReader(tmp_path / "it.gguf").tensors.items()}
    assert (types["output.weight"], types["token_embd.weight"]) == ("q8_0", "q4_0")
    assert made.tensors == {"q4_0": 15, "q8_0": 1, "f32": 5}
    assert smolforge.load(tmp_path / "it.gguf").config.resolved_head_dim == 16


def test_gguf_stores_rows_that_do_not_divide_as_f16(folder, tmp_path):
    made = to_gguf(folder, tmp_path / "it.gguf", "q4_0")  # intermediate_size 48
    assert made.tensors == {"q8_0": 1, "q4_0": 12, "f16": 2, "f32": 5}


@pytest.mark.parametrize(
    ("name", "label"), [("smollm2-135m", "135M"), ("smollm2-1.7b", "1.7B"), ("smollm2-nano", None)]
)
def test_gguf_size_label_equals_the_gguf_package(name, label):
    config = ModelConfig.model_validate(shape(name))
    total = sum(weight.numel() for weight in loading.build(config).parameters()) if label is None else None
    assert size_label(config) == (label or theirs.size_label(total, total, 0, 0))


def test_to_gguf_measures_loss_before_and_after(folder, tmp_path):
    (tmp_path / "text.txt").write_text(sentences(20))
    made = to_gguf(folder, tmp_path / "it.gguf", "q4_0", text=tmp_path / "text.txt")
    assert made.comparison is not None
    before, after = made.comparison.before.loss, made.comparison.after.loss
    assert before != after
    assert math.isclose(before, after, rel_tol=0.05)
    assert made.comparison.after.kl_divergence > 0
    assert 0 < made.top1_agreement <= 1


@pytest.mark.long
@needs_released
def test_released_file_is_read_and_given_back_to_the_bit(tmp_path):
    """Its matrices lie on Q4_1's grid: rounding them again changes no byte."""
    made = to_gguf(RELEASED, tmp_path / "back.gguf", "Q4_1")
    assert made.max_abs_logit_diff == 0
    before, after = theirs.GGUFReader(RELEASED).tensors, theirs.GGUFReader(tmp_path / "back.gguf").tensors
    written, read = {each.name: each for each in after}, gguf.GGUFReader(RELEASED)
    assert len(before) == len(written) == len(read.tensors) == 272
    for each in before:
        again = written[each.name]
        assert (again.tensor_type, again.data.tobytes()) == (each.tensor_type, each.data.tobytes()), each.name
        values = read[each.name].numpy()
        np.testing.assert_array_equal(theirs.dequantize(each.data, each.tensor_type).reshape(values.shape), values)


@pytest.mark.long
@needs_released
def test_released_file_is_the_start_of_a_run(recipe, tmp_path):
    words = ["train", str(recipe), "--run", str(tmp_path / "run"), "--init-from", str(RELEASED), "--train.steps", "2"]
    assert cli.run([*words, "--optim.schedule.warmup-steps", "0"]) == 0
    before, trained = loading.load(RELEASED), loading.load(tmp_path / "run")
    assert trained.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert trained.tokenizer.settings["chat_template"] == before.tokenizer.settings["chat_template"]
    weights = dict(before.named_parameters())
    moved = max((weight - weights[name]).abs().max().item() for name, weight in trained.named_parameters())
    assert 0 < moved < 0.1


# The tokenizer.


def test_gguf_tokenizer_round_trip_equals_smollm2(shared):
    real = Tokenizer.load(shared / "smollm2-tokenizer")
    values = to_values(real, 49_160)  # a vocabulary with a few ids to spare
    assert values["tokenizer.ggml.pre"] == "smollm"
    assert values["tokenizer.ggml.tokens"][49_152:] == [f"[PAD{number}]" for number in range(49_152, 49_160)]
    again = from_values(values, "it.gguf")
    assert again.fingerprint == real.fingerprint
    for text in HARD_TEXTS:
        assert again.encode(text) == real.encode(text)
        assert again.decode(real.encode(text)) == real.decode(real.encode(text))


def test_gguf_tokenizer_names_the_gpt2_pre_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1] | {"trim_offsets": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    values = to_values(tokenizer, 320)
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    again = from_values(values, "it.gguf")
    assert [again.encode(text) for text in HARD_TEXTS] == [tokenizer.encode(text) for text in HARD_TEXTS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it cuts text as none of smollm, gpt-2 does"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is not GPT-2's"),
        ({"model": {"ignore_merges": True}}, "its ignore_merges is not GPT-2's"),
    ],
)
def test_to_gguf_refuses_tokenizers_unknown_to_llama_cpp(folder, tmp_path, change, said):
    content = json.loads((folder / "tokenizer.json").read_text())
    change = {key: content[key] | value if key == "model" else value for key, value in change.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(ConfigError, match=said):
        to_gguf(folder, tmp_path / "it.gguf")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lstrip": True}, r"a <\|im_start\|> b"),
        ({"special": False, "lstrip": True}, r"a <\|im_start\|> b"),
        ({"special": False, "single_word": True}, r"a<\|im_start\|>b"),
    ],
)
def test_to_gguf_refuses_added_tokens_it_cannot_express(folder, tmp_path, change, text):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][1] |= change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidFileError, match=f"cannot say what this tokenizer does with '{text}'"):
        to_gguf(folder, tmp_path / "it.gguf")
    assert not (tmp_path / "it.gguf").exists()


# What goes wrong.


def test_to_gguf_refuses_invalid_arguments_and_models(tmp_path, folder, file):
    (empty := tmp_path / "empty.txt").write_text("")
    for wrong, said in (
        ({"kind": "q7_0"}, "type is 'q7_0'; it should be one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0"),
        ({"kind": "q4_K_M"}, "type Q4_K_M is written by llama-quantize alone: export --type f16 --out in.gguf, then "),
        ({"kind": "iq4_xs"}, "llama-quantize in.gguf out.gguf IQ4_XS, whose file every command here reads"),
        ({"kind": "Q6_K"}, "type Q6_K is written by llama-quantize alone"),
        ({"out": file}, "is there already; name a new file"),
        ({"out": tmp_path / "x.bin"}, "should end in .gguf"),
        ({"text": empty}, "empty.txt is empty; --text names a file to measure on"),
    ):
        with pytest.raises(ConfigError, match=said):
            to_gguf(folder, **({"out": tmp_path / "x.gguf"} | wrong))
    with pytest.raises(ConfigError, match="llama.cpp does not have this kind of starcoder2 model; --to"):
        to_gguf(saved(tmp_path / "s", model_type="starcoder2"), tmp_path / "x.gguf")
    huggingface.save(tiny_model(), tmp_path / "mute")
    with pytest.raises(ConfigError, match="has no tokenizer, which a .gguf holds"):
        to_gguf(tmp_path / "mute", tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="smollm2-nano is a shape with random weights"):
        to_gguf("smollm2-nano", tmp_path / "x.gguf")


@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_to_gguf_refuses_values_a_type_cannot_hold(tmp_path, value):
    model = tiny_model(**WIDE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = value
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    for kind in ("f16", "q8_0", "q4_0"):
        with pytest.raises(InvalidFileError, match="has values that .* cannot hold; --type f32|holds NaN or infinity"):
            to_gguf(tmp_path / "model", tmp_path / "it.gguf", kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_to_gguf_leaves_nothing_on_a_full_disk(folder, tmp_path):
    for after in itertools.count():
        try:
            with (
                failing(tmp_path, after=after),
                pytest.raises(MissingResourceError, match="the disk is full: .* bytes and"),
            ):
                to_gguf(folder, tmp_path / "it.gguf", "f32")
        except pytest.fail.Exception:
            break
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert after > 1
    assert (tmp_path / "it.gguf").is_file()


def test_to_gguf_detects_a_wrong_rope_permutation(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "unpermute_rope", lambda name, weight, config: weight)
    with pytest.raises(AssertionError, match="q_proj.weight was not written as it is"):
        to_gguf(folder, tmp_path / "it.gguf")
    assert not (tmp_path / "it.gguf").exists()


# Files from outside.


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(said: str) -> bytes:
    return u64(len(said)) + said.encode()


def head(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(tensors) + u64(values)


def tensor(name: str = "a", sides: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(sides)) + b"".join(map(u64, sides)) + u32(kind) + u64(offset)


ARCHITECTURE = text("general.architecture") + u32(8) + text("llama")
HOSTILE = {
    "nothing": (b"", "ends before"),
    "not one": (b"<html>" * 9, "does not begin with GGUF"),
    "version 9": (head(version=9), "has version 9"),
    "big-endian": (head(version=3 << 24), "big-endian"),
    "2^60 tensors": (head(2**60), "claims 1,152,921,504,606,846,976 tensors"),
    "2^60 values": (head(0, 2**60), "claims 0 tensors and 1,152"),
    "2^60 entries": (head(0, 1) + text("a") + u32(9) + u32(8) + u64(2**60), "entries in a, more than any real one"),
    "a list of 2^60 numbers": (head(0, 1) + text("a") + u32(9) + u32(0) + u64(2**60), "entries in a"),
    "many empty texts": (
        head(0, 3) + (text("a") + u32(9) + u32(8) + u64(3 << 19) + bytes(3 << 22)),
        "'' twice|type 0|ends",
    ),
    "a text of 2^60": (head(0, 1) + text("a") + u32(8) + u64(2**60), "ends before its values do"),
    "a key of 2^63": (head(0, 1) + u64(2**63), "ends before its values do"),
    "a long key": (head(0, 1) + text("a" * 300) + u32(7) + b"\1", "a name of 300 characters"),
    "no UTF-8": (head(0, 1) + u64(1) + b"\xff" + u32(7) + b"\1", "not UTF-8"),
    "type 99": (head(0, 1) + text("a") + u32(99), "of type 99"),
    "a list of lists": (head(0, 1) + text("a") + u32(9) + u32(9) + u64(1), "entries of type 9"),
    "twice the same": (head(0, 2) + ARCHITECTURE * 2, "has 'general.architecture' twice"),
    "alignment 0": (head(1, 1) + text("general.alignment") + u32(4) + u32(0), "general.alignment 0"),
    "alignment of 3": (head(1, 1) + text("general.alignment") + u32(4) + u32(3), "general.alignment 3"),
    "alignment a text": (head(1, 1) + text("general.alignment") + u32(8) + text("x"), "general.alignment 'x'"),
    "no axes": (head(1) + tensor(sides=()), "with 0 axes"),
    "2^31 axes": (head(1) + text("a") + u32(2**31), "with 2,147,483,648 axes"),
    "an empty side": (head(1) + tensor(sides=(2, 0)), "of shape"),
    "too large": (head(1) + tensor(sides=(2**62, 4)), "cannot hold"),
    "overflowing": (head(1) + tensor(sides=(2**32, 2**32)), "cannot hold"),
    "IQ2_XXS": (head(1) + tensor(kind=16), "has a in IQ2_XXS, which is not read; f32, f16, bf16, q4_0, "),
    "MXFP4": (head(1) + tensor(kind=39), "in MXFP4, which is not read"),
    "TQ1_0": (head(1) + tensor(kind=34), "in TQ1_0, which is not read"),
    "Q4_0_4_4": (head(1) + tensor(kind=31), "in type 31, which is not read"),
    "type 77": (
        head(1) + tensor(kind=77),
        "in type 77, which is not read; f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_K, q3_K, q4_K, q5_K, q6_K, "
        "iq4_nl, iq4_xs are. llama-quantize --allow-requantize converts it to one of them, or take another file",
    ),
    "half a block": (head(1) + tensor(sides=(33,), kind=8), "(33,), whose rows are no whole blocks of 32 as q8_0 has"),
    "no data": (head(1) + tensor(), "ends before a does; it was cut"),
    "overlapping": (head(2) + tensor() + tensor("b") + bytes(128), "data of b at 0, where 32 follows"),
    "a gap": (head(2) + tensor() + tensor("b", offset=64) + bytes(256), "data of b at 64, where 32"),
    "data elsewhere": (head(1) + tensor(offset=2**60) + bytes(64), "data of a at 1,152"),
    "a tensor twice": (head(2) + tensor() + tensor(offset=32) + bytes(128), "has 'a' twice"),
    "another model": (
        head(0, 1) + ARCHITECTURE.replace(b"llama", b"gemma"),
        "kind 'gemma'; llama, qwen2, qwen3 are",
    ),
    "nameless": (head(0, 0), "kind 'None'"),
    "no embedding": (head(0, 1) + ARCHITECTURE, "lacks token_embd.weight"),
}


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE)
def test_gguf_refuses_malformed_files(tmp_path, capsys, content, said):
    path = tmp_path / "it.gguf"
    path.write_bytes(content)
    err = refused(capsys, "generate", path, "--prompt", "a")
    assert "it.gguf" in err
    assert any(each in err for each in said.split("|")), err


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_gguf_refuses_truncated_files(file, capsys, share):
    os.truncate(file, int(file.stat().st_size * share))
    assert "it was cut" in refused(capsys, "generate", file, "--prompt", "a") or share < 0.2


def rewritten(file: Path, **changes) -> None:
    """The file with other values; None takes one away."""
    read = gguf.GGUFReader(file)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    values = {key: value for key, value in (read.metadata | changes).items() if value is not None}
    tensors = {name: read[name] for name in read.tensors}
    container.write(file, values, tensors, types={name: stored.type for name, stored in read.tensors.items()})


LIES = [
    (
        {"llama__embedding_length": 64},
        "token_embd.weight has shape (320, 32) where its settings make it (320, 64)",
    ),
    ({"llama__embedding_length": 2**31}, "hidden_size"),
    ({"llama__embedding_length": "32"}, "hidden_size"),
    ({"llama__embedding_length": None}, "does not say hidden_size"),
    ({"llama__block_count": 4096}, "20 tensors, too few for 4,096 layers"),
    ({"llama__block_count": 3}, "lacks 9 of 29 tensors, the first blk.2.attn_k.weight"),
    ({"llama__block_count": 1}, "9 tensors this model has no place for, the first blk.1.attn_k.weight"),
    ({"llama__attention__head_count": [4, 4]}, "num_attention_heads"),
    ({"llama__attention__head_count": 0}, "num_attention_heads"),
    ({"llama__attention__head_count": True}, "num_attention_heads"),
    ({"llama__rope__dimension_count": 4}, "rope.dimension_count is 4, which is not implemented; only 8 is"),
    ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type is yarn"),
    ({"llama__rope__freq_base": float("nan")}, "rope_theta"),
    ({"llama__attention__sliding_window": 8}, "'attention.sliding_window' that is not known"),
    ({"llama__expert_count": 4, "llama__expert_used_count": 2}, "lacks"),
    ({"tokenizer__ggml__model": "llama"}, "kind 'llama', 'smollm', which is not read"),
    ({"tokenizer__ggml__pre": "\x1b[31m" * 200}, "which is not read"),
    ({"tokenizer__ggml__tokens": ["a"] * 320}, "a token twice"),
    ({"tokenizer__ggml__tokens": [1, 2]}, "tokens that is no list of str"),
    ({"tokenizer__ggml__token_type": [1]}, "token types that do not fit its 320 tokens"),
    ({"tokenizer__ggml__token_type": [9] * 320}, "token types"),
    ({"tokenizer__ggml__merges": ["no such"]}, "a tokenizer that is broken"),
    ({"tokenizer__ggml__merges": ["x"]}, "a tokenizer that is broken"),
    ({"tokenizer__ggml__eos_token_id": 2**31}, "eos_token_id 2147483648, which is no token"),
    ({"tokenizer__chat_template": 5}, "tokenizer.chat_template that is no text"),
]


@pytest.mark.parametrize(("changes", "said"), LIES, ids=[str(changes)[:60] for changes, _ in LIES])
def test_gguf_refuses_inconsistent_metadata(file, capsys, changes, said):
    rewritten(file, **changes)
    err = refused(capsys, "generate", file, "--prompt", "a")
    assert said in err
    assert "\x1b" not in err


def test_gguf_refuses_more_tokens_than_the_model_has(file, capsys):
    tokens = [*gguf.GGUFReader(file).metadata["tokenizer.ggml.tokens"], "one", "more"]
    rewritten(file, tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=[1] * 322)
    said = refused(capsys, "generate", file, "--prompt", "a")
    assert "322 tokens for a model of 320, so they are not its own" in said


def test_gguf_refuses_huge_token_lists_before_building_them(file, capsys, monkeypatch):
    with monkeypatch.context() as less:
        less.setattr(tokenizers, "MAX_ADDED_TOKENS", 2)
        said = refused(capsys, "generate", file, "--prompt", "a")
    assert "has 3 special or added tokens, more than any real one" in said
    many = 200_000
    rewritten(file, tokenizer__ggml__tokens=[f"t{n}" for n in range(many)], tokenizer__ggml__token_type=[3] * many)
    assert "has 200,000 tokens for a model of 320" in refused(capsys, "generate", file, "--prompt", "a")


def test_gguf_refuses_experts_outside_llama(tmp_path, capsys):
    to_gguf(saved(tmp_path / "m", model_type="qwen3"), tmp_path / "it.gguf", "f32")
    rewritten(tmp_path / "it.gguf", qwen3__expert_count=4, qwen3__expert_used_count=2)
    assert "a setting 'expert_count' that is not known" in refused(capsys, "generate", tmp_path / "it.gguf")


def test_gguf_refuses_endless_files(tmp_path, capsys):
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("zero.gguf", "pipe.gguf"):
        assert "is neither a model folder nor a .gguf" in refused(capsys, "generate", tmp_path / name, "--prompt", "a")


places = st.floats(0, 1, exclude_max=True)
odd = st.sampled_from([0, 1, 3, 33, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1])
lies = st.one_of(plain, st.sampled_from([math.nan, math.inf, "", "{" * 5000, "a" * 70_000, [0] * 320, [""] * 320]))


def flipped(content: bytearray, place: float, bit: int) -> None:
    content[int(place * len(content))] ^= 1 << bit


def misnumbered(content: bytearray, place: float, number: int, size: int) -> None:
    """Before the data, which a tiny vocabulary takes most of: a length, count, type, side or offset, now and then."""
    begin = int(place * 9000)
    content[begin : begin + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")


def cut(content: bytearray, place: float) -> None:
    del content[int(place * len(content)) :]


damages = st.one_of(
    st.builds(lambda *given: lambda content: flipped(content, *given), places, st.integers(0, 7)),
    st.builds(lambda *given: lambda content: misnumbered(content, *given), places, odd, st.sampled_from([4, 8])),
    st.builds(lambda place: lambda content: cut(content, place), places),
)


def tried(path: Path) -> None:
    """A file is read and used, or refused in a sentence; soon, and in little memory."""
    begun, most = time.process_time(), peak_memory_bytes()
    try:
        model = smolforge.load(path)
        ids = model.tokenizer.encode("the model reads <|im_end|> 12\0") if model.tokenizer else [1]
        model(torch.tensor([ids or [0]]))
    except InvalidFileError as error:
        assert "\n" not in str(error)
        assert path.name in str(error) or "tokenizer" in str(error)
    assert time.process_time() - begun < 2
    assert peak_memory_bytes() - most < 200 << 20


@settings(max_examples=100)
@given(harm=st.lists(damages, min_size=1, max_size=3))
def test_gguf_refuses_or_reads_randomly_corrupted_files(sound, harm):
    content = bytearray((sound / "it.gguf").read_bytes())
    for each in harm:
        each(content)
        content = content or bytearray(1)
    (sound / "damaged.gguf").write_bytes(content)
    tried(sound / "damaged.gguf")


@settings(max_examples=50)
@given(data=st.data())
def test_gguf_refuses_or_reads_random_metadata(sound, data):
    path = sound / "lying.gguf"
    shutil.copy(sound / "it.gguf", path)
    values = gguf.GGUFReader(path).metadata
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True)):
        if isinstance(values[key], list) and data.draw(st.booleans()):
            begin, end, to = (int(data.draw(places) * 320) for _ in range(3))
            values[key] = [*values[key][:to], *values[key][begin:end], *values[key][to + end - begin :]]
        else:
            values[key] = data.draw(lies)
    rewritten(path, **values)
    tried(path)


# In parts.


def split_into_parts(file: Path, count: int = 3) -> list[Path]:
    """Write a file in parts as llama-gguf-split does, and take it away."""
    read = gguf.GGUFReader(file)
    names = list(read.tensors)
    parts = [file.with_name(f"{file.stem}-{index + 1:05}-of-{count:05}.gguf") for index in range(count)]
    for index, part in enumerate(parts):
        split = {"split.no": index, "split.count": count, "split.tensors.count": len(names)}
        values = (read.metadata if index == 0 else {}) | split
        held = names[index * len(names) // count : (index + 1) * len(names) // count]
        types = {name: read.tensors[name].type for name in held}
        container.write(part, values, {name: read[name] for name in held}, types=types)
    file.unlink()
    return parts


def test_gguf_in_parts_is_one_model(file, capsys):
    whole, config = dict(smolforge.load(file).named_parameters()), loading.read_config(file)
    tokenizer = loading.load_tokenizer(file)
    parts = split_into_parts(file)
    for part in parts:
        model = smolforge.load(part)
        assert model.config == config
        assert model.tokenizer.fingerprint == tokenizer.fingerprint
        assert all(torch.equal(weight, whole[name]) for name, weight in model.named_parameters())
        assert loading.weight_files(part) == parts
    assert cli.run(["inspect", str(parts[1]), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"]["total"] == sum(weight.numel() for weight in whole.values())
    assert content["tokenizer"]["ids"] == len(tokenizer)
    before = loading.fingerprint(parts[0])
    content = bytearray(parts[2].read_bytes())
    content[-40] ^= 1
    parts[2].write_bytes(content)
    assert loading.fingerprint(parts[0]) != before, "what identifies the weights is all of them"


def test_gguf_refuses_parts_that_are_missing_or_of_another_model(file, capsys):
    other = Path(shutil.copy(file, file.with_name("other.gguf")))
    parts = split_into_parts(file)
    others = split_into_parts(other, 2)
    for part, missing in ((parts[0], parts[1]), (parts[2], parts[0])):
        missing.rename(file.with_name("away"))
        err = refused(capsys, "generate", part, "--prompt", "a")
        assert f"is one of 3 parts of a model, and {missing.name} is not beside it" in err
        file.with_name("away").rename(missing)
    parts[0].rename(file)
    assert "is not named as the part that it says to be, split.no 0 of 3" in refused(capsys, "generate", file)
    file.rename(parts[0])
    for content, said in (
        (parts[0].read_bytes(), "it has another split.no"),
        (others[1].read_bytes(), "it has another split.count"),
        (parts[2].read_bytes(), "it has another split.no"),
    ):
        kept = parts[1].read_bytes()
        parts[1].write_bytes(content)
        err = refused(capsys, "generate", parts[0], "--prompt", "a")
        assert f"{parts[1].name} is no part of the model that the parts before it are of: {said}" in err
        parts[1].write_bytes(kept)
    rewritten(others[1], general__architecture="qwen2")
    assert "another general.architecture" in refused(capsys, "generate", others[0], "--prompt", "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split__tensors__count": 21}, "it has another split.tensors.count"),
        ({"split__no": None}, "it has another split.no"),
        ({"split__count": 2**31}, "it has another split.count"),
        ({"split__no": [1]}, "it has another split.no"),
    ],
)
def test_gguf_refuses_parts_with_other_values(file, capsys, change, said):
    parts = split_into_parts(file)
    rewrite_part(parts[1], **change)
    assert said in refused(capsys, "generate", parts[0], "--prompt", "a")


def test_gguf_refuses_parts_with_the_wrong_tensors(file, capsys):
    first, second = split_into_parts(file, 2)
    values = gguf.read_header(second)[0]
    container.write(second, values, {"x": torch.ones(4)}, types={"x": gguf.BLOCK_TYPES["f32"]})
    assert "have 11 tensors together, where the first says 20" in refused(capsys, "generate", first)
    container.write(
        second, values, {"token_embd.weight": torch.ones(4)}, types={"token_embd.weight": gguf.BLOCK_TYPES["f32"]}
    )
    assert "it has token_embd.weight again" in refused(capsys, "generate", first)


def rewrite_part(part: Path, **changes) -> None:
    """Write a part with other values and none of its tensors."""
    values, _ = gguf.read_header(part)
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    container.write(part, {key: value for key, value in values.items() if value is not None}, {}, types={})


def test_gguf_tokenizer_needs_no_weights(file, tmp_path, text_file):
    """The first part of several is enough, and so is a file of llama.cpp's converter with --vocab-only."""
    tokenizer, values = loading.load_tokenizer(file), gguf.GGUFReader(file).metadata
    vocabulary = {key: value for key, value in values.items() if "tokenizer" in key or key == "general.architecture"}
    container.write(tmp_path / "vocabulary.gguf", vocabulary, {}, types={})
    first, *others = split_into_parts(file)
    for part in others:
        part.unlink()
    for source in (tmp_path / "vocabulary.gguf", first):
        assert loading.load_tokenizer(source).fingerprint == tokenizer.fingerprint
        words = ["prepare", str(text_file), "--out", str(tmp_path / source.stem), "--tokenizer", str(source)]
        assert cli.run(words) == 0
        assert Tokenizer.load(tmp_path / source.stem / "tokenizer").fingerprint == tokenizer.fingerprint


def test_inspect_and_tokenizer_read_no_tensor_data(file, monkeypatch, capsys):
    monkeypatch.setattr("smolforge.checkpoint.gguf.parts.read_tensor", None)
    assert cli.run(["inspect", str(file)]) == 0
    assert loading.load_tokenizer(file).eos_id == 0
    assert "320 x 32" in capsys.readouterr().out


# Through every door.


def test_gguf_works_with_every_command(folder, tmp_path, capsys):
    out, other = tmp_path / "it.gguf", tmp_path / "held-out.txt"
    other.write_text(sentences(30, 500))
    words = ["--to", "gguf", "--type", "q8_0", "--out", str(out), "--text", str(other)]
    assert cli.run(["export", str(folder), *words]) == 0
    said = capsys.readouterr().out
    assert f"{out.stat().st_size:,}  {out}" in said
    assert "tensors: 13 in q8_0, 5 in f32, 2 in f16" in said
    assert "the likeliest token the same in" in said
    assert "KL divergence" in said
    assert cli.run(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "f16.gguf"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["type"] == "f16"
    assert 0 < content["max_abs_logit_diff"] < 0.1
    assert cli.run(["generate", str(out), "--prompt", "the model", "--max-new-tokens", "5", "--json"]) == 0
    assert 1 <= len(json.loads(capsys.readouterr().out)["token_ids"]) <= 5, "drawn: the text may end before"
    assert cli.run(["evaluate", str(out), "--text", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["held-out"]["loss"] > 0
    assert cli.run(["inspect", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tokenizer"]["ids"] == len(smolforge.load(folder).tokenizer)
    assert content["parameters"]["total"] == sum(weight.numel() for weight in tiny_model().parameters())


def test_gguf_verification_names_a_missing_accelerate(file, tmp_path, capsys, monkeypatch):
    """Not a fault of the model."""
    monkeypatch.setattr(transformers_reference, "find_spec", lambda name: None)
    assert cli.run(["verify", str(file), "--out", str(tmp_path / "verify.json")]) == 4
    assert 'accelerate; pip install "smolforge[verify]"' in capsys.readouterr().err


def test_gguf_verifies_and_exports_to_transformers(file, folder, tmp_path, capsys, compiling):
    report = tmp_path / "verify.json"
    assert cli.run(["verify", str(file), "--out", str(report)]) == 0, capsys.readouterr()
    assert "de-quantizing" not in capsys.readouterr().err
    assert json.loads(report.read_text())["greedy_match"] is True
    made = to_transformers(file, tmp_path / "back")
    assert (made.dtype, made.rounding_logit_diff) == ("float32", 0)
    before, after = smolforge.load(folder), smolforge.load(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    to_gguf(folder, tmp_path / "narrow.gguf", "bf16")
    assert to_transformers(tmp_path / "narrow.gguf", tmp_path / "narrow").dtype == "bfloat16"


def test_verify_skips_gguf_models_transformers_cannot_read(tmp_path, capsys):
    """Of a mixture it reads what it knows, and would make up the rest."""
    to_gguf(saved(tmp_path / "m", model_type="mixtral"), tmp_path / "it.gguf", "f32")
    assert cli.run(["verify", str(tmp_path / "it.gguf"), "--out", str(tmp_path / "verify.json")]) == 1
    assert "Transformers does not read all of" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--lora.rank", "2"]])
def test_train_starts_from_a_gguf(file, recipe, tmp_path, more):
    words = ["train", str(recipe), "--run", str(tmp_path / "run"), "--init-from", str(file), "--train.steps", "1"]
    assert cli.run([*words, *more, "--optim.schedule.warmup-steps", "0"]) == 0
    trained = loading.load(tmp_path / "run")
    assert trained.tokenizer.fingerprint == loading.load(file).tokenizer.fingerprint
    before = dict(loading.load(file).named_parameters())
    moved = max((weight - before[name]).abs().max().item() for name, weight in trained.named_parameters())
    assert 0 < moved < 0.1


def test_gguf_has_no_adam_moments(file, recipe, tmp_path, capsys):
    words = ["train", str(recipe), "--run", str(tmp_path / "run"), "--init-from", str(file), "--init-moments", "true"]
    assert cli.run(words) == 3
    assert "has no moments to go on with" in capsys.readouterr().err


def test_gguf_loads_as_a_tokenizer(file):
    assert loading.load_tokenizer(file).fingerprint == loading.load(file).tokenizer.fingerprint
    rewritten(file, tokenizer__ggml__model=None)
    assert loading.load(file).tokenizer is None
    with pytest.raises(InvalidFileError, match="has no tokenizer in it"):
        loading.load_tokenizer(file)


def test_write_file_atomic_leaves_no_partial_file(tmp_path):
    with pytest.raises(KeyError):
        atomic.write_file_atomic(tmp_path / "a", lambda path: (path.write_text("half"), {}["b"]))
    assert list(tmp_path.iterdir()) == []
    atomic.write_file_atomic(tmp_path / "new" / "a", lambda path: path.write_text("whole") and None)
    assert (tmp_path / "new" / "a").read_text() == "whole"


def test_gguf_derives_missing_metadata(tmp_path):
    to_gguf(saved(tmp_path / "m", num_key_value_heads=4), tmp_path / "it.gguf", "f32")
    before = smolforge.load(tmp_path / "it.gguf").config
    left_out = ("attention__head_count_kv", "attention__key_length", "attention__value_length", "vocab_size")
    rewritten(tmp_path / "it.gguf", **{f"llama__{key}": None for key in left_out})
    assert smolforge.load(tmp_path / "it.gguf").config == before
    assert before == tiny_config(num_key_value_heads=4, initializer_range=0.02)
