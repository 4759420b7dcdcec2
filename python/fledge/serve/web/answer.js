// One answer: the request that a conversation makes, and the message that grows out of the stream.
//   message = {content, tool_events, tokens, stats, fault, stopped, cut, waiting}
// `tokens` holds [text, logprob, [[text, logprob], ...]] where probabilities were asked for.

import { ask, Fault, health } from "./api.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const MOST_TOKENS = 4000; // of which the probabilities are kept
const ALTERNATIVES = 4;
const BASE_TOKENS = 60; // a base model knows no end
const PATIENCE = 700; // ms of silence after which the queue is looked at
export const FIRST_TEMPERATURE = 0;
export const OTHER_TEMPERATURE = 0.7; // of a second answer, which should be another one

export const blank = (model) => ({ role: "assistant", model, content: "", tool_events: [], stats: null, fault: null });

export function systemText(settings) {
  return [settings.system, settings.persona].filter((text) => text?.trim()).join("\n\n");
}

// {path, body} for `model` to answer the messages; `goOn` is the unfinished answer to continue
export function requestOf(messages, settings, model, { goOn = null, again = false } = {}) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, dry_multiplier: 0.8 };
  for (const name of NUMBERS) {
    const value = settings[name];
    if (value !== undefined && value !== "" && Number.isFinite(Number(value))) body[name] = Number(value);
  }
  body.temperature ??= again ? OTHER_TEMPERATURE : FIRST_TEMPERATURE;
  if (model.fledge?.stage === "base") {
    // it has never seen a chat: it continues the question as it would any text
    body.max_tokens ??= BASE_TOKENS;
    return { path: "/v1/completions", body: { ...body, prompt: messages.at(-1).content + (goOn?.content ?? "") } };
  }
  const said = [...messages, ...(goOn ? [goOn] : [])].map((m) => ({ role: m.role, content: parts(m) }));
  const system = systemText(settings);
  body.messages = system ? [{ role: "system", content: system }, ...said] : said;
  body.truncation = "auto";
  if (goOn) body.continue_final_message = true;
  if (settings.tokens !== false) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return { path: "/v1/chat/completions", body };
}

// what the model wrote before goes back to it with its python and output in their places
function parts({ content, tool_events: tools }) {
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

// places come in code points, strings here count in UTF-16
function units(text, points) {
  let at = 0;
  while (points-- > 0 && at < text.length) at += text.codePointAt(at) > 0xffff ? 2 : 1;
  return at;
}

// Streams into `message` and calls `changed` after each piece; never throws.
export async function stream(message, { path, body }, signal, changed) {
  const began = performance.now();
  const offset = message.content.length;
  const tokens = (message.tokens ??= []);
  let first = null;
  let usage = null;
  let turn = began;
  Object.assign(message, { fault: null, stopped: false, cut: false, waiting: "", code: null });
  const stopWatching = watchQueue(message, changed);
  try {
    let reason = null;
    for await (const event of ask(path, body, signal)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const delta = choice.delta ?? { content: choice.text };
        if (first === null && (delta.content || delta.tool_events)) {
          first = performance.now();
          stopWatching();
        }
        message.content += delta.content ?? "";
        for (const tool of delta.tool_events ?? []) {
          const at = offset + units(message.content.slice(offset), tool.at ?? 0);
          message.tool_events.push(tool.type === "python" ? { ...tool, at } : tool);
        }
        for (const entry of choice.logprobs?.content ?? []) {
          if (tokens.length < MOST_TOKENS) tokens.push(compact(entry));
        }
        reason = choice.finish_reason ?? reason;
      }
      changed();
      if (performance.now() - turn < 20) continue;
      await new Promise((go) => setTimeout(go)); // a burst of events must leave the page time to paint
      turn = performance.now();
    }
    if (reason === null) throw new Fault("The answer broke off.", "cut");
    message.cut = reason === "length";
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else if (error instanceof Fault) Object.assign(message, { fault: error.message, code: error.code });
    else Object.assign(message, { fault: "The page failed on this answer.", code: "page" });
  }
  stopWatching();
  message.waiting = "";
  const end = performance.now();
  message.stats = {
    seconds: (end - began) / 1e3,
    first: first === null ? null : (first - began) / 1e3,
    tokens: usage?.completion_tokens ?? null,
    rate: usage && first !== null ? usage.completion_tokens / Math.max((end - first) / 1e3, 1e-3) : null,
    prompt: usage?.prompt_tokens ?? null,
    dropped: usage?.dropped_messages ?? 0,
  };
}

function compact(entry) {
  const round = (x) => Math.round(x * 1e4) / 1e4;
  return [entry.token, round(entry.logprob), entry.top_logprobs.map((other) => [other.token, round(other.logprob)])];
}

function watchQueue(message, changed) {
  let timer = setTimeout(async function look() {
    const state = await health();
    if (timer === null) return;
    const waiting = state?.waiting ?? 0;
    message.waiting = state === null ? "Waiting for the server." : waiting > 0
      ? `In the queue: ${waiting} ${waiting === 1 ? "request" : "requests"} waiting, this one among them.`
      : "Reading the conversation.";
    changed();
    timer = setTimeout(look, PATIENCE);
  }, PATIENCE);
  return () => {
    clearTimeout(timer);
    timer = null;
  };
}
