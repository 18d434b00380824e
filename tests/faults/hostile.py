"""Files that someone made to do harm, each by hand."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from moe_tools.names import CONFIG, INDEX, SINGLE

MARKER = "marker"
"""A file that is there once code of a hostile file ran."""


class Harm:
    """A pickle of it writes the marker when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n"
"""Python code beside a model."""
TEMPLATE = (
    "{{% for each in ''.__class__.__mro__[1].__subclasses__() %}}"
    "{{{{ each.__init__.__globals__['os'].system('touch {marker}') }}}}{{% endfor %}}"
)
REFUSED = (
    "a shard outside",
    "a shard by its absolute path",
    "overlapping tensors",
    "a pickle alone",
    "remote code",
    "the same key twice",
    "two documents",
)
"""Cases that every door has to refuse."""
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
"""Nine to the tenth words, in a few hundred bytes."""


def edit(folder: Path, file: str = CONFIG, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of the weight file; the bytes behind it stay."""
    data = (folder / SINGLE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def _overlap(header: dict[str, Any]) -> None:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entries[1]["data_offsets"] = entries[0]["data_offsets"]


def _huge(header: dict[str, Any]) -> None:
    _first(header).update(shape=[2**40, 2**20], data_offsets=[0, 2**62])


def _index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _only_index(folder: Path, shard: str) -> None:
    data = (folder / SINGLE).read_bytes()
    keys = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    (folder / SINGLE).rename(folder.parent / "outside" / "model.safetensors")
    _index(folder, dict.fromkeys(keys, shard))


def _only(folder: Path, name: str, content: bytes) -> None:
    """The weights are in this file alone."""
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(content)


def _remote(folder: Path, marker: Path) -> None:
    (folder / "modeling_x.py").write_text(CODE.format(marker=str(marker)))
    classes = {name: "modeling_x.X" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
    edit(folder, auto_map=classes, model_type="x", architectures=["X"])


def _remote_tokenizer(folder: Path, marker: Path) -> None:
    (folder / "tokenization_x.py").write_text(CODE.format(marker=str(marker)))
    names = ["tokenization_x.X", "tokenization_x.X"]
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": names}, tokenizer_class="X")


def _pickles(folder: Path, harm: bytes) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(harm)


def _link(folder: Path) -> None:
    shutil.move(folder / SINGLE, folder / "loop")
    (folder / "loop").unlink()
    (folder / SINGLE).symlink_to(SINGLE)


def of_folder(marker: Path) -> Mapping[str, Callable[[Path], None]]:
    """Name -> what it does to a converted folder."""
    harm = pickle.dumps(Harm(marker))
    template = TEMPLATE.format(marker=marker)
    return {
        "a pickle called safetensors": lambda f: (f / SINGLE).write_bytes(harm) and None,
        "a pickle alone": lambda f: _only(f, "pytorch_model.bin", harm),
        "pickles beside the weights": lambda f: _pickles(f, harm),
        "a pickle as config": lambda f: (f / CONFIG).write_bytes(harm) and None,
        "adapters alone": lambda f: _only(f, "adapter_config.json", b"{}"),
        "GGUF alone": lambda f: _only(f, "model.gguf", b"GGUF" + bytes(20)),
        "remote code": lambda f: _remote(f, marker),
        "remote code of a tokenizer": lambda f: _remote_tokenizer(f, marker),
        "a template": lambda f: (f / "chat_template.jinja").write_text(template) and None,
        "a template inside": lambda f: edit(f, "tokenizer_config.json", chat_template=template),
        "a long template": lambda f: (
            (f / "chat_template.jinja").write_text("{% for a in range(10**12) %}x{% endfor %}")
            and None
        ),
        "tokenizer files elsewhere": lambda f: edit(
            f,
            "tokenizer_config.json",
            tokenizer_file="/etc/passwd",
            vocab_file="../../outside/x",
            added_tokens_decoder={"0": {"content": "../x"}},
        ),
        "a shard outside": lambda f: _only_index(f, "../outside/model.safetensors"),
        "a shard by its absolute path": lambda f: _only_index(
            f, str(f.parent / "outside" / "model.safetensors")
        ),
        "an index as its own shard": lambda f: _only_index(f, INDEX),
        "a folder as shard": lambda f: _only_index(f, "."),
        "a shard that is no name": lambda f: _only_index(f, "a\0b"),
        "a device as shard": lambda f: _only_index(f, "/dev/zero"),
        "a link to itself": _link,
        "overlapping tensors": lambda f: replace_header(f, _overlap),
        "a huge tensor": lambda f: replace_header(f, _huge),
        "a tensor of a negative size": lambda f: replace_header(
            f, lambda header: _first(header).update(shape=[-1, -16])
        ),
        "a tensor with a path as name": lambda f: replace_header(
            f, lambda header: header.update({"../../outside/x": _first(header)})
        ),
        "a header beyond the file": lambda f: (
            (f / SINGLE).write_bytes(b"\xff" * 7 + b"\x7f{}") and None
        ),
        **{
            f"{key} is {value!r:.40}": lambda f, key=key, value=value: edit(f, **{key: value})
            for key, value in HUGE
        },
    }


HUGE: tuple[tuple[str, Any], ...] = (
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 20_000),
    ("hidden_size", 2**24),
    ("intermediate_size", 2**31),
    ("vocab_size", 2**31),
    ("vocab_size", 2**40),
    ("max_position_embeddings", 2**40),
    ("head_dim", 2**20),
    ("num_attention_heads", 2**24),
    ("layer_types", ["full_attention"] * 10**6),
    ("num_labels", 10**9),
    ("id2label", {str(index): "x" for index in range(10**5)}),
)
"""Sizes in `config.json` that no file of the folder has."""


def recipes(marker: Path) -> Mapping[str, str]:
    """Name -> a recipe's text."""
    step = "steps: [{split: {expert_size: 8}}]\n"
    return {
        "a Python object": f"name: !!python/object/apply:os.system ['touch {marker}']\n{step}",
        "a new Python object": f"name: !!python/object/new:os.system ['touch {marker}']\n{step}",
        "a Python name": f"name: !!python/name:os.system\n{step}",
        "a bomb": f"{BOMB}name: x\n{step}",
        "a bomb as data": f"name: x\n{step}data:\n{indent(BOMB, '  ')}",
        "a loop": "name: x\nsteps: &a [*a]\n",
        "a loop inside": "name: x\nsteps: [{train: &a {tokens: 1, losses: *a}}]\n",
        "deep lists": "[" * 50_000,
        "deep mappings": "{a: " * 5_000,
        "the same key twice": f"name: x\nname: y\n{step}",
        "two documents": f"name: x\n{step}---\nname: y\n",
        "control characters": f'name: "\\0\\a"\n{step}',
        "no number": "name: x\nsteps: [{train: {tokens: .inf, lr: .nan}}]\n",
        "lr is no number": "name: x\nsteps: [{train: {tokens: 64, lr: .nan}}]\n",
        "lr is infinite": "name: x\nsteps: [{train: {tokens: 64, lr: .inf}}]\n",
        "huge tokens": f"name: x\nsteps: [{{train: {{tokens: {10**30}}}}}]\n",
        "huge tokens to fit": f"name: x\nsteps: [{{fit: {{tokens: {10**30}}}}}]\n",
        "huge experts": f"name: x\nsteps: [{{split: {{expert_size: {10**30}}}}}]\n",
        "a huge block": f"name: x\nblock_length: {10**30}\n{step}",
        "a huge router": "name: x\nsteps: [{split: {expert_size: 8}}, {attach: {router: mlp, "
        f"router_options: {{hidden: {10**12}}}}}}}]\n",
        "a list as key": "name: x\nsteps: [{[a]: {}}]\n",
        "a mapping as key": "name: x\n? {a: b}\n: c\nsteps: []\n",
        "a number as key": "name: x\n1: c\nsteps: [{1: {}}]\n",
        "data elsewhere": f"name: x\ndata: ../outside\n{step}",
        "a device as data": f"name: x\ndata: /dev/zero\n{step}",
        "a name with a path": f"name: ../../outside/x\n{step}",
        "a date": f"name: 2020-01-01\n{step}",
        "binary": f"name: !!binary aGVsbG8=\n{step}",
        "a set": f"name: !!set {{a, b}}\n{step}",
        "digits": f"name: x\nseed: {'9' * 10_000}\n{step}",
    }
