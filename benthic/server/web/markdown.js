// Markdown that arrives in pieces: finished blocks as the server rendered them, the last one as plain text.

import { LONGEST, render } from "/web/api.js";
import { t } from "/web/i18n.js";

const policy = window.trustedTypes?.createPolicy("benthic", { createHTML: (html) => html }) ?? { createHTML: (html) => html };
const HTML = "P BR HR H1 H2 H3 H4 H5 H6 UL OL LI BLOCKQUOTE PRE CODE EM STRONG S A SPAN DIV TABLE THEAD TBODY TR TH TD";
const MATH =
  "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mmultiscripts " +
  "mprescripts none mtable mtr mtd mlabeledtr mstyle mpadded mphantom menclose merror";
const TAGS = new Set([...HTML.split(" "), ...MATH.split(" ")]);
const BARRED = /^(on|xlink|style$|src|id$|name$|action$|form(action)?$)/i;

/** Nodes of the server's HTML. It is sanitised already; what does not belong is dropped here once more. */
export function toNodes(html) {
  const body = new DOMParser().parseFromString(policy.createHTML(html), "text/html").body;
  for (const node of [...body.querySelectorAll("*")]) {
    if (!TAGS.has(node.nodeName)) node.remove();
    for (const { name, value } of [...node.attributes]) {
      const leads = name === "href" && !(node.nodeName === "A" && /^(https?:\/\/|mailto:)/i.test(value));
      const fence = name === "form" && node.namespaceURI.endsWith("MathML");
      if (leads || (BARRED.test(name) && !fence)) node.removeAttribute(name);
    }
  }
  for (const head of body.querySelectorAll(".code > .language")) head.after(copyButton());
  for (const wide of body.querySelectorAll("pre, table, .formula, .wide")) wide.tabIndex = 0; // so that keys can scroll it
  return [...body.childNodes];
}

function copyButton() {
  const button = document.createElement("button");
  button.className = "copy";
  button.type = "button";
  button.textContent = t("copy");
  return button;
}

/** Where finished blocks end. Reads every line once. */
class Scanner {
  constructor() {
    this.read = 0; // characters up to the first line that is not complete
    this.ends = []; // places where a block begins and those before it are finished
    this.fence = ""; // the mark that closes the code or formula we are in
    this.within = false; // the block may go on after a blank line, as lists and what is indented do
    this.blank = false; // the line before is blank
  }

  feed(text) {
    for (let end; (end = text.indexOf("\n", this.read)) >= 0; this.read = end + 1) this.line(text.slice(this.read, end));
  }

  line(line) {
    const bare = line.trim();
    const after = this.read + line.length + 1;
    if (this.fence) {
      const code = this.fence[0] !== "$" && this.fence[0] !== "\\";
      const closed = code ? bare.startsWith(this.fence) && !bare.replaceAll(this.fence[0], "") : bare.endsWith(this.fence);
      if (closed) this.fence = "";
      if (closed && !this.within) this.end(after);
      return;
    }
    if (!bare) {
      this.blank = true;
      if (!this.within) this.end(after);
      return;
    }
    const item = /^([-*+]|\d{1,9}[.)]) /.test(line);
    const title = /^#{1,6} /.test(line);
    if (item || title || (this.blank && !/^\s/.test(line))) {
      this.end(this.read);
      this.within = item;
    }
    this.blank = false;
    const fence = /^\s{0,12}(?:[-*+] |\d{1,9}[.)] )?\s*(`{3,}(?=[^`]*$)|~{3,})/.exec(line);
    const formula = /^(\$\$|\\\[)/.exec(bare)?.[0];
    const close = formula === "$$" ? "$$" : "\\]";
    if (fence) this.fence = fence[1];
    else if (formula && !bare.slice(2).includes(close)) this.fence = close;
    else if (title) this.end(after);
  }

  end(place) {
    if (place > (this.ends.at(-1) ?? 0)) this.ends.push(place);
  }
}

/** A text that grows, shown in `host`. While `live` is false it is only kept, and costs nothing. */
export class Flow {
  constructor(host, live = true) {
    this.host = host;
    this.live = live;
    this.text = "";
    this.done = 0; // characters that are shown as blocks
    this.shown = 0; // characters that are shown at all
    this.blocks = []; // {html, nodes}
    this.scanner = new Scanner();
    this.tail = null;
    this.node = null; // the text of the tail
    this.busy = null;
    this.whole = false;
  }

  /** Add what came, and show it. */
  append(piece) {
    this.text += piece;
    if (this.live) this.show();
  }

  /** Begin to show what was kept. */
  wake() {
    if (this.live) return;
    this.live = true;
    this.show();
    if (this.whole) this.finish();
  }

  show() {
    this.scanner.feed(this.text);
    this.extendTail();
    this.busy ??= this.advance().finally(() => (this.busy = null));
  }

  /** Render everything; resolves when it is shown. */
  async finish() {
    this.whole = true;
    if (!this.live) return;
    if (this.text.length <= LONGEST) {
      const text = this.text;
      const blocks = await render(text).catch(() => null);
      await this.busy;
      if (blocks && text === this.text) this.replace(blocks);
      return;
    }
    this.scanner.feed(this.text + "\n");
    await this.busy;
    await this.advance();
  }

  /** Have the server render the blocks that are finished, one request after the other. */
  async advance() {
    for (let end; (end = this.next()) > this.done; ) {
      const blocks = await render(this.text.slice(this.done, end)).catch(() => null);
      if (!blocks) return; // the text stays plain
      for (const html of blocks) this.blocks.push({ html, nodes: this.insert(html) });
      this.done = end;
      this.scanner.ends = this.scanner.ends.filter((one) => one > end);
      this.resetTail();
    }
  }

  /** The farthest place up to which one request may render. */
  next() {
    const near = this.scanner.ends.filter((end) => end - this.done <= LONGEST);
    if (this.whole && this.text.length - this.done <= LONGEST) return this.text.length;
    return near.at(-1) ?? 0;
  }

  insert(html) {
    const nodes = toNodes(html);
    if (this.tail) this.tail.before(...nodes);
    else this.host.append(...nodes);
    return nodes;
  }

  /** Show these blocks. Those that are shown already stay where they are. */
  replace(blocks) {
    let same = 0;
    while (same < blocks.length && blocks[same] === this.blocks[same]?.html) same++;
    for (const { nodes } of this.blocks.splice(same)) nodes.forEach((node) => node.remove());
    this.tail?.remove();
    this.tail = this.node = null;
    for (const html of blocks.slice(same)) this.blocks.push({ html, nodes: this.insert(html) });
    this.done = this.shown = this.text.length;
  }

  extendTail() {
    if (this.shown === this.text.length) return;
    if (this.tail && this.tail.dataset.kind !== this.kind()) this.resetTail();
    else if (this.tail) {
      this.node.appendData(this.text.slice(this.shown));
      this.shown = this.text.length;
    } else this.resetTail();
  }

  /** What the last block looks to be, so that it stands as it will when it is finished. */
  kind() {
    const fence = /^(`{3,}|~{3,})([^\n]*)\n/.exec(this.text.slice(this.done, this.done + 200).trimStart());
    return fence ? "code" : "text";
  }

  resetTail() {
    this.tail?.remove();
    this.tail = this.node = null;
    const rest = this.text.slice(this.done).replace(/^\n+/, "");
    this.shown = this.text.length;
    if (!rest) return;
    const kind = this.kind();
    const fence = kind === "code" ? /^[`~]{3,}([^\n]*)\n/.exec(rest) : null;
    this.node = document.createTextNode(fence ? rest.slice(fence[0].length) : rest);
    this.tail = document.createElement(fence ? "div" : "p");
    this.tail.className = fence ? "code" : "plain";
    this.tail.dataset.kind = kind;
    if (fence) {
      const [head, pre, code] = ["div", "pre", "code"].map((tag) => document.createElement(tag));
      head.className = "language";
      head.textContent = fence[1].trim().split(" ")[0].slice(0, 20);
      code.append(this.node);
      pre.append(code);
      this.tail.append(head, pre);
    } else this.tail.append(this.node);
    this.host.append(this.tail);
  }
}
