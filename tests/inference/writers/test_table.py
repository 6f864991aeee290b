import numpy as np
import pandas as pd

from nuclei_d2.inference.writers.measurements import measure
from nuclei_d2.inference.writers.table import write_table


def test_pandas_reads_the_measurements(tmp_path, draw_nuclei):
    nuclei, _, image = draw_nuclei(5)
    write_table(tmp_path / "a.csv", nuclei, image)
    table = pd.read_csv(tmp_path / "a.csv")
    columns = measure(nuclei, image)
    assert list(table) == list(columns)
    for name, column in columns.items():
        np.testing.assert_allclose(table[name].astype(float), column.astype(float), rtol=1e-6)
    assert table["touches_image_edge"].dtype == bool


def test_missing_values_and_names_with_commas(tmp_path, from_drawings, blank):
    measures = {'a "b", µ': np.array([np.nan, 0.1 + 0.2])}
    write_table(tmp_path / "a.csv", from_drawings(("X", 0, 0), ("X", 2, 2), **measures), blank)
    table = pd.read_csv(tmp_path / "a.csv")
    assert table['a "b", µ'].isna().tolist() == [True, False]
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").endswith(",0.3\n")


def test_no_nuclei(tmp_path, no_nuclei, blank):
    write_table(tmp_path / "a.csv", no_nuclei, blank)
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 0
    assert list(table) == list(measure(no_nuclei, blank))
    assert list(table)[:2] == ["label", "score"]
    assert list(table)[-1] == "quality"
