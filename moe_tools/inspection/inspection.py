"""Collects what routers decided on a text: aggregates of all tokens, and the first ones whole.

Letters: T tokens, E experts, K tokens kept an expert, L FFNs of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.intervene import FFNName, check_expert, ffn_name
from moe_tools.inspection.kept import Decisions, Kept
from moe_tools.inspection.records import (
    Bin,
    Decision,
    ExpertSummary,
    FFNSummary,
    Likeness,
    Pair,
    Response,
    Score,
    Use,
)
from moe_tools.inspection.similarity import Similarity
from moe_tools.inspection.table import Table
from moe_tools.inspection.tally import MOST_PAIRED, Tally
from moe_tools.inspection.watch import BEFORE, NOTHING, Seen, Tokens


class Inspection:
    """Grows while a model runs under `inspecting`; its tables are those of the moment."""

    def __init__(
        self,
        ffns: Mapping[str, ExpertFFN],
        stacks: list[list[str]],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        keep: int,
        top: int,
    ) -> None:
        self.ffns = ffns
        """Name -> FFN, for the FFNs that are inspected."""
        self.tokenizer = tokenizer
        self.tokens = 0
        """Tokens that the model saw, without padding; an encoder-decoder's on both sides."""
        self.tallies = {name: Tally(ffn, top) for name, ffn in ffns.items()}
        self.kept = Kept(list(ffns), keep)
        sizes = {name: ffn.division.num_experts for name, ffn in ffns.items()}
        self._stacks = [Similarity(names, [sizes[n] for n in names]) for names in stacks]
        self._stack_of = {name: stack for stack in self._stacks for name in stack.names}

    def begin(self, tokens: Tokens) -> None:
        """Notes that a forward pass begins."""
        self.tokens += len(tokens.ids_T)
        self.kept.begin(tokens)

    def see(self, seen: Seen) -> None:
        """Adds what one FFN decided in a forward pass."""
        self.tallies[seen.ffn.name].add(seen)
        self.kept.add(seen)
        self._stack_of[seen.ffn.name].add(seen)

    @property
    def sparsity(self) -> float:
        """Share of neurons off, over tokens and FFNs, each FFN weighed by the tokens it saw."""
        seen = sum(tally.tokens * tally.division.neurons for tally in self.tallies.values())
        return 1 - sum(tally.neurons_on for tally in self.tallies.values()) / seen

    @property
    def summaries(self) -> Table[FFNSummary]:
        """A row for each FFN; NaN where a figure needs tokens and the FFN saw none."""
        return Table.of(FFNSummary, (_summary(name, t) for name, t in self.tallies.items()))

    @property
    def experts(self) -> Table[ExpertSummary]:
        """A row for each expert."""
        return Table.of(
            ExpertSummary,
            (row for name, tally in self.tallies.items() for row in _experts(name, tally)),
        )

    @property
    def margins(self) -> Table[Bin]:
        """How far scores were from the threshold, FFN by FFN; shared experts are not counted."""
        return Table.of(
            Bin,
            (
                Bin(name, low, high, count)
                for name, tally in self.tallies.items()
                for low, high, count in zip(
                    tally.margins.edges[:-1],
                    tally.margins.edges[1:],
                    tally.margins.counts.tolist(),
                    strict=True,
                )
            ),
        )

    @property
    def similarity(self) -> Table[Likeness]:
        """A row for every two FFNs of a stack, in both orders, and for each with itself."""
        rows = []
        for stack in self._stacks:
            cka = stack.cka_LL().tolist()
            rows += [
                Likeness(name, other, cka[i][j])
                for i, name in enumerate(stack.names)
                for j, other in enumerate(stack.names)
            ]
        return Table.of(Likeness, rows)

    @property
    def decisions(self) -> Table[Decision]:
        """A row for each kept token in each FFN."""
        texts = [self.text([token]) for token in self.kept.ids_T.tolist()]
        return Table.of(
            Decision,
            (
                row
                for name in self.ffns
                if (found := self.kept.of(name)) is not None
                for row in _decisions(name, found, texts)
            ),
        )

    def scores(self, ffn: FFNName) -> Table[Score]:
        """A row for each kept token and each expert of one FFN.

        Raises:
            ValueError: no such FFN among those that are inspected.
        """
        name = ffn_name(self.ffns, ffn)
        found, experts = self.kept.of(name), self.ffns[name].division.num_experts
        count = 0 if found is None else found.mask_TE.numel()
        number_T = np.zeros(0) if found is None else found.number_T.numpy()
        flat = [] if found is None else [v.flatten().numpy() for v in found[1:4]]
        scores, selected, margin = flat or [np.zeros(0), np.zeros(0, bool), np.zeros(0)]
        columns = {
            "ffn": np.full(count, name, dtype=object),
            "token": np.repeat(number_T, experts),
            "expert": np.tile(np.arange(experts), len(number_T)),
            "score": scores,
            "margin": margin,
            "selected": selected,
        }
        return Table(Score, columns)

    def coselection(self, ffn: FFNName) -> Table[Pair]:
        """A row for every two experts of one FFN, over all tokens.

        Raises:
            ValueError: no such FFN, or one with more than `MOST_PAIRED` experts.
        """
        name = ffn_name(self.ffns, ffn)
        tally = self.tallies[name]
        if tally.pairs_EE is None:
            raise ValueError(
                f"{name} has {tally.division.num_experts} experts: pairs are counted of at most "
                f"{MOST_PAIRED}"
            )
        one, other = np.triu_indices(tally.division.num_experts, 1)
        both, load = tally.pairs_EE.numpy()[one, other], tally.load_E.numpy()
        either = load[one] + load[other] - both
        with np.errstate(divide="ignore", invalid="ignore"):
            lift = both * tally.tokens / (load[one] * load[other])
        columns = {
            "ffn": np.full(len(one), name, dtype=object),
            "expert": one,
            "other": other,
            "both": both,
            "jaccard": both / np.maximum(either, 1),
            "lift": lift,
        }
        return Table(Pair, columns)

    def responses(self, ffn: FFNName, expert: int) -> Table[Response]:
        """The tokens that one expert scored highest, the highest first.

        Raises:
            ValueError: no such FFN or expert.
        """
        name = ffn_name(self.ffns, ffn)
        check_expert(self.ffns[name], expert)
        found = self.tallies[name].responses
        return Table.of(
            Response,
            (
                Response(
                    name,
                    expert,
                    rank,
                    found.score_EK[expert, rank].item(),
                    bool(found.selected_EK[expert, rank]),
                    number,
                    *self.split_text(found.window_EKC[expert, rank]),
                )
                for rank, number in enumerate(found.number_EK[expert].tolist())
                if number != NOTHING
            ),
        )

    def text(self, ids: list[int]) -> str:
        """The text of tokens; their numbers where there is no tokenizer."""
        known = [token for token in ids if token != NOTHING]
        if self.tokenizer is None:
            return "".join(f"<{token}>" for token in known)
        return str(self.tokenizer.decode(known, clean_up_tokenization_spaces=False))

    def split_text(self, window_C: Tensor) -> tuple[str, str, str]:
        """The text before a token, of the token, and after it."""
        ids = window_C.tolist()
        return (
            self.text(ids[:BEFORE]),
            self.text(ids[BEFORE : BEFORE + 1]),
            self.text(ids[BEFORE + 1 :]),
        )


def _summary(name: str, tally: Tally) -> FFNSummary:
    tokens = tally.tokens
    uses = [_use(load, tokens) for load in tally.load_E.tolist()]
    return FFNSummary(
        ffn=name,
        tokens=tokens,
        num_experts=len(uses),
        sparsity=1 - tally.neurons_on / (tokens * tally.division.neurons) if tokens else math.nan,
        experts_on=int(tally.load_E.sum()) / tokens if tokens else math.nan,
        dead=uses.count("dead"),
        always_on=uses.count("always on"),
        entropy=_entropy(tally.load_E),
        near=tally.near / (tokens * (len(uses) - tally.shared)) if tokens else math.nan,
        captured=tally.captured / tally.measured if tally.measured else math.nan,
    )


def _experts(name: str, tally: Tally) -> list[ExpertSummary]:
    tokens = max(1, tally.tokens)
    mass_E = tally.norm_E / tally.norm_E.sum()  # 0 / 0 is NaN: not measured
    rows = zip(
        tally.division.sizes,
        tally.load_E.tolist(),
        tally.score_E.tolist(),
        mass_E.tolist(),
        strict=True,
    )
    return [
        ExpertSummary(
            name, expert, neurons, load / tokens, _use(load, tally.tokens), score / tokens, mass
        )
        for expert, (neurons, load, score, mass) in enumerate(rows)
    ]


def _decisions(name: str, found: Decisions, texts: list[str]) -> list[Decision]:
    nearest_T = found.margin_TE.gather(1, found.margin_TE.abs().argmin(1, keepdim=True))[:, 0]
    return [
        Decision(
            name,
            number,
            texts[number],
            tuple(torch.nonzero(found.mask_TE[row])[:, 0].tolist()),
            found.mask_TE[row].float().mean().item(),
            nearest_T[row].item(),
            found.captured_T[row].item(),
        )
        for row, number in enumerate(found.number_T.tolist())
    ]


def _use(load: int, tokens: int) -> Use:
    if load == 0:
        return "dead"
    return "always on" if load == tokens else "used"


def _entropy(load_E: Tensor) -> float:
    """Entropy of the loads as a distribution, over log E; NaN without load, 1 for one expert."""
    if len(load_E) == 1:
        return 1.0
    share_E = load_E.double() / load_E.sum()
    return float(torch.special.entr(share_E).sum() / math.log(len(load_E)))
