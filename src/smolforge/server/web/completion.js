// The completion: one document, written by both. A field lies over the same text drawn as tokens, so it can be
// edited anywhere, at any time, and what was edited is text like any other.

import { answer, busy, measured, stop } from "./answer.js";
import { announce, by, copy, eachFrame, follow, sends, trouble } from "./elements.js";
import { memory } from "./settings.js";
import { Drawing, edited, Growing, inField, spoken } from "./tokens.js";

const WALKS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];

export class Completion {
  constructor(page) {
    this.page = page;
    this.place = `completion.${page.model}`;
    this.field = by("document");
    this.scroller = by("completion").querySelector(".scroll");
    this.drawing = new Drawing(by("printed"), false);
    this.sheet = memory.get(this.place, { text: "", tokens: [], cut: null }); // cut: where the last answer begins
    this.cleared = null;
    this.field.addEventListener("input", () => this.#typed());
    this.field.addEventListener("keydown", (event) => {
      if (!sends(event)) return;
      event.preventDefault();
      by("continue").requestSubmit();
    });
    this.field.addEventListener("keyup", (event) => WALKS.includes(event.key) && this.#walked());
    this.field.addEventListener("mousemove", (event) => this.#pointed(event));
    this.field.addEventListener("mouseleave", () => page.alternatives.hide());
    this.field.addEventListener("blur", () => page.alternatives.hide());
    this.scroller.addEventListener("click", (event) => event.target === this.scroller && this.field.focus());
    by("continue").addEventListener("submit", (event) => this.#submitted(event));
    by("regenerate").addEventListener("click", () => this.#again());
    by("copy").addEventListener("click", (event) => copy(this.sheet.text, event.target));
    by("clear-completion").addEventListener("click", () => this.#clear());
    this.field.value = this.sheet.text;
    this.render();
  }

  focus() {
    this.field.focus();
    this.field.setSelectionRange(this.field.value.length, this.field.value.length);
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  render() {
    this.drawing.afresh().draw(this.sheet.text, this.page.probabilities ? this.sheet.tokens : []);
    this.#offer();
  }

  #offer() {
    const { text, cut } = this.sheet;
    by("regenerate").disabled = cut === null || busy();
    by("copy").disabled = !text;
    by("clear-completion").disabled = !text && !this.cleared;
    by("clear-completion").textContent = this.cleared ? "Undo clear" : "Clear";
  }

  #typed() {
    const { text, tokens, cut } = this.sheet;
    const now = this.field.value;
    const mark = cut === null ? [] : edited([{ start: 0, end: cut }, { start: cut, end: text.length }], text, now);
    this.sheet = { text: now, tokens: edited(tokens, text, now), cut: mark.find((part) => part.start === 0)?.end ?? null };
    if (cut === 0) this.sheet.cut = 0;
    this.cleared = null;
    this.page.alternatives.hide();
    this.render();
    memory.set(this.place, this.sheet);
  }

  #submitted(event) {
    event.preventDefault();
    if (!busy()) this.#go();
    else if (event.submitter) stop();
  }

  #again() {
    if (busy()) return;
    const { text, tokens, cut } = this.sheet;
    this.sheet = { text: text.slice(0, cut), tokens: tokens.filter((token) => token.end <= cut), cut };
    this.field.value = this.sheet.text;
    this.render();
    this.#go();
    this.field.focus();
  }

  async #go() {
    const { page } = this;
    const { text, tokens } = this.sheet;
    const body = { model: page.model, prompt: text, ...page.controls.request };
    if (page.probabilities) body.logprobs = 5;
    const growing = new Growing(text, [...tokens]);
    let latest;
    const show = () => {
      this.sheet = { ...inField(growing.text, growing.visible), cut: text.length };
      this.field.value = this.sheet.text;
      follow(this.scroller, () => this.drawing.draw(this.sheet.text, page.probabilities ? this.sheet.tokens : []));
      by("completion-stats").textContent = measured(latest, page.context);
      page.alternatives.check();
    };
    const draw = eachFrame(() => !latest.over && show());
    this.cleared = null;
    this.field.readOnly = true;
    this.drawing.afresh();
    trouble(by("completion-error"), null);
    announce("Continuing");
    const running = answer("/v1/completions", body, growing, (now) => {
      latest = now;
      draw();
    });
    this.#offer();
    latest = await running;
    latest.over = true;
    show();
    this.#end(latest);
  }

  #end({ error }) {
    this.field.readOnly = false;
    trouble(by("completion-error"), error);
    announce(error ? "" : `Continued: ${by("completion-stats").textContent}`);
    memory.set(this.place, this.sheet);
    this.#offer();
    this.page.refused(error);
  }

  #clear() {
    if (busy()) return;
    const empty = { text: "", tokens: [], cut: null };
    [this.sheet, this.cleared] = this.cleared ? [this.cleared, null] : [empty, this.sheet];
    this.field.value = this.sheet.text;
    by("completion-stats").textContent = "";
    trouble(by("completion-error"), null);
    memory.set(this.place, this.sheet);
    this.render();
    this.field.focus();
  }

  /** The field lies above: what is pointed at is beneath it. */
  #pointed({ clientX, clientY }) {
    const span = document.elementsFromPoint(clientX, clientY).find((element) => element.matches("#printed .token"));
    if (span) this.page.alternatives.show(span);
    else this.page.alternatives.hide();
  }

  /** The token behind the caret. */
  #walked() {
    const at = this.field.selectionStart;
    const spans = [...by("printed").querySelectorAll(".token")];
    const span = spans.find((each) => Drawing.tokens.get(each).start <= at && at < Drawing.tokens.get(each).end);
    if (!span) return this.page.alternatives.hide();
    this.page.alternatives.show(span);
    announce(spoken(span));
  }
}
