"""The options of a recipe's own tables (`[optim]`, `[shadow]`, `[train]`, `[init]`, `[[stages]]`): names, defaults, bounds."""

from __future__ import annotations

from attrs import frozen

from siv_core.component import option
from siv_core.recipe.convert import Length

VIEWS = ("flip", "stretch", "same_label", "peer")
PLAYERS = ("encoder", "decoder", "prior")


@frozen
class Optim:
    """Adam (Kingma & Ba 2015) of one player."""

    lr: float = option(2e-4, doc="learning rate", gt=0)
    betas: tuple[float, float] = option((0.9, 0.999), doc="decay of the two moments, a step", ge=0, lt=1)
    eps: float = option(1e-8, doc="added to the root of the second moment", gt=0)
    weight_decay: float = option(0.0, doc="L2 added to the gradient", ge=0)


@frozen
class ShadowOptions:
    """`[shadow]`: exponential averages of players, which models use where they are kept."""

    of: tuple[str, ...] = option(PLAYERS, doc="the players to average", choices=PLAYERS)
    half_life: Length = option(Length(10_000, "images"), doc="after this long a weight counts half")
    warm_up: float = option(0.0, doc="the half-life is at most this share of the images seen so far; 0: never shorter", ge=0)
    buffers: str = option("copy", doc="what is no weight, such as a batch norm's statistics", choices=("copy", "average"))


@frozen
class Train:
    """`[train]`."""

    batch: int = option(64, doc="samples a step, over all processes and micro-batches", ge=1)
    length: Length | None = option(None, doc="how long to train; with [[stages]] the stages say it")
    seed: int = option(0, doc="of everything random", ge=0, lt=2**63)
    micro_batch: int = option(0, doc="samples a forward pass, less memory, same result; 0: the whole batch", ge=0)
    keep_graphs: bool = option(False, doc="later phases reuse what earlier ones made: less time with small networks, more memory")
    compile: bool = option(
        False, doc="phases through torch.compile: a minute or more at first, then less time with small networks"
    )
    graphs: bool = option(False, doc="on CUDA: phases recorded as CUDA graphs, each launched as one; same numbers")
    precision: str = option(
        "fp32",
        doc="of the networks, losses are always fp32; auto: bf16 where the device has instructions for it, else fp32",
        choices=("fp32", "tf32", "bf16", "auto"),
    )
    deterministic: bool = option(False, doc="on CUDA: only algorithms that give the same bits again")
    channels_last: bool = option(False, doc="memory layout of images and convolutions")
    conditional: bool = option(False, doc="give the labels to the networks")
    horizontal_flips: bool = option(False, doc="mirror each training image left to right with probability 1/2")
    stretch: float = option(0.3, doc="of the view stretch: factors of e^-this to e^this, along each axis", gt=0, le=2)
    peers: int = option(4, doc="of the view peer: it is one of so many images", ge=1, le=1000)
    logvar_bound: float = option(20.0, doc="log-variances are held at ± this (beyond it, slope 0.001); 0 leaves them free", ge=0)
    clip_gradient: float = option(0.0, doc="largest gradient norm of a phase; 0: no clipping", ge=0)
    residency: str = option("auto", doc="where the data lies; never changes a bit", choices=("auto", "device", "host"))
    tick: Length = option(Length(50, "steps"), doc="a line of statistics every so long")
    preview: Length = option(Length(1000, "steps"), doc="a preview picture every so long, and two early ones")
    checkpoint: Length = option(Length(1000, "steps"), doc="a checkpoint every so long, and at the end")
    keep_every: int = option(0, doc="keep every so many-th checkpoint beside the two newest; 0: none", ge=0)


@frozen
class Cadence:
    """What a `[metrics.NAME]` table may say beside the metric's own options."""

    every: Length | None = option(None, doc="measure during training too, every so long")


@frozen
class Init:
    """`[init]`: start from another run's weights."""

    run: str = option(doc="its run directory", place=True)
    checkpoint: str = option("last", doc="step number or last")
    weights: str = option("raw", doc="which of its weights", choices=("raw", "ema"))


@frozen
class StageOptions:
    """One entry of `[[stages]]`, beside the tables it overrides."""

    length: Length = option(doc="how long this stage lasts")
    fade: float = option(0.0, doc="share of the stage over which what is new fades in", ge=0, le=1)
    fade_shape: str = option(
        "linear", doc="in images seen: t, or the smooth (1 − cos πt)/2 that starts and ends at rest", choices=("linear", "smooth")
    )
    reset_optimisers: bool = option(False, doc="forget the moments at the start of this stage")
    views: dict[str, tuple[str, ...]] = option(
        {}, doc="what the encoder of a latent group sees in place of the image, in this order", choices=VIEWS
    )


@frozen
class StageData:
    """`data` inside a stage."""

    size: int = option(doc="pixels a side in this stage, by area averaging", ge=1)
