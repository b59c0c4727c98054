"""Pieces of HTML. Every text is escaped here: captions, file names and messages come from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from trainer.core import files
from trainer.core.errors import DataError

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2b8a3e; --bad: #c92a2a; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .7rem; text-align: left; vertical-align: top; }
tr + tr > * { border-top: 1px solid var(--line); } thead th { border-bottom: 2px solid var(--line); }
.wide { overflow-x: auto; } small, .soft { opacity: .7; } td small { display: block; }
.differs { background: var(--soft); font-weight: 600; }
.warning { border-left: 4px solid #e8a400; padding: .2rem .8rem; background: var(--soft); margin: .4rem 0; }
.grid th { position: sticky; top: 0; background: Canvas; z-index: 1; } .grid td { padding: .25rem; }
.grid td.caption { max-width: 16rem; overflow-wrap: anywhere; padding-right: .7rem; }
img { max-width: 100%; display: block; } .grid img { width: 11rem; max-width: none; cursor: zoom-in; }
.grid td > small { display: block; max-width: 11rem; overflow-wrap: anywhere; line-height: 1.25; }
img.small { image-rendering: pixelated; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; }
summary { cursor: pointer; }
dialog { border: 0; padding: 0; background: none; max-width: 96vw; max-height: 96vh; text-align: center; }
dialog::backdrop { background: #000c; } dialog img { width: auto; max-width: 92vw; height: 84vh; object-fit: contain; }
dialog p { color: white; margin: .4rem; }
@media print { .grid img { width: 7rem; } }
"""
SCRIPT = """
const all = [...document.querySelectorAll('.grid img')], box = document.querySelector('dialog');
const large = box.querySelector('img'), text = box.querySelector('p');
let current = 0;
function show(number) {
  current = (number + all.length) % all.length;
  large.src = all[current].src; large.className = all[current].className; text.textContent = all[current].alt;
  if (!box.open) box.showModal();
}
all.forEach((image, number) => image.addEventListener('click', () => show(number)));
box.addEventListener('click', () => box.close());
document.addEventListener('keydown', event => {
  const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (box.open && move) show(current + move);
});
"""


def page(title: str, body: str) -> str:
    """Returns a complete page. It loads nothing, and no script but the one of this module runs in it."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        f"<dialog><img alt=''><p></p></dialog><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Returns a heading and HTML below it; nothing if there is none."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def paragraphs(texts: Iterable[str], style: str = "") -> str:
    return "".join(f'<p class="{style}">{escape(text)}</p>\n' for text in texts)


def bullets(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """Returns a table. The cells are HTML; the head is text."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return f'<div class="wide"><table class="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(text: str, small: str = "", style: str = "") -> str:
    note = f"<small>{escape(small)}</small>" if small else ""
    return f'<td class="{style}">{escape(text)}{note}</td>'


def folded(title: str, body: str) -> str:
    """Returns HTML that is hidden until its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>\n"


def picture(path: Path, title: str, max_side: int) -> str:
    """Returns an image inside the page, at most `max_side` pixels wide and high. Raises errors.DataError."""
    from trainer.dataset import image_grid

    if not path.is_file():
        raise DataError(f"the image {path} is missing; type the same stage=evaluate command again to generate it")
    with files.library_errors(path, "Delete it, and type the same stage=evaluate command again"):
        data, kind, is_small = image_grid.encode_for_page(path, max_side)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img class="{"small" if is_small else ""}" loading="lazy" alt="{escape(title)}" src="{source}">'
