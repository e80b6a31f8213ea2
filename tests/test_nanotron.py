"""Checkpoints of nanotron, written here as its own code lays them out, read as models and as AdamW's moments.

What writes follows huggingface/nanotron's save_weights, get_path and save_optimizer (src/nanotron/serialize), the
state_dict of NamedOptimizer and FP32GradientAccumulator (optim), create_sharded_parameter_from_config (parallel) and
models/llama.py, in the versions that smolforge.checkpoint.nanotron names. It shares no line with what reads.
"""

import copy
import json
import os
import re
import shutil
from itertools import accumulate

import pytest
import torch
from conftest import NANO
from safetensors.torch import load_file, save_file

from smolforge import cli
from smolforge.checkpoint import huggingface, loading, nanotron, optimizer_state, safetensors_writer, training_state
from smolforge.config.load import to_recipe, write_recipe
from smolforge.data.prepare.build import prepare
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.exporters.transformers import to_transformers
from smolforge.runs import train
from smolforge.testing import sentences, tiny_config, tiny_model, tiny_tokenizer
from smolforge.testing.damage import truncate
from smolforge.training.optim import build_optimizers, load_state_tensors, state_tensors

EMBEDDING, HEAD = "model.token_position_embeddings.pp_block.token_embedding.weight", "model.lm_head.pp_block.weight"
QKV = "model.decoder.0.pp_block.attn.qkv_proj.weight"
OPTIM = to_recipe(NANO).optim


def paired(matrix, head_size):
    """Rows of a query or key matrix as interleaved rotation wants them: channel i beside channel i + d/2."""
    heads = matrix.reshape(-1, 2, head_size // 2, matrix.shape[1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(matrix.shape)


def whole(values, config, interleaved):
    """nanotron's tensors of one kind, not shared out yet: name -> (tensor, dimension to cut, contiguous chunks)."""
    turn = (lambda matrix: paired(matrix, config.resolved_head_dim)) if interleaved else (lambda matrix: matrix)
    found = {EMBEDDING: (values["model.embed_tokens.weight"], 0, None)}
    for i in range(config.num_hidden_layers):
        at, to = f"model.layers.{i}.", f"model.decoder.{i}.pp_block."
        q, k, v, o = (values[f"{at}self_attn.{x}_proj.weight"] for x in "qkvo")
        gate, up, down = (values[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        qkv, chunks = torch.cat([turn(q), turn(k), v]), (len(q), len(k), len(v))
        found[f"{to}input_layernorm.weight"] = (values[f"{at}input_layernorm.weight"], None, None)
        found[f"{to}attn.qkv_proj.weight"] = (qkv, 0, chunks)
        found[f"{to}attn.o_proj.weight"] = (o, 1, None)
        found[f"{to}post_attention_layernorm.weight"] = (values[f"{at}post_attention_layernorm.weight"], None, None)
        found[f"{to}mlp.gate_up_proj.weight"] = (torch.cat([gate, up]), 0, (len(gate), len(up)))
        found[f"{to}mlp.down_proj.weight"] = (down, 1, None)
    found["model.final_layer_norm.pp_block.weight"] = (values["model.norm.weight"], None, None)
    if not config.tie_word_embeddings:
        found[HEAD] = (values["lm_head.weight"], 0, None)
    return found


def shard(tensor, dim, chunks, rank, ranks):
    """One rank's part, and the slices (here, there) that nanotron notes of it."""
    if dim is None:
        return tensor, []
    chunks = chunks or (tensor.shape[dim],)
    starts, parts, slices, here = [0, *accumulate(chunks)], [], [], 0
    for start, length in zip(starts, chunks, strict=False):
        size = length // ranks
        parts.append(tensor.narrow(dim, start + rank * size, size))
        slices.append(((here, here + size), (start + rank * size, start + (rank + 1) * size)))
        here += size
    return torch.cat(parts, dim), slices


def noted(tensor, dim, slices):
    """TensorMetadata.to_str_dict of a shard."""

    def text(cut):
        return "|".join(f"{cut[0]},{cut[1]},None" if d == dim else "None,None,None" for d in range(tensor.ndim))

    pairs = ";".join(f"{text(here)}#{text(there)}" for here, there in slices)
    return {"version": "1.4", "local_global_slices_pairs": pairs, "unsharded_shape": str(tuple(tensor.shape))}


def write(folder, model, chosen=None, tp=1, interleaved=False, zero=False):
    """A checkpoint as nanotron's trainer saves one: bf16 weights, and fp32 ones and moments where there is an AdamW."""
    config = model.config
    shape = config.model_dump(exclude={"model_type", "head_dim", *weights_of_other_families()})
    said = {"is_llama_config": True, "rope_interleaved": interleaved, "rope_scaling": None, "pretraining_tp": 1}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "use_cache": True}
    folder.mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(shape | said | special))
    (folder / "config.yaml").write_text("optimizer: {zero_stage: 0}\n")
    exact = {name: value.detach() for name, value in model.named_parameters()}
    for name, (tensor, dim, chunks) in whole(exact, config, interleaved).items():
        *path, last = name.split(".")
        where = folder.joinpath("model", *path)
        where.mkdir(parents=True)
        if dim is None:
            save_file({"data": tensor.bfloat16()}, where / f"model_{last}.safetensors")
        for rank in range(tp if dim is not None else 0):
            part, slices = shard(tensor.bfloat16(), dim, chunks, rank, tp)
            file = where / f"model_{last}_pp-rank-0-of-1_tp-rank-{rank}-of-{tp}.safetensors"
            save_file({"data": part.contiguous()}, file, noted(tensor, dim, slices))
    if chosen is not None:
        write_optimizer(folder / "optimizer", exact, chosen, model, tp, interleaved)
    return folder


def weights_of_other_families():
    """Settings that a Llama of nanotron does not have."""
    config = tiny_config()
    return [name for name in type(config).model_fields if name not in config.family_fields()]


def write_optimizer(folder, exact, chosen, model, tp, interleaved):
    kept = state_tensors(chosen, model)
    kinds = {what: {name: kept[f"{what}.{name}"] for name in exact} for what in ("exp_avg", "exp_avg_sq")}
    kinds = {what: whole(each, model.config, interleaved) for what, each in (kinds | {"": exact}).items()}
    names, step = list(kinds[""]), kept["step.model.norm.weight"]
    folder.mkdir()
    about = {"type": "OptimizerFromGradientAccumulator", "parallelism": {"tp_size": str(tp)}, "configs": {}}
    (folder / "optimizer_config.json").write_text(json.dumps(about))
    for rank in range(tp):
        part = {what: {name: shard(*each[name], rank, tp)[0] for name in names} for what, each in kinds.items()}
        flat = torch.cat([part[""][name].flatten() for name in names])  # the big buffer that the fp32 weights lie in
        sizes = [part[""][name].numel() for name in names]
        masters = {n: x.view_as(part[""][n]) for n, x in zip(names, flat.split(sizes), strict=True)}
        content = {
            "state": {
                index: {"step": step.clone(), **{what: part[what][name].clone() for what in ("exp_avg", "exp_avg_sq")}}
                for index, name in enumerate(names)
            },
            "param_groups": [{"lr": 3e-3, "betas": (0.9, 0.95), "initial_lr": 3e-3, "params": [*range(len(names))]}],
            "names": dict(enumerate(names)),
            "gradient_accumulator": masters,
        }
        torch.save(content, folder / f"optimizer_pp-0-of-1_tp-{rank}-of-{tp}_exp-0-of-1.pt")


def stepped(model, chosen, ids, steps=1):
    """Plain steps on the same tokens."""
    for _ in range(steps):
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for each in chosen:
            each.step()
            each.zero_grad()


@pytest.fixture(scope="module")
def trained():
    """A model after five steps of plain torch AdamW, and that."""
    model = tiny_model().train()
    chosen = build_optimizers(model, OPTIM)
    assert [type(each) for each in chosen] == [torch.optim.AdamW]
    stepped(model, chosen, ids(), 5)
    return model, chosen


def ids():
    return torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_nanotron_loads_the_same_model(tmp_path, tp, interleaved, tied):
    model = tiny_model(tie_word_embeddings=tied)
    folder = write(tmp_path / "step", model, tp=tp, interleaved=interleaved)
    loaded = loading.load(folder)
    assert loading.read_config(folder) == model.config == loaded.config
    rounded = copy.deepcopy(model).bfloat16().float()
    assert torch.equal(loaded(ids()), rounded(ids()))
    assert loaded.tokenizer is None


def test_nanotron_exports_to_transformers(tmp_path):
    """Which loads it with equal logits: to_transformers keeps nothing else."""
    folder = write(tmp_path / "step", tiny_model(), tp=2, interleaved=True)
    done = to_transformers(str(folder), tmp_path / "out")
    assert done.dtype == "bfloat16"
    assert done.greedy_match
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["eos_token_id"], said["rope_parameters"]["rope_theta"]) == (0, 10_000.0)


def test_interleaved_rope_is_converted_to_halves():
    """Scores of rotated queries and keys, with neighbours paired in nanotron's order, and halves paired in ours."""
    q, k, x = torch.randn(8, 6), torch.randn(8, 6), torch.randn(5, 6)
    angles = torch.arange(5.0)[:, None] / 10.0 ** torch.arange(4)

    def turned(first, second):
        return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    def neighbours(weight):
        each = x @ weight.T
        return torch.cat(turned(each[:, 0::2], each[:, 1::2]), dim=1)

    def apart(weight):
        return torch.cat(turned(*(x @ weight.T).chunk(2, dim=1)), dim=1)

    theirs = neighbours(q) @ neighbours(k).T
    halves = nanotron.weights.deinterleave
    torch.testing.assert_close(apart(halves(q, 8)) @ apart(halves(k, 8)).T, theirs)
    assert torch.equal(halves(paired(q, 4), 4), q)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_nanotron_moments_give_the_same_next_step(tmp_path, trained, tp, interleaved):
    model, chosen = trained
    folder = write(tmp_path / "step", model, chosen, tp, interleaved)
    loaded = nanotron.optimizer.load_master_weights(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    ours = build_optimizers(loaded.train(), OPTIM)
    load_state_tensors(ours, loaded, optimizer_state.read_moments(folder, torch.float32))
    before, went_on = copy.deepcopy((model, chosen))
    stepped(before, went_on, ids())
    stepped(loaded, ours, ids())
    for (name, a), b in zip(loaded.named_parameters(), before.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6, name
    fresh = nanotron.optimizer.load_master_weights(folder).train()
    stepped(fresh, build_optimizers(fresh, OPTIM), ids())
    assert (fresh.lm_head_weight - before.lm_head_weight).abs().max() > 1e-4  # moments matter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A prepared corpus with a tokenizer, as what a run starts from has none."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(sentences(300))
    prepare(
        to_recipe(NANO | {"data": {"sources": [str(folder / "text.txt")]}}).data, folder / "corpus", tiny_tokenizer()
    )
    return folder / "corpus"


def settings(corpus, **more):
    schedule = {"optim.schedule.warmup_steps": 0, "optim.schedule.final_learning_rate": 0.0}
    return schedule | {"data.sources": [str(corpus)], "init_moments": True, "train.evaluate_every": None} | more


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(NANO))
    return tmp_path / "recipe.json"


def bits(run):
    return [value.clone() for value in run.model.parameters()]


def test_init_moments_equal_from_nanotron_and_smolforge(tmp_path, recipe_file, corpus, caplog):
    """From nanotron's files and from ours the same run, to the bit, and another than with fresh moments."""
    caplog.set_level("INFO", "smolforge")
    plateau = {"optim.schedule.decay": "none", "train.steps": 4, "init_moments": False}
    first = train(recipe_file, tmp_path / "first", **settings(corpus, **plateau))
    checkpoint = training_state.checkpoint_dir(first.folder, 4)
    model = huggingface.load(checkpoint)
    chosen = build_optimizers(model, first.recipe.optim)
    load_state_tensors(chosen, model, optimizer_state.read_moments(checkpoint, torch.float32))
    folder = write(tmp_path / "nanotron", model, chosen, tp=2)
    ours = train(recipe_file, tmp_path / "a", steps=3, **settings(corpus, init_from=str(first.folder)))
    assert "goes on with the moments of" in caplog.text
    assert "after its 4 steps" in caplog.text
    theirs = train(recipe_file, tmp_path / "b", steps=3, **settings(corpus, init_from=str(folder)))
    fresh = train(recipe_file, tmp_path / "c", steps=3, **settings(corpus, init_from=str(folder), init_moments=False))
    assert all(map(torch.equal, bits(ours), bits(theirs)))
    assert not all(map(torch.equal, bits(fresh), bits(theirs)))
    shutil.rmtree(folder)  # what a run started from may be gone when it goes on
    stored = write_recipe(theirs.recipe)
    train(recipe_file, tmp_path / "b", steps=3, **settings(corpus, init_from=str(folder)))
    assert (theirs.folder / "recipe.toml").read_text() == stored
    assert "init_moments = true" in stored


def test_init_moments_resume_is_bit_exact(tmp_path, recipe_file, corpus, trained):
    folder = write(tmp_path / "nanotron", *trained)
    given = settings(corpus, init_from=str(folder)) | {"optim.schedule.steps": 4}
    whole_run = train(recipe_file, tmp_path / "whole", steps=4, **given)
    train(recipe_file, tmp_path / "parts", steps=2, **given)
    assert all(map(torch.equal, bits(whole_run), bits(train(recipe_file, tmp_path / "parts", steps=4, **given))))


def test_init_moments_with_ema_change_only_the_ema(tmp_path, recipe_file, corpus, trained):
    """The weights are those of a run without one, and the average of them is another model."""
    given = settings(corpus, init_from=str(write(tmp_path / "nanotron", *trained)))
    plain = train(recipe_file, tmp_path / "plain", steps=3, **given)
    averaged = train(recipe_file, tmp_path / "averaged", steps=3, **given, **{"optim.ema_decay": 0.9})
    kept = load_file(training_state.checkpoint_dir(averaged.folder, 3) / optimizer_state.OPTIMIZER_FILE)
    names = [name for name, _ in plain.model.named_parameters()]
    assert all(map(torch.equal, bits(plain), [kept[f"training.{name}"] for name in names]))
    assert not all(map(torch.equal, bits(plain), bits(averaged)))


class Harmful:
    """What runs where a pickle is trusted."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def change(path, edit):
    """Load an optimizer's file, change it, and save it again."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


PT = "optimizer/optimizer_pp-0-of-1_tp-1-of-2_exp-0-of-1.pt"
BLOCK = "model/model/decoder/0/pp_block"
PART = f"{BLOCK}/attn/o_proj/model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
NORM = f"{BLOCK}/input_layernorm/model_weight.safetensors"


def config(folder, **changes):
    path = folder / "model_config.json"
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))


FAULTS = {
    "a part of a weight is missing": (
        lambda f: (f / PART).unlink(),
        "lacks the part of .*o_proj.weight that rank 1 of 2",
    ),
    "a weight is missing": (lambda f: (f / NORM).unlink(), "lacks 1 of .* the first model.decoder.0.*input_layernorm"),
    "a weight is cut off": (lambda f: truncate(f / NORM, -8), "input_layernorm.*cannot be read"),
    "a weight has another shape": (
        lambda f: save_file({"data": torch.zeros(31).bfloat16()}, f / NORM),
        r"input_layernorm.weight has shape \(31,\) on one of 1 ranks, where its model_config.json makes it \(32,\)",
    ),
    "a weight file holds more": (
        lambda f: save_file({"data": torch.zeros(32), "more": torch.zeros(1)}, f / NORM),
        "should hold one tensor of weights called data",
    ),
    "a weight of another model": (
        lambda f: save_file({"data": torch.zeros(32)}, f / BLOCK / "model_scale.safetensors"),
        "has model.decoder.0.pp_block.scale, which its model_config.json leaves no place for",
    ),
    "a file of no model": (
        lambda f: (f / BLOCK / "x.safetensors").touch(),
        "x.safetensors is no file of a nanotron model",
    ),
    "pipeline stages": (
        lambda f: (f / NORM).rename((f / NORM).with_name("model_weight_pp-rank-0-of-2_tp-rank-0-of-1.safetensors")),
        "is of pipeline stages or experts, which are not read here",
    ),
    "the rotation is not said": (lambda f: config(f, rope_interleaved="absent"), "does not say rope_interleaved"),
    "another model": (lambda f: config(f, is_llama_config="absent"), "is not of nanotron's llama"),
    "an unknown setting": (lambda f: config(f, qk_clip=2.0), "has a setting 'qk_clip' that is not known here"),
    "no optimizer": (lambda f: shutil.rmtree(f / "optimizer"), "has no moments to go on with"),
    "an optimizer file is missing": (lambda f: (f / PT).unlink(), "lacks the file of rank 1 of 2"),
    "an optimizer file is cut off": (lambda f: truncate(f / PT, -1000), "tp-1-of-2_exp-0-of-1.pt cannot be read"),
    "an optimizer file is empty": (lambda f: truncate(f / PT, 0), "tp-1-of-2_exp-0-of-1.pt cannot be read"),
    "an optimizer file is something else": (
        lambda f: (f / PT).write_bytes(b"PK no"),
        "tp-1-of-2_exp-0-of-1.pt cannot be",
    ),
    "code": (
        lambda f: torch.save({"state": Harmful(f / "harm"), "names": {}, "param_groups": []}, f / PT),
        "it asks for posix.mkdir, which no optimizer needs; it was not run",
    ),
    "an unknown kind": (lambda f: change(f / PT, lambda c: c.update(scaler={})), "it has an unknown scaler"),
    "another optimizer": (
        lambda f: change(f / PT, lambda c: c["state"][0].update(max_exp_avg_sq=torch.zeros(1))),
        "the state of .*token_embedding.weight has an unknown max_exp_avg_sq",
    ),
    "a moment is missing": (
        lambda f: change(f / PT, lambda c: c["state"][3].pop("exp_avg")),
        "the state of .*o_proj.weight lacks exp_avg",
    ),
    "no dictionary": (lambda f: torch.save([1, 2], f / PT), "it should be a dictionary, and is list"),
    "a moment that is none": (
        lambda f: change(f / PT, lambda c: c["state"][0].update(exp_avg=[1.0])),
        "exp_avg of .*token_embedding.weight should be a tensor of floating-point numbers",
    ),
    "a moment of another shape": (
        lambda f: change(f / PT, lambda c: c["state"][0].update(exp_avg=torch.zeros(3))),
        r"optimizer: .*token_embedding.weight has shape \(3,\) on one of 2 ranks",
    ),
    "a moment that ranks do not share": (
        lambda f: change(f / PT, lambda c: c["state"][1]["exp_avg"].add_(1)),
        "input_layernorm.weight differs from rank to",
    ),
    "a step that is none": (
        lambda f: change(f / PT, lambda c: c["state"][0].update(step=torch.zeros(2))),
        "step of .* should be one number",
    ),
    "names without order": (
        lambda f: change(f / PT, lambda c: c["names"].update({1: c["names"][0]})),
        "names should give each parameter one",
    ),
    "weights of another step": (
        lambda f: change(f / PT, lambda c: c["gradient_accumulator"][EMBEDDING].add_(1)),
        "is of other weights than those in model/, as of model.embed_tokens.weight",
    ),
    "sharded over replicas, as its file says": (
        lambda f: (f / "optimizer/optimizer_config.json").write_text('{"type": "ZeroDistributedOptimizer"}'),
        "is sharded over replicas .ZeroDistributedOptimizer.; only zero_stage 0 is read",
    ),
    "sharded over replicas, as its name says": (
        lambda f: (f / PT).rename(f / "optimizer/optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-1_exp-0-of-1.pt"),
        "is sharded over replicas",
    ),
    "experts": (
        lambda f: (f / PT).rename(f / PT.replace("0-of-1.pt", "0-of-2.pt")),
        "pipeline stages, experts or nothing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nanotron_faults_are_one_sentence_and_exit_3(tmp_path, corpus, recipe_file, trained, capsys, fault):
    folder = write(tmp_path / "step", *trained, tp=2)
    harm, said = FAULTS[fault]
    harm(folder)
    words = f"train {recipe_file} --run {tmp_path}/run --init-from {folder} --init-moments true --data.sources {corpus}"
    assert cli.run(words.split()) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(said, last), last
    assert "Traceback" not in last
    assert not (folder / "harm").exists()


def test_pickle_payload_runs_when_trusted(tmp_path):
    """Where a pickle is trusted, it is done."""
    torch.save(Harmful(tmp_path / "harm"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "harm").is_dir()


def test_nanotron_needs_a_named_tokenizer(tmp_path, recipe_file, trained, text_file):
    folder = write(tmp_path / "step", *trained)
    with pytest.raises(
        ConfigError, match="has no tokenizer beside it.*--tokenizer names.*HuggingFaceTB/cosmo2-tokenizer"
    ):
        train(recipe_file, tmp_path / "run", data=str(text_file), init_from=str(folder))
    tiny_tokenizer().save(tmp_path / "tokenizer")
    train(
        recipe_file,
        tmp_path / "run",
        str(text_file),
        steps=2,
        init_from=str(folder),
        tokenizer=str(tmp_path / "tokenizer"),
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"init_from": None}, "but init_from is none"),
        ({"optim.name": "muon"}, "but optim.name is muon"),
        ({"lora.rank": 2}, "but lora.rank is given"),
        ({"special_tokens": ["<|a|>"]}, "but special_tokens are added"),
    ],
)
def test_init_moments_refuse_settings_that_do_not_fit(tmp_path, recipe_file, corpus, more, said):
    with pytest.raises(
        ConfigError, match=f"init_moments goes on with the AdamW and all the weights of init_from, {said}"
    ):
        train(recipe_file, tmp_path / "run", **settings(corpus, init_from="x") | more)


@pytest.mark.parametrize(
    ("more", "said"), [({"optim.name": "muon"}, "has momentum_buffer"), ({"optim.ema_decay": 0.9}, "has averaged")]
)
def test_init_moments_refuse_another_optimizer_state(tmp_path, recipe_file, corpus, more, said):
    first = train(recipe_file, tmp_path / "first", steps=2, **settings(corpus, init_moments=False) | more)
    with pytest.raises(InvalidFileError, match=f"{said} beside AdamW's moments.* leave init_moments out"):
        train(recipe_file, tmp_path / "second", **settings(corpus, init_from=str(first.folder)))
    assert not (tmp_path / "second").exists(), "before any text is prepared"


def test_init_moments_need_moments_before_data_is_prepared(tmp_path, recipe_file, corpus):
    model = tiny_model()
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    with pytest.raises(InvalidFileError, match="has no moments to go on with .training/optimizer.safetensors."):
        train(recipe_file, tmp_path / "run", **settings(corpus, init_from=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()


def test_init_moments_refuse_a_run_without_a_step(tmp_path, recipe_file, corpus):
    first = train(recipe_file, tmp_path / "first", steps=2, **settings(corpus, init_moments=False))
    checkpoint = training_state.checkpoint_dir(first.folder, 2)
    safetensors_writer.write(checkpoint / optimizer_state.OPTIMIZER_FILE, {})  # as it stands there
    with pytest.raises(
        InvalidFileError, match="was saved before its first step and has no moments; leave init_moments out"
    ):
        optimizer_state.check_moments_exist(checkpoint)


def test_init_moments_warn_of_a_needless_warmup(tmp_path, recipe_file, corpus, trained, caplog):
    given = settings(corpus, init_from=str(write(tmp_path / "step", *trained))) | {"optim.schedule.warmup_steps": 1}
    train(recipe_file, tmp_path / "run", steps=2, **given)
    assert "warmup_steps is 1, which only fresh moments need; --optim.schedule.warmup-steps 0 goes on" in caplog.text
