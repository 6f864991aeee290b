"""Prepare a folder of images and a folder of label images (Cellpose, StarDist) for training."""

from pathlib import Path

from nuclei_d2.data.datasets.builtin import check_own_name
from nuclei_d2.data.datasets.formats.folder import list_folder
from nuclei_d2.data.datasets.prepare import (
    add_split_arguments,
    argument_parser,
    run,
)
from nuclei_d2.data.datasets.splits import parse_split
from nuclei_d2.utils.errors import run_tool


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("images", type=Path, help="folder or zip of images")
    parser.add_argument(
        "labels", type=Path, help="folder or zip of label images: same stems, or x_masks for x"
    )
    add_split_arguments(parser)
    args = parser.parse_args()
    check_own_name(args.name)
    split, rule = parse_split(args)
    listing = list_folder(args.images, args.labels, split, args.modality)
    run(listing, args.name, args, split_rule=rule)


if __name__ == "__main__":
    run_tool(main)
