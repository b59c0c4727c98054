"""`stage=report`: writes report.html of a run, or of its comparison with other runs, from the files that exist."""

from __future__ import annotations

from trainer.comparison.subjects import comparison_folder, run_folders
from trainer.config.schema import Run
from trainer.core.console import print_line
from trainer.core.errors import UsageError
from trainer.report.write import REPORT, latest_evaluation, write_report


def execute(run: Run) -> None:
    """Writes the report; needs neither weights nor the dataset. Raises errors.UsageError if nothing was compared."""
    folders = run_folders(run)
    if len(folders) == 1:
        path, evaluation = folders[0] / REPORT, latest_evaluation(folders[0])
    else:
        evaluation = comparison_folder(run, folders)
        path = evaluation / REPORT
        if not evaluation.is_dir():
            names = ",".join(run.evaluation.against)
            raise UsageError(
                f"{' and '.join(folder.name for folder in folders)} have not been compared yet; type stage=evaluate "
                f"run={run.run} 'evaluation.against=[{names}]'"
            )
    write_report(path, folders, evaluation)
    print_line(f"report {path}")
