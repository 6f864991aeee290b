"""The documents: links lead somewhere, config keys and files of the project exist."""

import re

import pytest
from tiny import REPOSITORY

from nuclei_d2.config import load_config

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "MODEL_ZOO.md", "datasets/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
KEY = re.compile(r"\b(?:DATALOADER|DATASETS|INPUT|MODEL|SOLVER|TEST)(?:\.[A-Z0-9_]+)+\b")
FOLDERS = "configs|datasets|docs|nuclei_d2|tests|tools"
FILE = re.compile(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]+\.(?:py|yaml|md)\b")
TEXT = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target, anchor in LINK.findall(TEXT[document]):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_config_keys_exist(document):
    for key in set(KEY.findall(TEXT[document])):
        node = load_config()
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_exist(document):
    for name in set(FILE.findall(TEXT[document])):
        assert (REPOSITORY / name).exists(), name
