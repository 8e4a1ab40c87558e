"""Pictures as what an <img> takes without a request."""

import base64
import io

from PIL import Image

THUMBNAIL = 160  # pixels, the most that a picture is embedded with


def data_uri(data, kind):
    """Bytes of an image file -> a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(path):
    """An image file -> a data URI of at most THUMBNAIL pixels a side."""
    with Image.open(path, formats=["PNG"]) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return encoded(image)


def encoded(image):
    """A PIL image -> a data URI: PNG where it is small, so that its pixels stay, else JPEG."""
    kind, stream = "PNG" if max(image.size) < THUMBNAIL else "JPEG", io.BytesIO()
    image.convert("RGB").save(stream, kind, quality=88)
    return data_uri(stream.getvalue(), kind.lower())
