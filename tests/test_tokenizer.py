"""Text to ids and back: the round trip, the pipeline, and characters that arrive in pieces."""

import json
import random
import shutil
import time
from copy import copy

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from smolforge import tokenizer as tokenizer_module
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.testing import sentences, tiny_tokenizer
from smolforge.tokenizer import IncrementalDecoder, Tokenizer, byte_symbols, split_at_lines

TINY = tiny_tokenizer()
anything = st.text(max_size=60) | st.sampled_from(["<|endoftext|>", "👩‍👩‍👧 naïve\r\n\t", "١٢٣ 12345", "\x00\x04\x16"])


@settings(deadline=None)
@given(anything)
def test_tokenizer_round_trip_is_exact(text):
    assert TINY.decode(TINY.encode(text)) == text


@settings(deadline=None)
@given(anything)
def test_encode_never_gives_special_tokens(text):
    ids = TINY.encode(f"<|im_start|>{text}<|endoftext|>")
    assert not {0, 1, 2} & set(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TINY) - 1), max_size=40))
def test_incremental_decoder_joins_to_the_full_text(ids):
    """For any ids at all, broken characters included."""
    decoder = IncrementalDecoder(TINY)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == TINY.decode(ids)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_incremental_decoder_never_splits_a_character(text):
    decoder, pieces = IncrementalDecoder(TINY), []
    for token in TINY.encode(text):
        pieces.append(decoder.push(token))
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + decoder.finish() == text


def test_digits_are_separate_tokens():
    assert len(TINY.encode("12345")) == 5


def test_tokenizer_training_is_reproducible():
    assert tiny_tokenizer().fingerprint == TINY.fingerprint


NASTY = [
    "a\n\nb\n  c\n\n\n d\ne\r\nf" * 30,
    "no line end " * 40,
    "\n" * 200,
    "x\n\u00a0y\u2028z\n1\n'll" * 20,
    " a \r\n b\r\n1\r\n\n (c)\n\nd \n 2\n 's" * 20,
]


@pytest.mark.parametrize("text", [sentences(50), *NASTY])
def test_split_at_lines_changes_no_token(text, monkeypatch):
    """With merges across newlines, as the real tokenizer has them."""
    other = Tokenizer.train([*NASTY, sentences(50)], 500)
    assert other.byte_level
    whole = other.encode(text)
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 20)
    assert "".join(split_at_lines(text)) == text
    assert other.encode(text) == whole
    assert Tokenizer.train([*NASTY, sentences(50)], 500).fingerprint == other.fingerprint


def test_split_at_lines_changes_no_token_of_smollm2(shared, monkeypatch):
    real = Tokenizer.load(shared / "smollm2-tokenizer")
    texts = [*NASTY, (shared / "wikitext2" / "wiki.test.raw").read_bytes()[:200_000].decode("utf-8", "ignore")]
    whole = [real.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 20)
    assert len(list(split_at_lines(texts[-1]))) > 100, "its lines end and begin with a space"
    assert [real.encode(text) for text in texts] == whole


def test_encode_batch_limits_text_in_memory(monkeypatch):
    texts = ["", *NASTY, sentences(50), "", "end"]
    whole = TINY.encode_batch(texts)
    asked = []

    class Watched:
        def encode_batch_fast(self, parts, **given):
            asked.append(sum(map(len, parts)))
            return TINY.backend.encode_batch_fast(parts, **given)

    other = copy(TINY)
    other.backend = Watched()
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 20)
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_BATCH", 500)
    assert other.encode_batch(texts) == whole
    longest = max(len(part) for text in texts for part in split_at_lines(text))
    assert len(asked) > 5 and max(asked) <= 500 + longest
    assert other.encode_batch([]) == []


def test_tokenizer_survives_save_and_load(tmp_path):
    TINY.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.eos_id, len(again)) == (TINY.fingerprint, 0, len(TINY))
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("the model") == TINY.encode("the model")


def test_tokenizer_loads_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    TINY.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The 12 models, naïve: 👩‍👩‍👧\n\n  x"
    assert theirs(text)["input_ids"] == TINY.encode(text)
    assert theirs.eos_token_id == TINY.eos_id


def test_tokenizer_refuses_bad_files_and_sizes(tmp_path):
    with pytest.raises(InvalidFileError, match=r"no tokenizer.json at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 3')
    with pytest.raises(InvalidFileError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    TINY.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nothing>"}))
    with pytest.raises(InvalidFileError, match="no end-of-text token '<nothing>'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidFileError, match="is not JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="at least 259 and at most 1,048,576, not 100"):
        Tokenizer.train(["text"], 100)


def test_smollm2_tokenizer_gives_published_ids(shared):
    real = Tokenizer.load(shared / "smollm2-tokenizer")
    assert (len(real), real.eos_id) == (49152, 0)
    for text, ids in {
        "Hello world": [19556, 905],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "def fibonacci(n):": [1604, 3987, 46477, 24, 94, 727],
        "\n\n": [1116],
        "    return": [333, 1003],
        "12345": [33, 34, 35, 36, 37],
        "Once upon a time": [6403, 1980, 253, 655],
    }.items():
        assert real.encode(text) == ids
        assert real.decode(ids) == text
    story = (shared / "shakespeare" / "input.txt").read_text()
    assert len(real.encode(story)) == 341_094


def test_pre_tokenizer_equals_smollm2(shared):
    """The same pre-tokenizer, so a tokenizer trained here cuts words where SmolLM2's does."""
    real = Tokenizer.load(shared / "smollm2-tokenizer").backend
    text = "It's 2024:\tdef f(x):\n\n    return 'naïve' + 12\r\n"
    assert TINY.backend.pre_tokenizer.pre_tokenize_str(text) == real.pre_tokenizer.pre_tokenize_str(text)


def llama_style() -> Tokenizer:
    """A tokenizer of another family: words begin with a metaspace, unknown characters become bytes."""
    pieces = ["<unk>", "<|endoftext|>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefgh", "▁a", "▁b"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend)


@settings(deadline=None)
@given(st.text("abcdé👩 ", max_size=12))
def test_incremental_decoder_works_with_byte_fallback(text):
    other = llama_style()
    assert not other.byte_level
    decoder, ids = IncrementalDecoder(other), other.encode(text)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == other.decode(ids) == text
    assert "\ufffd" not in "".join(pieces)


STRANGE = [
    *("", " ", "\n", "\r\n", "\r", "\t\t", " " * 200, "\n" * 90, "x  12", "²  ²", "a  1\n\n2", "١٢٣ ١٢", "१२३", "Ⅻ½"),
    *(
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "e\u0301\u0301 é",
        "\u200b\u200d\ufeff",
        "\u2028x\u2029 \u3000y\u00a0z",
        "\x00\x01\x04\x06\x13\x14\x16\x1d\x7f\x85",
    ),
    *(
        "\U00040000\U000bffff",
        "\U0010ffff\ufffe\uffff",
        "\uff26\uff35\uff2c\uff2c <|im_end|> \uff1c|im_end|\uff1e",
        "<|endoftext|><|im_start|>",
        "<|im_<|im_end|>end|>",
    ),
    *(
        "مرحبا بالعالم",
        "汉字かな交じり文",
        "it's 'll 'LL we'Re",
        "0x1F 1e-9 3.14",
        "def f(x):\n    return x\n",
        "<repo_name><file_sep>",
    ),
]


def strange_texts(count: int) -> list[str]:
    dice = random.Random(3)
    return STRANGE + ["".join(dice.choices([*STRANGE[1:], *"ab 1\n"], k=5)) for _ in range(count)]


def saved(tokenizer: Tokenizer, folder):
    """What two others read from the folder we save: the tokenizers library, and Transformers."""
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    return plain, AutoTokenizer.from_pretrained(folder)


def same_ids(ours: Tokenizer, folder) -> None:
    plain, theirs = saved(ours, folder)
    for text in strange_texts(300):
        ids = ours.encode(text)
        assert ids == plain.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        trusted = ours.encode_with_special_tokens(text)
        assert trusted == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == plain.decode(ids, skip_special_tokens=False)


def test_ids_equal_tokenizers_and_transformers(tmp_path):
    same_ids(TINY, tmp_path)


def test_smollm2_ids_equal_tokenizers_and_transformers(shared, tmp_path):
    """Saved by us: of the published folder Transformers 5 makes a GPT2Tokenizer, in which digits do not stand alone."""
    same_ids(Tokenizer.load(shared / "smollm2-tokenizer"), tmp_path)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_ids_equal_tokenizers_for_any_text(text):
    plain = tokenizers.Tokenizer.from_str(TINY.backend.to_str())
    plain.encode_special_tokens = True
    assert TINY.encode(text) == plain.encode(text, add_special_tokens=False).ids


def test_tokenizer_ignores_truncation_and_padding_in_files(tmp_path):
    TINY.save(tmp_path)
    cutting = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cutting.enable_truncation(2)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(sentences(3)) == TINY.encode(sentences(3))


def bytes_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """The tokens' own bytes, without the decoder."""
    back = {symbol: byte for byte, symbol in byte_symbols().items()}
    return bytes(back[symbol] for token in ids for symbol in tokenizer.backend.id_to_token(token))


def loses_exactly(tokenizer: Tokenizer, text: str) -> None:
    kept, lost = bytes_of(tokenizer, tokenizer.encode(text)), tokenizer.lost_bytes(text)
    missing = set(tokenizer.missing_bytes)
    assert kept == bytes(byte for byte in text.encode() if byte not in missing)
    assert lost == bytes(byte for byte in text.encode() if byte in missing)
    assert tokenizer.decode(tokenizer.encode(text)) == kept.decode("utf-8", "replace")


def without_bytes(missing: str) -> Tokenizer:
    """The tiny tokenizer, without the symbols of some bytes."""
    pipeline = json.loads(TINY.backend.to_str())
    vocabulary = pipeline["model"]["vocab"]
    for byte in bytes.fromhex(missing):
        del vocabulary[byte_symbols()[byte]]
    pipeline["model"]["vocab"] = {token: place for place, token in enumerate(vocabulary)}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(pipeline)), TINY.settings)


MISSING = "04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff"


def test_lost_bytes_are_exact():
    poor = without_bytes(MISSING)
    assert poor.missing_bytes == bytes.fromhex(MISSING)
    assert poor.lost_bytes("a\x04b\x16\U00040000") == b"\x04\x16\xf1"
    for text in strange_texts(100):
        loses_exactly(poor, text)
        loses_exactly(TINY, text)
        assert TINY.lost_bytes(text) == b""
    assert llama_style().missing_bytes == llama_style().lost_bytes("\x04") == b""


def test_lost_bytes_of_smollm2_are_exact(shared):
    real = Tokenizer.load(shared / "smollm2-tokenizer")
    assert real.missing_bytes == bytes.fromhex(MISSING)
    for text in strange_texts(100):
        loses_exactly(real, text)


def adds_special_tokens(tokenizer: Tokenizer, folder) -> None:
    before = (len(tokenizer), tokenizer.fingerprint)
    more = tokenizer.with_special_tokens(["<|tool|>", "<|im_end|>", "<|think|>", "<|tool|>"])
    assert (len(tokenizer), tokenizer.fingerprint) == before
    text = "a<|think|> b<|tool|><|im_end|>"
    ids = more.encode_with_special_tokens(text)
    start = len(tokenizer)
    assert (len(more), [token for token in ids if token >= start]) == (start + 2, [start + 1, start])
    assert max(more.encode(text)) < start
    assert more.encode("the model") == tokenizer.encode("the model")
    _, theirs = saved(more, folder)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.convert_tokens_to_ids(["<|tool|>", "<|think|>"]) == [start, start + 1]
    assert theirs.decode(ids, skip_special_tokens=True) == "a b"
    again = Tokenizer.load(folder)
    assert (again.fingerprint, again.encode_with_special_tokens(text)) == (more.fingerprint, ids)
    assert len(again.with_special_tokens(["<|last|>"])) == start + 3


def test_special_tokens_can_be_added(tmp_path):
    adds_special_tokens(TINY, tmp_path)


def test_special_tokens_can_be_added_to_smollm2(shared, tmp_path):
    adds_special_tokens(Tokenizer.load(shared / "smollm2-tokenizer"), tmp_path)


def test_special_tokens_cannot_be_ordinary_tokens():
    plain = tiny_tokenizer()
    plain.backend.add_tokens([AddedToken("<think>", special=False)])
    for token in ("a", "<think>", "", " "):
        with pytest.raises(ConfigError, match="cannot become a special token: it is empty, or a token of ordinary"):
            Tokenizer(plain.backend, plain.settings).with_special_tokens([token])


def test_chat_template_survives_save_and_load(tmp_path):
    plain = tiny_tokenizer()
    talking = Tokenizer(plain.backend, {**plain.settings, "chat_template": "{{ messages }}\n"})
    talking.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}\n"
    assert Tokenizer.load(tmp_path).settings["chat_template"] == "{{ messages }}\n"
    plain.save(tmp_path)
    assert Tokenizer.load(tmp_path).template is None


def test_saved_tokenizer_asks_for_no_token_type_ids(tmp_path):
    """Where PreTrainedTokenizerFast makes them unless told, and generate(**tokenizer(text)) refuses them."""
    tiny_tokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["model_input_names"] == ["input_ids", "attention_mask"]
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    said = tiny_tokenizer().settings | {"model_input_names": ["input_ids"]}
    Tokenizer(tiny_tokenizer().backend, said).save(tmp_path)
    assert Tokenizer.load(tmp_path).settings["model_input_names"] == ["input_ids"]


BROKEN = {
    "tokenizer.json": [
        "",
        "[]",
        "null",
        "[" * 10**6,
        '{"a":' * 10**5,
        "\x00" * 1000,
        '{"version": "1.0"}',
        "1" * 10**7,
    ],
    "tokenizer_config.json": [
        *("[]", "1", "[" * 10**6, '{"a":' * 10**5, "{", "1" * 10**6, '{"eos_token": "\\ud800"}'),
        *('{"eos_token": 5}', '{"eos_token": {"text": "x"}}', '{"bos_token": ["x"]}', '{"pad_token": {"content": 1}}'),
        *('{"chat_template": 5}', '{"chat_template": ["x"]}', '{"chat_template": [{"name": 1}]}'),
        '{"added_tokens_decoder": []}',
    ],
    "chat_template.jinja": ["x" * (2 << 20)],
}


@pytest.mark.parametrize("name", BROKEN)
def test_tokenizer_refuses_corrupted_files(name, tmp_path):
    TINY.save(tmp_path / "good")
    for content in BROKEN[name]:
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", folder)
        (folder / name).write_text(content)
        start = time.monotonic()
        with pytest.raises(InvalidFileError) as caught:
            Tokenizer.load(folder)
        assert time.monotonic() - start < 2
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(folder))
        shutil.rmtree(folder)


def test_tokenizer_refuses_panicking_binary_and_huge_files(tmp_path, capfd):
    TINY.save(tmp_path)
    pipeline = json.loads((tmp_path / "tokenizer.json").read_text())
    pipeline["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline))
    with pytest.raises(InvalidFileError, match="is not a tokenizer: Precompiled"):
        Tokenizer.load(tmp_path)
    capfd.readouterr()  # the library says it on stderr, too
    TINY.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidFileError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        InvalidFileError, match=r"has 1,099,511,627,776 bytes, more than the 67,108,864 of any real one"
    ):
        Tokenizer.load(tmp_path)
