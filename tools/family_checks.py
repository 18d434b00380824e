"""What is checked of one family: its twin is found, proven, converted, saved, loaded, and used."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import every_expert_on
from moe_tools.hosts.ffn import FFN, find_ffns, permute_neurons
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.proof import settle
from moe_tools.hosts.twin import build_twin, shrink
from tools.family_words import experts_of, layouts_of

CONVERSION = Conversion("donor", 8, "sigmoid", {"kind": "threshold", "tau": 0.5})
NEAR = 1e-5
"""Largest difference of logits, relative to the largest logit, that is rounding in fp32."""
NEW_TOKENS = 4
ODD_WIDTHS = (20, 36, 24, 40, 32)
"""Tried in this order: rotations and groups do not fit every one."""
ODD_NEURONS = (45, 46)
SWITCHES = ("mlp_bias", "use_bias", "attention_bias", "tie_word_embeddings")
"""Turned on in an odd twin, where the family has them."""

Status = Literal["ok", "exact", "near", "failed", "skipped"]


@dataclass(frozen=True)
class Family:
    """A family that transformers can build for one task."""

    kind: str
    """causal, masked or seq2seq."""
    name: str
    """The model type."""
    model_class: str


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    status: Status
    difference: float = 0.0
    """The largest one, relative to the largest logit."""
    why: str = ""
    """The reason of a failure, in one line."""

    def __str__(self) -> str:
        if self.status == "near":
            return f"{self.difference:.0e}"
        return self.why if self.status == "failed" else self.status


@dataclass
class Report:
    """All outcomes of one family."""

    family: Family
    layouts: str = ""
    experts: str = ""
    neurons: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether every check passed, and no logit differs."""
        return all(outcome.status in ("ok", "exact") for outcome in self.checked)

    @property
    def passes(self) -> bool:
        """Whether every check passed, up to rounding."""
        return all(outcome.status != "failed" for outcome in self.checked)

    @property
    def checked(self) -> list[Outcome]:
        """Every outcome but those that ask for what the family has not."""
        return [outcome for outcome in self.outcomes.values() if outcome.status != "skipped"]

    @property
    def failure(self) -> str:
        """The first check that failed, and why; empty: none did."""
        failed = (
            f"{name}: {outcome.why}"
            for name, outcome in self.outcomes.items()
            if outcome.status == "failed"
        )
        return next(failed, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class Skip(Exception):
    """A check that a family cannot have."""


class _Run:
    """One family on its way through the checks."""

    def __init__(self, family: Family, seed: int, odd: bool, folder: Path) -> None:
        self.family, self.seed, self.odd, self.folder = family, seed, odd, folder
        self.donor: PreTrainedModel
        self.routed: PreTrainedModel
        self.expected: Tensor
        self.ffns: list[FFN] = []

    def build(self) -> Outcome:
        self.donor = twin_of(self.family, self.seed, self.odd)
        return Outcome("ok")

    def run(self) -> Outcome:
        self.expected = logits(self.donor)
        if not self.expected.isfinite().all():
            raise ValueError("logits are not finite")
        return Outcome("ok")

    def find(self) -> Outcome:
        self.ffns = find_ffns(self.donor)
        return Outcome("ok")

    def prove(self) -> Outcome:
        settle(self.donor)
        self.ffns = find_ffns(self.donor)
        return Outcome("ok")

    def permute(self) -> Outcome:
        model = copy.deepcopy(self.donor)
        for ffn in find_ffns(model):
            permute_neurons(ffn, torch.randperm(len(ffn.weights().down_FD)))
        return compare(logits(model), self.expected)

    def attach(self) -> Outcome:
        self.routed = copy.deepcopy(self.donor)
        for ffn in attach_experts(self.routed, CONVERSION):
            for parameter in ffn.router.parameters():  # a fresh one starts with every expert on
                parameter.normal_()
        return Outcome("ok")

    def all_on(self) -> Outcome:
        if torch.equal(logits(self.routed), self.expected):
            raise ValueError("no expert that is off changes a logit")
        with every_expert_on(self.routed):
            return compare(logits(self.routed), self.expected)

    def save(self) -> Outcome:
        save(self.routed, self.folder)
        return Outcome("ok")

    def load(self) -> Outcome:
        return compare(logits(_plain(load(self.folder))), logits(self.routed))

    def stock(self) -> Outcome:
        with transformers_patched(False), quiet_transformers():
            model = type(self.donor).from_pretrained(self.folder)
        return compare(logits(_plain(model)), self.expected)

    def generate(self) -> Outcome:
        if self.family.kind == "masked":
            raise Skip
        try:
            expected = _generated(self.donor)
        except Exception as error:
            raise Skip from error  # the donor cannot: nothing to compare with
        with every_expert_on(self.routed):
            found = _generated(self.routed)
        if not torch.equal(found, expected):
            raise ValueError("other tokens than the dense model's")
        return Outcome("exact")


CHECKS = (
    "build", "run", "find", "prove", "permute", "attach", "all_on", "save", "load", "stock",
    "generate",
)  # fmt: skip
"""In this order; methods of `_Run`."""
NEEDED = {"build", "run", "find", "attach", "save"}
"""After one of these has failed, there is nothing left to check."""


def check(family: Family, *, seed: int = 0, odd: bool = False) -> Report:
    """Runs every check of a family; a failure is an outcome, never an exception.

    Args:
        family: which one.
        seed: of the twin's weights, the permutations and the routers.
        odd: a width and neurons that no power of two divides, biases, tied embeddings.
    """
    report, start = Report(family), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = _Run(family, seed, odd, Path(folder, "model"))
        for name in CHECKS:
            torch.manual_seed(seed)
            outcome = _outcome(getattr(run, name))
            report.outcomes[name] = outcome
            if outcome.status == "failed" and name in NEEDED:
                break
        if "run" in report.outcomes:
            report.experts = experts_of(run.donor)
        report.layouts = layouts_of(run.ffns)
        report.neurons = ", ".join(
            str(n) for n in sorted({len(ffn.weights().down_FD) for ffn in run.ffns})
        )
    report.seconds = round(time.perf_counter() - start, 2)
    return report


def _outcome(step: Callable[[], Outcome]) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a family: nobody's business here
            return step()
    except Skip:
        return Outcome("skipped")
    except Exception as error:  # whatever a family does is an entry of the table
        said = " ".join(str(error).split()) or type(error).__name__
        named = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        return Outcome("failed", why=named[:300])


def twin_of(family: Family, seed: int = 0, odd: bool = False) -> PreTrainedModel:
    """Builds the twin of a family's default configuration.

    Raises:
        ValueError: it cannot be built, with the reason.
    """
    model_class = getattr(transformers, family.model_class)
    config = CONFIG_MAPPING[family.name]()
    if odd:
        return _odd_twin(model_class, config, seed)
    return build_twin(model_class, shrink(config), seed=seed)


def _odd_twin(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int
) -> PreTrainedModel:
    """The oddest twin that runs."""
    switched = _switched(config)
    attempts = [
        (each, width, neurons)
        for each in (switched, config)
        for neurons in ODD_NEURONS
        for width in ODD_WIDTHS
    ]
    for each, width, neurons in attempts[:-1]:
        try:
            model = build_twin(model_class, shrink(each, width=width, neurons=neurons), seed=seed)
            logits(model)
        except Exception:  # one of the donor's own rules about its sizes
            continue
        return model
    return build_twin(model_class, shrink(config, width=width, neurons=neurons), seed=seed)


def _switched(config: PreTrainedConfig) -> PreTrainedConfig:
    """With biases, tied embeddings, and multipliers that are not 1."""
    config = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            vars(config)[key] = _switched(value)
        elif key in SWITCHES and value is False:
            vars(config)[key] = True
        elif "multiplier" in key and value == 1.0:
            vars(config)[key] = 1.3
        elif key == "mlp_multipliers":
            vars(config)[key] = [1.3, 0.7]
    return config


def tokens() -> Tensor:
    """Two rows of nine tokens, none of them special."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits of `tokens`, drawn again in the same way where the model draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**model_inputs(model, tokens())).logits


def compare(found: Tensor, expected: Tensor) -> Outcome:
    """Equal to the bit, or up to rounding.

    Raises:
        ValueError: neither.
    """
    if torch.equal(found, expected):
        return Outcome("exact")
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= NEAR:
        raise ValueError(f"logits differ by {difference:.1e} of the largest")
    return Outcome("near", difference)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A loaded model that computes in the twin's way, in fresh memory: BLAS rounds by alignment."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return copy.deepcopy(model).eval()


def _generated(model: PreTrainedModel) -> Tensor:
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    ids = tokens()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generate: Any = model.generate
        return generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **start,
        )
