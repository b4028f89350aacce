"""Published files, fetched once and checked."""

import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from torchvision.datasets.utils import download_url

from dlref.runtime.errors import UserError, one_line


def fetch(urls: Sequence[str], path: Path, md5: str) -> None:
    """Download `path` from the first of its mirrors that delivers a file with that MD5 sum.

    It arrives under another name, so that `path` is never a part of a file nor a broken one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may be at it, too
    failures = []
    for url in urls:
        try:
            download_url(url, path.parent, part.name, md5)
        except (OSError, HTTPException, RuntimeError) as error:  # unreachable, or delivered something else
            if isinstance(error, HTTPError):
                error.close()
            failures.append(f"{url} ({one_line(error)})")
        else:
            part.replace(path)
            return
        finally:
            part.unlink(missing_ok=True)
    raise UserError(f"{path}: not downloaded from {', '.join(failures)}; expected a mirror that has it")
