"""Experts behind HTTP, by OpenAI's protocols, which vLLM-Omni, SGLang and LiteLLM serve too.

A secret is read from the environment variable that the configuration names, sent in one header, and shown nowhere.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import msgspec
import torch
from PIL import Image
from torch import Tensor

from fastdiff.pictures.grid import to_uint8
from fastdiff.poser.records import ExpertError, Spec
from fastdiff.training.pictures import read_picture

TRIES = 3  # of a call that cannot have been billed
PAUSE = 0.5  # seconds before the second, twice as long before each later one
LONGEST = 30.0  # seconds that a server may ask to wait


def check_url(name: str, url: str) -> str:
    """A URL of http or https without a name or password in it, else ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must begin with http:// or https:// and name a host; got {url!r}")
    if parts.username or parts.password:
        raise ValueError(f"{name} must not hold a password: key names the environment variable that does")
    return url.rstrip("/")


class Endpoint:
    """One server. key: the name of the environment variable with its secret, "" for none; timeout: seconds.

    Raises ImportError where httpx is missing, ValueError for a bad URL and a variable that is not set.
    """

    def __init__(self, name: str, url: str, key: str, timeout: float) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError('experts behind HTTP need httpx: pip install "fastdiff-torch[poser]"') from error
        self.name, self.url, self.httpx = name, check_url(f"url of {name}", url), httpx
        self._secret = os.environ.get(key, "") if key else ""
        if key and not self._secret:
            raise ValueError(f"key of {name}: the environment variable {key!r} is not set; it must hold the secret")
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        self.client = httpx.Client(timeout=timeout, headers=headers)

    def post(self, path: str, **how: Any) -> Any:
        """The JSON of a reply. Tries again only where nothing can have been billed: the connection was not made, or
        the server refused the call before it began (429). Raises ExpertError, billed where that is not so.
        """
        for number in range(1, TRIES + 1):
            wait, billed = PAUSE * 2 ** (number - 1), False
            try:
                reply = self.client.post(self.url + path, **how)
            except (self.httpx.ConnectError, self.httpx.ConnectTimeout, self.httpx.PoolTimeout) as error:
                problem = f"no connection: {error!r}"
            except self.httpx.HTTPError as error:
                raise self._failed(f"{error!r}; it may have been billed and is not sent again", True) from None
            else:
                if reply.status_code == 200:
                    return self._json(reply)
                problem = f"HTTP {reply.status_code}: {reply.text[:300]}"
                billed = reply.status_code >= 500  # 4xx is refused; what failed inside may have been paid for
                if reply.status_code != 429:
                    raise self._failed(problem, billed)
                asked = reply.headers.get("retry-after", "")
                wait = min(LONGEST, float(asked)) if asked.isdigit() else wait
            if number < TRIES:
                time.sleep(wait)
        raise self._failed(f"{problem} ({TRIES} tries)", billed)

    def _json(self, reply: Any) -> Any:
        try:
            return msgspec.json.decode(reply.content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._failed(f"its reply is no JSON: {error}", True) from None

    def _failed(self, problem: str, billed: bool) -> ExpertError:
        shown = problem.replace(self._secret, "…") if self._secret else problem
        return ExpertError(f"{self.name}: {shown}", billed=[billed])


class RemoteExpert:
    """Images by ``/images/generations`` (kind "generations") or ``/images/edits`` (kind "edits"), as b64_json."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.endpoint = Endpoint(spec.name, spec.url, spec.key, spec.timeout)

    def run(self, images: Tensor | None, commands: Sequence[str], seeds: Sequence[int]) -> Tensor:
        given = [None] * len(commands) if images is None else list(images)
        with ThreadPoolExecutor(self.spec.concurrency) as pool:
            found = list(pool.map(self._try, given, commands, seeds))
        errors = [each for each in found if isinstance(each, ExpertError)]
        if errors:
            kept = [None if isinstance(each, ExpertError) else each for each in found]
            billed = [each.billed[0] if isinstance(each, ExpertError) else True for each in found]
            raise ExpertError(str(errors[0]), kept, billed)
        return torch.stack([each for each in found if isinstance(each, Tensor)])

    def _try(self, image: Tensor | None, command: str, seed: int) -> Tensor | ExpertError:
        try:
            return self._one(image, command, seed)
        except ExpertError as error:
            return error

    def _one(self, image: Tensor | None, command: str, seed: int) -> Tensor:
        spec = self.spec
        asked = {"model": spec.model, "prompt": command, "n": 1, "response_format": "b64_json", **spec.options}
        asked |= {"seed": seed} if spec.seeded else {}
        asked = {name: value for name, value in asked.items() if value != ""}  # "" leaves one of ours out
        if image is None:
            reply = self.endpoint.post("/images/generations", json=asked)
        else:
            files = {"image": ("image.png", png(image), "image/png")}
            data = {name: str(value) for name, value in asked.items()}
            reply = self.endpoint.post("/images/edits", data=data, files=files)
        try:
            content = base64.b64decode(reply["data"][0]["b64_json"], validate=True)
            pixels = read_picture(Image.open(io.BytesIO(content)), (spec.size, spec.size)).expand(3, -1, -1)
        except (LookupError, TypeError, ValueError, OSError) as error:
            told = f"{spec.name}: its reply holds no picture as data[0].b64_json: {error!r}"
            raise ExpertError(told, billed=[True]) from None
        return pixels.float() / 127.5 - 1


def png(image: Tensor) -> bytes:
    """A picture [3, H, W] in [-1, 1] as a file."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")
    return file.getvalue()
