"""A checkpoint larger than memory, and what a command needs of memory.

python -m tests.large make FOLDER --layers 19         random LLaMA weights of LLaMA-2-7B's widths
python -m tests.large peak COMMAND ...                runs it; the most memory it ever had

The weights are written a layer at a time. test_large.py does the same in small.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_tools.checkpoint.shards import write_index

WORDS = 60
SAMPLES_PER_SECOND = 50


def make(
    folder: Path, *, layers: int, width: int = 4096, neurons: int = 11008, vocab: int = 32000
) -> Path:
    """A random LLaMA in bf16, with a tokenizer of a few words."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        vocab_size=vocab,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).state_dict()
    pieces = list(_pieces(empty))
    for index, piece in enumerate(pieces, start=1):
        shard = folder / f"model-{index:05}-of-{len(pieces):05}.safetensors"
        save_file({name: _random(empty[name]) for name in piece}, shard, {"format": "pt"})
    write_index(folder)
    return folder


def _pieces(empty: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names of each layer's tensors; each other tensor alone."""
    layers: dict[str, list[str]] = {}
    for name in empty:
        path = name.split(".")
        key = ".".join(path[:3]) if path[1] == "layers" else name
        layers.setdefault(key, []).append(name)
    yield from layers.values()


def _random(like: Tensor) -> Tensor:
    """Norms are 1, matrices as small as a model's."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=0.02)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of `WORDS` words."""
    names = ["[UNK]", "[EOS]", *(f"w{index}" for index in range(WORDS))]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[EOS]")


@dataclass
class Peak:
    """The most that a process ever had of each, in MiB."""

    resident: int = 0
    """VmHWM, kept by the kernel: memory of its own and mapped pages of files."""
    own: int = 0
    """RssAnon, sampled: what cannot be dropped. Mapped pages of files can be read again."""

    def look(self, pid: int) -> None:
        """Reads /proc; a process that is gone changes nothing."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if "kB" in line}
        self.resident = max(self.resident, int(kilobytes.get("VmHWM", 0)) // 1024)
        self.own = max(self.own, int(kilobytes.get("RssAnon", 0)) // 1024)


def watch(command: list[str]) -> tuple[int, Peak]:
    """Runs a command; its exit code and its peaks."""
    peak = Peak()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak.look(process.pid)
            time.sleep(1 / SAMPLES_PER_SECOND)
    return process.returncode, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--layers", type=int, required=True)
    watcher = verbs.add_parser("peak")
    watcher.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.verb == "make":
        make(args.folder, layers=args.layers)
        return 0
    began = time.monotonic()
    code, peak = watch(args.command)
    print(f"exit {code}, {time.monotonic() - began:.0f} s, peak in MiB: {asdict(peak)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
