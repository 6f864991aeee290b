"""A trained model with everything around it in one TorchScript file.

The file needs torch and torchvision to run, neither Detectron2 nor this package. docs/export.md
says how it is used.
"""
