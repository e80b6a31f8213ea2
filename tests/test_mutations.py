"""What is wrong in a recipe or on a command line is said in one sentence, whatever it is; a few of them by heart."""

import pytest
from mutations import mutations

from smolforge import train
from smolforge.config import Recipe, load
from smolforge.config.base import replace_settings
from smolforge.config.load import read_recipe, write_recipe
from smolforge.errors import ConfigError


@pytest.mark.heavy
def test_mutated_recipes_and_commands_give_one_sentence():
    assert mutations(150).endswith("0 tracebacks")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.toml", "a = " + "[" * 5000, "r.toml cannot be read: it is nested too deeply for a recipe"),
        ("r.json", '{"train":' * 99 + "1" + "}" * 99, "r.json cannot be read: it is nested too deeply for a recipe"),
        ("r.toml", "a." * 9999 + "b = 1", "r.toml cannot be read: there are more than 1,000 dots (at line 1): 'a.a."),
        ("r.toml", " " * 200_000, "r.toml cannot be read: it has more than 131,072 bytes"),
        ("r.yaml", "train: &a\n  steps: *a\n", "no anchors, aliases or tags (at line 1, column 8): 'train: &a'"),
        ("r.yaml", "seed: !!python/name:os.system\n", "no anchors, aliases or tags (at line 1, column 7): 'seed: !!"),
        ("r.yaml", "train:\n  1: 2\n", "a setting's name is text (at line 2, column 3): '1: 2'"),
        ("r.yaml", "seed: 1\nseed: 2\n", "r.yaml cannot be read: 'seed' is set twice"),
        ("r.json", '{"seed": 1, "seed": 2}', "r.json cannot be read: 'seed' is set twice"),
        (
            "r.toml",
            "seed = 1\nseed = 2\n",
            "r.toml cannot be read: Cannot overwrite a value (at line 2, column 9): 'seed",
        ),
        ("r.json", '{"seed": 1, ' + " " * 70 + '"x": "', 'Unterminated string (at line 1, column 88): \'"x": "\''),
        ("r.json", '{"\\ud800": 1}', "r.json cannot be read: '\\ud800' is not UTF-8 text"),
        ("r.toml", b"seed = 1 # \xff", "r.toml cannot be read: byte 11 is not UTF-8 text"),
        ("r.toml", "seed = 1" + "0" * 5000, "r.toml cannot be read: a number in it has thousands of digits"),
        ("r.toml", "model = 5\n", "r.toml: model is 5; it should be a table of settings"),
        ("r.toml", "[model]\npreset = 5\n", "r.toml: model.preset: there is no preset '5'; there are compact-124m"),
    ],
)
def test_recipe_errors_name_the_place_in_the_file(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / name)
    assert said in str(caught.value)


def test_recipe_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "r.json").write_bytes(b'\xef\xbb\xbf{"seed": 7}')
    assert read_recipe(tmp_path / "r.json").seed == 7


def test_recipe_must_be_a_regular_file(tmp_path):
    with pytest.raises(ConfigError, match=r"is no file, but a folder, a device or a link to nothing"):
        read_recipe(tmp_path)


def test_recipe_too_large_to_read_back_is_not_written():
    long = replace_settings(Recipe(), {"data.sources": [f"shards/{number:04}.txt" for number in range(9999)]})
    with pytest.raises(ConfigError, match=r"131,072 bytes that can be read again; folders and globs"):
        write_recipe(long)
    assert 10 * len(write_recipe(Recipe())) < load.MAX_BYTES


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.steps": "many"}, "train.steps is 'many'; it should be a whole number above 0"),
        ({"train.stpes": 1}, "there is no setting 'train.stpes'. Did you mean train.steps?"),
        ({"bad.key": 1}, "there is no setting 'bad'."),
        ({"train.sequence_length": 100}, "r.toml with train.sequence_length changed: train: batch_tokens (4096) must"),
        ({"model": "nano"}, "model.preset: there is no preset 'nano'; there are"),
    ],
)
def test_recipe_errors_name_the_file_or_the_override(tmp_path, overrides, said):
    path = tmp_path / "r.toml"
    path.write_text('model = "smollm2-nano"\n[train]\nsequence_length = 64\nbatch_tokens = 4096\n')
    assert read_recipe(path, {"model.num_hidden_layers": 3}).model.num_hidden_layers == 3
    with pytest.raises(ConfigError) as caught:
        train(path, tmp_path / "run", **overrides)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(said)
    path.write_text("[train]\nsteps = 'few'\n")
    with pytest.raises(ConfigError) as caught:
        train(path, tmp_path / "run", **overrides)
    assert str(caught.value) == f"{path}: train.steps is 'few'; it should be a whole number above 0"
