"""Pages that tests read."""

import io

import pypdf

ARTICLE = (
    "<html><head><title>Nepal &amp; its\n flag</title><script>alert('no')</script></head><body>"
    "<nav><a href='/'>Home</a> <a href='/b'>About us</a></nav><article><h1>Nepal</h1><p>"
    + "Nepal is a country in the Himalayas, and its capital is Kathmandu. "
    * 3
    + "</p><p>Its flag is the only one that is not a quadrilateral, as everybody knows.</p>"
    "</article><footer>Copyright</footer></body></html>"
)


def pdf(*lines, compress=False):
    """A PDF with a page for each line."""
    writer = pypdf.PdfWriter()
    for line in lines:
        page = writer.add_blank_page(300, 300)
        font = pypdf.generic.DictionaryObject()
        name = pypdf.generic.NameObject
        font.update({name("/Type"): name("/Font"), name("/Subtype"): name("/Type1")})
        font[name("/BaseFont")] = name("/Helvetica")
        fonts = pypdf.generic.DictionaryObject({name("/F1"): writer._add_object(font)})
        page[name("/Resources")] = pypdf.generic.DictionaryObject({name("/Font"): fonts})
        stream = pypdf.generic.DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({line}) Tj ET".encode())
        page[name("/Contents")] = writer._add_object(stream.flate_encode() if compress else stream)
    writer.add_metadata({"/Title": "A report"})
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()
