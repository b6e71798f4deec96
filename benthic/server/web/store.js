// Conversations in this browser (IndexedDB), and the reading of files that claim to hold some.

export const LIMITS = { conversations: 500, characters: 20e6, messages: 1000, text: 2e6, title: 200, file: 40e6 };
export const DEFAULTS = { system: "", temperature: 0.6, top_p: 0.95, top_k: 0, max_tokens: 0, seed: "", thinking: null };

const RANGES = { temperature: [0, 2], top_p: [0.05, 1], top_k: [0, 100], max_tokens: [0, 2 ** 20] };

let database = null;
const sizes = new Map(); // id -> characters

/** All conversations, newest first. Where the browser refuses storage `kept` is false and they live in memory. */
export async function load() {
  try {
    database = await promise(open());
  } catch {
    return { conversations: [], kept: false };
  }
  const found = await promise(database.transaction("conversations").objectStore("conversations").getAll());
  for (const one of found) sizes.set(one.id, size(one));
  return { conversations: found.sort((a, b) => b.updated - a.updated), kept: true };
}

function open() {
  const request = indexedDB.open("benthic", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  return request;
}

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

/** Keep a conversation. False where the limits, or the browser, have no room for it. */
export async function save(conversation) {
  sizes.set(conversation.id, size(conversation));
  const { characters } = usage();
  if (sizes.size > LIMITS.conversations || characters > LIMITS.characters) return false;
  if (!database) return true;
  try {
    await promise(database.transaction("conversations", "readwrite").objectStore("conversations").put(conversation));
  } catch {
    return false;
  }
  return true;
}

/** Forget a conversation. */
export async function remove(id) {
  sizes.delete(id);
  if (database) await promise(database.transaction("conversations", "readwrite").objectStore("conversations").delete(id));
}

/** How much is kept. */
export function usage() {
  let characters = 0;
  for (const one of sizes.values()) characters += one;
  return { conversations: sizes.size, characters };
}

function size(conversation) {
  let sum = conversation.title.length + conversation.settings.system.length;
  for (const message of conversation.messages) sum += message.content.length + (message.reasoning?.length ?? 0);
  return sum;
}

/** A conversation with nothing said. */
export function fresh(settings = DEFAULTS) {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, title: "", created: now, updated: now, settings: { ...settings }, messages: [] };
}

/** The text of a file of conversations. */
export function toFile(conversations) {
  return JSON.stringify({ format: "benthic-conversations", version: 1, conversations }, null, 1);
}

/** The conversations of a file. Throws a Fault. Only known fields of the right type and size are taken over. */
export function fromFile(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Fault("notJson");
  }
  const list = data?.conversations;
  if (data?.format !== "benthic-conversations" || !Array.isArray(list)) throw new Fault("notOurs");
  if (list.length > LIMITS.conversations) throw new Fault("tooLarge");
  return list.map((one, index) => readConversation(one, index + 1));
}

/** Why a file cannot be read: a key of the words, and their values. */
export class Fault extends Error {
  constructor(key, values = {}) {
    super(key);
    this.key = key;
    this.values = values;
  }
}

function readConversation(from, n) {
  if (!Array.isArray(from?.messages) || from.messages.length > LIMITS.messages) throw new Fault("badMessage", { n, m: 1 });
  const made = fresh(readSettings(from.settings));
  made.title = string(from.title, LIMITS.title);
  for (const name of ["created", "updated"]) made[name] = number(from[name], [0, Date.now()], made[name]);
  made.messages = from.messages.map((one, index) => readMessage(one, { n, m: index + 1 }));
  return made;
}

function readMessage(from, where) {
  const { role, content } = from ?? {};
  if (!["user", "assistant"].includes(role) || typeof content !== "string" || content.length > LIMITS.text) {
    throw new Fault("badMessage", where);
  }
  if (role === "user") return { role, content };
  const made = { role, content, reasoning: string(from.reasoning, LIMITS.text), stats: {} };
  const names = ["tokens", "thoughts", "rate", "first", "took", "acceptance", "cached"];
  for (const name of names) {
    if (typeof from.stats?.[name] === "number") made.stats[name] = number(from.stats[name], [0, 1e12], 0);
  }
  if (["stop", "length", "stopped"].includes(from.finish)) made.finish = from.finish;
  return made;
}

/** Settings with every value in its range. */
export function readSettings(from) {
  const made = { ...DEFAULTS };
  if (typeof from !== "object" || from === null) return made;
  made.system = string(from.system, 100000);
  for (const [name, range] of Object.entries(RANGES)) made[name] = number(from[name], range, DEFAULTS[name]);
  made.seed = /^\d{1,15}$/.test(from.seed) ? String(from.seed) : "";
  made.thinking = typeof from.thinking === "boolean" ? from.thinking : null;
  return made;
}

const string = (value, limit) => (typeof value === "string" ? value.slice(0, limit) : "");
const number = (value, [low, high], otherwise) =>
  typeof value === "number" && Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : otherwise;
