"""What is wrong with the files of a model, in one line.

What other packages raise on a damaged file is of any kind: a config with a word for a number ends
as a TypeError deep in some model's `__init__`. Here all of it becomes a ValueError that names the
file; the error itself stays its cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class BrokenFolder(ValueError):
    """A folder whose files do not fit each other; it says so itself, with its name."""


LONGEST = 400
"""Characters of another package's reason: some print a whole config."""


@contextmanager
def named_errors(prefix: str) -> Iterator[None]:
    """Turns whatever reading a model's files raises into one ValueError of one line.

    Raises:
        ValueError: `prefix` and the reason; a `BrokenFolder` as it is.
    """
    try:
        yield
    except BrokenFolder:  # it has its name already
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{prefix}its Python code comes with it: if you trust that, say "
                "--trust-remote-code, or trust_remote_code=True in Python"
            ) from error
        raise ValueError(f"{prefix}{reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error says, short and in one line; its kind too, where the words need it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[0]
    if said.endswith(":") and len(lines) > 1:  # the headline of a check
        said = f"{said} {lines[1]}"
    if len(said) > LONGEST:
        said = f"{said[:LONGEST]} ..."
    known = isinstance(error, OSError | ValueError | SafetensorError)
    return said if said and known else f"{type(error).__name__}: {said}"
