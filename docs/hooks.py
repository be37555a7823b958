"""Pages of the site that are made while it is built: the configuration's keys, the root's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from texforce_ray.config.help import markdown

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; links of the root's files lead into docs/, so their prefix goes."""
    pages = {"configuration.md": markdown()}
    for page, source in FROM_ROOT.items():
        pages[page] = (ROOT / source).read_text().replace("](docs/", "](")
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files
