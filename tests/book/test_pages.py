"""The built pages as files."""

import re
from urllib.parse import unquote

import links
from links import ROOT
from reading import HTML, PAGES, each_chapter, each_page, needs_pages, soup, text

from lowrank_ref.core.registry import papers


@needs_pages
@each_page
def test_page_asks_no_other_server(name):
    tags = re.findall(r"<(?:script|img|iframe|source|video|link)\b[^>]*>", text(name))
    tags = [tag for tag in tags if 'rel="canonical"' not in tag]  # says where the newest version is, loads nothing
    foreign = [tag for tag in tags if re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag)]
    assert foreign == []
    assert "thebe" not in text(name)
    assert "html-manager" not in text(name)  # widgets without a kernel would only pretend to work


@needs_pages
@each_chapter
def test_launch_links_lead_to_the_notebook(name):
    page = name.removesuffix(".html")
    hrefs = {unquote(href) for href in re.findall(r'href="([^"]+)"', text(name))}
    assert {links.colab(page), links.binder(page)} <= hrefs
    assert not [href for href in hrefs if href.endswith(".ipynb") and ("_sources" in href or "/book/" in href)]
    assert (HTML.parent / "html" / "notebooks" / f"{page}.ipynb").exists()


@needs_pages
def test_internal_links_lead_somewhere():
    """Every link from page to page, and the anchor it names."""
    pages = {name: soup(name) for name in PAGES}
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    broken = []
    for name, page in pages.items():
        for href in (tag["href"] for tag in page.select(".bd-article a[href]")):
            target, _, anchor = unquote(href).partition("#")
            path = (HTML / name).parent / target if target else HTML / name
            if "://" in href or not path.resolve().is_relative_to(HTML):
                continue
            place = path.resolve().relative_to(HTML).as_posix()
            if not path.exists() or (anchor and place in anchors and anchor not in anchors[place]):
                broken.append((name, href))
    assert broken == []


@needs_pages
def test_the_chooser_names_every_chapter():
    methods = '.lr-scroll:not([aria-label="Learning rates"]) table.lr-wide tbody tr'
    rows = [row.find_all("td") for row in soup("chooser.html").select(methods)]
    assert [row[0].get_text() for row in rows] == [paper.name for paper in papers().values()]
    assert all("#" in row[3].a["href"] and row[3].get_text() != "read" for row in rows)


@needs_pages
def test_the_state_of_the_book_adds_up():
    page = soup("status.html")
    counts = [
        {item.b.next_sibling.strip(): int(item.b.text) for item in row.find_all("li")}
        for row in page.select("ul.lr-counts")
    ]
    of_papers, of_claims = counts
    rows = [[cell.get_text(" ") for cell in row.find_all("td")] for row in page.select("table.lr-state tbody tr")]
    assert of_papers["papers"] == len(rows) == 36
    for state in ("planned", "draft", "checked"):
        assert of_papers[state] == sum(row[1].startswith(state) for row in rows) > 0
    assert of_papers["with a GPU result"] == sum(not row[4].startswith("none") and row[4] != "" for row in rows)
    assert (
        of_claims.pop("claims")
        == sum(of_claims.values())
        == len(soup("claims.html").select("table[data-ledger] tbody tr"))
    )


@needs_pages
@each_page
def test_other_sites_can_show_the_page(name):
    found = {tag.get("property") or tag.get("name"): tag["content"] for tag in soup(name).select("meta[content]")}
    assert 40 <= len(found["og:description"]) <= 200
    assert found["og:title"] and found["description"]
    assert found["og:url"] == f"{links.site('latest')}/{name}"
    for key in ("og:image", "twitter:image"):
        place = found[key].removeprefix(links.site("latest"))
        assert place != found[key] and (HTML / place.strip("/")).exists()
    assert found["twitter:card"] == "summary_large_image"
    canonical = [tag["href"] for tag in soup(name).select("link[rel=canonical]")]
    assert canonical == [found["og:url"]]
    (icon,) = soup(name).select("link[rel=icon]")
    assert ((HTML / name).parent / icon["href"]).exists()


def test_the_picture_for_other_sites():
    data = (ROOT / "book" / "theme" / "social.png").read_bytes()
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 630)
    assert len(data) <= 100_000
