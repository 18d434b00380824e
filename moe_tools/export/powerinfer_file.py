"""A file for PowerInfer, read back: its FFNs and its logits, as that program computes them.

The numbers are those of the file and the products are in fp32, where PowerInfer also rounds what
enters a product to f16. A layer is in memory while it is used, and no other.

Letters: B blocks, T tokens, D width of the model, F neurons, K units between a predictor's layers,
V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_tools.checkpoint.broken import named_errors
from moe_tools.export.gguf import EMBEDDING, HEAD
from moe_tools.export.plan import FFNOutput, Written
from moe_tools.extras import needed

MAGIC = b"PWRI"
"""In place of `GGUF`: a file with predictors."""
THRESHOLD_KEY = "powerinfer.sparse_threshold"
THRESHOLD = 2.0**-100
"""The least that runs. Not 0: PowerInfer runs a neuron at the threshold itself, so that a token at
which no unit of a predictor is above 0 would run all neurons; ours runs none."""


class PowerInferFile(Written):
    """The model of a file.

    Raises:
        ValueError: no file of PowerInfer, or a truncated one.
    """

    def __init__(self, place: Path) -> None:
        with named_errors(f"cannot read {place}: "):
            reader = _reader(place)
            self.tensors = {tensor.name: tensor.data for tensor in reader.tensors}
            values = reader.fields
            self.arch: str = values["general.architecture"].contents()
            self.layers = int(self._said(values, "block_count"))
            self.heads = int(self._said(values, "attention.head_count"))
            self.groups = int(self._said(values, "attention.head_count_kv"))
            self.base = float(self._said(values, "rope.freq_base"))
            self.eps = float(self._said(values, "attention.layer_norm_rms_epsilon"))
            self.threshold = float(values[THRESHOLD_KEY].contents())

    def _said(self, values: dict[str, Any], key: str) -> Any:
        return values[f"{self.arch}.{key}"].contents()

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """A tensor in fp32."""
        full = name if layer is None else f"blk.{layer}.{name}.weight"
        return torch.from_numpy(self.tensors[full]).float()

    @torch.no_grad()
    def ffn(self, layer: int, x_TD: Tensor, residual_TD: Tensor) -> FFNOutput:
        """y_TD, and which neurons ran."""
        x_TD, residual_TD = x_TD.float(), residual_TD.float()
        hidden_TK = F.relu(residual_TD @ self.tensor("fc1", layer).T)
        mask_TF = ~(hidden_TK @ self.tensor("fc2", layer).T < self.threshold)
        gate_TF = F.relu(x_TD @ self.tensor("ffn_gate", layer).T)
        up_TF = x_TD @ self.tensor("ffn_up", layer).T
        h_TF = gate_TF * (F.relu(up_TF) if self.arch == "bamboo" else up_TF)
        return FFNOutput((h_TF * mask_TF) @ self.tensor("ffn_down_t", layer), mask_TF)

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV."""
        # numpy reads the rows that are asked for, of a file as large as the disk allows
        rows = self.tensors[EMBEDDING][ids_BT.cpu().numpy()]
        residual_BTD = torch.from_numpy(rows).float()
        for layer in range(self.layers):
            x_BTD = self._norm(residual_BTD, self.tensor("attn_norm", layer))
            residual_BTD = residual_BTD + self._attention(layer, x_BTD)
            x_BTD = self._norm(residual_BTD, self.tensor("ffn_norm", layer))
            residual_BTD = residual_BTD + self.ffn(layer, x_BTD, residual_BTD).y_TD
        x_BTD = self._norm(residual_BTD, self.tensor("output_norm.weight"))
        return x_BTD @ self.tensor(HEAD).T

    def _norm(self, residual_BTD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(residual_BTD, weight_D.shape, weight_D, self.eps)

    def _attention(self, layer: int, x_BTD: Tensor) -> Tensor:
        """Letters: H heads of q, G of k and v, C numbers of a head."""
        q_BHTC = self._rotated(self._heads(x_BTD, self.tensor("attn_q", layer), self.heads))
        k_BGTC = self._rotated(self._heads(x_BTD, self.tensor("attn_k", layer), self.groups))
        v_BGTC = self._heads(x_BTD, self.tensor("attn_v", layer), self.groups)
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BGTC, v_BGTC, is_causal=True, enable_gqa=True
        )
        return y_BHTC.transpose(1, 2).flatten(2) @ self.tensor("attn_output", layer).T

    def _heads(self, x_BTD: Tensor, weight: Tensor, heads: int) -> Tensor:
        return (x_BTD @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _rotated(self, x_BHTC: Tensor) -> Tensor:
        """Pairs of neighbours turned by their positions."""
        tokens, numbers = x_BHTC.shape[-2:]
        turns = self.base ** -(torch.arange(0, numbers, 2) / numbers)
        angles = torch.arange(tokens)[:, None] * turns
        pairs = torch.view_as_complex(x_BHTC.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)


def _reader(place: Path) -> Any:
    """The file as gguf reads one whose first word is its own; nothing is copied."""
    gguf = needed("gguf", "gguf", f"reading {place.name}")

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """With the first word turned back, in memory alone."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            if bytes(mapped[:4]) != MAGIC:
                raise ValueError("this is no file for PowerInfer: its first word is not PWRI")
            mapped[:4] = list(b"GGUF")
            self._data = mapped

    return Reader(place, "c")  # copy on write
