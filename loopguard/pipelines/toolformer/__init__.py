"""A loop in the manner of Toolformer and expert iteration, trained from nothing on the CPU. See docs/toolformer.md.

from loopguard.pipelines.toolformer import ToolformerOptions, parse_plant, prepare, run
"""

from loopguard.pipelines.toolformer.faults import FAULTS, Plant, parse_plant
from loopguard.pipelines.toolformer.loop import ToolformerResult, run
from loopguard.pipelines.toolformer.settings import ToolformerOptions
from loopguard.pipelines.toolformer.task import Task, prepare

__all__ = ["FAULTS", "Plant", "Task", "ToolformerOptions", "ToolformerResult", "parse_plant", "prepare", "run"]
