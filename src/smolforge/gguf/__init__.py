"""GGUF, the one file that llama.cpp and what is built on it run a model from: read and written.

The gguf package reads these files too, and is what they are held to in tests; it trusts what a file says of itself.
"""

from smolforge.gguf.blocks import TYPES as TYPES
from smolforge.gguf.blocks import Type as Type
from smolforge.gguf.container import File as File
from smolforge.gguf.container import Value as Value
from smolforge.gguf.container import write as write
