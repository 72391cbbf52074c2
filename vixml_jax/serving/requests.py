"""From the bytes of a request to a query; whatever is wrong with them is the client's mistake, a 4xx.

JSON: {"title": "red kettle", "content": "...", "image": "<base64>", "images": ["<base64>", ...], "k": 10},
where "text" may stand for title and content. Or multipart/form-data with the same names, a picture being a
file.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import json
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from vixml_jax.data import fields
from vixml_jax.serving.limits import Limits

TEXTS = ("text", "title", "content")
FIELDS = (*TEXTS, "image", "images", "k")
DEFAULT_K = 10


class Refused(Exception):
    """What the client is told, with an HTTP status."""

    def __init__(self, status: HTTPStatus, problem: str):
        super().__init__(problem)
        self.status, self.problem = status, problem


class Query(NamedTuple):
    """A query.

    Attributes:
      title, content: texts, cleaned as training texts are; a "text" is a title.
      images: encoded pictures, checked for their size but not unpacked yet.
      k: labels asked for.
    """

    title: str
    content: str
    images: tuple[bytes, ...]
    k: int


class Held:
    """Bytes of bodies in memory, of all requests together.

    Args:
      most: beyond it requests are refused.
    """

    def __init__(self, most: int):
        self._most, self._bytes = most, 0

    @contextlib.contextmanager
    def claim(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that counts bytes as they come; they are given back at the end.

        Raises (that function):
          Refused: if there would be too many.
        """
        own = 0

        def count(size: int) -> None:
            nonlocal own
            if self._bytes + size > self._most:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many large requests at a time")
            own += size
            self._bytes += size

        try:
            yield count
        finally:
            self._bytes -= own


async def read_query(request: Request, limits: Limits, count: Callable[[int], None]) -> Query:
    """Reads a request for a prediction; `count` is told of its bytes as they come.

    Raises:
      Refused: if it is no such request, or larger than the limits.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "send application/json or multipart/form-data, not " + repr(kind[:80]),
        )
    body = await read_body(request, limits, count)
    if kind == "application/json":
        given, images = _from_json(body)
    else:
        given, images = await _from_form(request, body, limits)
    return _checked(given, images, limits)


async def read_body(request: Request, limits: Limits, count: Callable[[int], None]) -> bytes:
    """Reads a body no further than the limit allows."""
    too_large = Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {limits.body_bytes:,} bytes"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.body_bytes:
                    raise too_large
                count(len(chunk))
                body += chunk
    except TimeoutError:
        raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"the body took over {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise Refused(HTTPStatus.BAD_REQUEST, "the body ended early") from None
    return bytes(body)


def _from_json(body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is not valid JSON") from None
    if not isinstance(given, dict):
        raise Refused(HTTPStatus.BAD_REQUEST, 'give a JSON object such as {"title": "red kettle"}')
    images = given.get("images") or []
    if not isinstance(images, list):
        raise Refused(HTTPStatus.BAD_REQUEST, '"images" is not a list')
    if given.get("image"):
        images = [given["image"], *images]
    return given, [_decoded(image) for image in images]


def _decoded(image: Any) -> bytes:
    if not isinstance(image, str):
        raise Refused(HTTPStatus.BAD_REQUEST, "a picture is not a base64 text")
    if image.startswith("data:"):  # as a page has it
        image = image.partition(",")[2]
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(HTTPStatus.BAD_REQUEST, "a picture is not valid base64") from None


async def _from_form(request: Request, body: bytes, limits: Limits) -> tuple[dict[str, Any], list[bytes]]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers,
        stream(),  # type: ignore[arg-type]
        max_files=limits.images,
        max_fields=len(FIELDS),
        max_part_size=limits.body_bytes,
    )
    # The body is in memory already, and no larger than the limit: no temporary files.
    parser.spool_max_size = limits.body_bytes + 1
    try:
        form: FormData = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        problem = error.message if isinstance(error, MultiPartException) else "it cannot be read"
        raise Refused(HTTPStatus.BAD_REQUEST, f"not valid multipart/form-data: {problem[:200]}") from None
    given: dict[str, Any] = {}
    images = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "images"):
                    raise Refused(HTTPStatus.BAD_REQUEST, f"a file in {name[:80]!r}; pictures are in 'image'")
                images.append(await value.read())
            elif name in given:
                raise Refused(HTTPStatus.BAD_REQUEST, f"{name[:80]!r} is given twice")
            elif name in ("image", "images"):
                if value:  # an empty field is a file that was not chosen
                    raise Refused(HTTPStatus.BAD_REQUEST, "a picture is not a file")
            else:
                given[name] = value
    finally:
        await form.close()
    if isinstance(k := given.get("k"), str):
        if not (k.isascii() and k.isdecimal() and len(k) < 10):
            raise Refused(HTTPStatus.BAD_REQUEST, f"k is {k[:80]!r}, not a whole number")
        given["k"] = int(k)
    return given, [image for image in images if image]


def _checked(given: Mapping[str, Any], images: list[bytes], limits: Limits) -> Query:
    if unknown := sorted(str(name) for name in set(given) - set(FIELDS)):
        known = ", ".join(FIELDS)
        raise Refused(HTTPStatus.BAD_REQUEST, f"unknown field {unknown[0][:80]!r}; known are {known}")
    texts = {}
    for name in TEXTS:
        value = given.get(name)
        if value is not None and not isinstance(value, str):
            raise Refused(HTTPStatus.BAD_REQUEST, f'"{name}" is not a text')
        texts[name] = value or ""
    if sum(map(len, texts.values())) > limits.text_chars:
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"texts of more than {limits.text_chars:,} characters"
        )
    if texts["text"] and (texts["title"] or texts["content"]):
        raise Refused(HTTPStatus.BAD_REQUEST, 'give "text", or "title" and "content", not both')
    title, content = (fields.clean(text) for text in (texts["text"] or texts["title"], texts["content"]))
    if not (title or content or images):
        raise Refused(HTTPStatus.BAD_REQUEST, "neither a text nor a picture")
    k = given.get("k")
    k = DEFAULT_K if k is None else k
    if type(k) is not int or not 1 <= k <= limits.k:
        raise Refused(HTTPStatus.BAD_REQUEST, f"k is not a whole number from 1 to {limits.k}")
    if len(images) > limits.images:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{len(images)} pictures; at most {limits.images}")
    for number, image in enumerate(images, 1):
        _check_picture(image, number, limits)
    return Query(title, content, tuple(images), k)


def _check_picture(image: bytes, number: int, limits: Limits) -> None:
    """Reads a picture's head alone: it says how large it would become."""
    unreadable = Refused(HTTPStatus.BAD_REQUEST, f"picture {number} cannot be read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is below Pillow's warning, or meant
            with Image.open(io.BytesIO(image)) as opened:
                width, height = opened.size
    except Image.DecompressionBombError:
        width, height = limits.image_pixels, 2
    except Exception:  # Pillow's plugins raise anything on hostile bytes
        raise unreadable from None
    if width * height > limits.image_pixels:
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"picture {number} has more than {limits.image_pixels:,} pixels",
        )
    if not width * height:
        raise unreadable
