"""The controller: one `LoopGuard` for a run, one `Cycle` for each pass of the loop.

It owns the order of things and nothing else. Every step is: listen for a freeze, let a gate decide, record, act. The
gates decide without acting; the learner (a file in `integrations/`) and the runtimes (in `sandbox/`) act without
deciding.

    guard      the run: its directory, its log, its freeze, its boundary snapshot
    cycle      one pass: tools, admission, updates, promotion
    ranks      what several ranks decide together
    ledger     which updates may be applied, and which were
    lastgood   the state that a freeze goes back to
    rollback   the way to an earlier one
    calls      the path of every tool call
    tools      a tool as the loop sees it, and a rollout with a cell of its own
    station    tools without a loop
    functions  tools for frameworks that call plain functions, and `source`, what of them can be sent to a cell
    environments  the same for classes, an instance for each rollout
    rewards    what a framework's rewards say, read before it counts
    quarantine where records go that are held back
    cells      the runtimes of a guard policy
    learner    what is asked of a framework's model, and who holds which
    observe    a run that is watched and never stopped
    watch      what a gate would have said of it
    diary      its log, which never stops it
    directory  what stands in a run directory, and what an interrupted run left open
"""

from loopguard.controller.cycle import Admitted, Cycle
from loopguard.controller.guard import LoopGuard
from loopguard.controller.learner import INTEGRATIONS, Learner, LoopState
from loopguard.controller.observe import ObservedCycle, Observer
from loopguard.controller.station import ToolStation
from loopguard.controller.tools import Episode, Tool

__all__ = [
    "INTEGRATIONS",
    "Admitted",
    "Cycle",
    "Episode",
    "Learner",
    "LoopGuard",
    "LoopState",
    "ObservedCycle",
    "Observer",
    "Tool",
    "ToolStation",
]
