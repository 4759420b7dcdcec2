// The page: a pure client of the server's HTTP interface. This file holds what is open now and wires
// the parts; each part has its own file. Everything shown is built from nodes.

import { $, button, element, read, write } from "./dom.js";
import * as api from "./api.js";
import * as answers from "./answer.js";
import { honest, scoreText, showCard } from "./card.js";
import { defaults, openSettings } from "./settings.js";
import { Side } from "./side.js";
import { Speaker } from "./speak.js";
import * as store from "./store.js";
import { Training } from "./training.js";
import { add, choose, fresh, path } from "./tree.js";
import { scroll, View } from "./view.js";

const TRIES = ["What is the capital of France?", "What is 12 * 7?", "How many letters r are in strawberry?"];
const ABOUT = { world_facts: "a fact it read", world_math: "a calculation, with Python", world_spell: "spelling" };
const HEARTBEAT = 10000; // ms between looks at the server while nothing else is asked of it
const RETRY = 2000;

let chat = fresh(defaults());
let models = [];
const running = new Map(); // id of a conversation -> {control, node, chat}

const speaker = new Speaker($("spoken"));
const training = new Training();
const isLive = (node) => running.get(chat.id)?.node === node;
const view = new View($("messages"), {
  edit: (node, text) => say(text, node.parent),
  regenerate: (node) => answer(node.parent, { again: true }),
  goOn: (node) => answer(node.parent, { goOn: node }),
  choose: (node) => {
    choose(chat, node);
    store.save(chat, false);
    show();
  },
  shown: () => show(),
}, isLive);
const side = new Side({ current: () => chat, open, begin, tell });

const model = () => models.find((m) => m.id === $("model").value) ?? models[0];
const other = () => models.find((m) => m.id === $("other").value);

// -- asking ---------------------------------------------------------------------------------------

function say(text, parent) {
  if (running.has(chat.id) || !text.trim()) return;
  chat.title ||= text.trim().replace(/\s+/g, " ").slice(0, 60);
  const node = add(chat, parent, { role: "user", content: text.trim() });
  tour(text.trim());
  answer(node.id);
}

async function answer(parent, { again = false, goOn = null } = {}) {
  if (running.has(chat.id)) return;
  const owner = chat;
  const history = path(owner).slice(0, path(owner).findIndex((node) => node.id === parent) + 1);
  const pair = goOn ? null : other();
  const node = goOn ?? add(owner, parent, answers.blank(model().id));
  if (pair) node.twin = answers.blank(pair.id);
  const control = new AbortController();
  running.set(owner.id, { control, node, chat: owner });
  const options = { goOn, again };
  const lanes = [[node, model(), history], ...(pair ? [[node.twin, pair, history.map((m) => m.twin ?? m)]] : [])];
  delete node.stats;
  speaker.begin();
  show();
  store.save(owner).then(() => side.show());
  let asked = false;
  const changed = () => {
    if (!asked) requestAnimationFrame(() => {
      asked = false;
      if (chat !== owner || !running.has(owner.id)) return;
      view.fill(owner, node, true);
      speaker.feed(node.content);
      scroll(false);
    });
    asked = true;
  };
  await Promise.all(lanes.map(([message, by, before]) => answers.stream(
    message, answers.requestOf(before, owner.settings, by, options), control.signal, changed)));
  running.delete(owner.id);
  if (chat === owner) {
    show();
    speaker.feed(node.content, node.fault ?? (node.stopped ? "Stopped." : "The answer is complete."));
  }
  if (node.code === "invalid_api_key") settings();
  if (node.code === "offline") loadModels();
  await store.save(owner);
  side.show();
}

const stop = () => running.get(chat.id)?.control.abort();

// -- showing --------------------------------------------------------------------------------------

function show() {
  const shown = path(chat);
  $("empty").hidden = shown.length > 0;
  view.show(chat);
  const busy = running.has(chat.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  paintContext(shown);
  scroll(true);
}

function paintContext(shown) {
  const stats = shown.findLast((node) => node.stats?.prompt)?.stats;
  const most = model()?.max_model_len;
  $("context").hidden = !stats || !most;
  if (!stats || !most) return;
  const used = Math.min(most, stats.prompt + (stats.tokens ?? 0));
  $("context").textContent = `Context: ${used} of ${most} tokens used, ${most - used} left.`
    + (used > 0.7 * most ? " When it is full, the oldest questions are left out." : "");
  $("context").classList.toggle("full", used > 0.7 * most);
}

function tell(text, label, work) {
  const act = label ? [button(label, () => {
    $("status").hidden = true;
    work();
  })] : [];
  $("status").replaceChildren(text, ...act);
  $("status").hidden = !text;
}

function open(entry) {
  chat = running.get(entry.id)?.chat ?? entry;
  const served = (id) => models.some((m) => m.id === id);
  if (served(chat.model)) $("model").value = chat.model;
  $("other").value = served(chat.other) ? chat.other : "";
  closeMenu();
  paintModel();
  try {
    show();
  } catch {
    begin();
    tell("That conversation is damaged.");
  }
  side.show();
}

function begin() {
  chat = { ...fresh(defaults()), other: chat.other, model: chat.model };
  closeMenu();
  tell("");
  show();
  side.show();
  $("box").focus();
}

function closeMenu() {
  document.body.classList.remove("menu");
  $("menu").ariaExpanded = "false";
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

// -- the model ------------------------------------------------------------------------------------

const suggestions = () => model()?.fledge?.suggestions ?? [];

function paintModel() {
  const now = model();
  if (!now) return;
  $("honest").textContent = honest(now);
  $("training").hidden = !now.fledge?.run;
  const scores = now.fledge?.scores?.[now.fledge.stage] ?? {};
  const asked = suggestions().length ? suggestions() : TRIES.map((question) => ({ question }));
  $("tries").replaceChildren(...asked.map(({ question, exam }) => {
    const node = button(question, () => say(question, null));
    const score = scoreText(scores[exam]).replace(/ \(.*/, "");
    if (exam) node.append(element("small", `${ABOUT[exam] ?? exam}${score ? `; it gets ${score} of such questions right` : ""}`));
    return element("li", node);
  }));
  $("trieshead").textContent = suggestions().length ? "Three questions that it answered correctly in its exams:" : "Try:";
}

// The tour: at the first visit, the suggestions not yet asked wait above the message box.
function tour(asked) {
  const seen = read("fledge.tour", []);
  const questions = suggestions().map((s) => s.question);
  if (questions.includes(asked) && !seen.includes(asked)) write("fledge.tour", [...seen, asked]);
  const begun = read("fledge.tour", []);
  const next = begun.includes("over") || !begun.length ? undefined : questions.find((q) => !begun.includes(q));
  $("next").hidden = !next;
  if (!next) return;
  $("next").replaceChildren(
    button(`Next: ${next}`, () => say(next, path(chat).at(-1)?.id ?? null)),
    button("End the tour", () => {
      write("fledge.tour", ["over"]);
      $("next").hidden = true;
      $("box").focus();
    }));
}

async function loadModels() {
  clearTimeout(loadModels.timer);
  try {
    const found = (await api.get("/v1/models")).data;
    const loading = found.filter((m) => m.fledge?.state && m.fledge.state !== "ready");
    const changed = JSON.stringify(found.map((m) => m.id)) !== JSON.stringify(models.map((m) => m.id));
    models = found;
    if (changed) {
      const options = () => models.map((m) => element("option", m.id));
      const nothing = element("option", "nothing");
      nothing.value = "";
      $("model").replaceChildren(...options());
      $("other").replaceChildren(nothing, ...options());
      $("compare").hidden = models.length < 2;
      open(chat);
    }
    paintModel();
    if ($("status").dataset.kind) tell("");
    delete $("status").dataset.kind;
    if (loading.length) trouble(`${loading[0].id} is ${loading[0].fledge.state}.`);
    loadModels.timer = setTimeout(look, loading.length ? RETRY / 4 : HEARTBEAT);
  } catch (error) {
    if (error.status === 401) return trouble("This server asks for an API key.", "Enter it", settings);
    trouble(`${error.message} Trying again.`);
    loadModels.timer = setTimeout(loadModels, RETRY);
  }
}

// while the page is not looked at, the server is left in peace
function look() {
  if (document.hidden) loadModels.timer = setTimeout(look, HEARTBEAT);
  else loadModels();
}

function trouble(...told) {
  tell(...told);
  $("status").dataset.kind = "trouble";
}

function settings() {
  openSettings(chat.settings, (given) => {
    chat.settings = given;
    if (chat.nodes.length) store.save(chat, false);
    loadModels();
  });
}

// -- wiring ---------------------------------------------------------------------------------------

function submit() {
  const text = $("box").value;
  if (running.has(chat.id) || !text.trim()) return;
  if (!models.length) return tell(api.OFFLINE);
  $("box").value = "";
  grow();
  say(text, path(chat).at(-1)?.id ?? null);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("box").addEventListener("input", grow);
$("box").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]") && !event.defaultPrevented) {
    stop();
    closeMenu();
    if ($("panel").contains(document.activeElement)) training.close();
  }
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    begin();
  }
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", begin);
$("menu").addEventListener("click", () => {
  const shown = document.body.classList.toggle("menu");
  $("menu").ariaExpanded = shown;
  if (shown) $("new").focus();
});
$("model").addEventListener("change", () => {
  chat.model = $("model").value;
  paintModel();
});
$("other").addEventListener("change", () => (chat.other = $("other").value || null));
$("about").addEventListener("click", () => model() && showCard(model()));
$("training").addEventListener("click", () => training.open(model().id));
$("theme").addEventListener("click", () => {
  const order = ["auto", "dark", "light"];
  write("fledge.theme", order[(order.indexOf(read("fledge.theme", "auto")) + 1) % 3]);
  paintTheme();
});
$("settings").addEventListener("click", settings);
addEventListener("online", loadModels);
addEventListener("offline", () => trouble("You are offline."));

paintTheme();
show();
loadModels();
store.all().then((chats) => {
  if (chats.length && !chat.nodes.length) open(chats[0]);
  else side.show();
});
