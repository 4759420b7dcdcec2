"""The page's renderer: markdown-it-py's tree on its subset, harmless, linear, right while it grows.

markdown-it-py is no dependency of fledge: rich brings it along, and here it is only the judge.
"""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.serve.browser import SERIALISE

pytestmark = pytest.mark.browser

BLOCKS = {"p", "heading", "ul", "ol", "li", "pre", "blockquote", "hr",
          "table", "thead", "tbody", "tr", "td", "th", "root"}  # fmt: skip


# -- two trees in one shape: [name, {attributes}, [children]] ------------------------------------


class Tree(HTMLParser):
    """HTML of markdown-it as nested lists."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root: list[Any] = ["root", {}, []]
        self.open = [self.root]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node: list[Any] = [tag, dict(attrs), []]
        self.open[-1][2].append(node)
        if tag not in ("br", "hr", "img"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("br", "hr", "img"):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data)


def theirs(text: str) -> Any:
    """What markdown-it makes of it, as the page would show it."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return tidy(Tree(html.replace("\n</code></pre>", "</code></pre>")).root)


def ours(page: Any, texts: list[str]) -> list[Any]:
    """What the page makes of each."""
    all_of = f"async (texts) => Promise.all(texts.map({SERIALISE}))"
    return [tidy(["root", {}, children]) for children in page.evaluate(all_of, texts)]


def tidy(node: Any) -> Any:
    """Without what may differ: white space at the edges of blocks, names of classes, rel."""
    name, attributes, children = node
    if name == "div":  # our wrappers of code and tables
        children = [c for c in children if isinstance(c, list) and c[0] != "button"]
        return tidy(children[0])
    if re.fullmatch("h[1-6]", name):
        name = "heading"
    kept = {}
    if name == "a":
        kept["href"] = (
            attributes["href"]
            .removesuffix("/")
            .replace("HTTP", "http", 1)
            .replace("httpS", "https")
        )  # as URL does
    if name == "ol":
        kept["start"] = attributes.get("start", "1")
    if name == "code":
        told = attributes.get("data-language") or attributes.get("class", "").partition("-")[2]
        kept["language"] = told
    if name in ("td", "th"):
        side = attributes.get("style", "") + attributes.get("class", "")
        kept["side"] = (
            "mid"
            if re.search("center|mid", side)
            else "end"
            if re.search("right|end", side)
            else ""
        )
    if name == "span" and attributes.get("class", "").startswith("py-"):
        return "".join(children)
    out: list[Any] = []
    for child in children:
        child = child if isinstance(child, str) else tidy(child)
        if isinstance(child, str) and out and isinstance(out[-1], str):
            out[-1] += child
        else:
            out.append(child)
    if name in ("pre", "code"):
        return [name, kept, [c for c in out if c]]
    out = [re.sub(r"\s+", " ", c) if isinstance(c, str) else c for c in out]
    if name in BLOCKS:
        for i, child in enumerate(out):
            if isinstance(child, str):
                if i == 0 or _is_block(out[i - 1]):
                    child = child.lstrip()
                if i + 1 == len(out) or _is_block(out[i + 1]):
                    child = child.rstrip()
                out[i] = child
    for i, child in enumerate(out[:-1]):
        if isinstance(child, list) and child[0] == "br" and isinstance(out[i + 1], str):
            out[i + 1] = out[i + 1].lstrip()
    return [name, kept, [c for c in out if c != ""]]


def _is_block(node: Any) -> bool:
    return isinstance(node, list) and node[0] in BLOCKS


# -- documents of the subset ---------------------------------------------------------------------


class Writer:
    """Random Markdown of the written subset."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def word(self) -> str:
        return self.r.choice(
            ["fox", "a", "Be", "x1", "h\u00e9", "\u4f60", "\U0001f600", "don't", "3.5"]
        )

    def soup(self) -> str:
        """Marks in any order, as a confused model writes them.

        A bare http:// becomes a link on the page only, HTTP:// does not. A label ends in a letter:
        markdown-it takes its end for a space, CommonMark looks at the bracket."""
        marks = ["*", "**", "_", "__", "***", "`", "``", "[", "]", "\\", "\\*", " ", " ",
                 "a", "b", "c.", "-", "|", "~", "#", ">", "z](HTTP://e.example/x)",
                 "1"]  # fmt: skip
        return "w" + "".join(self.r.choice(marks) for _ in range(self.r.randint(1, 24)))

    def span(self, depth: int = 0) -> str:
        kind = self.r.randrange(9)
        inner = self.word() if depth > 1 else " ".join(self.span(depth + 1) for _ in range(2))
        return {0: f"*{inner}*", 1: f"**{inner}**", 2: f"_{inner}_", 3: f"`{self.word()}`",
                4: f"[{inner} z](HTTPS://e.example/{self.r.randrange(9)})" if depth == 0 else inner,
                5: "\\*" + self.word(), 6: f"__{inner}__"}.get(kind, self.word())  # fmt: skip

    def line(self) -> str:
        if self.r.random() < 0.3:
            return self.soup().strip()
        line = "W " + " ".join(self.span() for _ in range(self.r.randint(1, 5)))
        return line + self.r.choice(["", "", "", "  ", "\\"])

    def paragraph(self) -> str:
        lines = [self.line() for _ in range(self.r.randint(1, 3))]
        lines[-1] = lines[-1].rstrip("\\ ")
        return "\n".join(lines)

    def fence(self) -> str:
        marks = self.r.choice(["```", "~~~", "````"])
        body = "\n".join(
            self.r.choice(["x = 1", "", "  y", "# no", "- a", "``", "> q"]) for _ in range(3)
        )
        return f"{marks}{self.r.choice(['', 'python', 'c++'])}\n{body}\n{marks}"

    def items(self, depth: int) -> str:
        ordered = self.r.random() < 0.4
        gap = "\n\n" if self.r.random() < 0.4 else "\n"
        mark = self.r.choice(["-", "*", "+"])
        first = self.r.choice([1, 1, 7])
        made = []
        for i in range(self.r.randint(1, 4)):
            head = f"{first + i}. " if ordered else f"{mark} "
            body = self.line().rstrip("\\ ")
            if self.r.random() < 0.3:
                more = self.blocks(depth + 1, self.r.choice([1, 2]))
                body += (
                    self.r.choice(["\n", "\n\n"]) + more if more[0] in "-*+~`" else "\n\n" + more
                )
            made.append(head + body.replace("\n", "\n" + " " * len(head)))
        return gap.join(made)

    def side(self) -> str:
        return self.r.choice(["---", ":-:", "--:", ":--"])

    def table(self) -> str:
        wide = self.r.randint(1, 4)
        cell = lambda: self.span(2)  # noqa: E731
        rows = ["| " + " | ".join(cell() for _ in range(wide)) + " |",
                "|" + "".join(self.side() + "|" for _ in range(wide))]  # fmt: skip
        rows += [
            "| " + " | ".join(cell() for _ in range(self.r.randint(1, wide))) + " |"
            for _ in range(2)
        ]
        return "\n".join(rows)

    def quote(self, depth: int) -> str:
        return "\n".join("> " + line for line in self.blocks(depth + 1, 3).split("\n"))

    def blocks(self, depth: int = 0, most: int = 5) -> str:
        made = []
        before = None
        for _ in range(self.r.randint(1, most)):
            kind = self.r.choice("hpppfrlqt" if depth < 3 else "p")
            if kind == before and kind in "lq":
                continue  # two lists in a row are one list
            before = kind
            made.append({"h": lambda: "#" * self.r.randint(1, 6) + " " + self.line().rstrip("\\ "),
                         "p": self.paragraph, "f": self.fence, "t": self.table,
                         "r": lambda: self.r.choice(["***", "* * *", *["---"] * (depth == 0)]),
                         "l": lambda: self.items(depth),
                         "q": lambda: self.quote(depth)}[kind]())  # fmt: skip
        return "\n\n".join(made)


def test_the_subset_is_commonmarks(page):
    """Thousands of random documents, and those that once differed."""
    known = [
        "- a\n- b\n  - c\n\n- d", "1. a\n\n   b\n2. c", "* a\n\n  ```\n  x\n  ```\n* b",
        "3) a\n4) b",
        "- a\n\n\n- b", "-\n- b", "- a\nlazy", "> a\n>\n> - b\n>   c", "para\n- list\n- list",
        "para\n1. one", "para\n2. not a list", "| a |\n| - |\n| `b` |", "a | b\n-|-\n1 | 2 | 3\n4",
        "**a**b**c**", "*a **b* c**", "***a** b*", "a*b*c_d_e", "__a__b", "``a ` b``", "`a  b`",
        "[a *b*](http://x.example/(y))", "[a](<http://x.example/b c>)",
        "[a](http://x.example \"t\")",
        "# a #", "# a#", "##", "a  \nb", "a\\\nb", "\\# a", "~~~\na\n```\n~~~", "```a b\nx\n```",
        "- - a", "1. - a\n   - b", "+ a\n- b", "text\n***\ntext", "\u201c*a*\u201d", "a\u00a0*b*",
    ]  # fmt: skip
    texts = known + [Writer(seed).blocks() for seed in range(3000)]
    for text, mine in zip(texts, ours(page, texts), strict=True):
        assert mine == theirs(text), text


def test_a_growing_text_shows_what_the_whole_would(page):
    """Rendering again from the last block only: at every prefix the same as from the start."""
    texts = [Writer(seed).blocks() for seed in range(40)]
    texts += [
        "a\r\n\r\n- b\r\n- c\r\n\r\n```py\r\nx\r\n```\r\n",
        "$$\nx^2\n$$\nafter",
        "\t- a\n\t\tb",
    ]
    wrong = page.evaluate(
        """async (texts) => {
          const { update } = await import("/web/markdown.js");
          const wrong = [];
          for (const text of texts) {
            const grown = document.createElement("div");
            for (let i = 1; i <= text.length; i++) {
              const whole = document.createElement("div");
              update(whole, text.slice(0, i), true);
              update(grown, text.slice(0, i), true);
              if (!whole.isEqualNode(grown)) wrong.push([text.slice(0, i), grown.outerHTML]);
            }
            update(grown, text, false);
            const whole = document.createElement("div");
            update(whole, text);
            if (!whole.isEqualNode(grown)) wrong.push(["end", text]);
          }
          return wrong.slice(0, 3);
        }""",
        texts,
    )
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$x^2$", "math(mrow(msup(mi(x) mn(2))))"),
        ("\\(\\frac{1}{2}\\)", "math(mrow(mfrac(mrow(mn(1)) mrow(mn(2)))))"),
        ("$\\sqrt[3]{a_1}$", "math(mrow(mroot(mrow(msub(mi(a) mn(1))) mrow(mn(3)))))"),
        ("$\\alpha \\le 3.5$", "math(mrow(mi(\u03b1) mo(\u2264) mn(3.5)))"),
        ("$\\sin x - 1$", "math(mrow(mi(sin) mi(x) mo(\u2212) mn(1)))"),
        ("$\\sum_{i=1}^n i$",
         "math(mrow(munderover(mo(\u2211) mrow(mi(i) mo(=) mn(1)) mi(n)) mi(i)))"),
        ("$\\left(\\text{a b}\\right)$", "math(mrow(mrow(mo(() mrow(mtext(a b)) mo()))))"),
    ],
)  # fmt: skip
def test_math(page, text, expected):
    def flat(node: Any) -> str:
        if isinstance(node, str):
            return node
        return f"{node[0]}({' '.join(flat(child) for child in node[2])})"

    ((_, _, children),) = page.evaluate(SERIALISE, text)
    assert [flat(child) for child in children] == [expected]


def test_display_math_and_what_is_no_math(page):
    (node,) = page.evaluate(SERIALISE, "$$\na = b\n$$")
    assert node[0] == "math" and node[1]["display"] == "block"
    for text in ("it costs $5 and $6", "$ x $", "$\\unknown{x}$", "$x", "$x_$", "a $\\frac{1}$",
                 "$" + "{" * 90 + "}" * 90 + "$", "\\[ x"):  # fmt: skip
        ((name, _, children),) = page.evaluate(SERIALISE, text)
        expected = text.replace("\\[", "[") if text == "\\[ x" else text
        assert (name, "".join(children)) == ("p", expected)


def test_python_is_coloured_and_nothing_else(page):
    code = 'def f(x):  # a "comment"\n    return "a#b" + str(0x1F) if x is None else 1.5e3\n'
    ((_, _, (pre, button)),) = page.evaluate(SERIALISE, f"```python\n{code}```")
    assert button[1]["aria-label"] == "Copy code"
    marked = [(c[1]["class"], c[2][0]) for c in pre[2][0][2] if isinstance(c, list)]
    assert marked == [
        ("py-k", "def"), ("py-f", "f"), ("py-c", '# a "comment"'), ("py-k", "return"),
        ("py-s", '"a#b"'), ("py-f", "str"), ("py-n", "0x1F"), ("py-k", "if"), ("py-k", "is"),
        ("py-n", "None"), ("py-k", "else"), ("py-n", "1.5e3"),
    ]  # fmt: skip
    ((_, _, (pre, _)),) = page.evaluate(SERIALISE, f"```js\n{code}```")
    assert pre[2][0][2] == [code.removesuffix("\n")]


XSS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](data:text/html,<script>)",
    "[x](vbscript:x)", "[x]( javascript:alert(1))", "[x](\tjavascript:alert(1))",
    "![x](http://evil.example/a.png)", "<iframe src=//evil.example>", "<a href=javascript:1>x</a>",
    "`<b onclick=alert(1)>`", "**<img src=x onerror=alert(1)>**", "# <script>alert(1)</script>",
    "> <script>alert(1)</script>", "- <script>alert(1)</script>", "1. <svg/onload=alert(1)>",
    "| <script>1</script> | b |\n| --- | --- |\n| <img src=x onerror=1> | d |",
    "```html\n<script>alert(1)</script>\n```", "```<script>\nx\n```",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//evil.example>", "<meta http-equiv=refresh content=0>",
    "<base href=//evil.example>", "<form action=//evil.example><input>", "<object data=x>",
    "<embed src=x>", "<math><mi xlink:href=javascript:1>", "&lt;script&gt;", "&#x3C;script&#x3E;",
    "[a](http://x\"onmouseover=alert(1))", "[a](http://x'onmouseover=alert(1))",
    "http://x\"><script>alert(1)</script>", "[<img src=x onerror=1>](http://ok.example)",
    "[a](//evil.example)", "[a](/\\evil.example)", "[a](blob:x)", "[a](file:///etc/passwd)",
    "<<script>script>alert(1)<</script>/script>", "<ScRiPt>alert(1)</ScRiPt>",
    "<img src=x:x onerror\u0000=alert(1)>", "<x onclick=alert(1)>", "<details open ontoggle=1>",
    "<video><source onerror=alert(1)>", "<body onload=alert(1)>", "<input autofocus onfocus=1>",
    "<template><script>1</script></template>", "<noscript><p title=\"</noscript><img src=x>\">",
    "{{constructor.constructor('alert(1)')()}}", "${alert(1)}", "javascript:alert(1)",
    "[x][y]\n\n[y]: javascript:alert(1)", "<!--<script>-->alert(1)", "]]><script>1</script>",
    "<![CDATA[<script>]]>", "*<b>*", "**a *b `c** d* e`", "\\<script>", "<script/src=//e.example>",
    "[\u202ex](http://ok.example)", "<img src=\"data:image/svg+xml,<svg onload=1>\">",
]  # fmt: skip


XSS += [
    "$<script>alert(1)</script>$", "$\\text{<img src=x onerror=alert(1)>}$", "$$\n<script>\n$$",
    "\\(\\href{javascript:alert(1)}{x}\\)", "```python\n<img src=x onerror=alert(1)>\n```",
    "![x](javascript:alert(1))", "[![a](http://e.example/a.png)](javascript:alert(1))",
    "<http://x\"onclick=alert(1)>", "<javascript:alert(1)>", "[a](<javascript:alert(1)>)",
    "[a](http://e.example \"x\\\" onclick=alert(1)\")", "http://e.example/<script>",
    "| a |\n|:<script>:|", "~~~<img/src=x>\n~~~", "[a](java\nscript:alert(1))",
    "[a](\x01javascript:1)",
]  # fmt: skip


def test_what_a_model_writes_stays_text(page):
    """Every payload through the renderer: no element beyond the subset, no handler, no bad link."""
    assert len(XSS) >= 75
    found = page.evaluate(
        """async (payloads) => {
          const { update } = await import("/web/markdown.js");
          const known = new Set(("p h3 h4 h5 h6 pre code ul ol li hr blockquote div table"
            + " thead tbody tr th td strong em a br button span math mrow mi mo mn mtext mfrac"
            + " msqrt mroot msub msup msubsup munder mover munderover mspace").split(" "));
          const attributes = new Set(("class href rel target data-language start type tabindex"
            + " aria-label display accent stretchy width").split(" "));
          const bad = [];
          window.alert = () => bad.push("alert");
          for (const payload of payloads) {
            const root = document.createElement("div");
            document.body.append(root);
            update(root, payload);
            for (const node of root.querySelectorAll("*")) {
              if (!known.has(node.localName)) bad.push([payload, node.localName]);
              for (const { name } of node.attributes)
                if (!attributes.has(name)) bad.push([payload, name]);
              if (node.href && !/^https?:/.test(node.href)) bad.push([payload, node.href]);
            }
            await new Promise(requestAnimationFrame);
            root.remove();
          }
          return bad;
        }""",
        XSS,
    )
    assert found == []


HOSTILE = ["[", "*", "**a", "`", "> ", "- ", "|", "[](", "\\", "http://", "a\n", "#\n", "  - ",
           "_a",
           "*a **b ", "`a``", "![", "](", "[a](http://b)", "$a ", "$$\n", "\\[\n", "\\(a", "<http://a",
           "1. ", "a|b\n-|-\n", "|a\n", "```\n", "~~~\n", "h", "(", "[a](b(", "***a** b* ", "a  \n",
           "- a\n\n",
           "```python\n\"", "\u202e", "[![", "  ", "\t", "a*", "*a_", "- - - ", "> - ",
           "$x^{", "\r"]  # fmt: skip


def test_the_renderer_is_linear(page):
    """100 kB of hostile Markdown: under 200 ms where nothing else runs; twice as much never takes
    four times as long, which a quadratic renderer's would."""
    times = page.evaluate(
        """async (pieces) => {
          const { update } = await import("/web/markdown.js");
          const once = (piece, size) => {
            const text = piece.repeat(Math.ceil(size / piece.length));
            const began = performance.now();
            update(document.createElement("div"), text);
            return performance.now() - began;
          };
          for (const piece of pieces) once(piece, 2000);
          return pieces.map((piece) => [piece, Math.min(once(piece, 1e5), once(piece, 1e5)),
                                        Math.min(once(piece, 2e5), once(piece, 2e5))]);
        }""",
        HOSTILE,
    )
    print("\n".join(f"{one:7.1f} {two:7.1f} ms {piece!r}" for piece, one, two in times))
    for piece, one, two in times:
        assert one < 1000, (piece, one)  # seconds are no gate; quadratic takes minutes
        assert two < 3.5 * one + 50, (piece, one, two)
    assert sorted(one for _, one, _ in times)[len(times) // 2] < 200
