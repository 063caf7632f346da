"""Stages: where a step is in them, what begins with one, and that a kill at their boundaries changes nothing."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import crash
import pytest
import torch
import toys
from test_resume import contents

from siv_core.errors import PluginError
from siv_core.protocols import Rows, Spec
from siv_core.recipe import build
from siv_core.recipe.convert import Length
from siv_core.recipe.options import Optim
from siv_core.recipe.recipe import Choice, StagePlan, parse
from siv_core.runs import session
from siv_core.store import checkpoint
from siv_core.train import stage
from siv_core.train.players import Player
from siv_core.train.schedule import Schedule

crash.preload()


def plan(length: str, **more) -> StagePlan:
    return StagePlan(Length.parse(length), Choice("objective", "vae", None), {"": Optim()}, batch=8, **more)


def test_the_schedule_says_where_a_step_is():
    schedule = Schedule.of([plan("2 steps"), plan("24 images"), plan("1 epochs")], epoch_images=16)
    assert schedule.ends == (2, 5, 7)
    assert schedule.total == 7
    assert [schedule.next(step) for step in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert [schedule.made(step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [(schedule.first(i), schedule.steps(i)) for i in range(3)] == [(0, 2), (2, 3), (5, 2)]
    assert schedule.images() == [16, 40, 56]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0]),
        ("smooth", [0.5 - 0.25 * 2**0.5, 0.5, 0.5 + 0.25 * 2**0.5, 1.0, 1.0]),
    ],  # (1 − cos πt)/2
)
def test_the_shape_of_a_fade(shape, expected):
    schedule = Schedule.of([plan("3 steps"), plan("8 steps", fade=0.5, fade_shape=shape)], epoch_images=8)
    assert [schedule.fade(1, step) for step in range(3, 8)] == pytest.approx(expected, abs=1e-15)
    assert schedule.fade(1, 6) == schedule.fade(1, 7) == 1.0
    assert schedule.fade(1, 2) == 0.0  # nothing of it was done yet
    assert schedule.fade(0, 0) == 1.0


def test_every_stage_is_said_and_leaves_a_picture_at_its_own_size(catalogue, tmp_path):
    stages = [
        {"length": "2 steps", "data": {"size": 4}, "objective": {"name": "vae"}},
        {"length": "4 steps", "fade": 0.5, "train": {"batch": 8}},
    ]
    train = {"batch": 64, "tick": "1 steps", "preview": "1000 steps"}
    t = toys.trainer(catalogue, tmp_path, toys.tree(network={"name": "growing"}, stages=stages, train=train))
    told: list[str] = []
    t.observer.say = told.append
    drawn: list[tuple[str, tuple[int, ...]]] = []
    assert t.run(preview=lambda name: drawn.append((name, t.model().spec.shape))) == "finished"
    assert told == [
        "stage 1 of 2: vae, 4 × 4 pixels, batch 64, steps 1 to 2",
        "stage 2 of 2: soft_intro_vae, 8 × 8 pixels, batch 8, steps 3 to 6, fading in over 50% of it",
    ]
    assert drawn == [("preview_00000001", (1, 4, 4)), ("preview_00000002", (1, 4, 4))]


# -- begin -----------------------------------------------------------------------------------------------------------------------

HAND_OVER = (
    toys.SOFT
    + """
[prior]
name = "hand_over"
[shadow]
half_life = "100 images"
[train]
batch = 32
tick = "3 steps"
checkpoint = "2 steps"
keep_every = 1
preview = "100 steps"
[[stages]]
length = "4 steps"
objective = { name = "vae" }
[[stages]]
length = "5 steps"
"""
)


def hand_over(catalogue, folder, **train):
    stages = [{"length": "4 steps", "objective": {"name": "vae"}}, {"length": "5 steps"}]
    more = {"batch": 32, "tick": "3 steps", **train}
    return toys.trainer(catalogue, folder, toys.tree(prior={"name": "hand_over"}, stages=stages, shadow={}, train=more))


def test_a_vamp_hands_over_to_a_mixture_that_is_the_same_to_the_bit(catalogue, tmp_path):
    t = hand_over(catalogue, tmp_path)
    prior, z = t.built.priors.groups["z"], torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    while t.counters.step < 4:
        t.active = t.active or stage.enter(t, 0)
        t.advance(t.active)
    before = t.active.nets.prior(frozen=True)["z"].log_prob(z)
    moments = t.players["prior"].optimiser.state
    mu, logvar, pseudo_inputs = (dict(prior.named_parameters())[name] for name in ("mu", "logvar", "pseudo_inputs"))
    assert moments[pseudo_inputs]["step"] == 4
    active = stage.enter(t, 1)
    assert prior.begun == [0, 1]
    assert torch.equal(active.nets.prior(frozen=True)["z"].log_prob(z), before)
    assert moments[pseudo_inputs]["step"] == 4  # begin did not touch it
    # what begin changed is in the averages as it is; the rest of them is an average still
    [shadow] = [follower.module.groups["z"] for follower in t.followers if follower.rule.of == "prior"]
    for name in ("mu", "logvar", "bounds"):
        assert torch.equal(getattr(shadow, name), getattr(prior, name))
    assert not torch.equal(shadow.pseudo_inputs, prior.pseudo_inputs)
    # from here on mu and logvar learn, the latter at a quarter of the rate
    rates = {id(p): group["lr"] for group in t.players["prior"].optimiser.param_groups for p in group["params"]}
    assert rates[id(logvar)] == rates[id(mu)] / 4
    still = mu.clone()
    for _ in range(3):
        t.advance(active)
    assert torch.equal(mu, still)  # soft_intro_vae's phases move encoder and decoder alone
    q = active.nets.encoder(torch.rand(50, 1, 8, 8) * 9 - 4)["z"].logvar
    low, high = prior.bounds
    beyond = torch.relu(q - high) + torch.relu(low - q)
    assert 0 < beyond.max() < 0.01  # a thousandth of what they would be


def test_begin_is_called_once_a_stage_and_never_on_a_resume(catalogue, tmp_path):
    t = hand_over(catalogue, tmp_path / "run", checkpoint="2 steps", keep_every=1)
    assert t.run() == "finished"
    assert t.built.priors.groups["z"].begun == [0, 1]
    for step, begun in ((2, []), (4, [1]), (6, []), (8, [])):  # at 4 the next stage has not begun yet
        again = hand_over(catalogue, tmp_path / str(step))
        again.resume(checkpoint.Checkpoint.open(tmp_path / f"run/checkpoints/step_{step:08d}"))
        stage.enter(again, again.schedule.next(step))
        assert again.built.priors.groups["z"].begun == begun
        if step > 4:
            assert (again.built.priors.groups["z"].bounds != 0).all()  # taken at switch-on, kept with the run


def test_begin_leaves_nothing_that_a_checkpoint_would_not_have(catalogue, tmp_path):
    t = hand_over(catalogue, tmp_path)
    prior = t.built.priors.groups["z"]
    prior.begin = lambda stage, batches, encode: prior.register_buffer("more", torch.zeros(1))
    told = r"plugin 'toys' of tests 0: `begin` may change weights, not add or remove them: groups\.z\.more"
    with pytest.raises(PluginError, match=told):
        stage.enter(t, 0)
    t = hand_over(catalogue, tmp_path / "lost")
    prior = t.built.priors.groups["z"]
    prior.register_buffer("passing", torch.zeros(1), persistent=False)
    prior.begin = lambda stage, batches, encode: prior.passing.fill_(1.0)
    with pytest.raises(PluginError, match=r"`begin` changed what no checkpoint holds: groups\.z\.passing"):
        stage.enter(t, 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two recipes give that nothing happened to, and in how many places each can be killed."""
    found = {}
    for name, text in RECIPES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "recipe.toml").write_text(text)
        code, moments = crash.in_child(crash.train_with_toys, str(folder / "recipe.toml"), str(folder / "run"))
        assert code == 0
        found[name] = contents(folder / "run"), moments, folder / "recipe.toml"
    return found


GROWING = """
format = 1
[data]
name = "digits"
[network]
name = "growing"
[objective]
name = "soft_intro_vae"
[shadow]
half_life = "40 images"
[train]
batch = 16
tick = "1 steps"
preview = "2 steps"
checkpoint = "1 steps"
keep_every = 1
horizontal_flips = true
[[stages]]
length = "3 steps"
data = { size = 4 }
[[stages]]
length = "6 steps"
fade = 0.8
fade_shape = "smooth"
"""
STYLE = GROWING.replace(
    'name = "growing"',
    'name = "style"\nstart_channels = 4\nmax_channels = 8\nz_dim = 6\nencoder_mapping = 2\ndecoder_mapping = 2',
)
RECIPES = {"hand_over": HAND_OVER, "growing": GROWING, "style": STYLE}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("share", [0.35, 0.5, 0.6, 0.8])
def test_killed_around_the_boundary_and_inside_a_fade(undisturbed, tmp_path, name, share):
    expected, moments, recipe = undisturbed[name]
    run = tmp_path / "run"
    code, _ = crash.in_child(crash.train_with_toys, str(recipe), str(run), kill_at=int(share * moments))
    assert code == -signal.SIGKILL
    assert crash.in_child(crash.train_with_toys, str(recipe), str(run))[0] == 0
    assert contents(run) == expected


def test_every_checkpoint_of_a_hand_over_goes_on_to_the_same_end(undisturbed, tmp_path):
    """A kill right after each checkpoint, that of the boundary included."""
    import shutil

    expected, _, recipe = undisturbed["hand_over"]
    steps = sorted(name for name in expected if name.startswith("step_"))
    assert "step_00000004" in steps
    for name in steps[:-1]:
        run = tmp_path / name
        shutil.copytree(recipe.parent / "run", run)
        for later in [later for later in steps if later > name]:
            shutil.rmtree(run / "checkpoints" / later)
        (run / "status.json").unlink()
        assert crash.in_child(crash.train_with_toys, str(recipe), str(run))[0] == 0
        assert contents(run) == expected, name


# -- growing data ----------------------------------------------------------------------------------------------------------------


def test_a_stage_reads_the_rows_of_its_size():
    from siv_core.data.feed import Feed, images

    pyramid = {4: torch.full((6, 1, 4, 4), 51, dtype=torch.uint8)}
    rows = Rows(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), index=torch.tensor([1, 3, 5]), pyramid=pyramid)
    for place in ("device", "host"):
        feed = Feed(rows, Spec((1, 8, 8)), torch.device("cpu"), place)
        sizes = {side: feed.batch(torch.arange(3), (1, side, side), torch.contiguous_format).x for side in (2, 4, 8)}
        assert {side: tuple(x.shape) for side, x in sizes.items()} == {side: (3, 1, side, side) for side in (2, 4, 8)}
        torch.testing.assert_close(sizes[4], torch.full((3, 1, 4, 4), 0.2))
        assert not sizes[8].any()
        assert not sizes[2].any()  # not in the pyramid: an area mean of the rows themselves
    # what a model is measured on is what it was trained on
    torch.testing.assert_close(images(rows, torch.arange(3), Spec((1, 4, 4))), torch.full((3, 1, 4, 4), 0.2))
    assert not images(rows, torch.arange(3), Spec((1, 8, 8))).any()


def test_flips_mirror_half_of_the_images_whoever_reads_them(catalogue, tmp_path):
    from siv_core.seeding import Streams

    plain, flipped = (
        toys.trainer(
            catalogue, tmp_path / str(flips), toys.tree(train={"batch": 64, "length": "1 steps", "horizontal_flips": flips})
        )
        for flips in (False, True)
    )

    def batch(t, step, share=slice(0, 64)):
        return t.feed.next(t.order, 0, 64, share, Streams(0, step, t.device), (1, 8, 8), torch.contiguous_format).x

    x, y = batch(plain, 0), batch(flipped, 0)
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(x, y, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, x, y, strict=True))
    assert 16 <= sum(mirrored) <= 48
    assert torch.equal(y, torch.cat([batch(flipped, 0, slice(0, 20)), batch(flipped, 0, slice(20, 64))]))
    assert not torch.equal(y, batch(flipped, 1))


def test_flips_are_for_images(tmp_path, siv):
    (tmp_path / "r.toml").write_text(
        'format = 1\n[data]\nname = "toy2d"\n[network]\nname = "mlp"\n[objective]\nname = "vae"\n[train]\nlength = "1 steps"\n'
        "horizontal_flips = true\n"
    )
    done = siv("check", "r.toml")
    assert done.returncode == 2
    assert "train.horizontal_flips: data 'toy2d' is no image" in done.stderr


@pytest.mark.parametrize(
    ("warm_up", "then", "told"),
    [
        ({}, {}, True),  # 1/64 of an 8 × 8 digit, then intro_vae's 1
        ({"scale": 1.0}, {}, False),
        ({"scale": 0.5}, {}, False),
        ({}, {"reset_optimisers": True}, False),
        ({}, {"objective": {"name": "intro_vae", "scale": 0.0}}, False),
    ],
)
def test_stages_of_another_scale_are_told(catalogue, warm_up, then, told):
    stages = [{"length": "1 steps", "objective": {"name": "vae", **warm_up}}, {"length": "1 steps", **then}]
    recipe = toys.tree(objective={"name": "intro_vae"}, stages=stages, train={"batch": 2})
    read = parse(recipe, Path("r.toml"), b"", catalogue, (), (), False)
    notes = session.told_of(build.build(read, catalogue, build.dataset(read, catalogue)))
    line = "stages[1]: its losses are multiplied by 1, those before it by 0.01562, whose running averages Adam keeps"
    assert [note.partition(": give")[0] for note in notes] == [line] * told


@pytest.mark.parametrize(("scale", "moves"), [(0.1, {30: 0.14, 1000: 0.16, 4600: 0.71}), (10.0, {12: 5.2, 1000: 1.25})])
def test_what_another_scale_does_to_adam(scale, moves):
    """What `fits.scales` says, in units of the learning rate: (c + (1 − c) β₁ⁿ) / √(c² + (1 − c²) β₂ⁿ) after a change by c."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser, moved = torch.optim.Adam([weight], lr=1.0), []
    long_ago = {"step": torch.tensor(1e6), "exp_avg": torch.ones_like(weight), "exp_avg_sq": torch.ones_like(weight)}
    optimiser.state[weight] = {name: value.detach() for name, value in long_ago.items()}  # after gradients of 1 for a long time
    for _ in range(4600):
        weight.grad = torch.full_like(weight, scale)
        before = weight.item()
        optimiser.step()
        moved.append(before - weight.item())
    for n, move in moves.items():
        exact = (scale + (1 - scale) * 0.9**n) / math.sqrt(scale**2 + (1 - scale**2) * 0.999**n)
        assert moved[n - 1] == pytest.approx(exact, rel=1e-5)
        assert exact == pytest.approx(move, rel=0.05)


# -- averages --------------------------------------------------------------------------------------------------------------------


def test_an_average_warms_up_and_may_average_buffers():
    from siv_core.protocols import Shadow
    from siv_core.train.players import Follower, Player

    source = torch.nn.BatchNorm1d(2)
    player = Player.of("encoder", source)
    copied, averaged = (
        Follower.of(Shadow("ema", "encoder", half_life_images=1000, warm_up=0.5, average_buffers=average), player, 1)
        for average in (False, True)
    )
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(8.0)
        source.num_batches_tracked.fill_(7)
    for follower in (copied, averaged):
        follower.follow(source, 0, 100)  # the half-life is 50 of the 100 images seen: three quarters of the way
        torch.testing.assert_close(follower.module.weight.data, torch.full((2,), 2.5))
        assert follower.module.num_batches_tracked == 7
    assert torch.equal(copied.module.running_mean, torch.full((2,), 8.0))
    torch.testing.assert_close(averaged.module.running_mean, torch.full((2,), 6.0))
    averaged.follow(source, 9000, 10_000)  # after the warm-up it is the half-life of the recipe
    torch.testing.assert_close(averaged.module.weight.data, torch.full((2,), 2.75))


def test_a_gradient_that_lies_otherwise_in_memory_moves_the_same_weights():
    """The fused Adam goes through memory, whatever the strides."""
    start, gradient = torch.arange(6.0).reshape(2, 3), torch.linspace(-1, 1, 6).reshape(3, 2).t()
    plain = torch.nn.Parameter(start.clone())
    plain.grad = gradient.contiguous()
    torch.optim.Adam([plain], lr=0.1, eps=1.0).step()
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(start.clone())})
    player = Player.of("encoder", module)
    player.configure(lr=0.1, betas=(0.9, 0.999), eps=1.0, weight_decay=0.0)
    player.step([gradient])
    torch.testing.assert_close(module["w"], plain)
