// A subset of Markdown, built as nodes, never as HTML: what a model writes cannot become markup.
//   blocks: # headings, ``` or ~~~ code, lists, > quotes, | tables |, ---, $$ math $$, paragraphs
//   inline (inline.js): `code`, *italic*, **bold**, [links](http...), bare links, $math$
// On this subset the tree is CommonMark's (tests compare it with markdown-it). Not in it, and shown
// as the text that it is: HTML, entities, images (a link), indented code, setext headings, reference
// links, lazy lines of quotes. Time is linear: nesting ends at DEPTH, and a search that failed is
// not made again.

import { element, classed, copyButton } from "./dom.js";
import { inline } from "./inline.js";
import { python } from "./highlight.js";
import { mathNode } from "./math.js";

const DEPTH = 8;
const MOST_CELLS = 50; // columns up to which short rows of a table are filled up
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: +(?=\S)|[ \t]*$)/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

function closes(line, marks) {
  const bare = line.trim();
  if (bare.length < marks.length || indent(line) > 3) return false;
  for (const c of bare) if (c !== marks[0]) return false;
  return true;
}

// what may end a paragraph without a blank line
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line)) return true;
  const item = ITEM.exec(line);
  return item !== null && item[0].length < line.length && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
}

// The blocks of some lines: {kind, line, gap, ...}; `gap` is a blank line before it.
export function parse(lines, depth = 0) {
  const blocks = [];
  const missing = new Set(); // ends of math that do not come any more
  let i = 0;
  const add = (kind, line, more) => blocks.push({ kind, line, gap: line > 0 && blank(lines[line - 1]), ...more });
  while (i < lines.length) {
    const line = lines[i];
    const from = i;
    let found;
    if (blank(line)) {
      i++;
    } else if ((found = FENCE.exec(line))) {
      const [, pad, marks, info] = found;
      const body = [];
      for (i++; i < lines.length && !closes(lines[i], marks); i++) {
        body.push(lines[i].slice(Math.min(pad.length, indent(lines[i]))));
      }
      add("code", from, { language: info.trim().split(/\s/)[0], text: body.join("\n"), closed: i < lines.length });
      i++;
    } else if ((found = HEADING.exec(line))) {
      add("heading", from, { level: found[1].length, text: headingText(line.slice(found[0].length)) });
      i++;
    } else if (RULE.test(line)) {
      add("rule", from);
      i++;
    } else if (QUOTE.test(line)) {
      const body = [];
      while (i < lines.length && QUOTE.test(lines[i])) body.push(lines[i++].replace(QUOTE, ""));
      add("quote", from, inner(body, depth));
    } else if (ITEM.test(line)) {
      const list = takeList(lines, i, depth);
      i = list.end;
      add("list", from, list);
    } else if ((found = takeMath(lines, i, missing))) {
      i = found.end;
      add("math", from, found);
    } else if (tableAt(lines, i)) {
      for (i += 2; i < lines.length && !blank(lines[i]) && !interrupts(lines[i]); i++);
      add("table", from, { rows: lines.slice(from, i) });
    } else {
      for (i++; i < lines.length && !blank(lines[i]); i++) {
        if (interrupts(lines[i]) || tableAt(lines, i)) break;
      }
      add("text", from, { text: lines.slice(from, i).map((l) => l.trimStart()).join("\n").trimEnd() });
    }
  }
  return blocks;
}

function inner(lines, depth) {
  if (depth < DEPTH) return { blocks: parse(lines, depth + 1) };
  return { blocks: [{ kind: "text", line: 0, gap: false, text: lines.join("\n") }] };
}

function headingText(rest) {
  const text = rest.trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return end === 0 || /[ \t]/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function takeList(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const kind = first[2].at(-1); // a bullet, or the mark behind a number
  const items = [];
  let loose = false;
  let i = start;
  while (i < lines.length) {
    const head = ITEM.exec(lines[i]);
    if (!head || head[2].at(-1) !== kind || RULE.test(lines[i])) break;
    const empty = head[0].length === lines[i].length;
    const marker = head[1].length + head[2].length;
    const width = empty || head[0].length - marker > 4 ? marker + 1 : head[0].length;
    const body = [lines[i].slice(width)];
    let fence = FENCE.exec(body[0])?.[2] ?? null;
    let blanks = 0;
    for (i++; i < lines.length; i++) {
      const line = lines[i];
      if (blank(line)) {
        blanks++;
        continue;
      }
      const inside = indent(line) >= width;
      const lazy = !inside && !blanks && !fence && body.at(-1) !== "" && !interrupts(line) && !ITEM.test(line);
      if (!(inside || lazy) || (blanks && empty && body.length === 1)) break;
      for (; blanks; blanks--) body.push("");
      const own = inside ? line.slice(width) : line.trimStart();
      if (fence) fence = closes(own, fence) ? null : fence;
      else fence = FENCE.exec(own)?.[2] ?? null;
      body.push(own);
    }
    const item = inner(body, depth);
    items.push(item);
    loose ||= item.blocks.some((block, at) => at > 0 && block.gap);
    const more = i < lines.length && ITEM.exec(lines[i]);
    if (blanks && more && more[2].at(-1) === kind && !RULE.test(lines[i])) loose = true;
    else if (blanks) {
      i -= blanks;
      break;
    }
  }
  return { items, loose, end: i, start: /\d/.test(first[2]) ? parseInt(first[2], 10) : null };
}

function takeMath(lines, start, missing) {
  const bare = lines[start].trim();
  const close = bare.startsWith("$$") ? "$$" : bare.startsWith("\\[") ? "\\]" : null;
  if (!close || missing.has(close)) return null;
  for (let i = start; i < lines.length; i++) {
    const line = i === start ? bare.slice(2) : lines[i].trim();
    if (!line.endsWith(close)) continue;
    const text = [bare.slice(2), ...lines.slice(start + 1, i + 1)].join("\n").trim();
    return { text: text.slice(0, -2), source: lines.slice(start, i + 1).join("\n"), end: i + 1 };
  }
  missing.add(close);
  return null;
}

function cells(line) {
  const found = [];
  let cell = "";
  const text = line.trim();
  for (let i = text[0] === "|" ? 1 : 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") cell += text[++i];
    else if (text[i] === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += text[i];
  }
  if (cell.trim() !== "" || !text.endsWith("|")) found.push(cell.trim());
  return found;
}

function tableAt(lines, i) {
  if (!lines[i].includes("|") || !/^ {0,3}[|:-][-:| \t]*$/.test(lines[i + 1] ?? "")) return false;
  const marks = cells(lines[i + 1]);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[i]).length;
}

// -- nodes ----------------------------------------------------------------------------------------

export function blockNode(block, live = false) {
  switch (block.kind) {
    case "code":
      return codeNode(block, live);
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", block.blocks.map((b) => blockNode(b, live)));
    case "list":
      return listNode(block, live);
    case "table":
      return tableNode(block.rows);
    case "math":
      return mathNode(block.text, true) ?? element("p", block.source);
    default:
      return element("p", inline(block.text));
  }
}

function codeNode(block, live) {
  const colour = /^(python|py|python3)$/i.test(block.language) && (block.closed || !live);
  const code = element("code", colour ? python(block.text) : [block.text]);
  if (block.language) code.dataset.language = block.language;
  const pre = element("pre", code);
  pre.tabIndex = 0; // it scrolls: the keyboard must reach it
  if (live && !block.closed) return pre;
  return classed("div", "code", pre, copyButton(() => block.text, "Copy code"));
}

function listNode(block, live) {
  const list = element(block.start === null ? "ul" : "ol");
  if (block.start !== null && block.start !== 1) list.start = block.start;
  for (const item of block.items) {
    const node = element("li");
    item.blocks.forEach((b) => {
      if (b.kind === "text" && !block.loose) node.append(inline(b.text));
      else node.append(blockNode(b, live));
    });
    list.append(node);
  }
  return list;
}

function tableNode(lines) {
  const sides = cells(lines[1]).map((mark) => (mark.endsWith(":") ? (mark[0] === ":" ? "mid" : "end") : ""));
  const row = (line, name) => {
    const texts = cells(line);
    const most = sides.length > MOST_CELLS ? Math.min(texts.length, sides.length) : sides.length;
    return element("tr", Array.from({ length: most }, (_, i) => {
      const cell = element(name, inline(texts[i] ?? ""));
      if (sides[i]) cell.className = sides[i];
      return cell;
    }));
  };
  const table = element("table", element("thead", row(lines[0], "th")));
  if (lines.length > 2) table.append(element("tbody", lines.slice(2).map((line) => row(line, "td"))));
  const wrap = classed("div", "scroll", table);
  wrap.tabIndex = 0;
  return wrap;
}

// Shows `text` in `root`. While text streams in, only its last two blocks can change: where a block
// begins depends on nothing behind it, and a line that is still growing may yet join the list before
// it. So the text is read again from there, and a long answer costs no more per token than a short one.
export function update(root, text, live = false) {
  const before = root.shown ?? { text: "", blocks: [], live };
  if (text === before.text && live === before.live) return;
  const grown = text.startsWith(before.text);
  const blocks = grown ? before.blocks.slice(0, -2) : [];
  const from = grown ? (before.blocks.at(-2) ?? before.blocks[0])?.at ?? 0 : 0;
  const raw = text.slice(from).match(/[^\r\n]*(?:\r\n?|\n|$)/g);
  const offsets = [from];
  for (const line of raw) offsets.push(offsets.at(-1) + line.length);
  const parsed = parse(raw.map((line) => untab(line.replace(/[\r\n]+$/, ""))));
  parsed.forEach((block, i) => {
    const at = offsets[block.line];
    const source = text.slice(at, i + 1 < parsed.length ? offsets[parsed[i + 1].line] : undefined);
    const old = before.blocks[blocks.length];
    const same = old?.source === source && old.at === at && (live === before.live || i + 1 < parsed.length);
    const node = same ? old.node : blockNode(block, live);
    if (!same && old) old.node.replaceWith(node);
    else if (!same) root.append(node);
    blocks.push({ at, source, node });
  });
  for (const gone of before.blocks.slice(blocks.length)) gone.node.remove();
  root.shown = { text, blocks, live };
}

const untab = (line) => (line.includes("\t") ? line.replace(/^[ \t]+/, (w) => w.replaceAll("\t", "    ")) : line);
