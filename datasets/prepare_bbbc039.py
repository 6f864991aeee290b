"""Prepare BBBC039 (U2OS nuclei, fluorescence) for training."""

from pathlib import Path

from nuclei_d2.data.datasets.formats.bbbc039 import SPLIT_RULE, list_bbbc039
from nuclei_d2.data.datasets.prepare import argument_parser, run
from nuclei_d2.utils.errors import run_tool


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("source", type=Path, help="folder with images/, masks/ and metadata/")
    args = parser.parse_args()
    run(list_bbbc039(args.source), "bbbc039", args, split_rule=SPLIT_RULE)


if __name__ == "__main__":
    run_tool(main)
