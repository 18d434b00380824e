"""What every test shares: no hub, no tokenizer threads, one seed."""

import os

# Tiny models on two threads mostly wait for each other; the real ones ask for more themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else DeepSpeed, once transformers imports it, says on standard output that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Limits of a machine would choose other ways on another one.
os.environ["MOE_TOOLS_LIMITS"] = "built-in"
# Triton reads it when it is first imported, by whomever: its kernels then run on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

# transformers and huggingface_hub read these once, when a test module first imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers whether it runs alone or after a thousand others."""
    torch.manual_seed(0)
