"""Evaluation of a model: how well it predicts a text, and how well it chooses an answer.

perplexity       loss, perplexity, bits per byte, token accuracy     tasks          items by task name, published scores
multiple_choice  accuracy on items, with its standard error          contamination  items that occur in a corpus
harness          the adapter for lm-evaluation-harness
"""

from smolforge.evaluation.perplexity import loss_by_position as loss_by_position
from smolforge.evaluation.perplexity import measure as measure
from smolforge.evaluation.perplexity import measure_corpus as measure_corpus
from smolforge.evaluation.perplexity import measure_text as measure_text
from smolforge.evaluation.perplexity import windows as windows
