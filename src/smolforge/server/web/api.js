// What this page asks of the server: OpenAI's routes, answers that come in events, errors as sentences.

const KEY = "smolforge.key";

/** What the server refused, or why it could not be asked. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(sentence(message));
    this.status = status;
  }
}

/** The key lives as long as the tab, and nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** JSON of a route. Throws a Refusal. */
export async function get(route) {
  return (await send(route)).json();
}

/** The chunks of a streamed answer, as they come. Throws a Refusal, also where the stream breaks off. */
export async function* ask(route, body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send(route, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Refusal || error.name === "AbortError") throw error;
  }
  throw new Refusal("the connection ended before the answer did");
}

/** The data of server-sent events in a stream of bytes, cut wherever it likes. */
export async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (waiting + value).split(/\r?\n/);
      waiting = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(route, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(route, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("the server cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refusal(said?.error?.message ?? `the server answered with status ${response.status}`, response.status);
}

function sentence(text) {
  const whole = text.trim();
  return whole.charAt(0).toUpperCase() + whole.slice(1) + (/[.!?]$/.test(whole) ? "" : ".");
}
