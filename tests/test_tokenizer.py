"""Text to ids and back: the round trip, the pipeline, and characters that arrive in pieces."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from smolforge import tokenizer as tokenizer_module
from smolforge.errors import InvalidFile, SettingError
from smolforge.testing import sentences, tiny_tokenizer
from smolforge.tokenizer import IncrementalDecoder, Tokenizer, split_at_lines

TINY = tiny_tokenizer()
anything = st.text(max_size=60) | st.sampled_from(["<|endoftext|>", "👩‍👩‍👧 naïve\r\n\t", "١٢٣ 12345", "\x00\x04\x16"])


@settings(deadline=None)
@given(anything)
def test_round_trip(text):
    assert TINY.decode(TINY.encode(text)) == text


@settings(deadline=None)
@given(anything)
def test_text_never_becomes_a_special_token(text):
    ids = TINY.encode(f"<|im_start|>{text}<|endoftext|>")
    assert not {0, 1, 2} & set(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TINY) - 1), max_size=40))
def test_pieces_join_to_the_whole(ids):
    """For any ids at all, broken characters included."""
    decoder = IncrementalDecoder(TINY)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == TINY.decode(ids)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_no_piece_holds_half_a_character(text):
    decoder, pieces = IncrementalDecoder(TINY), []
    for token in TINY.encode(text):
        pieces.append(decoder.push(token))
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + decoder.finish() == text


def test_digits_stand_alone():
    assert len(TINY.encode("12345")) == 5


def test_training_is_repeatable():
    assert tiny_tokenizer().fingerprint == TINY.fingerprint


NASTY = ["a\n\nb\n  c\n\n\n d\ne\r\nf" * 30, "no line end " * 40, "\n" * 200, "x\n\u00a0y\u2028z\n1\n'll" * 20]


@pytest.mark.parametrize("text", [sentences(50), *NASTY])
def test_cutting_long_texts_changes_no_token(text, monkeypatch):
    """With merges across newlines, as the real tokenizer has them."""
    other = Tokenizer.train([*NASTY, sentences(50)], 500)
    assert other.byte_level
    whole = other.encode(text)
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 20)
    assert "".join(split_at_lines(text)) == text
    assert other.encode(text) == whole


def test_cutting_changes_no_token_of_the_real_tokenizer(shared, monkeypatch):
    real = Tokenizer.load(shared / "smollm2-tokenizer")
    texts = [*NASTY, (shared / "wikitext2" / "wiki.test.raw").read_bytes()[:200_000].decode("utf-8", "ignore")]
    whole = [real.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 20)
    assert [real.encode(text) for text in texts] == whole


def test_saved_and_loaded_is_the_same(tmp_path):
    TINY.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.eos_id, len(again)) == (TINY.fingerprint, 0, len(TINY))
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("the model") == TINY.encode("the model")


def test_transformers_reads_it(tmp_path):
    from transformers import AutoTokenizer

    TINY.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The 12 models, naïve: 👩‍👩‍👧\n\n  x"
    assert theirs(text)["input_ids"] == TINY.encode(text)
    assert theirs.eos_token_id == TINY.eos_id


def test_refusals(tmp_path):
    with pytest.raises(InvalidFile, match=r"no tokenizer.json at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 3')
    with pytest.raises(InvalidFile, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    TINY.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nothing>"}))
    with pytest.raises(InvalidFile, match="no end-of-text token '<nothing>'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidFile, match="is not JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(SettingError, match="at least 259, not 100"):
        Tokenizer.train(["text"], 100)


def test_the_real_tokenizer(shared):
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


def test_ours_has_the_real_pipeline(shared):
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
def test_other_families_decode_in_pieces_too(text):
    other = llama_style()
    assert not other.byte_level
    decoder, ids = IncrementalDecoder(other), other.encode(text)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == other.decode(ids) == text
    assert "\ufffd" not in "".join(pieces)
