// A subset of Markdown, built as nodes, never as HTML: what a model writes cannot become markup.
//   blocks: # headings, ``` code, lists, > quotes, | tables |, ---, paragraphs
//   inline: `code`, **bold**, *italic*, [links](http...), bare links
// Unknown syntax shows as the text that it is. Time is linear: a search for a closing mark that
// failed is not made again, and nesting ends at DEPTH.

const DEPTH = 8;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

// The blocks of a text: {kind, text, ...}. The last one may still grow.
export function blocksOf(text) {
  const lines = text.split("\n");
  const blocks = [];
  let i = 0;
  const take = (test) => {
    const from = i;
    while (i < lines.length && test(lines[i])) i++;
    return lines.slice(from, i);
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = /^\s*(`{3,})\s*([\w+-]*)\s*$/.exec(line);
    if (fence) {
      i++;
      const body = take((l) => !l.trim().startsWith(fence[1]));
      i++;
      blocks.push({ kind: "code", language: fence[2], text: body.join("\n") });
    } else if (/^\s*$/.test(line)) {
      i++;
    } else if (/^#{1,6}\s/.test(line)) {
      const marks = line.indexOf(" ");
      blocks.push({ kind: "heading", level: Math.min(marks, 6), text: line.slice(marks + 1) });
      i++;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      blocks.push({ kind: "rule", text: line });
      i++;
    } else if (line.startsWith(">")) {
      const body = take((l) => l.startsWith(">")).map((l) => l.replace(/^>\s?/, ""));
      blocks.push({ kind: "quote", text: body.join("\n") });
    } else if (ITEM.test(line)) {
      const body = take((l) => ITEM.test(l) || /^\s{2,}\S/.test(l));
      blocks.push({ kind: "list", text: body.join("\n") });
    } else if (line.includes("|") && /^\s*\|?[\s:|-]*-[\s:|-]*$/.test(lines[i + 1] ?? "")) {
      blocks.push({ kind: "table", text: take((l) => l.includes("|")).join("\n") });
    } else {
      const body = take((l, n) => !/^\s*$/.test(l) && !/^\s*`{3}|^#{1,6}\s|^>/.test(l) && !ITEM.test(l));
      blocks.push({ kind: "text", text: body.join("\n") || lines[i++] });
    }
  }
  return blocks;
}

export function blockNode(block, depth = 0) {
  switch (block.kind) {
    case "code": {
      const code = element("code", block.text);
      if (block.language) code.dataset.language = block.language;
      return element("pre", code);
    }
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, ...inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return depth < DEPTH
        ? element("blockquote", ...blocksOf(block.text).map((b) => blockNode(b, depth + 1)))
        : element("blockquote", block.text);
    case "list":
      return listNode(block.text.split("\n"));
    case "table":
      return tableNode(block.text.split("\n"));
    default:
      return element("p", ...inline(block.text));
  }
}

function listNode(lines) {
  const ordered = /^\s*\d/.test(lines[0]);
  const list = element(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(lines[0], 10);
  const base = ITEM.exec(lines[0])[1].length;
  for (let i = 0; i < lines.length; ) {
    const item = ITEM.exec(lines[i]);
    const rest = [];
    let j = i + 1;
    while (j < lines.length && (lines[j].match(/^\s*/)[0].length > base)) rest.push(lines[j++]);
    const node = element("li", ...inline(item ? item[3] : lines[i]));
    if (rest.length && base < 4 * DEPTH) {
      if (ITEM.test(rest[0])) node.append(listNode(rest));
      else node.append(element("br"), ...inline(rest.join("\n")));
    }
    list.append(node);
    i = j;
  }
  return list;
}

function tableNode(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
  const head = element("tr", ...cells(lines[0]).map((c) => element("th", ...inline(c))));
  const rows = lines.slice(2).map((l) => element("tr", ...cells(l).map((c) => element("td", ...inline(c)))));
  const wrap = element("div", element("table", element("thead", head), element("tbody", ...rows)));
  wrap.className = "scroll";
  return wrap;
}

export function inline(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // closing marks that do not come any more
  let plain = "";
  const flush = () => { if (plain) nodes.push(document.createTextNode(plain)); plain = ""; };
  const close = (mark, from) => {
    if (missing.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) missing.add(mark);
    return at;
  };
  for (let i = 0; i < text.length; ) {
    const c = text[i];
    let end = -1;
    if (c === "\\" && /[\\`*_[\]#|>-]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    if (c === "`" && (end = close("`", i + 1)) > i + 1) {
      flush();
      nodes.push(element("code", text.slice(i + 1, end)));
      i = end + 1;
      continue;
    }
    const mark = text.startsWith("**", i) ? "**" : c === "*" ? "*" : null;
    if (mark && depth < DEPTH && /\S/.test(text[i + mark.length] ?? " ")) {
      end = close(mark, i + mark.length + 1);
      if (end > 0 && text[end - 1] !== " ") {
        flush();
        const inner = inline(text.slice(i + mark.length, end), depth + 1);
        nodes.push(element(mark === "**" ? "strong" : "em", ...inner));
        i = end + mark.length;
        continue;
      }
    }
    if (c === "[" && (end = close("](", i + 1)) > 0 && end - i < 500) {
      const stop = text.indexOf(")", end);
      const url = stop > 0 && stop - end < 2000 ? safeUrl(text.slice(end + 2, stop)) : null;
      if (url) {
        flush();
        nodes.push(link(url, text.slice(i + 1, end)));
        i = stop + 1;
        continue;
      }
    }
    if (c === "h" && /^https?:\/\//.test(text.slice(i, i + 8))) {
      const raw = /^[^\s<>"`*)\]]{1,2000}/.exec(text.slice(i, i + 2000))[0].replace(/[.,;:!?]+$/, "");
      const url = safeUrl(raw);
      if (url) {
        flush();
        nodes.push(link(url, raw));
        i += raw.length;
        continue;
      }
    }
    plain += c;
    i++;
  }
  flush();
  return nodes;
}

// http and https only: no javascript:, no data:
function safeUrl(text) {
  try {
    const url = new URL(text.trim());
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

function link(url, text) {
  const node = element("a", text);
  node.href = url;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  return node;
}

export function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

// Shows `text` in `root`, making anew only the blocks that changed: while text streams in, that is
// the last one.
export function update(root, text) {
  const old = root.blocks ?? [];
  const blocks = blocksOf(text);
  let same = 0;
  while (same < old.length && same < blocks.length && old[same].kind === blocks[same].kind
         && old[same].text === blocks[same].text) same++;
  while (root.childNodes.length > same) root.lastChild.remove();
  root.append(...blocks.slice(same).map((block) => blockNode(block)));
  root.blocks = blocks;
}
