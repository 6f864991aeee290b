"""One HTML page that compares prediction sets: ``tools/evaluate.py --report``."""

from nuclei_d2.visualization.report.overlays import find_raw_images
from nuclei_d2.visualization.report.page import render_report

__all__ = ["find_raw_images", "render_report"]
