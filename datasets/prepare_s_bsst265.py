"""Prepare S-BSST265 (tissue and cytospin nuclei, fluorescence) for training."""

from pathlib import Path

from nuclei_d2.data.datasets.formats.s_bsst265 import SPLIT_RULE, list_s_bsst265
from nuclei_d2.data.datasets.prepare import argument_parser, run
from nuclei_d2.utils.errors import run_tool


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("source", type=Path, help="dataset.zip or its unpacked folder")
    args = parser.parse_args()
    run(list_s_bsst265(args.source), "s_bsst265", args, split_rule=SPLIT_RULE)


if __name__ == "__main__":
    run_tool(main)
