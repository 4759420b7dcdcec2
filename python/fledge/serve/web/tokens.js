// How sure the model was: its answer token by token, shaded by probability. Arrow keys go through
// them; the line below says what else it might have written.

import { classed, element, percent } from "./dom.js";

const MOST = 1500; // tokens that are shown
const visible = (text) => text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u00b7") || "\u00b7";

export function tokenView(tokens) {
  const told = classed("p", "fine told", "Choose a token to see what else was likely.");
  told.ariaLive = "polite";
  const box = classed("div", "heat");
  box.role = "listbox";
  box.ariaLabel = "Tokens of the answer; the darker, the less sure";
  box.ariaOrientation = "horizontal";
  const nodes = tokens.slice(0, MOST).map(([text, logprob], i) => {
    const share = Math.exp(logprob);
    const node = classed("span", `p${Math.min(4, Math.floor((1 - share) * 5))}`, visible(text));
    node.role = "option";
    node.ariaSelected = "false";
    node.ariaLabel = `${text.trim() || "space"}, ${percent(share)}`;
    node.tabIndex = i === 0 ? 0 : -1;
    return node;
  });
  let current = 0;
  const choose = (index, focus) => {
    nodes[current].tabIndex = -1;
    nodes[current].ariaSelected = "false";
    current = Math.max(0, Math.min(nodes.length - 1, index));
    nodes[current].tabIndex = 0;
    nodes[current].ariaSelected = "true";
    if (focus) nodes[current].focus();
    const [text, logprob, others] = tokens[current];
    const list = others.map(([other, lp]) => `\u201c${visible(other)}\u201d ${percent(Math.exp(lp))}`);
    told.replaceChildren(
      element("strong", `\u201c${visible(text)}\u201d ${percent(Math.exp(logprob))}`),
      list.length ? `. Likeliest here: ${list.join(", ")}` : "",
    );
  };
  box.addEventListener("click", (event) => {
    const index = nodes.indexOf(event.target);
    if (index >= 0) choose(index, true);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -MOST, End: MOST }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    choose(current + step, true);
  });
  for (const node of nodes) box.append(node);
  const more = tokens.length > MOST ? `The first ${MOST} of ${tokens.length} tokens. ` : "";
  const mean = Math.exp(tokens.reduce((sum, token) => sum + token[1], 0) / tokens.length);
  return classed("div", "tokens", box, told, classed("p", "fine", `${more}Geometric mean: ${percent(mean)} a token.`));
}
