"""Data sets: preparing, loading and registering. Importing this registers every known name."""

from nuclei_d2.data.datasets.builtin import register_builtin

register_builtin()
