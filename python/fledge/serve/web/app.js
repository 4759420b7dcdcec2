// The page: a pure client of /v1. State is one conversation at a time; a message of the assistant
// is {role, content, tool_events, stats, fault}. Everything shown is built from nodes.

import { events } from "/web/sse.js";
import { element, update } from "/web/markdown.js";
import * as store from "/web/store.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed"];
const TRIES = ["What is the capital of France?", "What is 12 * 7?", "How many letters r are in strawberry?"];

let chat = fresh();
let models = [];
let running = null; // the AbortController of the answer under way
let settings = read("fledge.settings", { temperature: "0.7" });

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [], changed: 0 };
}

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // a browser without storage forgets; the page works all the same
  }
}

function headers() {
  const key = sessionStorage.getItem("fledge.key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

// -- asking ---------------------------------------------------------------------------------------

function requestOf(messages) {
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of FIELDS.slice(1)) {
    const value = settings[name];
    if (value !== undefined && value !== "" && Number.isFinite(Number(value))) body[name] = Number(value);
  }
  const said = messages.map(({ role, content, tool_events }) => ({ role, content: parts(content, tool_events) }));
  body.messages = settings.system ? [{ role: "system", content: settings.system }, ...said] : said;
  return body;
}

// what the model wrote before goes back to it with its python and output in their places
function parts(content, tools) {
  if (!tools?.length) return content;
  const list = [];
  let from = 0;
  for (const event of tools) {
    if (event.type === "python") {
      if (event.at > from) list.push({ type: "text", text: content.slice(from, event.at) });
      from = event.at;
      list.push({ type: "python", text: event.code });
    } else {
      list.push({ type: "output", text: event.output });
    }
  }
  if (from < content.length) list.push({ type: "text", text: content.slice(from) });
  return list;
}

async function answer() {
  const owner = chat;
  const message = { role: "assistant", content: "", tool_events: [], stats: null, fault: null };
  const request = requestOf(owner.messages);
  owner.messages.push(message);
  const control = (running = new AbortController());
  const began = performance.now();
  let first = null;
  let usage = null;
  show();
  const view = $("messages").lastElementChild;
  let asked = false;
  const paint = () => {
    asked = false;
    if (chat === owner) fill(view, message, true);
  };
  const later = () => {
    if (!asked) requestAnimationFrame(paint);
    asked = true;
  };
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request), signal: control.signal,
    });
    if (!reply.ok) throw await faultOf(reply);
    let reason = null;
    for await (const event of events(reply.body)) {
      if (event.error) throw new Fault(event.error.message, event.error.code);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        if (choice.delta.content) first ??= performance.now();
        message.content += choice.delta.content ?? "";
        message.tool_events.push(...(choice.delta.tool_events ?? []));
        reason = choice.finish_reason ?? reason;
      }
      speak(message.content);
      later();
    }
    if (reason === null) throw new Fault("The answer broke off.", "cut");
    message.cut = reason === "length";
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.fault = error instanceof Fault ? error.message : "The server cannot be reached.";
  }
  const seconds = (performance.now() - began) / 1e3;
  const tokens = usage?.completion_tokens ?? null;
  message.stats = { seconds, first: first === null ? null : (first - began) / 1e3, tokens };
  running = null;
  await store.save(owner);
  if (chat === owner) show();
  speak(message.content, true);
  list();
}

class Fault extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

async function faultOf(reply) {
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch {
    // not our shape: a proxy's page, perhaps
  }
  const wait = reply.headers.get("retry-after");
  const told = error.message ?? `The server answered with status ${reply.status}.`;
  if (reply.status === 401) $("drawer").showModal();
  return new Fault(wait ? `${told} (Try again in ${wait} s.)` : told, error.code);
}

function send(text) {
  if (running || !text.trim()) return;
  chat.title ||= text.trim().slice(0, 60);
  chat.messages.push({ role: "user", content: text.trim() });
  $("box").value = "";
  grow();
  answer();
}

function regenerate() {
  if (running) return;
  while (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  if (chat.messages.length) answer();
}

function edit(index) {
  if (running) return;
  $("box").value = chat.messages[index].content;
  chat.messages.length = index;
  show();
  grow();
  $("box").focus();
}

// -- showing --------------------------------------------------------------------------------------

function show() {
  $("empty").hidden = chat.messages.length > 0;
  $("messages").replaceChildren(...chat.messages.map((message, i) => {
    const node = element("li", element("div"), element("div"), element("div"));
    node.className = `message ${message.role}`;
    const [who, body, tools] = node.children;
    who.className = "who";
    who.textContent = message.role === "user" ? "You" : "Model";
    body.className = "body";
    tools.className = "tools";
    fill(node, message, running !== null && i === chat.messages.length - 1, i);
    return node;
  }));
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  scroll(true);
}

// pieces of text and tool cards in their order; only what changed is made anew
function fill(node, message, live, index = -1) {
  const [, body, tools] = node.children;
  if (message.role === "user") {
    body.textContent = message.content;
    tools.replaceChildren(button("Edit", () => edit(index)), copyButton(() => message.content));
    return;
  }
  const pieces = piecesOf(message);
  while (body.children.length > pieces.length) body.lastChild.remove();
  pieces.forEach((piece, i) => {
    let at = body.children[i];
    const kind = piece.card ? "card" : "text";
    if (!at || at.dataset.kind !== kind) {
      const made = piece.card ? element("details") : element("div");
      made.dataset.kind = kind;
      if (at) at.replaceWith(made); else body.append(made);
      at = made;
    }
    if (piece.card) fillCard(at, piece.card);
    else update(at, piece.text);
  });
  body.classList.toggle("cursor", live);
  if (live) {
    scroll(false);
    return;
  }
  if (message.fault) {
    const box = element("p", message.fault);
    box.className = "fault";
    box.setAttribute("role", "alert");
    body.append(box);
  }
  const last = message === chat.messages.at(-1);
  tools.replaceChildren(
    copyButton(() => message.content),
    ...(last ? [button(message.fault ? "Try again" : "Regenerate", regenerate)] : []),
    element("span", statsText(message)),
  );
  tools.lastChild.className = "fine";
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

function fillCard(node, card) {
  const state = card.output === undefined ? "running" : card.ok === false ? "failed" : "ran";
  node.className = state === "failed" ? "card bad" : "card";
  const took = card.ms === undefined ? "" : ` in ${card.ms < 10 ? card.ms.toFixed(1) : Math.round(card.ms)} ms`;
  const title = element("summary", `Python ${state}${took}`);
  const output = card.output === undefined ? [] : [element("pre", element("code", card.output || "(no output)"))];
  node.replaceChildren(title, element("pre", element("code", card.code)), ...output);
}

function statsText(message) {
  const stats = message.stats;
  if (!stats) return "";
  const words = [];
  if (message.stopped) words.push("stopped");
  if (message.cut) words.push("cut at its longest");
  if (stats.tokens) {
    words.push(`${stats.tokens} tokens`, `${(stats.tokens / stats.seconds).toFixed(0)} tokens/s`);
  }
  if (stats.first !== null) words.push(`first after ${stats.first.toFixed(2)} s`);
  return words.join(", ");
}

function button(text, work) {
  const node = element("button", text);
  node.type = "button";
  node.className = "quiet";
  node.addEventListener("click", work);
  return node;
}

function copyButton(text) {
  const node = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      node.textContent = "Copied";
    } catch {
      node.textContent = "Not allowed here";
    }
    setTimeout(() => (node.textContent = "Copy"), 1500);
  });
  return node;
}

// follows the text only where the reader is at its end
function scroll(always) {
  const talk = $("talk");
  if (always || talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}

// a screen reader gets whole sentences, not tokens
let spoken = 0;
function speak(text, end = false) {
  if (text.length < spoken) spoken = 0;
  const stop = end ? text.length : Math.max(...[". ", "! ", "? ", "\n"].map((m) => text.lastIndexOf(m) + 1));
  if (stop > spoken) {
    $("spoken").textContent = text.slice(spoken, stop);
    spoken = end ? 0 : stop;
  }
}

async function list() {
  const chats = await store.all();
  $("chats").replaceChildren(...chats.map((entry) => {
    const open = button(entry.title || "Untitled", () => {
      if (running) running.abort();
      chat = entry;
      closeMenu();
      show();
      list();
    });
    open.className = "open";
    open.setAttribute("aria-current", String(entry.id === chat.id));
    const gone = button("\u00d7", async () => {
      await store.remove(entry.id);
      if (entry.id === chat.id) begin();
      list();
    });
    gone.setAttribute("aria-label", `Delete ${entry.title}`);
    return element("li", open, gone);
  }));
}

function begin() {
  if (running) running.abort();
  chat = fresh();
  closeMenu();
  show();
  list();
  $("box").focus();
}

function closeMenu() {
  document.body.classList.remove("menu");
  $("menu").setAttribute("aria-expanded", "false");
}

function grow() {
  const box = $("box");
  box.rows = Math.min(10, Math.max(1, box.value.split("\n").length));
}

function paintTheme() {
  const theme = read("fledge.theme", "auto");
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

function paintCard() {
  const card = models.find((m) => m.id === $("model").value);
  if (!card) return;
  const facts = [];
  if (card.fledge?.num_hidden_layers) facts.push(`${card.fledge.num_hidden_layers} layers`);
  if (card.fledge?.model?.parameters) facts.push(`${(card.fledge.model.parameters / 1e6).toFixed(1)} M parameters`);
  facts.push(`${card.max_model_len} tokens of context`);
  $("card").textContent = facts.join(", ");
}

async function loadModels() {
  const status = $("status");
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    if (!reply.ok) throw await faultOf(reply);
    models = (await reply.json()).data;
    $("model").replaceChildren(...models.map((m) => element("option", m.id)));
    paintCard();
    status.hidden = true;
  } catch (error) {
    status.textContent = error instanceof Fault ? error.message : "The server cannot be reached.";
    status.hidden = false;
    setTimeout(loadModels, 3000);
  }
}

// -- wiring ---------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("box").value);
});
$("box").addEventListener("input", grow);
$("box").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("box").value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("drawer").open) running.abort();
  if (event.key === "Escape") closeMenu();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    begin();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", begin);
$("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("menu");
  $("menu").setAttribute("aria-expanded", String(open));
});
$("model").addEventListener("change", paintCard);
$("theme").addEventListener("click", () => {
  const order = ["auto", "dark", "light"];
  write("fledge.theme", order[(order.indexOf(read("fledge.theme", "auto")) + 1) % 3]);
  paintTheme();
});
$("settings").addEventListener("click", () => {
  for (const name of FIELDS) $(`s-${name}`).value = settings[name] ?? "";
  $("s-key").value = sessionStorage.getItem("fledge.key") ?? "";
  $("drawer").showModal();
});
$("drawer").addEventListener("close", () => {
  settings = Object.fromEntries(FIELDS.map((name) => [name, $(`s-${name}`).value]));
  write("fledge.settings", settings);
  sessionStorage.setItem("fledge.key", $("s-key").value.trim());
  loadModels();
});
$("tries").replaceChildren(...TRIES.map((text) => element("li", button(text, () => send(text)))));

paintTheme();
show();
loadModels();
store.all().then((chats) => {
  if (chats.length && chat.messages.length === 0) {
    chat = chats[0];
    show();
  }
  list();
});
