"""Detectron2 extension that finds, separates and measures cell nuclei in microscopy images."""

__version__ = "0.1.0"
