"""The orchestrator: one actor, many rollout workers, and rewards that block neither. It needs no GPU and no torch.

Owns scheduling, staleness, sync and fencing, events and resume. Must not know processes, torch or tasks' names.

    python -c "from lib.orchestrator import DataOrder; print(DataOrder(range(8), prompts=2, seed=0).batch(0))"
"""

from lib.orchestrator.fleet import FleetError
from lib.orchestrator.hosts import Hosts
from lib.orchestrator.order import DataOrder
from lib.orchestrator.plan import Plan
from lib.orchestrator.training import OrchestratorError, sampling_of, train

__all__ = ["DataOrder", "FleetError", "Hosts", "OrchestratorError", "Plan", "sampling_of", "train"]
