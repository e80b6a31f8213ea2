"""The shipped recipes of published runs, held to what was published: field by field, and to the numbers themselves."""

import csv
from typing import Any

import pytest

from smolforge.config.load import read_recipe
from smolforge.data.prepare.documents import text_document
from smolforge.data.sources.remote_text import url_and_encoding
from smolforge.data.sources.types import SourceRow
from smolforge.runs.mixture import order_of

OTHERWISE = {
    "model.model_config.rope_theta": 10_000.0,
    "model.model_config.max_position_embeddings": 2048,
    "tokenizer.tokenizer_name_or_path": "HuggingFaceTB/cosmo2-tokenizer",
    "data_stages": [
        {
            "data": {
                "dataset": {"dataset_folder": ["datasets/smollm2-corpus"], "dataset_weights": [1.0]},
                "num_loading_workers": 0,
                "seed": 8,
            },
            "name": "stable phase",
            "start_training_step": 1,
        }
    ],
}
"""What the official file says and our recipe does not: a later step's context, the same tokenizer under the model's
name, and one folder of which nobody says what is in it."""
ONLY_WAY = {
    "logging.iteration_step_info_interval": 1,
    "model.dtype": "bfloat16",
    "model.make_vocab_size_divisible_by": 1,
    "model.model_config.bos_token_id": 0,
    "model.model_config.eos_token_id": 0,
    "model.model_config.is_llama_config": True,
    "model.model_config.pad_token_id": None,
    "model.model_config.pretraining_tp": 1,
    "model.model_config.rope_interleaved": False,
    "model.model_config.rope_scaling": None,
    "optimizer.accumulate_grad_in_fp32": True,
    "optimizer.learning_rate_scheduler.lr_warmup_style": "linear",
    "optimizer.zero_stage": 0,
    "tokens.limit_test_batches": 0,
    "parallelism.dp": 64,
    "parallelism.expert_parallel_size": 1,
    "parallelism.pp": 1,
    "parallelism.tp": 1,
    "parallelism.recompute_layer": False,
}
"""What is no setting here: other values do not exist, or are found when a run starts, as the GPUs, the type of numbers
and the ids of special tokens."""
OURS_MEASURES = {"tokens.limit_val_batches": 0, "tokens.val_check_interval": 1000}
"""They measured nothing on held-out text while training; we do, which changes no weight."""
THEIR_PROGRAM = {
    *("checkpoints.checkpoints_path", "checkpoints.checkpoints_path_is_shared_file_system"),
    *("checkpoints.resume_checkpoint_path", "checkpoints.save_final_state", "checkpoints.save_initial_state"),
    *("general.benchmark_csv_path", "general.consumed_train_samples", "general.ignore_sanity_checks"),
    *("general.project", "general.run", "general.step", "profiler", "logging.log_level", "logging.log_level_replica"),
    *("model.ddp_bucket_cap_mb", "model.model_config.use_cache", "parallelism.pp_engine", "parallelism.tp_mode"),
    *("parallelism.tp_linear_async_communication", "parallelism.tp_recompute_allgather"),
    *("optimizer.optimizer_factory.torch_adam_is_fused", "tokenizer.tokenizer_max_length"),
    *("tokenizer.tokenizer_revision",),
}
"""Names, paths and switches of their program, which say nothing of what is learned."""


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, inner in tree.items() for key, value in flat(inner, f"{prefix}{name}.").items()}


def as_nanotron_says_it() -> dict[str, Any]:
    """Our recipe, under the names of theirs."""
    ours = read_recipe("smollm2-135m")
    model, optim, schedule, train = ours.model, ours.optim, ours.optim.schedule, ours.train
    shape = ("hidden_act", "hidden_size", "initializer_range", "intermediate_size", "num_attention_heads")
    shape += ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size")
    return {
        "general.seed": ours.seed,
        "checkpoints.checkpoint_interval": train.checkpoint_every,
        "model.init_method.std": model.initializer_range,
        **{f"model.model_config.{name}": model.__dict__[name] for name in shape},
        "optimizer.clip_grad": optim.max_grad_norm,
        "optimizer.weight_decay": optim.weight_decay,
        "optimizer.optimizer_factory.name": {"adamw": "adamW"}[optim.name],
        "optimizer.optimizer_factory.adam_beta1": optim.betas[0],
        "optimizer.optimizer_factory.adam_beta2": optim.betas[1],
        "optimizer.optimizer_factory.adam_eps": optim.eps,
        "optimizer.learning_rate_scheduler.learning_rate": optim.learning_rate,
        "optimizer.learning_rate_scheduler.lr_decay_starting_step": schedule.decay_begins,
        "optimizer.learning_rate_scheduler.lr_decay_steps": schedule.decay_steps,
        "optimizer.learning_rate_scheduler.lr_decay_style": schedule.decay,
        "optimizer.learning_rate_scheduler.lr_warmup_steps": schedule.warmup_steps,
        "optimizer.learning_rate_scheduler.min_decay_lr": schedule.final_learning_rate,
        "tokens.micro_batch_size": train.micro_batch_size,
        "tokens.batch_accumulation_per_replica": train.sequences_per_step // 64 // train.sequences_per_micro_batch,
        "tokens.sequence_length": train.sequence_length,
        "tokens.train_steps": train.steps,
    }


def test_smollm2_recipe_equals_the_official_config(shared):
    """Every field of the official configuration is ours, or stands above with what it says and why it is not."""
    import yaml

    file = shared / "reference" / "official_config_smollm2_135M_nanotron.yaml"
    official, ours = flat(yaml.safe_load(file.read_text())), as_nanotron_says_it()
    assert {name: official[name] for name in ours} == ours
    for named in (OTHERWISE, ONLY_WAY, OURS_MEASURES):
        assert {name: official[name] for name in named} == named
    assert official.keys() == ours.keys() | OTHERWISE.keys() | ONLY_WAY.keys() | OURS_MEASURES.keys() | THEIR_PROGRAM


def test_smollm2_recipe_has_the_published_numbers():
    """The same where that file is not at hand."""
    ours = read_recipe("smollm2-135m")
    schedule, train, model = ours.optim.schedule, ours.train, ours.model
    assert (ours.optim.learning_rate, schedule.warmup_steps, schedule.decay, schedule.decay_steps) == (
        *(3e-3, 2000),
        *("linear", 400_000),
    )
    assert (schedule.steps, schedule.final_learning_rate, schedule.decay_begins) == (2_000_000, 0.0, 1_600_000)
    assert (train.steps, train.batch_tokens, train.sequence_length, train.sequences_per_step) == (
        2_000_000,
        1_048_576,
        2048,
        64 * 8,
    )
    assert (ours.optim.betas, ours.optim.eps, ours.optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.01)
    assert (ours.optim.max_grad_norm, ours.seed, model.initializer_range) == (1.0, 8, 1 / 24)
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (576, 30, 9)
    assert (model.num_key_value_heads, model.intermediate_size, model.vocab_size) == (3, 1536, 49_152)
    assert ours.data.mixture is not None and ours.data.stages is None
    assert sum(source.weight for source in ours.data.mixture.values()) == pytest.approx(1)


STORE = "https://softwareheritage.s3.amazonaws.com/content/"
CODE = {"blob_id": "8ab3", "repo_name": "a/b", "path": "/c.py", "length_bytes": 5, "score": 3.1, "int_score": 3}
ROWS = {
    "HuggingFaceTB/smollm-corpus:fineweb-edu-dedup": {"text": "said", "id": "<urn>", "metadata": {"int_score": 3}},
    "HuggingFaceTB/smollm-corpus:cosmopedia-v2": {"prompt": "?", "text": "said", "token_length": 9, "format": "story"},
    "HuggingFaceTB/smollm-corpus:python-edu": CODE,
    "HuggingFaceTB/stack-edu:Python": CODE | {"language": "Python", "src_encoding": "UTF-8", "license_type": "none"},
    "HuggingFaceTB/dclm-edu": {"id": "<urn>", "text": "said", "edu_int_score": 3, "edu_score": 2.7},
    "HuggingFaceTB/finemath:finemath-3plus": {"url": "", "text": "said", "token_count": 9, "int_score": 3},
    "HuggingFaceTB/finemath:finemath-4plus": {"url": "", "text": "said", "token_count": 9, "int_score": 4},
    "HuggingFaceTB/finemath:infiwebmath-3plus": {"url": "", "metadata": "{}", "text": "said", "char_count": 4},
    "HuggingFaceFW/fineweb-edu": {"text": "said", "id": "<urn>", "dump": "CC-MAIN-2013-20", "int_score": 3},
    "HuggingFaceFW/fineweb-edu:sample-10BT": {"text": "said", "id": "<urn>", "dump": "CC-MAIN-2013-20"},
    "Infi-MM/InfiMM-WebMath-40B": {"URL": "", "text_list": ["sa", None, "id"], "image_list": [None, "u", None]},
    "bigcode/starcoderdata": {"max_stars_repo_path": "c.py", "id": "1", "content": "said"},
    "mlfoundations/dclm-baseline-1.0": {
        "text": "said",
        "url": "",
        "warcinfo": "",
        "language_id_whole_page_fasttext": {},
    },
    "open-web-math/open-web-math": {"url": "", "text": "said", "date": "", "metadata": "{}"},
}
"""A row of each data set that a recipe names, with the columns that its card says."""


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm-135m", "smollm2-curriculum", "l20"])
def test_recipe_sources_have_the_column_that_is_read(name):
    data = read_recipe(name).data
    for source, said in (data.mixture or {}).items():
        if said.source == "stackoverflow":  # no public set, as the file says
            continue
        alone, row = data.single_source(source), SourceRow(ROWS[said.source], "", f"{said.source}, row 0")
        if alone.text_url is not None:
            encoding = "UTF-8" if "src_encoding" in ROWS[said.source] else "utf-8"
            assert url_and_encoding(row, alone) == (f"{STORE}8ab3", encoding)
        else:
            assert text_document(row, alone).text.replace("\n", "") == "said"


def test_smollm_recipe_has_the_published_numbers():
    ours = read_recipe("smollm-135m")
    assert list(ours.data.weights[0].values()) == [0.70, 0.15, 0.08, 0.06, 0.01]
    schedule, train = ours.optim.schedule, ours.train
    assert (ours.optim.learning_rate, schedule.warmup_steps, schedule.decay) == (3e-3, 5000, "1-sqrt")
    assert (schedule.decay_begins, schedule.decay_steps, train.steps) == (500_000, 100_000, 600_000)
    assert (train.batch_tokens, train.sequence_length, ours.optim.weight_decay) == (32 * 8 * 2 * 2048, 2048, 0.01)
    assert (ours.model.initializer_range, ours.model.rope_theta, ours.tokenizer) == (
        *(0.0416, 10_000.0),
        "HuggingFaceTB/cosmo2-tokenizer",
    )


def test_curriculum_recipe_equals_the_paper():
    """Shares to a per cent, borders to a step; the decay to what the YAML says."""
    ours = read_recipe("smollm2-curriculum")
    train, schedule = ours.train, ours.optim.schedule
    assert (ours.optim.learning_rate, schedule.warmup_steps, schedule.decay) == (5e-4, 2000, "linear")
    assert (schedule.decay_begins, schedule.decay_steps, train.steps) == (4_716_000, 524_000, 5_240_000)
    assert train.batch_tokens == 256 * 4 * 2048
    ends = ours.data.stage_ends(train.batch_tokens, schedule)
    assert [end * train.batch_tokens / 1e12 for end in ends] == pytest.approx([6, 8, 9.9], abs=0.02)
    web, code, maths = ("fineweb_edu", "dclm"), ("starcoder", "stack_edu"), ("open_web_math", "infimm_webmath")
    maths += ("finemath", "infiwebmath")
    sums = [[sum(each[name] for name in names) for names in (web, code, maths)] for each in ours.data.weights]
    expected = [[0.90, 0.10, 0], [0.75, 0.20, 0.05], [0.74, 0.16, 0.10], [0.58, 0.24, 0.14]]
    assert sums == [pytest.approx(each, abs=1e-9) for each in expected]
    assert [each["cosmopedia"] for each in ours.data.weights] == [0, 0, 0, 0.04]
    fineweb = [each["fineweb_edu"] / (each["fineweb_edu"] + each["dclm"]) for each in ours.data.weights]
    assert fineweb == pytest.approx([0.6, 0.6, 0.4, 0.4])
    of_stages = order_of(ours).counts_by_stage(train.steps * train.sequences_per_step)
    for windows, weights in zip(of_stages, ours.data.weights, strict=True):
        whole = sum(weights.values())
        total = sum(windows.values())
        assert all(abs(windows[name] - total * weight / whole) < 1 + 1e-3 for name, weight in weights.items())


def test_l20_recipe_equals_its_training_log(shared):
    """Steps, tokens and the rate of every tenth step, from the log of the run."""
    from smolforge.training.optim import lr_at_step

    ours = read_recipe("l20")
    with (shared / "reference" / "l20_training_metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lr"]]
    assert len(rows) > 1000
    assert max(int(row["step"]) for row in rows) <= ours.train.steps == 18_928
    for row in rows:
        assert int(row["tokens"]) == int(row["step"]) * ours.train.batch_tokens
        mine = lr_at_step(int(row["step"]), ours.optim.learning_rate, ours.optim.schedule)
        assert mine == pytest.approx(float(row["lr"]), rel=2e-3)


def test_l20_recipe_has_the_published_numbers():
    ours = read_recipe("l20")
    assert (ours.optim.learning_rate, ours.optim.schedule.decay, ours.train.batch_tokens) == (4e-4, "cosine", 528_384)
    assert ours.train.steps * ours.train.batch_tokens == 10_001_252_352
