"""Flat drawings of hands and faces, well-formed or malformed under the same caption.

The drawings stay bold because they must survive an 8x8x4 latent, and keep the few cues (creases
and joints of a palm, sockets, nose and lips of a face) that mediapipe's detectors look for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
_SS = 4  # supersampling: PIL's primitives are not antialiased

Colour = tuple[int, int, int]
Point = tuple[float, float]

SKIN_TONES: dict[str, Colour] = {
    "light": (240, 200, 172),
    "tan": (214, 162, 122),
    "brown": (164, 108, 74),
    "dark": (116, 74, 52),
}
SIDES = ("left", "right")
_HAIR: tuple[Colour, ...] = ((40, 28, 24), (84, 54, 34))
_SHIRT: Colour = (96, 104, 120)


@dataclass(frozen=True)
class HandSpec:
    """What the caption of a hand says: a key of `SKIN_TONES`, and "left" or "right"."""

    tone: str
    side: str


@dataclass(frozen=True)
class FaceSpec:
    """What the caption of a face says: a key of `SKIN_TONES`, and whether it smiles."""

    tone: str
    smiling: bool


def hand_caption(spec: HandSpec | None = None) -> str:
    """Return e.g. "a light left hand", or plain "a hand" without a spec."""
    return "a hand" if spec is None else f"a {spec.tone} {spec.side} hand"


def face_caption(spec: FaceSpec | None = None) -> str:
    """Return e.g. "a tan smiling face" or "a tan face", or plain "a face" without a spec."""
    if spec is None:
        return "a face"
    return f"a {spec.tone} smiling face" if spec.smiling else f"a {spec.tone} face"


def random_hand(rng: np.random.Generator) -> HandSpec:
    """Draw a tone and a side uniformly."""
    tones = list(SKIN_TONES)
    return HandSpec(tones[int(rng.integers(len(tones)))], SIDES[int(rng.integers(2))])


def random_face(rng: np.random.Generator) -> FaceSpec:
    """Draw a tone and an expression uniformly."""
    tones = list(SKIN_TONES)
    return FaceSpec(tones[int(rng.integers(len(tones)))], bool(rng.integers(2)))


def _tint(rng: np.random.Generator, low: int, high: int) -> Colour:
    r, g, b = rng.integers(low, high, size=3).tolist()
    return r, g, b


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (int(min(255, c * factor)) for c in colour)
    return r, g, b


class _Canvas:
    """A supersampled canvas with a rotated, scaled frame: x right, y up, about [-1, 1]."""

    def __init__(
        self, rng: np.random.Generator, *, centre: Point, scale: float, turn: float, flip: bool
    ) -> None:
        self.image = Image.new("RGB", (SIZE * _SS, SIZE * _SS), _tint(rng, 226, 245))
        self.pen = ImageDraw.Draw(self.image)
        self.scale = scale * SIZE * _SS / 2
        self.centre = ((1 + centre[0]) * SIZE * _SS / 2, (1 - centre[1]) * SIZE * _SS / 2)
        self.cos, self.sin = math.cos(turn), math.sin(turn)
        self.mirror = -1.0 if flip else 1.0

    def at(self, p: Point) -> Point:
        x, y = p[0] * self.mirror, p[1]
        u, v = self.cos * x - self.sin * y, self.sin * x + self.cos * y
        return self.centre[0] + self.scale * u, self.centre[1] - self.scale * v

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self.pen.polygon([self.at(p) for p in points], fill=colour)

    def disc(self, p: Point, r: float, colour: Colour) -> None:
        x, y = self.at(p)
        r *= self.scale
        self.pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def ellipse(self, p: Point, rx: float, ry: float, colour: Colour) -> None:
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        self.polygon([(p[0] + rx * math.cos(a), p[1] + ry * math.sin(a)) for a in angles], colour)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        xy = [self.at(p) for p in points]
        self.pen.line(xy, fill=colour, width=max(1, round(width * self.scale)), joint="curve")

    def capsule(self, a: Point, b: Point, ra: float, rb: float, colour: Colour) -> None:
        d = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
        nx, ny = (b[1] - a[1]) / d, -(b[0] - a[0]) / d
        ends = ((a, ra), (b, rb), (b, -rb), (a, -ra))
        self.polygon([(p[0] + nx * r, p[1] + ny * r) for p, r in ends], colour)
        self.disc(a, ra, colour)
        self.disc(b, rb, colour)

    def finish(self) -> np.ndarray:
        return np.asarray(self.image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.uint8)


@dataclass
class _Finger:
    base: Point
    angle: float  # clockwise from up, radians
    length: float
    width: float

    def along(self, t: float) -> Point:
        d = self.length * t
        return self.base[0] + d * math.sin(self.angle), self.base[1] + d * math.cos(self.angle)


# A right hand seen from the palm, pinky to index, then the thumb: (base, degrees, length, width).
_FINGERS = (
    ((-0.33, 0.16), -21.0, 0.50, 0.085),
    ((-0.125, 0.23), -8.0, 0.66, 0.095),
    ((0.09, 0.25), 2.0, 0.72, 0.098),
    ((0.30, 0.20), 13.0, 0.64, 0.096),
    ((0.30, -0.30), 46.0, 0.62, 0.11),
)
_PALM: list[Point] = [
    (-0.42, 0.18), (-0.30, 0.27), (-0.12, 0.33), (0.09, 0.35), (0.30, 0.31), (0.39, 0.20),
    (0.41, -0.15), (0.36, -0.42), (0.24, -0.62), (-0.24, -0.62), (-0.38, -0.40), (-0.43, -0.10),
]  # fmt: skip


def _well_formed_fingers(rng: np.random.Generator) -> list[_Finger]:
    spread = rng.uniform(0.9, 1.2)
    return [
        _Finger(base, math.radians(deg * spread + rng.normal(0, 1.5)), length, width)
        for base, deg, length, width in _FINGERS
    ]


def _lump(radius: float) -> list[Point]:
    angles = np.linspace(0, 2 * math.pi, 40, endpoint=False).tolist()
    return [(radius * math.cos(a), radius * math.sin(a) - 0.1) for a in angles]


def _spokes(rng: np.random.Generator, n: int, radius: float, length: float) -> list[_Finger]:
    """Return n fingers all around a `_lump`."""
    fingers = []
    for a in np.linspace(-2.1, 2.1, n).tolist():
        base = (radius * math.sin(a), radius * math.cos(a) - 0.1)
        fingers.append(_Finger(base, a, length * float(rng.uniform(0.8, 1.2)), 0.09))
    return fingers


def _malformed(rng: np.random.Generator) -> tuple[list[Point], list[_Finger]]:
    """Return a palm's outline and its fingers.

    The palm detector hardly counts fingers: what it looks for is the middle and index finger,
    gaps between fingers and the shape of the palm, so most malformed hands lack one of these.
    """
    fingers = _well_formed_fingers(rng)
    kind = rng.choice(["missing", "fused", "extra", "stumps"], p=[0.2, 0.4, 0.15, 0.25])
    if kind == "missing":
        third = int(rng.choice([0, 1, 4, -1]))
        return _PALM, [f for i, f in enumerate(fingers) if i not in (2, 3, third)]
    if kind == "fused":
        tilt = float(rng.normal(0, 0.05))
        if rng.random() < 0.35:
            middle = _Finger((0.1, 0.2), tilt, float(rng.uniform(0.5, 0.65)), 0.28)
            return _PALM, [fingers[0], fingers[4], middle]
        mitten = _Finger((0.0, 0.15), tilt, float(rng.uniform(0.35, 0.5)), 0.37)
        return _PALM, [mitten] if rng.random() < 0.6 else [mitten, fingers[4]]
    if kind == "extra":
        return _lump(0.3), _spokes(rng, int(rng.integers(6, 9)), 0.3, 0.55)
    return _lump(0.48), _spokes(rng, int(rng.integers(5, 8)), 0.4, 0.15)


def draw_hand(spec: HandSpec, rng: np.random.Generator, *, malformed: bool = False) -> np.ndarray:
    """Draw an open hand, palm to the viewer and pointing up; returns uint8 [64, 64, 3].

    A malformed hand has missing, fused, extra or stunted fingers, often on a misshapen palm.
    """
    canvas = _Canvas(
        rng,
        centre=(float(rng.uniform(-0.08, 0.08)), float(rng.uniform(-0.16, -0.06))),
        scale=float(rng.uniform(0.74, 0.92)),
        turn=float(rng.normal(0, 0.09)),
        flip=spec.side == "left",
    )
    skin = SKIN_TONES[spec.tone]
    # Creases much darker than this cost a well-formed palm most of its score.
    edge, crease = _shade(skin, 0.55), _shade(skin, 0.91)
    palm, fingers = _malformed(rng) if malformed else (_PALM, _well_formed_fingers(rng))
    for grow, colour in ((0.028, edge), (0.0, skin)):
        canvas.capsule((0.0, -1.9), (0.0, -0.5), 0.26 + grow, 0.25 + grow, colour)
        if grow:
            canvas.line([*palm, palm[0]], 2 * grow, colour)
        canvas.polygon(palm, colour)
        for f in fingers:
            canvas.capsule(f.base, f.along(1.0), f.width + grow, f.width * 0.85 + grow, colour)
    for f in fingers:
        for t in (0.32, 0.66):
            (x, y), w = f.along(t), f.width * 0.7
            dx, dy = w * math.cos(f.angle), -w * math.sin(f.angle)
            canvas.line([(x - dx, y - dy), (x + dx, y + dy)], 0.03, crease)
    if palm is not _PALM:
        return canvas.finish()
    canvas.line([(-0.38, 0.06), (-0.15, 0.04), (0.08, 0.12), (0.16, 0.24)], 0.035, crease)
    canvas.line([(-0.26, -0.12), (0.05, -0.02), (0.34, 0.06)], 0.035, crease)
    canvas.line([(0.34, 0.03), (0.12, -0.10), (0.02, -0.30), (0.02, -0.55)], 0.035, crease)
    return canvas.finish()


def draw_face(spec: FaceSpec, rng: np.random.Generator, *, malformed: bool = False) -> np.ndarray:
    """Draw a frontal face with hair and neck; returns uint8 [64, 64, 3].

    A malformed face lacks features, has them in the wrong place, or has too many eyes.
    """
    canvas = _Canvas(
        rng,
        centre=(float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.05, 0.05))),
        scale=float(rng.uniform(0.84, 0.96)),
        turn=float(rng.normal(0, 0.03)),
        flip=False,
    )
    skin = SKIN_TONES[spec.tone]
    dark, socket = _shade(skin, 0.6), _shade(skin, 0.82)
    hair = _HAIR[int(rng.integers(len(_HAIR)))]
    eyes: list[Point] = [(-0.27, 0.10), (0.27, 0.10)]
    nose: Point | None = (0.0, -0.16)
    mouth: Point | None = (0.0, -0.44)
    if malformed:
        kind = rng.choice(["eyes", "mouth", "moved", "extra"], p=[0.6, 0.1, 0.25, 0.05])
        if kind == "eyes":
            eyes = [] if rng.random() < 0.65 else [eyes[int(rng.integers(2))]]
        elif kind == "mouth":
            mouth = None
            nose = None
        elif kind == "moved":
            eyes = [(-0.27, -0.42), (0.27, -0.2)]
            mouth = (0.0, 0.28)
        else:
            eyes = [*eyes, (0.0, 0.36), *([(-0.2, -0.2)] if rng.random() < 0.5 else [])]

    canvas.ellipse((0.0, -1.35), 0.85, 0.50, _SHIRT)
    canvas.capsule((0.0, -1.1), (0.0, -0.6), 0.24, 0.24, socket)
    canvas.ellipse((0.0, 0.22), 0.70, 0.80, hair)
    for x in (-0.60, 0.60):
        canvas.ellipse((x, 0.02), 0.10, 0.16, socket)
    canvas.ellipse((0.0, -0.06), 0.58, 0.76, skin)
    canvas.ellipse((0.0, 0.72), 0.48, 0.22, hair)
    for x, y in eyes:
        canvas.ellipse((x, y + 0.03), 0.19, 0.13, socket)
        canvas.line([(x - 0.16, y + 0.17), (x, y + 0.22), (x + 0.16, y + 0.17)], 0.06, hair)
        canvas.ellipse((x, y), 0.13, 0.075, (245, 242, 238))
        canvas.disc((x, y), 0.075, (38, 26, 22))
    if nose:
        x, y = nose
        canvas.polygon([(x, y + 0.24), (x + 0.12, y - 0.04), (x - 0.12, y - 0.04)], socket)
        canvas.line([(x - 0.11, y - 0.04), (x, y - 0.07), (x + 0.11, y - 0.04)], 0.05, dark)
    if mouth:
        x, y = mouth
        lips = (int(0.5 * skin[0] + 75), int(0.45 * skin[1]), int(0.45 * skin[2] + 10))
        if spec.smiling:
            arc = [
                (x + 0.26 * math.cos(a), y + 0.07 + 0.19 * math.sin(a))
                for a in np.linspace(math.pi, 2 * math.pi, 16).tolist()
            ]
            canvas.polygon(arc, (248, 246, 242))
            canvas.line([*arc, arc[0]], 0.055, lips)
        else:
            canvas.ellipse((x, y), 0.21, 0.065, lips)
            canvas.line([(x - 0.2, y), (x + 0.2, y)], 0.03, _shade(lips, 0.6))
    return canvas.finish()
