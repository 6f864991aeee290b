"""StarDist's side of benchmark.py, run by an interpreter that has stardist and tensorflow.

Network, non-maximum suppression and label image, through StarDist's own ``predict_instances``. The
network is StarDist's default with the 2 x 2 grid of its published nuclei models; it is not trained.
It runs in full, and what it says is then replaced by the perfect maps of the true nuclei, made by
StarDist's own functions: the suppression costs what it would behind a good network.
"""

import json
import sys

import numpy as np
import stardist
import tensorflow
from benchmark_measure import measure_run
from csbdeep.utils import normalize
from PIL import Image
from stardist.geometry import star_dist
from stardist.models import Config2D, StarDist2D
from stardist.utils import edt_prob

RAYS, GRID = 32, (2, 2)


def main(image_file: str, label_file: str, threads: str) -> None:
    tensorflow.config.threading.set_intra_op_parallelism_threads(int(threads))
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    image = np.asarray(Image.open(image_file).convert("L"))
    labels = np.asarray(Image.open(label_file)).astype(np.int32)
    config = Config2D(n_rays=RAYS, grid=GRID)
    model = StarDist2D(config, name=None, basedir=None)
    probabilities = edt_prob(labels)[None, :: GRID[0], :: GRID[1], None]
    distances = star_dist(labels, RAYS, grid=GRID)[None]
    network = model.keras_model.predict

    def predict(pixels: np.ndarray, **options) -> list[np.ndarray]:
        network(pixels, **options)
        return [probabilities, distances]

    model.keras_model.predict = predict

    def run() -> int:
        return int(model.predict_instances(normalize(image, 1, 99.8))[0].max())

    found = measure_run(run)
    found["versions"] = {"stardist": stardist.__version__, "tensorflow": tensorflow.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
