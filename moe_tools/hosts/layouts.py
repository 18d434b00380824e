"""Where each family keeps its FFNs: the only file that knows a host's names. A family is a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The parts of an FFN, as paths below the host module that holds them all."""

    up: str
    down: str
    act: str
    gate: str | None = None
    """The GLU projection; the same path as `up` when one linear holds gate rows, then up rows."""
    interleaved: bool = False
    """Gate and up rows alternate in the fused linear."""
    hidden_dropout: str | None = None
    """Dropout between the activation and the down projection."""
    output_dropout: str | None = None
    """Dropout after the down projection, where the FFN itself applies it."""
    casts_down: bool = False
    """The host casts h to the dtype of the down projection: T5 keeps that one in fp32 when it is
    loaded in fp16."""
    slot: str = ""
    """What our module replaces; empty: the holder itself."""
    bypass: tuple[str, ...] = ()
    """Parts the host calls outside the slot: they become Identity."""
    act_key: str = "hidden_act"
    """Key of the host's config that names the activation."""
    act_source: tuple[str, str] | None = None
    """The key that this one is computed from when a config is read, and the form of its value."""

    def parts(self) -> tuple[str, ...]:
        """Every path, each once, in the order of the forward pass."""
        paths = (self.gate, self.up, self.act, self.hidden_dropout, self.down, self.output_dropout)
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    def name_activation(self, config: Any, name: str) -> str:
        """Writes the name of an activation into a host's config; returns the one that was there."""
        before: str = getattr(config, self.act_key)
        setattr(config, self.act_key, name)
        if self.act_source is not None:
            key, form = self.act_source
            setattr(config, key, form.format(name))
        return before


_GATED = Layout(gate="gate_proj", up="up_proj", act="act_fn", down="down_proj")
_GEMMA2 = replace(_GATED, act_key="hidden_activation")
_FUSED = Layout(gate="gate_up_proj", up="gate_up_proj", act="activation_fn", down="down_proj")
_BERT = Layout(
    up="intermediate.dense",
    act="intermediate.intermediate_act_fn",
    down="output.dense",
    slot="intermediate",
    bypass=("output.dense",),
)
_T5 = Layout(
    up="wi",
    act="act",
    down="wo",
    hidden_dropout="dropout",
    casts_down=True,
    act_key="dense_act_fn",
    act_source=("feed_forward_proj", "{}"),
)

LAYOUTS: dict[str, Layout] = {
    "LlamaMLP": _GATED,
    "MistralMLP": _GATED,
    "Qwen2MLP": _GATED,
    "Qwen3MLP": _GATED,
    "GemmaMLP": _GATED,
    "Qwen2MoeMLP": _GATED,
    "Qwen3MoeMLP": _GATED,
    "Gemma2MLP": _GEMMA2,
    "Gemma3MLP": _GEMMA2,
    "Phi3MLP": _FUSED,
    "HostExpert": _FUSED,
    "InterleavedExpert": replace(_FUSED, interleaved=True),
    "SeparateExpert": replace(_GATED, act="activation_fn"),
    "UngatedExpert": Layout(
        up="up_proj", act="activation_fn", down="down_proj", act_key="mlp_hidden_act"
    ),
    "GPT2MLP": Layout(
        up="c_fc",
        act="act",
        down="c_proj",
        output_dropout="dropout",
        act_key="activation_function",
    ),
    "GPTNeoXMLP": Layout(up="dense_h_to_4h", act="act", down="dense_4h_to_h"),
    "OPTDecoderLayer": Layout(
        up="fc1",
        act="activation_fn",
        down="fc2",
        slot="fc1",
        bypass=("activation_fn", "fc2"),
        act_key="activation_function",
    ),
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "T5DenseActDense": _T5,
    "T5DenseGatedActDense": replace(
        _T5, gate="wi_0", up="wi_1", act_source=("feed_forward_proj", "gated-{}")
    ),
}
"""Class of the host module that holds an FFN -> where its parts are."""

ALSO_ACTIVATED = {"BertPredictionHeadTransform": "transform_act_fn"}
"""Class of a host module outside the FFNs -> its activation, which the same key names."""

FAMILIES = (
    "llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3 (text), phi3, gpt2, gpt_neox, opt, "
    "bert, roberta, t5, gpt_oss, nemotron_h, beam, inkling (text), llama4 (text), longcat_flash, "
    "mixtral, qwen2_moe, qwen3_moe, olmoe"
)


def child_name(layout: Layout, path: str) -> str:
    """What a part is called inside our module: its host name wherever it already lived there."""
    inside = f"{layout.slot}." if layout.slot else ""
    return path.removeprefix(inside) if path.startswith(inside) else path.replace(".", "_")


def inside(layout: Layout) -> Layout:
    """The layout of our module: the parts of `layout`, as paths below it."""
    return replace(
        layout,
        up=child_name(layout, layout.up),
        down=child_name(layout, layout.down),
        act=child_name(layout, layout.act),
        gate=None if layout.gate is None else child_name(layout, layout.gate),
        slot="",
        bypass=(),
    )


def host_names(name: str, layout: Layout) -> dict[str, str]:
    """Prefixes of our module's tensors -> the host's own, where the two differ."""
    holder = name.removesuffix(layout.slot).removesuffix(".")
    pairs = {
        f"{name}.{child_name(layout, path)}.": f"{join(holder, path)}." for path in layout.parts()
    }
    return {ours: host for ours, host in pairs.items() if ours != host}


def join(holder: str, path: str) -> str:
    """The path of a part, from the path of its holder; either may be empty."""
    return ".".join(part for part in (holder, path) if part)
