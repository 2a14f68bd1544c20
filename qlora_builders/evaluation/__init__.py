"""What evaluate measures of a model, and which models it compares how."""

from qlora_builders.evaluation.measure import (
    Candidate,
    Figure,
    comparison_table,
    differences,
    figure_table,
    find_candidates,
    measure_answers,
    measure_rows,
)
from qlora_builders.evaluation.tasks import Tasks, find_tasks

__all__ = [
    "Candidate",
    "Figure",
    "Tasks",
    "comparison_table",
    "differences",
    "figure_table",
    "find_candidates",
    "find_tasks",
    "measure_answers",
    "measure_rows",
]
