"""Runs an unmodified PyTorch model on N devices by sharding its sequence dims, with the least communication."""

from .compare import Comparison, compare
from .cost_models.state import TrainingState
from .errors import (
    AgreementError,
    CaptureError,
    CommunicationError,
    ConstraintError,
    DspError,
    InfeasibleError,
    LayoutError,
    MeshError,
    NoShardableFactorError,
    PlanError,
    ProofError,
    RuleError,
    StrategyError,
)
from .fit import Fit, fit
from .parallelize import ParallelModule, parallelize
from .passes.register import register_rule
from .plan import Plan
from .planner import plan
from .report import Report, report
from .verification import Verification, verify

__all__ = [
    "AgreementError",
    "CaptureError",
    "Comparison",
    "CommunicationError",
    "ConstraintError",
    "DspError",
    "Fit",
    "InfeasibleError",
    "LayoutError",
    "MeshError",
    "NoShardableFactorError",
    "ParallelModule",
    "Plan",
    "PlanError",
    "ProofError",
    "Report",
    "RuleError",
    "StrategyError",
    "TrainingState",
    "Verification",
    "compare",
    "fit",
    "parallelize",
    "plan",
    "register_rule",
    "report",
    "verify",
]
