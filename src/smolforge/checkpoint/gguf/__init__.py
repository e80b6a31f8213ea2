"""GGUF, the one file that llama.cpp and what is built on it run a model from: read and written.

The gguf package encodes and decodes the blocks. Its own reader is what ours is compared with in tests: it trusts what
a file says of itself.
"""

from smolforge.checkpoint.gguf.block_types import BLOCK_TYPES as BLOCK_TYPES
from smolforge.checkpoint.gguf.block_types import BlockType as BlockType
from smolforge.checkpoint.gguf.block_types import encode_4_bits as encode_4_bits
from smolforge.checkpoint.gguf.container import MetadataValue as MetadataValue
from smolforge.checkpoint.gguf.container import read_header as read_header
from smolforge.checkpoint.gguf.container import write as write
from smolforge.checkpoint.gguf.parts import GGUFReader as GGUFReader
from smolforge.checkpoint.gguf.parts import first_part as first_part
