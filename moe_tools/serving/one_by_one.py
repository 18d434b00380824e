"""Computes one order after the other, by the model's own `generate`.

For models whose requests cannot be batched: those that select neurons by the prompt, that
transformers batches wrongly, or whose `generation_config.json` asks for what reads a whole text.

Letters: B sequences, always 1; T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import logging
import threading
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from moe_tools.checkpoint.broken import reason
from moe_tools.serving.engine import Engine
from moe_tools.serving.order import Order
from moe_tools.serving.sampling import Chooser
from moe_tools.serving.sparsity import Watch

_log = logging.getLogger(__name__)


def neutral(model: PreTrainedModel) -> GenerationConfig:
    """A model's `generation_config.json` without sampling, which `Chooser` does, and lengths."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
    config.temperature = config.top_p = config.top_k = None
    config.max_length = config.max_new_tokens = None
    config.use_cache = True
    return config


class OneByOne(Engine):
    """A thread with a queue before it."""

    slots, room = 1, None

    def __init__(self, model: PreTrainedModel, watch: Watch) -> None:
        self._model, self._watch = model, watch
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> None:
        self._orders.put(order)

    def cancel(self, order: Order) -> None:
        order.cancelled = True

    def stop(self) -> None:
        self._stopped = True
        self._orders.put(None)
        self._thread.join()
        self._watch.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stops(self, order: Order) -> bool:
        """Whether to leave an order."""
        return self._stopped or order.cancelled

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            if self.stops(order):
                order.end("the server stops")
                continue
            before, error = self._watch.count, None
            try:
                self._generate(order)
            except Exception as raised:  # of this order: the next may be another kind
                _log.exception("a request failed")
                error = reason(raised)
            self._watch.settle()
            order.counted = self._watch.count.since(before)
            order.end("the server stops" if self._stopped and error is None else error)

    @torch.inference_mode()
    def _generate(self, order: Order) -> None:
        model: Any = self._model
        config = neutral(model)
        config.max_new_tokens = order.new
        config.eos_token_id = sorted(order.ends) or None
        config.pad_token_id = min(order.ends, default=0)
        ids_BT = torch.tensor([order.prompt], device=model.device)
        self._watch.next_pass()
        model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choice(order, ids_BT.device)]),
            stopping_criteria=StoppingCriteriaList([_Stop(self, order, self._watch)]),
            streamer=_Told(order),
        )


class _Choice(LogitsProcessor):
    def __init__(self, order: Order, device: torch.device) -> None:
        self._chooser = Chooser(order.sampling, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([self._chooser.narrow(scores_V) for scores_V in scores])


class _Stop(StoppingCriteria):
    """Between two tokens."""

    def __init__(self, engine: OneByOne, order: Order, watch: Watch) -> None:
        self._engine, self._order, self._watch = engine, order, watch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self._watch.next_pass()
        stops = self._engine.stops(self._order)
        return torch.full((len(input_ids),), stops, device=input_ids.device, dtype=torch.bool)


class _Told(BaseStreamer):
    """Tells an order its tokens; the first that `generate` shows is the prompt."""

    def __init__(self, order: Order) -> None:
        self._order, self._prompt_is_next = order, True

    def put(self, value: Tensor) -> None:
        if not self._prompt_is_next:
            for token in value.flatten().tolist():
                self._order.tell(token)
        self._prompt_is_next = False

    def end(self) -> None:
        """Nothing: the engine says it."""
