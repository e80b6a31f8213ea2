"""Settings: what is refused, in which words, and what may change on resume."""

import datetime

import pytest
from pydantic import ValidationError

from smolforge.config import ModelConfig, Recipe
from smolforge.config.base import FREE, fields, leaves, replace_settings, validate_settings
from smolforge.errors import ConfigError


def refuse(tree):
    with pytest.raises(ConfigError) as caught:
        validate_settings(Recipe, tree)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"data": {"sorces": []}}, "there is no setting 'data.sorces'. Did you mean data.sources?"),
        ({"trian": {}}, "there is no setting 'trian'. Did you mean train?"),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; it should be a whole number above 0"),
        ({"train": {"steps": 0}}, "train.steps is 0; it should be a whole number above 0"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate is nan"),
        ({"optim": {"name": "sgd"}}, "optim.name is 'sgd'; it should be adamw or muon"),
        (
            {"train": {"sequence_length": 100, "batch_tokens": 1050}},
            "train: batch_tokens (1050) must be a multiple of sequence_length (100); 1000 is the nearest",
        ),
        ({"model": {"num_attention_heads": 7}}, "hidden_size (576) must be a multiple of num_attention_heads (7)"),
        (
            {"model": {"num_key_value_heads": 2}},
            "num_attention_heads (9) must be a multiple of num_key_value_heads (2)",
        ),
        ({"model": {"head_dim": 7}}, "head_dim (7) must be even"),
        ({"model": {"max_position_embeddings": 64}}, "train.sequence_length (2048) is beyond"),
        ({"optim": {"schedule": {"warmup_steps": 900, "decay_steps": 200}}}, "together are more than the 1000 steps"),
        ({"optim": {"schedule": {"final_learning_rate": 1}}}, "is above optim.learning_rate (0.003)"),
        ({"train": 5}, "train is 5; it should be a table of settings"),
        ({"train": {"steps": True}}, "train.steps is true; it should be a whole number above 0"),
        ({"train": {"keep_best": 5}}, "train.keep_best is 5; it should be true or false"),
        ({"train": {"evaluate_every": 0}}, "evaluate_every is 0; it should be a whole number above 0, or none"),
        ({"train": {"device": "\udcff"}}, "train.device is '\\udcff'; it should be text that can be written as UTF-8"),
        ({"data": {"sources": ["a", 5]}}, "data.sources has 5 in it; it should be a list of text"),
        ({"special_tokens": [""]}, "special_tokens has '' in it; it should be a list of text that is not empty"),
        (
            {"tokenizer": datetime.date(2020, 1, 1)},
            "tokenizer is 2020-01-01; it should be text that is not empty, or none",
        ),
        ({"\udcff": 1}, "there is no setting '\\udcff'"),
        (
            {"optim": {"schedule": {"warmup_steps": "many"}}},
            "warmup_steps is 'many'; it should be a whole number of at least 0, or a finite number above 0 and below 1",
        ),
        (
            {"optim": {"betas": [0.9]}},
            "optim.betas is [0.9]; it should be a list of 2, each a finite number of at least 0",
        ),
        ({"seed": 16**9999}, "seed is a value too long to show; it should be a whole number"),
        ({"train": {"steps": 2**70}}, "train.steps is 1180591620717411303424; it should be a whole number below 2**63"),
        ({"train": {"steps": "x" * 999}}, f"train.steps is '{'x' * 59}...; it should be"),
        (
            {"seed": 2**70},
            "seed is 1180591620717411303424; it should be a whole number of at least 0 and below 9223372036854775808",
        ),
    ],
)
def test_config_errors_are_sentences(tree, said):
    assert said in refuse(tree)


def test_config_defaults_are_smollm2_135m():
    assert ModelConfig().resolved_head_dim == 64
    assert Recipe().train.sequences_per_step == 512


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        Recipe().seed = 1


def test_config_fields_have_descriptions():
    for name, field in fields(Recipe):
        assert field.description, name
        assert field.description.endswith("."), name


def test_config_free_settings_are_the_published_list():
    free = {name for name, field in fields(Recipe) if FREE in field.metadata}
    fixed = {name for name, _ in fields(Recipe)} - free
    assert {"train.steps", "train.micro_batch_size", "train.device", "data.num_workers"} <= free
    assert {"seed", "tokenizer", "data.sources", "train.sequence_length", "train.batch_tokens"} <= fixed
    assert all(name in fixed for name in leaves(Recipe()) if name.startswith(("model.", "optim.")))


def test_replaced_changes_one_setting_and_validates_it():
    assert replace_settings(Recipe(), {"optim.schedule.warmup_steps": 7}).optim.schedule.warmup_steps == 7
    with pytest.raises(ConfigError, match=r"train.steps is -1"):
        replace_settings(Recipe(), {"train.steps": -1})
