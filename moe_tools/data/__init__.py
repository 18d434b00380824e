"""Text, a hub data set or the donor's own samples -> blocks of tokens.

    texts(source, split=...)              documents, strings
    blocks(source, tokenizer, ...)        blocks_BT: documents joined by EOS, cut into equal rows
    rows(source, tokenizer, ...)          the same and more, read when asked for: text larger than
                                          memory, conversations, whole texts in a row
    generate_blocks(model, ...)           blocks_BT: what the donor itself says, from BOS on
    labelled_batches(source, ...)         labelled documents, as batches of rows of one length
    labelled_blocks(batches, length)      blocks_BT: the rows of such batches end to end
    task_batches(task, source, ...)       the same of every task: classes, scores, targets to say
    fingerprint(blocks_BT)                shows that two runs saw the same tokens

A source is "docs" (docstrings of pinned wheels, fetched once), a .txt, .md, .jsonl or .parquet
file, a folder of them, "hub:NAME[:CONFIG]" or "owner/name"; "FILE:COLUMN" says which column of a
table is the text, or the conversation. The same source, split, seed, length
and tokenizer give the same tensor on every run, and a larger budget of tokens only appends rows.
"""

from moe_tools.data.batch import Batch
from moe_tools.data.batching import Batches, Text, token_count
from moe_tools.data.generate import generate_blocks
from moe_tools.data.holdout import TextSplit
from moe_tools.data.labelled import label_names, labelled_batches, labelled_blocks
from moe_tools.data.packing import blocks, fingerprint, rows
from moe_tools.data.rows import Rows
from moe_tools.data.sources import texts
from moe_tools.data.tasks import Blocks, Task, TaskText, calibration_text, task_batches

__all__ = [
    "Batch",
    "Batches",
    "Blocks",
    "Rows",
    "Task",
    "TaskText",
    "Text",
    "TextSplit",
    "blocks",
    "calibration_text",
    "fingerprint",
    "generate_blocks",
    "label_names",
    "labelled_batches",
    "labelled_blocks",
    "rows",
    "task_batches",
    "texts",
    "token_count",
]
