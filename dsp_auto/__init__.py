"""Runs an unmodified PyTorch model on N devices by sharding its sequence dims, with the least communication."""

from .errors import (
    AgreementError,
    CaptureError,
    DspError,
    InfeasibleError,
    LayoutError,
    MeshError,
    NoShardableFactorError,
    RuleError,
    StrategyError,
)
from .parallelize import ParallelModule, parallelize
from .plan import Plan
from .planner import plan

__all__ = [
    "AgreementError",
    "CaptureError",
    "DspError",
    "InfeasibleError",
    "LayoutError",
    "MeshError",
    "NoShardableFactorError",
    "ParallelModule",
    "Plan",
    "RuleError",
    "StrategyError",
    "parallelize",
    "plan",
]
