"""Data set `rendered_cars`: parametric cars drawn here, a stand-in for Cars3D that needs no download.

183 car models, each seen from 24 azimuths (a full turn in steps of 15 degrees) and 4 elevations, as RGB images on white.
A model is drawn from a seeded generator of its own, so any model can be rendered alone, in any process, to the same bits.

Geometry is in metres: x forward, y to the left, z up, wheels on z = 0.  The camera is orthographic, which makes painter's
order exact: every solid is a row of convex slabs cut by planes of constant x, the cabin lies above the belt plane and the
wheel faces lie in the planes of the body sides, so sorting the faces by (layer, x towards the camera) and culling those
turned away shows no hidden face.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.data import datafile
from siv_core.store import files

MODELS, AZIMUTHS = 183, 24
ELEVATIONS = (0.0, 10.0, 20.0, 30.0)  # degrees
SEED = 20201
FRAME = 4.8  # metres across the image, the same for every model
OVERSAMPLING = 4
AXLES = (-0.33, 0.32)  # x as a share of the length

Floats = NDArray[np.float64]
Colour = tuple[float, float, float]
Range = tuple[float, float]

UNDER, BODY, SIDE, CABIN, ROOF = range(5)  # painting layers, hidden ones first
RUBBER: Colour = (0.09, 0.09, 0.10)
HEAD_LAMP, TAIL_LAMP = (1.0, 0.97, 0.72), (0.86, 0.04, 0.06)
WHITE, GRILLE = (0.9, 0.9, 0.88), (0.16, 0.16, 0.17)
AMBIENT = 0.38
LIGHT = np.array([-0.45, 0.72, 0.53])  # right, up, towards the camera: unit length

# Typical shapes, in the order of the fields of Car: length, width, height, belt (height of the window sill), nose and
# tail (height of the body at its ends), hood and deck (share of the length), screen and back (runs of the windscreen and
# the rear window), clearance, wheel (radius), windows (on a side).  SPREAD is the relative half-width about them.  As in
# Cars3D, whose models were scaled to one size, lengths and heights differ less than they do on the road.
# fmt: off
KINDS = {
    "sedan":     (3.83, 1.77, 1.48, .93, .74, .89, .28, .17, .62, .55, .18, .32, 2.50),
    "hatchback": (3.45, 1.70, 1.52, .94, .75, .88, .23, .04, .62, .33, .18, .30, 2.00),
    "estate":    (3.90, 1.79, 1.52, .95, .76, .90, .27, .04, .60, .22, .18, .32, 3.50),
    "coupe":     (3.71, 1.86, 1.33, .84, .60, .79, .34, .10, .75, .95, .15, .33, 1.50),
    "suv":       (3.81, 1.90, 1.74, 1.14, 1.01, 1.07, .24, .04, .40, .17, .35, .41, 3.00),
    "van":       (3.86, 1.88, 1.90, 1.12, .86, 1.07, .14, .03, .70, .08, .23, .32, 1.80),
    "pickup":    (3.98, 1.88, 1.68, 1.07, .94, .99, .26, .40, .42, .10, .33, .41, 2.00),
    "bus":       (3.94, 1.98, 2.06, 1.12, 1.02, 1.02, .04, .03, .22, .07, .22, .35, 4.50),
    "micro":     (3.11, 1.52, 1.54, .92, .75, .85, .15, .05, .55, .30, .17, .27, 1.50),
}
SPREAD =        (.07, .06, .06, .05, .07, .06, .11, .15, .22, .35, .18, .09, .35)
# fmt: on


class Car(NamedTuple):
    """One car model: lengths in metres, colours in [0, 1]."""

    length: float
    width: float
    height: float
    belt: float
    nose: float
    tail: float
    hood: float
    deck: float
    screen: float
    back: float
    clearance: float
    wheel: float
    windows: float
    kind: str
    lean: float  # of the cabin sides, inwards from sill to roof
    extra: float  # height of the wing or the roof box, 0 for none
    paint: Colour
    roof: Colour
    sill: Colour  # of the lower part of the sides
    stripe: Colour  # of the band along the middle
    glass: Colour
    rim: Colour


class Face(NamedTuple):
    """A plane polygon [n, 3], counter-clockwise from outside, and how it is painted."""

    points: Floats
    colour: Colour
    glow: float  # share of the colour that shading leaves alone, in [0, 1]
    layer: int
    cell: float  # x of the slab that the face belongs to


def random_paint(rng: np.random.Generator) -> Colour:
    """A car colour; every tenth is a grey, kept darker than the background."""
    hue, saturation, value = rng.random(3)
    if rng.random() < 0.1:
        return colorsys.hsv_to_rgb(hue, 0.05, 0.2 + 0.68 * value)
    return colorsys.hsv_to_rgb(hue, 0.55 + 0.45 * saturation, 0.4 + 0.6 * value)


def car(model: int) -> Car:
    """The parameters of car model `model`, 0 <= model < MODELS."""
    rng = np.random.Generator(np.random.PCG64([SEED, model]))
    kind = list(KINDS)[rng.integers(len(KINDS))]
    shares = 1 + np.array(SPREAD) * rng.uniform(-1, 1, len(SPREAD))
    shape = Car._make([*(shares * KINDS[kind]).tolist(), kind, *[None] * 8])
    paint, other = random_paint(rng), random_paint(rng)
    lean, extra, tint, rim, *chance = rng.random(9).tolist()
    return shape._replace(
        nose=min(shape.nose, shape.belt),  # the painting order wants the body below the belt
        tail=min(shape.tail, shape.belt),
        hood=max(shape.hood * shape.length, 0.23),  # behind the rounded front end
        deck=max(shape.deck * shape.length, 0.17),
        lean=0.06 + 0.14 * lean,
        extra=0.1 + 0.12 * extra if chance[0] < 0.2 and kind != "bus" else 0.0,
        paint=paint,
        roof=paint if chance[1] < 0.8 else other if chance[1] < 0.9 else WHITE,
        sill=paint if chance[2] < 0.7 else (0.2, 0.2, 0.2) if chance[2] < 0.9 else other,
        stripe=paint if chance[3] < 0.88 else WHITE if chance[4] < 0.5 else other,
        glass=(0.1 + 0.3 * tint, 0.14 + 0.36 * tint, 0.2 + 0.4 * tint),
        rim=(0.25 + 0.6 * rim,) * 3,
    )


def section(x: float, low: float, high: float, sill: float, top: float) -> Floats:
    """Cross-section [6, 3] at x: half-widths `sill` below and `top` above, rounded edges."""
    bevel = min(0.1, high - low)
    half = np.array([(sill, low), (top, high - bevel), (top - 0.1, high)])
    half[1, 0] += (sill - top) * bevel / max(high - low, 1e-9)
    ring = np.concatenate([half * (-1, 1), half[::-1]])
    return np.column_stack([np.full(6, x), ring])


def loft(rings: list[Floats], colour: Colour, layer: int) -> list[Face]:
    """The skin over cross-sections [6, 3] in the order of x: 5 faces a slab, then both ends."""
    pairs = list(pairwise(rings))
    quads = [np.stack([p[j], q[j], q[j + 1], p[j + 1]]) for p, q in pairs for j in range(5)]
    cells = [(p[0, 0] + q[0, 0]) / 2 for p, q in pairs for _ in range(5)]
    skin = zip([*quads, rings[0], rings[-1][::-1]], [*cells, cells[0], cells[-1]], strict=True)
    return [Face(points, colour, 0.0, layer, cell) for points, cell in skin]


def patch(face: Face, u: Range, v: Range, colour: Colour, glow: float = 0.3) -> Face:
    """The part of a 4-cornered face with u along its first side and v across, in [0, 1]."""
    a, b, c, d = face.points
    corners = ((u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1]))
    points = [(1 - t) * ((1 - s) * a + s * b) + t * ((1 - s) * d + s * c) for s, t in corners]
    return face._replace(points=np.stack(points), colour=colour, glow=glow)


def both_sides(slab: list[Face], u: Range, v: Range, colour: Colour, glow: float) -> list[Face]:
    """The same patch on the right and the left side of a slab, v from the bottom up."""
    return [patch(slab[0], u, v, colour, glow), patch(slab[4], u, (1 - v[1], 1 - v[0]), colour, glow)]


def end_patches(face: Face, lamp: Colour, grille: Colour, height: float) -> list[Face]:
    """Lamps, grille and bumper on an end of the body, a 6-cornered face."""
    panel = face._replace(points=face.points[[0, 1, 4, 5]])  # so that u runs upwards
    u = (height, height + 0.34)
    bands = (((0.04, 0.26), lamp), ((0.74, 0.96), lamp), ((0.32, 0.68), grille))
    patches = [patch(panel, u, v, colour, 0.75) for v, colour in bands]
    return [*patches, patch(panel, (0.0, 0.2), (0.0, 1.0), RUBBER)]


def body(spec: Car) -> list[Face]:
    """The part below the belt plane with lamps, sills, stripe and, on a pick-up, the bed."""
    end, half, low = spec.length / 2, spec.width / 2, spec.clearance
    rows = [(-end, spec.tail - 0.06, 0.14), (-end + 0.16, spec.tail, 0.0), (-end + spec.deck, spec.belt, 0.0)]
    rows += [(end - spec.hood, spec.belt, 0.0), (end - 0.22, spec.nose, 0.0), (end, spec.nose - 0.1, 0.2)]
    rings = [section(x, low + gap / 2, z, half - gap, half - gap) for x, z, gap in rows]
    skin = loft(rings, spec.paint, BODY)
    tail, deck, _, hood, nose = slabs = [skin[i : i + 5] for i in range(0, 25, 5)]
    extras = [f for slab in slabs for f in both_sides(slab, (0, 1), (0, 0.3), spec.sill, 0.0)]
    extras += [patch(hood[2], (0, 1), (0.36, 0.64), spec.stripe, 0.0)]
    extras += both_sides(tail, (0, 0.8), (0.6, 0.95), TAIL_LAMP, 0.75)
    extras += both_sides(nose, (0.25, 1), (0.6, 0.95), HEAD_LAMP, 0.75)
    extras += end_patches(skin[25], TAIL_LAMP, spec.paint, 0.6)
    extras += end_patches(skin[26], HEAD_LAMP, GRILLE, 0.55)
    if spec.kind == "pickup":
        extras += [patch(deck[2], (0, 0.94), (0.06, 0.94), GRILLE)]
    return skin + extras


def cabin(spec: Car) -> list[Face]:
    """The part above the belt plane with its windows."""
    end, half = spec.length / 2, spec.width / 2 - 0.08
    rear, front = spec.deck - end, end - spec.hood
    eaves = (rear + spec.back, front - spec.screen)
    rows = ((rear, spec.belt), (eaves[0], spec.height - 0.05), (eaves[1], spec.height))
    rings = [section(x, spec.belt, z, half, half - spec.lean) for x, z in rows]
    skin = loft([*rings, section(front, spec.belt, spec.belt, half, half)], spec.paint, CABIN)
    back, roof, screen = (skin[i : i + 5] for i in (0, 5, 10))
    skin[6:9] = [face._replace(colour=spec.roof) for face in skin[6:9]]
    extras = [patch(face, (0.08, 0.9), (0.06, 0.94), spec.glass) for face in (back[2], screen[2])]
    if spec.stripe != spec.paint:  # a stripe of the body colour would cut the roof in two
        extras += [patch(roof[2], (0, 1), (0.36, 0.64), spec.stripe, 0.0)]
    count = round(spec.windows)
    panel = count == 1 and spec.kind == "van"  # the only window is the driver's
    edges = [0.7, 1.0] if panel else np.linspace(0, 1, count + 1).tolist()
    gap = min(0.05 / (eaves[1] - eaves[0]), 0.1)
    for u0, u1 in pairwise(edges):
        extras += both_sides(roof, (u0 + gap, u1 - gap), (0.12, 0.92), spec.glass, 0.3)
    extras += both_sides(screen, (0.06, 0.7), (0.12, 0.92), spec.glass, 0.3)
    extras += both_sides(back, (0.3, 0.94), (0.12, 0.92), spec.glass, 0.3)
    return skin + extras


def add_on(spec: Car) -> list[Face]:
    """A wing on the deck or on the rear edge of the roof, or a roof box; nothing if its height is 0."""
    end, narrow = spec.length / 2, spec.width / 2 - 0.3
    edge, eaves = spec.deck - end + spec.back, end - spec.hood - spec.screen
    span, base, half, layer = (edge - 0.3, edge + 0.1), spec.height - 0.04, narrow + 0.1, ROOF
    if spec.kind in ("sedan", "coupe"):
        span, base, half, layer = (-end + 0.02, -end + 0.2), spec.tail, narrow + 0.2, CABIN
    elif spec.height > 1.65 or spec.kind == "estate":
        span, half = (edge + 0.2 * (eaves - edge), edge + 0.8 * (eaves - edge)), narrow
    rings = [section(x, base, base + spec.extra, half, half) for x in span]
    return loft(rings, spec.roof if half > narrow else spec.sill, layer) if spec.extra else []


def disc(x: float, y: float, z: float, radius: float, corners: int, side: float) -> Floats:
    """A regular polygon [corners, 3] in a plane of constant y, seen from `side` (+1 or -1)."""
    angle = -side * 2 * np.pi * (np.arange(corners) + 0.5) / corners
    across, up = x + radius * np.cos(angle), z + radius * np.sin(angle)
    return np.stack([across, np.full(corners, y), up], axis=1)


def wheel(x: float, side: float, spec: Car) -> list[Face]:
    """A wheel flush with the body side `side` (+1 left, -1 right), its arch and its rim."""
    r, y = spec.wheel, side * spec.width / 2
    outer, inner = (disc(x, y - side * inset, r, r, 16, side) for inset in (0.0, 0.22))
    tread = [np.stack([outer[i], inner[i], inner[i - 15], outer[i - 15]]) for i in range(16)]
    # The inner face is seen below the car, from the other side.
    faces = [Face(points, RUBBER, 0.6, UNDER, 0.0) for points in (*tread, inner[::-1])]
    arch = disc(x, y, r, 1.16 * r, 16, side)
    arch[:, 2] = arch[:, 2].clip(min=spec.clearance)  # it ends with the body
    decals = ((arch, RUBBER), (outer, RUBBER), (disc(x, y, r, 0.62 * r, 12, side), spec.rim))
    return faces + [Face(points, colour, 0.6, SIDE, 0.0) for points, colour in decals]


def cameras() -> Floats:
    """Rows right, up and towards the camera of every view: [96, 3, 3], elevation-major."""
    e = np.radians(np.repeat(ELEVATIONS, AZIMUTHS))
    a = np.tile(2 * np.pi * np.arange(AZIMUTHS) / AZIMUTHS, len(ELEVATIONS))
    towards = (np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e))
    up = (-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e))
    return np.array([(-np.sin(a), np.cos(a), 0 * a), up, towards]).transpose(2, 0, 1)


def normals(faces: list[Face]) -> Floats:
    """Unit outward normals [faces, 3]; zero for a face without area."""
    doubled: Floats = np.array([np.cross(f.points, np.roll(f.points, -1, axis=0)).sum(axis=0) for f in faces])
    units: Floats = doubled / np.linalg.norm(doubled, axis=1, keepdims=True).clip(min=1e-9)
    return units


def render_model(model: int, size: int = 64) -> NDArray[np.uint8]:
    """All views of a car model on white: [96, 3, size, size], elevation-major."""
    from PIL import Image, ImageDraw

    spec = car(model)
    wheels = [f for x in AXLES for side in (-1.0, 1.0) for f in wheel(x * spec.length, side, spec)]
    faces, views, fine = wheels + body(spec) + cabin(spec) + add_on(spec), cameras(), size * OVERSAMPLING
    facing = np.einsum("vij,fj->vfi", views, normals(faces))
    glow, paint = np.array([[f.glow] for f in faces]), np.array([f.colour for f in faces])
    lit = AMBIENT + (1 - AMBIENT) * (facing @ LIGHT).clip(min=0)[..., None]
    colours = np.rint(255 * paint * (glow + (1 - glow) * lit)).astype(int).tolist()
    points = np.concatenate([f.points for f in faces]) - (0, 0, spec.height / 2)
    plane = np.einsum("vij,pj->vpi", views[:, :2], points) * (1, -1) * fine / FRAME
    corners = (plane + (fine - 1) / 2).reshape(len(views), -1).tolist()
    stops = np.cumsum([0] + [2 * len(f.points) for f in faces]).tolist()
    layer, cell = np.array([(f.layer, f.cell) for f in faces]).T
    images = np.empty((len(views), size, size, 3), np.uint8)
    for v, forward in enumerate(np.sign(views[:, 2, 0])):
        canvas = Image.new("RGB", (fine, fine), "white")
        draw = ImageDraw.Draw(canvas)
        order = np.lexsort((forward * cell, layer))  # stable: a patch follows its face
        for f in order[facing[v, order, 2] > 1e-6].tolist():
            draw.polygon(corners[v][stops[f] : stops[f + 1]], tuple(colours[v][f]))
        images[v] = np.asarray(canvas.reduce(OVERSAMPLING))
    return images.transpose(0, 3, 1, 2).copy()


# -- the data set ---------------------------------------------------------------------------------------------------------------

VIEWS = len(ELEVATIONS) * AZIMUTHS
STORED = 64  # pixels a side of the file; other sizes are area means of it
VERSION = 1  # of the drawing: to be raised with any change to the pixels, so that old files are made anew


@frozen
class RenderedCarsConfig:
    size: int = option(64, doc="pixels a side; below 64 by area averaging of the 64-pixel file", ge=8, le=64)
    held_out_models: int = option(20, doc="car models kept from training, by a seeded choice", ge=1, le=MODELS - 1)
    split_seed: int = option(0, doc="of that choice", ge=0)


class RenderedCars:
    """Rendered once into the data root, one block a car model; rows are model-major, then elevation, then azimuth."""

    def __init__(self, size: int, held_out_models: int, split_seed: int) -> None:
        self.held_out_models, self.split_seed = held_out_models, split_seed
        factors = {"model": MODELS, "elevation": len(ELEVATIONS), "azimuth": AZIMUTHS}
        self.spec = Spec(shape=(3, size, size), factors=factors)

    @property
    def path(self) -> Path:
        return files.data_root() / "rendered_cars" / f"rendered_cars_v{VERSION}_{STORED}.h5"

    def missing(self) -> str | None:
        """Never anything: what is not there yet is drawn."""
        return None

    def prepare(self, progress: Progress) -> None:
        if self.path.exists():
            return
        factors = np.indices(tuple(self.spec.factors.values())).reshape(3, -1).T  # [MODELS · VIEWS, 3], last one fastest

        def produce(models: list[int]) -> Iterator[datafile.Block]:
            for model in models:
                yield model, render_model(model, STORED)

        datafile.write(
            self.path,
            shape=(MODELS * VIEWS, 3, STORED, STORED),
            block=VIEWS,
            produce=produce,
            progress=progress,
            source=f"rendered_cars version {VERSION}, seed {SEED}",
            labels=np.ascontiguousarray(factors[:, 0], dtype=np.int64),
            factors=np.ascontiguousarray(factors, dtype=np.int64),
            factor_sizes=dict(self.spec.factors),
        )

    @cached_property
    def _table(self) -> datafile.Table:
        table = datafile.read(self.path)
        if table.images.shape != (MODELS * VIEWS, 3, STORED, STORED) or table.labels is None:
            raise UserError(f"{self.path}: holds other images than the rendered cars; remove it, so that it is drawn again")
        return table

    def rows(self, split: str) -> Rows:
        assert self._table.labels is not None
        return datafile.rows_by_group(self._table, self._table.labels, self.held_out_models, self.split_seed, split)

    def about(self) -> dict[str, object]:
        """For the run's manifest: which models were held out."""
        assert self._table.labels is not None
        return {"held_out_models": datafile.held_out_groups(self._table.labels, self.held_out_models, self.split_seed)}

    def fingerprint(self) -> str:
        return self._table.sha256


def build(config: RenderedCarsConfig) -> RenderedCars:
    return RenderedCars(config.size, config.held_out_models, config.split_seed)


@hookimpl
def siv_components() -> list[Component]:
    summary = "183 parametric cars from 24 azimuths and 4 elevations, drawn here; whole models are held out"
    return [Component("dataset", "rendered_cars", RenderedCarsConfig, build, summary)]
