"""One self-contained HTML page of a run, or of several beside each other.

    qlora report RUN [RUN ...] [output=FILE]

A folder of runs, such as a sweep's, stands for all of them. Works on a run that is finished, still
going, or was stopped. Loss, learning rate, gradient norm, throughput and memory come from
metrics.jsonl; what each layer's adapter learned and what quantization costs there is measured on
the adapter and the base checkpoint, a tensor at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import ReportConfig
from qlora_builders.report import find_runs, read_run, write_report
from qlora_builders.visible import say


def main(cfg: ReportConfig) -> None:
    paths = [path for given in cfg.runs for path in find_runs(given)]
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    folder = runs[0].path if len(runs) == 1 else Path()
    output = Path(cfg.output) if cfg.output else folder / "report.html"
    say(f"wrote {write_report(runs, output)}")


if __name__ == "__main__":
    sys.exit(run_recipe(main, "report"))
