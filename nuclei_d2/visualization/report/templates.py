"""The pages' templates: HTML without scripts that loads nothing from anywhere."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


def render_template(name: str, **values: Any) -> str:
    """A page from a template of this folder; the values are untrusted and escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(name).render(**values)


def _breakable(name: str) -> Markup:
    """Let a long name of several words wrap between them."""
    return escape(name).replace("_", Markup("_<wbr>"))
