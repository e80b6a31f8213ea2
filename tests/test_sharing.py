"""A model on its way out: its card, its repository on a Hub of this machine, its app."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tomli_w
import yaml
from conftest import NANO
from huggingface_hub import HfApi, ModelCard, SpaceCard, constants
from matplotlib.image import imread
from transformers import TextIteratorStreamer

import smolforge
from smolforge import cli
from smolforge.checkpoint import huggingface, loading
from smolforge.config.base import replaced
from smolforge.errors import InvalidFile, MissingResource, SettingError
from smolforge.evaluation.multiple_choice import standard_error
from smolforge.exporters import hub as pushing
from smolforge.exporters import model_card
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.model_card import duration, table
from smolforge.exporters.provenance import Origin, Run, origin, scores
from smolforge.exporters.space import GRADIO, app, to_space
from smolforge.testing import sentences, tiny_model
from smolforge.testing.hub import READ_TOKEN, TOKEN

REPO = "someone/small"
SPACE = Path(__file__).parents[1] / ".space" / "bin" / "python"
ITEMS = [{"query": "the model reads a", "choices": ["token", "text"], "gold": at % 2} for at in range(5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two sources, scored on five items, with a checkpoint at its middle."""
    place = tmp_path_factory.mktemp("shared")
    (place / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS))
    for name, seed in (("first.txt", 1), ("second.txt", 2)):
        (place / name).write_text(sentences(4000, seed))
    sources = [str(place / name) for name in ("first.txt", "second.txt")]
    recipe = place / "recipe.json"
    recipe.write_text(json.dumps({**NANO, "data": {"sources": sources}}))
    smolforge.train(recipe, place / "run", **{"train.evaluate_tasks": [str(place / "items.jsonl")]})
    return place / "run"


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """What is uploaded: model and card."""
    out = tmp_path_factory.mktemp("folder") / "small"
    assert cli.run(["export", str(run), "--to", "transformers", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))


def content(hub, name=REPO):
    """What the Hub has now."""
    repository = hub.repositories["model", name]
    return {path: file.path.read_bytes() for path, file in repository.commits[repository.revisions["main"]].items()}


def sent(hub):
    """Bodies of large files that were sent, whole or not."""
    return [each.path.removeprefix("/lfs/") for each in hub.requests if each.method == "PUT"]


# The card


def test_the_card_says_what_the_run_says(run, folder):
    found = ModelCard.load(folder / "README.md")
    text = str(found)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    corpus = json.loads((run / "corpus" / "corpus.json").read_text())
    assert (found.data.license, found.data.library_name, found.data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert found.data.base_model is None
    assert found.data.datasets is None
    results = {(each.dataset_name, each.metric_type): each.metric_value for each in found.data.eval_results}
    assert results["items", "acc"] == metrics[-1]["task_items_acc"]
    assert results["held-out part of the corpus", "loss"] == pytest.approx(metrics[-1]["validation_loss"], abs=1e-6)
    error = standard_error(metrics[-1]["task_items_acc"], 5)
    assert f"| items | acc | {metrics[-1]['task_items_acc']:.4f} ± {error:.4f} | 5 | step 8 |" in text
    assert f"{metrics[-1]['tokens']:,} tokens in 8 steps" in text
    of_sources = corpus["train_tokens_of_sources"]
    assert sum(of_sources.values()) == corpus["splits"]["train"]["tokens"]
    for source, tokens in of_sources.items():
        assert f"| {Path(source).name} | {tokens:,} |".replace("| ", "| `", 1).replace(" |", "` |", 1) in text
    assert json.loads((run / "environment.json").read_text())[0]["packages"]["torch"] in text


def test_nothing_of_where_it_lay_is_told(run, folder):
    text = (folder / "README.md").read_text()
    assert str(run.parent) not in text
    recipe = tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["data"]["sources"] == ["first.txt", "second.txt"]
    assert recipe["optim"] == tomllib.loads((run / "recipe.toml").read_text())["optim"]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("clients/acme/notes.txt", "notes.txt"),
        ("clients/notes", "notes"),
        ("/home/me/notes/", "notes"),
        ("~/notes.txt", "notes.txt"),
        ("C:\\Users\\me\\notes.txt", "notes.txt"),
        ("clients/*.txt", "*.txt"),
        ("org/texts@main:en", "org/texts@main:en"),
        ("python-docs", "python-docs"),
        (f"org/model@{'a' * 40}", f"org/model@{'a' * 40}"),
    ],
)
def test_of_a_place_only_the_name_is_told(run, tmp_path, monkeypatch, named, told):
    (tmp_path / "clients" / "notes").mkdir(parents=True)  # which looks like an id of the Hub
    monkeypatch.chdir(tmp_path)
    assert origin(run).run.short(named) == told


def test_what_the_run_knows_to_be_a_file_is_one_wherever_it_is_told(run):
    known = origin(run).run
    files = {"clients/notes": [3, 20, 300], "clients/notes.txt": ["a" * 40]}
    told = Run(**{**known.__dict__, "corpora": {"": {"request": {"files": files}}}})
    assert (told.short("clients/notes"), told.short("clients/notes.txt")) == ("notes", "clients/notes.txt")


def test_what_is_no_place_stays_in_the_recipe(run, tmp_path):
    place = shutil.copytree(run, tmp_path / "run")
    recipe = tomllib.loads((place / "recipe.toml").read_text())
    recipe["train"]["sample_prompts"] = ["/ and ../either/or", "~"]
    recipe["data"]["cache"] = "/home/me/corpora"
    (place / "recipe.toml").write_text(tomli_w.dumps(recipe))
    text = model_card.training(origin(place).run, False)
    told = tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    assert told["train"]["sample_prompts"] == ["/ and ../either/or", "~"]
    assert told["data"]["cache"] == "corpora"


@pytest.fixture
def corpus(run, tmp_path):
    """The run's corpus, as `smolforge prepare` would have made it."""
    return shutil.copytree(run / "corpus", tmp_path / "prepared")


def test_a_corpus_that_was_prepared_before_is_told_as_well(run, corpus, tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text(json.dumps({**NANO, "data": {"sources": ["prepared"]}}))
    monkeypatch.chdir(tmp_path)
    smolforge.train(tmp_path / "recipe.json", tmp_path / "run")
    tokens = json.loads((corpus / "corpus.json").read_text())["train_tokens_of_sources"]
    text = model_card.data(origin(tmp_path / "run").run)
    assert [f"| `{Path(source).name}` | {count:,} |" in text for source, count in tokens.items()] == [True, True]
    shutil.rmtree(corpus)
    assert "| `prepared` | not counted alone |" in model_card.data(origin(tmp_path / "run").run)


def test_of_a_mixture_the_corpora_are_found(run, corpus, tmp_path):
    mixture = {"one": {"source": str(corpus)}, "other": {"source": str(run / "corpus")}}
    (tmp_path / "recipe.json").write_text(json.dumps({**NANO, "data": {"mixture": mixture}}))
    smolforge.train(tmp_path / "recipe.json", tmp_path / "run")
    assert origin(tmp_path / "run").run.corpora.keys() == {"one", "other"}
    shutil.rmtree(corpus)
    assert origin(tmp_path / "run").run.corpora == {}


def test_the_base_of_an_adapter_is_told_without_its_place(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "clients" / "base", model.tokenizer)
    base = {"base_model_name_or_path": str(tmp_path / "clients" / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    known = origin(tmp_path / "adapter")
    assert known.base == "base"
    assert str(tmp_path) not in model_card.card(known, [], "me/it", "apache-2.0", False)


@pytest.mark.parametrize("form", ["plain", "it.gguf", "adapter"])
def test_a_chat_model_is_one_in_whatever_form_it_comes(tmp_path, form):
    """Of a .gguf the template is in the file, of an adapter it may be in the base alone."""
    model = tiny_model()
    huggingface.save(model, tmp_path / "plain", model.tokenizer)
    chatml = Path(smolforge.__file__).parent / "chat" / "chatml.jinja"
    shutil.copyfile(chatml, tmp_path / "plain" / "chat_template.jinja")
    if form == "it.gguf":
        to_gguf(tmp_path / "plain", tmp_path / form, "f32")
    if form == "adapter":
        base = {"base_model_name_or_path": str(tmp_path / "plain"), "peft_type": "LORA"}
        (tmp_path / form).mkdir()
        (tmp_path / form / "adapter_config.json").write_text(json.dumps(base))
    text = model_card.card(origin(tmp_path / form), [], "me/it", "apache-2.0", False)
    assert ModelCard(text).data.tags == ["smolforge", "conversational"]
    assert "apply_chat_template" in text


def test_its_figure_is_there_and_is_drawn(folder):
    text = (folder / "README.md").read_text()
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    picture = imread(folder / name)
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.01


def test_the_same_model_makes_the_same_card(run, folder, tmp_path):
    assert cli.run(["export", str(run), "--to", "transformers", "--out", str(tmp_path / "small")]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name


def test_of_a_checkpoint_only_what_was_before_it(run):
    known = origin(run / "checkpoints" / "step-00000004")
    assert known.run.step == known.run.metrics[-1]["step"] == 4
    assert {each.how for each in scores(known)} == {"step 4"}
    assert origin(run).run.seconds > known.run.seconds > 0


def test_a_folder_without_a_run_says_what_is_known(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    model_card.write(tmp_path, tmp_path / "model", "me/it", lambda *_: pytest.fail("there is no curve"))
    text = (tmp_path / "README.md").read_text()
    assert "How it was trained is not known" in text
    assert "Not evaluated." in text
    assert "## Data" not in text
    assert "loss.png" not in text
    assert ModelCard(text).data.eval_results is None


BASE = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(("base", "repo"), [(f"{BASE}@{'a' * 40}", BASE), ("runs/mine", None), ("small", None)])
def test_a_base_is_named_where_it_is_one_of_the_hub(run, base, repo):
    known = origin(run)
    known = Origin(known.folder, known.config, known.run, base)
    text = model_card.card(known, [], "me/it", "apache-2.0", False)
    assert ModelCard(text).data.base_model == repo
    assert ("2502.02737" in text) == (repo is not None)
    assert "from random weights" not in text


def test_data_sets_of_the_hub_are_named_and_files_that_look_alike_are_not(run):
    known = origin(run)
    files = {"org/texts:en": ["a" * 40], "org/notes": [1, 20, 300], "my.txt": [1, 20, 300]}
    told = Run(**{**known.run.__dict__, "corpora": {"web": {"request": {"files": files}}, "own": {}}})
    text = model_card.card(Origin(known.folder, known.config, told, None), [], "me/it", "apache-2.0", False)
    assert ModelCard(text).data.datasets == ["org/texts"]


def test_a_mixture_is_told_source_by_source(run):
    known = origin(run)
    mixture = {"web": {"source": "org/web:en", "weight": 3}, "own": {"source": "my.txt"}}
    recipe = replaced(known.run.recipe, {"data.mixture": mixture, "data.sources": ()})
    last = known.run.metrics[-1] | {"tokens_from_web": 300, "tokens_from_own": 100, "tokens": 400}
    told = Run(**{**known.run.__dict__, "recipe": recipe, "metrics": [*known.run.metrics, last], "corpora": {}})
    text = model_card.card(Origin(known.folder, known.config, told, None), [], "me/it", "apache-2.0", False)
    assert "| web | `org/web:en` | 300 | 75.0% |" in text
    assert "| own | `my.txt` | 100 | 25.0% |" in text


def test_scores_measured_since_are_told_with_their_errors(run, tmp_path, capsys, monkeypatch):
    told = tmp_path / "scores.json"
    assert cli.run(["evaluate", str(run), "--tasks", str(run.parent / "items.jsonl"), "--json"]) == 0
    told.write_text(capsys.readouterr().out)
    measured = json.loads(told.read_text())["tasks"]["items"]
    (found,) = [each for each in scores(origin(run), told) if each.metric == "acc" and each.how != "step 8"]
    assert (found.value, found.stderr, found.n) == (measured["acc"], measured["acc_stderr"], 5)
    assert found.how == "smolforge evaluate, 0-shot"
    monkeypatch.chdir(run.parent)
    assert scores(origin(run.name), told) == scores(origin(run), told)  # however it is spelled
    with pytest.raises(SettingError, match="with other weights than those in"):
        scores(origin(run / "checkpoints" / "step-00000004"), told)
    told.write_text("[]")
    with pytest.raises(InvalidFile, match="is not what smolforge evaluate MODEL --json prints"):
        scores(origin(run), told)


def test_scores_of_a_run_that_has_gone_on_are_not_its_newest_checkpoints(run, tmp_path, capsys):
    place = shutil.copytree(run, tmp_path / "run")
    newest = place / "checkpoints" / "step-00000008"
    newest.rename(tmp_path / "later")
    assert cli.run(["evaluate", str(place), "--tasks", str(run.parent / "items.jsonl"), "--json"]) == 0
    (tmp_path / "scores.json").write_text(capsys.readouterr().out)
    (tmp_path / "later").rename(newest)
    with pytest.raises(SettingError, match="with other weights than those in .*step-00000008"):
        scores(origin(place), tmp_path / "scores.json")
    assert scores(origin(place / "checkpoints" / "step-00000004"), tmp_path / "scores.json")


def test_hostile_names_stay_within_their_cells():
    assert table(("a", "b"), [("x|y\nz", 1)]).splitlines()[-1] == "| x\\|y z | 1 |"
    assert [duration(each) for each in (5.2, 65.0, 7260.0)] == ["5 s", "1 min 5 s", "2 h 1 min"]


# The repository


def test_it_arrives_private_whole_and_loads_again(hub, run, folder, capsys):
    assert cli.run(["export", str(run), "--to", "hub", "--out", REPO]) == 0
    assert re.search(rf"{REPO} has it, private, at [0-9a-f]{{12}}", capsys.readouterr().out)
    assert hub.repositories["model", REPO].private
    there = content(hub)
    assert there.keys() == {path.name for path in folder.iterdir()} | {".gitattributes"}
    assert there["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    loaded, before = loading.load(REPO), loading.load(run)
    assert all(one.equal(other) for one, other in zip(loaded.parameters(), before.parameters(), strict=True))
    requests = len(hub.requests)
    assert cli.run(["export", str(run), "--to", "hub", "--out", REPO]) == 0
    assert "has all of this already" in capsys.readouterr().out
    assert not [each for each in hub.requests[requests:] if each.method in ("PUT", "POST")]


def test_a_dry_run_shows_all_and_sends_nothing(hub, run, capsys):
    assert cli.run(["export", str(run), "--to", "hub", "--out", REPO, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("someone/small/model.safetensors", "library_name: transformers", "nothing was sent", "private"):
        assert part in said
    assert hub.requests == []


def test_interrupted_it_sends_only_what_is_missing(hub, folder, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "more.safetensors").write_bytes(b"another large file")
    size = (folder / "model.safetensors").stat().st_size
    large = pushing._hashes(folder / "model.safetensors")[1]
    hub.fail(times=99, cut_after=size // 2, method="PUT", path_contains=large)
    with pytest.raises(MissingResource, match="was not uploaded: .* the same command goes on") as caught:
        pushing.upload(sharded, REPO)
    assert "\n" not in str(caught.value)
    assert list(content(hub)) == [".gitattributes"]
    hub.faults.clear()
    other = next(iter(set(sent(hub)) - {large}))
    hub.requests.clear()
    done = pushing.upload(sharded, REPO)
    assert sent(hub) == [large]
    assert other not in sent(hub)
    assert done.private
    assert content(hub)["more.safetensors"] == b"another large file"


def test_a_commit_that_fails_leaves_large_files_behind_that_are_not_sent_again(hub, folder):
    hub.fail(times=99, status=500, path_contains="/commit/")
    with pytest.raises(MissingResource, match="status 500"):
        pushing.upload(folder, REPO)
    hub.faults.clear()
    hub.requests.clear()
    pushing.upload(folder, REPO)
    assert sent(hub) == []
    assert "model.safetensors" in content(hub)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut_after": 100}])
def test_what_passes_is_waited_for(hub, folder, fault):
    hub.fail(times=2, path_contains="/lfs/", method="PUT", **fault)
    pushing.upload(folder, REPO)
    assert len(sent(hub)) == 3
    assert "model.safetensors" in content(hub)


REFUSED = [
    (None, "someone/small", MissingResource, "there is no token to write"),
    ("hf_wrong", "someone/small", MissingResource, "the Hub refuses the token"),
    (READ_TOKEN, "someone/small", MissingResource, "may not write .* needs the right to write"),
    (TOKEN, "small", SettingError, "is no name of a repository; --out takes org/name, as in you/small"),
    (TOKEN, "a/b--c", SettingError, "is no name of a repository; --out takes org/name, as in you/mine"),
    (TOKEN, "someone/small@main", SettingError, "is no name of a repository"),
]


@pytest.mark.parametrize(("token", "name", "kind", "match"), REFUSED)
def test_refusals(hub, folder, monkeypatch, token, name, kind, match):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=match) as caught:
        pushing.upload(folder, name)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert hub.repositories == {}


def test_without_a_token_nothing_is_made(hub, run, monkeypatch, capsys):
    """The check of a large model takes minutes."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("smolforge.exporters.transformers.to_transformers", lambda *_: pytest.fail("it was made"))
    assert cli.run(["export", str(run), "--to", "hub", "--out", REPO]) == 4
    assert "there is no token to write someone/small with" in capsys.readouterr().err


def test_a_network_that_is_gone_is_one_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(HfApi, "__init__", gone(HfApi.__init__))
    with pytest.raises(MissingResource, match="was not uploaded: .*cannot be reached") as caught:
        pushing.upload(folder, REPO)
    assert "\n" not in str(caught.value)


def gone(real):
    return lambda api, *args, **given: real(api, *args, **{**given, "endpoint": "http://127.0.0.1:9"})


def test_a_card_the_hub_does_not_take(hub, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "README.md").write_text("---\n[broken\n---\n")
    with pytest.raises(InvalidFile, match="the Hub does not take the card"):
        pushing.upload(tmp_path / "bad", REPO)
    assert "config.json" not in content(hub)


def test_other_contents_are_not_overwritten_unless_that_is_meant(hub, folder):
    hub.add(REPO, {"config.json": b"{}", "notes.md": b"theirs"}, private=True)
    with pytest.raises(SettingError, match=r"other contents \(notes.md, config.json\); .* --replace"):
        pushing.upload(folder, REPO)
    assert content(hub)["notes.md"] == b"theirs"
    pushing.upload(folder, REPO, replace=True)
    assert content(hub).keys() == {path.name for path in folder.iterdir()}


def test_what_is_public_is_written_only_where_that_is_meant(hub, folder):
    hub.add(REPO, {".gitattributes": b""})
    with pytest.raises(SettingError, match="public; --public says that this is meant"):
        pushing.upload(folder, REPO)
    assert not pushing.upload(folder, REPO, public=True).private
    assert "model.safetensors" in content(hub)


def test_what_is_private_does_not_become_public(hub, folder):
    hub.add(REPO, {".gitattributes": b""}, private=True)
    with pytest.raises(SettingError, match="private; leave --public out, or open it in its settings"):
        pushing.upload(folder, REPO, public=True)
    assert content(hub).keys() == {".gitattributes"}


def test_what_another_person_put_there_meanwhile_is_not_lost(hub, folder, monkeypatch):
    hub.add(REPO, {".gitattributes": b""}, private=True)
    real = pushing._files
    monkeypatch.setattr(pushing, "_files", lambda folder: hub.add(REPO, {"new.md": b"theirs"}) and real(folder))
    with pytest.raises(MissingResource, match="was changed while this was sent; the same command looks at it again"):
        pushing.upload(folder, REPO)
    assert content(hub).keys() == {"new.md"}


# The app


def space_of(tmp_path, chats):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    if chats:
        shutil.copyfile(
            Path(smolforge.__file__).parent / "chat" / "chatml.jinja", tmp_path / "model" / "chat_template.jinja"
        )
    return to_space(tmp_path / "model", tmp_path / "space")


@pytest.mark.parametrize("chats", [False, True])
def test_a_space_is_a_short_app_with_pins_beside_its_model(tmp_path, chats):
    files = space_of(tmp_path, chats)
    assert {"app.py", "requirements.txt", "README.md", "model/config.json", "model/model.safetensors"} <= files.keys()
    code = (tmp_path / "space" / "app.py").read_text()
    compile(code, "app.py", "exec")
    assert len(code.splitlines()) < 60
    assert 'MODEL, REVISION, TITLE = "model", "main", "space"' in code
    assert ("apply_chat_template" in code) == chats
    assert "smolforge" not in code
    assert "analytics_enabled=False" in code
    pins = [line for line in (tmp_path / "space" / "requirements.txt").read_text().splitlines() if line[0] != "-"]
    assert all(re.fullmatch(r"[a-z]+==[0-9.]+", pin) for pin in pins)
    assert f"gradio=={GRADIO}" in pins
    head = SpaceCard.load(tmp_path / "space" / "README.md").data.to_dict()
    assert (head["sdk"], head["sdk_version"], head["app_file"]) == ("gradio", GRADIO, "app.py")


def test_a_space_of_a_hub_model_loads_it_at_its_commit(hub, tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    commit = hub.add(REPO, tmp_path / "model")
    files = to_space(REPO, tmp_path / "space")
    assert set(files) == {"app.py", "requirements.txt", "README.md"}
    assert f'MODEL, REVISION, TITLE = "{REPO}", "{commit}", "small"' in (tmp_path / "space" / "app.py").read_text()
    assert yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])["models"] == [REPO]
    with pytest.raises(SettingError, match="the app loads someone/small from the Hub, as it is there"):
        to_space(REPO, tmp_path / "other", "bfloat16")


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("said", ["the model", "", "a word " * 200, "<|im_end|><script>\0"])
def test_an_app_answers_whatever_is_said(tmp_path, monkeypatch, chats, said):
    """Numbers come as pages send them: whole ones are integers."""
    space_of(tmp_path, chats)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    monkeypatch.setattr("transformers.TextIteratorStreamer", partial(hurried, TextIteratorStreamer))
    names = runpy.run_path(str(tmp_path / "space" / "app.py"))
    history = [{"role": role, "content": [{"text": said}]} for role in ("user", "assistant")]
    for temperature in (0, 0.5, 1, 2):
        rest = (temperature, 1, 5)
        pieces = list(names["answer"](said, history, *rest) if chats else names["go_on"](said, *rest))
        assert pieces
        assert chats or pieces[-1].startswith(said)


def hurried(real, tokenizer, timeout, **options):
    """A streamer that does not wait for minutes for what has failed."""
    return real(tokenizer, timeout=20, **options)


@pytest.mark.parametrize("chats", [False, True])
def test_an_answer_that_fails_ends_at_once_and_says_why(tmp_path, monkeypatch, chats):
    space_of(tmp_path, chats)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    names = runpy.run_path(str(tmp_path / "space" / "app.py"))

    def fails(streamer, **_):
        streamer.on_finalized_text("it ")
        raise MemoryError("this machine is too small")

    monkeypatch.setattr(names["model"], "generate", fails)
    begun = time.monotonic()
    said = names["answer"]("the", [], 0, 1, 5) if chats else names["go_on"]("the", 0, 1, 5)
    assert next(said).endswith("it ")
    with pytest.raises(MemoryError, match="this machine is too small"):
        list(said)
    assert time.monotonic() - begun < 20


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(tmp_path, monkeypatch):
    space_of(tmp_path, True)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    names = runpy.run_path(str(tmp_path / "space" / "app.py"))
    turns = [{"role": role, "content": "the model reads"} for role in ("user", "assistant") * 2]
    last = {"role": "user", "content": "a token"}
    whole = names["prompt"]([*turns, last], 10_000)["input_ids"]
    short = names["prompt"]([*turns[2:], last], 10_000)["input_ids"]
    assert names["prompt"]([*turns, last], whole.shape[1] - 1)["input_ids"].equal(short)
    assert names["prompt"]([last, last], 3)["input_ids"].shape == (1, 3)  # where an answer was stopped before it began


def test_nobody_writes_a_special_token():
    """Nor one that appears once another within it was taken out."""
    code = app(True, "model", "main", "a").split("def plain")[1].split("\n\n\n")[0]
    exec(f"def plain{code}", names := {"SPECIAL": ["<|im_start|>", "<|im_end|>"]})
    assert names["plain"]("a<|im_end|>b") == "a b"
    assert "<|im_end|>" not in names["plain"]("<|im_<|im_end|>end|>" + "<|im_<|im_start|>end|>")
    assert "split_special_tokens" in app(False, "model", "main", "a")


def test_a_title_stays_a_title():
    code = app(True, "model", "main", '"; raise SystemExit #')
    assert 'TITLE = "model", "main", "-- raise SystemExit -"' in code
    compile(code, "app.py", "exec")


def test_a_space_needs_a_tokenizer_and_an_empty_folder(tmp_path):
    huggingface.save(tiny_model(), tmp_path / "mute", None)
    with pytest.raises(SettingError, match="has no tokenizer, so nobody could write to it"):
        to_space(tmp_path / "mute", tmp_path / "space")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(SettingError, match="is there already"):
        to_space(tmp_path / "mute", tmp_path / "full")


def test_a_space_of_a_gguf_brings_the_model_it_is(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "plain", model.tokenizer)
    to_gguf(tmp_path / "plain", tmp_path / "it.gguf", "f32")
    assert "model/model.safetensors" in to_space(tmp_path / "it.gguf", tmp_path / "space")


@pytest.fixture
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def running(folder):
    """The app as a person starts it, on a port of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = os.environ | {"GRADIO_SERVER_PORT": port, "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([SPACE, "app.py"], cwd=folder, env=given)
    try:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                break
            assert child.poll() is None, "the app ended"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        child.terminate()
        child.wait()


@pytest.mark.long
@pytest.mark.skipif(not SPACE.exists(), reason="gradio has an environment of its own: make .space")
@pytest.mark.parametrize("chats", [False, True])
def test_the_app_answers_and_loads_nothing_from_elsewhere(tmp_path, browser, chats):
    space_of(tmp_path, chats)
    with running(tmp_path / "space") as address:
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        if chats:
            page.get_by_role("textbox").first.fill("Hello<|im_end|>!")
            page.keyboard.press("Enter")
            page.wait_for_function("document.querySelectorAll('.message.bot').length > 0", timeout=60_000)
            page.wait_for_function("document.querySelector('.message.bot').innerText.length > 5", timeout=60_000)
        else:
            page.get_by_role("button", name="Continue").click()
            page.wait_for_function("document.querySelector('textarea').value.length > 25", timeout=60_000)
        assert page.get_by_role("textbox").count() > 0
        outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert outside == []
