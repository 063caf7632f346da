"""Two rows through networks, to see that they keep what they promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from siv_core.errors import PluginError
from siv_core.nets import tree_map
from siv_core.recipe.build import Built
from siv_core.seeding import Seeded


def check_forward(built: Built, modules: Mapping[str, nn.Module], shape: Sequence[int], device: torch.device) -> None:
    """Two rows through `modules`, as they stand when a stage begins; a `PluginError` tells what comes out in another form than
    `Networks` promises. Leaves buffers and random states as they were."""
    groups, rows, seen = built.networks.groups, 2, [modules["encoder"], modules["decoder"]]
    modes = [module.training for module in seen]

    def wrong(player: int, told: str) -> PluginError:
        name = built.recipe.network[player].name
        return PluginError(f"{built.catalogue.owner('network', name)}: network '{name}': {told}")

    for module in seen:
        module.eval()
    try:
        with Seeded(0), torch.no_grad():
            x = torch.zeros(rows, *shape, device=device)
            given = {"labels": torch.zeros(rows, dtype=torch.int64, device=device)} if built.spec.conditional else {}
            q = modules["encoder"](x, *given.values())
            if not isinstance(q, Mapping) or q.keys() != groups.keys():
                raise wrong(0, f"the encoder gives {form(q)}, expected {{group: Gaussian(mu, logvar)}} of {', '.join(groups)}")
            for group, dim in groups.items():
                if form(q[group]) != form((torch.empty(rows, dim),) * 2):
                    told = f"the encoder gives {form(q[group])} for group '{group}', expected mu and logvar, both [N, {dim}]"
                    raise wrong(0, told)
            draw = getattr(modules["decoder"], "draw", None)
            if draw:
                given["noise"] = tree_map(draw(rows, torch.Generator(), "rec"), lambda part: part.to(device))
            y = modules["decoder"]({group: torch.zeros(rows, dim, device=device) for group, dim in groups.items()}, **given)
            if form(y) != form(x):
                raise wrong(-1, f"the decoder gives {form(y)}, expected {form(x)}, as data are")
    finally:
        for module, mode in zip(seen, modes, strict=True):
            module.train(mode)


def form(x: Any) -> str:
    """What a network gave, in words; rows are N."""
    if isinstance(x, Tensor):
        if not x.dim() or len(x) != 2:
            return f"a tensor of shape {list(x.shape)}"
        return f"[{', '.join(['N', *map(str, x.shape[1:])])}]"
    if isinstance(x, Mapping):
        return f"groups {', '.join(map(str, x)) or 'none'}"
    return f"({', '.join(map(form, x))})" if isinstance(x, tuple) else f"a {type(x).__name__}"
