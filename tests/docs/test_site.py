"""The site builds without warnings, shows every key, and asks nothing of other sites to be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import REPO
from texforce_ray.config import Config


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it; with `--quiet`, `--strict` would not fail at warnings."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=REPO, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return out


def test_every_key_is_on_the_configuration_page(site: Path) -> None:
    page = (site / "configuration.html").read_text()
    for section, field in Config.model_fields.items():
        assert f'id="{section}"' in page or f"<code>{section}</code>" in page, section
        assert field.description, section
    for key in (
        "rollout.num_workers",
        "rewards.0.weight",
        "lora.denoiser.rank",
        "eval.prompts.set",
    ):
        assert f"<code>{key}</code>" in page, key
    row = re.search(r"<tr>\s*<td><code>optimizer.lr</code>.*?</tr>", page, re.DOTALL)
    assert row is not None
    assert [c in row[0] for c in ("float, &gt; 0", "0.0003", "recorded", "peak")] == [True] * 4


def test_pages_of_the_root_are_there_with_links_that_lead_somewhere(site: Path) -> None:
    contributing = (site / "contributing.html").read_text()
    assert 'href="architecture.html"' in contributing
    assert "Keep a Changelog" in (site / "changelog.html").read_text()


def test_reading_needs_no_other_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"?(https?://[^\s\">]+)",
                            page.read_text())  # fmt: skip
        assert not loaded, page


def test_links_of_the_readme_and_of_the_citation() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (REPO / page).read_text()):
            generated = link in ("docs/configuration.md",)
            assert (REPO / link).exists() or generated, f"{page}: {link}"
    from texforce_ray import __version__

    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"[{__version__}]" in (REPO / "CHANGELOG.md").read_text()
