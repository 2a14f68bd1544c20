"""Every closed set of names once: what a config may say is what the code takes.

Free of torch, so that the schema and `qlora --help` can have them.
"""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")  # of weights and of products
# base weights: as they are found, as they are written, and those of the latter that are quantized
CHECKPOINT_FORMATS = ("hf", "meta", "bnb-4bit", "nf4", "native")
WRITTEN_FORMATS = ("hf", "nf4", "native", "bnb-4bit")
QUANTIZED_FORMATS = ("nf4", "native", "bnb-4bit")
SCALE_FORMATS = ("geometric", "none", "bnb")  # of NF4; see kernels/nf4_reference.py

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS

DATA_FORMATS = ("chat", "instruct", "text", "preference")
TRAIN_ON = ("assistant", "completion", "all")
ON_ERROR = ("raise", "skip")
PACKINGS = ("none", "best_fit")

LR_SHAPES = ("cosine", "linear", "constant")
CHECKPOINTING_MODES = ("none", "selective", "full", "offload")  # see modules/layers.py
COMPILE_MODES = ("auto", "on", "off")
DPO_LOSSES = ("sigmoid", "hinge")
