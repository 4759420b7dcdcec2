// The settings of a conversation: each keeps its own; a new one begins with the defaults.

import { $, read, write } from "./dom.js";
import { key } from "./api.js";

const FIELDS = ["system", "persona", "temperature", "top_p", "top_k", "max_tokens", "seed"];

export const defaults = () => read("fledge.settings", {});

// `changed(settings)` when the drawer closes. Done counts at once: the close event of a dialog is a
// task of its own, and a message sent before it would still go out with the old settings. Esc has
// only that event.
export function openSettings(settings, changed) {
  const drawer = $("drawer");
  for (const name of FIELDS) $(`s-${name}`).value = settings[name] ?? "";
  $("s-tokens").checked = settings.tokens !== false;
  $("s-default").checked = false;
  $("s-key").value = key();
  drawer.firstElementChild.onsubmit = drawer.onclose = () => {
    drawer.onclose = null;
    const given = Object.fromEntries(FIELDS.map((name) => [name, $(`s-${name}`).value]));
    given.tokens = $("s-tokens").checked;
    if ($("s-default").checked) write("fledge.settings", given);
    key($("s-key").value.trim());
    changed(given);
  };
  drawer.showModal();
}
