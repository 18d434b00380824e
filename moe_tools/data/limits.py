"""What a model can do with text: whether it continues it, how long it is, of which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moe_tools.data.batch import Batch
from moe_tools.data.batching import Batches, Text
from moe_tools.data.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def text_config(model: nn.Module) -> Any:
    """The config of what writes text: a model of pictures and text keeps it inside its own."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def continues_text(model: PreTrainedModel) -> bool:
    """Whether a model predicts the next token of plain text: a causal language model.

    One that sees pictures beside the text is one too; an encoder-decoder is none.
    """
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def says_targets(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder-decoder that can be taught what to say about a text."""
    shift = getattr(type(model), "prepare_decoder_input_ids_from_labels", None)
    return bool(model.can_generate()) and model.config.is_encoder_decoder and shift is not None


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens of the longest block that a model takes; None: there is no limit."""
    found = [getattr(text_config(model), "max_position_embeddings", None)]
    # RoBERTa counts positions from behind its padding token, and has that many fewer.
    found += [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if type(module) is nn.Embedding
        and module.padding_idx is not None
        and "position" in name.rpartition(".")[2]
    ]
    return min((length for length in found if length is not None), default=None)


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuses blocks that are too long for a model.

    Raises:
        ValueError: the length exceeds its context.
    """
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"a block of {length} tokens exceeds the context of {type(model).__name__}, "
            f"{context} tokens: use --block-length {context} or less"
        )


def check_text(model: PreTrainedModel, text: Text | Rows) -> None:
    """Refuses text that a model cannot take: it would fail in the middle of the work, or worse.

    Raises:
        ValueError: too long a block, or a token outside the vocabulary.
    """
    if isinstance(text, Batches | Rows):
        rows = text.rows if isinstance(text, Batches) else text
        longest, largest = rows.length, rows.largest
    else:
        tensors = [text] if isinstance(text, Tensor) else [*_tokens(text)]
        longest = max(ids_BT.shape[1] for ids_BT in tensors)
        largest = max(int(ids_BT.max()) for ids_BT in tensors)
    check_length(model, longest)
    vocabulary = text_config(model).vocab_size
    if largest >= vocabulary:
        raise ValueError(
            f"token {largest} is outside the vocabulary of {type(model).__name__}, "
            f"{vocabulary} tokens: tokenise with the model's own tokenizer"
        )
    if not isinstance(text, Batches | Rows | Tensor):
        _check_types(model, text)


def _tokens(batches: Iterable[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch.ids_BT
        if batch.targets_BS is not None:
            yield batch.targets_BS


def _check_types(model: PreTrainedModel, batches: Iterable[Batch]) -> None:
    known = getattr(model.config, "type_vocab_size", None)
    largest = max((int(b.types_BT.max()) for b in batches if b.types_BT is not None), default=0)
    if known is not None and largest >= max(known, 1):
        raise ValueError(
            f"the tokenizer tells {largest + 1} texts of a pair apart, but {type(model).__name__} "
            f"has {known} types of tokens: tokenise with the model's own tokenizer"
        )
