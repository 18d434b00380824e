"""Converted folders in vLLM: text and log probabilities are ours, or one line says why not.

vLLM and we compute the same in another order: log probabilities of tiny models agree to 3e-6 in
fp32, those of Gemma2 to 8e-6.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_tools.checkpoint.loading import load
from tests.vllm.conftest import in_vllm
from tests.vllm.folders import MODELS, write

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

NEW = 12
PROMPTS = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 23)]
"""Of two lengths: one batch of vLLM."""
OPTIMIZED = {"additional_config": {"moe_tools": {"optimize": True}}}
INT8 = {"additional_config": {"moe_tools": {"optimize": True, "packed_dtype": "int8"}}}
BF16 = {"dtype": "bfloat16"}
UNPACKED = (
    "representative",
    "oracle",
    "cats",
    "sign",
    "int8_gate",
    "drelu_routed",
    "soft",
    "weighted",
)
"""No kernel packs them: their routers read the rows of the FFN, or experts are weighed."""
PACKED = [
    name for name in MODELS if name not in UNPACKED and name not in ("gpt_neox", "norm", "top_p")
]
ROUNDED = ("topk", "threshold", "few_bits", "relu")
REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {}
"""Name -> what makes a bad folder or option of the folder `topk`, and the words of the refusal."""


def refused(words: str) -> Callable[[Any], Any]:
    """Adds a function to `REFUSED`: it changes a folder in place, and returns vLLM's options."""

    def add(change: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
        REFUSED[change.__name__] = (change, words)
        return change

    return add


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of the block in a folder's config."""
    config = json.loads((folder / "config.json").read_text())
    config["moe_tools"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@refused("topk lacks the tensors layers.1.mlp.router.bias")
def lost_tensor(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.router.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {}


@refused("model.layers.0.mlp.router.weight")
def other_router(folder: Path) -> dict[str, Any]:
    edit(folder, router="mlp")
    return {}


@refused("is (6,), expected (3,)")
def other_shape(folder: Path) -> dict[str, Any]:
    edit(folder, expert_size=16)
    return {}


@refused("it selects its neurons by the prompt (prompt_share 0.5)")
def prompt(folder: Path) -> dict[str, Any]:
    edit(folder, router=None, selector=None, prompt_share=0.5)
    return {}


@refused("inputs of its linears have thresholds")
def thresholds(folder: Path) -> dict[str, Any]:
    edit(folder, thresholds={"model.layers.0.mlp.up_proj": {"linears": []}})
    return {}


@refused("--convert classify is not tested with routers")
def classifier(folder: Path) -> dict[str, Any]:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("ForCausalLM", "ForSequenceClassification"))
    return {}


@refused("merge the adapter")
def lora(folder: Path) -> dict[str, Any]:
    return {"enable_lora": True}


@refused("its weights are quantised (fp8)")
def quantised(folder: Path) -> dict[str, Any]:
    return {"quantization": "fp8", "dtype": "bfloat16"}


@refused("--load-format dummy does not give")
def dummy(folder: Path) -> dict[str, Any]:
    return {"load_format": "dummy"}


@refused("did you mean 'optimize'")
def unknown_option(folder: Path) -> dict[str, Any]:
    return {"additional_config": {"moe_tools": {"optimise": True}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every folder of `MODELS`, and those of `REFUSED`."""
    place = tmp_path_factory.mktemp("folders")
    for name in MODELS:
        write(place / name, name)
    config = place / "earlier" / "config.json"
    shutil.copytree(place / "topk", config.parent)
    config.write_text(config.read_text().replace("MoeToolsLlama", "Llama"))
    return place


@pytest.fixture(scope="module")
def served(folders: Path) -> dict[str, Any]:
    """What vLLM says to every folder, and to every option."""
    jobs = {name: job(folders / name) for name in [*MODELS, "earlier"]}
    jobs |= {f"{name} optimized": job(folders / name, OPTIMIZED) for name in [*PACKED, "sign"]}
    jobs |= {f"{name} bf16": job(folders / name, BF16) for name in ROUNDED}
    jobs |= {f"{name} bf16 optimized": job(folders / name, BF16 | OPTIMIZED) for name in ROUNDED}
    jobs["relu int8"] = job(folders / "relu", INT8)
    for name, (change, _) in REFUSED.items():
        bad = folders / "refused" / name / "topk"
        shutil.copytree(folders / "topk", bad)
        jobs[f"refused {name}"] = job(bad, change(bad))
    return in_vllm(jobs, folders)


def job(folder: Path, options: dict[str, Any] | None = None) -> dict[str, Any]:
    prompts = [prompt_T.tolist() for prompt_T in PROMPTS]
    return {"folder": str(folder), "options": options or {}, "prompts": prompts, "new": NEW}


@torch.no_grad()
def logprobs(model: Any) -> list[torch.Tensor]:
    """Of each prompt's own tokens, all but the first."""
    said = [model(prompt_T[None]).logits[0].float().log_softmax(-1) for prompt_T in PROMPTS]
    pairs = zip(said, PROMPTS, strict=True)
    return [all_TV[:-1].gather(1, prompt_T[1:, None])[:, 0] for all_TV, prompt_T in pairs]


def tokens(model: Any) -> list[list[int]]:
    """Greedy, after each prompt."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = [
        model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **settings)[0]
        for ids in PROMPTS
    ]
    return [ids[len(ids) - NEW :].tolist() for ids in whole]


def far(said: dict[str, Any], wanted: list[torch.Tensor]) -> float:
    """The largest difference of a log probability."""
    pairs = zip(said["logprobs"], wanted, strict=True)
    return max(float((torch.tensor(one) - other).abs().max()) for one, other in pairs)


def mean(values: Any) -> float:
    every = [float(value) for row in values for value in row]
    return math.fsum(every) / len(every)


@pytest.mark.parametrize("name", MODELS)
def test_text_and_log_probabilities_are_ours(
    name: str, folders: Path, served: dict[str, Any]
) -> None:
    said, model = served[name], load(folders / name, dtype=torch.float32)
    assert said.get("error") is None
    assert said["class"] == "MoeToolsForCausalLM"
    assert said["tokens"] == tokens(model)
    assert far(said, logprobs(model)) < 1e-5


def test_the_dense_model_says_something_else(folders: Path, served: dict[str, Any]) -> None:
    dense = load(folders / "topk", dtype=torch.float32, routed=False)
    assert far(served["topk"], logprobs(dense)) > 1e-2


def test_a_folder_of_the_stock_name_runs_as_well(folders: Path, served: dict[str, Any]) -> None:
    assert served["earlier"] == served["topk"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_ffns_say_the_same(name: str, folders: Path, served: dict[str, Any]) -> None:
    said = served[f"{name} optimized"]
    assert said.get("error") is None
    assert said["packed"] == 2
    model = load(folders / name, dtype=torch.float32, optimize=True)
    assert said["tokens"] == tokens(model)
    # packed copies of few bits take x in int8: a difference of 1e-7 is now and then a step of it
    assert far(said, logprobs(model)) < (1e-2 if name == "few_bits" else 1e-5)


def test_ffns_that_cannot_be_packed_are_refused(served: dict[str, Any]) -> None:
    assert "SignRouter reads the FFN's own rows" in served["sign optimized"]["error"]


def test_int8_is_close(served: dict[str, Any]) -> None:
    said = served["relu int8"]
    assert said["packed"] == 2
    assert 1e-6 < far(said, [torch.tensor(row) for row in served["relu"]["logprobs"]]) < 0.1


@pytest.mark.parametrize("way", ["bf16", "bf16 optimized"])
@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_is_as_good_as_ours(
    name: str, way: str, folders: Path, served: dict[str, Any]
) -> None:
    said = served[f"{name} {way}"]
    assert said.get("error") is None
    # The routers decide on rounded inputs: both stray from fp32, each in its own way.
    ours = mean(logprobs(load(folders / name, dtype=torch.bfloat16)))
    assert mean(said["logprobs"]) == pytest.approx(ours, rel=1e-2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name: str, served: dict[str, Any]) -> None:
    assert REFUSED[name][1] in served[f"refused {name}"]["error"]


def test_without_the_plugin_a_folder_is_refused_by_its_name(folders: Path, tmp_path: Path) -> None:
    jobs = {name: job(folders / name) for name in ("topk", "relu")}
    for said in in_vllm(jobs, tmp_path, VLLM_PLUGINS="").values():
        assert "['MoeToolsLlamaForCausalLM'] are not supported" in said["error"]
