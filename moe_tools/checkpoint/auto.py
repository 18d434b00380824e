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

More places: `save_pretrained` writes tensors under the host's names, `ACT2FN` builds a stand-in for
an activation that only moe-tools knows, which the loading then replaces, a model that is built from
the config of a converted one refuses to run until it has its modules, so that no way around the
loading gives a dense model, and a config is written under a class name that no other program has
(`class_names`), and read under its own.

Other libraries may put their functions around ours, before or after: what they put on stays when
ours goes, and ours then hands every call straight on.

Importing this file imports no torch: until transformers is, the patch waits in `sys.meta_path`.
A model without a `moe_tools` block in its config never reaches our code.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import Any

from moe_tools.checkpoint.class_names import put_in, take_out
from moe_tools.checkpoint.import_hook import AfterImport
from moe_tools.checkpoint.seams import Once, Seam, function_of
from moe_tools.names import OURS

logger = logging.getLogger(__name__)

PATCHED = "transformers.modeling_utils"
"""The module that is patched, as soon as someone imports it."""
SUPPORTED = ">=5.7,<6"
"""Versions of transformers in moe-tools' requirements."""
LOAD, SAVE, BUILT = "_load_pretrained_model", "save_pretrained", "post_init"
"""The methods of `PreTrainedModel` that are patched."""
READ, WRITE = "get_config_dict", "to_json_file"
"""The methods of `PreTrainedConfig` that are patched: every `config.json` passes through them."""
MARK = "__moe_tools_patch__"
"""Where the patched module says whose patch it has."""
FILLED = ("model", "state_dict", "checkpoint_files", "load_config")
"""The arguments of `LOAD` that moe-tools needs."""


class Patch:
    """The patch of one module: what is replaced, and whether it is in force."""

    def __init__(self, module: str = PATCHED) -> None:
        self.refused = ""
        """Why the transformers that is there cannot be patched; empty: it can."""
        self._module = module
        self._asked = False
        self._users = 0
        """Contexts that run now and need it, in any thread."""
        self._here: ContextVar[bool | None] = ContextVar("here", default=None)
        """Whether it is in force in this thread, where that is not left to `_asked`."""
        self._lock = RLock()
        self._seams: dict[tuple[type, str], Seam] = {}
        self._models: list[type] = []
        """The classes that have seams: more than one after a reload."""
        self._hook = AfterImport(module, self._patch)
        self._loads, self._saves, self._builds = Once(), Once(), Once()

    def switch(self, on: bool) -> None:
        """Puts the patch in force, or takes it back, for the whole session."""
        with self._lock:
            self._asked = on
        self._settle(on_top=on)

    def check(self) -> None:
        """Checks that transformers can load converted folders; imports it.

        Raises:
            ValueError: a transformers that loads models in another way than moe-tools knows.
        """
        module = import_module(self._module)
        self._patch(module)
        if not self.refused and vars(module).get("PreTrainedModel") not in self._models:
            self.refused = _refusal(f"{self._module} has no PreTrainedModel")
        if self.refused:
            raise ValueError(self.refused)

    @contextmanager
    def here(self, on: bool) -> Iterator[None]:
        """While it lasts, the patch is in force in this thread, or is not.

        Raises:
            ValueError: as `check`.
        """
        with self._lock:
            self._users += on
        token = self._here.set(on)
        try:
            self._settle()
            if on:
                self.check()
            yield
        finally:
            self._here.reset(token)
            with self._lock:
                self._users -= on
            self._settle()

    @property
    def in_force(self) -> bool:
        """Whether our functions do their work in this thread; if not, they only pass calls on."""
        here = self._here.get()
        return self._asked if here is None else here

    def _settle(self, *, on_top: bool = False) -> None:
        """Installs or removes the import hook and our functions, whichever is wanted now."""
        if (module := sys.modules.get(self._module)) is not None:
            self._patch(module)
        with self._lock:
            wanted = self._asked or self._users > 0
            (self._hook.start if wanted else self._hook.stop)()
            for seam in self._seams.values():
                if wanted:
                    seam.put(on_top=on_top)
                else:
                    seam.take()

    def _patch(self, module: ModuleType) -> None:
        """Patches a module as soon as it has its class, and again after a reload."""
        model = vars(module).get("PreTrainedModel")
        if model is None or model in self._models:
            return
        # before the lock: another thread may import
        from transformers.activations import ACT2FN
        from transformers.configuration_utils import PreTrainedConfig

        with self._lock:
            if model in self._models or not (self._asked or self._users):
                return
            # Imported again, as notebooks and coverage do, moe-tools meets its former self.
            former = vars(module).get(MARK)
            if former is not None and former is not self:
                former.switch(False)
            setattr(module, MARK, self)
            self._models.append(model)
            self.refused = _unsupported(model)
            if hasattr(model, BUILT):
                self._put(model, BUILT, self._building)
            if self.refused:
                logger.warning("%s", self.refused)
                return
            self._put(model, LOAD, self._loading)
            self._put(model, SAVE, self._saving)
            self._put(type(ACT2FN), "__missing__", self._missing)
            self._put(PreTrainedConfig, READ, partial(take_out, lambda: self.in_force))
            self._put(PreTrainedConfig, WRITE, partial(put_in, lambda: self.in_force))

    def _put(self, owner: type, name: str, around: Callable[[Any], Any]) -> None:
        self._seams.setdefault((owner, name), Seam(owner, name, around)).put()

    def _loading(self, held: Any) -> Any:
        """Wraps the step of `from_pretrained` that fills a model: then rebuilds a converted one."""
        load = function_of(held)

        @functools.wraps(load)
        def load_and_rebuild(*args: Any, **kwargs: Any) -> Any:
            if not self.in_force:
                return load(*args, **kwargs)
            given = _bind(load, args, kwargs)
            model = given["model"]
            with self._loads.outermost(model) as outermost:
                loaded = load(*args, **kwargs)
            # adapters come through here as well, into a model that is complete
            if outermost and _is_converted(model) and not model._hf_peft_config_loaded:
                from moe_tools.checkpoint.rebuild import rebuild

                source = str(given["load_config"].pretrained_model_name_or_path)
                report, index = loaded if isinstance(loaded, tuple) else (loaded, None)
                tensors: Any = given.get("checkpoint_files") or given.get("state_dict")
                rebuild(model, tensors, source, report, index)
            return loaded

        kind: Any = classmethod if isinstance(held, classmethod) else staticmethod
        return kind(load_and_rebuild)

    def _saving(self, held: Any) -> Any:
        """Wraps `save_pretrained`: writes a converted model's tensors under the host's names."""
        save = function_of(held)

        @functools.wraps(save)
        def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
            with self._saves.outermost(model) as outermost:
                # with adapters of its own a model saves these alone, which have our names
                converted = _is_converted(model) and not model._hf_peft_config_loaded
                if outermost and converted and self.in_force:
                    from moe_tools.checkpoint.host_names import host_names
                    from moe_tools.experts.conversion import update_config
                    from moe_tools.hosts.ffn import host_state_dict

                    update_config(model)
                    if len(args) > 2:  # the folder, is_main_process, state_dict
                        args = (*args[:2], host_state_dict(model, args[2]), *args[3:])
                    else:
                        kwargs["state_dict"] = host_state_dict(model, kwargs.get("state_dict"))
                    kwargs["save_original_format"] = False
                    with host_names(model):
                        return save(model, *args, **kwargs)
                return save(model, *args, **kwargs)

        return save_pretrained

    def _building(self, held: Any) -> Any:
        """Wraps the end of a model's `__init__`: one that lacks modules of ours refuses to run."""
        post_init = function_of(held)

        @functools.wraps(post_init)
        def post_init_and_guard(model: Any, *args: Any, **kwargs: Any) -> Any:
            with self._builds.outermost(model) as outermost:
                done = post_init(model, *args, **kwargs)
            if outermost and self.in_force and lacks(model) is not None:
                model.register_forward_pre_hook(refuse_incomplete)
            return done

        return post_init_and_guard

    def _missing(self, held: Any) -> Any:
        """Wraps the lookup of activations: gives a placeholder for those that moe-tools adds."""

        def stand_in(table: Any, name: str) -> Any:
            if self.in_force and str(name).startswith(OURS):
                from moe_tools.experts.swapped import Unswapped

                return Unswapped
            if held is None:
                raise KeyError(name)
            return held(table, name)

        return stand_in


_patch = Patch()


def patch_transformers() -> None:
    """Lets transformers load converted folders as routed models; `import moe_tools` calls it.

    A second call changes nothing, but where another library has replaced our functions since: then
    they are put around its own. `unpatch_transformers` takes it back.

    A transformers that loads models in another way than moe-tools knows stays as it is, and a
    warning is logged when it is imported, which is perhaps later; `moe_tools.load` refuses it.
    """
    _patch.switch(True)


def unpatch_transformers() -> None:
    """Takes back what `patch_transformers` did: converted folders load as stock dense models.

    What another library has put around our functions stays.
    """
    _patch.switch(False)


def transformers_patched(on: bool) -> AbstractContextManager[None]:
    """While it lasts, this thread loads converted folders as routed models, or as dense ones.

    Raises:
        ValueError: on, but transformers loads models in another way than moe-tools knows.
    """
    return _patch.here(on)


def refuse_incomplete(model: Any, *_: Any) -> None:
    """A forward pre-hook of models whose config names modules that they do not have themselves.

    Raises:
        ValueError: the model is dense.
    """
    missing = lacks(model)
    if missing is not None:
        raise ValueError(
            f"{type(model).__name__} was built from the config of a converted model, but has no "
            f"{missing}: "
            f"{_patch.refused or 'load its folder with from_pretrained or moe_tools.load'}"
        )
    admit(model)


def admit(model: Any) -> None:
    """Lets a model run that has its modules now: takes `refuse_incomplete` off."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is refuse_incomplete:
                del module._forward_pre_hooks[key]


def _filling(
    model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any, **__: Any
) -> None:
    """The signature of `LOAD`, for wrappers of other libraries that do not name its parameters."""


def _bind(load: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Argument name -> value of a call of `LOAD`."""
    found = inspect.signature(load)
    named = found if set(FILLED) <= set(found.parameters) else inspect.signature(_filling)
    return named.bind(*args, **kwargs).arguments


def _unsupported(model: type) -> str:
    """The reason why a class of models cannot be patched; empty if it can."""
    held = getattr(model, LOAD, None)
    if held is None:
        return _refusal(f"PreTrainedModel has no {LOAD}")
    parameters = inspect.signature(held).parameters.values()
    anything = {each.kind for each in parameters} >= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    missing = set(FILLED) - {each.name for each in parameters}
    if missing and not anything:
        return _refusal(f"PreTrainedModel.{LOAD} has no {' and no '.join(sorted(missing))}")
    return ""


def _refusal(why: str) -> str:
    from transformers import __version__

    return (
        f"transformers {__version__} does not load models in the way that moe-tools knows ({why}): "
        f"install transformers{SUPPORTED}, or a newer moe-tools"
    )


def _is_converted(model: Any) -> bool:
    return getattr(model.config, "moe_tools", None) is not None


def lacks(model: Any) -> str | None:
    """Which modules of ours a model's config names and the model has not; None: it is complete."""
    block = getattr(model.config, "moe_tools", None)
    if not isinstance(block, dict):
        return None
    from moe_tools.experts.experts import expert_ffns
    from moe_tools.hosts.input_threshold import thresholds_in
    from moe_tools.inference.prompt_ffn import prompt_ffns

    if block.get("router") is not None and not expert_ffns(model):
        return "routers"
    if len(thresholds_in(model)) < len(block.get("thresholds") or {}):
        return "thresholds"
    if block.get("prompt_share") is not None and not prompt_ffns(model):
        return "selection by the prompt"
    return None
