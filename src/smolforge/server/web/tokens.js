// Tokens: found in the chunks of an answer, drawn as text, and explained where one is pointed at.
//
// chunks -> Growing (text, and where each token stands in it) -> Drawing (spans, tinted by doubt) -> Alternatives
// A token is {start, end, name, logprob, top: [[name, logprob], ...]}; places count UTF-16 units of the text.

const LEAST_LIKELY = Math.log(0.01); // as strongly tinted as it gets

/** A text that an answer is added to, chunk by chunk. */
export class Growing {
  constructor(text = "", tokens = []) {
    this.text = text;
    this.tokens = tokens;
    this.given = tokens.length; // those of earlier answers, whose ends are known
    this.waiting = []; // tokens whose text is held back, as what may become a stop string is
    this.walked = 0; // code points of the answer up to `unit`, a place in the text
    this.unit = text.length;
    this.heard = 0; // code points of all tokens that were told
    this.decoder = new TextDecoder();
  }

  /** One choice of a chunk, of a chat or a completion. Returns how many tokens it told of. */
  add(choice) {
    this.text += choice.delta?.content ?? choice.text ?? "";
    const told = choice.logprobs ? (choice.delta ? this.#ofChat(choice.logprobs) : ofCompletion(choice.logprobs)) : [];
    this.waiting.push(...told);
    while (this.waiting.length && this.#walk(this.waiting[0].point)) {
      const { point, ...token } = this.waiting.shift();
      this.#close(this.unit);
      this.tokens.push({ start: this.unit, end: this.text.length, ...token });
    }
    this.#close(this.text.length);
    return told.length;
  }

  /** The tokens that have text of their own. */
  get visible() {
    return this.tokens.filter((token) => token.end > token.start);
  }

  /** Where the last token ends is known when the next begins. */
  #close(end) {
    const last = this.tokens.length > this.given ? this.tokens.at(-1) : null;
    if (last && end >= last.start) last.end = end;
  }

  /** Go on to a code point of the answer; false where the text does not reach that far yet. */
  #walk(point) {
    while (this.walked < point && this.unit < this.text.length) {
      this.unit += this.text.codePointAt(this.unit) > 0xffff ? 2 : 1;
      this.walked += 1;
    }
    return this.walked >= point;
  }

  /** A chat tells the bytes of its tokens, so a character cut in two counts where it becomes whole. */
  #ofChat({ content }) {
    return content.map(({ token, logprob, bytes, top_logprobs: top }) => {
      const point = this.heard;
      this.heard += [...this.decoder.decode(new Uint8Array(bytes), { stream: true })].length;
      return { point, name: token, logprob, top: top.map((each) => [each.token, each.logprob]) };
    });
  }
}

function ofCompletion(told) {
  return told.tokens.map((name, i) => ({
    point: told.text_offset[i],
    name,
    logprob: told.token_logprobs[i],
    top: Object.entries(told.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

/** Tokens after the text they stand in was edited: those that were touched are text like any other. */
export function edited(tokens, before, after) {
  const most = Math.min(before.length, after.length);
  let head = 0;
  while (head < most && before[head] === after[head]) head++;
  let tail = 0;
  while (tail < most - head && before.at(-1 - tail) === after.at(-1 - tail)) tail++;
  const moved = after.length - before.length;
  const kept = [];
  for (const token of tokens) {
    if (token.end <= head) kept.push(token);
    else if (token.start >= before.length - tail) kept.push({ ...token, start: token.start + moved, end: token.end + moved });
  }
  return kept;
}

/** A text and its tokens as a field holds them: it ends lines by "\n", whatever a model wrote. */
export function inField(text, tokens) {
  const lost = [...text.matchAll(/\r(?=\n)/g)].map((found) => found.index);
  const at = (place) => place - lost.filter((index) => index < place).length;
  const moved = tokens.map((token) => ({ ...token, start: at(token.start), end: at(token.end) }));
  return { text: text.replace(/\r\n?/g, "\n"), tokens: moved.filter((token) => token.end > token.start) };
}

/** Text in an element, its tokens as spans. */
export class Drawing {
  static tokens = new WeakMap(); // span -> token

  constructor(element, walkable) {
    this.element = element;
    this.walkable = walkable; // whether a keyboard can go from token to token
    this.afresh();
  }

  /** Forget what was drawn. */
  afresh() {
    this.element.replaceChildren();
    this.done = 0;
    this.at = 0;
    this.loose = [];
    return this;
  }

  /** Draw what was added since: all but the last token are as they will stay. */
  draw(text, tokens) {
    for (const node of this.loose) node.remove();
    while (this.done < tokens.length - 1) this.#put(text, tokens[this.done++]);
    const { at, done } = this;
    const settled = this.element.childNodes.length;
    if (done < tokens.length) this.#put(text, tokens[done]);
    this.#gap(text, text.length);
    this.at = at;
    this.loose = [...this.element.childNodes].slice(settled);
    if (this.walkable) this.element.querySelector(".token")?.setAttribute("tabindex", "0");
  }

  #put(text, token) {
    this.#gap(text, token.start);
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = text.slice(token.start, token.end);
    span.style.setProperty("--doubt", Math.min(1, Math.max(0, token.logprob / LEAST_LIKELY)).toFixed(3));
    if (this.walkable) span.tabIndex = -1;
    Drawing.tokens.set(span, token);
    this.element.append(span);
    this.at = token.end;
  }

  #gap(text, end) {
    if (end > this.at) this.element.append(text.slice(this.at, end));
    this.at = Math.max(this.at, end);
  }
}

/** The card that says what else the model would have said. */
export class Alternatives {
  constructor(card) {
    this.card = card;
    this.span = null;
  }

  show(span) {
    if (span === this.span) return;
    this.hide();
    const token = Drawing.tokens.get(span);
    if (!token) return;
    this.span = span;
    span.classList.add("shown");
    span.setAttribute("aria-describedby", this.card.id);
    this.card.firstElementChild.replaceChildren(...rows(token).map(row));
    this.card.hidden = false;
    this.check();
  }

  /** After something moved: the card goes with its token, and where that is gone, so is the card. */
  check() {
    if (!this.span) return;
    if (this.span.isConnected) this.#place(this.span.getClientRects()[0]);
    else this.hide();
  }

  hide() {
    this.card.hidden = true;
    this.span?.classList.remove("shown");
    this.span?.removeAttribute("aria-describedby");
    this.span = null;
  }

  /** Below the token where there is room, else above it. */
  #place(of) {
    const { width, height } = this.card.getBoundingClientRect();
    const below = of.bottom + 6 + height < innerHeight;
    this.card.style.top = `${Math.max(4, below ? of.bottom + 6 : of.top - 6 - height)}px`;
    this.card.style.left = `${Math.max(8, Math.min(of.left - 12, innerWidth - width - 8))}px`;
  }
}

/** The likeliest tokens, the chosen one among them. */
function rows(token) {
  const found = token.top.map(([name, logprob]) => ({ name, logprob, own: name === token.name }));
  if (!found.some((each) => each.own)) found.push({ name: token.name, logprob: token.logprob, own: true });
  return found;
}

/** One token in words, for those who hear the page. */
export function spoken(span) {
  const token = Drawing.tokens.get(span);
  return rows(token).map(({ name, logprob, own }) => `${own ? "chosen " : ""}${shown(name)} ${share(logprob)}`).join(", ");
}

function row({ name, logprob, own }) {
  const item = document.createElement("li");
  item.className = own ? "own" : "";
  const cells = ["name", "bar", "share"].map((kind) => Object.assign(document.createElement("span"), { className: kind }));
  cells[0].textContent = shown(name);
  cells[1].style.setProperty("--share", Math.exp(logprob).toFixed(4));
  cells[2].textContent = share(logprob);
  item.append(...cells);
  return item;
}

function shown(name) {
  return name.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
}

function share(logprob) {
  const percent = 100 * Math.exp(logprob);
  if (percent < 0.01) return "< 0.01 %";
  return `${percent.toFixed(percent < 0.1 ? 2 : percent < 99.95 ? 1 : 0)} %`;
}
