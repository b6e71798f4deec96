// The settings, the list of shortcuts and the line of news at the bottom.

import { key } from "/web/api.js";
import { speak, t } from "/web/i18n.js";
import { make } from "/web/message.js";
import { DEFAULTS, usage } from "/web/store.js";

const get = (id) => document.getElementById(id);
const LENGTHS = [0, ...Array.from({ length: 13 }, (_, power) => 16 * 2 ** power), 2 ** 17]; // 0: as far as the context goes

/** Show a line of news, with an action where there is something to take back. */
export function tell(text, label = "", action = null) {
  clearTimeout(tell.timer);
  (document.querySelector("dialog[open]") ?? document.body).append(get("toast")); // what is behind a panel is inert
  get("toast-text").textContent = get("live").textContent = text;
  get("toast-action").textContent = label;
  get("toast-action").hidden = !action;
  get("toast-action").onclick = () => {
    get("toast").hidden = true;
    action();
  };
  get("toast").hidden = false;
  tell.timer = setTimeout(() => (get("toast").hidden = true), action ? 8000 : 4000);
}

/** The settings of the open conversation, the key and the language. */
export class Settings {
  constructor(conversation, model, changed, spoken) {
    this.conversation = conversation; // () -> the open one
    this.model = model;
    this.dialog = get("settings");
    for (const name of ["system", "temperature", "top_p", "top_k", "max_tokens", "seed"]) {
      get(name).addEventListener("input", () => {
        this.read(name);
        changed();
      });
    }
    get("defaults").addEventListener("click", () => {
      Object.assign(this.conversation().settings, DEFAULTS);
      this.show();
      changed();
    });
    get("access").addEventListener("submit", async (event) => {
      event.preventDefault();
      key.set(get("key").value.trim());
      if (await changed("key")) this.dialog.close();
    });
    get("language").addEventListener("change", () => {
      speak(get("language").value);
      this.show();
      spoken();
    });
  }

  open(field = "") {
    this.show();
    this.dialog.showModal();
    if (field) get(field).focus();
  }

  /** Write the values into the fields. */
  show() {
    const { settings } = this.conversation();
    for (const name of ["system", "temperature", "top_p", "top_k", "seed"]) get(name).value = settings[name];
    const fitting = LENGTHS.filter((length) => length < (this.model().length || Infinity));
    get("max_tokens").max = fitting.length - 1;
    const at = fitting.findLastIndex((length) => length <= settings.max_tokens);
    get("max_tokens").value = settings.max_tokens ? Math.max(1, at) - 1 : fitting.length - 1;
    get("key").value = key.get();
    get("language").value = localStorage.getItem("language") ?? "";
    const { conversations, characters } = usage();
    get("used").textContent = t("used", { n: conversations, size: `${(characters / 1e6).toFixed(1)} MB` });
    this.say();
  }

  read(name) {
    const { settings } = this.conversation();
    const field = get(name);
    if (name === "max_tokens") settings.max_tokens = Number(field.value) === Number(field.max) ? 0 : LENGTHS[Number(field.value) + 1];
    else if (name === "seed") settings.seed = field.value = field.value.replace(/\D/g, "");
    else settings[name] = name === "system" ? field.value : Number(field.value);
    this.say();
  }

  /** The values beside the sliders. */
  say() {
    const { temperature, top_p, top_k, max_tokens } = this.conversation().settings;
    const texts = { temperature: temperature ? temperature.toFixed(2) : t("greedy"), top_p: top_p.toFixed(2) };
    texts.top_k = top_k ? String(top_k) : t("all");
    texts.max_tokens = max_tokens ? t("tokens", { n: max_tokens.toLocaleString("en") }) : t("context");
    for (const [name, text] of Object.entries(texts)) {
      document.querySelector(`output[for=${name}]`).textContent = text;
      get(name).setAttribute("aria-valuetext", text);
    }
  }
}

/** Fill the list of shortcuts. */
export function showKeys(thinking) {
  const rows = [
    ["Enter", "kSend"], ["Shift Enter", "kLine"], ["Esc", "kStop"], ["↑", "kEdit"], ["Alt N", "kNew"],
    ["Alt R", "kAgain"], ["Alt C", "kCopy"], ["Alt ↑ ↓", "kMove"], ["Alt S", "kSettings"],
    ...(thinking ? [["Alt T", "kThink"]] : []), ["/", "kFocus"], ["?", "kHelp"],
  ];
  const pairs = rows.map(([keys, what]) => {
    const caps = keys.split(" ").map((cap) => make("kbd", "", cap));
    return make("div", "", make("dt", "", ...caps), make("dd", "", t(what)));
  });
  get("keys").replaceChildren(...pairs);
}

for (const panel of [get("help"), get("settings")]) {
  panel.addEventListener("click", (event) => event.target === panel && panel.close());
  panel.addEventListener("close", () => document.body.append(get("toast")));
}
