"""Tables of the HTML report. The page's script adds search, sorting and CSV to those with a head."""

import html
from collections.abc import Iterable


def table(head: Iterable[str], lines: Iterable[Iterable[str]], code: int | None = None, name: str = "") -> str:
    """Build a table. code: the column to show as code, for copying. name: that of its CSV file, if it has tools."""
    top = "".join(f"<th>{h}</th>" for h in head)
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    body = "".join(f"<tr>{''.join(_cell(text, k == code) for k, text in enumerate(line))}</tr>" for line in lines)
    tools = f" data-name='{name}'" if name else ""
    kind = "scroll" if top else "scroll pairs"
    return f"<div class='{kind}' tabindex='0'{tools}><table>{top}<tbody>{body}</tbody></table></div>"


def _cell(text: str, code: bool) -> str:
    inner = html.escape(text)
    return f"<td><code>{inner}</code></td>" if code and text else f"<td>{breakable(inner)}</td>"


def breakable(path: str) -> str:
    """Let a path, or a name of that form, break after its folders."""
    return path.replace("/", "/<wbr>")
