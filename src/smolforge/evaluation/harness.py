"""lm-evaluation-harness asks, our model answers: every task of the harness, with our scoring and our generation.

    loglikelihood             rows of `multiple_choice`, in which requests with one context share it
    loglikelihood_rolling     the windows that the harness cuts, scored so
    generate_until            `generation.stream`, prompts of like length together

Importing this registers the model: `lm_eval.simple_evaluate(model="smolforge", model_args="pretrained=MODEL")`. What
is asked is what the harness's own HF model is asked, special tokens of a text and cut beginnings included. `run` is
that call for a model at hand, of what `find` found, with mistakes as sentences.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smolforge.checkpoint import loading
from smolforge.config import Generation
from smolforge.config.base import validated
from smolforge.device import pick_device
from smolforge.errors import InvalidFile, MissingResource, SettingError, did_you_mean
from smolforge.evaluation.multiple_choice import Row, log_probabilities, tokens_at_once
from smolforge.generation.stream import own, pieces_behind
from smolforge.models.decoder import LanguageModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise MissingResource(
        "the tasks of lm-evaluation-harness need the package lm_eval: pip install 'smolforge[harness]'"
    ) from None

log = logging.getLogger("smolforge")
MAX_NEW_TOKENS = 256
"""What the harness's models take where a task does not say."""
PROMPTS = 8
"""Prompts generated for at a time."""
OURS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL = {"num_beams": 1}
"""What a task may ask for that is so anyway."""
SEED = 1234
"""The harness's."""

Answer = tuple[float, bool]
Encoded = tuple[Any, list[int], list[int]]
"""What a cache knows a request by, the ids of its context, and of what follows."""


@register_model("smolforge")
class HarnessModel(TemplateLM):
    """A model as the harness sees it. `pretrained` is a MODEL, or one that is loaded; `batch_size` is of prompts."""

    def __init__(
        self,
        pretrained: LanguageModel | str,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            pretrained = loading.load(pretrained, dtype, str(pick_device(device)))
        self.model, self.words = pretrained, own(pretrained)
        self._device = self.model.head.device
        self.batch_size = int(batch_size) if batch_size not in (None, "auto") else PROMPTS
        limit = self.model.config.max_position_embeddings
        self.max_length = limit if max_length is None else int(max_length)
        if not 1 < self.max_length <= limit:
            raise SettingError(f"max_length is {max_length}; it should be 2 to {limit}, this model's context")

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text of its own is predicted behind."""
        return self.words.eos_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.words.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Its source, for the harness to write down."""
        return self.words.settings.get("chat_template") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt its last message is left open."""
        text = self.words.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        said = chat_history[-1]["content"].strip()
        return text[: text.rindex(said) + len(said)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text and of the special tokens spelled in it, as chat templates spell them. None is added."""
        return self.words.encode_with_special_tokens(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's border; a context of nothing but spaces, and what a merge left nothing of, have ids too."""
        before, behind = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], behind or self.tok_encode(continuation)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Of what follows each context; one bar, while rows are scored."""
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[Answer]:
        rows = rows_of(self._fitting(requests), tokens_at_once(self.model))
        with tqdm(total=len(rows), desc="rows scored", disable=None) as bar:

            def advance(more: int) -> None:
                bar.update(more)

            found = log_probabilities(self.model, rows, scored=advance)
        answers = [found[0, number] for number in range(len(requests))]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _fitting(self, requests: Sequence[Encoded]) -> Iterator[tuple[list[int], list[int]]]:
        """Context and what follows of each request, with the beginning cut off where they are beyond `max_length`."""
        cut = 0
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if not continuation or room < 1:
                raise InvalidFile(
                    f"a task asks to score {len(continuation):,} tokens, and this model scores 1 to "
                    f"{self.max_length:,}, its context"
                )
            cut += len(context) > room
            yield context[-room:], continuation
        if cut:
            log.warning("%d of %d requests are longer than the context, and lose their beginning", cut, len(requests))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, every token once, in the windows that the harness cuts."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first of the task's ends."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts written", disable=None) as bar:
            for numbers in self._batches([request.args for request in requests]):
                asked = requests[numbers[0]].args[1]
                written = self._written([requests[number].args[0] for number in numbers], asked)
                for number, text in zip(numbers, written, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(numbers))
        return answers

    def _batches(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[int]]:
        """Numbers of requests that ask for the same, the longest contexts first.

        Rows of a batch draw alike, so a context that is asked for several times is in as many batches.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for number, (context, options) in enumerate(asked):
            same = json.dumps(options, sort_keys=True)
            groups.setdefault((same, seen[same, context]), []).append(number)
            seen[same, context] += 1
        for numbers in groups.values():
            numbers.sort(key=lambda number: len(asked[number][0]), reverse=True)
            yield from (numbers[at : at + self.batch_size] for at in range(0, len(numbers), self.batch_size))

    def _written(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        """Texts of one batch, whose ids are drawn behind as much of each context as leaves room for them."""
        options = generation(asked)
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise SettingError(
                f"a task asks for {options.max_new_tokens} tokens, and this model's context is {self.max_length}"
            )
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]
        ids: list[list[int]] = [[] for _ in prompts]
        for row, piece in pieces_behind(self.model, prompts, options):
            ids[row] += piece.token_ids
        texts = [self.words.backend.decode(each, skip_special_tokens=True) for each in ids]
        return [postprocess_generated_text(text, list(options.stop), None) for text in texts]


def rows_of(requests: Iterable[tuple[list[int], list[int]]], tokens: int) -> list[Row]:
    """Requests as the numbered continuations of item 0; those with one context stand in rows of about `tokens`."""
    rows: list[Row] = []
    begun: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        row = begun.get(tuple(context))
        if row is None or row.length + len(continuation) - 1 > max(tokens, len(context)):
            row = begun[tuple(context)] = Row(0, context, {})
            rows.append(row)
        row.continuations[number] = continuation
    return rows


def generation(asked: dict[str, Any]) -> Generation:
    """What a task asks for in our words; seeded from torch, which the harness seeds.

    Raises SettingError for what we do not have.
    """
    given: dict[str, Any] = {**normalize_gen_kwargs(asked, MAX_NEW_TOKENS)}
    stop = [word for word in given.pop("until") if word]
    most, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
    for name, value in given.items():
        if name not in OURS and NEUTRAL.get(name) != value:
            raise SettingError(
                f"a task asks for {name} {value!r}, which our generation lacks; it has {', '.join(OURS)}"
            )
    options = {name: value for name, value in given.items() if name in OURS} if sampled else {"temperature": 0.0}
    seed = int(torch.randint(2**62, ()))
    return validated(Generation, {"top_p": None, **options, "max_new_tokens": most, "stop": stop, "seed": seed})


def find(names: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks and groups of these names, or of .yaml files of them, their data read.

    Raises SettingError for a name that is none, InvalidFile for a file that is broken, MissingResource where data
    cannot be read.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(map(_is_file, names)))
    for name in names:
        if not _is_file(name) and name not in manager.task_index:
            raise SettingError(
                f"lm-evaluation-harness has no task {name!r}.{did_you_mean(name, manager.all_tasks)} "
                "`lm_eval ls tasks` lists all; a .yaml file of a task is one too"
            )
    try:
        return dict(manager.load(list(names)))
    except Exception as error:  # data sets raise their own, OSError and ValueError
        kind = InvalidFile if any(map(_is_file, names)) else MissingResource
        raise kind(f"lm-evaluation-harness cannot read {', '.join(names)}: {_said(error)}") from error


def run(
    model: LanguageModel, found: dict[str, Any], limit: int | None = None, few_shot: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Values by task and group, and samples by task, of what `find` found: the harness's own, by its names.

    Seeds and few-shot examples are those of its `simple_evaluate`: as many as a task says unless given, none where
    it says so. Raises InvalidFile for a task that breaks.
    """
    from lm_eval import evaluate

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in found["tasks"].values():
        said = task.get_config("num_fewshot")
        task.set_config("num_fewshot", said if few_shot is None or said == 0 else few_shot)
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(SEED)
    try:
        result: Any = evaluate(HarnessModel(model), found, limit=limit)
    except (SettingError, InvalidFile, MissingResource):
        raise
    except Exception as error:  # whatever tasks, which are programs, raise
        raise InvalidFile(f"lm-evaluation-harness cannot run {', '.join(found['tasks'])}: {_said(error)}") from error
    return {name: _values(result, name) for name in result["results"]}, result["samples"]


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _values(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Its numbers, where a metric goes by its own name unless answers were filtered, and what they are of."""
    measured = {
        key.removesuffix(",none"): None if value == "N/A" else value
        for key, value in found["results"][name].items()
        if "," in key
    }
    size = found["n-samples"].get(name)
    return {
        **measured,
        "n": size["effective"] if size else found["results"][name].get("sample_len"),
        "few_shot": found["n-shot"].get(name),
        "source": f"lm_eval {version('lm_eval')}, {name} version {found['versions'].get(name)}",
    }
