"""Countries as the committed assets tell them: facts and flags."""

import dataclasses
import functools
import importlib.resources
import io
import json
import unicodedata
import zipfile

ASSETS = importlib.resources.files("mmsr_jax.data.flags") / "assets"

# Names of capitals that people also use and the source does not list; own additions.
OTHER_CAPITALS = {
    "BO": ("La Paz",),
    "KI": ("Tarawa",),
    "KZ": ("Nur-Sultan",),
    "MM": ("Nay Pyi Taw",),
    "MN": ("Ulaanbaatar",),
    "MX": ("Ciudad de Mexico",),
    "SZ": ("Mbabane",),
    "UA": ("Kiev",),
    "US": ("Washington", "Washington DC"),
    "YE": ("Sanaa",),
}


@dataclasses.dataclass(frozen=True)
class Country:
    """One country. Texts keep the source's spelling; `name` is short plain ASCII."""

    code: str  # ISO 3166-1 alpha-2
    name: str  # `plain` of the common name
    true_name: str
    official: str
    capitals: tuple[str, ...]  # the source's, first the seat it lists first
    region: str
    subregion: str
    currencies: tuple[str, ...]
    languages: tuple[str, ...]
    tld: str
    calling_code: str
    demonym: str
    landlocked: bool
    area: float  # km^2
    flag_margin: float  # distance to the most similar other flag, 0 to 1; 0 without a flag

    @property
    def has_flag(self) -> bool:
        return self.flag_margin > 0


def plain(text: str) -> str:
    """ASCII transliteration: marks are stripped after NFKD, typographic apostrophes straightened.

    Anything else that is not ASCII is dropped ("São Tomé" -> "Sao Tome").
    """
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u02bb", "'")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@functools.cache
def countries() -> dict[str, Country]:
    """All independent countries by code, in code order."""
    listed = json.loads((ASSETS / "facts.json").read_text(encoding="utf-8"))["countries"]
    return {
        code: Country(
            code=code,
            name=plain(entry["name"]),
            true_name=entry["name"],
            official=entry["official"],
            capitals=tuple(entry["capital"]),
            region=entry["region"],
            subregion=entry["subregion"],
            currencies=tuple(entry["currencies"]),
            languages=tuple(entry["languages"]),
            tld=entry["tld"],
            calling_code=entry["calling_code"],
            demonym=entry["demonym"],
            landlocked=entry["landlocked"],
            area=float(entry["area"]),
            flag_margin=entry.get("nearest_flag", {}).get("distance", 0.0),
        )
        for code, entry in sorted(listed.items())
    }


@functools.cache
def flags() -> dict[str, bytes]:
    """PNG bytes of every distinct flag by country code, in code order."""
    with zipfile.ZipFile(io.BytesIO((ASSETS / "flags.zip").read_bytes())) as archive:
        return {
            name.removesuffix(".png"): archive.read(name) for name in sorted(archive.namelist())
        }
