"""Does what a study can see of train_net.py, tune_decoder.py and measure, in milliseconds.

It adds a line about every call to the file CALLS. FAIL names the call that fails, STOP the
training that dies after its first checkpoint.
"""

import ast
import json
import os
import sys
from pathlib import Path


def train(words, options, folder):
    rows = [{"iteration": k, "time": 0.5} for k in (19, 39)]
    rows += [{"iteration": 40, "segm/AP": 50.0}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "model_0000019.pth").touch()
    (folder / "last_checkpoint").write_text("model_0000019.pth")
    if is_told("STOP", words):
        os._exit(137)
    (folder / "model_final.pth").touch()
    (folder / "results.json").write_text("{}")


def evaluate(words, options, folder):
    for test in ast.literal_eval(options["DATASETS.TEST"]):
        path = folder / "inference" / test / "coco_instances_results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    (folder / "results.json").write_text('{"efficiency": {"hardware": {"device": "none"}}}')


def tune(words, options, folder):
    for flag in ("--json", "--output"):
        Path(words[words.index(flag) + 1]).write_text("MODEL: {UNET: {DECODER: {THRESHOLD: 0.4}}}")


def measure(request, folder):
    for test in request["tests"]:
        (folder / f"{test}.json").write_text("{}")


def is_told(variable, words):
    return os.environ.get(variable, "nobody") in " ".join(words)


def main():
    stage, *words = sys.argv[1:]
    if stage == "measure":
        request = json.loads(Path(words[0]).read_text())
        folder = Path(request["output"])
    else:
        options = dict(zip(words[-2::-2], words[::-2], strict=False))
        stage = "evaluate" if "--eval-only" in words else stage
        folder = Path(words[words.index("--output") + 1]).parent if stage == "tune" else None
        folder = folder or Path(options["OUTPUT_DIR"])
    gpus = [f"gpu{value}" for key, value in os.environ.items() if key == "CUDA_VISIBLE_DEVICES"]
    with open(os.environ["CALLS"], "a") as file:
        file.write(
            " ".join([stage, folder.as_posix(), *["resumed"] * ("--resume" in words), *gpus]) + "\n"
        )
    if is_told("FAIL", [stage, *words]):
        sys.exit("error: told to fail")
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "measure":
        measure(request, folder)
    else:
        {"train": train, "tune": tune, "evaluate": evaluate}[stage](words, options, folder)


if __name__ == "__main__":
    main()
