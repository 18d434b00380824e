"""Runs folders in vLLM, one engine after the other: python -m tests.vllm.engine JOBS RESULTS.

A process of its own: once vLLM has run a class of transformers, nothing else can build it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
ENGINE = {
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 2,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
    "dtype": "float32",
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM says on the prompts of a job: new tokens, and log probabilities of the prompts."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        model = LLM(job["folder"], **ENGINE | job.get("options", {}))
        asked = SamplingParams(
            max_tokens=job["new"],
            temperature=0,
            prompt_logprobs=0,
            detokenize=False,
            ignore_eos=True,
        )
        outputs = model.generate(
            [{"prompt_token_ids": ids} for ids in job["prompts"]], asked, use_tqdm=False
        )
        runner = model.llm_engine.model_executor.driver_worker.model_runner
        return {
            "class": type(runner.model).__name__,
            "packed": packed(runner.model),
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [logprobs(output) for output in outputs],
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        model = outputs = runner = None
        gc.collect()
        cleanup_dist_env_and_memory()


def packed(model: Any) -> int:
    """How many FFNs of a model are packed."""
    from moe_tools.experts.packed_ffn import PackableFFN

    ffns = [module for module in model.modules() if isinstance(module, PackableFFN)]
    return sum(ffn.packed is not None for ffn in ffns)


def logprobs(output: Any) -> list[float]:
    """Of the prompt's own tokens, all but the first."""
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [said[token].logprob for token, said in pairs]


def main() -> None:
    """Runs the jobs of a JSON file."""
    os.environ.update(SETTINGS)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run(job) for name, job in jobs.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
