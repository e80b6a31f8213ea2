"""A conversation on a terminal: what is typed, answered, stopped, kept, forgotten and shown."""

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import cli
from smolforge.checkpoint import huggingface
from smolforge.cli.chat import TerminalChat, format_speed
from smolforge.cli.chat import read_message as typed_message
from smolforge.cli.generate import GenerationFlags, escape_controls, generation_from_flags, print_note
from smolforge.config import Data, Generation
from smolforge.data.prepare.conversations import messages_of
from smolforge.data.prepare.document_stream import documents
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.generation.stream import ChatSession, TextChunk, generate
from smolforge.testing import tiny_model
from smolforge.tokenizer.chat import CHATML

GREEDY = {"temperature": 0.0, "max_new_tokens": 8}


def taught(**shape):
    model = tiny_model(**shape)
    model.tokenizer.settings["chat_template"] = CHATML
    model.tokenizer.template = model.tokenizer._chat_template()
    return model


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def talk():
    return TerminalChat(taught(max_position_embeddings=512), Generation(**GREEDY))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that was taught to chat, and one that was not."""
    path = tmp_path_factory.mktemp("models")
    for name, model in (("taught", taught(max_position_embeddings=512)), ("base", tiny_model())):
        huggingface.save(model, path / name, model.tokenizer)
    return path


class Typed:
    """A terminal at which these lines are typed; a signal in their place comes while it waits."""

    def __init__(self, *lines):
        self.lines = iter(lines)

    def isatty(self):
        return True

    def readline(self):
        line = next(self.lines, None)
        if isinstance(line, signal.Signals):
            signal.raise_signal(line)
            time.sleep(1)
        return "" if line is None else line + "\n"


@pytest.fixture
def chat(folders, monkeypatch, capsys):
    """Chat with a model by typing lines; gives (exit code, standard output, standard error)."""

    def call(*lines, model="taught", flags=(), verb="chat"):
        monkeypatch.setattr("sys.stdin", Typed(*lines))
        code = cli.run([verb, str(folders / model), "--temperature", "0", "--max-new-tokens", "6", *flags])
        return code, *capsys.readouterr()

    return call


def test_chat_works_with_quantized_and_gguf_models(small, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Typed("the model", "and a token"))
    assert cli.run(["chat", str(small), "--temperature", "0", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr()
    assert "base model" not in said.err
    assert said.out.strip()


# What the model is shown


def watched(voice):
    """How many tokens each answer's model was given beyond its own."""
    engine, read = voice.text_engine.engine, []
    first = engine._prefill
    engine._prefill = lambda row: read.append(len(row.request.prompt) - row.num_computed_tokens) or first(row)
    return read


def test_chat_session_reuses_the_kv_cache():
    """As the whole conversation does, read from its beginning; but for ties within 1e-4, where rounding chooses."""
    model, options, ties = taught(max_position_embeddings=512), Generation(**GREEDY), 0
    voice = ChatSession(model, 512)
    read = watched(voice)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 320, (40,), generator=draw).tolist()
    for number in range(12):
        found = [token for piece in voice.stream(prompt, options) for token in piece.token_ids]
        (alone,) = generate_ids(model, [prompt], options)
        if found != alone:
            place = next(place for place, pair in enumerate(zip(found, alone, strict=True)) if pair[0] != pair[1])
            with torch.no_grad():
                top = model(torch.tensor([prompt + alone[:place]]))[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-4
            ties += 1
        new = torch.randint(3, 320, (10,), generator=draw).tolist()
        prompt = prompt + found + new if number % 3 else prompt[:20] + new  # every third says something else
    assert ties <= 1
    assert read[0] == 40
    assert all(count <= 11 for count in read[1:]), "what was there is not read again"


def generate_ids(model, prompts, options):
    from smolforge.generation.stream import stream_batch_ids

    rows = [[] for _ in prompts]
    for row, piece in stream_batch_ids(model, prompts, options):
        rows[row] += piece.token_ids
    return rows


def test_chat_session_drops_the_kv_cache_after_a_stop_or_error(monkeypatch):
    model, options = taught(), Generation(**GREEDY)
    voice = ChatSession(model, 128)
    prompt, expected = [5, 6, 7, 8, 9], generate_ids(model, [[5, 6, 7, 8, 9]], options)[0]
    begun = voice.stream(prompt, options)
    next(begun)
    begun.close()
    assert not voice.text_engine.engine.busy
    with monkeypatch.context() as patch:
        patch.setattr(voice.text_engine.engine.cache, "view", None)
        with pytest.raises(TypeError):
            list(voice.stream([5, 6, 1], options))
    assert [token for piece in voice.stream(prompt, options) for token in piece.token_ids] == expected
    count = iter(range(100))
    given_up = list(voice.stream([*prompt, 11], options, lambda: next(count) >= 3))
    assert all(piece.finish_reason is None for piece in given_up)
    assert [token for piece in voice.stream(prompt, options) for token in piece.token_ids] == expected


def test_chat_answer_equals_generate_on_the_full_conversation(talk, capsys):
    talk.system("be brief")
    talk.say("the model")
    talk.say("a token")
    said = [turn("system", "be brief"), *talk.messages]
    for place in (2, 4):
        (expected,) = generate(talk.chat_session.text_engine.engine.model, [said[:place]], **GREEDY)
        assert said[place]["content"] == expected.text
    shown = capsys.readouterr()
    assert "".join(each["content"] + "\n" for each in said if each["role"] == "assistant") == shown.out
    talk.retry("")
    assert talk.messages == said[1:]


def test_chat_drops_the_oldest_turns_but_saves_them(talk, capsys):
    talk.capacity = 256
    shown, real = [], talk.tokenizer.chat
    talk.tokenizer.chat = lambda messages: shown.append(messages) or real(messages)
    talk.system("s")
    for number in range(20):
        talk.say(f"{number} the model reads a token")
        ids = real(shown[-1])
        assert len(ids) <= talk.capacity - GREEDY["max_new_tokens"]
        assert [each["role"] for each in shown[-1]] == ["system", *["user", "assistant"] * 20][: len(shown[-1])]
        assert shown[-1][1:] == talk.messages[len(talk.messages) - len(shown[-1]) : -1]
    assert len(talk.messages) == 40
    notes = re.findall(r"no longer shown the first (\d+) messages", capsys.readouterr().err)
    assert 2 <= len(notes) <= 5, "not with every turn"
    assert all(int(a) < int(b) for a, b in pairwise(notes))
    assert int(notes[-1]) == talk.num_hidden
    talk.clear("")
    talk.say("the model")
    assert shown[-1] == [turn("system", "s"), turn("user", "the model")]


def test_chat_forgets_a_message_whose_answer_never_started(talk):
    talk.say("the model")
    before = list(talk.messages)
    talk.chat_session.stream = lambda *_: []
    talk.say("a token")
    assert talk.messages == before


def test_chat_keeps_its_state_when_a_message_is_too_long(talk):
    talk.say("the model")
    before = list(talk.messages)
    with pytest.raises(ConfigError, match="this model takes 512 with its answer"):
        talk.say("a " * 600)
    assert (talk.messages, talk.num_hidden) == (before, 0)


# Commands


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("temperature", "-1", -1.0),
        ("top_p", "3", 3.0),
        ("top_p", "nan", float("nan")),
        ("top_k", "0", 0),
        ("max_new_tokens", "0", 0),
        ("min_p", "2", 2.0),
        ("repetition_penalty", "0", 0.0),
        ("seed", "-5", -5),
    ],
)
def test_set_command_refuses_with_the_message_of_the_flags(talk, name, value, given):
    with pytest.raises(ConfigError) as by_flag:
        generation_from_flags(GenerationFlags(**{name: given}))
    with pytest.raises(ConfigError) as by_command:
        talk.set(f"{name} {value}")
    assert re.sub(r"\.0\b", "", str(by_flag.value)) == re.sub(r"\.0\b", "", str(by_command.value))
    assert talk.options == Generation(**GREEDY)


def test_set_command_accepts_the_values_of_the_flags(talk, capsys):
    for line in ("temperature 0.5", "top-k=7", "--seed 3", "top_p none", "stop a,b", "max_new_tokens = 9"):
        talk.set(line)
    assert talk.options == Generation(temperature=0.5, top_k=7, seed=3, top_p=None, stop=("a", "b"), max_new_tokens=9)
    talk.set("stop none")
    assert talk.options.stop == ()
    talk.set('stop ["x,y"]')
    assert talk.options.stop == ("x,y",)
    capsys.readouterr()
    talk.set("")
    shown = capsys.readouterr().err
    for line in shown.splitlines():
        talk.set(line)  # what it shows, it takes
    assert len(shown.splitlines()) == len(Generation.model_fields)
    assert talk.options.stop == ("x,y",)
    talk.set("top_k")
    assert "top_k is 7; it may be a whole number above 0, or none" in capsys.readouterr().err
    for wrong, says in (("temprature 1", "Did you mean temperature?"), ("temperature x", "temperature is 'x'; it sh")):
        with pytest.raises(ConfigError, match=re.escape(says)):
            talk.set(wrong)


def test_saved_chat_loads_again_and_is_training_data(talk, tmp_path):
    talk.system("be brief\u2028\u00e9")
    talk.say("a\nb <|im_end|>")
    talk.say("7")
    file = tmp_path / "talk.jsonl"
    talk.save(str(file))
    whole = [turn("system", "be brief\u2028\u00e9"), *talk.messages]
    assert json.loads(file.read_text()) == {"messages": whole}
    (document,) = documents(str(file), Data(format="chat"))
    assert messages_of(document) == (whole, 0)
    other = TerminalChat(talk.chat_session.text_engine.engine.model, Generation(**GREEDY))
    other.load(str(file))
    assert (other.system_message, other.messages) == (talk.system_message, talk.messages)
    for each in (talk, other):
        each.say("more")
    assert other.messages == talk.messages
    other.save("")
    assert len(json.loads(file.read_text())["messages"]) == 7
    with pytest.raises(ConfigError, match="is there already; /save takes a name that is new"):
        TerminalChat.save(other, str(Path(__file__)))


@pytest.mark.parametrize("name", ["~nobody-has-this-name/x.jsonl", f"{'x' * 300}.jsonl"], ids=["home", "long"])
def test_chat_survives_invalid_file_names(talk, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    talk.say("the model")
    with pytest.raises(MissingResourceError, match="could not be written"):
        talk.save(name)
    with pytest.raises(InvalidFileError, match="cannot be read"):
        talk.load(name)
    assert (talk.file, len(talk.messages)) == (None, 2)


def test_chat_without_an_answer_is_loaded_and_retried(talk, tmp_path, capsys):
    (tmp_path / "one.json").write_text('{"messages": [\n{"role": "user", "content": "the model"}]}')
    talk.num_hidden = 2
    talk.load(str(tmp_path / "one.json"))
    assert talk.num_hidden == 0
    assert "/retry gives one" in capsys.readouterr().err
    talk.retry("")
    assert [each["role"] for each in talk.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"{", "is not one JSON object"),
        (b'{"messages": []}\n{"messages": []}', "is not one JSON object"),
        (b"[" * 100_000, "is not one JSON object"),
        (b"[]", "is no conversation"),
        (b'{"messages": []}', "has no message in it"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "the role 'robot'"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "is a number; it should be text"),
        (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "plain JSON values"),
    ],
)
def test_load_command_refuses_invalid_files_and_keeps_its_state(talk, tmp_path, content, says):
    talk.say("the model")
    before = list(talk.messages)
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises((InvalidFileError, ConfigError), match=says):
        talk.load(str(tmp_path / "x.jsonl"))
    assert (talk.messages, talk.file) == (before, None)


def test_system_message_refused_by_the_template_is_undone(talk, tmp_path):
    def refuses(messages):
        raise ConfigError("the chat template says: no system")

    talk.tokenizer.chat = refuses
    with pytest.raises(ConfigError, match="no system"):
        talk.system("be brief")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [turn("system", "s"), turn("user", "x")]}))
    with pytest.raises(ConfigError, match="no system"):
        talk.load(str(tmp_path / "x.jsonl"))
    assert (talk.system_message, talk.messages) == (None, [])


def test_chat_reports_unknown_and_premature_commands(chat):
    code, out, err = chat(
        "/sytem x", "/retry", "/save", "/save x.jsonl", "/load", "", " /a path", "/help", "/exit", "x"
    )
    assert code == 0
    for says in (
        "there is no command /sytem. Did you mean /system?",
        "nothing was said yet",
        "/save needs the name",
        "no conversation yet to save",
        "/load needs the name",
        "Ctrl-C stops an answer",
    ):
        assert says in err
    assert err.count("tokens/s") == 1, "a path behind a space is a message"
    assert out.count("> ") == 9


@pytest.mark.parametrize("word", ["/exit", "/exit ", "/exit now"])
def test_exit_command_ignores_what_follows(chat, word):
    code, out, err = chat(word, "never heard")
    assert (code, out.count("> ")) == (0, 1)
    assert "there is no command" not in err


# What is typed


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "", "x"], "one\ntwo\n"),
        (['"""', "one", "", '"two"', '"""'], 'one\n\n"two"'),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (["\udcff"], "\ufffd"),
    ],
)
def test_chat_input_reads_multiline_messages(monkeypatch, lines, message):
    monkeypatch.setattr("sys.stdin", Typed(*lines))
    assert typed_message() == message.strip("\n")


def test_base_model_in_chat_continues_each_text_separately(chat, folders):
    code, out, err = chat("the model", "/save x.jsonl", "/system x", "/retry", model="base")
    assert code == 0
    from smolforge.checkpoint.loading import load

    (expected,) = generate(load(str(folders / "base")), ["the model"], temperature=0, max_new_tokens=6)
    assert out.count(f"the model{expected.text}\n") == 2
    assert "This is a base model" in err
    assert err.count("there is no conversation with a base model") == 2


def test_generate_without_a_prompt_equals_chat(chat):
    timeless = [re.sub(r"[\d.]+ (tokens/s|s;)", "", each) for each in chat("the model", verb="generate")[1:]]
    assert timeless == [re.sub(r"[\d.]+ (tokens/s|s;)", "", each) for each in chat("the model")[1:]]
    code, _, err = chat(verb="generate", flags=["--json"])
    assert (code, "give it a --prompt" in err) == (2, True)


# Signals


def test_ctrl_c_stops_the_answer_but_not_the_chat(chat, monkeypatch):
    from smolforge.generation.engine import Engine

    steps, real = [], Engine.step

    def step(engine):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    code, _, err = chat("the model", "/set max_new_tokens 3", "a token")
    assert code == 0
    assert "(4 tokens, " in err
    assert "; stopped)" in err
    assert "(3 tokens, " in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_interrupts_a_running_step(chat, monkeypatch):
    from smolforge.generation.engine import Engine

    real = Engine.step

    def step(engine):
        if engine.num_submitted == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    code, _, err = chat("the model", "a token")
    assert (code, err.count("(stopped)"), err.count("(6 tokens, ")) == (0, 1, 1)


def test_ctrl_c_twice_at_the_prompt_ends_the_chat(chat):
    code, out, err = chat(signal.SIGINT, "the model", signal.SIGINT, signal.SIGINT, "never heard")
    assert code == 0
    assert err.count("Ctrl-C again") == 2
    assert err.count("(6 tokens, ") == 1
    assert out.count("> ") == 4


def test_sigterm_ends_the_chat(chat):
    code, _, err = chat(signal.SIGTERM, "never heard")
    assert code == 130
    assert "tokens" not in err


# What is shown


@given(st.text())
def test_visible_removes_terminal_control_characters(text):
    shown = escape_controls(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    if text.isprintable():
        assert shown == text


@settings(max_examples=20)
@given(st.lists(st.text(st.sampled_from("\x1b[2J\r\x07\x9b\u202ea\n"), max_size=4), min_size=1))
def test_chat_output_has_no_control_characters(parts):
    talk = TerminalChat(MODEL, Generation(**GREEDY))
    talk.chat_session.stream = lambda *_: [TextChunk(part, (), None) for part in parts]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        talk._print_answer([5], "")
    assert out.getvalue() == escape_controls("".join(parts)) + "\n"
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


MODEL = taught()


def test_speed_excludes_the_time_to_first_token():
    assert format_speed(10.0, [12.0, 12.5, 13.0]) == "3 tokens, 2.0 tokens/s, the first after 2.00 s"
    assert format_speed(10.0, [12.0, 12.0, 13.0]) == "3 tokens, 1.0 tokens/s, the first after 2.00 s"
    assert format_speed(10.0, [10.5]) == "1 token, the first after 0.50 s"
    assert format_speed(10.0, []) == "no token"


@pytest.mark.parametrize(
    ("environment", "dim"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_note_is_dim_unless_colors_are_off(monkeypatch, environment, dim):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    for name, value in ({"NO_COLOR": None, "TERM": "xterm"} | environment).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    print_note("said")
    assert screen.getvalue() == ("\x1b[2msaid\x1b[0m\n" if dim else "said\n")


# On a real terminal

SLOW = """
import os, sys, time
os.open(os.ttyname(0), os.O_RDWR)  # in a session of its own, the first terminal opened is the one that sends signals
from smolforge.generation.engine import Engine
step = Engine.step
Engine.step = lambda engine: time.sleep(0.02) or step(engine)
from smolforge.cli import main
main(sys.argv[1:])
"""


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *words):
        self.leader, follower = pytest.importorskip("pty").openpty()  # which Windows has not
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, words)], stdin=follower, stdout=follower, stderr=follower,
            env=environment | {"TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def until(self, pattern, seconds=60):
        """What came up to the end of a pattern."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert select.select([self.leader], [], [], max(0, end - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.leader, 1 << 16).decode()
            except OSError:  # how Linux says that the other side has closed
                raise AssertionError(self.seen) from None
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, keys):
        os.write(self.leader, keys.encode())

    def end(self):
        """The exit code, and what was still said."""
        rest = self.seen
        try:
            while piece := os.read(self.leader, 1 << 16):
                rest += piece.decode()
        except OSError:
            pass
        os.close(self.leader)
        return self.process.wait(20), rest


def test_chat_works_on_a_real_terminal(folders, tmp_path):
    pytest.importorskip("readline")
    file = tmp_path / "talk.jsonl"
    terminal = Terminal("chat", folders / "taught", "--temperature", "0", "--max-new-tokens", "400", "--device", "cpu")
    terminal.until("Say something.*> ")
    terminal.type("the mogel\x1b[D\x1b[D\x7fd\r")  # a slip, and two steps back to mend it
    terminal.until("2004l\r..")  # readline is done, and the answer has begun
    terminal.type("\x03")
    assert "\x1b[2m(" in terminal.until(r"stopped\).*> "), "dim, where colours are"
    terminal.type("/set max_new_tokens 3\r")
    terminal.until("> ")
    terminal.type("\x1b[200~one\ntwo\x1b[201~\r")
    terminal.until(r"\(3 tokens, .*> ")
    terminal.type("\x1b[A\x1b[A\x1b[A\r")  # three lines ago
    terminal.until(r"\(3 tokens, .*> ")
    terminal.type(f"/save {file}\r")
    terminal.until("wrote 6 messages.*> ")
    terminal.type("\x03")
    terminal.until("Ctrl-C again.*> ")
    terminal.type("\x04")
    assert terminal.end()[0] == 0
    said = json.loads(file.read_text())["messages"]
    assert [each["content"] for each in said[::2]] == ["the model", "one\ntwo", "the model"]
    assert said[1]["content"], "what was said before it was stopped"
