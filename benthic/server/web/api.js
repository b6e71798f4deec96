// What the page asks of its server.

/** The API key, for as long as the tab lives. */
export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: (value) => (value ? sessionStorage.setItem("key", value) : sessionStorage.removeItem("key")),
};

/** An answer of the server that is not 200; status 0: there was none. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Failure(response.status, String(told?.error?.message ?? response.status).slice(0, 500));
}

/** `{name, length, thinking}` of the one model; thinking: whether its chat template lets requests choose. */
export async function model() {
  const [one] = (await (await ask("/v1/models")).json()).data;
  const info = await (await ask("/tokenizer_info")).json();
  return { name: String(one.id), length: one.max_model_len, thinking: /\bthinking\b/.test(info.chat_template) };
}

/** The parts of an answer while it comes: `{reasoning, content, finish, usage}`, each where there is one. */
export async function* answer(request, signal) {
  const response = await ask("/v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Failure(0, "broken");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") return;
        if (line.startsWith("data: ")) yield part(JSON.parse(line.slice(6)));
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Failure(0, "") : error; // the connection broke
  } finally {
    reader.cancel().catch(() => {});
  }
}

function part(event) {
  if (event.error) throw new Failure(event.error.code ?? 500, String(event.error.message).slice(0, 500));
  const choice = event.choices?.[0];
  const { reasoning_content: reasoning = "", content = "" } = choice?.delta ?? {};
  return { reasoning: reasoning ?? "", content: content ?? "", finish: choice?.finish_reason, usage: event.usage };
}

// Rendering. Texts that are asked for at the same time travel together.

export const LONGEST = 32000; // characters of one request, a little less than the server's limit
const known = new Map(); // text -> blocks, the newest last
let knownSize = 0;
let waiting = [];

/** The blocks of Markdown `text` (at most LONGEST characters) as HTML. Rejects with a Failure. */
export function render(text) {
  const found = known.get(text);
  if (found) return Promise.resolve(found);
  return new Promise((resolve, reject) => {
    if (waiting.push({ text, resolve, reject }) === 1) queueMicrotask(flush);
  });
}

function flush() {
  const all = waiting;
  waiting = [];
  let batch = [];
  let size = 0;
  for (const one of all) {
    if (batch.length && (size + one.text.length > LONGEST || batch.length === 200)) {
      renderBatch(batch);
      [batch, size] = [[], 0];
    }
    batch.push(one);
    size += one.text.length;
  }
  renderBatch(batch);
}

async function renderBatch(batch) {
  try {
    const { rendered } = await (await patient({ texts: batch.map((one) => one.text) })).json();
    batch.forEach((one, index) => {
      const blocks = rendered[index].map((block) => block.html);
      remember(one.text, blocks);
      one.resolve(blocks);
    });
  } catch (error) {
    for (const one of batch) one.reject(error);
  }
}

async function patient(body) {
  try {
    return await ask("/render", body);
  } catch (error) {
    if (error.status !== 429) throw error;
    await new Promise((resolve) => setTimeout(resolve, 1000));
    return ask("/render", body);
  }
}

function remember(text, blocks) {
  if (!known.has(text)) knownSize += text.length;
  known.set(text, blocks);
  for (const [oldest] of known) {
    if (knownSize < 1e6) break;
    known.delete(oldest);
    knownSize -= oldest.length;
  }
}
