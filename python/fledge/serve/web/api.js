// What the page asks of the server: models, health, and answers as a stream of events.

import { events } from "./sse.js";

export class Fault extends Error {
  constructor(message, code = null, status = 0) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

export const OFFLINE = "The server cannot be reached.";

export function key(value) {
  try {
    if (value !== undefined) sessionStorage.setItem("fledge.key", value);
    return sessionStorage.getItem("fledge.key") ?? "";
  } catch {
    return "";
  }
}

const headers = () => ({ "content-type": "application/json", ...(key() ? { authorization: `Bearer ${key()}` } : {}) });

async function faultOf(reply) {
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch {
    // not our shape: a proxy's page, perhaps
  }
  const wait = reply.headers.get("retry-after");
  const told = error.message ?? `The server answered with status ${reply.status}.`;
  return new Fault(wait ? `${told} (Try again in ${wait} s.)` : told, error.code, reply.status);
}

async function reach(path, options) {
  try {
    return await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(OFFLINE, "offline");
  }
}

export async function get(path) {
  const reply = await reach(path);
  if (!reply.ok) throw await faultOf(reply);
  return reply.json();
}

// /health says more than its status: {status, models, running, waiting}, or null where nobody answers
export async function health() {
  try {
    return await (await reach("/health")).json();
  } catch {
    return null;
  }
}

export async function* ask(path, body, signal) {
  const reply = await reach(path, { method: "POST", body: JSON.stringify(body), signal });
  if (!reply.ok) throw await faultOf(reply);
  try {
    for await (const event of events(reply.body)) {
      if (event.error) throw new Fault(event.error.message, event.error.code);
      yield event;
    }
  } catch (error) {
    if (error instanceof Fault || error.name === "AbortError") throw error;
    throw new Fault("The answer broke off: the connection was lost.", "cut");
  }
}
