"""What mkdocs needs to build the site from this repository (mkdocs.yml): its hooks, and what they are made of.

Adds a page for every public module and every notebook, and CONTRIBUTING and CHANGELOG; turns links to files outside
docs/ into links to their pages, or to a copy of the file as text; and refuses a site with a page over MAX_PAGE_BYTES or
one that loads something from elsewhere. Imports nothing of the project, so that the site builds without jax.
"""

import base64
import json
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("seqboat", "experiments", "configs")
# Pages of the site from the root of the repository.
FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
MAX_PAGE_BYTES = 1_000_000
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def modules() -> list[str]:
    """The dotted names of all public modules and packages, packages before their modules."""
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    parts = [path.with_suffix("").parts for path in paths]
    names = [".".join(part for part in names if part != "__init__") for names in parts]
    return sorted(name for name in names if not re.search(r"\._", name))


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").exists()


def api_page(module: str) -> str:
    """The path of a module's page below docs/."""
    return f"api/{module.replace('.', '/')}{'/index' if is_package(module) else ''}.md"


def api_navigation(package: str) -> dict[str, list]:
    """{last name: [its page, its packages and modules]}, as mkdocs has navigation."""
    inside: list[Any] = [api_page(package)]
    for module in modules():
        if module.rpartition(".")[0] == package:
            last = module.rpartition(".")[2]
            inside.append(api_navigation(module) if is_package(module) else {last: api_page(module)})
    return {package.rpartition(".")[2]: inside}


def site_path(file: str) -> str:
    """Where a file of the repository is on the site: a page, the page of a module, or a copy as text."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if file.endswith(".ipynb"):
        return file.removesuffix(".ipynb") + ".md"
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if file.endswith(".py") and module in modules():
        return api_page(module)
    return file if file in FROM_ROOT else f"source/{file}.txt"


def links(text: str, file: str) -> list[str]:
    """The files of the repository that a page of the repository links to."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(file), link[2])) for link in LINK.finditer(text)]


def rewrite(text: str, file: str) -> str:
    """The Markdown of a file of the repository with its links as the site has them."""
    folder = posixpath.dirname(site_path(file)) or "."

    def on_site(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link[2]))
        if not (ROOT / target).is_file():
            raise ValueError(f"{file}: the site has no page for {link[2]}")
        return f"{link[1]}{posixpath.relpath(site_path(target), folder)}{link[3] or ''})"

    return LINK.sub(on_site, text)


def notebook_page(file: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook of the repository, with its links as the site has them, and its pictures by their
    paths on the site."""
    script = f"{posixpath.basename(file).removesuffix('.ipynb')}.py"
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads((ROOT / file).read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(rewrite(source, file))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif picture := output["data"].get("image/png"):
                name = f"{file.removesuffix('.ipynb')}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(picture)
                parts.append(f"![What the cell above draws]({posixpath.basename(name)})")
    parts.append(rewrite(f"This page is a notebook, made from [{script}]({script}).", file))
    return "\n\n".join(parts), pictures


def notebooks() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))


def repository_file(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return page if page in FROM_ROOT else f"docs/{page}"


class _Sources(HTMLParser):
    """Collects what a page loads: scripts, styles, images."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src"}.get(tag)
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            loads = "href"
        if loads and given.get(loads):
            self.found.append(str(given[loads]))


def problems(site: Path) -> list[str]:
    """The built pages that weigh more than MAX_PAGE_BYTES with all they load, or that load something from elsewhere."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser, text = _Sources(), page.read_text()
        parser.feed(text)
        name, weight = page.relative_to(site), len(text.encode())
        for source in set(parser.found):
            if re.match(r"(\w+:)?//", source):
                found.append(f"{name} loads {source}")
            elif (path := page.parent / source.partition("?")[0]).is_file():
                weight += path.stat().st_size
        if weight > MAX_PAGE_BYTES:
            found.append(f"{name} weighs {weight:,} bytes with all it loads, more than {MAX_PAGE_BYTES:,}")
    return found


# Hooks of mkdocs.


def on_config(config: Any) -> Any:
    from markdown.extensions import Extension

    class NoHTML(Extension):
        """Docstrings and guides have no HTML: <gamma, h_t> is an inner product."""

        def extendMarkdown(self, md: Any) -> None:
            md.preprocessors.deregister("html_block")
            md.inlinePatterns.deregister("html")

    config.markdown_extensions.append(NoHTML())
    for item in config.nav:
        if "API" in item:
            item["API"] = [api_navigation(package) for package in PACKAGES]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    linked = {link for page in FROM_ROOT for link in links((ROOT / page).read_text(), page)}
    for page in [file for file in files.documentation_pages() if not file.src_uri.startswith("_data/")]:
        linked.update(links(page.content_string, f"docs/{page.src_uri}"))
    for notebook in notebooks():
        text, pictures = notebook_page(notebook)
        linked.add(notebook.removesuffix(".ipynb") + ".py")
        files.append(File.generated(config, site_path(notebook), content=text))
        for path, picture in pictures.items():
            files.append(File.generated(config, path, content=picture))
    for page in FROM_ROOT:
        files.append(File.generated(config, page, content=(ROOT / page).read_text()))
    for module in modules():
        text = f"---\ntitle: {module.rpartition('.')[2]}\n---\n\n# {module}\n\n::: {module}\n"
        files.append(File.generated(config, api_page(module), content=text))
    for file in sorted(linked):
        if site_path(file).startswith("source/") and (ROOT / file).is_file():
            files.append(File.generated(config, site_path(file), content=(ROOT / file).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri.startswith(("api/", "notebooks/")):  # made with the links of the site
        return markdown
    markdown = re.sub(r"<!--.*?-->\n?", "", markdown, flags=re.DOTALL)  # marks of generated tables
    return rewrite(markdown, repository_file(page.file.src_uri))


def on_post_build(config: Any) -> None:
    from mkdocs.exceptions import PluginError

    if found := problems(Path(config.site_dir)):
        raise PluginError("\n".join(found))
