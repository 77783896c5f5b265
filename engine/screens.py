"""E-readers: how many pixels their screens have, and in how many greys.

Map: Screen - SCREENS - settings_of
Rule: a screen says what a page may have; no page is computed otherwise for it.
Runs in: the http-* threads, the worker. Standard library only.

Pixels are what is generally given for these models, and nothing here measures them: targetWidth and
targetHeight say otherwise where one is wrong. E Ink screens of this kind show 16 greys. A colour screen
shows its colours at half these pixels; black and white, above all lettering, at all of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Screen:
    """A screen, held upright: what there is to be seen at once."""

    name: str
    width: int  # pixels
    height: int
    greys: int = 16
    colour: bool = False


SCREENS = {
    "kindle-keyboard": Screen("Kindle Keyboard, Touch, 5, 7, 8, 10", 600, 800),
    "kindle-paperwhite-2": Screen("Kindle Paperwhite 1, 2", 758, 1024),
    "kindle-paperwhite-4": Screen("Kindle Paperwhite 3, 4, Voyage, Oasis 1", 1072, 1448),
    "kindle-11": Screen("Kindle 11", 1072, 1448),
    "kindle-paperwhite-5": Screen("Kindle Paperwhite 5", 1236, 1648),
    "kindle-oasis-3": Screen("Kindle Oasis 2, 3", 1264, 1680),
    "kindle-scribe": Screen("Kindle Scribe", 1860, 2480),
    "kobo-touch": Screen("Kobo Mini, Touch", 600, 800),
    "kobo-glo-hd": Screen("Kobo Glo HD", 1072, 1448),
    "kobo-aura": Screen("Kobo Aura", 758, 1024),
    "kobo-aura-hd": Screen("Kobo Aura HD", 1080, 1440),
    "kobo-aura-one": Screen("Kobo Aura ONE", 1404, 1872),
    "kobo-nia": Screen("Kobo Nia", 758, 1024),
    "kobo-clara": Screen("Kobo Clara HD, 2E, BW", 1072, 1448),
    "kobo-clara-colour": Screen("Kobo Clara Colour", 1072, 1448, colour=True),
    "kobo-libra": Screen("Kobo Libra H2O, Libra 2", 1264, 1680),
    "kobo-libra-colour": Screen("Kobo Libra Colour", 1264, 1680, colour=True),
    "kobo-forma": Screen("Kobo Forma", 1440, 1920),
    "kobo-sage": Screen("Kobo Sage", 1440, 1920),
    "kobo-elipsa": Screen("Kobo Elipsa, 2E", 1404, 1872),
}


def settings_of(name: str) -> dict[str, int | str]:
    """The params that a screen stands for, where a request does not give them itself."""
    screen = SCREENS[name]
    settings: dict[str, int | str] = {"target_width": screen.width, "target_height": screen.height}
    return settings if screen.colour else settings | {"color": "gray"}
