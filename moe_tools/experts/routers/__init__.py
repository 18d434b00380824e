"""Routers score: the FFN's input in, one score per expert out."""

from __future__ import annotations

import inspect
from typing import Any

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import LearnedRouter, Router, RowReader
from moe_tools.experts.routers.bottleneck import BottleneckRouter
from moe_tools.experts.routers.few_bits import FewBitsRouter
from moe_tools.experts.routers.firing import Int8GateRouter, SignRouter
from moe_tools.experts.routers.gate import CATSRouter
from moe_tools.experts.routers.low_rank import LowRankRouter
from moe_tools.experts.routers.mlp import MLPRouter
from moe_tools.experts.routers.neurons import OracleRouter, RepresentativeRouter
from moe_tools.experts.routers.norm import NormRouter
from moe_tools.experts.routers.rows import MeanGateRouter, SimilarityRouter
from moe_tools.experts.routers.sigmoid import SigmoidRouter
from moe_tools.experts.routers.softmax import SoftmaxRouter
from moe_tools.hosts.ffn import FFN
from moe_tools.registry import Registry, unknown

__all__ = [
    "ROUTERS",
    "BottleneckRouter",
    "CATSRouter",
    "FewBitsRouter",
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
    "SoftmaxRouter",
    "build_router",
]

ROUTERS: Registry[type[Router]] = Registry(
    "router",
    {
        "sigmoid": SigmoidRouter,
        "bottleneck": BottleneckRouter,
        "softmax": SoftmaxRouter,
        "mlp": MLPRouter,
        "low_rank": LowRankRouter,
        "norm": NormRouter,
        "similarity": SimilarityRouter,
        "representative": RepresentativeRouter,
        "mean_gate": MeanGateRouter,
        "few_bits": FewBitsRouter,
        "cats": CATSRouter,
        "sign": SignRouter,
        "int8_gate": Int8GateRouter,
        "oracle": OracleRouter,
    },
)


def build_router(kind: str, options: dict[str, Any], ffn: FFN, importance: Importance) -> Router:
    """Builds a fresh router of a kind; its options are the parameters of its class with a default.

    Raises:
        ValueError: an unknown kind, or an option that it does not take.
    """
    router = ROUTERS[kind]
    parameters = inspect.signature(router).parameters.values()
    known = [each.name for each in parameters if each.default is not each.empty]
    for option in options:
        if option not in known:
            raise ValueError(f"router {kind} with {options}: {unknown('option', option, known)}")
    return router.build(ffn, importance, **options)
