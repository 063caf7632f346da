"""A plugin whose hook is misspelt: siv_component for siv_components."""

from siv_core import hookimpl


@hookimpl
def siv_component():
    return []
