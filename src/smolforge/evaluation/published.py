"""What SmolLM2's authors measured, where a task here is theirs.

Zero-shot, normalised by characters, whole splits, with lighteval in bfloat16: the model cards, and
text/evaluation in github.com/huggingface/smollm. Left out are winogrande, where they score the whole end of the
sentence with the name, and the Instruct models, which they ask through the chat template. Their HellaSwag keeps
spaces that lm-evaluation-harness strips, so a few tenths of a point are no difference between models.
"""

from collections.abc import Mapping

TASKS = ("hellaswag", "arc", "piqa", "mmlu_cloze", "commonsense_qa", "openbookqa")
SCORES = {
    "HuggingFaceTB/SmolLM2-135M": (42.1, 43.9, 68.4, 31.5, 33.9, 34.6),
    "HuggingFaceTB/SmolLM-135M": (41.2, 42.4, 68.4, 30.2, 32.7, 34.0),
    "HuggingFaceTB/SmolLM2-360M": (54.5, 53.0, 71.7, 35.8, 38.0, 37.4),
    "HuggingFaceTB/SmolLM2-1.7B": (68.7, 60.5, 77.6, None, 43.6, 42.2),
}
ARC = ("arc_easy", "arc_challenge")


def published(model: str, found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """(ours, theirs) by task for a model by its Hub id, from ours by task; `arc` is the mean of its two halves."""
    scores = SCORES.get(model.split("@")[0], ())
    ours = dict(found)
    if set(ARC) <= found.keys():
        ours["arc"] = sum(found[name] for name in ARC) / len(ARC)
    theirs = dict(zip(TASKS, scores, strict=False))
    return {name: (ours[name], score / 100) for name, score in theirs.items() if name in ours and score is not None}
