"""Runs benchmark tasks of lm-evaluation-harness on a model that is in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.measure.task_groups import GROUPS

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """One task, and how it is asked."""

    name: str
    """A task, group or tag of the harness."""
    group: str | None = None
    """Of `GROUPS`; None: the user named the task itself."""
    shots: int | None = None
    """Examples before the question; None: as the harness does it."""
    bos: bool | None = None
    """Whether prompts begin with BOS; None: as the harness does it."""

    def figure(self, task: str, metric: str) -> str:
        """Names a figure, so that the same task asked in two ways has two."""
        shots = [] if self.shots is None else [f"{self.shots}-shot"]
        bos = {None: [], True: ["BOS"], False: ["no-BOS"]}[self.bos]
        return " ".join([task, *shots, *bos, metric])


@dataclass(frozen=True)
class Tasks:
    """Says which tasks are run, and how much of them."""

    names: Sequence[str] = ()
    """Tasks, groups or tags of lm-evaluation-harness, or papers (`GROUPS`); none: nothing is
    run."""
    folder: str | None = None
    """Task files of one's own, in YAML, beside those that the harness brings."""
    limit: int | None = None
    """Examples of each task; None: all."""
    bos: bool | None = None
    """Whether prompts begin with the tokenizer's BOS; None: as the paper asks, else as the harness
    does it."""

    def asked(self) -> list[Asked]:
        """All tasks, those of papers taken apart; what is named twice is asked once."""
        found: list[Asked] = []
        for name in self.names:
            group = GROUPS.get(name)
            if group is None:
                found.append(Asked(name, bos=self.bos))
                continue
            bos = group.bos if self.bos is None else self.bos
            found += [Asked(task, name, shots, bos) for task, shots in group.shots.items()]
        once = {(one.name, one.shots, one.bos): one for one in reversed(found)}
        return list(reversed(once.values()))

    def check(self) -> None:
        """Checks everything that can be wrong before a model is loaded; reads the tasks' data.

        Raises:
            ValueError: the harness is not installed, has no task of a name or cannot read one, a
                task has the name of a paper, or runs code that a model wrote; a choice without any
                task.
        """
        if not self.names:
            if self.bos is not None:
                raise ValueError("--bos is of the prompts of tasks: name some by --tasks")
            return
        manager = self.manager()
        for name in self.names:
            if name in GROUPS and manager.match_tasks([name]):
                raise ValueError(
                    f"{name!r} is a paper's group of moe-tools and a task of the harness or of "
                    "--task-folder: give your task another name, or name the paper's tasks one by "
                    f"one ({', '.join(GROUPS[name].shots)})"
                )
        for one in self.asked():
            if not manager.match_tasks([one.name]):
                raise ValueError(
                    f"lm-evaluation-harness has no task {one.name!r}{_of(one)}: `lm_eval ls tasks` "
                    "lists them, --task-folder adds your own"
                )
        for one in self.asked():
            _check_readable(manager, one)
        for name in dict.fromkeys(self.names):
            if name in GROUPS and GROUPS[name].lacks:
                logger.warning("%s: not asked: %s", name, GROUPS[name].lacks)

    def check_bos(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Whether the tokenizer can begin prompts with BOS, where the user asks for it.

        A paper's wish is only a wish: of a tokenizer without BOS one line is logged.

        Raises:
            ValueError: the user asks, and it begins no text with BOS.
        """
        if begins_with_bos(tokenizer):
            return
        if self.bos:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} begins no text with BOS: leave --bos out"
            )
        for name in dict.fromkeys(self.names):
            if self.bos is None and name in GROUPS and GROUPS[name].bos:
                message = "%s asks for BOS before every prompt, and the tokenizer begins with none"
                logger.warning(message, name)

    def manager(self) -> TaskManager:
        """The harness's index of tasks.

        Raises:
            ValueError: the harness is not installed.
        """
        if find_spec("lm_eval") is None:
            raise ValueError("--tasks needs lm-evaluation-harness: pip install 'moe-tools[eval]'")
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.folder)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


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
        errors are left to the harness's own command line. How a paper asks, and BOS where it was
        chosen, stand between ("gsm8k 8-shot BOS exact_match,strict-match"); of what a paper asks,
        the parts that a task has (the subjects of mmlu) are left out.

    Raises:
        ValueError: no harness, an unknown task, or a model that continues no text.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} continues no text: --tasks cannot ask it")
    manager = tasks.manager()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    figures: dict[str, float] = {}
    for together in _alike(tasks.asked(), tokenizer):
        first = together[0]
        options: dict[str, Any] = {} if first.bos is None else {"add_bos_token": first.bos}
        harness: Any = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            **options,
        )
        found = simple_evaluate(
            harness,
            tasks=[one.name for one in together],
            num_fewshot=first.shots,
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
        figures |= _figures(found["results"], together)
    return figures


def _alike(asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> list[list[Asked]]:
    """Tasks that one call of the harness asks; BOS that the tokenizer has not is left out."""
    has_bos = begins_with_bos(tokenizer)
    found: dict[tuple[bool, int | None, bool | None], list[Asked]] = {}
    for one in asked:
        bos = None if one.bos and not has_bos else one.bos
        key = (one.group is not None, one.shots, bos)
        found.setdefault(key, []).append(replace(one, bos=bos))
    return list(found.values())


def _figures(results: dict[str, dict[str, Any]], asked: Sequence[Asked]) -> dict[str, float]:
    """Picks the metrics: "acc,none" is one, "acc_stderr,none", "alias", "sample_len" are not."""
    names = {one.name for one in asked}
    whole = asked[0].group is not None and names <= set(results)
    return {
        asked[0].figure(task, key.removesuffix(",none")): value
        for task, seen in results.items()
        for key, value in seen.items()
        if "," in key and "_stderr," not in key and (not whole or task in names)
    }


def _of(one: Asked) -> str:
    return "" if one.group is None else f" of {one.group}"


def _check_readable(manager: TaskManager, one: Asked) -> None:
    """Reads a task and its data, as the harness will once the model is loaded.

    Raises:
        ValueError: it cannot be read, or runs code that a model wrote.
    """
    try:
        with warnings.catch_warnings():
            # the method that took its place is newer than the oldest harness that we take
            warnings.simplefilter("ignore", DeprecationWarning)
            loaded = manager.load_task_or_group([one.name])
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(
            f"task {one.name!r}{_of(one)} cannot be read: {reason[:300]} (its data come from the "
            "hub, or from where its file says)"
        ) from error
    for task in _leaves(loaded):
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"task {one.name!r}{_of(one)} runs code that a model wrote, and moe-tools runs "
                "none: lm_eval's own command line does, `python -m moe_tools.patched lm_eval run "
                "--confirm_run_unsafe_code`"
            )


def _leaves(loaded: Any) -> Iterator[Any]:
    """The tasks of groups in groups."""
    if isinstance(loaded, dict):
        for inner in loaded.values():
            yield from _leaves(inner)
    else:
        yield loaded
