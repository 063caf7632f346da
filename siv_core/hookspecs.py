"""The whole plugin API: one hook."""

from __future__ import annotations

import pluggy

from siv_core.component import Component

hookspec = pluggy.HookspecMarker("siv")
hookimpl = pluggy.HookimplMarker("siv")


@hookspec
def siv_components() -> list[Component]:  # type: ignore[empty-body]
    """The components this plugin offers, in any order. Called once when the catalogue is loaded; has no side effects."""
