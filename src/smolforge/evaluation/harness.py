"""The adapter for lm-evaluation-harness: every task of the harness, with our scoring and our generation.

    loglikelihood             rows of `multiple_choice`, in which requests with one context share it
    loglikelihood_rolling     the windows that the harness cuts, scored so
    generate_until            `generation.stream`, prompts of like length together

Importing this registers the model: `lm_eval.simple_evaluate(model="smolforge", model_args="pretrained=MODEL")`.
Requests are encoded and truncated as for the harness's own HF model, special tokens in a text included. `run_tasks` is
that call for a loaded model and the tasks of `load_tasks`, with errors as sentences.
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
from smolforge.config.base import validate_settings
from smolforge.device import pick_device
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, did_you_mean, install_command
from smolforge.evaluation.multiple_choice import Row, fit_context, log_probabilities, tokens_at_once
from smolforge.generation.stream import require_tokenizer, stream_batch_ids
from smolforge.models.decoder import LanguageModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise MissingResourceError(
        f"the tasks of lm-evaluation-harness need the package lm_eval: {install_command('harness')}"
    ) from None

log = logging.getLogger("smolforge")
MAX_NEW_TOKENS = 256
"""The default of the harness's models."""
DEFAULT_BATCH_SIZE = 8
"""Prompts generated for at a time."""
SUPPORTED_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
IGNORED_OPTIONS = {"num_beams": 1}
"""Options of a task that change nothing at these values."""
SEED = 1234
"""The harness's."""

LogLikelihood = tuple[float, bool]
EncodedRequest = tuple[Any, list[int], list[int]]
"""Key of a request in the harness's cache, ids of its context, ids of its continuation."""


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
        self.model, self._tokenizer = pretrained, require_tokenizer(pretrained)
        self._device = self.model.lm_head_weight.device
        self.batch_size = int(batch_size) if batch_size not in (None, "auto") else DEFAULT_BATCH_SIZE
        limit = self.model.config.max_position_embeddings
        self.max_length = limit if max_length is None else int(max_length)
        if not 1 < self.max_length <= limit:
            raise ConfigError(f"max_length is {max_length}; it should be 2 to {limit}, this model's context")

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Its source, for the harness to write down."""
        return self._tokenizer.settings.get("chat_template") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt its last message is left open."""
        text = self._tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        content = chat_history[-1]["content"].strip()
        return text[: text.rindex(content) + len(content)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text and of the special tokens spelled in it, as chat templates spell them; BOS as the HF model."""
        ids = self._tokenizer.encode_with_special_tokens(string)
        return ids if add_special_tokens is False else self._tokenizer.add_bos(ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's border; a context of nothing but spaces, and what a merge left nothing of, have ids too."""
        before, behind = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], behind or self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[LogLikelihood]:
        """Of what follows each context; one bar, while rows are scored."""
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[EncodedRequest], **_: Any) -> list[LogLikelihood]:
        rows = token_rows(self._truncate(requests), tokens_at_once(self.model))
        with tqdm(total=len(rows), desc="rows scored", disable=None) as bar:

            def advance(num_rows: int) -> None:
                bar.update(num_rows)

            scores = log_probabilities(self.model, rows, on_progress=advance)
        answers = [scores[0, number] for number in range(len(requests))]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _truncate(self, requests: Sequence[EncodedRequest]) -> Iterator[tuple[list[int], list[int]]]:
        """Context and what follows of each request, with the beginning cut off where they are beyond `max_length`."""
        num_truncated = 0
        for _, context, continuation in requests:
            fitting = fit_context(context, continuation, self.max_length)
            if not continuation or not fitting:
                raise InvalidFileError(
                    f"a task asks to score {len(continuation):,} tokens, and this model scores 1 to "
                    f"{self.max_length:,}, its context"
                )
            num_truncated += len(fitting) < len(context)
            yield fitting, continuation
        if num_truncated:
            log.warning(
                "%d of %d requests are longer than the context, and lose their beginning", num_truncated, len(requests)
            )

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
                gen_kwargs = requests[numbers[0]].args[1]
                written = self._generate([requests[number].args[0] for number in numbers], gen_kwargs)
                for number, text in zip(numbers, written, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(numbers))
        return answers

    def _batches(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[int]]:
        """Numbers of requests that ask for the same, the longest contexts first.

        Rows of a batch draw alike, so a context that is asked for several times is in as many batches.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for number, (context, options) in enumerate(requests):
            same = json.dumps(options, sort_keys=True)
            groups.setdefault((same, counts[same, context]), []).append(number)
            counts[same, context] += 1
        for numbers in groups.values():
            numbers.sort(key=lambda number: len(requests[number][0]), reverse=True)
            yield from (numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size))

    def _generate(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """Texts of one batch, whose ids are drawn behind as much of each context as leaves room for them."""
        options = generation_options(gen_kwargs)
        max_prompt_tokens = self.max_length - options.max_new_tokens
        if max_prompt_tokens < 1:
            raise ConfigError(
                f"a task asks for {options.max_new_tokens} tokens, and this model's context is {self.max_length}"
            )
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-max_prompt_tokens:] for context in contexts]
        ids: list[list[int]] = [[] for _ in prompts]
        for row, piece in stream_batch_ids(self.model, prompts, options):
            ids[row] += piece.token_ids
        texts = [self._tokenizer.backend.decode(sequence, skip_special_tokens=True) for sequence in ids]
        return [postprocess_generated_text(text, list(options.stop), None) for text in texts]


def token_rows(requests: Iterable[tuple[list[int], list[int]]], tokens: int) -> list[Row]:
    """Return requests as the numbered continuations of item 0; those with one context share rows of about `tokens`."""
    rows: list[Row] = []
    open_rows: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        row = open_rows.get(tuple(context))
        if row is None or row.length + len(continuation) - 1 > max(tokens, len(context)):
            row = open_rows[tuple(context)] = Row(0, context, {})
            rows.append(row)
        row.continuations[number] = continuation
    return rows


def generation_options(gen_kwargs: dict[str, Any]) -> Generation:
    """Return a task's generation options as ours; seeded from torch, which the harness seeds.

    Raises ConfigError for an option that we do not have.
    """
    kwargs: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, MAX_NEW_TOKENS)}
    stop = [text for text in kwargs.pop("until") if text]
    max_new_tokens, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
    for name, value in kwargs.items():
        if name not in SUPPORTED_OPTIONS and IGNORED_OPTIONS.get(name) != value:
            raise ConfigError(
                f"a task asks for {name} {value!r}, which our generation lacks; it has {', '.join(SUPPORTED_OPTIONS)}"
            )
    options = (
        {name: value for name, value in kwargs.items() if name in SUPPORTED_OPTIONS}
        if sampled
        else {"temperature": 0.0}
    )
    seed = int(torch.randint(2**62, ()))
    return validate_settings(
        Generation, {"top_p": None, **options, "max_new_tokens": max_new_tokens, "stop": stop, "seed": seed}
    )


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Return the harness's tasks and groups of these names, or of .yaml files, with their data.

    Raises ConfigError for an unknown name, InvalidFileError for a broken file, MissingResourceError if data cannot
    be read.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(map(_is_file, names)))
    for name in names:
        if not _is_file(name) and name not in manager.task_index:
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}.{did_you_mean(name, manager.all_tasks)} "
                "`lm_eval ls tasks` lists all; a .yaml file of a task is one too"
            )
    try:
        return dict(manager.load(list(names)))
    except Exception as error:  # data sets raise their own, OSError and ValueError
        kind = InvalidFileError if any(map(_is_file, names)) else MissingResourceError
        raise kind(f"lm-evaluation-harness cannot read {', '.join(names)}: {_error_text(error)}") from error


def run_tasks(
    model: LanguageModel, task_dict: dict[str, Any], limit: int | None = None, *, few_shot: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return the metrics by task and group, and the samples by task, of the `task_dict` that `load_tasks` returns.

    Metrics have the harness's names. Seeds and few-shot examples are those of its `simple_evaluate`: `few_shot`, by
    default the task's own number, and 0 if the task says so. Raises InvalidFileError for a task that fails.
    """
    from lm_eval import evaluate

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in task_dict["tasks"].values():
        num_fewshot = task.get_config("num_fewshot")
        task.set_config("num_fewshot", num_fewshot if few_shot is None or num_fewshot == 0 else few_shot)
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(SEED)
    try:
        result: Any = evaluate(HarnessModel(model), task_dict, limit=limit)
    except (ConfigError, InvalidFileError, MissingResourceError):
        raise
    except Exception as error:  # whatever tasks, which are programs, raise
        raise InvalidFileError(
            f"lm-evaluation-harness cannot run {', '.join(task_dict['tasks'])}: {_error_text(error)}"
        ) from error
    return {name: _task_metrics(result, name) for name in result["results"]}, result["samples"]


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _task_metrics(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the metrics of a task, under their own names unless answers were filtered, with n and the source."""
    measured = {
        key.removesuffix(",none"): None if value == "N/A" else value
        for key, value in results["results"][name].items()
        if "," in key
    }
    size = results["n-samples"].get(name)
    return {
        **measured,
        "n": size["effective"] if size else results["results"][name].get("sample_len"),
        "few_shot": results["n-shot"].get(name),
        "source": f"lm_eval {version('lm_eval')}, {name} version {results['versions'].get(name)}",
    }
