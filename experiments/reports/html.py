"""HTML in which everything is escaped that was not made here."""

import html


class Html(str):
    """Text that is HTML already. Only `tag` and `join` make it."""


def tag(name: str, /, *children: str, **attributes: str | None) -> Html:
    """<name attributes>children</name>: children that are no Html, and all attributes, are escaped. `class_`: class."""
    given = "".join(
        f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value is not None
    )
    if name in ("img", "meta", "br"):
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))
