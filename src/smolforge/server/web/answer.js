// One answer under way, of whichever view: what comes of it, how fast, and the button that ends it.

import { ask } from "./api.js";

let controller = null;

export const busy = () => controller !== null;
export const stop = () => controller?.abort();

/**
 * Ask, add what comes to a Growing and tell each time. Returns what was measured; `error` is a Refusal, if there was one.
 * Stopping closes the connection, which is how the server learns that it may stop as well.
 */
export async function answer(route, body, growing, tell) {
  const found = { begun: performance.now(), first: null, last: null, tokens: 0, used: null, reason: null };
  controller = new AbortController();
  show();
  try {
    for await (const chunk of ask(route, body, controller.signal)) {
      hear(chunk, growing, found);
      tell(found);
    }
  } catch (error) {
    if (error.name === "AbortError") found.reason = "stopped";
    else found.error = error;
  } finally {
    controller = null;
    show();
  }
  return found;
}

function hear(chunk, growing, found) {
  if (chunk.usage) {
    found.tokens = chunk.usage.completion_tokens;
    found.used = chunk.usage.total_tokens;
  }
  const choice = chunk.choices[0];
  if (!choice) return;
  const told = growing.add(choice);
  if (told || choice.text || choice.delta?.content) {
    found.last = performance.now();
    found.first ??= found.last;
    found.tokens += told || 1;
  }
  found.reason = choice.finish_reason ?? found.reason;
}

/** What was measured, in a line. The speed leaves the first token out, which waits for the prompt. */
export function measured(found, context) {
  if (found.first === null) return found.reason === "stopped" ? "stopped" : "";
  const seconds = (found.last - found.first) / 1000;
  const said = [`${count(found.tokens)} ${found.tokens === 1 ? "token" : "tokens"}`];
  if (found.tokens > 1 && seconds > 0) said.push(`${speed((found.tokens - 1) / seconds)} tokens/s`);
  said.push(`first after ${((found.first - found.begun) / 1000).toFixed(2)} s`);
  if (found.used) said.push(`${count(found.used)} of ${count(context)} in context`);
  if (found.reason === "length") said.push("cut at the limit");
  if (found.reason === "stopped") said.push("stopped");
  return said.join(" \u00b7 ");
}

const speed = (rate) => (rate < 100 ? rate.toFixed(1) : count(Math.round(rate)));
export const count = (number) => number.toLocaleString("en");

function show() {
  document.body.classList.toggle("busy", busy());
  for (const button of document.querySelectorAll("[data-run]")) {
    button.dataset.run ||= button.textContent;
    button.textContent = busy() ? "Stop" : button.dataset.run;
  }
}
