// A conversation as a tree: an edited question and a second answer are branches, nothing is lost.
//   chat = {id, title, changed, model, other, settings, nodes, chosen}
//   node = {id, parent, role, content, ...}, in the order in which they came
// `chosen` names, for a parent, the child that is shown; without it the last one is.

const ROOT = "root";

const newId = () => crypto.randomUUID?.() ?? String(Math.random()).slice(2);

export function fresh(settings = {}) {
  return { id: newId(), title: "", changed: 0, model: null, other: null, settings, nodes: [], chosen: {} };
}

// what an earlier version of the page, or an import, stored as a plain list; null if it is neither
export function upgrade(stored) {
  if (!stored || typeof stored !== "object") return null;
  const chat = { ...fresh(), ...stored };
  if (Array.isArray(stored.messages)) {
    delete chat.messages;
    chat.nodes = [];
    for (const message of stored.messages) add(chat, chat.nodes.at(-1)?.id ?? null, message);
  }
  const known = new Set();
  const sound = Array.isArray(chat.nodes) && chat.nodes.every((node) => {
    const fits = ["user", "assistant"].includes(node?.role) && typeof node.content === "string"
      && typeof node.id === "string" && (node.parent === null || known.has(node.parent)) && !known.has(node.id);
    known.add(node?.id);
    return fits;
  });
  if (!sound || typeof chat.id !== "string") return null;
  chat.title = String(chat.title ?? "").slice(0, 200);
  if (typeof chat.chosen !== "object" || !chat.chosen) chat.chosen = {};
  if (typeof chat.settings !== "object" || !chat.settings) chat.settings = {};
  return chat;
}

export function add(chat, parent, message) {
  const node = { ...message, id: newId(), parent };
  chat.nodes.push(node);
  choose(chat, node);
  return node;
}

export function choose(chat, node) {
  chat.chosen[node.parent ?? ROOT] = node.id;
}

export function siblings(chat, node) {
  return chat.nodes.filter((other) => other.parent === node.parent);
}

// the nodes that are shown, from the first question down
export function path(chat) {
  const children = new Map();
  for (const node of chat.nodes) {
    if (!children.has(node.parent)) children.set(node.parent, []);
    children.get(node.parent).push(node);
  }
  const shown = [];
  for (let parent = null; children.has(parent); parent = shown.at(-1).id) {
    const list = children.get(parent);
    shown.push(list.find((node) => node.id === chat.chosen[parent ?? ROOT]) ?? list.at(-1));
  }
  return shown;
}
