// Conversations in IndexedDB, as tree.js has them. Where the browser refuses storage (private
// windows), they live as long as the page.

import { upgrade } from "./tree.js";

const memory = new Map();
let opened = null;

function open() {
  opened ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("fledge", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opened;
}

async function run(mode, work) {
  const base = await open();
  if (!base) return null;
  return new Promise((resolve) => {
    const request = work(base.transaction("chats", mode).objectStore("chats"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
}

export async function all() {
  const found = (await run("readonly", (s) => s.getAll())) ?? [...memory.values()];
  return found.map(upgrade).filter(Boolean).sort((a, b) => b.changed - a.changed);
}

// `touch` puts it on top of the list; a new name does not
export async function save(chat, touch = true) {
  if (touch) chat.changed = Date.now();
  memory.set(chat.id, chat);
  await run("readwrite", (s) => s.put(structuredClone(chat)));
}

export async function remove(id) {
  memory.delete(id);
  await run("readwrite", (s) => s.delete(id));
}
