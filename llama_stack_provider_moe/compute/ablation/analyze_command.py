"""The figures and charts of measurements: the code of `moe-train ablate analyze`.

$ moe-train ablate analyze measured/measurements.safetensors --charts
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_stack_provider_moe.compute.ablation.analyze import analyze, text
from llama_stack_provider_moe.compute.ablation.charts import draw
from llama_stack_provider_moe.compute.ablation.measurements import read
from llama_stack_provider_moe.compute.ablation.report import DIRECTIONS_FILE, DirectionsReport
from llama_stack_provider_moe.compute.analysis.plots import MISSING, installed
from llama_stack_provider_moe.compute.data.local_sets import new_folder, say
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.spec.ablate_commands import AnalyzeCommand
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from llama_stack_provider_moe.spec.command_words import answered


def write_report(report: DirectionsReport, folder: Path, say: Callable[[str], None], with_charts: bool) -> list[Path]:
    """Write `directions.json`, and charts if asked for; without matplotlib a line says that there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / DIRECTIONS_FILE, report)
    if with_charts and not installed():
        say(MISSING)
    return [folder / DIRECTIONS_FILE, *(draw(report, folder) if with_charts and installed() else [])]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train ablate analyze`; returns 0 if the report was written."""
    return answered(AnalyzeCommand, argv, "ablate analyze", _run)


def _run(command: AnalyzeCommand) -> int:
    path = Path(command.measurements)
    if path.is_dir():
        path = path / MEASUREMENTS_FILE
    out = path.parent if command.out is None else Path(command.out)
    folder = new_folder(str(out), DIRECTIONS_FILE)
    report = analyze(read(path, "FILE"))
    written = write_report(report, folder, say, command.charts)
    names = ", ".join(map(str, written))
    print(report.model_dump_json() if command.as_json else f"{text(report)}\nwritten to {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
