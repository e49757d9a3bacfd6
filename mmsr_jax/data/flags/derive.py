"""Derives the committed assets from two public npm packages, so that anyone can reproduce them.

    python -m mmsr_jax.data.flags.derive svg-country-flags-1.2.10.tgz world-countries-5.1.0.tgz

Flags (public domain) are taken byte for byte from the 100 px PNGs; facts (ODbL 1.0) are a subset
of `countries.json`. Only independent countries are kept. Flags that a blurred, cropped picture
could not tell apart are left out, see `distance` and `NEARLY_EQUAL`.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import tarfile
import zipfile

import numpy as np
from PIL import Image

from mmsr_jax.data.flags.augment import on_white

ASSETS = pathlib.Path(__file__).parent / "assets"
FLAG_MEMBER = "package/png100px/{code}.png"
FACTS_MEMBER = "package/dist/countries.json"  # the flags package has a countries.json too

# Mean absolute RGB difference (0 to 1) below which two flags count as one picture. Measured on
# all pairs: Monaco/Indonesia .006, Egypt/Yemen .009, Australia/New Zealand .029, Honduras/
# Nicaragua .036, Chad/Romania .040 lie below; the next are China/Vietnam .056 (a small star
# against a large one) and Russia/Slovenia .059 (coat of arms).
NEARLY_EQUAL = 0.045


def thumbnail(png: bytes) -> np.ndarray:
    """A flag on white, stretched to 42 x 28 by box averaging. -> [28, 42, 3] float64 in 0..1."""
    small = on_white(png).resize((42, 28), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails over pixels and channels, 0 to 1."""
    return float(np.abs(a - b).mean())


def facts(country: dict) -> dict:
    """The part of one `world-countries` entry that the world needs."""
    idd, suffixes = country["idd"].get("root", ""), country["idd"].get("suffixes", [])
    currencies = country["currencies"] or {}  # an empty list where there are none
    return {
        "name": country["name"]["common"],
        "official": country["name"]["official"],
        "capital": country["capital"],
        "region": country["region"],
        "subregion": country["subregion"],
        "currencies": [c["name"] for c in currencies.values()],
        "languages": list(country["languages"].values()),
        "tld": country["tld"][0],
        # Countries that share +1 or +7 list their area codes as suffixes.
        "calling_code": idd if idd in ("+1", "+7") and len(suffixes) > 1 else idd + suffixes[0],
        "demonym": country["demonyms"]["eng"]["m"],
        "landlocked": country["landlocked"],
        "area": country["area"],
    }


def member(archives: list[tarfile.TarFile], name: str) -> bytes:
    """The bytes of a file that one of the archives holds. ValueError when none does."""
    for archive in archives:
        if name in archive.getnames():
            return archive.extractfile(name).read()
    raise ValueError(f"no {name} in {[archive.name for archive in archives]}")


def derive(tarballs: list[str], assets: pathlib.Path = ASSETS) -> dict:
    """Writes `flags.zip` and `facts.json` into `assets`; returns what `facts.json` holds."""
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(tarfile.open(path)) for path in tarballs]
        listed = [c for c in json.loads(member(archives, FACTS_MEMBER)) if c["independent"]]
        countries = {c["cca2"]: facts(c) for c in sorted(listed, key=lambda c: c["cca2"])}
        pngs = {code: member(archives, FLAG_MEMBER.format(code=code.lower())) for code in countries}
        licence = member(archives, "package/LICENSE").decode().replace("\r\n", "\n")
    small = {code: thumbnail(png) for code, png in pngs.items()}

    pairs = {(a, b): distance(small[a], small[b]) for a, b in itertools.combinations(countries, 2)}
    near = sorted((d, a, b) for (a, b), d in pairs.items() if d < NEARLY_EQUAL)
    # Both go: a picture that fits two countries has no right answer.
    dropped = {code for _, a, b in near for code in (a, b)}
    kept = [code for code in countries if code not in dropped]
    for code in kept:
        nearest = min(
            (pairs[min(code, other), max(code, other)], other) for other in kept if other != code
        )
        countries[code]["nearest_flag"] = {"code": nearest[1], "distance": round(nearest[0], 4)}

    assets.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(assets / "flags.zip", "w", zipfile.ZIP_STORED) as archive:
        for code in kept:  # a fixed date: the same input gives the same bytes
            archive.writestr(zipfile.ZipInfo(f"{code}.png", (2000, 1, 1, 0, 0, 0)), pngs[code])
    result = {
        "source": "world-countries (ODbL 1.0), see ATTRIBUTION.md",
        "nearly_equal": [{"codes": [a, b], "distance": round(d, 4)} for d, a, b in near],
        "countries": countries,
    }
    text = json.dumps(result, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    (assets / "facts.json").write_text(text, encoding="utf-8")
    (assets / "LICENSE-facts-ODbL-1.0.md").write_text(licence, encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tarballs", nargs=2, help="the two npm tarballs, in any order")
    parser.add_argument("--assets", type=pathlib.Path, default=ASSETS, help="where to write")
    arguments = parser.parse_args()
    result = derive(arguments.tarballs, arguments.assets)
    for pair in result["nearly_equal"]:
        print("dropped", *pair["codes"], pair["distance"])
    flags = sum("nearest_flag" in country for country in result["countries"].values())
    print(f"{len(result['countries'])} countries, {flags} flags in {arguments.assets}")


if __name__ == "__main__":
    main()
