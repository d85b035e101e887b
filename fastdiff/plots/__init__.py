"""Pictures of what happens: the forward process, a trajectory, schedules and plans.

``forward`` and ``trajectory`` return images of Pillow; ``schedule`` and ``plan``, figures of matplotlib (the extra
"plot"). Notebooks display both.
"""

from fastdiff.plan.plot import figure as plan
from fastdiff.plots.schedules import figure as schedule
from fastdiff.plots.strips import forward, trajectory

__all__ = ["forward", "plan", "schedule", "trajectory"]
