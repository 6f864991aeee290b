"""StarDist's side of a study, run by an interpreter that has stardist and tensorflow.

pip install stardist tensorflow-cpu
python tools/study_stardist.py --annotations datasets/dsb2018/annotations --name \
  dsb2018_fluorescence --minutes 30 --seed 0 --output output/studies/stardist/seed0

StarDist's own recipe: its default network on the 2 x 2 grid of its published nuclei models, its
learning rate, the augmentation of its example notebook, the weights that were best on VAL, and
thresholds fitted to VAL by its own function. Its schedule is scaled to the time that one step takes
here, as tools/study.py does with every model: 100 steps between validations, and the learning rate
halved after a tenth of all epochs without progress, as in its 400 epochs with a patience of 40.

Needs the label images that datasets/prepare_*.py write.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import stardist
import tensorflow
from csbdeep.utils import normalize
from PIL import Image
from stardist.models import Config2D, StarDist2D
from tqdm import tqdm

STEPS_PER_EPOCH, CALIBRATION_STEPS, WARMUP_STEPS = 100, 60, 10
WARMUP_IMAGES = 5  # as ours


class StepClock(tensorflow.keras.callbacks.Callback):
    """Seconds of every training step with its data, without validation."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", type=Path, required=True, help="folder of COCO JSONs")
    parser.add_argument("--name", required=True, help="NAME_train.json, _val, _test are used")
    parser.add_argument("--minutes", type=float, default=30, help="of training, validation apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, required=True, help="labels/ and run.json appear in it"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    tensorflow.config.threading.set_intra_op_parallelism_threads(args.threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    tensorflow.keras.utils.set_random_seed(args.seed)
    train, val = (read_split(args.annotations, f"{args.name}_{s}") for s in ("train", "val"))
    _, seconds = train_model(args, "calibration", train, val, 1, CALIBRATION_STEPS)
    step = float(np.median(seconds[WARMUP_STEPS:]))
    epochs = max(1, round(60 * args.minutes / (step * STEPS_PER_EPOCH)))
    model, seconds = train_model(args, "model", train, val, epochs, STEPS_PER_EPOCH)
    thresholds = model.optimize_thresholds(*val)
    test = f"{args.name}_test"
    speed = predict_test(model, args.annotations, test, args.output / "labels")
    summary = {  # named as in the run.json of a study
        "versions": {"stardist": stardist.__version__, "tensorflow": tensorflow.__version__},
        "hardware": {"device": cpu_name(), "threads": args.threads},
        "model": {"parameters": model.keras_model.count_params()},
        "iterations": len(seconds),
        "training": {"seconds": sum(seconds)},
        "evaluation": {test: speed},
        "thresholds": {name: float(value) for name, value in thresholds.items()},
    }
    (args.output / "run.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


def cpu_name() -> str:
    """The CPU's model name, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_split(annotations: Path, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Normalised grey images, (H, W) float32, and label images, (H, W) int32."""
    root = annotations.parent
    entries = list_images(annotations, name)
    images = [read_grey(root / entry["file_name"]) for entry in tqdm(entries, name, unit="image")]
    labels = [np.asarray(Image.open(root / e["label_file_name"])).astype(np.int32) for e in entries]
    return images, labels


def list_images(annotations: Path, name: str) -> list[dict]:
    """The entries of a COCO JSON's images."""
    return json.loads((annotations / f"{name}.json").read_text())["images"]


def read_grey(path: Path) -> np.ndarray:
    """(H, W) float32, the 1st percentile at 0 and the 99.8th at 1."""
    return normalize(np.asarray(Image.open(path).convert("F")), 1, 99.8)


def train_model(
    args: argparse.Namespace, name: str, train: tuple, val: tuple, epochs: int, steps: int
) -> tuple[StarDist2D, list[float]]:
    """A new model, trained; and the seconds of its steps."""
    config = Config2D(
        n_rays=32,
        grid=(2, 2),
        train_epochs=epochs,
        train_steps_per_epoch=steps,
        train_reduce_lr={"factor": 0.5, "patience": max(1, epochs // 10), "min_delta": 0},
        train_tensorboard=False,
    )
    model = StarDist2D(config, name=name, basedir=str(args.output))
    clock = StepClock()
    model.prepare_for_training()
    model.callbacks.append(clock)
    model.train(*train, validation_data=val, augmenter=augment, seed=args.seed)
    return model, clock.seconds


def augment(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flips, quarter turns, brightness and noise, as StarDist's example notebook has them."""
    random = np.random.default_rng(np.random.randint(1 << 31))  # follows the seed of the run
    turns, mirrored = random.integers(4), random.random() < 0.5
    image, labels = (np.rot90(x, turns) for x in (image, labels))
    if mirrored:
        image, labels = image[:, ::-1], labels[:, ::-1]
    image = image * random.uniform(0.6, 2) + random.uniform(-0.2, 0.2)
    return image + 0.02 * random.uniform() * random.standard_normal(image.shape), labels


def predict_test(model: StarDist2D, annotations: Path, name: str, folder: Path) -> dict[str, float]:
    """Write a label image, TIFF of 16 bits, for every image of the set.

    Returns:
        Images and megapixels per second, by network and suppression.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seconds, pixels = [], []
    for entry in tqdm(list_images(annotations, name), name, unit="image"):
        path = annotations.parent / entry["file_name"]
        image = read_grey(path)
        start = time.perf_counter()
        labels, _ = model.predict_instances(image)
        seconds.append(time.perf_counter() - start)
        pixels.append(image.size)
        Image.fromarray(labels.astype(np.uint16)).save(folder / f"{path.stem}.tif")
    first = min(WARMUP_IMAGES, len(seconds) - 1)
    return {
        "images_per_second": len(seconds[first:]) / sum(seconds[first:]),
        "megapixels_per_second": sum(pixels[first:]) / 1e6 / sum(seconds[first:]),
    }


if __name__ == "__main__":
    main()
