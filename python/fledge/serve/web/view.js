// The conversation as it is shown. Nodes of messages are kept and only what changed is made anew, so
// a long conversation costs nothing while its last answer grows.

import { $, button, classed, copyButton, element } from "./dom.js";
import { update } from "./markdown.js";
import { tokenView } from "./tokens.js";
import { path, siblings } from "./tree.js";

export class View {
  // `acts`: what the buttons do {edit, regenerate, goOn, choose}; `isLive(node)` while it is written
  constructor(list, acts, isLive) {
    Object.assign(this, { list, acts, isLive, made: new Map() });
  }

  show(chat) {
    const shown = path(chat);
    const ids = new Set(shown.map((node) => node.id));
    for (const [id, node] of this.made) {
      if (ids.has(id)) continue;
      node.remove();
      this.made.delete(id);
    }
    shown.forEach((node, i) => {
      if (!this.made.has(node.id)) this.made.set(node.id, classed("li", `message ${node.role}`));
      const item = this.made.get(node.id);
      if (this.list.children[i] !== item) this.list.insertBefore(item, this.list.children[i] ?? null);
      this.fill(chat, node, i === shown.length - 1);
    });
  }

  fill(chat, node, last) {
    const item = this.made.get(node.id);
    if (!item || item.querySelector("form")) return;
    if (node.role === "user") {
      const body = classed("div", "body", node.content);
      const tools = classed("div", "tools", this.switcher(chat, node),
        button("Edit", () => this.editor(item, node), "Edit this question"), copyButton(() => node.content, "Copy the question"));
      item.replaceChildren(classed("div", "who", "You"), body, tools);
      return;
    }
    const lanes = [node, ...(node.twin ? [node.twin] : [])];
    item.classList.toggle("pair", lanes.length > 1);
    while (item.children.length > lanes.length) item.lastChild.remove();
    lanes.forEach((message, i) => {
      if (!item.children[i]) {
        item.append(classed("div", "lane", classed("div", "who"), classed("div", "body"), classed("div", "tools")));
      }
      this.lane(item.children[i], message, chat, node, last && this.isLive(node), last, i === 0);
    });
  }

  lane(lane, message, chat, node, live, last, first) {
    const [who, body, tools] = lane.children;
    who.textContent = message.model ?? "Model";
    const writing = live && !message.stats;
    this.body(body, message, writing);
    if (writing) {
      tools.replaceChildren();
      return;
    }
    const made = message.content ? [copyButton(() => message.content, "Copy the answer")] : [];
    if (first && !live) made.unshift(this.switcher(chat, node));
    if (first && last && !live) made.push(button(message.fault ? "Try again" : "Regenerate", () => this.acts.regenerate(node)));
    const broken = message.cut || message.stopped || message.fault;
    if (first && last && !live && broken && !node.twin && message.content && message.tool_events.at(-1)?.type !== "python") {
      made.push(button("Continue", () => this.acts.goOn(node)));
    }
    if (message.tokens?.length) made.push(this.tokenButton(lane, message));
    tools.replaceChildren(...made, classed("span", "fine", statsText(message)));
  }

  tokenButton(lane, message) {
    const shown = lane.querySelector(":scope > .tokens");
    const node = button("Tokens", () => {
      const open = lane.querySelector(":scope > .tokens");
      if (open) open.remove();
      else lane.insertBefore(tokenView(message.tokens), lane.lastChild);
      node.ariaExpanded = !open;
    }, "How sure the model was of each token");
    node.ariaExpanded = shown !== null;
    return node;
  }

  // pieces of text and tool cards in their order
  body(body, message, writing) {
    const pieces = piecesOf(message);
    const kinds = pieces.map((piece) => (piece.card ? "card" : "text"));
    [...body.children].forEach((child, i) => child.dataset.kind !== kinds[i] && child.remove());
    pieces.forEach((piece, i) => {
      let at = body.children[i];
      if (at?.dataset.kind !== kinds[i]) {
        at = element(piece.card ? "details" : "div");
        at.dataset.kind = kinds[i];
        body.insertBefore(at, body.children[i] ?? null);
      }
      if (piece.card) fillCard(at, piece.card, writing);
      else update(at, piece.text, writing && i === pieces.length - 1);
    });
    while (body.children.length > pieces.length) body.lastChild.remove();
    body.classList.toggle("cursor", writing);
    body.ariaBusy = writing;
    if (writing && message.waiting) body.append(classed("p", "fine", message.waiting));
    if (!writing && message.fault) {
      const box = classed("p", "fault", message.fault);
      box.role = "alert";
      body.append(box);
    } else if (!writing && !pieces.length) {
      body.append(classed("p", "fine", message.stopped ? "(stopped before the first word)" : "(an empty answer)"));
    }
  }

  switcher(chat, node) {
    const all = siblings(chat, node);
    if (all.length < 2) return "";
    const at = all.indexOf(node);
    const step = (by, text, label) => {
      const made = button(text, () => {
        this.acts.choose(all[at + by]);
        this.made.get(all[at + by].id)?.querySelector(`[aria-label="${label}"]`)?.focus();
      }, label);
      made.disabled = !all[at + by];
      return made;
    };
    const box = classed("span", "switch", step(-1, "\u2039", "Previous version"), `${at + 1}/${all.length}`, step(1, "\u203a", "Next version"));
    box.role = "group";
    box.ariaLabel = `Version ${at + 1} of ${all.length}`;
    return box;
  }

  editor(item, node) {
    const box = element("textarea");
    box.value = node.content;
    box.rows = Math.min(12, node.content.split("\n").length + 1);
    box.ariaLabel = "Edit the question";
    const close = () => {
      item.replaceChildren();
      this.acts.shown();
      item.querySelector("button")?.focus();
    };
    const send = classed("button", "main", "Ask this instead");
    const form = classed("form", "edit", box, classed("div", "tools", send, button("Cancel", close)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!box.value.trim() || $("send").hidden) return;
      item.replaceChildren();
      this.acts.edit(node, box.value.trim());
    });
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault(); // else it would stop an answer too
        close();
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    item.replaceChildren(classed("div", "who", "You"), form);
    box.focus();
  }
}

function piecesOf(message) {
  const pieces = [];
  let from = 0;
  for (const event of message.tool_events ?? []) {
    if (event.type === "python") {
      if (event.at > from) pieces.push({ text: message.content.slice(from, event.at) });
      from = Math.max(from, event.at);
      pieces.push({ card: { code: event.code } });
    } else {
      const card = pieces.findLast((piece) => piece.card)?.card;
      if (card) Object.assign(card, event);
    }
  }
  if (from < message.content.length) pieces.push({ text: message.content.slice(from) });
  return pieces;
}

function fillCard(node, card, writing) {
  const state = card.output === undefined ? (writing ? "running" : "did not run") : card.ok === false ? "failed" : "ran";
  const took = card.ms === undefined ? "" : ` in ${card.ms < 10 ? card.ms.toFixed(1) : Math.round(card.ms)} ms`;
  const key = `${state}${took}`;
  if (node.shown === key) return;
  node.shown = key;
  node.className = state === "failed" ? "card bad" : "card";
  const title = element("summary", `Python ${state}${took}`);
  const code = element("div");
  update(code, `\`\`\`\`\`python\n${card.code}\n\`\`\`\`\``);
  const brief = card.output === undefined ? "" : card.output.split("\n")[0].slice(0, 60);
  if (brief) title.append(classed("span", "brief", ` \u2192 ${brief}`));
  const output = card.output === undefined ? [] : [element("pre", element("code", card.output || "(no output)"))];
  for (const pre of output) pre.tabIndex = 0;
  node.replaceChildren(title, code, ...output);
}

function statsText({ stats, stopped, cut }) {
  if (!stats) return "";
  const words = [];
  if (stopped) words.push("stopped");
  if (cut) words.push("cut at its longest");
  if (stats.tokens) words.push(`${stats.tokens} tokens`);
  if (stats.rate) words.push(`${stats.rate.toFixed(0)} tokens/s`);
  if (stats.first !== null) words.push(`first after ${stats.first.toFixed(2)} s`);
  if (stats.dropped) words.push(`without the ${stats.dropped} oldest messages, which no longer fit`);
  return words.join(", ");
}

// follows the text only where the reader is at its end
export function scroll(always) {
  const talk = $("talk");
  if (always || talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}
