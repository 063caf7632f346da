"""What the parts of a model promise each other. Structural types: nothing here has to be inherited from.

Shapes: N samples a batch, d_g dimensions of latent group g, images [N, C, H, W], arrays [N, D]. Images are floats in the
`value_range` of their data's `Spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from attrs import field, frozen

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from siv_core.latents import Codes, Gaussian, Posterior
    from siv_core.seeding import Streams

Nets = Mapping[str, Any]  # "encoder", "decoder", "prior", "reconstruction" and each shadow ("decoder@target"): callables
Noise = dict[str, Any]  # a tree of tensors, each with one row a sample, so that it can be sliced like the batch
Coeffs = dict[str, Any]  # the objective's numbers as 0-dim tensors; per-group ones are {group: tensor}
Terms = dict[str, "Tensor"]  # the very per-sample values [N] that a loss summed
Progress = Callable[[str, int, int], None]  # (what, done, total): shows progress, raises `Stopped` when asked to end


@frozen
class Spec:
    """What a builder is told of the data, so that no recipe repeats it."""

    shape: tuple[int, ...]  # (C, H, W) of kind "image", (D,) of kind "array"
    kind: str = "image"
    value_range: tuple[float, float] = (0.0, 1.0)
    classes: int | None = None  # number of label values, None without labels
    factors: Mapping[str, int] = field(factory=dict)  # factor name -> number of values; for metrics only
    conditional: bool = False  # whether the networks are given labels (`train.conditional`)

    @property
    def dims(self) -> int:
        """Numbers in one sample: C·H·W or D."""
        product = 1
        for size in self.shape:
            product *= size
        return product


class Stage(NamedTuple):
    """What `set_stage` is told when a training stage begins."""

    number: int  # counted from 0
    shape: tuple[int, ...]  # of the samples in this stage
    fade: Tensor  # 0-dim in [0, 1]; the trainer moves it while a stage fades in, then it stays 1


class Batch(NamedTuple):
    x: Tensor  # [N, ...] float
    labels: Tensor | None = None  # [N] int64, only where train.conditional


@frozen
class Rows:
    """One split of a data set as a table; tensors may be memory-mapped and are never written to.

    An endless split has a `draw` too: training draws the batch of each step with it, on the generator's device, and never reads
    the table. That one stands for the split wherever rows are asked for, and its length is the nominal epoch.
    """

    x: Tensor  # [M, ...], uint8 (0 … 255 standing for the value range) or float32 in the value range
    labels: Tensor | None = None  # [M] int64
    factors: Tensor | None = None  # [M, F] int64, columns in the order of `Spec.factors`
    index: Tensor | None = None  # [N] int64: which of the M rows are this split's; None: all of them
    draw: Callable[[int, Generator], Batch] | None = None  # (n, generator) -> n samples, x of the table's type; see above

    def __len__(self) -> int:
        return len(self.x if self.index is None else self.index)

    def at(self, positions: Tensor) -> Tensor:
        """Row numbers in the tensors of positions 0 … N − 1 of the split."""
        return positions if self.index is None else self.index[positions]


class Dataset(Protocol):
    """Built without its files; `spec` works once `missing()` is None.

    Optional: `fetch(progress)` downloads it from its source, `about()` gives JSON for the run's manifest, `check(path, progress)`
    is `siv data check` of files it is made from: a report with the list `problems`, None of a path that is none of its own.
    """

    @property
    def spec(self) -> Spec: ...
    def missing(self) -> str | None:
        """What is not at hand and what would bring it, or None when `prepare` can go ahead."""

    def prepare(self, progress: Progress) -> None:
        """Make whatever `rows` needs; nothing to do when it is there. Interrupted work goes on where it stopped."""

    def rows(self, split: str) -> Rows:
        """The split "train", which may be endless, or "held_out", which is a table."""

    def fingerprint(self) -> str:
        """A digest that changes with the data."""


class Encoder(Protocol):
    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Posterior: ...


class Decoder(Protocol):
    """Optional beside the call: `draw(n, generator)` -> noise with n rows, `set_stage(stage)`."""

    def __call__(self, codes: Codes, labels: Tensor | None = None, noise: Any = None) -> Tensor: ...


class Networks(NamedTuple):
    """What a `network` component builds. `translate` names (AdaIN or class group, content group) where there are such."""

    encoder: nn.Module
    decoder: nn.Module
    groups: dict[str, int]
    translate: tuple[str, str] | None = None


class ReconstructionLoss(Protocol):
    """Distance of y to x, one number a sample; pixel losses SUM over C·H·W."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...


class Distribution(Protocol):
    """A prior as it stands in one phase."""

    def sample(self, noise: Any, labels: Tensor | None = None) -> Tensor:
        """z [N, d]."""

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Natural log density [N] of z [N, d]."""

    def kl(self, q: Gaussian, noise: Any) -> Tensor:
        """KL[q ‖ p] in nats [N]; `noise` is what the prior's `draw_kl` drew, None without one."""

    def detach(self) -> Distribution: ...


class Prior(Protocol):
    """The prior of one latent group: an `nn.Module`.

    Optional: `draw(n, generator)` (default: standard normal [n, d]), `draw_kl(n, generator)` for a sampled KL,
    `start(batches, encode)` once before the first step, where batches are `Batch`es of training data; `set_stage(stage)`.
    """

    def realise(self, encode: Callable[..., Gaussian]) -> Distribution:
        """The distribution of this phase. `encode(x, labels=None)` gives this group's posterior; it is not to be kept.

        Labels are needed where `Spec.conditional` says so: a prior that encodes something has labels to go with it.
        """


class Sources(NamedTuple):
    """Where a step's noise comes from: each draws a tree of tensors with n rows from the stream of this name."""

    prior: Callable[[int, Streams, str], dict[str, Any]]
    posterior: Callable[[int, Streams, str], Codes]
    kl: Callable[[int, Streams, str], dict[str, Any]]
    decoder: Callable[[int, Streams, str], Any]


KEEP_GRAPHS = "keep_graphs"  # stands in the carry of a first phase that may hand on tensors with their graphs

# (nets, batch, noise, coeffs, carry) -> (mean loss 0-dim, per-sample terms, carry for the next phase): a pure function. What is
# carried is detached, unless KEEP_GRAPHS allows graphs: then those of players that have not moved meanwhile
PhaseLoss = Callable[[Nets, Batch, Noise, Coeffs, dict[str, Any]], "tuple[Tensor, Terms, dict[str, Any]]"]


class Phase(NamedTuple):
    """One update of a step: the players in `updates`, and they alone, follow the gradient of `loss`."""

    name: str
    updates: tuple[str, ...]
    loss: PhaseLoss


@frozen
class Shadow:
    """A copy of a player without gradient: an average (`half_life_images`) or a hard copy every so many images or epochs."""

    name: str  # nets["PLAYER@name"]
    of: str
    half_life_images: float | None = None
    copy_every_images: int | None = None
    copy_every_epochs: int | None = None  # the trainer knows how many images that are


@frozen
class Objective:
    """An algorithm as data: what noise a step draws and which phases it goes through."""

    phases: tuple[Phase, ...]
    draw: Callable[[int, Streams, Sources], Noise]
    coeffs: Mapping[str, float | Mapping[str, float]]
    shadows: tuple[Shadow, ...] = ()
    batch_statistic: bool = False  # a loss that is no mean over samples: cannot be cut into micro-batches


class Measurement(NamedTuple):
    """Numbers of a metric and how they were taken. A `str` in place of a number is the reason why it was skipped."""

    values: dict[str, float | str]
    protocol: dict[str, Any]


class Metric(Protocol):
    def needs(self) -> Iterable[str]:
        """What is not at hand, each with its remedy; asked before training. What needs it is then skipped."""

    def measure(self, model: Any, data: Dataset, progress: Progress) -> Measurement: ...
