"""What the parts of a model promise each other. Structural types: nothing here has to be inherited from.

Shapes: N samples a batch, d_g dimensions of latent group g, images [N, C, H, W], arrays [N, D]. Images are floats in the
`value_range` of their data's `Spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from attrs import field, frozen

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray
    from torch import Generator, Tensor, nn

    from siv_core.latents import Codes, Gaussian, Posterior
    from siv_core.seeding import Streams

    Picture = NDArray[uint8]

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
    fit: str = "crop"  # how images of other proportions come into a shape: "crop" to their centre, or "stretch"

    @property
    def dims(self) -> int:
        """Numbers in one sample: C·H·W or D."""
        product = 1
        for size in self.shape:
            product *= size
        return product


class Stage(NamedTuple):
    """What `set_stage` is told whenever a stage is entered (when it begins, after a resume, when a model is loaded), and once
    more when what is new has faded in."""

    number: int  # counted from 0
    shape: tuple[int, ...]  # of the samples in this stage
    fade: Tensor | None = None  # 0-dim in [0, 1), moved by the trainer while the stage fades in; None: nothing fades any more


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
    pyramid: Mapping[int, Tensor] = field(factory=dict)  # pixels a side -> the same M rows at that size, for stages of that size

    def __len__(self) -> int:
        return len(self.x if self.index is None else self.index)

    def at(self, positions: Tensor) -> Tensor:
        """Row numbers in the tensors of positions 0 … N − 1 of the split."""
        return positions if self.index is None else self.index[positions]


class Dataset(Protocol):
    """Built without its files; `spec` works once `missing()` is None.

    Optional: `fetch(progress)` downloads it from its source, `about()` gives JSON for the run's manifest, `check(path, progress)`
    is `siv data check` of files it is made from: a report with the list `problems`, None of a path that is none of its own.
    `counts()` -> {"train": n, "held_out": m}, known before `prepare`; `notes()`: sentences on how its files are read.
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
    """Optional beside the call, for a decoder as well: `set_stage(stage)`, told what holds from now on (see `Stage`), and
    `begin(stage, batches, encode)`, called once when a stage first begins: see `Prior`; `encode` gives all groups here."""

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Posterior: ...


class Decoder(Protocol):
    """Optional: `draw(n, generator, use)` -> noise with n rows for images that are used as one of `USES`.

    `styles(codes, labels=None)` -> [N, S, d] and `render(styles, noise=None)` -> x: a decoder in two parts, which its call goes
    through. Its models interpolate there, truncate the first `truncated_layers` of the S, and mix those of images, of which
    `layers_in_use` are seen at the present size.
    """

    def __call__(self, codes: Codes, labels: Tensor | None = None, noise: Any = None) -> Tensor: ...


USES = ("rec", "prior", "again", "model")  # x_rec, x_prior, a fake decoded again (x_ff); images of a trained model


class Networks(NamedTuple):
    """What a `network` component builds. `translate` names (AdaIN or class group, content group) where there are such.

    `batch_statistics`: in training a sample's result depends on its batch, as with batch norm. Then micro-batches are refused,
    several processes share their statistics, and every evaluation reports the gap between training and evaluation mode.
    `normal_prior`: the key of an option by which the decoder draws codes of N(0, I) by itself in training; then a prior that has
    parameters or buffers, and so is another distribution, is refused.
    """

    encoder: nn.Module
    decoder: nn.Module
    groups: dict[str, int]
    translate: tuple[str, str] | None = None
    batch_statistics: bool = False
    normal_prior: str = ""


class Weights(Protocol):
    """A format of checkpoints that another program writes."""

    network: str  # the network component of ours that they are weights of

    def convert(self, state: Mapping[str, Any]) -> Converted:
        """What `torch.load(…, weights_only=True)` gave, as weights of that network; a `UserError` for what is none of these."""


class Converted(NamedTuple):
    """Another program's checkpoint as weights of a network of ours."""

    config: dict[str, Any]  # options that the network must have, as a recipe says them
    shape: tuple[int, ...]  # of the images
    players: dict[str, dict[str, Tensor]]  # "encoder", "decoder", and where it has averages "encoder@ema", "decoder@ema"
    notes: tuple[str, ...] = ()  # what was left out


class ReconstructionLoss(Protocol):
    """Distance of y to x, one number a sample; pixel losses SUM over C·H·W.

    Optional: `missing()` -> what is not at hand, or None, `prepare()` brings it; `power`: it is Σ |x − y|^power, so that
    exp(−beta · r) is a density of x once it is normalised (`siv_core.losses.log_normaliser`): the metric `likelihood` gives nats.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...


class Distribution(Protocol):
    """A prior as it stands in one phase.

    Optional: `regulariser(z, mean, q, noise)` -> 0-dim, what an introspective encoder, and nobody else, pays beside its ELBO for
    the codes z [N, d] ~ q of data; `noise` is that of the KL of q. `mean` maps [N, …] to its mean over the samples of the whole
    batch, over all processes, with gradient.
    `truncated(noise, psi, labels=None)` -> z [N, d] as `sample` gives it, but each one at the share psi in [0, 1] of its way from
    the mean that it was drawn around. The noise is the prior's own, and scaling it would be wrong for most: so only a prior that
    says how is truncated.
    """

    def sample(self, noise: Any, labels: Tensor | None = None) -> Tensor:
        """z [N, d]."""

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Natural log density [N] of z [N, d]."""

    def kl(self, q: Gaussian, noise: Any, labels: Tensor | None = None) -> Tensor:
        """KL[q ‖ p] in nats [N]; `noise` is what the prior's `draw_kl` drew, None without one. With labels p is p(z ∣ y)."""

    def detach(self) -> Distribution: ...


class Prior(Protocol):
    """The prior of one latent group: an `nn.Module`.

    Optional: `draw(n, generator)` (default: standard normal [n, d]); `draw_kl(n, generator)` for a sampled KL;
    `set_stage(stage)`; `lr_factors()` -> {parameter, or a module's name for all of its parameters: factor on the learning
    rate}, which encoders and decoders may have too; `logvar_bounds()` -> (low [d], high [d]) or None, between which the
    encoder's log-variances of this group are kept; `batch_statistic = True` where its distribution takes a mean over
    the batch, so that cut batches are refused before anything is made; `stages_named` {option: number} of stages that it waits
    for, and `learns_from` {option: number}: from that stage on an objective must move it; `regularisers` (option, …) that
    nothing comes of without an objective that `regularises`; `short_of(n)` and
    `misfit(number, shape)`: why it does not start from n training samples, or does not go with a stage of that shape, or "".
    What the recipe lacks is told.

    `begin(stage, batches, encode)`, after `set_stage` and without gradients, exactly once when a stage first begins, never on
    a resume or load: it may change weights and buffers in place. `batches` are an epoch of `Batch`es of training data in the
    stage's shape, `encode` as in `realise`, in evaluation mode and without priors' bounds. Shadows take over what it changed;
    Adam forgets what it knew of that.
    """

    def realise(self, encode: Callable[..., Gaussian]) -> Distribution:
        """The distribution of this phase. `encode(x, labels=None)` gives this group's posterior; it is not to be kept.

        Labels are needed where `Spec.conditional` says so: a prior that encodes something has labels to go with it.
        """


@frozen(eq=False)
class Nets:
    """What a phase calls. Networks run as the recipe says (precision, bounds on log-variances); what they return is at least
    float32."""

    encoder: Callable[..., Posterior]  # (x, labels=None) -> {group: Gaussian}
    decoder: Callable[..., Tensor]  # (codes, labels=None, noise=None) -> x
    realise: Callable[[], dict[str, Any]]  # -> {group: Distribution} of this phase; see `prior`
    reconstruction: Callable[[Tensor, Tensor], Tensor]  # (x, y) -> [N]
    shadows: Mapping[str, Callable[..., Any]] = field(factory=dict)  # "decoder@target" -> as its player
    mean: Callable[[Tensor], Tensor] = lambda x: x.mean(dim=0)  # [N, …] -> [...] over the batch of all processes, with gradient
    keep_graphs: bool = False  # what is carried to a later phase may have graphs, of players that do not move meanwhile

    def posterior(self, batch: Batch, noise: Noise) -> Posterior:
        """q(z ∣ x) of the data, {group: mu, logvar [N, d]}: a group that sees a view of its own (`views` of a stage) has that of
        its view. Objectives that say `takes_views` call this and not `encoder` for the data."""
        views = noise.get("views", {})
        found: Posterior = {}
        whole: Posterior = {}
        for group, x in views.items():
            whole = self.encoder(x, batch.labels)
            found[group] = whole[group]
        return found if views and found.keys() == whole.keys() else {**self.encoder(*batch), **found}

    def prior(self, *, frozen: bool) -> dict[str, Any]:
        """{group: Distribution} of this phase; frozen: no gradient reaches it. Once a phase: a prior may cost an encoding."""
        if not frozen:
            return self.realise()
        import torch

        with torch.no_grad():
            prior = self.realise()
        return {group: p.detach() for group, p in prior.items()}


class Sources(NamedTuple):
    """Where a step's noise comes from: each draws a tree of tensors with n rows from the stream of this name."""

    prior: Callable[[int, Streams, str], dict[str, Any]]
    posterior: Callable[[int, Streams, str], Codes]
    kl: Callable[[int, Streams, str], dict[str, Any]]
    decoder: Callable[[int, Streams, str, str], Any]  # the last is one of `USES`


# (nets, batch, noise, coeffs, carry) -> (mean loss 0-dim, per-sample terms, carry for the next phase): a pure function. What is
# carried is detached, but for what `Nets.keep_graphs` allows
PhaseLoss = Callable[[Nets, Batch, Noise, Coeffs, dict[str, Any]], "tuple[Tensor, Terms, dict[str, Any]]"]


class Phase(NamedTuple):
    """One update of a step: the players in `updates`, and they alone, follow the gradient of `loss`. It is left out while none
    of them has a parameter that learns."""

    name: str
    updates: tuple[str, ...]
    loss: PhaseLoss


@frozen
class Shadow:
    """A copy of a player without gradient: an average (`half_life_images`) or a hard copy every so many images or epochs."""

    name: str  # nets.shadows["PLAYER@name"]
    of: str
    half_life_images: float | None = None
    warm_up: float = 0.0  # the half-life is at most this share of the images seen; 0: the same from the start
    average_buffers: bool = False  # else they are copied
    copy_every_images: int | None = None
    first_copy_images: int | None = None  # None: like all others, after `copy_every_images`
    copy_every_epochs: int | None = None  # the trainer knows how many images that are
    first_copy_epochs: int | None = None  # of those; None: like all others, after `copy_every_epochs`


@frozen
class Objective:
    """An algorithm as data: what noise a step draws and which phases it goes through."""

    phases: tuple[Phase, ...]
    draw: Callable[[int, Streams, Sources], Noise]
    coeffs: Mapping[str, float | Mapping[str, float]]
    shadows: tuple[Shadow, ...] = ()
    batch_statistic: bool = False  # a loss that is no mean over samples: cannot be cut into micro-batches
    prior_learns: bool = False  # it was told to move the prior: one without parameters is then a mistake
    takes_views: bool = False  # it encodes the data by `Nets.posterior`
    regularises: bool = False  # its encoder pays what priors ask for: `Distribution.regulariser`


class Measurement(NamedTuple):
    """Numbers of a metric and how they were taken. A `str` in place of a number is the reason why it was skipped."""

    values: dict[str, float | str]
    protocol: dict[str, Any]
    pictures: Mapping[str, Picture] = MappingProxyType(
        {}
    )  # name -> uint8 [H, W, 3], written into the run's images as METRIC_NAME.png


class Metric(Protocol):
    """Optional: `fits(data)` -> why this metric cannot be taken of these data, a sentence each, asked before training once they
    are prepared; `draw(models, data, seed, count)` -> a picture of one model or of several {title: model} side by side, with
    `count` samples, for data that is no image and so has no picture else; `data` is None where it is not at hand."""

    def needs(self) -> Iterable[str]:
        """What is not at hand, each with its remedy; asked before training. What needs it is then skipped."""

    def measure(self, model: Any, data: Dataset, progress: Progress) -> Measurement: ...
