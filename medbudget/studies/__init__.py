"""The paper's tables and figures as studies that run on a laptop, a GPU, a cluster or an array."""

from medbudget.studies.catalogue import STUDIES, make_study
from medbudget.studies.engines import run
from medbudget.studies.planning import Plan, clean, measure_speed, plan, simulate
from medbudget.studies.report import format_values, read_values, record_table, write_report
from medbudget.studies.tables import PRESETS, Study, StudySettings
from medbudget.studies.tasks import Store, Task

__all__ = [
    "PRESETS",
    "STUDIES",
    "Plan",
    "Store",
    "Study",
    "StudySettings",
    "Task",
    "clean",
    "format_values",
    "make_study",
    "measure_speed",
    "plan",
    "read_values",
    "record_table",
    "run",
    "simulate",
    "write_report",
]
