// The settings of a conversation: each keeps its own; a new one begins with the defaults.

import { $, read, write } from "./dom.js";
import { key } from "./api.js";

const FIELDS = ["system", "persona", "temperature", "top_p", "top_k", "max_tokens", "seed"];

export const defaults = () => read("fledge.settings", {});

// `changed(settings)` when the drawer closes
export function openSettings(settings, changed) {
  const drawer = $("drawer");
  for (const name of FIELDS) $(`s-${name}`).value = settings[name] ?? "";
  $("s-tokens").checked = settings.tokens !== false;
  $("s-default").checked = false;
  $("s-key").value = key();
  drawer.addEventListener("close", () => {
    const given = Object.fromEntries(FIELDS.map((name) => [name, $(`s-${name}`).value]));
    given.tokens = $("s-tokens").checked;
    if ($("s-default").checked) write("fledge.settings", given);
    key($("s-key").value.trim());
    changed(given);
  }, { once: true });
  drawer.showModal();
}
