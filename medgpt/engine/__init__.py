"""DeepSpeed behind a small Engine class, sharded checkpoints and export.

No other package imports deepspeed.
"""

import logging
import os
import sys
import warnings

import torch

# DeepSpeed reads it at import and would pick mps on a Mac, where ZeRO does not run
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

import deepspeed  # noqa: E402
from deepspeed.runtime import bf16_optimizer, compiler  # noqa: E402

# every engine imports Muon, which medgpt does not use; compiling its functions would load all of
# torch's compiler, a quarter of a worker's import time
_compile = compiler.compile
compiler.compile = lambda: compiler.dummy_decorator
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401

compiler.compile = _compile


def _report_no_memory(message: str, force: bool = False) -> None:
    """Replace see_memory_usage, which prints and collects garbage six times per engine."""


bf16_optimizer.see_memory_usage = _report_no_memory
# otherwise it compiles C++ at run time if it finds a compiler
deepspeed.ops.__dict__["__compatible_ops__"] = {}
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
for handler in logging.getLogger("DeepSpeed").handlers:
    if type(handler) is logging.StreamHandler:  # DeepSpeed's own, not one of a test runner
        handler.setStream(sys.stderr)  # stdout belongs to the program's own output

from medgpt.engine.engine import Engine, FrozenEngine  # noqa: E402

__all__ = ["Engine", "FrozenEngine"]
