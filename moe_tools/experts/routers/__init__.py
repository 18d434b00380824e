"""Routers score: the FFN's input in, one score per expert out."""

from __future__ import annotations

from typing import Any

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import LearnedRouter, Router, RowReader
from moe_tools.experts.routers.few_bits import Int8GateRouter, SignRouter
from moe_tools.experts.routers.low_rank import LowRankRouter
from moe_tools.experts.routers.mlp import MLPRouter
from moe_tools.experts.routers.neurons import OracleRouter, RepresentativeRouter
from moe_tools.experts.routers.norm import NormRouter
from moe_tools.experts.routers.rows import MeanGateRouter, SimilarityRouter
from moe_tools.experts.routers.sigmoid import SigmoidRouter
from moe_tools.hosts.ffn import FFN
from moe_tools.registry import Registry

__all__ = [
    "ROUTERS",
    "Int8GateRouter",
    "LearnedRouter",
    "LowRankRouter",
    "MLPRouter",
    "MeanGateRouter",
    "NormRouter",
    "OracleRouter",
    "RepresentativeRouter",
    "Router",
    "RowReader",
    "SigmoidRouter",
    "SignRouter",
    "SimilarityRouter",
    "build_router",
]

ROUTERS: Registry[type[Router]] = Registry(
    "router",
    {
        "sigmoid": SigmoidRouter,
        "mlp": MLPRouter,
        "low_rank": LowRankRouter,
        "norm": NormRouter,
        "similarity": SimilarityRouter,
        "representative": RepresentativeRouter,
        "mean_gate": MeanGateRouter,
        "sign": SignRouter,
        "int8_gate": Int8GateRouter,
        "oracle": OracleRouter,
    },
)


def build_router(kind: str, options: dict[str, Any], ffn: FFN, importance: Importance) -> Router:
    """A fresh router of a kind.

    Raises:
        ValueError: an unknown kind, or options that it does not take.
    """
    router = ROUTERS[kind]
    try:
        return router.build(ffn, importance, **options)
    except TypeError as error:
        raise ValueError(f"router {kind} with {options}: {error}") from error
