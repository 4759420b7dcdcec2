// The text inside a block as nodes: code, emphasis after CommonMark's delimiter rules, links, math.
// Nodes are laid out flat first; a closing mark then moves what lies between it and its opener into
// a new element. Each mark is looked at a bounded number of times, so time is linear.

import { element } from "./dom.js";
import { mathNode } from "./math.js";

const PLAIN = /[^\\`*_[\]!<$\nh]+/y;
const ESCAPED = /[!-/:-@[-`{-~]/;
const AUTOLINK = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"`*)\]]{1,2000}/y;
const TARGET = /\(\s*(?:<([^<>\n]{0,2000})>|([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*))(?:\s+(?:"[^"\n]{0,500}"|'[^'\n]{0,500}'))?\s*\)/y;
const OPENERS = 40; // of emphasis at a time: a page of thousands of nested elements breaks browsers

export function inline(text) {
  const box = document.createDocumentFragment();
  const brackets = []; // openers of links: {node, image, marks}
  let dead = 0; // brackets below this index stand around a link and open none
  let marks = []; // delimiter runs of * and _
  const runs = new CodeRuns(text);
  let plain = "";
  const flush = () => {
    if (plain) box.append(plain);
    plain = "";
  };
  const put = (node) => {
    flush();
    box.append(node);
    return node;
  };
  const at = (pattern, i) => {
    pattern.lastIndex = i;
    return pattern.exec(text);
  };
  for (let i = 0; i < text.length; ) {
    const found = at(PLAIN, i);
    if (found) {
      plain += found[0];
      i = PLAIN.lastIndex;
      continue;
    }
    const c = text[i];
    let next;
    if (c === "\n") {
      if (text[i - 1] === " ") plain = plain.trimEnd();
      if (text[i - 1] === " " && text[i - 2] === " ") put(element("br"));
      flush();
      plain = "\n";
      for (i++; text[i] === " "; i++);
    } else if (c === "\\") {
      const math = text[i + 1] === "(" ? mathAt(text, i, "\\(", "\\)") : null;
      if (math) {
        put(math.node);
        i = math.end;
      } else if (text[i + 1] === "\n") {
        put(element("br"));
        i++;
      } else if (ESCAPED.test(text[i + 1] ?? "")) {
        plain += text[i + 1];
        i += 2;
      } else {
        plain += c;
        i++;
      }
    } else if (c === "`") {
      const span = runs.span(i);
      if (span.text !== null) put(element("code", span.text));
      else plain += text.slice(i, span.end);
      i = span.end;
    } else if (c === "*" || c === "_") {
      let end = i;
      while (text[end] === c) end++;
      flush();
      marks.push(runOf(text, i, end, box.appendChild(document.createTextNode(text.slice(i, end)))));
      i = end;
    } else if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      const image = c === "!";
      const node = put(document.createTextNode(image ? "![" : "["));
      brackets.push({ node, image, marks: marks.length });
      i += image ? 2 : 1;
    } else if (c === "]" && brackets.length) {
      const open = brackets.pop();
      const target = brackets.length >= dead && text[i + 1] === "(" ? at(TARGET, i + 1) : null;
      dead = Math.min(dead, brackets.length);
      const url = target && safeUrl(target[1] ?? target[2]);
      if (!url) {
        plain += c;
        i++;
        continue;
      }
      flush();
      const own = marks.splice(open.marks);
      emphasise(own);
      const link = linkTo(url);
      moveBetween(open.node, null, link);
      if (open.image && !link.textContent) link.append(url);
      open.node.replaceWith(link);
      dead = brackets.length;
      i = TARGET.lastIndex;
    } else if (c === "<" && (next = at(AUTOLINK, i)) && safeUrl(next[1])) {
      put(linkTo(safeUrl(next[1]), next[1]));
      i = AUTOLINK.lastIndex;
    } else if (c === "h" && !/\w/.test(text[i - 1] ?? "") && brackets.length <= dead
               && (next = bareAt(at(BARE, i)))) {
      put(linkTo(next.url, next.text));
      i += next.text.length;
    } else if (c === "$" && (next = mathAt(text, i, "$", "$"))) {
      put(next.node);
      i = next.end;
    } else {
      plain += c;
      i++;
    }
  }
  flush();
  emphasise(marks);
  return box;
}

// Spans of `code`: where the runs of each length stand, found once.
class CodeRuns {
  constructor(text) {
    this.text = text;
    this.places = null;
  }

  span(start) {
    const { text } = this;
    if (!this.places) {
      this.places = new Map();
      for (const run of text.matchAll(/`+/g)) {
        const length = run[0].length;
        if (!this.places.has(length)) this.places.set(length, { list: [], next: 0 });
        this.places.get(length).list.push(run.index);
      }
    }
    let end = start;
    while (text[end] === "`") end++;
    const length = end - start;
    const known = this.places.get(length);
    while (known && known.next < known.list.length && known.list[known.next] < end) known.next++;
    const close = known?.list[known.next];
    if (close === undefined) return { text: null, end };
    let body = text.slice(end, close).replaceAll("\n", " ");
    if (body.startsWith(" ") && body.endsWith(" ") && body.trim()) body = body.slice(1, -1);
    return { text: body, end: close + length };
  }
}

const isSpace = (c) => c === "" || /\s/.test(c);
const isMark = (c) => c !== "" && /[\p{P}\p{S}]/u.test(c);

// CommonMark 6.2: whether a run of * or _ can open or close emphasis
function runOf(text, start, end, node) {
  const before = start ? String.fromCodePoint(text.codePointAt(start - (/[\udc00-\udfff]/.test(text[start - 1]) ? 2 : 1))) : "";
  const after = end < text.length ? String.fromCodePoint(text.codePointAt(end)) : "";
  const left = !isSpace(after) && (!isMark(after) || isSpace(before) || isMark(before));
  const right = !isSpace(before) && (!isMark(before) || isSpace(after) || isMark(after));
  const under = text[start] === "_";
  return {
    node, char: text[start], left: end - start, length: end - start,
    opens: left && (!under || !right || isMark(before)),
    closes: right && (!under || !left || isMark(after)),
  };
}

function emphasise(marks) {
  const bottoms = new Map(); // below these, no opener is to be found for a kind of closer
  const stack = [];
  for (const mark of marks) {
    while (mark.closes && mark.left > 0) {
      const kind = `${mark.char}${mark.opens}${mark.length % 3}`;
      const bottom = bottoms.get(kind) ?? 0;
      let at = stack.length - 1;
      while (at >= bottom && !matches(stack[at], mark)) at--;
      if (at < bottom) {
        bottoms.set(kind, stack.length);
        break;
      }
      const opener = stack[at];
      stack.length = at + 1;
      const size = opener.left > 1 && mark.left > 1 ? 2 : 1;
      const made = element(size === 2 ? "strong" : "em");
      moveBetween(opener.node, mark.node, made);
      opener.node.after(made);
      opener.left -= size;
      mark.left -= size;
      opener.node.data = opener.node.data.slice(size);
      mark.node.data = mark.node.data.slice(size);
      if (!opener.left) stack.pop().node.remove();
      for (const [key, value] of bottoms) bottoms.set(key, Math.min(value, stack.length));
    }
    if (mark.node.data === "") mark.node.remove();
    else if (mark.opens) stack.push(mark);
    if (stack.length > OPENERS) {
      stack.shift();
      for (const [key, value] of bottoms) bottoms.set(key, Math.max(0, value - 1));
    }
  }
}

function matches(opener, closer) {
  if (opener.char !== closer.char || !opener.left) return false;
  const odd = (opener.closes || closer.opens) && (opener.length + closer.length) % 3 === 0;
  return !odd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function moveBetween(open, close, into) {
  while (open.nextSibling !== close) into.append(open.nextSibling);
}

function mathAt(text, start, open, close) {
  const from = start + open.length;
  if (isSpace(text[from] ?? "")) return null;
  const end = from + text.slice(from, from + 500).indexOf(close);
  if (end <= from) return null;
  // as pandoc has it: "$5 and $6" is money
  if (close === "$" && (isSpace(text[end - 1]) || /\d/.test(text[end + 1] ?? ""))) return null;
  const node = mathNode(text.slice(from, end), false);
  return node && { node, end: end + close.length };
}

function bareAt(found) {
  if (!found) return null;
  const text = found[0].replace(/[.,;:!?']+$/, "");
  const url = safeUrl(text);
  return url && { url, text };
}

// http and https only: no javascript:, no data:, nothing relative
function safeUrl(text) {
  try {
    const url = new URL(text.trim());
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

function linkTo(url, text = "") {
  const node = element("a", text);
  node.href = url;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  return node;
}
