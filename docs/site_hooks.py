"""Files outside docs/ on the site: a link that works in a checkout works on the site too.

A page may link to any file of the repository, such as ``../benchmarks/README.md`` or a plot. Such files join the site
under ``repository/``: Markdown as pages, folders as lists of their files, everything else as it is. Links are rewritten
to them. A link to a file that does not exist is left as it is, so that the strict build fails.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

OUTSIDE = "repository"
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md")  # in the navigation, whoever links to them
_LINK = re.compile(r'(\]\(|(?:src|href|srcset)=")(?![a-z]+:|#|/)([^)#"\s]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what those pages link to in turn."""
    root = Path(config.config_file_path).parent
    queue = [root / name for name in ALWAYS]
    for file in files.documentation_pages():
        page = Path(str(file.abs_src_path))
        queue += _links(page.read_text(encoding="utf-8"), page, root)
    while queue:
        target = queue.pop()
        if not target.is_relative_to(root / "docs") and files.get_file_from_path(site_path(target, root)) is None:
            queue += _add(target, root, files, config)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where their files are on the site."""
    if not page.file.abs_src_path:
        return markdown
    return rewrite_links(markdown, Path(page.file.abs_src_path), Path(config.config_file_path).parent)


def rewrite_links(markdown: str, source: Path, root: Path) -> str:
    """The text of a page with its relative links as the site needs them.

    Args:
        markdown: text of the page.
        source: the page's file in the checkout.
        root: the checkout.
    """
    folder = posixpath.dirname(site_path(source, root))

    def rewrite(match: re.Match[str]) -> str:
        target = _target(source, match[2], root)
        return match[0] if target is None else match[1] + posixpath.relpath(site_path(target, root), folder or ".")

    return _LINK.sub(rewrite, markdown)


def site_path(target: Path, root: Path) -> str:
    """Where a file of the checkout, or the list of a folder's files, is on the site: a path from the site's root."""
    path = (target / "index.md" if target.is_dir() else target).relative_to(root).as_posix()
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def list_folder(folder: Path, root: Path) -> str:
    """A page for a folder that has no README: links to its files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return f"# {folder.relative_to(root).as_posix()}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)


def _add(target: Path, root: Path, files: Files, config: MkDocsConfig) -> list[Path]:
    """Add a file or the list of a folder to the site, and return what it links to."""
    from mkdocs.structure.files import File, InclusionLevel

    level = InclusionLevel.INCLUDED if target.name in ALWAYS else InclusionLevel.NOT_IN_NAV
    uri = site_path(target, root)
    if target.is_dir():
        source, text = target / "index.md", list_folder(target, root)
        content = rewrite_links(text, source, root)
        files.append(File.generated(config, uri, content=content, inclusion=level))
    else:
        source, text = target, target.read_text(encoding="utf-8") if target.suffix == ".md" else ""
        files.append(File.generated(config, uri, abs_src_path=str(target), inclusion=level))
    return _links(text, source, root)


def _links(markdown: str, source: Path, root: Path) -> list[Path]:
    targets = (_target(source, match[2], root) for match in _LINK.finditer(markdown))
    return [target for target in targets if target is not None]


def _target(source: Path, link: str, root: Path) -> Path | None:
    """What a relative link names: a file, or a folder, for which its README or index page stands if it has one."""
    target = Path(os.path.normpath(source.parent / link))
    if not target.is_relative_to(root):
        return None
    for file in (target, target / "README.md", target / "index.md"):
        if file.is_file():
            return file
    return target if target.is_dir() else None
