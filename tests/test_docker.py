"""What the image copies before it installs is enough for the doctor, which that runs."""

import re
import shutil
import subprocess
import sys

from tiny import REPOSITORY


def test_the_doctor_runs_with_what_is_copied_first(tmp_path):
    before = (REPOSITORY / "docker" / "Dockerfile").read_text().split("&& make install")[0]
    copies = re.findall(r"^COPY --chown=\S+ (.+) (\S+)$", before, re.MULTILINE)
    for sources, target in copies:
        for source in sources.split():
            if source.endswith(".py"):
                (tmp_path / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / source, tmp_path / target)
    # Without site-packages: it has to run where nothing is installed.
    command = [sys.executable, "-S", "-m", "nuclei_d2.doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Versions" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
