"""A checkpoint of nanotron, which SmolLM2 was trained with -> a model, and what its AdamW remembers.

    FOLDER/model_config.json                       the shape; config.yaml beside it is not read
    FOLDER/model/model/decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-1_tp-rank-R-of-N.safetensors
                                                   one file a parameter and tensor-parallel rank, its tensor called data
    FOLDER/optimizer/optimizer_pp-0-of-1_tp-R-of-N[_exp-0-of-1].pt
                                                   state, names, and the fp32 weights the optimizer steps

So written by huggingface/nanotron: src/nanotron/serialize/weights.py and utils.py (03b83fc), serialize/optimizer.py
(013a153), optim/named_optimizer.py (0c9e7c6), optim/gradient_accumulator.py (069c21c), parallel/sharded_parameters.py;
names and pairs of channels: examples/llama/convert_weights.py (004f241), convert_nanotron_to_hf.py (14414f2).
That code is all that was read: HuggingFaceTB/SmolLM2-nanotron-ckpt itself could not be had where this was written.

Read is what SmolLM2's runs had: no pipeline, no experts, an optimizer that is not sharded (ZeRO-0).
"""

from smolforge.checkpoint.nanotron import optimizer as optimizer
from smolforge.checkpoint.nanotron.weights import CONFIG as CONFIG
from smolforge.checkpoint.nanotron.weights import is_checkpoint as is_checkpoint
from smolforge.checkpoint.nanotron.weights import load as load
from smolforge.checkpoint.nanotron.weights import read_config as read_config
from smolforge.checkpoint.nanotron.weights import stored_dtype as stored_dtype
from smolforge.checkpoint.nanotron.weights import weight_files as weight_files
