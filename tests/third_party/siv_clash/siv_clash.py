"""A plugin that offers a network under siv's own name `mlp`, and one under a name of its own."""

from attrs import frozen

from siv_core import Component, hookimpl


@frozen
class NoOptions:
    pass


def build(config, spec):
    raise AssertionError("nobody asked for this network")


@hookimpl
def siv_components():
    return [Component("network", "mlp", NoOptions, build, "clashes"), Component("network", "fine", NoOptions, build, "its own")]
