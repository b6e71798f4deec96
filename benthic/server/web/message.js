// One message on the page.

import { t, time } from "/web/i18n.js";
import { Flow } from "/web/markdown.js";

/** An element with a class, and what is in it. */
export function make(tag, name = "", ...inside) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...inside);
  return node;
}

/** A picture from the page's sprite. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.ariaHidden = "true";
  svg.append(use);
  return svg;
}

/** A button that is a picture with a name. */
export function button(picture, label, action) {
  const node = make("button", "icon", icon(picture));
  node.type = "button";
  node.ariaLabel = node.title = label;
  node.dataset.action = action;
  return node;
}

/** What the user said: plain text, as it was written. */
export function userMessage(message) {
  const item = make("li", "message user");
  item.append(make("h3", "unseen", t("you")), make("div", "bubble", message.content));
  item.append(make("div", "actions", button("copy", t("copy"), "copy"), button("edit", t("edit"), "edit")));
  return item;
}

/** An answer: thoughts, text, what went wrong, and its numbers. */
export class AnswerView {
  constructor(message) {
    this.message = message;
    this.item = make("li", "message assistant");
    this.item.append(make("h3", "unseen", t("model")));
    this.body = make("div", "body");
    this.trouble = make("div", "trouble");
    this.trouble.hidden = true;
    this.numbers = make("span", "numbers");
    this.actions = make("div", "actions", button("copy", t("copy"), "copy"), button("again", t("again"), "again"), this.numbers);
    this.item.append(this.body, this.trouble, this.actions);
    this.content = new Flow(this.body);
    this.thoughts = null;
  }

  /** Show a message that is complete; resolves when it is rendered. */
  async whole() {
    this.update(this.message.reasoning ?? "", this.message.content);
    return this.finish();
  }

  /** Show what came. */
  update(reasoning, content) {
    if (reasoning) this.think(reasoning);
    if (content) this.content.append(content);
    this.item.classList.toggle("waiting", !this.message.reasoning && !this.message.content && !this.message.finish);
  }

  think(reasoning) {
    if (!this.thoughts) {
      const inside = make("div", "body");
      this.summary = make("span");
      this.fold = make("details", "thoughts", make("summary", "", icon("fold"), this.summary), inside);
      this.fold.open = localStorage.getItem("thoughts") === "open";
      this.thoughts = new Flow(inside, this.fold.open);
      this.fold.addEventListener("toggle", () => this.fold.open && this.thoughts.wake());
      this.fold.firstChild.addEventListener("click", () => localStorage.setItem("thoughts", this.fold.open ? "" : "open"));
      this.body.before(this.fold);
    }
    this.thoughts.append(reasoning);
  }

  /** While the answer comes: how long it has thought. */
  tick(elapsed, thinking) {
    this.item.classList.add("coming");
    this.item.classList.toggle("thinking", thinking);
    if (this.summary) {
      const took = this.message.stats?.took ?? elapsed;
      this.summary.textContent = thinking ? t("thinkingFor", { time: time(elapsed) }) : t("thought", { time: time(took) });
    }
    this.numbers.textContent = time(elapsed);
  }

  /** The answer has ended: everything is rendered, and the numbers are shown. */
  async finish(error) {
    const { stats = {}, finish } = this.message;
    this.item.classList.remove("coming", "waiting", "thinking");
    if (this.summary) {
      const parts = [stats.took ? t("thought", { time: time(stats.took) }) : t("thoughtSome")];
      if (stats.thoughts) parts.push(t("tokens", { n: stats.thoughts }));
      this.summary.textContent = parts.join(" · ");
    }
    this.numbers.textContent = numbers(stats, finish).join(" · ");
    if (error) this.fail(error);
    await Promise.all([this.content.finish(), this.thoughts?.finish()]);
  }

  fail(error) {
    const again = make("button", "", t("retry"));
    again.type = "button";
    again.dataset.action = "again";
    this.trouble.replaceChildren(make("span", "", error), again);
    this.trouble.hidden = false;
  }
}

function numbers(stats, finish) {
  const percent = (part) => `${Math.round(100 * part)} %`;
  const parts = [];
  if (finish === "stopped") parts.push(t("stopped"));
  if (finish === "length") parts.push(t("cut"));
  if (stats.tokens) parts.push(t("tokens", { n: stats.tokens }));
  if (stats.rate) parts.push(t("perSecond", { n: stats.rate < 10 ? stats.rate.toFixed(1) : Math.round(stats.rate) }));
  if (stats.first) parts.push(t("first", { time: time(stats.first) }));
  if (stats.acceptance !== undefined) parts.push(t("accepted", { n: percent(stats.acceptance) }));
  if (stats.cached) parts.push(t("cached", { n: stats.cached }));
  return parts;
}

/** The numbers of an answer, from the server's usage and the page's clock. */
export function measure(usage, times) {
  const stats = { first: times.first - times.start };
  if (times.content && times.thought) stats.took = times.content - times.thought;
  else if (times.thought) stats.took = times.last - times.thought;
  if (!usage) return stats;
  const { completion_tokens: tokens, completion_tokens_details: details, prompt_tokens_details: prompt } = usage;
  stats.tokens = tokens;
  if (tokens > 1 && times.last > times.first) stats.rate = (1000 * (tokens - 1)) / (times.last - times.first);
  if (details?.reasoning_tokens) stats.thoughts = details.reasoning_tokens;
  const { accepted_prediction_tokens: accepted = 0, rejected_prediction_tokens: rejected = 0 } = details ?? {};
  if (accepted + rejected > 0) stats.acceptance = accepted / (accepted + rejected);
  if (prompt?.cached_tokens) stats.cached = prompt.cached_tokens;
  return stats;
}
