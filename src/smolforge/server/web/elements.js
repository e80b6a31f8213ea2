// Elements, made and found. Text goes in as text and never as HTML: what a model writes is hostile.

export const by = (id) => document.getElementById(id);

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export function button(label, action) {
  const element = make("button", "", label);
  element.type = "button";
  element.addEventListener("click", () => action(element));
  return element;
}

/** A text field as high as its text. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Change what scrolls, and stay at its end if that is where one was. */
export function follow(scroller, change) {
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  change();
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

/** Call at most once a frame, last call wins. */
export function eachFrame(action) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      action();
    });
  };
}

/** Enter, but not with Shift, nor while a character is being composed. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

export function announce(text) {
  by("status").textContent = text;
}

/** Say what went wrong where it belongs, or that nothing did. */
export function trouble(element, error) {
  element.textContent = error?.message ?? "";
  element.hidden = !error;
}

export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Plain http to another machine has no clipboard; a selected field has.
    const field = make("textarea", "unseen", "");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    from.focus();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (from.textContent = label === "Copied" ? "Copy" : label), 1500);
}
