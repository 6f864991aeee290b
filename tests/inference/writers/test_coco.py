import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nuclei_d2.data.datasets.coco import load_nuclei_json
from nuclei_d2.inference.writers.coco import write_coco


def test_read_back(tmp_path, draw_nuclei):
    nuclei, masks, image = draw_nuclei(5)
    write_coco(tmp_path / "a.coco.json", nuclei, image)
    coco = COCO(str(tmp_path / "a.coco.json"))
    (entry,) = coco.loadImgs(coco.getImgIds())
    assert entry == {"id": 7, "file_name": "a.tif", "height": 40, "width": 56}
    assert coco.getAnnIds() == list(range(1, len(nuclei) + 1))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["nucleus"]
    for k, annotation in coco.anns.items():
        np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), masks[k - 1])
        rows, columns = np.nonzero(masks[k - 1])
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == masks[k - 1].sum()
        assert annotation["score"] == nuclei.scores[k - 1]
        assert annotation["image_id"] == 7
        assert annotation["iscrowd"] == 0


def test_its_annotations_are_a_results_list(tmp_path, draw_nuclei):
    """As docs/outputs.md says: against itself every nucleus is found."""
    write_coco(tmp_path / "a.coco.json", *draw_nuclei(5)[::2])
    coco = COCO(str(tmp_path / "a.coco.json"))
    results = json.loads((tmp_path / "a.coco.json").read_text())["annotations"]
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_detectron2_loads_it(tmp_path, draw_nuclei):
    nuclei, _, image = draw_nuclei(5)
    write_coco(tmp_path / "a.coco.json", nuclei, image)
    (record,) = load_nuclei_json(tmp_path / "a.coco.json", tmp_path)
    assert len(record["annotations"]) == len(nuclei)


def test_no_nuclei(tmp_path, no_nuclei, blank):
    write_coco(tmp_path / "a.coco.json", no_nuclei, blank)
    coco = COCO(str(tmp_path / "a.coco.json"))
    assert (len(coco.imgs), len(coco.anns), len(coco.cats)) == (1, 0, 1)
