"""A model on its way out: its card, its repository on a Hub of this machine, its app."""

import itertools
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
from smolforge.config.base import replace_settings
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.evaluation.multiple_choice import standard_error
from smolforge.exporters import hub as pushing
from smolforge.exporters import model_card
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.model_card import markdown_table
from smolforge.exporters.provenance import Origin, RunProvenance, read_origin, read_scores
from smolforge.exporters.space import GRADIO, app_code, to_space
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


def test_model_card_reports_the_run(run, folder):
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


def test_model_card_has_no_local_paths(run, folder):
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
def test_model_card_shortens_paths_to_names(run, tmp_path, monkeypatch, named, told):
    (tmp_path / "clients" / "notes").mkdir(parents=True)  # which looks like an id of the Hub
    monkeypatch.chdir(tmp_path)
    assert read_origin(run).run.portable_name(named) == told


def test_model_card_shortens_paths_known_to_be_files(run):
    known = read_origin(run).run
    files = {"clients/notes": [3, 20, 300], "clients/notes.txt": ["a" * 40]}
    told = RunProvenance(**{**known.__dict__, "corpora": {"": {"request": {"files": files}}}})
    assert (told.portable_name("clients/notes"), told.portable_name("clients/notes.txt")) == (
        "notes",
        "clients/notes.txt",
    )


def test_model_card_recipe_keeps_text_that_is_no_path(run, tmp_path):
    place = shutil.copytree(run, tmp_path / "run")
    recipe = tomllib.loads((place / "recipe.toml").read_text())
    recipe["train"]["sample_prompts"] = ["/ and ../either/or", "~"]
    recipe["data"]["cache"] = "/home/me/corpora"
    (place / "recipe.toml").write_text(tomli_w.dumps(recipe))
    text = model_card.training_section(read_origin(place).run, False)
    told = tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    assert told["train"]["sample_prompts"] == ["/ and ../either/or", "~"]
    assert told["data"]["cache"] == "corpora"


@pytest.fixture
def corpus(run, tmp_path):
    """The run's corpus, as `smolforge prepare` would have made it."""
    return shutil.copytree(run / "corpus", tmp_path / "prepared")


def test_model_card_reports_a_prepared_corpus(run, corpus, tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text(json.dumps({**NANO, "data": {"sources": ["prepared"]}}))
    monkeypatch.chdir(tmp_path)
    smolforge.train(tmp_path / "recipe.json", tmp_path / "run")
    tokens = json.loads((corpus / "corpus.json").read_text())["train_tokens_of_sources"]
    text = model_card.data_section(read_origin(tmp_path / "run").run)
    assert [f"| `{Path(source).name}` | {count:,} |" in text for source, count in tokens.items()] == [True, True]
    shutil.rmtree(corpus)
    assert "| `prepared` | not counted alone |" in model_card.data_section(read_origin(tmp_path / "run").run)


def test_origin_finds_the_corpora_of_a_mixture(run, corpus, tmp_path):
    mixture = {"one": {"source": str(corpus)}, "other": {"source": str(run / "corpus")}}
    (tmp_path / "recipe.json").write_text(json.dumps({**NANO, "data": {"mixture": mixture}}))
    smolforge.train(tmp_path / "recipe.json", tmp_path / "run")
    assert read_origin(tmp_path / "run").run.corpora.keys() == {"one", "other"}
    shutil.rmtree(corpus)
    assert read_origin(tmp_path / "run").run.corpora == {}


def test_model_card_of_an_adapter_hides_the_base_path(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "clients" / "base", model.tokenizer)
    base = {"base_model_name_or_path": str(tmp_path / "clients" / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    known = read_origin(tmp_path / "adapter")
    assert known.base == "base"
    assert str(tmp_path) not in model_card.render_card(known, [], "me/it", license_id="apache-2.0", figure=False)


@pytest.mark.parametrize("form", ["plain", "it.gguf", "adapter"])
def test_model_card_tags_chat_models_in_every_format(tmp_path, form):
    """Of a .gguf the template is in the file, of an adapter it may be in the base alone."""
    model = tiny_model()
    huggingface.save(model, tmp_path / "plain", model.tokenizer)
    chatml = Path(smolforge.__file__).parent / "tokenizer" / "chat" / "chatml.jinja"
    shutil.copyfile(chatml, tmp_path / "plain" / "chat_template.jinja")
    if form == "it.gguf":
        to_gguf(tmp_path / "plain", tmp_path / form, "f32")
    if form == "adapter":
        base = {"base_model_name_or_path": str(tmp_path / "plain"), "peft_type": "LORA"}
        (tmp_path / form).mkdir()
        (tmp_path / form / "adapter_config.json").write_text(json.dumps(base))
    text = model_card.render_card(read_origin(tmp_path / form), [], "me/it", license_id="apache-2.0", figure=False)
    assert ModelCard(text).data.tags == ["smolforge", "conversational"]
    assert "apply_chat_template" in text


def test_model_card_has_a_loss_figure(folder):
    text = (folder / "README.md").read_text()
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    picture = imread(folder / name)
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.01


def test_model_card_is_deterministic(run, folder, tmp_path):
    assert cli.run(["export", str(run), "--to", "transformers", "--out", str(tmp_path / "small")]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name


def test_origin_of_a_checkpoint_ends_at_its_step(run):
    known = read_origin(run / "checkpoints" / "step-00000004")
    assert known.run.step == known.run.metrics[-1]["step"] == 4
    assert {each.source for each in read_scores(known)} == {"step 4"}
    assert read_origin(run).run.seconds > known.run.seconds > 0


def test_model_card_without_a_run_reports_what_is_known(tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    model_card.write_model_card(tmp_path, tmp_path / "model", "me/it", draw=lambda *_: pytest.fail("there is no curve"))
    text = (tmp_path / "README.md").read_text()
    assert "How it was trained is not known" in text
    assert "Not evaluated." in text
    assert "## Data" not in text
    assert "loss.png" not in text
    assert ModelCard(text).data.eval_results is None


BASE = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(("base", "repo"), [(f"{BASE}@{'a' * 40}", BASE), ("runs/mine", None), ("small", None)])
def test_model_card_names_a_base_model_from_the_hub(run, base, repo):
    known = read_origin(run)
    known = Origin(known.folder, known.config, known.run, base)
    text = model_card.render_card(known, [], "me/it", license_id="apache-2.0", figure=False)
    assert ModelCard(text).data.base_model == repo
    assert ("2502.02737" in text) == (repo is not None)
    assert "from random weights" not in text


def test_model_card_lists_hub_datasets_but_not_local_files(run):
    known = read_origin(run)
    files = {"org/texts:en": ["a" * 40], "org/notes": [1, 20, 300], "my.txt": [1, 20, 300]}
    told = RunProvenance(**{**known.run.__dict__, "corpora": {"web": {"request": {"files": files}}, "own": {}}})
    text = model_card.render_card(
        Origin(known.folder, known.config, told, None), [], "me/it", license_id="apache-2.0", figure=False
    )
    assert ModelCard(text).data.datasets == ["org/texts"]


def test_model_card_lists_tokens_per_mixture_source(run):
    known = read_origin(run)
    mixture = {"web": {"source": "org/web:en", "weight": 3}, "own": {"source": "my.txt"}}
    recipe = replace_settings(known.run.recipe, {"data.mixture": mixture, "data.sources": ()})
    last = known.run.metrics[-1] | {"tokens_from_web": 300, "tokens_from_own": 100, "tokens": 400}
    told = RunProvenance(
        **{**known.run.__dict__, "recipe": recipe, "metrics": [*known.run.metrics, last], "corpora": {}}
    )
    text = model_card.render_card(
        Origin(known.folder, known.config, told, None), [], "me/it", license_id="apache-2.0", figure=False
    )
    assert "| web | `org/web:en` | 300 | 75.0% |" in text
    assert "| own | `my.txt` | 100 | 25.0% |" in text


def test_scores_from_evaluate_are_added_with_errors(run, tmp_path, capsys, monkeypatch):
    told = tmp_path / "scores.json"
    assert cli.run(["evaluate", str(run), "--tasks", str(run.parent / "items.jsonl"), "--json"]) == 0
    told.write_text(capsys.readouterr().out)
    measured = json.loads(told.read_text())["tasks"]["items"]
    (found,) = [
        each for each in read_scores(read_origin(run), told) if each.metric == "acc" and each.source != "step 8"
    ]
    assert (found.value, found.stderr, found.n) == (measured["acc"], measured["acc_stderr"], 5)
    assert found.source == "smolforge evaluate, 0-shot"
    monkeypatch.chdir(run.parent)
    assert read_scores(read_origin(run.name), told) == read_scores(read_origin(run), told)  # however it is spelled
    with pytest.raises(ConfigError, match="with other weights than those in"):
        read_scores(read_origin(run / "checkpoints" / "step-00000004"), told)
    told.write_text("[]")
    with pytest.raises(InvalidFileError, match="is not what smolforge evaluate MODEL --json prints"):
        read_scores(read_origin(run), told)


def test_scores_of_older_weights_are_refused(run, tmp_path, capsys):
    place = shutil.copytree(run, tmp_path / "run")
    newest = place / "checkpoints" / "step-00000008"
    newest.rename(tmp_path / "later")
    assert cli.run(["evaluate", str(place), "--tasks", str(run.parent / "items.jsonl"), "--json"]) == 0
    (tmp_path / "scores.json").write_text(capsys.readouterr().out)
    (tmp_path / "later").rename(newest)
    with pytest.raises(ConfigError, match="with other weights than those in .*step-00000008"):
        read_scores(read_origin(place), tmp_path / "scores.json")
    assert read_scores(read_origin(place / "checkpoints" / "step-00000004"), tmp_path / "scores.json")


def test_model_card_escapes_table_cells():
    assert markdown_table(("a", "b"), [("x|y\nz", 1)]).splitlines()[-1] == "| x\\|y z | 1 |"


# The repository


def test_upload_is_private_complete_and_loads_again(hub, run, folder, capsys):
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


def test_upload_dry_run_sends_nothing(hub, run, capsys):
    assert cli.run(["export", str(run), "--to", "hub", "--out", REPO, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("someone/small/model.safetensors", "library_name: transformers", "nothing was sent", "private"):
        assert part in said
    assert hub.requests == []


def test_upload_resumes_with_only_the_missing_files(hub, folder, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "more.safetensors").write_bytes(b"another large file")
    size = (folder / "model.safetensors").stat().st_size
    large = pushing._file_hashes(folder / "model.safetensors")[1]
    hub.fail(times=99, cut_after=size // 2, method="PUT", path_contains=large)
    with pytest.raises(MissingResourceError, match="was not uploaded: .* the same command goes on") as caught:
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


def test_upload_after_a_failed_commit_resends_no_large_file(hub, folder):
    hub.fail(times=99, status=500, path_contains="/commit/")
    with pytest.raises(MissingResourceError, match="status 500"):
        pushing.upload(folder, REPO)
    hub.faults.clear()
    hub.requests.clear()
    pushing.upload(folder, REPO)
    assert sent(hub) == []
    assert "model.safetensors" in content(hub)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut_after": 100}])
def test_upload_retries_transient_errors(hub, folder, fault):
    hub.fail(times=2, path_contains="/lfs/", method="PUT", **fault)
    pushing.upload(folder, REPO)
    assert len(sent(hub)) == 3
    assert "model.safetensors" in content(hub)


REFUSED = [
    (None, "someone/small", MissingResourceError, "there is no token to write"),
    ("hf_wrong", "someone/small", MissingResourceError, "the Hub refuses the token"),
    (READ_TOKEN, "someone/small", MissingResourceError, "may not write .* needs the right to write"),
    (TOKEN, "small", ConfigError, "is no name of a repository; --out takes org/name, as in you/small"),
    (TOKEN, "a/b--c", ConfigError, "is no name of a repository; --out takes org/name, as in you/mine"),
    (TOKEN, "someone/small@main", ConfigError, "is no name of a repository"),
]


@pytest.mark.parametrize(("token", "name", "kind", "match"), REFUSED)
def test_upload_refuses_invalid_tokens_and_names(hub, folder, monkeypatch, token, name, kind, match):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=match) as caught:
        pushing.upload(folder, name)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert hub.repositories == {}


def test_export_to_hub_checks_the_token_before_exporting(hub, run, monkeypatch, capsys):
    """The check of a large model takes minutes."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("smolforge.exporters.transformers.to_transformers", lambda *_, **__: pytest.fail("it was made"))
    assert cli.run(["export", str(run), "--to", "hub", "--out", REPO]) == 4
    assert "there is no token to write someone/small with" in capsys.readouterr().err


def test_upload_reports_an_unreachable_hub(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(HfApi, "__init__", gone(HfApi.__init__))
    with pytest.raises(MissingResourceError, match="was not uploaded: .*cannot be reached") as caught:
        pushing.upload(folder, REPO)
    assert "\n" not in str(caught.value)


def gone(real):
    return lambda api, *args, **given: real(api, *args, **{**given, "endpoint": "http://127.0.0.1:9"})


def test_upload_reports_a_card_the_hub_refuses(hub, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "README.md").write_text("---\n[broken\n---\n")
    with pytest.raises(InvalidFileError, match="the Hub does not take the card"):
        pushing.upload(tmp_path / "bad", REPO)
    assert "config.json" not in content(hub)


def test_upload_overwrites_other_files_only_with_replace(hub, folder):
    hub.add(REPO, {"config.json": b"{}", "notes.md": b"theirs"}, private=True)
    with pytest.raises(ConfigError, match=r"other contents \(notes.md, config.json\); .* --replace"):
        pushing.upload(folder, REPO)
    assert content(hub)["notes.md"] == b"theirs"
    pushing.upload(folder, REPO, replace=True)
    assert content(hub).keys() == {path.name for path in folder.iterdir()}


def test_upload_to_a_public_repository_needs_public(hub, folder):
    hub.add(REPO, {".gitattributes": b""})
    with pytest.raises(ConfigError, match="public; --public says that this is meant"):
        pushing.upload(folder, REPO)
    assert not pushing.upload(folder, REPO, public=True).private
    assert "model.safetensors" in content(hub)


def test_upload_never_makes_a_private_repository_public(hub, folder):
    hub.add(REPO, {".gitattributes": b""}, private=True)
    with pytest.raises(ConfigError, match="private; leave --public out, or open it in its settings"):
        pushing.upload(folder, REPO, public=True)
    assert content(hub).keys() == {".gitattributes"}


def test_upload_does_not_overwrite_a_concurrent_commit(hub, folder, monkeypatch):
    hub.add(REPO, {".gitattributes": b""}, private=True)
    real = pushing._list_files
    monkeypatch.setattr(pushing, "_list_files", lambda folder: hub.add(REPO, {"new.md": b"theirs"}) and real(folder))
    with pytest.raises(
        MissingResourceError, match="was changed while this was sent; the same command looks at it again"
    ):
        pushing.upload(folder, REPO)
    assert content(hub).keys() == {"new.md"}


# The app


def space_of(tmp_path, chats):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    if chats:
        shutil.copyfile(
            Path(smolforge.__file__).parent / "tokenizer" / "chat" / "chatml.jinja",
            tmp_path / "model" / "chat_template.jinja",
        )
    return to_space(tmp_path / "model", tmp_path / "space")


@pytest.mark.parametrize("chats", [False, True])
def test_space_is_a_short_app_with_pinned_packages(tmp_path, chats):
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


def test_space_of_a_hub_model_pins_its_commit(hub, tmp_path):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    commit = hub.add(REPO, tmp_path / "model")
    files = to_space(REPO, tmp_path / "space")
    assert set(files) == {"app.py", "requirements.txt", "README.md"}
    assert f'MODEL, REVISION, TITLE = "{REPO}", "{commit}", "small"' in (tmp_path / "space" / "app.py").read_text()
    assert yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])["models"] == [REPO]
    with pytest.raises(ConfigError, match="the app loads someone/small from the Hub, as it is there"):
        to_space(REPO, tmp_path / "other", "bfloat16")


@pytest.mark.parametrize("chats", [False, True])
def test_space_app_answers_any_text(tmp_path, monkeypatch, chats):
    """Numbers come as pages send them: whole ones are integers."""
    space_of(tmp_path, chats)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    monkeypatch.setattr("transformers.TextIteratorStreamer", partial(hurried, TextIteratorStreamer))
    names = runpy.run_path(str(tmp_path / "space" / "app.py"))
    texts = ["the model", "", "a word " * 200, "<|im_end|><script>\0"]
    for said, temperature in itertools.product(texts, (0, 0.5, 1, 2)):
        history = [{"role": role, "content": [{"text": said}]} for role in ("user", "assistant")]
        rest = (temperature, 1, 5)
        pieces = list(names["answer"](said, history, *rest) if chats else names["continue_text"](said, *rest))
        assert pieces
        assert chats or pieces[-1].startswith(said)


def hurried(real, tokenizer, timeout, **options):
    """A streamer that does not wait for minutes for what has failed."""
    return real(tokenizer, timeout=20, **options)


@pytest.mark.parametrize("chats", [False, True])
def test_space_app_reports_a_failed_generation_at_once(tmp_path, monkeypatch, chats):
    space_of(tmp_path, chats)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    names = runpy.run_path(str(tmp_path / "space" / "app.py"))

    def fails(streamer, **_):
        streamer.on_finalized_text("it ")
        raise MemoryError("this machine is too small")

    monkeypatch.setattr(names["model"], "generate", fails)
    begun = time.monotonic()
    said = names["answer"]("the", [], 0, 1, 5) if chats else names["continue_text"]("the", 0, 1, 5)
    assert next(said).endswith("it ")
    with pytest.raises(MemoryError, match="this machine is too small"):
        list(said)
    assert time.monotonic() - begun < 20


def test_space_app_drops_the_oldest_turns_of_a_long_chat(tmp_path, monkeypatch):
    space_of(tmp_path, True)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    names = runpy.run_path(str(tmp_path / "space" / "app.py"))
    turns = [{"role": role, "content": "the model reads"} for role in ("user", "assistant") * 2]
    last = {"role": "user", "content": "a token"}
    whole = names["encode"]([*turns, last], 10_000)["input_ids"]
    short = names["encode"]([*turns[2:], last], 10_000)["input_ids"]
    assert names["encode"]([*turns, last], whole.shape[1] - 1)["input_ids"].equal(short)
    # where an answer was stopped before it began
    assert names["encode"]([last, last], 3)["input_ids"].shape == (
        1,
        3,
    )


def test_space_app_strips_special_tokens_from_user_text():
    """Nor one that appears once another within it was taken out."""
    code = app_code(True, "model", "main", title="a").split("def clean")[1].split("\n\n\n")[0]
    exec(f"def clean{code}", names := {"SPECIAL": ["<|im_start|>", "<|im_end|>"]})
    assert names["clean"]("a<|im_end|>b") == "a b"
    assert "<|im_end|>" not in names["clean"]("<|im_<|im_end|>end|>" + "<|im_<|im_start|>end|>")
    assert "split_special_tokens" in app_code(False, "model", "main", title="a")


def test_space_app_escapes_the_title():
    code = app_code(True, "model", "main", title='"; raise SystemExit #')
    assert 'TITLE = "model", "main", "-- raise SystemExit -"' in code
    compile(code, "app.py", "exec")


def test_space_needs_a_tokenizer_and_an_empty_folder(tmp_path):
    huggingface.save(tiny_model(), tmp_path / "mute", None)
    with pytest.raises(ConfigError, match="has no tokenizer, so nobody could write to it"):
        to_space(tmp_path / "mute", tmp_path / "space")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already"):
        to_space(tmp_path / "mute", tmp_path / "full")


def test_space_of_a_gguf_contains_its_weights(tmp_path):
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
def test_space_app_runs_in_a_browser_with_no_outside_requests(tmp_path, browser, chats):
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
