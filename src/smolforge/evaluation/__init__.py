"""How good a model is: at predicting a text, and at choosing an answer.

text             loss, perplexity, bits per byte, token accuracy     tasks       where items come from, by name
multiple_choice  accuracy on items, with its standard error          published   what SmolLM2's authors measured
harness          lm-evaluation-harness asks our model                overlap     items that stand in a corpus
"""

from smolforge.evaluation.perplexity import loss_by_position as loss_by_position
from smolforge.evaluation.perplexity import measure as measure
from smolforge.evaluation.perplexity import measure_corpus as measure_corpus
from smolforge.evaluation.perplexity import measure_text as measure_text
from smolforge.evaluation.perplexity import windows as windows
