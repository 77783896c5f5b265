"""A short manga volume drawn by code: a demo needs pages that nobody else holds the rights to.

python sample.py OUT.cbz
"""

import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

Fill = Sequence[int] | float  # a BGR colour, or the density of a screentone
Points = Sequence | np.ndarray
SAMPLE_PAGES = 4
W, H, S = 560, 800, 3  # page size, and how much larger it is drawn so that the reduced lines come out smooth
INK, PAPER, GLOW = (26, 20, 22), (250, 250, 250), (130, 226, 255)
TONED = dict(
    ink=INK,
    paper=PAPER,
    hair=PAPER,
    skin=PAPER,
    eye=PAPER,
    iris=(120, 120, 120),
    shade=0.3,
    coat=0.55,
    scarf=0.1,
)
COLOUR = dict(
    ink=INK,
    paper=PAPER,
    hair=(150, 214, 250),
    skin=(222, 236, 255),
    eye=GLOW,
    iris=(176, 140, 40),
    shade=(96, 148, 222),
    coat=(124, 70, 52),
    scarf=(84, 72, 226),
)

# Figures in hundredths of a head: outlines after their palette key, pen strokes after their width. They are
# right halves; what starts on the axis is not repeated on the left. A point given twice makes a corner.
GIRL = """shade 0 -110 85 -85 114 0 116 80 130 130 130 130 70 110 0 110; skin 0 80 25 80 25 80 30 130 0 150;
    coat 0 135 60 140 115 170 145 300 145 300 0 300; 4 90 200 86 250 90 300; 4 0 200 2 250 0 300; scarf 0 120
    40 112 72 130 62 162 0 180; 5 0 170 40 160 66 135; 3 20 132 42 138 60 132; skin 0 100 20 94 60 64 80 25 84
    -30 50 -80 0 -90; paper 22 30 24 8 42 0 60 6 64 30 54 44 32 44; iris 26 24 30 2 42 -3 54 2 59 24 52 43 33
    43; ink 28 22 30 2 42 -3 54 2 57 22 43 27; paper 31 12 33 5 38 3 42 6 43 13 40 19 34 19; paper 48 36 50 32
    53 32 54 36 51 39; 11 16 20 24 0 44 -9 64 0 78 20; 3 34 50 44 52 58 47; 5 -16 72 0 76 16 72; 3 0 50 4 55;
    hair 0 -122 60 -110 100 -65 112 0 98 85 98 85 86 40 82 -25 82 -25 72 0 60 8 60 8 56 -20 50 -42 50 -42 42
    -22 28 -10 28 -10 24 -28 20 -44 20 -44 10 -20 0 -6; 8 0 -120 12 -142 40 -150 60 -140; 4 22 -24 42 -33 64
    -22; 3 4 -116 26 -104 36 -80; 3 8 -116 46 -104 62 -76; 3 12 -115 66 -100 84 -66; 2 0 -112 10 -96 12 -80; 3
    20 -44 20 -58 16 -70; 3 50 -42 50 -56 44 -68; 3 82 -25 82 -42 74 -58; 2 32 -20 36 -40 33 -60; 2 62 -5 66
    -30 60 -56; 2 8 -24 9 -44 7 -60; 3 94 60 98 20 94 -20; 2 101 40 105 10 100 -30"""
SHOUT = "; ink 0 66 16 66 16 66 12 82 0 88"
CAT = """50 0 250 120 265 190 220 160 140 200 80; ink 0 40 60 60 85 150 100 240 70 275 0 275;
    ink 0 -72 35 -70 85 -120 85 -120 95 -35 102 10 65 65 0 82; paper 0 40 9 30 0 30;
    eye 16 5 26 -20 46 -26 66 -12 68 10 50 20 30 20; ink 36 0 43 -20 50 0 43 16"""


def curve(points: np.ndarray, closed: bool = False) -> np.ndarray:
    """A Catmull-Rom curve through the points."""
    p = np.vstack([points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]])
    t = np.linspace(0, 1, 12)[:, None]
    return np.vstack(
        [
            b + ((c - a) + (2 * a - 5 * b + 4 * c - d + (3 * b - a - 3 * c + d) * t) * t) * t / 2
            for a, b, c, d in zip(p, p[1:], p[2:], p[3:])
        ]
    )


def box(x: float, y: float, w: float, h: float) -> np.ndarray:
    """An upright rectangle."""
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])


def ring(x: float, y: float, rx: float, ry: float, spikes: int = 0) -> np.ndarray:
    """An ellipse, or a burst when it has spikes."""
    a = np.linspace(0, 2 * np.pi, 2 * spikes or 60, endpoint=False)
    k = np.where(np.arange(a.size) % 2, 1.25, 0.92) if spikes else np.ones(a.size)
    return np.c_[x + rx * k * np.cos(a), y + ry * k * np.sin(a)]


def shape(img: np.ndarray, points: Points, fill: Fill, pen: float = 0) -> None:
    """A filled outline, whose line is heavier on the shadow side."""
    fixed = np.int32(np.asarray(points) * S * 16)  # OpenCV takes sixteenths of a pixel
    if pen:
        cv2.fillPoly(img, [fixed + int(pen * S * 8)], INK, cv2.LINE_AA, 4)
    cv2.fillPoly(img, [fixed], PAPER if isinstance(fill, float) else fill, cv2.LINE_AA, 4)
    if isinstance(fill, float):
        screentone(img, points, fill, fill)
    if pen:
        cv2.polylines(img, [fixed], True, INK, max(1, round(pen * S * 0.5)), cv2.LINE_AA, 4)


def screentone(
    img: np.ndarray, points: Points, top: float, bottom: float, ink: Fill = INK, hatched: bool = False
) -> None:
    """Dots or a crosshatch, from one density at the top of an outline to another at its bottom."""
    shape(mask := np.zeros(img.shape[:2], np.uint8), points, 255)
    y, x = np.nonzero(mask)
    u, v = np.cos((x + y) / S * 0.9), np.cos((x - y) / S * 0.9)  # rows of dots at 45 degrees, 5 pixels apart
    dark = (1 + np.maximum(u, v)) / 2 if hatched else (2 + u + v) / 4
    inked = dark > 1 - np.interp(y, (y[0], y[-1]), (top, bottom))
    img[y[inked], x[inked]] = ink


def stroke(img: np.ndarray, points: Points, width: float) -> None:
    """One pull of a pen: it lands thin, swells, and lifts thin."""
    p = curve(np.array(points))
    d = np.gradient(p, axis=0)
    half = np.c_[-d[:, 1], d[:, 0]] / (np.hypot(*d.T)[:, None] + 1e-9) * width / 2
    half *= 0.25 + 0.75 * np.sin(np.linspace(0, np.pi, len(p)))[:, None]
    shape(img, np.vstack([p + half, (p - half)[::-1]]), INK)


def speed_lines(img: np.ndarray, x: float, y: float, inner: float) -> None:
    """Wedges that point at the centre of the action."""
    rng = np.random.default_rng(7)
    for a in np.linspace(0, 2 * np.pi, 160) + rng.normal(0, 0.02, 160):
        w, reach = rng.uniform(0.003, 0.014), np.array([inner * rng.uniform(1, 1.6), W + H, W + H])
        shape(img, np.c_[x + reach * np.cos([a, a - w, a + w]), y + reach * np.sin([a, a - w, a + w])], INK)


def lettering(
    img: np.ndarray,
    text: str,
    x: float,
    y: float,
    size: float,
    ink: Fill = INK,
    edge: int = 0,
    tilt: float = 0,
) -> None:
    """Centred capitals of a given height, with a paper edge where they lie on a drawing."""
    for i, line in enumerate(text.split("\n")):
        mask = np.zeros((200, 2400), np.uint8)
        cv2.putText(mask, line, (40, 150), cv2.FONT_HERSHEY_DUPLEX, 3, 255, 9)
        left, top, w, h = cv2.boundingRect(mask)
        move = cv2.getRotationMatrix2D((left + w / 2, top + h / 2), tilt, size * S / h)
        move[:, 2] += x * S - left - w / 2, (y + (i - text.count("\n") / 2) * size * 1.5) * S - top - h / 2
        mask = cv2.warpAffine(mask, move, (W * S, H * S))
        if edge:
            brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (edge * S * 2, edge * S * 2))
            img[cv2.dilate(mask, brush) > 127] = PAPER
        img[mask > 127] = ink


def bubble(img: np.ndarray, text: str, x: float, y: float, r: float, tip: Points, spikes: int = 0) -> None:
    """A speech bubble whose tail points at the speaker; spikes make it a shout."""
    across = np.array([tip[1] - y, x - tip[0]]) / np.hypot(tip[0] - x, tip[1] - y) * r / 5
    for pen in (4, 0):  # the second pass opens the bubble into its tail
        shape(img, ring(x, y, r, r * 0.75, spikes), PAPER, pen)
        shape(img, [(x, y) + across, tip, (x, y) - across], PAPER, pen)
    lettering(img, text, x, y, r * 0.23)


@contextmanager
def panel(page: np.ndarray, corners: Points) -> Iterator[np.ndarray]:
    """A sheet to draw on, which reaches the page only inside its frame."""
    yield (art := page.copy())
    shape(mask := np.zeros(page.shape[:2], np.uint8), corners, 255)
    page[mask > 0] = art[mask > 0]
    cv2.polylines(page, [np.int32(corners) * S], True, INK, 7, cv2.LINE_AA)


def figure(
    img: np.ndarray,
    parts: str,
    x: float,
    y: float,
    r: float,
    tilt: float = 0,
    palette: dict[str, Fill] = TONED,
) -> None:
    """Draws a figure's parts and their mirror images, with its head at x, y."""
    turn = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))]) * r / 100
    for kind, *numbers in map(str.split, parts.split(";")):
        half = np.array(numbers, float).reshape(-1, 2)
        sides = [(half * (side, 1)) @ turn + (x, y) for side in (1, -1)]
        if half[0, 0] == 0:
            sides = sides[:1] if kind.isdigit() else [np.vstack([sides[0], sides[1][-2:0:-1]])]
        for points in sides:
            if kind.isdigit():
                stroke(img, points, int(kind) * r / 100)
            else:
                shape(img, curve(points, True), palette[kind], 0 if kind in ("ink", "paper") else 0.035 * r)


def skyline(img: np.ndarray, base: float, tall: float, fill: Fill, lit: Fill, seed: int) -> None:
    """A row of gabled houses with a few lit windows."""
    rng, x = np.random.default_rng(seed), -20.0
    while x < W:
        w, top = rng.uniform(45, 85), base - tall * rng.uniform(0.5, 1)
        shape(img, [(x, H), (x, top), (x + w / 2, top - w * 0.4), (x + w, top), (x + w, H)], fill, 1.2)
        for wx, wy in np.mgrid[x + 10 : x + w - 14 : 16, top + 14 : base : 26].reshape(2, -1).T:
            if rng.random() < 0.45:
                shape(img, box(wx, wy, 8, 12), lit, 0.8)
        x += w - 2


def cover(page: np.ndarray) -> None:
    """Night falls on the roofs, in colour."""
    sky = [np.interp(np.arange(H), (0, 370, 650), c) for c in ((92, 128, 150), (34, 62, 150), (40, 92, 250))]
    page[:] = np.repeat(np.transpose(sky), S, 0)[:, None]
    for x, y, r in np.random.default_rng(3).uniform((0, 0, 0.6), (W, 420, 2.2), (90, 3)):
        shape(page, ring(x, y, r, r), PAPER)
    shape(page, moon := ring(370, 320, 150, 150), (190, 236, 255))
    screentone(page, moon, 0.02, 0.5, (130, 200, 250))
    skyline(page, 560, 110, (130, 64, 70), GLOW, 1)
    skyline(page, 650, 110, (84, 38, 44), GLOW, 4)
    shape(page, box(340, 535, 240, 300), (60, 26, 30), 2)
    shape(page, box(330, 525, 240, 16), (110, 60, 60), 2)
    figure(page, CAT, 440, 420, 40, 0, COLOUR)
    figure(page, GIRL, 185, 590, 105, -0.08, COLOUR)
    lettering(page, "REICHAN", 280, 90, 70, (70, 60, 220), 6)
    lettering(page, "VOL. 01", 452, 610, 28, GLOW)


def page_one(page: np.ndarray) -> None:
    """A quiet night, and somebody on the roof."""
    with panel(page, box(20, 20, 520, 270)) as art:
        screentone(art, box(0, 0, W, 270), 0.75, 0.02)
        shape(art, ring(430, 95, 48, 48), PAPER, 1)
        skyline(art, 270, 90, 0.3, PAPER, 2)
        shape(art, box(150, 110, 70, 200), PAPER, 2)
        screentone(art, box(195, 111, 24, 200), 0.15, 0.3, hatched=True)
        shape(art, [(140, 112), (185, 40), (230, 112)], INK)
        shape(art, ring(176, 145, 18, 18), PAPER, 2)
        stroke(art, [(176, 131), (176, 146), (186, 150)], 3)
        skyline(art, 320, 80, PAPER, INK, 6)
    with panel(page, [(20, 302), (250, 302), (220, 530), (20, 530)]) as art:
        screentone(art, box(0, 300, W, 240), 0.1, 0.35)
        figure(art, CAT, 105, 400, 42)
    with panel(page, [(262, 302), (540, 302), (540, 530), (232, 530)]) as art:
        figure(art, GIRL, 430, 440, 80, 0.06)
        bubble(art, "IS THAT\nA CAT?", 308, 358, 52, (365, 425))
    with panel(page, box(20, 542, 520, 238)) as art:
        speed_lines(art, 340, 660, 130)
        figure(art, GIRL + SHOUT, 340, 670, 90, -0.1)
        bubble(art, "WAIT\nFOR ME!", 120, 630, 66, (240, 690), 14)


def page_two(page: np.ndarray) -> None:
    """The chase."""
    with panel(page, [(20, 20), (540, 20), (540, 330), (20, 400)]) as art:
        speed_lines(art, 270, 210, 120)
        figure(art, CAT, 250, 160, 52, 0.5)
        lettering(art, "DASH!", 425, 85, 44, INK, 5, 12)
    with panel(page, [(20, 414), (540, 344), (540, 500), (20, 560)]) as art:
        figure(art, GIRL, 280, 420, 190)
    with panel(page, [(20, 574), (540, 514), (540, 780), (20, 780)]) as art:
        screentone(art, [(0, 540), (250, 540), (210, 780), (0, 780)], 0.3, 0.1, hatched=True)
        figure(art, CAT, 110, 650, 42)
        figure(art, GIRL + SHOUT, 430, 690, 82, 0.1)
        bubble(art, "GOT\nYOU!", 300, 640, 50, (365, 685), 12)


def page_three(page: np.ndarray) -> None:
    """Home, under the moon."""
    with panel(page, box(20, 20, 520, 760)) as art:
        screentone(art, box(0, 0, W, 620), 0.85, 0.02)
        shape(art, ring(370, 250, 140, 140), PAPER, 1)
        skyline(art, 640, 110, 0.2, PAPER, 8)
        skyline(art, 760, 120, PAPER, INK, 9)
        figure(art, GIRL, 240, 520, 120, -0.1)
        figure(art, CAT, 222, 278, 42, -0.1)
        bubble(art, "LET'S GO\nHOME!", 450, 465, 64, (350, 560))
        lettering(art, "TO BE CONTINUED", 280, 745, 22, INK, 5)


def sample_page(n: int) -> np.ndarray:
    """The cover (n = 0, BGR) or a grey page, as worn as a scan that went through the web."""
    page = np.full((H * S, W * S, 3), PAPER, np.uint8)
    (cover, page_one, page_two, page_three)[n](page)
    small = cv2.GaussianBlur(cv2.resize(page, (W, H), interpolation=cv2.INTER_AREA), (0, 0), 0.6)
    small = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY) if n else small
    return cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 78])[1], cv2.IMREAD_UNCHANGED)


def write_volume(target: Path) -> None:
    """The whole volume as a cbz."""
    with zipfile.ZipFile(target, "w") as archive:
        for n in range(SAMPLE_PAGES):
            archive.writestr(f"{n:03d}.png", cv2.imencode(".png", sample_page(n))[1].tobytes())


if __name__ == "__main__":
    write_volume(Path(sys.argv[1]))
