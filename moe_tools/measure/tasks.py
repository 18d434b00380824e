"""Runs benchmark tasks of lm-evaluation-harness on a model that is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Tasks:
    """Says which tasks are run, and how much of them."""

    names: Sequence[str] = ()
    """Tasks, groups or tags of lm-evaluation-harness; none: nothing is run."""
    folder: str | None = None
    """Task files of one's own, in YAML, beside those that the harness brings."""
    limit: int | None = None
    """Examples of each task; None: all."""

    def check(self) -> None:
        """Checks everything that can be wrong before a model is loaded.

        Raises:
            ValueError: the harness is not installed, or has no task of a name.
        """
        if self.names:
            manager = self.manager()
            for name in self.names:
                if not manager.match_tasks([name]):
                    raise ValueError(
                        f"lm-evaluation-harness has no task {name!r}: `lm_eval ls tasks` lists "
                        "them, --task-folder adds your own"
                    )

    def manager(self) -> TaskManager:
        """The harness's index of tasks.

        Raises:
            ValueError: the harness is not installed.
        """
        if find_spec("lm_eval") is None:
            raise ValueError("--tasks needs lm-evaluation-harness: pip install 'moe-tools[eval]'")
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.folder)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    batch_size: int,
    seed: int = 0,
) -> dict[str, float]:
    """Runs the tasks on a causal language model.

    Args:
        model: as it stands, routers, selectors and baselines included.
        tokenizer: its own.
        tasks: what to run.
        batch_size: examples of one forward pass.
        seed: which examples are shown before the question, and all else that is drawn.

    Returns:
        "task metric" -> figure, e.g. {"arc_easy acc": 0.61}, in the order of the tasks; standard
        errors are left to the harness's own command line.

    Raises:
        ValueError: no harness, an unknown task, or a model that continues no text.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} continues no text: --tasks cannot ask it")
    manager = tasks.manager()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness: Any = HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
    )
    found = simple_evaluate(
        harness,
        tasks=list(tasks.names),
        task_manager=manager,
        limit=tasks.limit,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # only other ranks than the first get nothing
    return _figures(found["results"])


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Picks the metrics: "acc,none" is one, "acc_stderr,none", "alias", "sample_len" are not."""
    return {
        f"{task} {key.removesuffix(',none')}": value
        for task, seen in results.items()
        for key, value in seen.items()
        if "," in key and "_stderr," not in key
    }
