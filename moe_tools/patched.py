"""`python -m moe_tools.patched MODULE ARGUMENTS` runs a module; converted folders load as routed.

For programs that load models themselves, such as `lm_eval`: with moe-tools imported first, a
converted folder is the routed model there too (`moe_tools.checkpoint.auto`).
"""

from __future__ import annotations

import runpy
import sys

from moe_tools.waiting import passive_waiting


def main() -> None:
    """Runs the module that the command line names."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m moe_tools.patched MODULE [ARGUMENT ...]")
    passive_waiting()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
