"""HTML elements in which strangers' text stays text, and the document around them.

Belongs here: escaping, the content policy, the style. Does not belong here: what a page of pairs shows (`cards`).
"""

from __future__ import annotations

import html
from collections.abc import Iterable

TEXT_SHOWN = 1000
"""Characters of a prompt or a reason; how many it has is said."""
NAME_SHOWN = 80
"""Characters of a name (of a generator, an annotator, sources)."""


class Html(str):
    """Text that is HTML already."""


_VOID = ("img", "meta")
_VISIBLE = {**{i: 0x2400 + i for i in range(32) if i not in (9, 10)}, 127: 0x2421}
"""Control characters as their pictures: some of them are no HTML, and none should hide what a prompt holds."""


def el(tag: str, *children: str | None, **attributes: str | bool | None) -> Html:
    """Return an element; children and attribute values are escaped unless they are Html. class_ stands for class."""
    named = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
    told = "".join(f" {k}" if v is True else f' {k}="{escaped(str(v))}"' for k, v in named if v not in (None, False))
    inner = "".join(c if isinstance(c, Html) else escaped(c) for c in children if c is not None)
    return Html(f"<{tag}{told}>" if tag in _VOID else f"<{tag}{told}>{inner}</{tag}>")


def escaped(text: str) -> str:
    """Return text as HTML shows it."""
    return html.escape(text.translate(_VISIBLE))


def together(parts: Iterable[Html]) -> Html:
    """Return elements one after another."""
    return Html("".join(parts))


def stranger(tag: str, text: str | None, **attributes: str | bool | None) -> Html:
    """Return a stranger's text in an element that its writing direction does not leave."""
    return cut(tag, text or "", TEXT_SHOWN, **attributes)


def name(tag: str, text: str) -> Html:
    """Return a name that a stranger gave, in an element; see stranger."""
    return cut(tag, text, NAME_SHOWN)


def cut(tag: str, text: str, shown: int, **attributes: str | bool | None) -> Html:
    """Return an element with the first characters of a text, and how many it has if these are not all."""
    more = f" … ({len(text):,} characters)" if len(text) > shown else None
    return el(tag, el("bdi", text[:shown], dir="auto"), more, **attributes)


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number as text, '-' where it is unknown."""
    return "-" if value is None else format(value, form)


def document(title: str, body: Html) -> str:
    """Return a whole document, whose content policy lets nothing in but its own pictures and style."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = [
        el("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        Html(f"<style>{STYLE}</style>"),
    ]
    return "<!doctype html>\n" + el("html", el("head", *head), "\n", el("body", body), lang="en") + "\n"


STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1c2128;--dim:#59636e;--line:#d8dde3;--soft:#eceff2;
--human:#0a5cad;--consensus:#a34700;--minority:#9c1a6b;--target:#166b45;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#181c22;--ink:#e6e9ed;--dim:#98a3af;
--line:#343c46;--soft:#262c34;--human:#6db3ff;--consensus:#ffab5e;--minority:#f58ccb;--target:#66d19e;--bad:#ff8b80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:.94rem/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%;overflow-wrap:anywhere}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{margin:0;font-size:1.7rem;line-height:1.2;letter-spacing:-.01em}
h2{margin:.15rem 0 .9rem;font-size:1.1rem;line-height:1.35;font-weight:600;overflow:hidden}
p{margin:.5rem 0}dl,dd{margin:0}a{color:inherit}
header{margin-bottom:1.5rem}
.words{max-width:52rem}.count{font-weight:600}.nothing{padding:3rem 0;text-align:center;color:var(--dim)}
.facts>div{display:flex;gap:.6rem}.facts>div>dt{flex:0 0 6rem;color:var(--dim)}
.key,.marks{display:flex;flex-wrap:wrap;gap:.35rem}
.key{margin:1rem 0 .6rem}
dl.words>div{display:grid;grid-template-columns:minmax(7rem,13rem) 1fr;gap:.75rem;padding:.3rem 0;
border-top:1px solid var(--line)}
dl.words dt{font-weight:600}
summary{cursor:pointer;color:var(--dim)}.scroll+details{margin-top:.8rem}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem 1.1rem;margin:0 0 1rem;
break-inside:avoid}
article.minority{border-left:5px solid var(--minority)}
article:target{outline:2px solid var(--ink)}
.place{display:flex;flex-wrap:wrap;gap:.1rem .8rem;margin:0;font-size:.82rem;color:var(--dim)}
article>.place a{font-weight:700;color:var(--ink);text-decoration:none}
code{font:.95em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.columns{display:grid;grid-template-columns:minmax(0,31rem) minmax(0,1fr);gap:1.4rem;align-items:start}
.images{display:grid;grid-template-columns:1fr 1fr;gap:.9rem}
figure{margin:0;min-width:0}
.frame{display:flex;align-items:center;justify-content:center;min-height:9rem;padding:5px;border-radius:8px;
background:var(--soft);border:3px solid transparent}
.human>.frame{border-color:var(--human)}
.consensus>.frame{outline:3px dashed var(--consensus);outline-offset:2px}
.frame img{display:block;width:100%;height:auto;max-height:26rem;object-fit:contain;border-radius:3px}
.previews{display:flex;flex-wrap:wrap;gap:.4rem;margin:.7rem 0}
.previews img{width:64px;height:64px;object-fit:cover;border-radius:5px}
.pixels{image-rendering:pixelated}
.absent{padding:.6rem;text-align:center;color:var(--dim);font-size:.85rem}.absent b{display:block;color:var(--bad)}
figcaption{padding-top:.45rem}.marks{margin:.3rem 0 0}
.mark{padding:.05rem .5rem;border-radius:1rem;border:1px solid;font-size:.82rem;font-weight:600;overflow-wrap:anywhere}
.mark.human{color:var(--human)}.mark.consensus{color:var(--consensus);border-style:dashed}
.mark.minority{color:var(--card);background:var(--minority);border-color:var(--minority)}
.mark.target{color:var(--target);border-style:double;border-width:3px;padding:0 .4rem}
.mark.bad{color:var(--bad);border-radius:6px}
.reason{margin:0 0 .6rem}.reason .mark{display:block}
.people{margin:1rem 0 .8rem}
.bar{display:flex;gap:2px;height:7px;margin-top:.3rem;border-radius:4px;overflow:hidden;background:var(--soft)}
.bar i.left{background:var(--human)}.bar i.tie{background:var(--dim);opacity:.45}
.bar i.right{background:var(--human);opacity:.5}
.bar.half{display:inline-flex;position:relative;width:4.2rem;margin:0 0 0 .5rem;vertical-align:1px}
.bar.half i.left{background:var(--dim)}
.bar.half::after{content:"";position:absolute;left:50%;top:0;bottom:0;width:1px;background:var(--ink)}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
.scores{width:100%}
caption{text-align:left;padding-bottom:.3rem;font-size:.95rem}
th,td{padding:.22rem .5rem .22rem 0;text-align:right;font-weight:400;white-space:nowrap}
th:first-child{text-align:left}
td:last-child,.scores th:last-child{padding-right:0}
thead th{color:var(--dim);font-size:.78rem;border-bottom:1px solid var(--line)}
tbody+tbody tr:first-child>*{border-top:1px solid var(--line)}
.best{font-weight:700}
.numbers{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.7rem,1fr));gap:.5rem .8rem;margin:.8rem 0 0;
padding:.6rem .7rem;border-radius:8px;background:var(--soft);font-variant-numeric:tabular-nums}
.numbers dt{font-size:.75rem;color:var(--dim);line-height:1.2}.numbers dd{font-weight:600}
.scroll{overflow-x:auto}.votes{margin-top:.4rem}.votes th,.votes td{padding-right:.9rem}
@media (max-width:56rem){.columns{grid-template-columns:minmax(0,1fr)}}
@media (max-width:34rem){main{padding:1rem .6rem 3rem}article{padding:.8rem .7rem}.images{gap:.7rem}h1{font-size:1.4rem}
.bar.half{width:1.5rem;margin-left:.35rem}table{font-size:.8rem}th,td{padding-right:.4rem}
.numbers{grid-template-columns:repeat(auto-fill,minmax(6.3rem,1fr))}.frame{min-height:6rem}dl.words>div{grid-template-columns:1fr;gap:0}}
@media print{html{font-size:11px}body{background:#fff}main{max-width:none;padding:0}
.columns{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.votes th,.votes td{padding-right:.4rem}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;height:auto}}
"""
