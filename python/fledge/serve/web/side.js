// The list of conversations: search, open, rename, delete with undo, export and import.

import { $, button, classed, element } from "./dom.js";
import * as store from "./store.js";
import { fresh, path, upgrade } from "./tree.js";

const text = (chat) => `${chat.title}\n${chat.nodes.map((node) => node.content).join("\n")}`.toLowerCase();

export class Side {
  // `acts`: {current, open, begin, tell}
  constructor(acts) {
    this.acts = acts;
    $("search").addEventListener("input", () => this.show());
    $("import").addEventListener("change", () => this.take());
  }

  async show() {
    const words = $("search").value.trim().toLowerCase().split(/\s+/);
    const chats = await store.all();
    const found = chats.filter((chat) => words.every((word) => text(chat).includes(word)));
    $("chats").replaceChildren(...found.map((chat) => this.entry(chat)));
    $("none").hidden = found.length > 0;
    $("none").textContent = chats.length ? "Nothing found." : "No conversations yet.";
  }

  entry(chat) {
    const current = chat.id === this.acts.current().id;
    const open = button(chat.title || "Untitled", () => this.acts.open(chat));
    open.className = "open";
    open.ariaCurrent = current;
    const item = element("li", open);
    if (!current) return item;
    const name = chat.title || "Untitled";
    item.append(classed("div", "tools",
      button("Rename", () => this.rename(item, chat), `Rename ${name}`),
      button("JSON", () => save(`${fileName(chat)}.json`, JSON.stringify(chat, null, 1)), `Export ${name} as JSON`),
      button("Markdown", () => save(`${fileName(chat)}.md`, markdownOf(chat)), `Export ${name} as Markdown`),
      button("Delete", () => this.remove(chat), `Delete ${name}`)));
    return item;
  }

  rename(item, chat) {
    const box = element("input");
    box.value = chat.title;
    box.maxLength = 200;
    box.ariaLabel = "Name of the conversation";
    let over = false;
    const done = async (keep) => {
      if (over) return;
      over = true;
      const live = this.acts.current();
      if (keep && box.value.trim()) chat.title = box.value.trim();
      if (live.id === chat.id) live.title = chat.title;
      if (keep) await store.save(live.id === chat.id ? live : chat, false);
      await this.show();
      $("chats").querySelector('[aria-current="true"]')?.focus();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") done(false);
    });
    box.addEventListener("blur", () => done(true));
    item.replaceChildren(box);
    box.select();
  }

  async remove(chat) {
    await store.remove(chat.id);
    this.acts.begin();
    this.acts.tell(`Deleted \u201c${chat.title}\u201d.`, "Undo", async () => {
      await store.save(chat, false);
      this.acts.open(chat);
    });
  }

  async take() {
    const file = $("import").files[0];
    $("import").value = "";
    try {
      const chat = file.size < 5e7 && upgrade(JSON.parse(await file.text()));
      if (!chat || !chat.nodes.length) throw new SyntaxError();
      const own = { ...chat, id: fresh().id };
      await store.save(own);
      this.acts.open(own);
    } catch {
      this.acts.tell(`${file.name} is no conversation that this page exported.`);
    }
  }
}

const fileName = (chat) => chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50) || "conversation";

function markdownOf(chat) {
  const lines = [`# ${chat.title || "Conversation"}`, ""];
  for (const node of path(chat)) {
    for (const message of [node, ...(node.twin ? [node.twin] : [])]) {
      lines.push(`**${node.role === "user" ? "You" : message.model ?? "Model"}**`, "");
      for (const event of message.tool_events ?? []) {
        lines.push("```" + (event.type === "python" ? "python" : ""), event.code ?? event.output, "```", "");
      }
      lines.push(message.content, "");
    }
  }
  return lines.join("\n");
}

function save(name, content) {
  const url = URL.createObjectURL(new Blob([content], { type: "text/plain;charset=utf-8" }));
  const link = element("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
