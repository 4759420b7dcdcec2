// What a model is and how well it did in its exams: the model card, from /v1/models.

import { $, classed, count, element, percent } from "./dom.js";

export function scoreText(score) {
  if (typeof score?.value !== "number") return "";
  if (!/accuracy|pass/.test(score.unit ?? "")) return score.value.toFixed(3);
  const range = typeof score.low === "number" ? ` (${(100 * score.low).toFixed(0)}\u2013${(100 * score.high).toFixed(0)})` : "";
  return `${percent(score.value)}${range}`;
}

// the one line that says what to expect of it
export function honest(model) {
  const size = model?.fledge?.model?.parameters;
  const small = size ? `It has ${count(size)} parameters, thousands of times fewer than the assistants you may know.` : "It is small.";
  if (model?.fledge?.stage === "base") return `${small} It has not learnt to chat: it continues your text.`;
  return `${small} It knows what it was taught and calculates with a tool; beyond that it makes things up, and sounds just as sure. Do not rely on it.`;
}

export function showCard(model) {
  const about = model.fledge ?? {};
  const facts = [
    ["Stage", about.stage], ["Run", about.run], ["World", about.world],
    ["Depth", about.model?.depth ?? about.num_hidden_layers], ["Width", about.hidden_size],
    ["Parameters", about.model?.parameters && about.model.parameters.toLocaleString("en")],
    ["Training tokens", about.model?.training_tokens && about.model.training_tokens.toLocaleString("en")],
    ["Vocabulary", about.vocab_size && `${about.vocab_size} tokens`], ["Context", `${model.max_model_len} tokens`],
  ].filter(([, value]) => value !== undefined && value !== null);
  const list = classed("dl", "grid");
  for (const [name, value] of facts) list.append(element("div", element("dt", name), element("dd", String(value))));
  $("cardtitle").textContent = model.id;
  $("cardbody").replaceChildren(element("p", honest(model)), list, scoreTable(about.scores ?? {}));
  $("cardview").showModal();
}

function scoreTable(scores) {
  const stages = Object.keys(scores).filter((stage) => Object.keys(scores[stage]).length);
  if (!stages.length) return classed("p", "fine", "There is no report of exams beside this model.");
  const head = ["core", "core_v1", "core_v2", "chatcore", "bpb"];
  const tasks = [...new Set(stages.flatMap((stage) => Object.keys(scores[stage])))];
  tasks.sort((a, b) => ((head.indexOf(a) + 1 || 99) - (head.indexOf(b) + 1 || 99)) || a.localeCompare(b));
  const table = element("table", element("caption", "Exams: value, and its 95 % interval"));
  table.append(element("thead", element("tr", element("th", "Exam"), stages.map((stage) => element("th", stage)))));
  table.append(element("tbody", tasks.map((task) => {
    const name = element("th", task === "chatcore" ? "ChatCORE" : task.replace(/^core/, "CORE"));
    name.scope = "row";
    return element("tr", name, stages.map((stage) => element("td", scoreText(scores[stage][task]))));
  })));
  const wrap = classed("div", "scroll", table);
  wrap.tabIndex = 0;
  return wrap;
}
