"""The script that made the committed assets, on two made-up packages."""

import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from mmsr_jax.data.flags.derive import derive


def flag(*colours):
    image = Image.new("RGB", (100, 60))
    for place, colour in enumerate(colours):
        image.paste(colour, (place * 100 // len(colours), 0, 100, 60))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def country(code, **fields):
    return {
        "cca2": code,
        "independent": True,
        "name": {"common": f"Land {code}", "official": f"The Land of {code}"},
        "capital": [f"City {code}"],
        "region": "Asia",
        "subregion": "Southern Asia",
        "currencies": {"X": {"name": "Pound", "symbol": "P"}},
        "languages": {"x": "Xish"},
        "tld": [f".{code.lower()}"],
        "idd": {"root": "+9", "suffixes": ["77"]},
        "demonyms": {"eng": {"m": "Xer", "f": "Xer"}},
        "landlocked": True,
        "area": 10,
        "translations": {"fra": {}},
    } | fields


def archive(path, files):
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def tarballs(tmp_path):
    countries = [
        country("CC", currencies=[], idd={"root": "+1", "suffixes": ["201", "202"]}),
        country("AA"),
        country("BB"),
        country("DD", idd={"root": "+3", "suffixes": ["79", "906"]}),
        country("ZZ", independent=False),
    ]
    flags = {
        "aa": flag("red", "white"),
        "bb": flag("blue", "yellow", "black"),
        "cc": flag((250, 0, 0), "white"),  # nearly AA's
        "dd": flag("green", "black"),
    }
    pngs = {f"package/png100px/{code}.png": png for code, png in flags.items()}
    return [
        archive(tmp_path / "flags.tgz", pngs | {"package/countries.json": b'{"AA": "Land"}'}),
        archive(
            tmp_path / "facts.tgz",
            {
                "package/dist/countries.json": json.dumps(countries).encode(),
                "package/LICENSE": b"Open\r\n",
            },
        ),
    ]


def test_derives_flags_facts_and_licence(tarballs, tmp_path):
    out = tmp_path / "assets"
    result = derive(tarballs, out)
    assert [pair["codes"] for pair in result["nearly_equal"]] == [["AA", "CC"]]
    assert list(result["countries"]) == ["AA", "BB", "CC", "DD"]
    with zipfile.ZipFile(out / "flags.zip") as packed:
        assert packed.namelist() == ["BB.png", "DD.png"]
        assert packed.read("BB.png") == flag("blue", "yellow", "black")
    assert result["countries"]["BB"]["nearest_flag"]["code"] == "DD"
    assert "nearest_flag" not in result["countries"]["AA"]
    assert json.loads((out / "facts.json").read_text()) == result
    assert (out / "LICENSE-facts-ODbL-1.0.md").read_bytes() == b"Open\n"


def test_awkward_entries(tarballs, tmp_path):
    countries = derive(tarballs, tmp_path / "assets")["countries"]
    assert countries["CC"]["currencies"] == []
    codes = [countries[code]["calling_code"] for code in ("AA", "CC", "DD")]
    assert codes == ["+977", "+1", "+379"]


def test_same_input_same_bytes(tarballs, tmp_path):
    for name in ("one", "two"):
        derive(tarballs if name == "one" else tarballs[::-1], tmp_path / name)
    for name in ("flags.zip", "facts.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_missing_file_is_named(tarballs, tmp_path):
    with pytest.raises(ValueError, match=r"no package/dist/countries.json in .*flags.tgz"):
        derive([tarballs[0]] * 2, tmp_path / "assets")
