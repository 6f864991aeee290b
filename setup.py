"""Install nuclei_d2 beside an existing Detectron2 (`make install` installs both)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nuclei_d2/__init__.py").read_text())[1]

setup(
    name="nuclei_d2",
    version=VERSION,
    description="Detectron2 extension that finds, separates and measures cell nuclei",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["nuclei_d2", "nuclei_d2.*"]),
    package_data={
        "nuclei_d2.study": ["*.md"],
        "nuclei_d2.visualization.report": ["*.html", "*.css"],
    },
    # With -e by a line in a .pth file: a script beside the clone would else find its folder first.
    options={"editable_wheel": {"mode": "compat"}},
    python_requires=">=3.10",
    install_requires=(ROOT / "requirements/runtime.txt").read_text().splitlines(),
)
