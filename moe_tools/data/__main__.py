"""`python -m moe_tools.data`: makes the corpus "docs" now, so that a later run needs no network."""

import sys

from moe_tools.data.docs import docs

if __name__ == "__main__":
    try:
        print(
            f"docs: {len(docs('train')):,} documents to train on, {len(docs('heldout')):,} held out"
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
