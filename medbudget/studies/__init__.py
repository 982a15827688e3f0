"""The paper's tables and figures as studies that run on a laptop, a GPU, a cluster or an array."""

from medbudget.studies.engines import clean, plan, run, simulate
from medbudget.studies.report import format_recorded, read_table, record_table, write_report
from medbudget.studies.tables import PRESETS, Study, StudySettings, make_study
from medbudget.studies.tasks import Store, Task

__all__ = [
    "PRESETS",
    "Store",
    "Study",
    "StudySettings",
    "Task",
    "clean",
    "format_recorded",
    "make_study",
    "plan",
    "read_table",
    "record_table",
    "run",
    "simulate",
    "write_report",
]
