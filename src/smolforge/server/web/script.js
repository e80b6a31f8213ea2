// The page: what model this is, which view is open, how it looks, and what each key does.

import { busy, count, stop } from "./answer.js";
import { get, key } from "./api.js";
import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { by, trouble } from "./elements.js";
import { Controls, memory } from "./settings.js";
import { Alternatives } from "./tokens.js";

const page = {
  model: "",
  context: 0,
  chats: false, // whether the model has a template
  probabilities: memory.get("probabilities", true),
  controls: new Controls(by("controls")),
  alternatives: new Alternatives(by("alternatives")),
  views: {},
  /** After an answer: a refused key is asked for again. */
  refused(error) {
    if (error?.status === 401) askForKey();
  },
};

async function start() {
  try {
    const [models, tokenizer] = await Promise.all([get("/v1/models"), get("/tokenizer_info")]);
    const [card] = models.data;
    Object.assign(page, { model: card.id, context: card.max_model_len, chats: tokenizer.chat_template !== null });
    trouble(by("trouble"), null);
    open();
  } catch (error) {
    if (error.status === 401) askForKey();
    else trouble(by("trouble"), error);
  }
}

function open() {
  document.title = `${page.model} \u00b7 smolforge`;
  by("model").textContent = by("model").title = page.model;
  by("welcome").lastElementChild.textContent = `${count(page.context)} tokens of context. Only this browser keeps the conversation.`;
  by("to-chat").disabled = !page.chats;
  by("to-chat").title = page.chats ? "" : "This model has no chat template: it continues text";
  by("base").hidden = page.chats;
  document.body.classList.remove("shut");
  page.views = { chat: new Chat(page), completion: new Completion(page) };
  show(page.chats ? memory.get("view", "chat") : "completion");
}

function show(name) {
  for (const each of ["chat", "completion"]) {
    by(each).hidden = each !== name;
    by(`to-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  document.body.dataset.view = name;
  page.alternatives.hide();
  page.views[name].focus();
}

for (const name of ["chat", "completion"]) {
  by(`to-${name}`).addEventListener("click", () => {
    if (!page.views[name]) return;
    memory.set("view", name);
    show(name);
  });
}

// The key

function askForKey() {
  by("key-form").hidden = false;
  if (key.get()) trouble(by("trouble"), { message: "That is not this server's key." });
  key.forget();
  by("key").focus();
}

by("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const value = by("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) {
    return trouble(by("trouble"), { message: "A key is made of visible ASCII characters." });
  }
  key.set(value);
  by("key").value = "";
  by("key-form").hidden = true;
  trouble(by("trouble"), null);
  if (!page.model) await start();
  else page.views[document.body.dataset.view].focus();
});

// How it looks

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const own = memory.get("theme", null);
  document.documentElement.dataset.theme = own ?? "";
  by("theme").textContent = (own ?? (prefersDark.matches ? "dark" : "light")) === "dark" ? "Light" : "Dark";
}

by("theme").addEventListener("click", () => {
  const next = by("theme").textContent.toLowerCase();
  memory.set("theme", next === (prefersDark.matches ? "dark" : "light") ? null : next);
  paint();
});
prefersDark.addEventListener("change", paint);

function paintProbabilities() {
  by("probabilities").setAttribute("aria-pressed", String(page.probabilities));
  document.body.classList.toggle("probable", page.probabilities);
}

by("probabilities").addEventListener("click", () => {
  page.probabilities = !page.probabilities;
  memory.set("probabilities", page.probabilities);
  page.alternatives.hide();
  paintProbabilities();
  if (!busy()) for (const view of Object.values(page.views)) view.render();
});

const wide = matchMedia("(min-width: 62rem)");

function showSettings(open) {
  by("settings").hidden = !open;
  by("settings-button").setAttribute("aria-expanded", String(open));
}

by("settings-button").addEventListener("click", () => {
  showSettings(by("settings").hidden);
  if (wide.matches) memory.set("settings", !by("settings").hidden);
});
wide.addEventListener("change", () => showSettings(wide.matches && memory.get("settings", true)));

// Keys, and what is pointed at

addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (busy()) stop();
  else if (page.alternatives.span) page.alternatives.hide();
  else if (!wide.matches && !by("settings").hidden) {
    showSettings(false);
    by("settings-button").focus();
  }
});

const turns = by("turns");
const tokenOf = (event) => (event.target.classList.contains("token") ? event.target : null);

turns.addEventListener("mouseover", (event) => tokenOf(event) && page.alternatives.show(tokenOf(event)));
turns.addEventListener("mouseout", (event) => tokenOf(event) && page.alternatives.hide());
turns.addEventListener("focusin", (event) => tokenOf(event) && page.alternatives.show(tokenOf(event)));
turns.addEventListener("focusout", (event) => tokenOf(event) && page.alternatives.hide());
turns.addEventListener("keydown", (event) => {
  const span = tokenOf(event);
  const all = span ? [...span.parentElement.querySelectorAll(".token")] : [];
  const at = all.indexOf(span);
  const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
  if (!all[next]) return;
  event.preventDefault();
  span.tabIndex = -1;
  all[next].tabIndex = 0;
  all[next].focus();
});
addEventListener("scroll", () => page.alternatives.check(), true);
addEventListener("resize", () => page.alternatives.hide());

paint();
paintProbabilities();
showSettings(wide.matches && memory.get("settings", true));
start();
