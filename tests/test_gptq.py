"""Integers that a text chooses: GPTQ as the paper writes it, better than rounding, in folders and .gguf files alike."""

import copy
import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import NANO, RELEASED, needs_released
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import smolforge
from smolforge import cli
from smolforge.checkpoint import huggingface, loading
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.divergence import MeasuredText, compare_predictions
from smolforge.exporters import gptq, texts
from smolforge.exporters.gguf import to_gguf
from smolforge.exporters.gptq import output_error, solve
from smolforge.exporters.quantize import no_progress, quantize_model, to_quantized
from smolforge.models.quantized import (
    Grid,
    QuantizationScheme,
    dequantize,
    nearest_integers,
    quantized_layers,
    search_grid,
)
from smolforge.testing import sentences, tiny_model

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
FORMS = {"symmetric": QuantizationScheme(4, 32), "zero point": QuantizationScheme(4, 32, zero_point=True)}
forms = pytest.mark.parametrize("scheme", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def _short_texts(request, monkeypatch):
    """Read less of a text, but on the released weights."""
    if request.node.get_closest_marker("long") is None:
        monkeypatch.setattr(texts, "MAX_TOKENS", 2048)


def problem(seed, *, outputs=8, inputs=64, tokens=200, mixed=0.25, scheme=FORMS["symmetric"]):
    """A matrix, H of correlated inputs, and a grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * mixed + torch.eye(inputs)
    sizes = torch.rand(inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing * sizes
    return weight, 2 * x.T @ x, search_grid(weight, scheme)


def rounded_one_by_one(weight, hessian, grid):
    """The paper's formulas (2) as they stand, with the inverse made anew by elimination after every column."""
    rest, half = weight.double().clone(), 8
    scale, zero = (part.double() for part in grid.per_weight(weight.shape[1]))
    damped = hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    values = torch.empty_like(rest)
    for j in sorted(range(len(hessian)), key=lambda column: -hessian[column, column].item()):
        integers = ((rest[:, j] / scale[:, j]).round() + zero[:, j]).clamp(-half, half - 1)
        values[:, j] = (integers - zero[:, j]) * scale[:, j]
        rest -= torch.outer((rest[:, j] - values[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values


@forms
@pytest.mark.parametrize("inputs", [32, 64, 288])
def test_solve_equals_the_papers_formulas(scheme, inputs):
    weight, hessian, grid = problem(inputs, inputs=inputs, tokens=3 * inputs, scheme=scheme)
    values = dequantize(solve(weight, hessian, grid, bits=4), *grid).double()
    wanted = rounded_one_by_one(weight, hessian, grid)
    nearest = dequantize(nearest_integers(weight, grid, 4), *grid).double()
    assert not torch.equal(wanted, nearest)
    better = output_error(weight, wanted, hessian) <= output_error(weight, nearest, hessian)
    assert better.all()
    assert (values - wanted).abs().max() < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scheme=st.sampled_from(list(FORMS.values())),
    tokens=st.integers(1, 3000),
    mixed=st.sampled_from([0.0, 0.01, 0.25]),
)
def test_solve_is_never_worse_than_rounding(seed, scheme, tokens, mixed):
    weight, hessian, grid = problem(seed, tokens=tokens, mixed=mixed, scheme=scheme)
    chosen, nearest = solve(weight, hessian, grid, bits=4), nearest_integers(weight, grid, 4)
    errors = [output_error(weight, dequantize(integers, *grid), hessian) for integers in (chosen, nearest)]
    assert (errors[0] <= errors[1]).all()
    assert chosen.min() >= -8
    assert chosen.max() <= 7


def test_solve_halves_the_error_of_correlated_inputs():
    weight, hessian, grid = problem(0, outputs=64)
    chosen, nearest = solve(weight, hessian, grid, bits=4), nearest_integers(weight, grid, 4)
    errors = [output_error(weight, dequantize(integers, *grid), hessian).sum() for integers in (chosen, nearest)]
    assert errors[0] < 0.5 * errors[1]


@forms
def test_solve_follows_a_permutation_of_groups(scheme):
    weight, hessian, grid = problem(1, inputs=128, scheme=scheme)
    order = torch.arange(128).unflatten(0, (4, 32))[[2, 0, 3, 1]].flip(1).flatten()
    moved = Grid(*(part[:, [2, 0, 3, 1]] for part in grid))
    expected = solve(weight, hessian, grid, bits=4)[:, order]
    assert torch.equal(solve(weight[:, order], hessian[order][:, order], moved, bits=4), expected)


@forms
def test_solve_with_unrelated_inputs_is_rounding(scheme):
    weight, _, grid = problem(2, scheme=scheme)
    nearest = nearest_integers(weight, grid, 4)
    assert torch.equal(solve(weight, torch.eye(64, dtype=torch.float64), grid, bits=4), nearest)
    assert torch.equal(solve(weight, torch.zeros(64, 64, dtype=torch.float64), grid, bits=4), nearest)


def test_solve_rounds_inputs_that_are_always_zero():
    weight, hessian, grid = problem(3)
    dead = torch.tensor([0, 5, 40, 63])
    hessian[dead] = 0
    hessian[:, dead] = 0
    integers, nearest = solve(weight, hessian, grid, bits=4), nearest_integers(weight, grid, 4)
    assert torch.equal(integers[:, dead], nearest[:, dead])
    assert not torch.equal(integers, nearest)


@forms
def test_search_grid_heeds_importance(scheme):
    weight, hessian, _ = problem(4, outputs=64, scheme=scheme)
    importance = hessian.diagonal() ** 2
    grids = search_grid(weight, scheme, importance), search_grid(weight, scheme)
    losses = [
        ((dequantize(nearest_integers(weight, grid, 4), *grid) - weight).square() * importance).sum() for grid in grids
    ]
    assert losses[0] < losses[1]


@forms
def test_calibrate_changes_outputs_less_than_rounding(scheme):
    model = tiny_model(**WIDE)
    rows = torch.randint(0, model.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    text, steps = texts.CalibrationText("random", rows), []
    progress = functools.partial(NamedSteps, steps)
    chosen, again, rounded = (
        quantize_model(model, scheme, source, progress=show)
        for source, show in ((text, progress), (text, no_progress), (None, no_progress))
    )
    assert steps == [("calibrating", len(model.model.layers)), *[1] * len(model.model.layers)]
    assert chosen.quantization.calibrated
    assert all(map(torch.equal, chosen.parameters(), again.parameters()))
    with torch.inference_mode():
        errors = [(one(rows) - model(rows)).square().mean() for one in (chosen, rounded)]
    assert errors[0] < 0.85 * errors[1]


class NamedSteps:
    """A progress bar that writes down what it was told."""

    def __init__(self, steps, name, total):
        self.steps = steps
        steps.append((name, total))

    def __enter__(self):
        return self.steps.append

    def __exit__(self, *_):
        return None


def test_calibrate_refuses_a_model_without_numbers():
    model = tiny_model(**WIDE)
    model.model.norm.weight.data.fill_(1.0)
    model.model.layers[0].input_layernorm.weight.data[3] = torch.inf
    text = texts.CalibrationText("random", torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(InvalidFileError, match="states that are no numbers"):
        quantize_model(model, FORMS["symmetric"], text, progress=no_progress)


def test_compare_predictions_equals_numpy():
    before, after = tiny_model(**WIDE), tiny_model(seed=1, **WIDE)
    ids = np.arange(5, 45)
    found = compare_predictions(before, after, MeasuredText("ids", ids, 80.0, 40))
    row = torch.tensor([[before.tokenizer.eos_id, *ids[:-1]]])
    with torch.inference_mode():
        p, q = (model(row)[0].double().log_softmax(-1).numpy() for model in (before, after))
    losses = [-one[range(40), ids].mean() for one in (p, q)]
    assert [found.before.loss, found.after.loss] == pytest.approx(losses, rel=1e-6)
    assert found.after.kl_divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-5)
    assert found.after.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.after.perplexity_ratio == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-5)
    assert found.after.bits_per_byte == pytest.approx(losses[1] / math.log(2) / 2, rel=1e-6)
    same = compare_predictions(before, before, MeasuredText("ids", ids, 80.0, 40)).after
    assert (same.perplexity_ratio, same.kl_divergence, same.top1_agreement) == (1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder, and two texts beside it."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    made = tiny_model(**WIDE)
    huggingface.save(made, folder, made.tokenizer)
    words = sentences(400).split()
    (folder.parent / "chosen.txt").write_text(" ".join(words[::2]))
    (folder.parent / "measured.txt").write_text(" ".join(words[1::3]))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, few in {"ROUNDS": 1, "PREFILL_TOKENS": 8, "DECODE_TOKENS": 2}.items():
        monkeypatch.setattr(f"smolforge.exporters.quantize.{name}", few)


def exporting(source, out, *words):
    return cli.run(["export", str(source), "--to", "int4", "--out", str(out), *map(str, words)])


@pytest.mark.parametrize("flags", [("--zero-point",), pytest.param((), marks=pytest.mark.long)], ids=list(FORMS)[::-1])
def test_export_calibrates_by_a_text(plain, tmp_path, flags, capsys):
    texts_of = ["--text", plain.parent / "measured.txt", "--calibrate", plain.parent / "chosen.txt"]
    folder = tmp_path / "out"
    assert exporting(plain, folder, *texts_of, *flags, "--json") == 0, capsys.readouterr()
    made = json.loads(capsys.readouterr().out)
    assert (made["text"], made["calibration"]) == ("measured.txt", "chosen.txt")
    assert made["calibration_tokens"] > 100
    assert 0 < made["after"]["kl_divergence"] < 0.1
    weights = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert weights["weights"]["actorder"] == "weight"
    assert weights["weights"]["symmetric"] is not bool(flags)
    assert loading.load(folder).quantization == QuantizationScheme(4, 32, True, zero_point=bool(flags), calibrated=True)
    words = ["verify", str(folder), "--out", str(tmp_path / "v.json"), "--against"]
    assert cli.run([*words, str(plain)]) == 0
    assert "integers chosen by a text" in capsys.readouterr().out
    other = tiny_model(seed=1, **WIDE)
    huggingface.save(other, tmp_path / "other", other.tokenizer)
    assert cli.run([*words, str(tmp_path / "other")]) == 1


def test_calibrated_table_names_both_texts(plain, tmp_path, capsys):
    texts_of = ["--text", plain.parent / "measured.txt", "--calibrate", plain.parent / "chosen.txt"]
    assert exporting(plain, tmp_path / "out", *texts_of) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("KL divergence", "perplexity", "tokens of chosen.txt", "of measured.txt"))


@forms
def test_calibrated_folder_equals_transformers(plain, tmp_path, scheme):
    """With zeros Transformers dequantizes while loading, to bfloat16, the dtype of the scales."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    chosen, measured = str(plain.parent / "chosen.txt"), plain.parent / "measured.txt"
    to_quantized(plain, tmp_path / "out", scheme, text=measured, calibrate=chosen)
    model, ids = loading.load(tmp_path / "out"), torch.arange(40)[None]
    if scheme.zero_point:
        for name, layer in quantized_layers(model).items():
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight = torch.nn.Parameter(layer.dequantized(torch.bfloat16).float())
            model.set_submodule(name, linear)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(ids), theirs(ids).logits)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_gguf_holds_the_same_integers(plain, tmp_path, kind):
    chosen, measured = str(plain.parent / "chosen.txt"), plain.parent / "measured.txt"
    scheme = FORMS["zero point" if kind == "q4_1" else "symmetric"]
    to_quantized(plain, tmp_path / "int4", scheme, text=measured, calibrate=chosen)
    made = to_gguf(plain, tmp_path / "it.gguf", kind, text=measured, calibrate=chosen)
    integers, blocks = loading.load(tmp_path / "int4"), loading.load(tmp_path / "it.gguf")
    layers = quantized_layers(integers)
    assert layers
    for name, layer in layers.items():
        assert torch.equal(blocks.get_submodule(name).weight, layer.weight)
    assert made.calibration == "chosen.txt"
    assert made.comparison is not None
    assert 0 < made.comparison.after.kl_divergence < 0.1
    plainly = to_gguf(plain, tmp_path / "plain.gguf", kind, text=measured)
    assert plainly.calibration is None


def test_zero_scales_are_exact_in_half_precision():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    grid = search_grid(weight, QuantizationScheme(4, 32, zero_point=True, calibrated=True))
    least = grid.scale.float() * (8 + grid.zero)
    assert torch.equal(least.half().float(), least)
    assert torch.equal(grid.scale.half().float(), grid.scale.float())


def test_calibration_refusals(plain, tmp_path, capsys):
    chosen, measured = plain.parent / "chosen.txt", plain.parent / "measured.txt"
    (tmp_path / "empty.txt").write_text("")
    shutil.copy(measured, tmp_path / "copy.txt")
    for words, message in (
        ([], "is of no run whose training text is still there; --calibrate names"),
        (["--calibrate", tmp_path / "copy.txt"], "reads the same text (copy.txt)"),
        (["--calibrate", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["--calibrate", tmp_path / "missing.txt"], "missing.txt"),
        (["--calibrate", plain], "is not a prepared corpus"),
    ):
        assert exporting(plain, tmp_path / "out", "--text", measured, *words) in (2, 3)
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="q4_0 and q4_1, not of q8_0"):
        to_gguf(plain, tmp_path / "it.gguf", "q8_0", calibrate=str(chosen))
    assert cli.run(["export", str(plain), "--to", "int8", "--out", str(tmp_path / "o"), "--calibrate", "none"]) == 2


def test_interrupted_calibration_leaves_nothing(plain, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("smolforge.exporters.gptq.solve", interrupted)
    assert exporting(plain, tmp_path / "out", "--calibrate", plain.parent / "chosen.txt") == 130
    with pytest.raises(KeyboardInterrupt):
        to_gguf(plain, tmp_path / "it.gguf", "q4_0", calibrate=str(plain.parent / "chosen.txt"))
    assert not list(tmp_path.iterdir())


def test_export_calibrates_by_what_the_run_trained_on(text_file, tmp_path):
    recipe = tmp_path / "recipe.json"
    shape = NANO["model"] | {"hidden_size": 64, "intermediate_size": 96}
    recipe.write_text(json.dumps(NANO | {"model": shape, "data": {"sources": [str(text_file)]}}))
    run = smolforge.train(recipe, run=tmp_path / "run", steps=8)
    source, model = loading.resolve_model_path(tmp_path / "run"), run.model
    text = texts.calibration_text(model, source, None)
    assert text is not None
    assert text.name == "what the run trained on"
    assert text.rows.shape[1] == NANO["train"]["sequence_length"]
    named = texts.calibration_text(model, source, str(tmp_path / "run" / "corpus"))
    assert named is not None
    assert torch.equal(named.rows, text.rows)
    texts.check_distinct(texts.measured_text(model, source, None), text)
    made = to_quantized(tmp_path / "run", tmp_path / "out", QuantizationScheme(4, 32, True))
    assert (made.text, made.calibration) == ("what the run held out", "what the run trained on")
    other = copy.copy(model)
    other.tokenizer = tiny_model(**WIDE).tokenizer
    if other.tokenizer.fingerprint != model.tokenizer.fingerprint:
        with pytest.raises(ConfigError, match="another tokenizer"):
            texts.calibration_text(other, source, str(tmp_path / "run" / "corpus"))


@needs_released
@pytest.mark.long
@pytest.mark.parametrize(("scheme", "most"), list(zip(FORMS.values(), (0.05, 0.04), strict=True)), ids=FORMS)
def test_released_weights_calibrated_lose_little(shared, scheme, most):
    """WikiText-2, chosen by its second half, measured on 16,384 tokens of the first; and no worse than rounding."""
    model = loading.load(RELEASED)
    content = (shared / "wikitext2" / "wiki.test.raw").read_text()
    ids = [texts.encode_start(model, part) for part in (content, content[len(content) // 2 :])]
    measured = MeasuredText("wiki.test.raw", ids[0], 1.0, texts.MAX_WINDOW)
    chosen = texts.CalibrationText("its second half", texts.spread_rows([ids[1]], texts.MAX_WINDOW))
    texts.check_distinct(measured, chosen)
    whole = dataclasses.replace(scheme, embedding=True)
    found = compare_predictions(model, quantize_model(model, whole, chosen, progress=no_progress), measured)
    assert found.after.loss / found.before.loss - 1 < most


@needs_released
@pytest.mark.long
def test_released_weights_in_8_bits_and_in_their_own_type(shared, tmp_path):
    model = loading.load(RELEASED)
    ids = texts.encode_start(model, (shared / "wikitext2" / "wiki.test.raw").read_text())
    measured = MeasuredText("wiki.test.raw", ids, 1.0, texts.MAX_WINDOW)
    int8 = quantize_model(model, QuantizationScheme(8, None, True), None, progress=no_progress)
    found = compare_predictions(model, int8, measured)
    assert found.after.loss / found.before.loss - 1 < 0.002
    assert to_gguf(RELEASED, tmp_path / "again.gguf", "q4_1").max_abs_logit_diff == 0
