"""Hooks of the site's build: see ``hooks`` in mkdocs.yml."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# The stub of a public name for code hosts; the site has its whole docstring instead.
_API = re.compile(r"<!-- generated: api (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)]*)\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put docstrings where code hosts show signatures; turn links that leave the site into plain text."""
    folder = PurePosixPath(page.file.src_uri).parent

    def leads_outside(target: str) -> bool:
        return target.count("../") > len(folder.parts)

    return _LINK.sub(lambda link: link[1] if leads_outside(link[2]) else link[0], put_docstrings(markdown))


def put_docstrings(markdown: str) -> str:
    """Put the directive for a name's docstring where the page has its signature."""
    return _API.sub(r"::: \1", markdown)


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Put each page's source beside it: llms.txt links to these."""
    source, site = Path(config.docs_dir), Path(config.site_dir)
    for page in source.rglob("*.md"):
        shutil.copyfile(page, site / page.relative_to(source))
