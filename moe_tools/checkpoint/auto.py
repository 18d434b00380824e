"""After `import moe_tools`, transformers loads a converted folder as the routed model.

Nothing else happens at import; this must, or the classes that everyone uses would load a converted
folder as a dense model, silently. Where the seam is, and why there:

- *register_patch_mapping* of decoder layers replaces classes before they are built. A layer is
  not told the name of its FFN, every family needs its own replacement, and T5's, BERT's and
  Mixtral's FFNs are none.
- *A quantizer* of our own sees the whole model before its weights, but takes the one slot that
  bitsandbytes or torchao need, and writes itself into the config of a dense folder.
- *`from_pretrained` itself* is too late: by then the layers are spread over devices, and the
  files that it read are forgotten.
- *`PreTrainedModel._load_pretrained_model`*, taken here, is the step inside `from_pretrained`
  that fills a stock model from files: the files and shapes are known, no device hook is on yet,
  and all the loaders (Auto classes, pipeline, PEFT, Trainer, lm-eval) pass through it. What
  follows is what `moe_tools.load` does, as that passes through it too.

Two more places: `save_pretrained` writes tensors under the host's names, and `ACT2FN` builds a
stand-in for an activation that only moe-tools knows, which the loading then replaces.

Importing this file imports no torch: until transformers is, the patch waits in `sys.meta_path`.
A model without a `moe_tools` block in its config never reaches our code.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from moe_tools.names import OURS

PATCHED = "transformers.modeling_utils"
"""The module that is patched, as soon as someone imports it."""

_undo: list[Callable[[], None]] = []
"""What takes the patch away again; empty: there is none."""


def patch_transformers() -> None:
    """Lets transformers load converted folders as routed models; `import moe_tools` calls it.

    A second call does nothing. `unpatch_transformers` takes it back.

    Raises:
        ImportError: a transformers that loads models in another way than those that moe-tools
            knows; raised when it is imported, which is perhaps later.
    """
    if _undo:
        return
    if PATCHED in sys.modules:
        _patch(sys.modules[PATCHED])
        return
    waiting = _Waiting()
    sys.meta_path.insert(0, waiting)
    _undo.append(lambda: sys.meta_path.remove(waiting))


def unpatch_transformers() -> None:
    """Takes back what `patch_transformers` did: converted folders load as stock dense models."""
    while _undo:
        _undo.pop()()


@contextmanager
def transformers_patched(on: bool) -> Iterator[None]:
    """While it lasts, converted folders load as routed models, or as stock dense ones."""
    before = bool(_undo)
    change = {True: patch_transformers, False: unpatch_transformers}
    change[on]()
    try:
        yield
    finally:
        change[before]()


class _Waiting(MetaPathFinder):
    """Finds the module as the others do, and patches it once it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, but for what comes after its execution; None for all others."""
        if name != PATCHED:
            return None
        unpatch_transformers()  # no longer in the way of the other finders
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(modeling: ModuleType) -> None:
    from transformers.activations import ACT2FN

    model = modeling.PreTrainedModel
    seam = vars(model).get("_load_pretrained_model")
    if seam is None or "checkpoint_files" not in inspect.signature(seam.__func__).parameters:
        from transformers import __version__

        raise ImportError(
            f"transformers {__version__} no longer loads weights in "
            "PreTrainedModel._load_pretrained_model, where moe-tools adds its routers: install a "
            "transformers of the range in moe-tools' requirements, or a newer moe-tools"
        )
    _replace(model, "_load_pretrained_model", type(seam)(_loading(seam.__func__)))
    _replace(model, "save_pretrained", _saving(model.save_pretrained))
    _replace(type(ACT2FN), "__missing__", _stand_in)


def _replace(owner: type, name: str, value: Any) -> None:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    if before is None:
        _undo.append(lambda: delattr(owner, name))
    else:
        _undo.append(lambda: setattr(owner, name, before))


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """The step of `from_pretrained` that fills a model, and then adds what its block says."""
    parameters = inspect.signature(load)

    @functools.wraps(load)
    def load_and_rebuild(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        given = parameters.bind(*args, **kwargs).arguments
        model = given["model"]
        # adapters come through here as well, into a model that is complete
        if _is_converted(model) and not model._hf_peft_config_loaded:
            from moe_tools.checkpoint.rebuild import rebuild

            source = str(given["load_config"].pretrained_model_name_or_path)
            report, index = loaded if isinstance(loaded, tuple) else (loaded, None)
            tensors = given["checkpoint_files"] or given["state_dict"]
            rebuild(model, tensors, source, report, index)
        return loaded

    return load_and_rebuild


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` with every tensor of a converted model under the host's name."""
    parameters = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        model = given.arguments["self"]
        # with adapters of its own a model saves these alone, which have our names
        if _is_converted(model) and not model._hf_peft_config_loaded:
            from moe_tools.hosts.ffn import host_state_dict

            state = given.arguments.get("state_dict")
            given.arguments["state_dict"] = host_state_dict(model, state)
            given.arguments["save_original_format"] = False
        return save(*given.args, **given.kwargs)

    return save_pretrained


def _is_converted(model: Any) -> bool:
    return getattr(model.config, "moe_tools", None) is not None


def _stand_in(_: Any, name: str) -> type:
    """What the host is built with in place of an activation of ours."""
    if not str(name).startswith(OURS):
        raise KeyError(name)
    from moe_tools.experts.swapped import Unswapped

    return Unswapped
