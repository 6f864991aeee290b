"""Prepare a COCO instance JSON with its images for training, as one class."""

from pathlib import Path

from nuclei_d2.data.datasets.builtin import check_own_name
from nuclei_d2.data.datasets.formats.coco_json import list_coco
from nuclei_d2.data.datasets.prepare import (
    add_split_arguments,
    argument_parser,
    run,
)
from nuclei_d2.data.datasets.splits import parse_split
from nuclei_d2.utils.errors import run_tool


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("json", type=Path, help="COCO instance annotations")
    parser.add_argument("images", type=Path, help="folder or zip that its file names refer to")
    add_split_arguments(parser)
    args = parser.parse_args()
    check_own_name(args.name)
    split, rule = parse_split(args)
    listing = list_coco(args.json, args.images, split, args.modality)
    run(listing, args.name, args, split_rule=rule)


if __name__ == "__main__":
    run_tool(main)
