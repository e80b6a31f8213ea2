"""GGUF, the one file that llama.cpp and what is built on it run a model from: read and written.

The gguf package reads these files too, and is what they are held to in tests; it trusts what a file says of itself.
"""

from smolforge.checkpoint.gguf.block_types import TYPES as TYPES
from smolforge.checkpoint.gguf.block_types import Type as Type
from smolforge.checkpoint.gguf.container import File as File
from smolforge.checkpoint.gguf.container import Value as Value
from smolforge.checkpoint.gguf.container import write as write
