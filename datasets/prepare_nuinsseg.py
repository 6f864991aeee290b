"""Prepare NuInsSeg (H&E, 31 organs) for training."""

from pathlib import Path

from nuclei_d2.data.datasets.formats.nuinsseg import SPLIT_RULE, list_nuinsseg
from nuclei_d2.data.datasets.prepare import argument_parser, run
from nuclei_d2.utils.errors import run_tool


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("source", type=Path, help="NuInsSeg.zip or its unpacked folder")
    args = parser.parse_args()
    run(list_nuinsseg(args.source), "nuinsseg", args, split_rule=SPLIT_RULE)


if __name__ == "__main__":
    run_tool(main)
