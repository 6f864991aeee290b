"""Writes everything that a study's result files say: paper, tables, figures, model zoo."""

from pathlib import Path

from nuclei_d2.study.collect import load_results
from nuclei_d2.study.figures import draw_figures
from nuclei_d2.study.findings import Findings
from nuclei_d2.study.paper import render_paper
from nuclei_d2.study.plan import Study
from nuclei_d2.study.tables import (
    curves_csv,
    differences_csv,
    metrics_csv,
    runs_csv,
    strata_csv,
)
from nuclei_d2.study.zoo import read_if_there, render_readme_block, render_zoo, replace_block
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path


def write_report(study: Study, study_file: str) -> list[Path]:
    """Write the paper, its figures, the CSV files, and the model zoo and README if asked for.

    The same result files give the same bytes.

    Args:
        study: its ``results_dir`` is all that is read.
        study_file: as the user gave it.

    Returns:
        The files.

    Raises:
        NucleiError: no run is collected yet, or a result file is broken.
    """
    findings = Findings(study, load_results(study))
    if not findings.results:
        raise NucleiError(f"{study.results_dir}: no results of {study.name} to report yet")
    page, tables = study.report_file, study.results_dir / "tables"
    texts = {
        **{
            tables / task.name / f"{test}.csv": metrics_csv(findings, task, test)
            for task in study.tasks.values()
            for test in task.test
            if findings.images(task, test)
        },
        tables / "differences.csv": differences_csv(findings),
        tables / "strata.csv": strata_csv(findings),
        tables / "runs.csv": runs_csv(findings),
        tables / "curves.csv": curves_csv(findings),
        page: render_paper(findings, study_file, page, tables),
    }
    if study.model_zoo:
        zoo = Path(study.model_zoo)
        texts[zoo] = render_zoo(findings, read_if_there(zoo))
    if study.readme:
        readme = Path(study.readme)
        block = render_readme_block(findings, page.as_posix())
        texts[readme] = replace_block(read_if_there(readme), "results", block)
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*texts, *draw_figures(findings, page.with_suffix(""))]
