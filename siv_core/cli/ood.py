"""`siv ood`: what a run's model takes for an outlier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from siv_core.cli.common import screen
from siv_core.cli.use import MODEL, OUT, told
from siv_core.errors import UserError


@click.command()
@MODEL
@click.option(
    "--against",
    multiple=True,
    required=True,
    metavar="SET",
    help="Another data set with its options, such as svhn or 'hdf5,path=x.h5,as=mine'; flip_vertical and flip_horizontal are the "
    "run's own held-out images turned round.",
)
@click.option(
    "--score",
    "names",
    multiple=True,
    metavar="NAME",
    help="elbo, kl, reconstruction, iwae, likelihood_regret; png, ppca, nearest. Default: all but likelihood_regret, which takes"
    " its time.",
)
@click.option("-n", "--number", "count", default=1000, show_default=True, type=click.IntRange(2), help="Images a set, at most.")
@click.option("--draws", default=5, show_default=True, type=click.IntRange(1), help="Codes drawn for an image.")
@click.option("--betas", default="objective", show_default=True, type=click.Choice(["objective", "one"]), help="Of the ELBO.")
@click.option("--convert", "converts", is_flag=True, help="Make images of another size or other channels the model's.")
@OUT
def ood(
    against: tuple[str, ...],
    names: tuple[str, ...],
    count: int,
    draws: int,
    betas: str,
    converts: bool,
    seed: int,
    out: Path | None,
    as_json: bool,
    **which: Any,
) -> None:
    """Tell other data sets from the held-out images of RUN by scores of its model and by simple ones: AUROC, AUPR, FPR95, the
    densities as a picture, and the scores. A larger score is more of an outlier."""
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import ood_report, other_sets, outliers, scores

    sets = other_sets.others([other_sets.table_of(text) for text in against])
    settings = scores.Settings(draws=draws, seed=seed, betas=betas)
    chosen = outliers.checked_scores(names or outliers.USUAL)
    options = outliers.Options(chosen, count, seed, convert=converts, settings=settings)
    one = opened.open_run(**which)
    refused = [reason for other in sets if (reason := other_sets.unusable(other, one.model.spec, converts))]
    if refused:
        raise UserError(refused)
    about = opened.need_data(one, watcher.progress)
    scored = outliers.score_sets(one.model, one.built.dataset, sets, options, watcher.progress)
    if scored.absent or (names and scored.lacking):
        raise UserError([*scored.absent.values(), *scored.lacking.values()])
    values = outliers.values(scored)
    made = ood_report.write(out or one.run_dir.path / "outputs", scored, values, one.model)
    if not as_json:
        watcher.say(f"inliers: held-out images of {about}")
        watcher.say("a larger score is more of an outlier; outliers are the positive class")
        watcher.table("Outliers", outliers.COLUMNS, outliers.rows(scored, values))
        for name, reason in scored.lacking.items():
            watcher.say(f"no {name}: {reason}")
    told(watcher, made, as_json)
