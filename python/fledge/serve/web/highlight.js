// Python in colours: nodes for a code block. One pass with one pattern; what it does not know stays
// plain, and long code stays plain altogether.

import { classed } from "./dom.js";

const LONGEST = 50000;
const WORDS = new Set(("and as assert async await break case class continue def del elif else except finally for from " +
  "global if import in is lambda match nonlocal not or pass raise return try while with yield").split(" "));
const NAMED = new Set(["True", "False", "None", "self", "cls"]);
const TOKEN = /(#[^\n]*)|((?:[rRbBfFuU]{0,2})(?:"""(?:[^"\\]|\\[^]|"(?!""))*(?:"""|$)|'''(?:[^'\\]|\\[^]|'(?!''))*(?:'''|$)|"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?))|(\b\d[\d_]*(?:\.[\d_]*)?(?:[eE][+-]?\d+)?j?\b|\b0[xXbBoO][\da-fA-F_]+\b)|([^\W\d]\w*)|(@[\w.]+)/gu;

export function python(text) {
  if (text.length > LONGEST) return [text];
  const nodes = [];
  let from = 0;
  let before = "";
  for (const found of text.matchAll(TOKEN)) {
    const [whole, comment, string, number, name, decorator] = found;
    const kind = comment ? "c" : string ? "s" : number ? "n" : decorator ? "d"
      : WORDS.has(name) ? "k" : NAMED.has(name) ? "n"
      : before === "def" || before === "class" ? "f"
      : text[found.index + whole.length] === "(" ? "f" : null;
    before = name ?? "";
    if (!kind) continue;
    if (found.index > from) nodes.push(text.slice(from, found.index));
    nodes.push(classed("span", `py-${kind}`, whole));
    from = found.index + whole.length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}
