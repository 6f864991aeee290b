"""The pages about a study in this repository are those that its result files give."""

import shutil
from pathlib import Path

import pytest
from tiny import REPOSITORY

from nuclei_d2.study.plan import load_study
from nuclei_d2.study.report import write_report

STUDIES = [
    path.relative_to(REPOSITORY)
    for path in sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
    if (REPOSITORY / "results" / path.stem).is_dir()
]


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_the_report_is_that_of_the_committed_results(tmp_path, monkeypatch, path):
    for folder in ("configs", "results"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    for page in ("README.md", "MODEL_ZOO.md"):
        shutil.copy(REPOSITORY / page, tmp_path / page)
    monkeypatch.chdir(tmp_path)
    written = write_report(load_study(path), path.as_posix())
    texts = [file for file in written if file.suffix != ".svg"]  # drawn by matplotlib, as it likes
    assert {file.suffix for file in texts} == {".md", ".csv"}
    for file in map(Path, texts):
        assert file.read_bytes() == (REPOSITORY / file).read_bytes(), f"{file}: write it again"
