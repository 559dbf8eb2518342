"""The dry run: what a configuration would cost on any number of ranks, by formula. Nothing is started.

`plan(config, layout, target)` says whether the layout is legal, and predicts parameters, FLOPs, memory by kind, bytes
communicated by axis and speed; `command.py` is the program `dla-plan`. No process group, device or weight is made.
Memory formulas follow what this code's autograd keeps and what its engines hold; tests/train/test_plan_memory.py and
test_plan_engines.py measure both.
"""

from dla_train.plan_run.layout import Check, Layout
from dla_train.plan_run.plan import Plan, plan
from dla_train.plan_run.report import report, table_markdown
from dla_train.plan_run.target import Target

__all__ = ["Check", "Layout", "Plan", "Target", "plan", "report", "table_markdown"]
