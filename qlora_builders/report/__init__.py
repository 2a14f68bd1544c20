"""Runs as one self-contained HTML page: `read_run` reads a directory, `write_report` writes."""

from qlora_builders.report.page import report_page, write_report
from qlora_builders.report.run import AVERAGED, Run, final_figures, find_runs, read_run

__all__ = [
    "AVERAGED",
    "Run",
    "final_figures",
    "find_runs",
    "read_run",
    "report_page",
    "write_report",
]
