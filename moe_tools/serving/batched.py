"""Computes many orders at once: transformers' continuous batching, with a sampler of ours.

A request joins and leaves between two passes, and each pass computes one token of every request
that runs. The KV cache is transformers' paged one. What is taken of it beyond its documented calls
stands in `SEAMS`, which is checked before it is used.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching import cb_logits_processors as processors

from moe_tools.data.limits import context_length, text_config
from moe_tools.serving.engine import Engine
from moe_tools.serving.one_by_one import neutral
from moe_tools.serving.order import Order
from moe_tools.serving.sampling import Chooser, Sampling
from moe_tools.serving.sparsity import Watch

_log = logging.getLogger(__name__)

PAGE = 256
"""Tokens of a page of the KV cache: transformers' default, under the names of all its versions."""
LONGEST = 4096
"""Tokens that a request is given room for where the model itself has no limit."""
SHARE = 0.3
"""Of the free memory, for the KV cache at most: pages are taken when they are first written."""
PASS = 512
"""Tokens of one pass on a CPU: a longer prompt comes in pieces, between which others go on."""
PATIENCE = 60.0
"""Seconds that a pass may last while the server stops."""
SEAMS = {
    "the manager's": ("logit_processor", "add_request", "cancel_request", "start", "stop"),
    "its processors'": ("logits_processor", "tensors_required", "do_processing"),
}
"""What is used of transformers' `ContinuousBatchingManager`."""


class CannotBatch(ValueError):
    """A model, or a transformers, with which requests run one at a time."""


class Batched(Engine):
    """A manager of transformers, and a thread that hands on what it computes."""

    def __init__(self, model: PreTrainedModel, watch: Watch, slots: int) -> None:
        self.slots = slots
        pages, self.room = _room(model, slots)
        self._watch, self._model = watch, model
        self._attention: str = model.config._attn_implementation
        self._running: dict[str, Order] = {}
        self._shown: dict[str, int] = {}
        """Order -> how many of its tokens were handed on."""
        self._before: dict[str, Any] = {}
        """Order -> what was counted before it."""
        self._lock = threading.Lock()
        self._choice = Choice(model.device, watch)
        self._manager = manager_of(model, self._choice, pages)
        self._manager.start()
        self._thread = threading.Thread(target=self._hand_on, name="hand on", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> None:
        with self._lock:
            if self._running:
                for other in (order, *self._running.values()):
                    other.alone = False
            self._running[order.name] = order
            self._shown[order.name], self._before[order.name] = 0, self._watch.count
        self._choice.begin(order.name, order.sampling)
        taken = self._manager.add_request(
            order.prompt,
            request_id=order.name,
            max_new_tokens=order.new,
            streaming=True,
            eos_token_id=sorted(order.ends) or -1,
        )
        if taken is None and self._forget(order.name) is not None:
            order.end("the server stops")

    def cancel(self, order: Order) -> None:
        order.cancelled = True
        if self._forget(order.name) is not None:
            self._manager.cancel_request(order.name)
            order.end()

    def stop(self) -> None:
        with self._lock:
            orders = list(self._running.values())
        for order in orders:
            if self._forget(order.name) is not None:
                self._manager.cancel_request(order.name)
                order.end("the server stops")
        self._manager.stop(block=True, timeout=PATIENCE)
        self._thread.join(PATIENCE)
        self._watch.close()
        _restore(self._model, self._attention)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running()) and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Orders that are computed or wait for it."""
        return len(self._running)

    def _forget(self, name: str) -> Order | None:
        with self._lock:
            order = self._running.pop(name, None)
            self._shown.pop(name, None)
            before = self._before.pop(name, None)
        self._choice.end(name)
        if order is not None and before is not None:
            order.counted = self._watch.count.since(before)
        return order

    def _hand_on(self) -> None:
        """Until the manager's own thread ends."""
        try:
            for output in self._manager:
                self._take(output)
            while (output := self._manager.get_result(timeout=0.01)) is not None:
                self._take(output)
        finally:
            for name in list(self._running):
                order = self._forget(name)
                if order is not None:
                    order.end("the model stopped; see the server's log")

    def _take(self, output: Any) -> None:
        with self._lock:
            order = self._running.get(output.request_id)
            if order is None:
                return  # cancelled
            shown = self._shown[order.name]
            self._shown[order.name] = max(shown, len(output.generated_tokens))
        for token in output.generated_tokens[shown:]:
            order.tell(token)
        if output.is_finished() and self._forget(order.name) is not None:
            order.end(output.error)


class Choice(processors.ContinuousBatchingLogitsProcessor):
    """Chooses a token for each request of a pass, each by its own settings.

    All is called in the manager's thread, but for `begin` and `end`.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - as its base class has them
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, device: torch.device, watch: Watch) -> None:
        self._device, self._watch = device, watch
        self._choosers: dict[str, Chooser] = {}
        self._rows: list[str] = []
        """The requests that get a token in this pass."""

    def begin(self, name: str, sampling: Sampling) -> None:
        """Before a request is added."""
        if sampling.temperature:
            self._choosers[name] = Chooser(sampling, self._device)

    def end(self, name: str) -> None:
        """Behind its last token."""
        self._choosers.pop(name, None)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Before each pass."""
        self._watch.next_pass()
        self._rows = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scores of which the largest is the chosen token's, row by row."""
        for row, name in enumerate(self._rows):
            chooser = self._choosers.get(name)
            if chooser is not None:
                scores[row] = chooser.narrow(scores[row])
        return scores


def manager_of(model: Any, choice: Choice, pages: int) -> Any:
    """A manager that is not started, and chooses tokens by `choice`.

    Raises:
        CannotBatch: what the model's `generation_config.json` asks for reads whole texts, or a
            transformers that batches in another way.
    """
    settings = neutral(model)
    settings.max_new_tokens, settings.eos_token_id, settings.use_cache = LONGEST, -1, False
    config = ContinuousBatchingConfig(
        num_blocks=pages,
        max_batch_tokens=PASS if model.device.type == "cpu" else None,
        use_async_batching=False,  # a choice between two passes, in the order of the passes
        use_cuda_graph=False,
        drop_unsupported_processors=False,
    )
    attention: str = model.config._attn_implementation
    manager = model.init_continuous_batching(
        generation_config=copy.deepcopy(settings), continuous_batching_config=config
    )
    try:
        check_seams(manager)
        if manager.logit_processor.logits_processor:
            names = [type(one).__name__ for one in manager.logit_processor.logits_processor]
            raise CannotBatch(
                f"its generation_config.json asks for {', '.join(names)}, which batches do not do"
            )
    except CannotBatch:
        _restore(model, attention)
        raise
    held = manager.logit_processor
    held.logits_processor = LogitsProcessorList([choice])
    held.tensors_required, held.do_processing = 1, True
    return manager


def check_seams(manager: Any) -> None:
    """Whether transformers batches in the way that is known here.

    Raises:
        CannotBatch: it does not.
    """
    held = (manager, getattr(manager, "logit_processor", None))
    for (whose, names), what in zip(SEAMS.items(), held, strict=True):
        missing = [name for name in names if not hasattr(what, name)]
        if missing:
            raise CannotBatch(
                f"transformers {transformers.__version__} batches in another way than moe-tools "
                f"knows: {whose} {' and '.join(missing)} is gone"
            )


def _room(model: PreTrainedModel, slots: int) -> tuple[int, int]:
    """Pages of the KV cache, and the tokens that one request may have of it.

    Raises:
        CannotBatch: not one page fits into the free memory.
    """
    longest = min(context_length(model) or LONGEST, 1 << 20)
    page = PAGE * _bytes_of_token(model)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    wanted = slots * math.ceil(longest / PAGE) + slots
    pages = min(wanted, int(SHARE * free / page))
    if pages < 2:
        raise CannotBatch(f"{free / 2**30:.1f} GiB of free memory hold no KV cache of it")
    return pages, min(longest, (pages - 1) * PAGE)


def _bytes_of_token(model: PreTrainedModel) -> int:
    """Of the KV cache."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


PROMPTS, NEW, FAR = (3, PAGE + 40, 17), 6, 0.25
"""Lengths of what is tried together, tokens after each, and how far a token may be from the
likeliest: a share of what lies between that and the mean, where rounding makes 0.02."""


@torch.inference_mode()
def prove(model: PreTrainedModel) -> None:
    """Tries a few requests at once, and looks whether each gets what the model says by itself.

    Raises:
        CannotBatch: the model cannot be batched, or continues texts in another way in a batch.
    """
    drawn = torch.Generator().manual_seed(0)
    longest = (context_length(model) or LONGEST) - NEW
    size = int(text_config(model).vocab_size)
    prompts = [
        torch.randint(size, (max(1, min(length, longest)),), generator=drawn).tolist()
        for length in PROMPTS
    ]
    try:
        answers = _answers(model, prompts)
    except CannotBatch:
        raise
    except Exception as error:
        raise CannotBatch(f"transformers cannot batch it: {error}") from error
    for prompt, answer in zip(prompts, answers, strict=True):
        ids_BT = torch.tensor([prompt + answer], device=model.device)
        logits_TV = model(input_ids=ids_BT).logits[0, len(prompt) - 1 : -1].float()
        said_T = logits_TV.gather(1, ids_BT[0, len(prompt) :, None])[:, 0]
        most_T = logits_TV.max(-1).values
        far = (most_T - said_T) / (most_T - logits_TV.mean(-1))
        if len(answer) != NEW or float(far.max()) > FAR:
            raise CannotBatch("transformers continues texts otherwise in a batch than one by one")


def _restore(model: PreTrainedModel, attention: str) -> None:
    """Gives a model its attention back, which older managers keep."""
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)


def _answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """What a manager says to them, all at once; it leaves the model as it was."""
    watch, attention = Watch(model, 0), model.config._attn_implementation
    pages = len(prompts) * math.ceil((max(PROMPTS) + NEW) / PAGE) + 1
    manager = manager_of(model, Choice(model.device, watch), pages)
    manager.start()
    try:
        for index, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=NEW, eos_token_id=-1)
        found: dict[str, list[int]] = {}
        for output in manager:
            if output.error is not None:
                raise ValueError(output.error)
            if output.is_finished():
                found[output.request_id] = output.generated_tokens
            if len(found) == len(prompts):
                break
    finally:
        manager.stop(block=True, timeout=PATIENCE)
        _restore(model, attention)
    return [found.get(str(index), []) for index in range(len(prompts))]
