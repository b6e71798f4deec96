// The open conversation: asking, stopping, answering again, editing.

import { answer, Failure } from "/web/api.js";
import { t } from "/web/i18n.js";
import { AnswerView, icon, make, measure, userMessage } from "/web/message.js";

const running = new Map(); // conversation id -> Answering

/** One answer that is being given. It goes on while another conversation is open. */
class Answering {
  constructor(conversation, message, changed) {
    this.conversation = conversation;
    this.message = message;
    this.changed = changed;
    this.view = null;
    this.control = new AbortController();
    this.times = { start: performance.now() };
    this.pieces = ["", ""]; // reasoning and content that are not shown yet
    this.frame = 0;
  }

  async run(request) {
    let usage;
    let error = "";
    const clock = setInterval(() => this.tick(), 100);
    try {
      for await (const part of answer(request, this.control.signal)) {
        this.take(part);
        usage = part.usage ?? usage;
      }
      if (!this.message.content && !this.message.reasoning) error = t("empty");
    } catch (caught) {
      if (caught.name === "AbortError") this.message.finish = "stopped";
      else error = this.reason(caught);
    } finally {
      clearInterval(clock);
      cancelAnimationFrame(this.frame);
    }
    this.draw();
    this.message.stats = this.times.first ? measure(usage, this.times) : {};
    if (error) this.message.error = error;
    running.delete(this.conversation.id);
    const finished = this.view?.finish(error);
    await this.changed(this, error);
    await finished;
  }

  reason(caught) {
    if (!(caught instanceof Failure)) throw caught;
    if (caught.status === 401) return t("needKey");
    if (caught.status !== 0) return caught.message;
    return caught.message === "broken" ? t("broken") : t(this.times.first ? "lost" : "offline");
  }

  take({ reasoning, content, finish }) {
    const now = performance.now();
    if (finish) this.message.finish = finish;
    if (!reasoning && !content) return;
    this.times.first ??= now;
    this.times.last = now;
    if (reasoning) this.times.thought ??= now;
    if (content) {
      if (this.times.thought && !this.times.content) this.message.stats = { took: now - this.times.thought };
      this.times.content ??= now;
    }
    this.message.reasoning += reasoning;
    this.message.content += content;
    this.pieces[0] += reasoning;
    this.pieces[1] += content;
    // Pages in the background get no frames; they need none.
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const [reasoning, content] = this.pieces;
    this.pieces = ["", ""];
    if (!this.view) return;
    const follow = atEnd();
    this.view.update(reasoning, content);
    if (follow) toEnd();
  }

  tick() {
    const thinking = Boolean(this.times.thought && !this.times.content);
    this.view?.tick(performance.now() - (thinking ? this.times.thought : this.times.start), thinking);
  }
}

const scroller = document.getElementById("scroll");
const list = document.getElementById("messages");
let pinned = true; // the reader is at the end and wants to stay there

const atEnd = () => pinned;

/** End the answer that a conversation is being given. */
export function stop(conversation) {
  running.get(conversation.id)?.control.abort();
}

/** Scroll to the end. */
export function toEnd() {
  pinned = true;
  scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  document.getElementById("bottom").hidden = pinned;
});
new ResizeObserver(() => pinned && toEnd()).observe(list);

/** The conversation on the screen. `changed(conversation, what)` is called when there is something to keep or to say. */
export class Chat {
  constructor(model, changed) {
    this.model = model;
    this.changed = changed;
    this.conversation = null;
    list.addEventListener("click", (event) => this.click(event));
  }

  get answering() {
    return running.get(this.conversation?.id);
  }

  /** Show a conversation. */
  async open(conversation) {
    const left = running.get(this.conversation?.id);
    if (left) left.view = null;
    this.conversation = conversation;
    const rendered = [];
    const items = conversation.messages.map((message) => this.item(message, rendered));
    await Promise.race([Promise.all(rendered), new Promise((resolve) => setTimeout(resolve, 400))]);
    if (this.conversation !== conversation) return; // another was opened meanwhile
    list.replaceChildren(...items);
    toEnd();
  }

  item(message, rendered) {
    if (message.role === "user") return userMessage(message);
    const view = new AnswerView(message);
    const active = running.get(this.conversation.id);
    if (active?.message === message) {
      active.view = view;
      active.pieces = ["", ""];
      view.update(message.reasoning, message.content);
    } else {
      rendered.push(view.whole());
      if (message.error) view.fail(message.error);
    }
    return view.item;
  }

  /** Say `text`, and have it answered. */
  send(text) {
    const message = { role: "user", content: text };
    this.conversation.messages.push(message);
    list.append(userMessage(message));
    this.answer();
  }

  /** Have the model answer what was said last. */
  answer() {
    const { conversation } = this;
    const request = this.request();
    const message = { role: "assistant", content: "", reasoning: "" };
    conversation.messages.push(message);
    const view = new AnswerView(message);
    view.update("", "");
    list.append(view.item);
    toEnd();
    const run = new Answering(conversation, message, (done, error) => this.changed(conversation, error || (message.finish === "stopped" ? "stopped" : "answered")));
    run.view = view;
    run.tick();
    running.set(conversation.id, run);
    this.changed(conversation, "answering");
    run.run(request);
  }

  request() {
    const { messages, settings } = this.conversation;
    const said = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
    const request = { model: this.model().name, messages: said, temperature: settings.temperature, top_p: settings.top_p };
    if (settings.system.trim()) said.unshift({ role: "system", content: settings.system });
    if (settings.top_k) request.top_k = settings.top_k;
    if (settings.max_tokens) request.max_tokens = settings.max_tokens;
    if (settings.seed) request.seed = Number(settings.seed);
    if (this.model().thinking && settings.thinking !== null) request.chat_template_kwargs = { thinking: settings.thinking };
    return request;
  }

  /** Give the answer at `index` (the last, unless said) again, and forget what came after it. */
  again(index = this.conversation.messages.findLastIndex((message) => message.role === "assistant")) {
    if (index < 0 || this.answering) return;
    this.cut(index);
    this.answer();
  }

  cut(index) {
    this.conversation.messages.splice(index);
    for (const item of [...list.children].slice(index)) item.remove();
  }

  /** Let the user change what was said at `index` (the last, unless said). */
  edit(index = this.conversation.messages.findLastIndex((message) => message.role === "user")) {
    if (index < 0 || this.answering) return;
    const item = list.children[index];
    const field = make("textarea", "editor");
    field.ariaLabel = t("edit");
    field.value = this.conversation.messages[index].content;
    const [cancel, save] = [make("button", "quiet", t("cancel")), make("button", "primary", t("save"))];
    const form = make("form", "edit", field, make("div", "buttons", cancel, save));
    cancel.type = "button";
    const close = () => {
      form.replaceWith(...hidden);
      (item.querySelector("[data-action=edit]") ?? item).focus();
    };
    cancel.addEventListener("click", close);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && event.target === field) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (!text || this.answering) return;
      this.cut(index);
      this.send(text);
      document.getElementById("prompt").focus();
    });
    const hidden = [...item.childNodes];
    item.replaceChildren(form);
    field.focus();
    field.rows = Math.min(12, field.value.split("\n").length + 1);
  }

  async click(event) {
    const target = event.target.closest("button");
    const index = [...list.children].indexOf(event.target.closest("#messages > li"));
    if (!target || index < 0) return;
    const message = this.conversation.messages[index];
    if (target.matches(".copy")) await copy(target.parentNode.querySelector("pre").textContent, target);
    else if (target.dataset.action === "copy") await copy(message.content, target);
    else if (target.dataset.action === "again") this.again(index);
    else if (target.dataset.action === "edit") this.edit(index);
  }

  /** Copy the last answer. */
  async copyLast() {
    const answers = list.querySelectorAll(".assistant [data-action=copy]");
    const last = this.conversation.messages.findLast((message) => message.role === "assistant");
    if (last) await copy(last.content, answers[answers.length - 1]);
  }
}

/** Put text on the clipboard, and say so on the button. */
async function copy(text, target) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea", "unseen"); // pages that came without encryption have no clipboard
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    target.focus();
  }
  document.getElementById("live").textContent = t("copied");
  const small = target.classList.contains("copy");
  target.replaceChildren(small ? t("copied") : icon("check"));
  setTimeout(() => target.replaceChildren(small ? t("copy") : icon("copy")), 1200);
}
