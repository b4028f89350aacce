"""Download published files once and check them."""

import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from torchvision.datasets.utils import download_url

from dlref.runtime.errors import UserError, one_line


def fetch(urls: Sequence[str], path: Path, md5: str) -> None:
    """Download `path` from the first of `urls` that delivers a file with the given MD5 sum.

    The file is downloaded to a temporary folder and then moved, so `path` is never partial or damaged, even if several
    processes download it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as part:
        for url in urls:
            try:
                download_url(url, part, path.name, md5)
            except (OSError, HTTPException, RuntimeError) as error:  # unreachable, or the wrong content
                if isinstance(error, HTTPError):
                    error.close()
                failures.append(f"{url} ({one_line(error)})")
            else:
                Path(part, path.name).replace(path)
                return
    raise UserError(f"{path}: not downloaded from {', '.join(failures)}; expected a mirror that has it")
