"""Prepare Data Science Bowl 2018 stage 1 (BBBC038) for training."""

from pathlib import Path

from nuclei_d2.data.datasets.formats.dsb2018 import SPLIT_RULE, list_dsb2018
from nuclei_d2.data.datasets.prepare import MODALITIES, argument_parser, run
from nuclei_d2.utils.errors import run_tool


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "source", type=Path, nargs="+", help="stage1_train.zip (and stage1_test.zip), or folders"
    )
    parser.add_argument("--modality", choices=("all", *MODALITIES), default="all")
    args = parser.parse_args()
    listing = list_dsb2018(args.source)
    options = {"split_rule": SPLIT_RULE, "modality": args.modality, "by_modality": True}
    run(listing, "dsb2018", args, **options)


if __name__ == "__main__":
    run_tool(main)
