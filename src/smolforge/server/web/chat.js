// The chat: turns that are sent as a whole each time, since the server keeps nothing.

import { answer, busy, measured, stop } from "./answer.js";
import { announce, button, by, copy, eachFrame, fit, follow, make, sends, trouble } from "./elements.js";
import { memory } from "./settings.js";
import { Drawing, Growing } from "./tokens.js";

export class Chat {
  constructor(page) {
    this.page = page;
    this.place = `chat.${page.model}`;
    this.turns = memory.get(this.place, []); // {role, text, tokens, stats, error}
    this.cleared = null;
    this.scroller = by("chat").querySelector(".scroll");
    this.message = by("message");
    this.message.addEventListener("keydown", (event) => {
      if (!sends(event)) return;
      event.preventDefault();
      by("composer").requestSubmit();
    });
    this.message.addEventListener("input", () => fit(this.message));
    by("composer").addEventListener("submit", (event) => this.#submitted(event));
    by("clear-chat").addEventListener("click", () => this.#clear());
    by("welcome").firstElementChild.textContent = page.model;
    this.render();
  }

  focus() {
    this.message.focus();
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** All turns anew. */
  render() {
    by("turns").replaceChildren(...this.turns.map((turn, i) => this.#turn(turn, i)));
    by("welcome").hidden = this.turns.length > 0;
    by("clear-chat").textContent = this.cleared ? "Undo clear" : "Clear";
    by("clear-chat").disabled = !this.turns.length && !this.cleared;
  }

  #submitted(event) {
    event.preventDefault();
    if (busy()) {
      if (event.submitter) stop();
      return;
    }
    const text = this.message.value.trim();
    if (!text) return;
    this.message.value = "";
    fit(this.message);
    this.#say(text, this.turns.length);
  }

  /** The user's words take the place of the turns from `from` on, and are answered. */
  #say(text, from) {
    const kept = this.turns.slice(0, from).filter((turn) => turn.role === "user" || turn.text);
    this.turns = [...kept, { role: "user", text }];
    this.#answer();
  }

  async #answer() {
    const { page } = this;
    const body = { model: page.model, messages: this.#messages(), ...page.controls.request };
    if (page.probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
    const turn = { role: "assistant", text: "", tokens: [] };
    this.turns.push(turn);
    this.cleared = null;
    this.render();
    this.scroller.scrollTop = this.scroller.scrollHeight;
    announce("Answering");
    const article = by("turns").lastElementChild;
    const growing = new Growing();
    const drawing = new Drawing(article.querySelector(".said"), page.probabilities);
    let latest;
    const draw = eachFrame(() => {
      if (!article.isConnected || latest.over) return;
      follow(this.scroller, () => drawing.draw(growing.text, growing.visible));
      article.querySelector(".stats").textContent = measured(latest, page.context);
      page.alternatives.check();
    });
    article.setAttribute("aria-busy", "true");
    const found = await answer("/v1/chat/completions", body, growing, (now) => {
      latest = now;
      draw();
    });
    found.over = true;
    Object.assign(turn, { text: growing.text, tokens: growing.visible, stats: measured(found, page.context) });
    if (found.error) turn.error = found.error.message;
    this.#end(turn, found.error);
  }

  #end(turn, error) {
    memory.set(this.place, this.turns);
    follow(this.scroller, () => this.render());
    announce(error ? "" : `Answered: ${turn.stats}`);
    this.page.refused(error);
  }

  #messages() {
    const said = this.turns.map(({ role, text }) => ({ role, content: text }));
    const { system } = this.page.controls;
    return system ? [{ role: "system", content: system }, ...said] : said;
  }

  #turn(turn, i) {
    const own = turn.role === "user";
    const article = make("article", `turn ${turn.role}`);
    const said = make("div", "said");
    const wrong = make("p", "trouble");
    const acts = make("div", "acts");
    article.setAttribute("aria-label", own ? "You" : "Answer");
    article.append(make("h3", "who", own ? "You" : "Answer"), said, wrong, make("p", "stats", turn.stats));
    new Drawing(said, this.page.probabilities).draw(turn.text, this.page.probabilities ? turn.tokens ?? [] : []);
    trouble(wrong, turn.error && { message: turn.error });
    wrong.setAttribute("role", "alert");
    if (own) acts.append(button("Edit", () => !busy() && this.#edit(article, i)));
    else acts.append(button(turn.error ? "Try again" : "Regenerate", () => !busy() && this.#again(i)));
    acts.append(button("Copy", (from) => copy(turn.text, from)));
    article.append(acts);
    return article;
  }

  #again(i) {
    this.turns = this.turns.slice(0, i);
    this.#answer();
    this.message.focus();
  }

  #edit(article, i) {
    const field = make("textarea", "edit");
    const done = () => {
      this.render();
      by("turns").children[i].querySelector(".acts button").focus();
    };
    const send = () => {
      const text = field.value.trim();
      if (!text || busy()) return;
      this.#say(text, i);
      this.message.focus();
    };
    field.value = this.turns[i].text;
    field.rows = 1;
    field.setAttribute("aria-label", "Edit what you said");
    field.addEventListener("input", () => fit(field));
    field.addEventListener("keydown", (event) => {
      if (sends(event)) send();
      else if (event.key === "Escape") done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    article.classList.add("edited");
    article.querySelector(".said").replaceWith(field);
    article.querySelector(".acts").replaceChildren(button("Send", send), button("Cancel", done));
    fit(field);
    field.focus();
  }

  #clear() {
    stop();
    [this.turns, this.cleared] = this.cleared ? [this.cleared, null] : [[], this.turns];
    memory.set(this.place, this.turns);
    this.render();
    this.message.focus();
  }
}
