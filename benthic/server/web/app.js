// The page: conversations at the side, the open one, and what keys and buttons do.

import { Failure, key, model as askModel } from "/web/api.js";
import { Chat, stop, toEnd } from "/web/chat.js";
import { speak, t } from "/web/i18n.js";
import { button, make } from "/web/message.js";
import { Settings, showKeys, tell } from "/web/panels.js";
import * as store from "/web/store.js";

const get = (id) => document.getElementById(id);
const prompt = get("prompt");

let model = { name: "", length: 0, thinking: false };
let conversations = [];
let current = null;

const chat = new Chat(() => model, heard);
const settings = new Settings(() => current, () => model, settingsChanged, showAll);

// Conversations

async function keep(conversation) {
  if (!conversation.messages.length) return;
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  if (!(await store.save(conversation))) tell(t("full"));
}

let lastKept = 0;
setInterval(() => {
  if (chat.answering && Date.now() - lastKept > 2000) {
    lastKept = Date.now();
    keep(current);
  }
}, 1000);

async function open(conversation) {
  current = conversation;
  hideSide();
  await chat.open(conversation);
  showAll();
}

function start() {
  const last = JSON.parse(localStorage.getItem("settings") ?? "null");
  open(store.fresh(store.readSettings(last)));
  prompt.focus();
}

async function remove(conversation) {
  const at = conversations.indexOf(conversation);
  conversations.splice(at, 1);
  stop(conversation);
  if (current === conversation) start();
  showList();
  const removed = store.remove(conversation.id);
  const focus = get("list").children[Math.min(at, conversations.length - 1)];
  (focus?.querySelector("button") ?? get("new")).focus();
  tell(t("deleted"), t("undo"), async () => {
    conversations.splice(at, 0, conversation);
    await removed;
    await store.save(conversation);
    open(conversation);
  });
  await removed;
}

function rename(conversation, item) {
  const field = make("input", "rename");
  field.value = titleOf(conversation);
  field.maxLength = store.LIMITS.title;
  field.ariaLabel = t("rename");
  let ended = false;
  const end = (keepIt) => {
    if (ended) return;
    ended = true;
    if (keepIt && field.value.trim()) conversation.title = field.value.trim();
    if (keepIt) keep(conversation);
    showAll();
    rowOf(conversation)?.querySelector("button").focus();
  };
  field.addEventListener("blur", () => end(true));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.stopPropagation();
    end(event.key === "Enter");
  });
  item.replaceChildren(field);
  field.select();
}

const shortened = (text) => (text.length > 80 ? `${text.slice(0, 79)}…` : text);
const titleOf = (conversation) => conversation.title || t("untitled");
const rowOf = (conversation) => get("list").children[conversations.indexOf(conversation)];

function download(some, name) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([store.toFile(some)], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function importFile(file) {
  try {
    if (file.size > store.LIMITS.file) throw new store.Fault("tooLarge");
    const found = store.fromFile(await file.text());
    for (const conversation of found) {
      if (!(await store.save(conversation))) {
        await store.remove(conversation.id);
        return tell(t("full"));
      }
      conversations.push(conversation);
    }
    conversations.sort((a, b) => b.updated - a.updated);
    showAll();
    settings.show();
    tell(t("imported", { n: found.length }));
  } catch (error) {
    if (!(error instanceof store.Fault)) throw error;
    tell(t("notImported", { why: t(error.key, error.values) }));
  }
}

async function clear() {
  const all = conversations;
  conversations = [];
  all.forEach(stop);
  for (const one of all) await store.remove(one.id);
  start();
  settings.show();
  tell(t("cleared"), t("undo"), async () => {
    conversations = all;
    for (const one of all) await store.save(one);
    showAll();
    settings.show();
  });
}

// What is shown

function showList() {
  const rows = conversations.map((conversation) => {
    const title = make("button", "title", titleOf(conversation));
    title.title = titleOf(conversation);
    title.addEventListener("click", () => open(conversation));
    title.addEventListener("keydown", (event) => {
      if (event.key === "F2") rename(conversation, item);
      if (event.key === "Delete") remove(conversation);
    });
    if (conversation === current) title.ariaCurrent = "page";
    const actions = [
      ["edit", t("rename"), () => rename(conversation, item)],
      ["export", t("export"), () => download([conversation], titleOf(conversation))],
      ["trash", t("delete"), () => remove(conversation)],
    ].map(([picture, label, action]) => {
      const node = button(picture, label, label);
      node.addEventListener("click", action);
      return node;
    });
    const item = make("li", "", title, make("span", "row-actions", ...actions));
    return item;
  });
  get("list").replaceChildren(...rows);
}

function showAll() {
  showList();
  showKeys(model.thinking);
  get("title").textContent = current.messages.length ? titleOf(current) : "";
  document.title = current.title ? `${current.title} · Benthic` : "Benthic";
  get("welcome").hidden = current.messages.length > 0;
  showState();
}

function showState() {
  const answering = Boolean(chat.answering);
  document.body.classList.toggle("answering", answering);
  get("send").hidden = answering;
  get("stop").hidden = !answering;
  get("send").disabled = !prompt.value.trim();
  get("think").hidden = !model.thinking;
  get("think").ariaPressed = String(current.settings.thinking === true);
}

/** The chat says that something happened. */
async function heard(conversation, what) {
  if (what !== "answering" && !conversations.includes(conversation)) return; // deleted meanwhile
  if (!conversation.title) conversation.title = shortened(conversation.messages[0].content.trim().split("\n")[0]);
  const known = ["answering", "answered", "stopped"].includes(what);
  get("live").textContent = known ? t(what) : what;
  if (what === t("needKey")) settings.open("key");
  conversations = [conversation, ...conversations.filter((one) => one !== conversation)];
  showAll();
  await keep(conversation);
}

function settingsChanged(what) {
  if (what === "key") return connect();
  localStorage.setItem("settings", JSON.stringify(current.settings));
  if (conversations.includes(current)) keep(current);
  showState();
}

/** Learn what the server serves. Whether it let us. */
async function connect() {
  try {
    model = await askModel();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.status === 401 && !get("settings").open) settings.open("key");
    tell(error.status === 401 ? t(key.get() ? "wrongKey" : "needKey") : error.message || t("offline"));
    return false;
  }
  get("model").textContent = model.name;
  showAll();
  return true;
}

// What the user does

function send() {
  const text = prompt.value.trim();
  if (!text || chat.answering) return;
  prompt.value = "";
  grow();
  get("welcome").hidden = true;
  chat.send(text);
  prompt.focus();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, window.innerHeight * 0.4)}px`;
  showState();
}

function think() {
  if (!model.thinking) return;
  current.settings.thinking = current.settings.thinking !== true;
  settingsChanged();
}

// On a narrow screen the side lies over the conversation.

function showSide() {
  document.body.classList.add("side");
  get("show").ariaExpanded = "true";
  get("veil").hidden = false;
  (get("list").querySelector("button") ?? get("new")).focus();
}

function hideSide() {
  if (!document.body.classList.contains("side")) return;
  document.body.classList.remove("side");
  get("show").ariaExpanded = "false";
  get("veil").hidden = true;
  if (document.activeElement.closest("#side")) get("show").focus();
}

function move(step) {
  const at = conversations.indexOf(current);
  const next = conversations[at < 0 ? 0 : at + step];
  if (next) open(next);
}

const KEYS = {
  KeyN: start,
  KeyR: () => chat.again(),
  KeyC: () => chat.copyLast(),
  KeyS: () => (get("settings").open ? get("settings").close() : settings.open()),
  KeyT: think,
  ArrowUp: () => move(-1),
  ArrowDown: () => move(1),
};

document.addEventListener("keydown", (event) => {
  const panel = document.querySelector("dialog[open]"); // it has its own keys
  const typing = event.target.matches("input, textarea, select");
  const known = KEYS[event.code] && (!panel || event.code === "KeyS");
  if (event.altKey && !event.ctrlKey && !event.metaKey && known) KEYS[event.code]();
  else if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  else if (panel) return;
  else if (event.key === "Escape" && document.body.classList.contains("side")) hideSide();
  else if (event.key === "Escape" && chat.answering) stop(current);
  else if (event.key === "/" && !typing) prompt.focus();
  else if (event.key === "?" && !typing) get("help").showModal();
  else return;
  event.preventDefault();
});

prompt.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229 || event.altKey) return; // 229: Safari ends a composition with it
  if (event.key === "Enter" && !event.shiftKey) send();
  else if (event.key === "ArrowUp" && !prompt.value) chat.edit();
  else return;
  event.preventDefault();
});
prompt.addEventListener("input", grow);
get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
get("stop").addEventListener("click", () => {
  stop(current);
  prompt.focus();
});
get("think").addEventListener("click", think);
get("new").addEventListener("click", start);
get("show").addEventListener("click", showSide);
get("hide").addEventListener("click", hideSide);
get("veil").addEventListener("click", hideSide);
get("bottom").addEventListener("click", toEnd);
get("open-settings").addEventListener("click", () => settings.open());
get("open-help").addEventListener("click", () => get("help").showModal());
get("export").addEventListener("click", () => download(conversations, "benthic conversations"));
get("import").addEventListener("click", () => get("file").click());
get("clear").addEventListener("click", clear);
get("file").addEventListener("change", () => {
  const [file] = get("file").files;
  if (file) importFile(file);
  get("file").value = "";
});
addEventListener("pagehide", () => chat.answering && keep(current));

speak();
const loaded = await store.load();
conversations = loaded.conversations;
start();
if (!loaded.kept) tell(t("unsaved"));
await connect();
document.body.dataset.ready = "yes";
