"""Classes of one's own: what a recipe may name, where they are refused, and what `verify` finds in them."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from children import of_a_rank, without_permission
from conftest import NANO
from hypothesis import given
from hypothesis import strategies as st
from test_distributed import free_port
from torch import nn
from transformers import AutoConfig

from smolforge import cli, load, train
from smolforge.comparison.study import benchmarks, run_variants
from smolforge.comparison.study.runner import StudyListener
from smolforge.comparison.study.spec import read_study
from smolforge.config import Optim, custom_classes
from smolforge.models.attention import (
    CausalAttention,
    DocumentAttention,
    KVCache,
    SharedPrefixAttention,
    SlidingWindow,
    masked_attention,
)
from smolforge.models.decoder import build
from smolforge.testing import in_child, tiny_config
from smolforge.testing.processes import start, wait_for_exit
from smolforge.training import optim
from smolforge.training.run_folder import read_records
from smolforge.verification.custom_classes import verify_classes

EXAMPLES = Path(__file__).parents[1] / "examples" / "own"
SLIDING = "mylab:SlidingAttention"
LAB = '''
import torch
from torch import nn
from smolforge.models.attention import SlidingWindow
from smolforge.models.decoder import MLP, Attention, RMSNorm, apply_rope

class Sliding(Attention):
    def forward(self, x, cos_sin, context):
        return super().forward(x, cos_sin, SlidingWindow(context, 8))

class Same(nn.Module):
    """Ours, written again."""
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.d = layer, config.resolved_head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.d, config.hidden_size, bias=False)

    def forward(self, x, cos_sin, context):
        q, k, v = (p(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = context.attend(self.layer, apply_rope(q, cos_sin), apply_rope(k, cos_sin), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))

class Leaky(Attention):
    def forward(self, x, cos_sin, context):
        return super().forward(x, cos_sin, context) + x.mean(1, keepdim=True)

class Forgetful(Attention):
    """Looks at the tokens of this call alone."""
    def forward(self, x, cos_sin, context):
        from smolforge.models.attention import CausalAttention
        return super().forward(x, cos_sin, CausalAttention())

class Unsaved(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = torch.rand(())
    def forward(self, x, cos_sin, context):
        return super().forward(x, cos_sin, context) * self.scale

class Idle(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.nothing = nn.Parameter(torch.ones(3))

class Broken(Attention):
    def forward(self, x, cos_sin, context):
        return self.missing(x)

class Crashing(nn.Module):
    def __init__(self, width):
        super().__init__()

class Relu2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = nn.Linear(config.hidden_size, 24), nn.Linear(24, config.hidden_size, bias=False)
        self.gain = nn.Parameter(torch.randn(config.hidden_size))
        self.stack = nn.Parameter(torch.zeros(2, 3, config.hidden_size))
    def forward(self, x):
        return self.down(self.up(x).relu().square()) * self.gain + self.stack.sum((0, 1))

class Unscaled(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

class Plain(torch.optim.SGD):
    """With a momentum, whose buffers are its state."""

class Counting(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["count"] = 1

not_a_class = 3
'''


@pytest.fixture(autouse=True)
def nothing_admitted(monkeypatch):
    monkeypatch.setattr(custom_classes, "_classes", {})


@pytest.fixture
def lab(tmp_path, monkeypatch, text_file) -> Path:
    """A folder with a module, and a recipe that takes a fraction of a second."""
    (tmp_path / "lab.py").write_text(LAB)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    yield tmp_path
    sys.modules.pop("lab", None)


def recipe_with(lab: Path, **changes: str) -> Path:
    """The recipe with other classes, in a file."""
    tree = NANO | {"data": {"sources": [str(lab / "text.txt")]}}
    for name, value in changes.items():
        group, _, key = name.partition("_")
        tree = tree | {group: tree[group] | {key: value}}
    path = lab / f"{'-'.join(changes.values()).replace(':', '-')}.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.run([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


# A window over each memory


def direct(q, k, v, sees):
    """Each query by itself: softmax over the keys it sees."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = [j for j in range(k.shape[2]) if sees(b, i, j)]
        scores = k[b, h // group, keys] @ q[b, h, i] / math.sqrt(q.shape[-1])
        out[b, h, i] = scores.softmax(0) @ v[b, h // group, keys]
    return out


def heads(t: int, s: int | None = None):
    made = torch.Generator().manual_seed(t)
    shapes = [(1, 4, t, 8), (1, 2, s or t, 8), (1, 2, s or t, 8)]
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@given(st.integers(1, 12), st.sets(st.integers(1, 11)))
def test_sliding_window_is_exact_over_rows_and_documents(window, starts):
    q, k, v = heads(12)
    near = lambda i, j: 0 <= i - j < window  # noqa: E731
    close(SlidingWindow(CausalAttention(), window).attend(0, q, k, v), direct(q, k, v, lambda b, i, j: near(i, j)))
    document = torch.tensor([[sum(start <= i for start in starts) for i in range(12)]])
    sees = lambda b, i, j: near(i, j) and document[0, i] == document[0, j]  # noqa: E731
    packed = DocumentAttention(document)
    close(SlidingWindow(packed, window).attend(0, q, k, v), direct(q, k, v, sees))
    close(masked_attention(packed.positions, q, k, v, window), direct(q, k, v, sees))


@given(st.integers(1, 12), st.integers(0, 5), st.lists(st.integers(1, 3), max_size=3))
def test_sliding_window_is_exact_over_shared_prefixes(window, beginning, ends):
    branch = [0] * (beginning + 1) + [number for number, length in enumerate(ends, 1) for _ in range(length)]
    place = [i if not name else beginning + branch[: i + 1].count(name) for i, name in enumerate(branch)]

    def sees(b, i, j):
        return j <= i and branch[j] in (0, branch[i]) and place[i] - place[j] < window

    q, k, v = heads(len(branch))
    found = SlidingWindow(SharedPrefixAttention(torch.tensor([branch])), window).attend(0, q, k, v)
    close(found, direct(q, k, v, sees))


@given(st.integers(1, 12), st.integers(1, 9))
def test_sliding_window_is_exact_over_a_kv_cache(window, first):
    q, k, v = heads(10)
    whole = SlidingWindow(CausalAttention(), window).attend(0, q, k, v)
    config = tiny_config(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    cache = KVCache(config, 1, 10, like=q)
    for begin, end in ((0, first), *((i, i + 1) for i in range(first, 10))):
        memory = SlidingWindow(cache.view(torch.arange(begin, end)[None]), window)
        found = memory.attend(0, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
        close(found, whole[:, :, begin:end])


def test_nested_sliding_windows_use_the_narrower():
    q, k, v = heads(12)
    narrow = SlidingWindow(CausalAttention(), 2).attend(0, q, k, v)
    assert torch.equal(SlidingWindow(SlidingWindow(CausalAttention(), 2), 5).attend(0, q, k, v), narrow)
    assert torch.equal(SlidingWindow(SlidingWindow(CausalAttention(), 5), 2).attend(0, q, k, v), narrow)


# Running


@pytest.mark.heavy
@pytest.mark.parametrize("costs", [False, pytest.param(True, marks=pytest.mark.long)])
def test_custom_class_example_runs_in_a_study(tmp_path, text_file, capsys, monkeypatch, costs):
    monkeypatch.chdir(tmp_path)
    for file in EXAMPLES.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    small = {
        "data.sources": [str(text_file)],
        "data.held_out": 0.2,
        "model.vocab_size": 300,
        "model.num_hidden_layers": 2,
    }
    small |= {"train.batch_tokens": 256, "train.sequence_length": 128, "train.evaluate_every": 2}
    path = tmp_path / "sliding-against-full.toml"
    text = path.read_text().replace("300_000", "1024").replace("train.batch_tokens = 2048", "")
    text = text.replace("train.evaluate_every = 12", tomli_w.dumps(small)).replace("[0, 1, 2, 3, 4]", "[0]")
    path.write_text(text)
    monkeypatch.setattr(benchmarks, "DECODE_TOKENS", 2)
    monkeypatch.chdir(Path(__file__).parent)  # its module is beside the study, and not here
    study = read_study(path)
    assert study.recipes["sliding"].model.attention == SLIDING
    assert study.recipes["full"].model.attention is None

    found = run_variants(study, tmp_path / "out", StudyListener(), measure_costs=costs)
    assert not any(variant.failed for variant in found.variants)
    assert not costs or all(variant.speed["peak_memory_bytes"] for variant in found.variants)
    monkeypatch.chdir(tmp_path)
    losses = {variant.name: variant.mean for variant in found.variants}
    assert losses["full"] != losses["sliding"]
    code, out, _ = call(capsys, "verify", "sliding.toml")
    assert code == 0
    assert "equal in the first 64 tokens, not after" in out
    assert call(capsys, "verify", "sliding.toml", "--against", "built-in")[0] == 1
    page = (EXAMPLES.parents[1] / "docs" / "own-classes.md").read_text()
    source = (EXAMPLES / "mylab.py").read_text()
    assert page.partition("```python\n")[2].partition("```")[0] in source
    assert "Lion" in source


@pytest.mark.usefixtures("compiling")
def test_custom_class_run_resumes_and_needs_permission(lab, capsys):
    both = {"model_attention": "lab:Sliding", "optim_name": "lab:Plain"}
    recipe = recipe_with(lab, **both)
    whole = train(recipe, lab / "whole", steps=8)
    train(recipe, lab / "parts", steps=4, **{"optim.schedule.steps": 8})
    parts = train(recipe, lab / "parts", steps=8)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    start = json.loads((lab / "parts" / "environment.json").read_text())[0]
    assert start["own_classes"].keys() == {"lab:Sliding", "lab:Plain"}
    again = load(lab / "parts", own=["lab:Sliding"])
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), parts.model(ids))
    custom_classes._classes.clear()
    code, _, err = call(capsys, "generate", lab / "parts", "--prompt", "a")
    assert code == 3
    assert "--own lab:Sliding" in err
    code, out, _ = call(capsys, "generate", lab / "parts", "--prompt", "a", "--own", "lab:Sliding", "--json")
    assert code == 0
    assert json.loads(out)["token_ids"]
    code, out, _ = call(capsys, "verify", lab / "parts", "--own=lab:Sliding", "--out", lab / "verify.json")
    assert code == 0, out
    asked = ("--own=lab:Sliding", "--against", "transformers")
    code, _, err = call(capsys, "verify", lab / "parts", *asked, "--out", lab / "verify.json")
    assert code == 2
    assert "classes of your own (lab:Sliding), which transformers cannot know" in err
    asked = ("--own=lab:Sliding", "--against", "transformers")
    code, _, err = call(capsys, "verify", lab / "parts", *asked, "--out", lab / "verify.json")
    assert code == 2
    assert "classes of your own (lab:Sliding), which transformers cannot know" in err


def test_changed_custom_class_gives_a_warning(lab, caplog):
    recipe = recipe_with(lab, model_attention="lab:Sliding")
    train(recipe, lab / "run", steps=4)
    (lab / "lab.py").write_text(LAB.replace("context, 8", "context, 9"))
    train(recipe, lab / "run", steps=5)
    assert "own_classes changed since the last start" in caplog.text


def test_custom_classes_of_all_parts_save_and_load(lab):
    custom_classes.import_classes(["lab:Same", "lab:Relu2", "lab:Unscaled"], [lab])
    for family in ("llama", "mixtral"):
        parts = {"attention": "lab:Same", "feed_forward": "lab:Relu2", "normalization": "lab:Unscaled"}
        config = tiny_config(model_type=family, **parts)
        torch.manual_seed(1)
        one = build(config, 5)
        torch.manual_seed(2)
        other = build(config, 5)  # whatever the class draws follows from the seed of the model alone
        assert torch.equal(one.model.layers[1].mlp.gain, other.model.layers[1].mlp.gain)
        assert verify_classes("x", config, False, on_check=lambda check: None).holds


def test_custom_norm_without_parameters_trains(lab):
    """What a token costs is asked of its shape before the first step."""
    run = train(recipe_with(lab, model_normalization="lab:Unscaled"), lab / "run", steps=2)
    assert run.metrics["step"] == 2


def test_import_classes_keeps_sys_path(lab, monkeypatch):
    monkeypatch.syspath_prepend(str(lab))
    before = list(sys.path)
    custom_classes.import_classes(["lab:Same"], [lab, lab])
    assert sys.path == before


@pytest.mark.long
@pytest.mark.heavy
def test_custom_classes_work_on_every_rank(lab):
    recipe = recipe_with(lab, model_attention="lab:Sliding")
    port = free_port()
    children = [start(of_a_rank, rank, port, recipe, lab / "two") for rank in range(2)]
    assert [wait_for_exit(child) for child in children] == [0, 0]
    one = train(recipe, lab / "one")
    assert read_records(lab / "two" / "metrics.jsonl")[-1]["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)


# Refusals


def test_checkpoint_files_never_import_code(lab):
    """Neither a checkpoint's files nor a run's own recipe import anything; a person's flag does."""
    train(recipe_with(lab, model_attention="lab:Sliding"), lab / "run", steps=4)
    assert in_child(without_permission, lab) == 0


def test_transformers_refuses_custom_class_checkpoints(lab, capsys):
    run = train(recipe_with(lab, model_attention="lab:Same"), lab / "run", steps=4)
    checkpoint = next((run.folder / "checkpoints").iterdir())
    with pytest.raises(ValueError, match="smolforge"):
        AutoConfig.from_pretrained(checkpoint)
    code, _, err = call(capsys, "export", run.folder, "--to", "transformers", "--out", lab / "out")
    assert code == 2
    assert "lab:Same" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"attention": "lab:Same"}, "'attention' that is not known"),
        ({"model_type": "smolforge"}, "does not say of what classes"),
        ({"model_type": "smolforge", "smolforge": {"model_type": "llama"}}, "does not say of what classes"),
        (
            {"model_type": "smolforge", "smolforge": {"model_type": "llama", "eval": "x"}},
            "does not say of what classes",
        ),
        (
            {"model_type": "smolforge", "smolforge": {"model_type": "llama", "attention": 3}},
            "is 3, code that is not run",
        ),
        ({"model_type": "smolforge", "smolforge": {"model_type": "llama", "attention": "os:x"}}, "--own os:x"),
    ],
)
def test_config_json_that_names_code_is_refused(lab, content, said, capsys):
    train(lab / "recipe.toml", lab / "run", steps=4)
    file = next((lab / "run" / "checkpoints").iterdir()) / "config.json"
    folder = lab / "model"
    shutil.copytree(file.parent, folder, ignore=shutil.ignore_patterns("manifest.json", "training"))
    (folder / "config.json").write_text(json.dumps(json.loads(file.read_text()) | content))
    code, _, err = call(capsys, "generate", folder, "--prompt", "a")
    assert code == 3
    assert said in err


@pytest.mark.parametrize(
    ("setting", "name", "said"),
    [
        ("model.attention", "lab:Slidng", "the module lab has no Slidng. Did you mean Sliding?"),
        ("model.attention", "nowhere:X", "there is no module nowhere"),
        ("model.attention", "lab:not_a_class", "not_a_class is no class"),
        ("model.attention", "lab:Plain", "is no torch.nn.modules.module.Module"),
        ("model.attention", "lab:Crashing", "lab:Crashing cannot be made: TypeError"),
        ("model.attention", "lab:Broken", "lab.py, line"),
        ("model.attention", "syntax:X", "syntax cannot be imported: SyntaxError"),
        ("model.attention", "needs:X", "needs needs a module unheard_of"),
        ("model.attention", "sliding", "a class as module:Class"),
        ("optim.name", "lion", "adamw or muon, or a class as module:Class"),
        ("optim.name", "lab:Same", "is no torch.optim.optimizer.Optimizer"),
        ("optim.name", "lab:Counting", "keeps count as int; a checkpoint can hold tensors only"),
    ],
)
def test_invalid_custom_class_gives_one_sentence(lab, capsys, setting, name, said):
    (lab / "syntax.py").write_text("def\n")
    (lab / "needs.py").write_text("import unheard_of\n")
    code, _, err = call(capsys, "train", lab / "recipe.toml", "--run", lab / "run", f"--{setting}", name)
    assert code == 2, err
    assert said in err.splitlines()[-1]


# What verify finds


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("Same", set()),
        ("Leaky", {"causal", "cached", "documents", "built-in"}),
        ("Forgetful", {"cached", "documents"}),
        ("Unsaved", {"saved", "built-in"}),
        ("Idle", {"gradients", "built-in"}),
        ("Broken", {"causal", "cached", "documents", "gradients", "saved", "built-in"}),
        ("Sliding", {"built-in"}),
    ],
)
def test_verify_finds_errors_in_custom_classes(lab, name, failing):
    custom_classes.import_classes([f"lab:{name}"], [lab])
    config = tiny_config(attention=f"lab:{name}")
    found = verify_classes(name, config, True, on_check=lambda check: None)
    assert {check.name for check in found.checks if not check.holds} == failing


def test_verify_refuses_a_recipe_without_custom_classes(lab, capsys):
    code, _, err = call(capsys, "verify", lab / "recipe.toml")
    assert code == 2
    assert "names no class of your own" in err
    recipe = recipe_with(lab, model_attention="lab:Same")
    code, _, err = call(capsys, "verify", recipe, "--against", "transformers")
    assert code == 2
    assert "against built-in" in err


# Optimizers


def test_custom_optimizer_is_not_called_for_skipped_updates(lab):
    custom_classes.import_classes(["lab:Plain"], [lab])
    model = nn.Linear(3, 2)
    chosen = optim.build_optimizers(model, Optim(name="lab:Plain", learning_rate=0.1))
    assert chosen[0].param_groups[0]["momentum"] == Optim().momentum

    def step(unwanted):
        model(torch.ones(1, 3)).sum().backward()
        optim.set_found_inf(chosen, unwanted)
        before = model.weight.detach().clone()
        chosen[0].step()
        return not torch.equal(before, model.weight)

    assert step(torch.tensor(0.0))
    kept = {key: value.clone() for key, value in optim.state_tensors(chosen, model).items()}
    assert kept
    assert not step(torch.tensor(1.0))
    assert all(torch.equal(value, kept[key]) for key, value in optim.state_tensors(chosen, model).items())
    assert step(None)


def test_example_lion_equals_the_paper(tmp_path):
    """Against the paper's own lines, on scalars."""
    shutil.copy(EXAMPLES / "mylab.py", tmp_path)
    custom_classes.import_classes(["mylab:Lion"], [tmp_path])
    weight = nn.Parameter(torch.tensor([[0.5]]))
    holder = nn.ParameterDict({"w": weight})
    chosen = optim.build_optimizers(
        holder, Optim(name="mylab:Lion", learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    )
    w, m = 0.5, 0.0
    for g in (1.0, -3.0, 0.5, -0.25):
        weight.grad = torch.tensor([[g]])
        chosen[0].step()
        w = w * (1 - 0.1 * 0.2) - 0.1 * math.copysign(1, 0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        assert weight.item() == pytest.approx(w, rel=1e-6)
