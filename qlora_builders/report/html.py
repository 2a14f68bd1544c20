"""HTML as a tree of elements, so that text from files cannot become markup.

A run directory may be a stranger's. Every string goes into the tree as text or as the value of an
attribute, where characters that HTML does not allow are spelled out (`visible`), and the serializer
escapes the rest; tags and attribute names are only ever written here and in this package's source.
Should something slip through all the same, the page's content security policy runs no script but
ours and fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from qlora_builders.visible import visible

Child = Element | str | None
LONGEST_TEXT = 4000  # characters of one value


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """`element("p", "text", class_="note", data_x=1)`; children and attributes of None are left
    out, an attribute's trailing underscore too, and the others become dashes."""
    node = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            node.set(name.rstrip("_").replace("_", "-"), visible(str(value)))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            node.append(child)
            last = child
        elif child is not None:
            if last is None:
                node.text = (node.text or "") + visible(child)
            else:
                last.tail = (last.tail or "") + visible(child)
    return node


def fold(title: str, *children: Child, open_: bool = False) -> Element:
    """A part that a click on its title shows or hides."""
    return element("details", element("summary", title), *children, open="open" if open_ else None)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, text: bool = False
) -> Element:
    """A table whose first column names its rows; `text` sets the others left and as written."""
    body = [
        element(
            "tr", element("th", shorten(row[0]), scope="row"), *(_cell(cell) for cell in row[1:])
        )
        for row in rows
    ]
    inside = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", shorten(h), scope="col") for h in head))),
        element("tbody", *body),
        class_="text" if text else None,
    )
    # focusable, because it may be wider than the page and then scrolls by itself
    return element("div", inside, class_="scroll", tabindex=0, role="region", aria_label=caption)


def shorten(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} ... ({len(text) - LONGEST_TEXT:,} more characters)"


def document(title: str, *content: Child) -> str:
    """The whole page, with this package's style and script inside it."""
    style, script = (Path(__file__).with_name(name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = ("img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'")
    policy = "; ".join(("default-src 'none'", *allowed))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", style),
    )
    body = element("body", element("main", *content), element("script", script))
    page = ElementTree.tostring(
        element("html", head, body, lang="en"), encoding="unicode", method="html"
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _cell(text: str) -> Element:
    return element("td", shorten(text))
