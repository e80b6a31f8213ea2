"""Models by their Hub id, downloaded by the real client from a mirror on this machine."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import NANO
from huggingface_hub import constants

from smolforge import cli
from smolforge.checkpoint import download, huggingface, loading
from smolforge.checkpoint.hub import fetch, is_hub_id, split_hub_id
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.testing import HubMirror, tiny_model, tiny_tokenizer
from smolforge.testing.hub import TOKEN

NAME = "someone/tiny"
CONFIG = b'{"no": "model"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny"
    model = tiny_model()
    huggingface.save(model, path, model.tokenizer)
    (path / "README.md").write_text("# a model")
    (path / "modeling_tiny.py").write_text("raise SystemExit")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return path


@pytest.fixture
def tiny(hub: HubMirror, folder):
    """The mirror with one model, and its commit."""
    return hub.add(NAME, folder)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(download, "RETRY_DELAYS", (0.0, 0.0))
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))


def asked(hub, method="GET", part="/resolve/"):
    """The names of files asked for."""
    return [each.path.rsplit("/", 1)[1] for each in hub.requests if each.method == method and part in each.path]


def refused(kind, match, name=NAME, capsys=None):
    """What loading says, in Python and at the command line."""
    with pytest.raises(kind, match=match) as caught:
        loading.load(name)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert cli.run(["generate", name, "--prompt", "a"]) == kind.exit_code
    if capsys:
        said = capsys.readouterr().err.splitlines()
        assert re.search(match, said[-1])
        assert "Traceback" not in "".join(said)


def weights_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "HuggingFaceTB/SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M", "main"),
        "a/b@main": ("a/b", "main"),
        "a/b@refs/pr/1": ("a/b", "refs/pr/1"),
        "a/b@step-240000": ("a/b", "step-240000"),
        "a/b@v1.0": ("a/b", "v1.0"),
        "a/b@" + "0" * 40: ("a/b", "0" * 40),
    }.items(),
)
def test_hub_ids_are_recognized(name, parts):
    assert is_hub_id(name)
    assert split_hub_id(name) == parts


@pytest.mark.parametrize(
    "name",
    [
        *("a", "a/b/c", "./a", "../a/b", "/a/b", "a/b@", "a/b@../c", "a/-b", "a/b--c", "a/b..c", "~/a", "a b/c", ""),
        *("a/b@x y", "a/b.git", "a/" + "b" * 97, "é/b", "x/model.safetensors", "recipes/nano.toml"),
    ],
)
def test_hub_ids_of_other_forms_are_refused(name):
    assert not is_hub_id(name)
    with pytest.raises(ConfigError, match="is no Hub id; one has the form org/name or org/name@revision"):
        split_hub_id(name)


def test_load_downloads_only_needed_files_and_only_once(hub, tiny, caplog):
    caplog.set_level(logging.INFO, "smolforge.hub")
    loaded = loading.load(NAME)
    assert weights_equal(loaded, tiny_model())
    assert loaded.tokenizer.encode("the model") == tiny_tokenizer().encode("the model")
    needed = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(asked(hub)) == sorted(needed)
    assert {path.name for path in fetch(NAME).iterdir()} == needed
    assert re.search(rf"{NAME}: downloading \d+ KiB in 5 files", caplog.text)
    hub.requests.clear()
    caplog.clear()
    loading.load(NAME)
    assert [each.path for each in hub.requests] == [f"/api/models/{NAME}/revision/main?blobs=true"]
    assert caplog.text == ""


def test_download_uses_one_commit(hub, tiny):
    fetch(NAME)
    assert all(f"/resolve/{tiny}/" in each.path for each in hub.requests if "/resolve/" in each.path)


def test_load_accepts_branches_tags_and_commits(hub, tiny, folder, tmp_path):
    other = tmp_path / "other"
    huggingface.save(tiny_model(seed=1), other, tiny_tokenizer())
    for revision in ("step-240000", "v1.0", "refs/pr/1"):
        commit = hub.add(NAME, other, revision)
    assert commit != tiny
    for revision in ("step-240000", "v1.0", "refs/pr/1", commit):
        assert weights_equal(loading.load(f"{NAME}@{revision}"), tiny_model(seed=1))
    assert weights_equal(loading.load(NAME), tiny_model())
    assert weights_equal(loading.load(f"{NAME}@{tiny}"), tiny_model())


def test_load_follows_a_moved_branch(hub, tiny, tmp_path):
    loading.load(NAME)
    huggingface.save(tiny_model(seed=1), tmp_path / "other")
    hub.add(NAME, tmp_path / "other")
    assert weights_equal(loading.load(NAME), tiny_model(seed=1))


def test_local_folder_comes_before_the_hub(hub, tiny, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / NAME)
    loading.load(NAME)
    loading.read_config(NAME)
    assert loading.load_tokenizer(NAME).fingerprint == tiny_tokenizer().fingerprint
    assert hub.requests == []


def test_config_and_tokenizer_download_only_their_files(hub, tiny):
    assert loading.read_config(NAME) == tiny_model().config
    assert asked(hub) == ["config.json"]
    hub.requests.clear()
    assert loading.load_tokenizer(NAME).fingerprint == tiny_tokenizer().fingerprint
    assert asked(hub) == ["tokenizer.json", "tokenizer_config.json"]


def test_inspect_and_prepare_accept_hub_ids(hub, tiny, tmp_path, text_file, capsys):
    assert cli.run(["inspect", NAME, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["parameters"]["total"] == sum(weight.numel() for weight in tiny_model().parameters())
    assert re.fullmatch(rf"smolforge: {NAME}: downloading 1 KiB in 1 file\n", err)
    assert cli.run(["prepare", str(text_file), "--out", str(tmp_path / "corpus"), "--tokenizer", NAME]) == 0
    assert loading.load_tokenizer(tmp_path / "corpus" / "tokenizer").fingerprint == tiny_tokenizer().fingerprint
    assert cli.run(["inspect", NAME, "--train.steps", "3"]) == 2


def test_train_accepts_hub_ids(hub, tiny, tmp_path, text_file, capsys):
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    words = ["train", str(recipe), "--run", str(tmp_path / "run"), "--train.steps", "2"]
    assert cli.run([*words, "--init-from", NAME, "--tokenizer", NAME]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "downloading" in line] == [
        f"smolforge: {NAME}: downloading 1 KiB in 1 file",
        f"smolforge: {NAME}@{tiny}: downloading 111 KiB in 4 files",
    ]
    assert "downloading 111 KiB" in (tmp_path / "run" / "run.log").read_text()


def test_cache_warning_is_printed_once(hub, tiny, capsys):
    fetch(NAME)
    hub.fail(times=3, status=503, path_contains="/api/")
    assert cli.run(["generate", NAME, "--prompt", "a", "--max-new-tokens", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["token_ids"]
    assert err == f"smolforge: {NAME} comes from the cache as it is: {hub.url} answers with status 503\n"


def test_model_path_may_be_a_weights_file(folder, tmp_path, capsys):
    assert loading.resolve_model_path(folder / "model.safetensors") == folder
    assert cli.run(["inspect", str(folder / "model.safetensors")]) == 0
    assert cli.run(["inspect", str(folder / "config.json")]) == 2


@pytest.fixture
def sharded(hub, tmp_path, folder):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).save_pretrained(
        tmp_path / "sharded", max_shard_size="30KB"
    )
    hub.add("someone/sharded", tmp_path / "sharded")
    return tmp_path / "sharded"


def test_sharded_model_is_loaded(hub, sharded):
    parts = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(parts) > 1
    assert {path.name for path in fetch("someone/sharded").glob("*.safetensors")} == parts
    assert weights_equal(loading.load("someone/sharded"), tiny_model())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 3])
def test_shards_outside_the_repository_are_refused(hub, name, capsys):
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors.index.json": index})
    refused(InvalidFileError, "names .* which is no .safetensors file beside it; it is not followed", capsys=capsys)
    assert set(asked(hub)) == {"model.safetensors.index.json"}


def test_missing_shards_are_reported(hub, capsys):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors.index.json": index})
    refused(InvalidFileError, "has no model-1.safetensors, which its model.safetensors.index.json names", capsys=capsys)
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors.index.json": b"[]"})
    refused(InvalidFileError, "is not a JSON object", capsys=capsys)


def test_pickled_weights_are_refused(hub, tmp_path, capsys):
    hub.add(NAME, {"config.json": CONFIG, "pytorch_model.bin": b"\x80\x04."})
    match = "only pickled weights .pytorch_model.bin., which can run code .*/spaces/safetensors/convert"
    refused(InvalidFileError, f"{NAME} has {match}", capsys=capsys)
    assert asked(hub) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    refused(InvalidFileError, "has only pickled weights .pytorch_model-00001", str(tmp_path / "old"), capsys)


def test_repository_without_a_model_is_refused(hub, folder, capsys):
    hub.add(NAME, {"README.md": b"#", "model.safetensors": b"x"})
    refused(InvalidFileError, f"{NAME} has no config.json, so it is nothing that smolforge reads", capsys=capsys)
    hub.add(NAME, {"config.json": CONFIG})
    refused(InvalidFileError, f"{NAME} has no model.safetensors, so it is no model", capsys=capsys)
    with pytest.raises(InvalidFileError, match="has no tokenizer.json"):
        loading.load_tokenizer(NAME)


def test_missing_repository_is_reported(hub, capsys):
    match = "there is no model 'someone/nothing': neither a folder here nor a repository on the Hub that you may see"
    refused(ConfigError, match, "someone/nothing", capsys)
    with pytest.raises(ConfigError, match="a model on the Hub is named org/name or org/name@revision"):
        loading.load("nothing")


def test_missing_revision_is_reported(hub, tiny, folder, capsys):
    hub.add(NAME, folder, "step-100")
    refused(ConfigError, f"{NAME} has no revision 'step-1'; it has main, step-100", f"{NAME}@step-1", capsys)


def test_gated_model_needs_a_token(hub, folder, monkeypatch, capsys):
    hub.add(NAME, folder, gated=True)
    match = f"{NAME} is gated: accept its terms at {hub.url}/{NAME}, then run `hf auth login` or set HF_TOKEN"
    refused(MissingResourceError, match, capsys=capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(MissingResourceError, match)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loading.load(NAME)


def test_refused_token_is_reported(hub, tiny, capsys):
    hub.fail(times=9, status=401)
    refused(MissingResourceError, f"the Hub refuses the token for {NAME}", capsys=capsys)


@pytest.mark.parametrize("part", ["/api/", "model.safetensors", "config.json"])
def test_server_error_is_retried(hub, tiny, part):
    hub.fail(times=2, status=500, path_contains=part)
    assert weights_equal(loading.load(NAME), tiny_model())


def test_lasting_server_error_is_reported(hub, tiny, capsys):
    hub.fail(times=6, status=503, path_contains="/api/")
    match = (
        f"{NAME} is no folder here, and as a model on the Hub it cannot be downloaded: {hub.url} answers with status"
    )
    refused(MissingResourceError, match, capsys=capsys)
    hub.fail(times=6, status=500, path_contains="model.safetensors")
    refused(MissingResourceError, match, capsys=capsys)
    loading.load(NAME)


def test_hanging_server_times_out(hub, tiny, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.fail(times=2, delay=0.5, path_contains="/api/")
    refused(MissingResourceError, "cannot be downloaded: .* cannot be reached .*timed out", capsys=capsys)


def test_download_resumes_after_a_cut_connection(hub, tiny, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.fail(times=2, cut_after=5000, path_contains="model.safetensors")
    assert weights_equal(loading.load(NAME), tiny_model())
    ranges = [each.range for each in hub.requests if "model.safetensors" in each.path and each.method == "GET"]
    assert ranges == [None, "bytes=5000-", "bytes=10000-"]


def test_download_resumes_in_the_next_process(hub, tiny, folder, monkeypatch, caplog):
    def impatient(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    with monkeypatch.context() as stopping:
        for module in ("huggingface_hub.file_download", "smolforge.errors.hub"):  # which of them tries again first
            stopping.setattr(f"{module}.time", SimpleNamespace(sleep=impatient))
        hub.fail(cut_after=30_000, path_contains="model.safetensors")
        assert cli.run(["generate", NAME, "--prompt", "a"]) == 130
    hub.requests.clear()
    caplog.set_level(logging.INFO, "smolforge.hub")
    assert weights_equal(loading.load(NAME), tiny_model())
    assert [each.range for each in hub.requests if each.method == "GET" and "model.safetensors" in each.path] == [
        "bytes=30000-"
    ]
    size = sum((folder / name).stat().st_size for name in asked(hub)) - 30_000
    assert f"downloading {size / 2**10:.0f} KiB in 1 file" in caplog.text  # the weights come last
    assert not list((Path(constants.HF_HUB_CACHE)).rglob("*.partial"))


def test_corrupted_download_is_detected_and_removed(hub, tiny, capsys):
    stored = hub.repositories["model", NAME].commits[tiny]["model.safetensors"]
    sound = stored.path.read_bytes()
    stored.path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    refused(InvalidFileError, f"model.safetensors of {NAME} came damaged: its sha256 is .* was removed", capsys=capsys)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.partial"))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
    stored.path.write_bytes(sound)
    loading.load(NAME)


def test_truncated_download_is_reported(hub, tiny, capsys):
    stored = hub.repositories["model", NAME].commits[tiny]["model.safetensors"]
    stored.path.write_bytes(stored.path.read_bytes()[:-100])
    refused(
        MissingResourceError,
        f"{NAME} is no folder here, .* cannot be downloaded: Consistency check failed",
        capsys=capsys,
    )


def test_download_refuses_a_full_disk(hub, tiny, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(MissingResourceError, rf"{NAME} needs [\d,]+ more bytes and .* has 1,000 free; make room", capsys=capsys)
    assert asked(hub) == []


@pytest.fixture
def unplugged(hub, monkeypatch):
    """A network without a Hub."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", url)
    return url


def test_partial_snapshot_is_not_used_offline(hub, tiny, folder, tmp_path, monkeypatch, capsys):
    """The branch moved and only its config was looked at: without a network, the whole one from before serves."""
    loading.load(NAME)
    copy = shutil.copytree(folder, tmp_path / "later")
    (copy / "generation_config.json").write_text("{}")
    hub.add(NAME, copy)
    assert cli.run(["inspect", NAME]) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert loading.load(NAME).tokenizer is not None


def test_load_without_network_is_reported(unplugged, capsys):
    match = (
        f"{NAME} is no folder here, and as a model on the Hub it cannot be downloaded: {unplugged} cannot be reached"
    )
    refused(MissingResourceError, match, capsys=capsys)


def test_load_without_network_uses_the_cache(hub, tiny, request, caplog, capsys):
    loading.load(NAME)
    url = request.getfixturevalue("unplugged")
    assert weights_equal(loading.load(NAME), tiny_model())
    assert len(caplog.records) == 1
    assert f"{NAME} comes from the cache as it is: {url} cannot be reached" in caplog.text
    assert cli.run(["inspect", NAME, "--json"]) == 0
    assert capsys.readouterr().err.count("comes from the cache") == 1
    with pytest.raises(MissingResourceError):
        loading.load(f"{NAME}@step-1")


def test_hub_offline_needs_a_complete_cache(hub, tiny, monkeypatch, caplog, capsys):
    fetch(NAME, ["config.json"])
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loading.read_config(NAME)
    match = f"{NAME} is no folder here, and as a model on the Hub it is not wholly in the cache .* HF_HUB_OFFLINE"
    refused(MissingResourceError, match, capsys=capsys)
    with pytest.raises(MissingResourceError):
        loading.load_tokenizer(NAME)
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (NAME, f"{NAME}@{tiny}"):
        assert weights_equal(loading.load(name), tiny_model())
    assert hub.requests == []
    assert caplog.text == ""


def test_hub_offline_works_in_a_new_process(hub, tiny, tmp_path):
    def inspect(cache):
        environment = os.environ | {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "smolforge", "inspect", NAME, "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    fetch(NAME, ["config.json"])
    hub.requests.clear()
    done = inspect(constants.HF_HUB_CACHE)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["parameters"]["total"]
    done = inspect(str(tmp_path / "empty"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (4, "", 1)
    assert "HF_HUB_OFFLINE" in done.stderr
    assert hub.requests == []


def test_transformers_finds_our_downloads(hub, tiny, monkeypatch):
    from transformers import AutoModelForCausalLM

    fetch(NAME)
    hub.requests.clear()
    AutoModelForCausalLM.from_pretrained(NAME, local_files_only=True, cache_dir=constants.HF_HUB_CACHE)
    assert asked(hub) == []


def test_hub_mirror_serves_datasets(hub, tmp_path):
    hub.add("someone/texts", {"data/a.jsonl": b'{"text": "one"}\n', "README.md": b"#"}, kind="dataset")
    path = huggingface_hub.hf_hub_download("someone/texts", "data/a.jsonl", repo_type="dataset")
    assert Path(path).read_text() == '{"text": "one"}\n'
    api = huggingface_hub.HfApi()
    deep = {each.path for each in api.list_repo_tree("someone/texts", repo_type="dataset", recursive=True)}
    assert deep == {"data", "data/a.jsonl", "README.md"}
    assert {each.path for each in api.list_repo_tree("someone/texts", repo_type="dataset")} == {"data", "README.md"}
    (found,) = api.get_paths_info("someone/texts", ["data/a.jsonl"], repo_type="dataset")
    assert found.size == 16
    with huggingface_hub.HfFileSystem().open("datasets/someone/texts/data/a.jsonl", "rb") as file:
        file.seek(10)
        assert file.read(4) == b'one"'
